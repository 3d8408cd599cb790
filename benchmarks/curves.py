"""Draws the loss curves of training runs from their TensorBoard files.

``python benchmarks/curves.py --run runs/tiny/stage1 runs/tiny/stage2 --output curves.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt

_SMOOTHING = 10


def scalars(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every training loss; of a resumed run's overlap the later one."""
    events = EventAccumulator(str(run / "tensorboard" / "version_0"))
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("train/"):
            continue
        values = {event.step: event.value for event in events.Scalars(tag)}
        steps = sorted(values)
        curves[tag] = (np.array(steps), np.array([values[step] for step in steps]))
    return curves


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    panels = [
        (run, tag, curve)
        for run in args.run
        for tag, curve in scalars(run).items()
        if tag not in ("epoch", "hp_metric")
    ]
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (run, tag, (steps, values)) in zip(axes.flat, panels, strict=False):
        smooth = tag.startswith("train/") and len(values) > 2 * _SMOOTHING
        axis.plot(steps, values, alpha=0.35 if smooth else 1, marker="" if smooth else ".")
        if smooth:
            mean = np.convolve(values, np.ones(_SMOOTHING) / _SMOOTHING, "valid")
            axis.plot(steps[_SMOOTHING - 1 :], mean, color="C0")
        axis.set_title(f"{run.parent.name}/{run.name}: {tag}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
