"""Writes the trained model directory when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L


@runtime_checkable
class Exportable(Protocol):
    """A training stage that can write its result."""

    def export(self, directory: Path) -> None:
        """Write a model directory that the next stage, or `percov2.load`, opens."""
        ...


class ExportModel(L.Callback):
    """Calls the stage's ``export`` at the end of training, on the first process.

    Place it after a weight-averaging callback: that one puts the averages in place at the end of
    training, and this one runs when training is over.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning hook."""
        if not isinstance(pl_module, Exportable):
            raise ValueError(f"{type(pl_module).__name__} has no export: it is no percov2 stage")
        if trainer.is_global_zero:
            pl_module.export(self.directory)
