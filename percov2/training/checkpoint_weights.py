"""Weights of a checkpoint, of one file or of ZeRO's shards."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

from torch import Tensor

from percov2.training.checkpointing import ShardRecord, read_checkpoint
from percov2.training.strategy import AVERAGE, WEIGHTS

Which = Literal["average", "trained"]


def has_average(checkpoint: Path) -> bool:
    """Whether a checkpoint, sharded or not, was written with `WeightEMA`."""
    if checkpoint.is_dir():
        return (checkpoint / AVERAGE).is_dir()
    return AVERAGE in read_checkpoint(checkpoint, meta=True)


def read_weights(checkpoint: Path, which: Which) -> dict[str, Tensor]:
    """State dict of a checkpoint, sharded or not: float32 weights exactly as trained, buffers.

    Raises:
        ValueError: damaged, no checkpoint of `percov2.fit`, or without the average.
    """
    if which == "average" and not has_average(checkpoint):
        raise ValueError(
            f"{checkpoint} holds no average, since no WeightEMA trained with it: choose the "
            "trained weights"
        )
    if checkpoint.is_dir():
        return _merge_shards(checkpoint, which)
    state = read_checkpoint(checkpoint)
    weights: dict[str, Tensor] = dict(state["state_dict"])
    if which == "average":
        weights |= state[AVERAGE]["weights"]
    return weights


def _merge_shards(checkpoint: Path, which: Which) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    ShardRecord.read(checkpoint)
    # DeepSpeed looks for all files in one folder; the average has only shards of its own.
    shards = checkpoint / (AVERAGE if which == "average" else WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder, "joined")
        joined.mkdir()
        files = [
            *(checkpoint / WEIGHTS).glob("*_model_states.pt"),
            *shards.glob("*_optim_states.pt"),
        ]
        for file in files:
            (joined / file.name).symlink_to(file.resolve())
        try:
            with redirect_stdout(sys.stderr):  # where DeepSpeed's progress belongs
                merged: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                    folder, tag=joined.name
                )
        except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"{checkpoint} is damaged ({error}): choose another") from error
    return merged
