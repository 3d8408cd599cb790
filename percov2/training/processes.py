"""Sums over all processes of a training."""

from __future__ import annotations

import lightning as L
from torch import Tensor


def total_over_processes(trainer: L.Trainer, counts: Tensor) -> Tensor:
    """Sum of equally shaped tensors of all processes. All processes must call it."""
    device = trainer.strategy.root_device
    total = trainer.strategy.reduce(counts.to(device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.cpu()
