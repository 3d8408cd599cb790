"""Norms of the gradients, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from percov2.training.callbacks.monitoring import Stage, StageMonitor, at_least_one, parts_of


class GradientNorms(StageMonitor):
    """L2 norm of the gradients before clipping, of each part that has some and of all.

    Logs ``gradient_norm/transformer`` and so on, and ``gradient_norm/total``. Under DDP each
    process holds the averaged gradients, and the first one logs them. Under ZeRO all processes
    gather them, one weight after the other, which costs about as much communication as one
    more reduction of the gradients at every ``every_n_steps``-th step.

    Args:
        every_n_steps: optimiser steps between two measurements, counted from step 0.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        at_least_one(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot watch.

        Raises:
            ValueError: see `StageMonitor`; or a strategy whose gradients it cannot read.
        """
        super().setup(trainer, pl_module, stage)
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"GradientNorms cannot read gradients of {type(trainer.strategy).__name__}: use "
                "one device, DDP or ZeroStrategy, or remove it from trainer.callbacks"
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Lightning hook: gradients are complete, reduced, unscaled and not yet clipped."""
        assert isinstance(pl_module, Stage)
        if trainer.global_step % self.every_n_steps:
            return
        sharded = isinstance(trainer.strategy, DeepSpeedStrategy)
        if sharded:
            engine = trainer.model
            assert isinstance(engine, nn.Module)
            # DeepSpeed comes here at every batch whose gradients it accumulates.
            if not engine.is_gradient_accumulation_boundary():  # type: ignore[operator]
                return
        elif not trainer.is_global_zero:
            return
        norms = {}
        for name, part in parts_of(pl_module).items():
            gradients = list(map(_norm, _gradients(part, sharded=sharded)))
            if gradients:
                norms[name] = torch.stack(gradients).norm()
        norms["total"] = torch.stack(list(norms.values())).norm()
        # One transfer for all of them.
        values = torch.stack(list(norms.values())).tolist()
        scalars = {f"gradient_norm/{name}": v for name, v in zip(norms, values, strict=True)}
        self.log_scalars(trainer, scalars, step=trainer.global_step)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def _gradients(part: nn.Module, *, sharded: bool) -> Iterator[Tensor]:
    """Gradients of a part, one at a time; gathered if sharded, by all processes alike."""
    for parameter in part.parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        if sharded:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            yield gradient
