"""Bits per token, by step of the schedule."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch

from percov2.bitstream import MAX_STEPS
from percov2.data.samples import Batch
from percov2.training.callbacks.monitoring import (
    Stage,
    ValidationMonitor,
    at_least_one,
    coder_of,
    tokens_of,
)
from percov2.training.processes import total_over_processes


class TokenRate(ValidationMonitor):
    """What the tokens of a few validation images cost, group by group.

    Logs ``rate/bits_per_token/step_01``, ``step_02``, ...: the ideal code length (-log2 of the
    probability that the coder uses) of a group's tokens, divided by their number;
    ``rate/bits_per_token/ideal``, the same for all groups; ``rate/bits_per_token/stream``, from
    the bytes of real token streams; ``rate/token_bytes``, the mean of those bytes per image.

    Args:
        every_n_validations: see `ValidationMonitor`.
        images: the first so many of each process's validation images; each is coded twice.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, *, every_n_validations: int = 1, images: int = 8) -> None:
        super().__init__(every_n_validations=every_n_validations)
        at_least_one(images=images)
        self.images = images

    def begin(self, stage: Stage) -> None:
        """Start at zero."""
        # The same shape on every process, however many groups its images have.
        self._bits = torch.zeros(MAX_STEPS)
        self._tokens = torch.zeros(MAX_STEPS)
        self._streams = torch.zeros(2)  # images, bytes

    def observe(self, stage: Stage, batch: Batch) -> None:
        """Code the first images."""
        left = self.images - int(self._streams[0])
        if left == 0:
            return
        coder = coder_of(stage)
        for grid in tokens_of(stage, batch)[:left].cpu().numpy():
            bits = torch.tensor(coder.bits_per_group(grid))
            sizes = np.bincount(coder.groups(*grid.shape).flatten())
            self._bits[: len(bits)] += bits
            self._tokens[: len(bits)] += torch.from_numpy(sizes)
            self._streams += torch.tensor([1.0, len(coder.encode(grid, steps=len(bits)))])

    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """Log the means over all processes."""
        bits, tokens, (images, size) = (
            total_over_processes(trainer, part)
            for part in (self._bits, self._tokens, self._streams)
        )
        steps = int((tokens > 0).sum())
        scalars = {
            f"rate/bits_per_token/step_{k + 1:02d}": float(bits[k] / tokens[k])
            for k in range(steps)
        }
        scalars["rate/bits_per_token/ideal"] = float(bits.sum() / tokens.sum())
        scalars["rate/bits_per_token/stream"] = float(8 * size / tokens.sum())
        scalars["rate/token_bytes"] = float(size / images)
        self.log_scalars(trainer, scalars, step=trainer.global_step)
