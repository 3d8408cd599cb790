"""Where models are found: presets in the package, directories, the hub. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from percov2.bitstream import BitstreamError
from percov2.entropy.schedules import SCHEDULES, make_schedule, num_groups
from percov2.messages import first_line

PRESETS_DIRECTORY = Path(__file__).parent / "presets"
INDEX_NAME = "model_index.json"
PATCH = 8
"""Pixels per latent along an axis; the same for SD3's and for the light autoencoder."""
FLOW_PATCH = 2
"""Latents per patch of the flow transformer along an axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """What the header of a stream is read with, from `model_index.json` alone.

    Attributes:
        name: of the model.
        model_id: 16 bits, also in every stream.
        schedule: name of the token schedule.
        latents_per_token: reduction of the hyper-encoder.
    """

    name: str
    model_id: int
    schedule: str
    latents_per_token: int

    @classmethod
    def read(cls, directory: Path) -> ModelSummary:
        """From a model directory.

        Raises:
            ValueError: no `model_index.json`, or one that is not of percov2.
        """
        path = directory / INDEX_NAME
        if not path.is_file():
            raise ValueError(
                f"{directory} has no {INDEX_NAME}: give the name of a preset "
                f"({', '.join(preset_names())}), a model directory that stage 2 wrote, or a hub id"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            summary = cls(
                **{k: index[k] for k in ("name", "model_id", "schedule", "latents_per_token")}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a percov2 model index: {error!r}") from error
        if summary.schedule not in SCHEDULES or summary.latents_per_token not in (1, 2, 4, 8):
            raise ValueError(
                f"{path} names schedule {summary.schedule!r} and {summary.latents_per_token!r} "
                "latents per token, which this version of percov2 does not know"
            )
        return summary

    @property
    def multiple(self) -> int:
        """Pictures are padded to multiples of this many pixels along each axis."""
        return PATCH * max(self.latents_per_token, FLOW_PATCH)

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Token rows and columns of a picture of this size in pixels."""
        per_multiple = self.multiple // (PATCH * self.latents_per_token)
        rows, cols = (-(-side // self.multiple) * per_multiple for side in (height, width))
        return rows, cols

    def steps_total(self, width: int, height: int) -> int:
        """Schedule groups of a picture of this size in pixels."""
        return num_groups(make_schedule(self.schedule, *self.token_grid(width, height)))


def preset_names() -> list[str]:
    """Names of the models that ship in the package."""
    return sorted(path.parent.name for path in PRESETS_DIRECTORY.glob(f"*/{INDEX_NAME}"))


def find_preset(model_id: int) -> ModelSummary | None:
    """The preset with this id, if there is one."""
    for name in preset_names():
        summary = ModelSummary.read(PRESETS_DIRECTORY / name)
        if summary.model_id == model_id:
            return summary
    return None


def resolve_stream_model(model_id: int) -> str:
    """Name of the preset that wrote a stream.

    Raises:
        BitstreamError: no preset has this id.
    """
    preset = find_preset(model_id)
    if preset is None:
        known = ", ".join(
            f"{name} ({ModelSummary.read(PRESETS_DIRECTORY / name).model_id:#06x})"
            for name in preset_names()
        )
        raise BitstreamError(
            f"stream was written by model {model_id:#06x}, which is none of the presets {known}: "
            "name its directory or hub id with --model"
        )
    return preset.name


def resolve_model(model: str) -> Path:
    """Preset name, directory or hub id to a local directory; the hub is asked last.

    Raises:
        ValueError: none of the three, or a repository of the hub that is no percov2 model.
    """
    return _local_directory(model) or _fetch(model, index_only=False)


def resolve_summary(model: str) -> ModelSummary:
    """What `model_index.json` says of a preset, a directory or a hub id; fetches no weights.

    Raises:
        ValueError: none of the three.
    """
    return ModelSummary.read(_local_directory(model) or _fetch(model, index_only=True))


def _local_directory(model: str) -> Path | None:
    if model in preset_names():
        return PRESETS_DIRECTORY / model
    path = Path(model)
    if path.is_dir():
        return path
    if model.partition("@")[0].count("/") != 1 or path.is_absolute() or model.startswith("."):
        raise ValueError(
            f"model {model!r} is neither a preset ({', '.join(preset_names())}), nor a directory, "
            "nor a hub id (owner/name, or owner/name@revision)"
        )
    return None


def _fetch(model: str, *, index_only: bool) -> Path:
    """Bring a repository of the hub here; its index first, which says whether it is ours."""
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, _, revision = model.partition("@")
    try:
        directory = Path(hf_hub_download(repository, INDEX_NAME, revision=revision or None)).parent
        ModelSummary.read(directory)
        if index_only:
            return directory
        # Of the same commit, whatever has been pushed meanwhile: its folder has its name.
        snapshot = snapshot_download(
            repository,
            revision=directory.name,
            ignore_patterns=["*.bin", "*.pt", "*.ckpt", "*.pkl"],
        )
        return Path(snapshot)
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"cannot fetch model {model!r} from the hub ({first_line(error)}): check the name "
            "and the network; for a gated repository accept its licence and log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
