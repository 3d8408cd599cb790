"""What was wrong with the data, and what the filters refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning as L

from percov2.data.module import StreamDataModule
from percov2.data.processes import gather_objects
from percov2.training.callbacks.monitoring import Monitor, StepInterval, at_least_one


class StreamFaults(Monitor):
    """Totals of the data stream since the run began, over all processes.

    Logs ``data/faults/total`` and, once one has been met, ``data/faults/corrupt_image`` and so on
    (`percov2.data.faults.FAULT_KINDS`); ``data/filtered/total`` and ``data/filtered/<filter>``.

    Args:
        every_n_steps: optimiser steps between two readings.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        at_least_one(every_n_steps=every_n_steps)
        self._interval = StepInterval(every_n_steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot watch.

        Raises:
            ValueError: there is no `TensorBoardLogger`, or the data come from elsewhere.
        """
        super().setup(trainer, pl_module, stage)
        if not isinstance(_data_module(trainer), StreamDataModule):
            raise ValueError(
                f"StreamFaults reads the counts of percov2's DataModules, data is "
                f"{type(_data_module(trainer)).__name__}: remove it from trainer.callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count steps from here."""
        self._interval.start(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, after every so many optimiser steps."""
        if not self._interval.due(trainer.global_step):
            return
        data = _data_module(trainer)
        assert isinstance(data, StreamDataModule)
        scalars: dict[str, float] = {}
        for name, counts in (("faults", data.faults), ("filtered", data.filtered)):
            total = _sum_over_processes(counts)
            scalars[f"data/{name}/total"] = total.total()
            scalars |= {f"data/{name}/{kind}": count for kind, count in sorted(total.items())}
        self.log_scalars(trainer, scalars, step=trainer.global_step)


def _data_module(trainer: L.Trainer) -> L.LightningDataModule | None:
    module: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    return module


def _sum_over_processes(counts: Mapping[str, int]) -> Counter[str]:
    """Sum of the counts of all processes, which may have met different kinds."""
    total: Counter[str] = Counter()
    for part in gather_objects(dict(counts)):
        total.update(part)
    return total
