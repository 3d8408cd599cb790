"""Turns a training checkpoint into the directory that training itself would have exported.

``python -m percov2.training.convert --config RUN/config.yaml --checkpoint LAST.ckpt --output DIR``

It needs no GPU and one process: a sharded checkpoint is merged on the CPU. The configuration is
the resolved one that `percov2.fit` saves; the files that its ``model`` names must be there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import lightning as L
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from percov2.training.callbacks.export import Exportable
from percov2.training.checkpointing import (
    ShardRecord,
    compare_shapes,
    read_checkpoint,
    shapes_of,
)
from percov2.training.strategy import AVERAGE, WEIGHTS

Which = Literal["average", "trained"]


def load_stage(config: Path) -> L.LightningModule:
    """Build the stage of a saved configuration, with its initial weights.

    Raises:
        ValueError: no configuration of `percov2.fit`, or a file that it names is missing.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        model = content["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config} is not a configuration that percov2.fit saved ({error}): give the "
            "config.yaml of the run's folder"
        ) from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model", required=True)
    stage = parser.instantiate(parser.parse_object({"model": model})).model
    assert isinstance(stage, L.LightningModule)
    return stage


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
        raise ValueError(f"{checkpoint} holds no average: choose --weights trained")
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


def convert(*, config: Path, checkpoint: Path, output: Path, which: Which) -> None:
    """Write the model directory of a checkpoint.

    Raises:
        ValueError: see `load_stage` and `read_weights`; or configuration and checkpoint are not of
            the same run.
    """
    stage = load_stage(config)
    if not isinstance(stage, Exportable):
        raise ValueError(f"{type(stage).__name__} has no export: it is no percov2 stage")
    weights = read_weights(checkpoint, which)
    expected = shapes_of(stage.state_dict())
    compare_shapes(checkpoint, shapes_of(weights), expected, stage=type(stage).__name__)
    stage.load_state_dict(weights)
    stage.export(output)


def main(args: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m percov2.training.convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .ckpt file or folder")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument(
        "--weights",
        choices=("average", "trained"),
        help="the average (EMA) or the weights themselves (default: the average if there is one)",
    )
    options = parser.parse_args(args)
    try:
        which: Which = options.weights or (
            "average" if has_average(options.checkpoint) else "trained"
        )
        convert(
            config=options.config,
            checkpoint=options.checkpoint,
            output=options.output,
            which=which,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output} ({which} weights of {options.checkpoint})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
