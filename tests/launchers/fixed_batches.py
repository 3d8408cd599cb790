"""Training data that depends on the step and the process alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from percov2.data.samples import Batch


class _Batches(IterableDataset[Batch]):
    def __init__(self, *, first: int, rank: int, pause: float) -> None:
        self.first, self.rank, self.pause = first, rank, pause

    def __iter__(self) -> Iterator[Batch]:
        step = self.first
        print(f"rank {self.rank}: batches from step {step}", flush=True)
        while True:
            time.sleep(self.pause)
            generator = torch.Generator().manual_seed(1000 * self.rank + step)
            colours = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
            image = torch.nn.functional.interpolate(colours, scale_factor=8.0)
            yield Batch(
                image=image, caption=["", ""], key=[f"{self.rank}-{step}-{i}" for i in "ab"]
            )
            step += 1


class FixedBatches(L.LightningDataModule):
    """Two pictures of 64x64 pixels per step, made by a loader process.

    Args:
        pause: seconds before every batch, so that a test can interfere.
    """

    def __init__(self, *, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches from the present step on: a resumed run goes on where it stopped."""
        assert self.trainer is not None
        batches = _Batches(
            first=self.trainer.global_step, rank=self.trainer.global_rank, pause=self.pause
        )
        return DataLoader(batches, batch_size=None, num_workers=1)
