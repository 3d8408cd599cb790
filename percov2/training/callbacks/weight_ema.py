"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from percov2.training.strategy import (
    AVERAGE,
    ZeroStrategy,
    master_weights,
    publish_master_weights,
)


class WeightEMA(L.Callback):
    """Averages the trained weights after every optimiser step; validation and export see them.

    The average starts as the weights after the first step. Frozen weights have none, and weights
    that do not change keep their average to the last bit. Buffers (the quantiser's codebook, for
    instance) are not averaged.

    Under ZeRO every process averages its shard of the float32 master weights, so that the memory
    is 4 bytes per trained weight divided by the number of processes, beside the master's; without
    ZeRO it is 4 bytes per trained weight. (Lightning's own callback copies the whole module, with
    its frozen parts, and knows no shards.)

    Args:
        decay: of the average, in [0, 1).

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self._blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average: list[Tensor] = []  # empty before the first step
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring a loaded average beside its weights, now that these are on their device."""
        masters = master_weights(trainer)
        if self._average:
            if [a.shape for a in self._average] != [m.shape for m in masters]:
                raise ValueError(
                    "the checkpoint's average is of other weights than those trained now: resume "
                    "with the same parts frozen"
                )
            self._average = [a.to(m.device) for a, m in zip(self._average, masters, strict=True)]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Average after an optimiser step; not every batch is one, if gradients accumulate."""
        if trainer.global_step == self._step:
            return
        masters = master_weights(trainer)
        if self._average:
            self._blend(self._average, masters, None)
        else:
            self._average = [weight.clone() for weight in masters]
        self._step = trainer.global_step

    @torch.no_grad()
    def _exchange(self, trainer: L.Trainer) -> None:
        """Weights to the average's place and back: no third copy."""
        if self._average:
            for average, weight in zip(self._average, master_weights(trainer), strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
            publish_master_weights(trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averages in place."""
        self._exchange(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        self._exchange(trainer)

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The averages are the result."""
        if self._average:
            for average, weight in zip(self._average, master_weights(trainer), strict=True):
                weight.copy_(average)
            publish_master_weights(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average: by name, or this process's shards for `ZeroStrategy` to write."""
        if not self._average:
            return
        weights: dict[str, Tensor] | list[Tensor] = self._average
        if not isinstance(trainer.strategy, ZeroStrategy):
            weights = dict(zip(_trained(pl_module), self._average, strict=True))
        checkpoint[AVERAGE] = {"step": self._step, "weights": weights}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average."""
        if AVERAGE not in checkpoint:
            rank_zero_warn("the checkpoint holds no average: it starts from the weights")
            return
        weights = checkpoint[AVERAGE]["weights"]
        if not isinstance(trainer.strategy, ZeroStrategy):
            names = _trained(pl_module)
            if names != list(weights):
                raise ValueError(
                    "the checkpoint's average is of other weights than those trained now: resume "
                    "with the same parts frozen"
                )
            weights = list(weights.values())
        self._average, self._step = weights, checkpoint[AVERAGE]["step"]


def refuse_late_averages(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse a `WeightEMA` that comes behind a callback that must see what it has done.

    Raises:
        ValueError: there is one.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(later, WeightEMA) for later in callbacks[callbacks.index(callback) :]):
        name = type(callback).__name__
        raise ValueError(f"trainer.callbacks: put WeightEMA before {name}")


def _trained(module: L.LightningModule) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.requires_grad]
