"""Tiny runs of the real stages under a real Trainer, and what they left in TensorBoard's files."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from percov2.data.samples import Batch
from percov2.data.transforms import image_to_tensor, tensor_to_image
from tests.training.tiny_runs import NumberedPictures

BATCH = 2


class Pictures(Dataset[dict[str, Any]]):
    """A few 64x64 pictures of whole grey levels.

    Args:
        count: number of pictures.
        first: number of the first one.
        pause: seconds that each one takes.
    """

    def __init__(self, count: int, *, first: int, pause: float = 0.0) -> None:
        stream: Iterator[dict[str, Any]] = iter(NumberedPictures(first=first, stride=1))
        self.samples = [next(stream) for _ in range(count)]
        for sample in self.samples:
            sample["image"] = image_to_tensor(tensor_to_image(sample["image"]))
        self.pause = pause

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.pause)
        return self.samples[index]


class PictureDataModule(L.LightningDataModule):
    """Six pictures of training, three of validation, in batches of two."""

    def __init__(self, *, pause: float = 0.0, validation_pause: float = 0.0) -> None:
        super().__init__()
        self.train = Pictures(6, first=0, pause=pause)
        self.val = Pictures(3, first=100, pause=validation_pause)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, batch_size=BATCH)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Events:
    """TensorBoard's files of a run."""

    accumulator: EventAccumulator

    @classmethod
    def read(cls, folder: Path) -> Events:
        every = dict.fromkeys(("scalars", "images", "histograms"), 0)
        accumulator = EventAccumulator(str(folder), size_guidance=every)
        accumulator.Reload()
        return cls(accumulator)

    def tags(self, kind: str) -> set[str]:
        return set(self.accumulator.Tags()[kind])

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self.accumulator.Scalars(tag)]

    def values(self, tag: str) -> list[float]:
        return [event.value for event in self.accumulator.Scalars(tag)]

    def last(self, tag: str) -> float:
        return self.values(tag)[-1]

    def image(self, tag: str) -> NDArray[np.uint8]:
        encoded = self.accumulator.Images(tag)[-1].encoded_image_string
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def fit(
    stage: L.LightningModule,
    folder: Path,
    callbacks: Sequence[L.Callback],
    *,
    steps: int = 2,
    data: L.LightningDataModule | None = None,
    **options: Any,
) -> L.Trainer:
    """Train with validation after every second batch; the files are `Events.read(folder)`'s."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1e-3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": TensorBoardLogger(folder.parent, name="", version=folder.name),
        "callbacks": list(callbacks),
    }
    trainer = L.Trainer(**{**settings, **options})
    trainer.fit(stage, datamodule=PictureDataModule() if data is None else data)
    return trainer
