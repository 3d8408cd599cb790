"""The notice that weights derived from Stable Diffusion 3 must carry, see docs/licences.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from percov2.analysis.autoencoder import Autoencoder, StableDiffusionAutoencoder
from percov2.model_card import NOTICE_NAME

_ATTRIBUTION = (
    "This Stability AI Model is licensed under the Stability AI Community License, Copyright © "
    "Stability AI Ltd. All Rights Reserved"
)
_INTRODUCTION = "What was changed in the Stability AI Materials, with percov2:"
_DUTIES = (
    "Whoever passes these files on must add a copy of that licence (https://stability.ai/license) "
    'and\nshow "Powered by Stability AI".'
)
_ITEM = "- "


def autoencoder_changes(
    autoencoder: Autoencoder, *, decoder_trained: bool = False
) -> tuple[str, ...]:
    """What a notice says of an autoencoder; nothing of the light one, which is percov2's own.

    Args:
        autoencoder: of the model.
        decoder_trained: whether its decoder was finetuned.
    """
    if not isinstance(autoencoder, StableDiffusionAutoencoder):
        return ()
    changed = "its decoder finetuned" if decoder_trained else "at most rounded to 16 bits"
    return (f"vae: the autoencoder of Stable Diffusion 3, {changed}.",)


def read_changes(directory: Path) -> tuple[str, ...]:
    """The changes that the notice of a model directory lists; none without a notice."""
    path = directory / NOTICE_NAME
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.removeprefix(_ITEM) for line in lines if line.startswith(_ITEM))


def write_notice(directory: Path, changes: Sequence[str]) -> None:
    """Write the notice of a model directory; without changes there is nothing to give notice of.

    The attribution and the duty to tell the changes are those of the Stability AI Community
    License, section on distribution and attribution.

    Args:
        directory: that exists.
        changes: one line each.
    """
    if not changes:
        return
    items = "\n".join(_ITEM + change for change in dict.fromkeys(changes))
    text = f"{_ATTRIBUTION}\n\n{_INTRODUCTION}\n{items}\n\n{_DUTIES}\n"
    (directory / NOTICE_NAME).write_text(text, encoding="utf-8")
