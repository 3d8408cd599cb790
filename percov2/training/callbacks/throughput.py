"""Images and tokens per second, and the share of the time that data is waited for."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from percov2.data.samples import Batch
from percov2.model_store import PATCH
from percov2.training.callbacks.monitoring import (
    Stage,
    StageMonitor,
    StepInterval,
    at_least_one,
    tokenizer_of,
)
from percov2.training.callbacks.weight_ema import refuse_late_averages


class Throughput(StageMonitor):
    """Speed of training over the last ``every_n_steps`` optimiser steps.

    Logs ``throughput/images_per_s`` and ``throughput/tokens_per_s`` (of the hyper-latent grid),
    of all processes together, and ``throughput/data_wait``, the share of the time, in [0, 1],
    that passes between the end of a step and the arrival of the next batch. The device is not
    waited for: on a GPU that is still busy meanwhile, the share is an upper bound.

    Time from one step to the next is left out where a validation or a checkpoint lies between
    them, as is what comes before the first step. (Lightning's own ThroughputMonitor makes the
    device wait at every step and does not see the waiting for data.)

    Args:
        every_n_steps: length of the window.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        at_least_one(every_n_steps=every_n_steps)
        self._interval = StepInterval(every_n_steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot watch.

        Raises:
            ValueError: see `StageMonitor`; or `WeightEMA` comes later in the list, so that its
                work would count as waiting for data.
        """
        super().setup(trainer, pl_module, stage)
        refuse_late_averages(trainer, self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the first window."""
        assert isinstance(pl_module, Stage)
        self._reduction = int(tokenizer_of(pl_module).hyper_encoder.config.reduction)
        self._interval.start(trainer.global_step)
        self._interrupted = True
        self._begin_window()

    def _begin_window(self) -> None:
        self._seconds = self._waited = 0.0
        self._images = self._latents = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """A batch has arrived."""
        self._started = time.perf_counter()
        if not self._interrupted:
            self._waited += self._started - self._ended
            self._seconds += self._started - self._ended
        self._interrupted = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """A step is over; not every batch is an optimiser step, if gradients accumulate."""
        self._ended = time.perf_counter()
        self._seconds += self._ended - self._started
        self._images += len(batch["key"])
        self._latents += _count_latents(batch)
        if self._interval.due(trainer.global_step):
            speed = trainer.world_size / self._seconds
            scalars = {
                "throughput/images_per_s": speed * self._images,
                "throughput/tokens_per_s": speed * self._latents / self._reduction**2,
                "throughput/data_wait": self._waited / self._seconds,
            }
            self.log_scalars(trainer, scalars, step=trainer.global_step)
            self._begin_window()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the time until the next batch."""
        self._interrupted = True

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out the time until the next batch."""
        self._interrupted = True


def _count_latents(batch: Batch) -> int:
    """B h w."""
    if "latents" in batch:
        count, _, rows, cols = batch["latents"].shape
        return int(count * rows * cols)
    count, _, height, width = batch["image"].shape
    return int(count * (height // PATCH) * (width // PATCH))
