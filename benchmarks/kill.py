"""Kills a tiny training again and again and looks at what is left.

``python -m benchmarks.kill --output runs/kill [--kills 10] [--overlay zero2.yaml --processes 2]``

A run of `percov2.fit` that saves at every step is killed (SIGKILL, all its processes) at seeded
random moments, and resumed each time from the latest checkpoint. After every kill all checkpoints
that can be seen must load; the model at the end must be that of a run that nobody disturbed.
Prints a line per kill and the largest difference of a weight.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml
from safetensors.torch import load_file
from torch import Tensor

from percov2.training.checkpoint_weights import Which, read_weights
from percov2.training.checkpointing import latest_checkpoint
from tests.tiny_codec import save_tiny
from tests.training.tiny_runs import ROOT, flow_config, start_fit

_START_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained.

    Attributes:
        folder: of everything.
        steps: of a run.
        processes: of a run.
        overlay: file of configs/strategy, or None.
        window: longest time between a step's checkpoint and the kill, in seconds.
    """

    folder: Path
    steps: int
    processes: int
    overlay: str | None
    window: float

    def write_config(self, name: str) -> Path:
        """Configuration of a run in ``folder/name``."""
        run = self.folder / name
        run.mkdir()
        config = flow_config(run, model=self.folder / "start", steps=self.steps)
        config["trainer"]["plugins"] = [
            {"class_path": "percov2.training.checkpointing.AtomicCheckpointIO"}
        ]
        (checkpoint,) = (
            callback["init_args"]
            for callback in config["trainer"]["callbacks"]
            if callback["class_path"].endswith("ModelCheckpoint")
        )
        # Saved under a new name, removed, and saved over the old one: all at every step.
        checkpoint |= {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True}
        config["trainer"]["val_check_interval"] = self.steps
        file = run / "given.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    def start(self, config: Path) -> subprocess.Popen[str]:
        """Start or resume a run."""
        options = [f"--trainer.devices={self.processes}"]
        if self.overlay:
            options.insert(0, f"--config={ROOT / 'configs' / 'strategy' / self.overlay}")
        latest = latest_checkpoint(config.parent / "checkpoints")
        if latest is not None:
            options.append(f"--ckpt_path={latest}")
        return start_fit(config, options)


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{output[-4000:]}")


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints that can be seen."""
    return [int(path.stem.split("=")[1]) for path in folder.glob("step=*.ckpt")]


def _wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Return when a step has been saved."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if max(_steps(folder), default=0) >= step:
            return
        if process.poll() is not None:
            _finish(process)
            raise RuntimeError(f"the run ended before it saved step {step}")
        time.sleep(0.01)
    raise RuntimeError(f"step {step} was not saved within {_START_SECONDS} s")


def check_visible(folder: Path) -> None:
    """Load every checkpoint of a folder that is not hidden, with its average.

    Raises:
        ValueError: one is damaged.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix == ".replaced" and path.with_suffix("").exists():
            continue  # being deleted; `latest_checkpoint` passes it over
        for which in get_args(Which):
            weights = read_weights(path, which)
            assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())


def kill(setup: Setup, config: Path, *, step: int, delay: float) -> list[str]:
    """Run, kill ``delay`` seconds after a step was saved, check; returns the names left behind."""
    folder = config.parent / "checkpoints"
    process = setup.start(config)
    _wait_for_step(process, folder, step)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    check_visible(folder)
    return sorted(path.name for path in folder.iterdir())


def weights_of(model: Path) -> dict[str, Tensor]:
    """All weights of a model directory."""
    return {
        f"{file.parent.name}/{key}": value
        for file in sorted(model.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def differences(one: Path, other: Path) -> dict[str, Tensor]:
    """Magnitudes, of every weight of two model directories."""
    first, second = weights_of(one), weights_of(other)
    assert first
    assert first.keys() == second.keys()
    return {key: (value.double() - second[key].double()).abs() for key, value in first.items()}


def run(setup: Setup, *, kills: int, seed: int) -> float:
    """Largest difference between the disturbed and the undisturbed run's weights."""
    setup.folder.mkdir(parents=True)
    save_tiny(setup.folder / "start", from_prediction=True)
    _finish(setup.start(setup.write_config("whole")))
    config, draw = setup.write_config("killed"), random.Random(seed)
    # Never after the last step: there would be nothing left to kill.
    for step in sorted(draw.sample(range(1, setup.steps - 1), kills)):
        delay = draw.uniform(0, setup.window)
        left = kill(setup, config, step=step, delay=delay)
        print(f"killed {delay:.3f} s after step {step} was saved, left: {', '.join(left)}")
    _finish(setup.start(config))
    found = differences(setup.folder / "whole" / "model", setup.folder / "killed" / "model")
    return max(float(difference.max()) for difference in found.values())


def main() -> int:
    """Command line; exit code 1 if the weights differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder, replaced")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window", type=float, default=0.2, help="seconds after a saved step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--overlay", help="file of configs/strategy, for instance zero2.yaml")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    shutil.rmtree(args.output, ignore_errors=True)
    setup = Setup(
        folder=args.output.resolve(),
        steps=args.steps,
        processes=args.processes,
        overlay=args.overlay,
        window=args.window,
    )
    difference = run(setup, kills=args.kills, seed=args.seed)
    print(f"largest difference of a weight after {args.kills} kills: {difference:.2e}")
    return int(difference > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
