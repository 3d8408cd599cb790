"""The model card of a model directory: what the hub shows of it. Imports no torch."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from percov2.files import atomic_path
from percov2.inspection import GENERATED_NOTE
from percov2.model_store import INDEX_NAME, PATCH, ModelSummary

CARD_NAME = "README.md"
NOTICE_NAME = "NOTICE"
TEXTS = (CARD_NAME, NOTICE_NAME)
"""What a model directory holds for people."""

_TAGS = ["generative-compression", "image-compression", "percov2", "vector-quantization"]
_STABILITY_LICENCE = "stabilityai-ai-community"
_STABILITY_TERMS = "https://stability.ai/license"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What a card says of a model, read from its directory.

    Attributes:
        summary: from its index.
        codebook_size: V.
        steps: sampling steps if the user names none.
        guidance: the same for guidance.
        notice: text of the file NOTICE, "" if there is none.
    """

    summary: ModelSummary
    codebook_size: int
    steps: int
    guidance: float
    notice: str

    @classmethod
    def read(cls, directory: Path) -> _Facts:
        summary = ModelSummary.read(directory)
        try:
            index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
            quantizer = directory / "quantizer" / "config.json"
            codes = json.loads(quantizer.read_text(encoding="utf-8"))["codebook_size"]
            steps, guidance = index["default_steps"], index["default_guidance"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{directory} is no complete model directory ({error!r}): give one that stage 2 "
                "wrote"
            ) from error
        notice = directory / NOTICE_NAME
        return cls(
            summary=summary,
            codebook_size=int(codes),
            steps=int(steps),
            guidance=float(guidance),
            notice=notice.read_text(encoding="utf-8").strip() if notice.is_file() else "",
        )

    @property
    def token_side(self) -> int:
        """Pixels per token along an axis."""
        return PATCH * self.summary.latents_per_token

    @property
    def nominal_bpp(self) -> float:
        """Bits per pixel of the tokens at log2(V) bits each."""
        return math.log2(self.codebook_size) / self.token_side**2


def carry_texts(source: Path, directory: Path) -> None:
    """Copy card and notice of a model directory beside the weights that were saved from it.

    Args:
        source: directory that the model was loaded from.
        directory: that it was saved to; a text that is there stays.
    """
    for name in TEXTS:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)


def write_model_card(directory: Path, *, model: str, licence: str | None = None) -> Path:
    """Write the card of a model directory that has none; a card that is there stays.

    Args:
        directory: complete model directory; its NOTICE, if it has one, is quoted.
        model: hub id or path that users load it by.
        licence: identifier of the weights' licence as the hub writes it, for instance
            ``apache-2.0``. None: Stability AI's where there is a NOTICE, otherwise ``unknown``.

    Returns:
        Path of the card.

    Raises:
        ValueError: no complete model directory, or a licence for weights whose NOTICE has one.
    """
    path = directory / CARD_NAME
    if path.exists():
        return path
    facts = _Facts.read(directory)
    if facts.notice and licence is not None:
        raise ValueError(
            f"licence is {licence!r}, but {directory / NOTICE_NAME} says that the weights are "
            "under Stability AI's: leave licence out"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(_card(facts, model=model, licence=licence), encoding="utf-8")
    return path


def _card(facts: _Facts, *, model: str, licence: str | None) -> str:
    sections = (
        f"---\n{_front_matter(facts, licence)}\n---\n",
        f"# {facts.summary.name}\n\nA model of [PerCoV2](https://arxiv.org/abs/2503.09368) for "
        "percov2: photographs in a few hundred bytes.\n",
        f"**{GENERATED_NOTE}** Not for evidence, medicine or identification.\n",
        _table(facts),
        _usage(model),
        "## Not written here\n\nThe program that wrote this card does not know the training data, "
        "the figures and the limits of this model. Whoever publishes it should add them.\n",
        _terms(facts, licence),
    )
    return "\n".join(sections)


def _front_matter(facts: _Facts, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    derived = bool(facts.notice)
    data = ModelCardData(
        license="other" if derived else licence or "unknown",
        license_name=_STABILITY_LICENCE if derived else None,
        license_link=_STABILITY_TERMS if derived else None,
        library_name="percov2",
        pipeline_tag="image-to-image",
        tags=_TAGS,
    )
    return data.to_yaml()


def _table(facts: _Facts) -> str:
    summary = facts.summary
    rows = {
        "model id, in every file": f"`{summary.model_id:#06x}`",
        "tokens": f"one of {facts.codebook_size} codes per "
        f"{facts.token_side}x{facts.token_side} pixels",
        "nominal rate": f"{facts.nominal_bpp:.4f} bpp at {math.log2(facts.codebook_size):g} bits "
        "per token; entropy coding takes less, header and caption come on top",
        "schedule": f"`{summary.schedule}`",
        "sampling steps, guidance": f"{facts.steps}, {facts.guidance:g} unless named",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _usage(model: str) -> str:
    return (
        "## Use\n\n"
        "```bash\n"
        f"percov2 compress photo.jpg photo.pcv2 --model {model}\n"
        f"percov2 decompress photo.pcv2 photo.png --model {model}\n"
        "```\n\n"
        "```python\n"
        "import percov2\n\n"
        f"codec = percov2.load({model!r})\n"
        'data = codec.compress("photo.jpg", caption="a red door")\n'
        "image = codec.decompress(data)\n"
        "```\n\n"
        "A file decodes with the weights that wrote it: keep this model as long as its files.\n"
    )


def _terms(facts: _Facts, licence: str | None) -> str:
    if facts.notice:
        return (
            "## Terms\n\n**Powered by Stability AI.** Weights derived from Stability AI's, under "
            f"the [Stability AI Community License]({_STABILITY_TERMS}); whoever passes them on "
            "must add a copy of it. From the file `NOTICE`:\n\n"
            f"```text\n{facts.notice}\n```\n"
        )
    if licence is None:
        return (
            "## Terms\n\nNo licence has been named for these weights: ask who published them. "
            "The code of percov2 is under Apache-2.0.\n"
        )
    return f"## Terms\n\nWeights: {licence}. The code of percov2 is under Apache-2.0.\n"
