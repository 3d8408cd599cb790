"""Writes the trained model directory when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L

from percov2.training.callbacks.weight_ema import refuse_late_averages
from percov2.training.strategy import ZeroStrategy

CONFIG = "training.yaml"
"""The last file that a run writes into its model directory, which is not complete without it."""


@runtime_checkable
class Exportable(Protocol):
    """A training stage that can write its result."""

    def export(self, directory: Path) -> None:
        """Write a model directory that the next stage, or `percov2.load`, opens."""
        ...


class NothingTrainedError(ValueError):
    """A run was resumed at its last step, so that there is nothing to export from."""


class ExportModel(L.Callback):
    """Calls the stage's ``export`` at the end of training, on the first process.

    Under ZeRO-3 all processes first gather the weights into the first one's main memory.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._whole: L.LightningModule | None = None
        self._ended = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could only fail at the end.

        Raises:
            ValueError: the module cannot be exported, or `WeightEMA` comes later in the list and
                would put its averages in place after they have been gathered.
        """
        if not isinstance(pl_module, Exportable):
            raise ValueError(f"{type(pl_module).__name__} has no export: it is no percov2 stage")
        refuse_late_averages(trainer, self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on a model that is there is of fewer steps, and no longer the run's."""
        if trainer.is_global_zero:
            (self.directory / CONFIG).unlink(missing_ok=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather, while the strategy still stands."""
        self._ended = True
        if isinstance(trainer.strategy, ZeroStrategy):
            self._whole = trainer.strategy.whole_module()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, when the devices' memory is free again.

        Raises:
            NothingTrainedError: the run was resumed at its last step. Lightning then calls no
                callback that would put averages in place, and the export would be of other weights.
        """
        if not self._ended:
            raise NothingTrainedError(
                "the checkpoint is of the run's last step, nothing is left to train: raise "
                "trainer.max_steps, or write its model with `python -m percov2.training.convert`"
            )
        if trainer.is_global_zero:
            module = pl_module if self._whole is None else self._whole
            assert isinstance(module, Exportable)
            module.export(self.directory)
            self._whole = None
