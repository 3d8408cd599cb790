"""Steps whose gradients are not finite are not taken."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from percov2.training.callbacks.monitoring import at_least_one


class SkipNonFinite(L.Callback):
    """Skips optimiser steps with NaN or infinity in the gradients, and stops a run of them.

    One such batch (an overflow, a damaged picture) would otherwise put NaN into every weight,
    by way of the gradients' common norm, and soon into the only checkpoint. Under DDP all
    processes hold the same reduced gradients and decide alike. DeepSpeed skips such steps itself,
    and is left alone.

    Args:
        max_in_a_row: the run ends with so many skipped steps in a row: it would not recover.

    Raises:
        ValueError: ``max_in_a_row`` below 1.
    """

    def __init__(self, *, max_in_a_row: int = 10) -> None:
        at_least_one(max_in_a_row=max_in_a_row)
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Lightning hook: gradients are complete, reduced and not yet clipped.

        Raises:
            ValueError: too many in a row.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        if torch.nn.utils.get_total_norm(gradients).isfinite():
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row >= self.max_in_a_row:
            raise ValueError(
                f"gradients were not finite in {self._in_a_row} steps in a row, up to step "
                f"{trainer.global_step}: resume from the last checkpoint with a lower learning "
                "rate, or with trainer.precision 32-true"
            )
        rank_zero_warn(f"gradients are not finite at step {trainer.global_step}: it is skipped")
        # Optimisers leave weights without a gradient as they are, moments too.
        for parameter in trained:
            parameter.grad = None
