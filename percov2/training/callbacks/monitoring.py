"""What the callbacks that watch a training have in common: what they refuse, when they are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from percov2.components import TokenizerComponents
from percov2.data.samples import Batch
from percov2.entropy.token_coder import TokenCoder
from percov2.training.batches import latents_of
from percov2.training.entropy_stage import EntropyStage
from percov2.training.flow_stage import FlowStage
from percov2.training.strategy import whole_weights

Stage = EntropyStage | FlowStage
"""The stages that have tokens."""


def at_least_one(**numbers: int) -> None:
    """Refuse options below 1.

    Raises:
        ValueError: one is.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


class StepInterval:
    """True once in every ``every`` optimiser steps.

    Args:
        every: steps, at least 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last = 0

    def start(self, step: int) -> None:
        """Count from this step on."""
        self._last = step

    def due(self, step: int) -> bool:
        """Whether so many steps have passed since the start or the last time this was true."""
        if step - self._last < self.every:
            return False
        self._last = step
        return True


class Monitor(L.Callback):
    """A callback that logs scalars to every logger and pictures to TensorBoard.

    Under `fast_dev_run`, where Lightning replaces the loggers, all is computed and thrown away.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run without TensorBoard.

        Raises:
            ValueError: there is no `TensorBoardLogger`.
        """
        if self._tensorboard(trainer) is None:
            found = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise ValueError(
                f"{type(self).__name__} logs to TensorBoard, trainer.logger is {found}: add a "
                "TensorBoardLogger or remove the callback"
            )

    @staticmethod
    def _tensorboard(trainer: L.Trainer) -> TensorBoardLogger | DummyLogger | None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger | DummyLogger):
                return logger
        return None

    def writer(self, trainer: L.Trainer) -> Any:
        """TensorBoard's `SummaryWriter`; on all processes but the first it does nothing."""
        logger = self._tensorboard(trainer)
        assert logger is not None, "setup has refused this"
        return logger.experiment

    def log_scalars(self, trainer: L.Trainer, scalars: Mapping[str, float], *, step: int) -> None:
        """Log numbers to all loggers, from the first process."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(scalars), step=step)


class StageMonitor(Monitor):
    """A `Monitor` of `EntropyStage` or `FlowStage`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot watch.

        Raises:
            ValueError: there is no `TensorBoardLogger`, or the module is another one.
        """
        super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, Stage):
            raise ValueError(
                f"{type(self).__name__} watches EntropyStage and FlowStage, not "
                f"{type(pl_module).__name__}: remove it from trainer.callbacks"
            )


class ValidationMonitor(StageMonitor, ABC):
    """Measures something at every n-th validation, the first of a run included.

    What is measured is measured with the weights that validation sees (averages, with
    `WeightEMA`), in evaluation mode and without touching any random state. Every process does it,
    on its own validation batches: weights that ZeRO-3 has sharded need all of them.

    Args:
        every_n_validations: at least 1; validations before training starts do not count.

    Raises:
        ValueError: ``every_n_validations`` below 1.
    """

    def __init__(self, *, every_n_validations: int) -> None:
        at_least_one(every_n_validations=every_n_validations)
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def begin(self, stage: Stage) -> None:
        """A validation starts."""

    @abstractmethod
    def observe(self, stage: Stage, batch: Batch) -> None:
        """A validation batch was seen, by every process. No collectives."""

    @abstractmethod
    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """The validation ends, on every process: gather and log. No use of the weights."""

    def _due(self, trainer: L.Trainer) -> bool:
        return not trainer.sanity_checking and self._validations % self.every_n_validations == 0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning hook."""
        assert isinstance(pl_module, Stage)
        if self._due(trainer):
            self.begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning hook; averaged weights are in place, whatever the order of the callbacks."""
        assert isinstance(pl_module, Stage)
        if self._due(trainer):
            self.observe(pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning hook."""
        assert isinstance(pl_module, Stage)
        if self._due(trainer):
            self.report(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validations += 1


def parts_of(stage: Stage) -> dict[str, nn.Module]:
    """The networks of a stage by name."""
    parts = tokenizer_of(stage).modules()
    if isinstance(stage, FlowStage):
        parts["transformer"] = stage.transformer
        if stage.text_conditioner is not None:
            parts["text_conditioner"] = stage.text_conditioner
    return parts


def tokenizer_of(stage: Stage) -> TokenizerComponents:
    """The part of a stage that makes and codes tokens."""
    return stage.parts if isinstance(stage, FlowStage) else stage.components()


def coder_of(stage: Stage) -> TokenCoder:
    """The entropy coder of a stage in its present state; the stage must be in evaluation mode."""
    parts = tokenizer_of(stage)
    with whole_weights(parts.masked_transformer):
        schedule = stage.config.schedule if isinstance(stage, FlowStage) else stage.schedule
        return parts.token_coder(schedule, device=stage.device)


@torch.no_grad()
def tokens_of(stage: Stage, batch: Batch) -> Tensor:
    """Tokens (B, r, c) of a batch, as the encoder would choose them."""
    return stage.choose_tokens(latents_of(batch, tokenizer_of(stage).autoencoder))
