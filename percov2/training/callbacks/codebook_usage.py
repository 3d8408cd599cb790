"""How evenly the codes are used, and how many are not."""

from __future__ import annotations

import lightning as L
import torch

from percov2.data.samples import Batch
from percov2.training.callbacks.monitoring import (
    Stage,
    ValidationMonitor,
    tokenizer_of,
    tokens_of,
)
from percov2.training.processes import total_over_processes


class CodebookUsage(ValidationMonitor):
    """Counts the tokens of the whole validation set.

    Logs ``codebook/uses_per_code``, a histogram over the V codes of how often each was used, and
    ``codebook/dead``, how many were not used at all. A code can be missing by chance: with n
    validation tokens for each code, a share of about exp(-n) of an evenly used codebook is.

    Args:
        every_n_validations: see `ValidationMonitor`.
    """

    def __init__(self, *, every_n_validations: int = 1) -> None:
        super().__init__(every_n_validations=every_n_validations)

    def begin(self, stage: Stage) -> None:
        """Start at zero."""
        size = tokenizer_of(stage).quantizer.codebook_size
        self._counts = torch.zeros(size, dtype=torch.int64)

    def observe(self, stage: Stage, batch: Batch) -> None:
        """Count."""
        tokens = tokens_of(stage, batch).flatten().cpu()
        self._counts += torch.bincount(tokens, minlength=len(self._counts))

    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """Log the sum over all processes."""
        counts = total_over_processes(trainer, self._counts)
        step = trainer.global_step
        self.writer(trainer).add_histogram("codebook/uses_per_code", counts, step)
        self.log_scalars(trainer, {"codebook/dead": int((counts == 0).sum())}, step=step)
