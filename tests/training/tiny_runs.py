"""Tiny runs of `percov2.fit` in processes of their own, the same samples whatever their number.

Runs read numbered random pictures: global step s takes pictures s*B .. s*B + B - 1, and of these
process r of n takes every n-th from the r-th on. Noise depends on seed, step and key alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader, IterableDataset

from percov2.data.samples import Batch
from percov2.training.strategy import master_weights

# An earlier run in the tests' own process leaves these behind, and still holds the port.
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK")
ROOT = Path(__file__).parents[2]
_CAPTIONS = ("a dog runs along the beach", "the red barn", "", "two children play in the sand")


class NumberedPictures(IterableDataset[dict[str, Any]]):
    """Random 64x64 pictures number ``first``, ``first + stride``, ... without an end."""

    def __init__(self, *, first: int, stride: int) -> None:
        self.first, self.stride = first, stride

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = self.first
        while True:
            generator = torch.Generator().manual_seed(number)
            coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
            image = torch.nn.functional.interpolate(coarse, scale_factor=8.0)[0]
            yield {"image": image, "caption": _CAPTIONS[number % 4], "key": f"{number:06d}"}
            number += self.stride


class NumberedDataModule(L.LightningDataModule):
    """Batches that continue where the global step is.

    Args:
        global_batch: pictures of all processes per optimiser step.
    """

    def __init__(self, global_batch: int = 4) -> None:
        super().__init__()
        self.global_batch = global_batch

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        processes = self.trainer.world_size
        first = self.trainer.global_step * self.global_batch + self.trainer.global_rank
        pictures = NumberedPictures(first=first, stride=processes)
        return DataLoader(pictures, batch_size=self.global_batch // processes)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        pictures = NumberedPictures(first=10**6, stride=1)
        return DataLoader(pictures, batch_size=2)  # type: ignore[arg-type]


class Recorder(L.Callback):
    """Writes every process's losses, validation losses, and shards after every step.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._losses: dict[int, float] = {}
        self._validation: dict[int, float] = {}
        self._shards: list[list[torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses[trainer.global_step] = float(outputs["loss"])
        self._shards.append([weight.clone() for weight in master_weights(trainer)])

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._validation[trainer.global_step] = float(trainer.callback_metrics["val/flow"])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"losses": self._losses, "validation": self._validation}
        rank = trainer.global_rank
        (self.folder / f"losses{rank}.json").write_text(json.dumps(content))
        torch.save(self._shards, self.folder / f"shards{rank}.pt")


def flow_config(run: Path, *, model: Path, steps: int) -> dict[str, Any]:
    """Configuration of a tiny stage 2 whose tokenizer is trained too.

    Args:
        run: its folder.
        model: a tiny model's directory, which it starts from.
        steps: to train.
    """
    callbacks = "percov2.training.callbacks"
    return {
        "seed_everything": 1,
        "vars": {"run": str(run), "data": ""},
        "model": {
            "class_path": "percov2.training.FlowStage",
            "init_args": {
                "tokenizer": str(model),
                "start": {
                    "class_path": "percov2.training.flow_start.FromModel",
                    "init_args": {"directory": str(model)},
                },
                "adaptation": {"class_path": "percov2.training.adaptation.FullFinetune"},
                "flow": {"shift": 1.0, "from_prediction": True, "sigma": 0.5},
                "tiling": {"size": 8, "overlap": 2},
                "optimization": {"lr": 1e-3, "warmup_steps": 2, "decay": "cosine"},
                "name": "test",
                "schedule": "quincunx",
                "caption_dropout": 0.1,
                "train_tokenizer": True,
                "train_text_encoders": True,
                "default_steps": 2,
                "default_guidance": 1.0,
                "validation_steps": 1,
            },
        },
        "data": {"class_path": "tests.training.tiny_runs.NumberedDataModule"},
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(run),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(run), "name": "csv", "version": 0},
            },
            "callbacks": [
                {"class_path": f"{callbacks}.WeightEMA", "init_args": {"decay": 0.5}},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(run / "checkpoints"),
                        "filename": "{step}",
                        "every_n_train_steps": 3,
                        "save_top_k": -1,
                        "enable_version_counter": False,
                    },
                },
                {
                    "class_path": f"{callbacks}.ExportModel",
                    "init_args": {"directory": str(run / "model")},
                },
                {
                    "class_path": "tests.training.tiny_runs.Recorder",
                    "init_args": {"folder": str(run / "record")},
                },
            ],
        },
    }


def start_fit(config: Path, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start ``python -m percov2.fit`` in a process group of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0"}
    for name in _RENDEZVOUS:
        env.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "percov2.fit", f"--config={config}", *options],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@dataclass(frozen=True)
class TinyRun:
    """A finished run of `flow_config`."""

    folder: Path
    processes: int = 1
    output: str = field(default="", repr=False)

    @classmethod
    def train(
        cls,
        folder: Path,
        *,
        model: Path,
        steps: int,
        processes: int = 1,
        overlay: str | None = None,
        options: Sequence[str] = (),
    ) -> TinyRun:
        """Run to the end.

        Args:
            folder: of the run.
            model: to start from.
            steps: in all.
            processes: on this machine.
            overlay: a file of configs/strategy.
            options: further fields.
        """
        folder.mkdir(parents=True)
        config = folder / "given.yaml"
        config.write_text(yaml.safe_dump(flow_config(folder, model=model, steps=steps)))
        extra = [f"--config={ROOT / 'configs' / 'strategy' / overlay}"] if overlay else []
        extra += [f"--trainer.devices={processes}", *options]
        process = start_fit(config, extra)
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"{folder.name} failed:\n{output[-6000:]}")
        return cls(folder=folder, processes=processes, output=output)

    def _records(self) -> list[dict[str, dict[str, float]]]:
        files = sorted((self.folder / "record").glob("losses*.json"))
        assert len(files) == self.processes
        return [json.loads(file.read_text()) for file in files]

    @property
    def losses(self) -> dict[int, float]:
        """Mean loss over the processes of every step."""
        records = [record["losses"] for record in self._records()]
        return {
            int(step): sum(record[step] for record in records) / len(records) for step in records[0]
        }

    @property
    def validation(self) -> dict[int, float]:
        """Validation loss by step."""
        return {int(step): value for step, value in self._records()[0]["validation"].items()}

    @property
    def config(self) -> Path:
        """The configuration that the run saved."""
        return self.folder / "csv" / "version_0" / "config.yaml"

    def checkpoint(self, step: int) -> Path:
        """Of a step."""
        return self.folder / "checkpoints" / f"step={step}.ckpt"

    def shards(self, rank: int) -> list[list[torch.Tensor]]:
        """Master weights of a process after every step."""
        shards: list[list[torch.Tensor]] = torch.load(self.folder / "record" / f"shards{rank}.pt")
        return shards
