"""Turns a training checkpoint into the directory that training itself would have exported.

``python -m percov2.training.convert --config RUN/config.yaml --checkpoint LAST.ckpt --output DIR``

It needs no GPU and one process: a sharded checkpoint is merged on the CPU. The configuration is
the resolved one that `percov2.fit` saves; the files that its ``model`` names must be there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import yaml
from jsonargparse import ArgumentParser

from percov2.training.callbacks.export import Exportable
from percov2.training.checkpoint_weights import Which, has_average, read_weights
from percov2.training.checkpointing import compare_shapes, shapes_of


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


def convert(*, config: Path, checkpoint: Path, output: Path, which: Which | None = None) -> Which:
    """Write the model directory of a checkpoint.

    Args:
        config: `config.yaml` of the run.
        checkpoint: a file or a folder of shards.
        output: model directory to write.
        which: weights; None for the average if there is one, as training itself exports.

    Returns:
        Which weights were written.

    Raises:
        ValueError: see `load_stage` and `read_weights`; or configuration and checkpoint are not of
            the same run.
    """
    stage = load_stage(config)
    if not isinstance(stage, Exportable):
        raise ValueError(f"{type(stage).__name__} has no export: it is no percov2 stage")
    which = which or ("average" if has_average(checkpoint) else "trained")
    weights = read_weights(checkpoint, which)
    expected = shapes_of(stage.state_dict())
    compare_shapes(checkpoint, shapes_of(weights), expected, stage=type(stage).__name__)
    stage.load_state_dict(weights)
    stage.export(output)
    return which


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
        which = convert(
            config=options.config,
            checkpoint=options.checkpoint,
            output=options.output,
            which=options.weights,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output} ({which} weights of {options.checkpoint})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
