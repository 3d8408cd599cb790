"""The checkpoint that a run is resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from percov2.training.callbacks.monitoring import at_least_one

NAME = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every some steps and at the last one; one file, replaced whole.

    Lightning's `ModelCheckpoint` saves at the end of training only if the process has saved
    nothing before, and then what `WeightEMA` has put in the weights' place. After a resume it
    saves the same step once more, in the middle of an accumulation of gradients, since it does not
    know what is on disk.

    As a `Checkpoint` callback it runs after all other callbacks, wherever it stands in the list:
    what is saved contains the averages of the step, for instance.

    Args:
        dirpath: folder of the checkpoint.
        every_n_train_steps: optimiser steps from one to the next.

    Raises:
        ValueError: ``every_n_train_steps`` below 1.
    """

    def __init__(self, dirpath: Path, every_n_train_steps: int) -> None:
        at_least_one(every_n_train_steps=every_n_train_steps)
        self.dirpath, self.every_n_train_steps = Path(dirpath), every_n_train_steps
        self._step = 0

    @property
    def path(self) -> Path:
        """Of the checkpoint: a file, or a folder of shards under ZeRO."""
        return self.dirpath / NAME

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a run resumes from need not be saved."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save after an optimiser step whose turn it is; not every batch is one."""
        step = trainer.global_step
        if step != self._step and (
            step % self.every_n_train_steps == 0 or step == trainer.max_steps
        ):
            self.save(trainer)
        self._step = step

    def save(self, trainer: L.Trainer) -> None:
        """Replace the checkpoint; all processes take part."""
        trainer.save_checkpoint(self.path)
