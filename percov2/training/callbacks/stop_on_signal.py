"""Stops a run that its scheduler is about to end, so that it can be resumed where it was.

Lightning's own answer to such signals saves the checkpoint inside the signal handler, in the
middle of whatever collective operation the process was in, and only on the processes that got the
signal (Lightning's issue 21406). Here the handler sets a flag. At the end of the next optimiser
step all processes agree on it, save together and exit.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from percov2.training.callbacks.last_checkpoint import LastCheckpoint

EXIT_CODE = 85
"""Exit code of a run that was stopped by a signal and can be resumed."""


class StoppedBySignal(SystemExit):
    """The run was asked to stop, has saved a checkpoint and is not finished.

    As a `SystemExit` it ends the program with `EXIT_CODE` and without a traceback. It skips what
    follows a finished training: the last validation, and the export of the model.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopOnSignal(Checkpoint):
    """Saves a checkpoint and ends the run after SIGUSR1 or SIGTERM.

    The checkpoint is that of the `LastCheckpoint` that must be among the callbacks. A signal to
    one process is enough. A run that has taken its last step is not stopped: it goes on to
    validate and export.

    As a `Checkpoint` callback it runs after all other callbacks, wherever it stands in the list:
    what is saved contains the averages of the step, for instance.
    """

    def __init__(self) -> None:
        self._received = False
        self._step = 0
        self._previous: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen to SIGUSR1 before loader processes start: they inherit the handler and live on.

        Raises:
            ValueError: there is no `LastCheckpoint`.
        """
        _last_checkpoint(trainer)
        self._received = False
        self._previous = signal.signal(signal.SIGUSR1, self._set_flag)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to SIGTERM in place of Lightning, which sets its handler just before.

        Lightning itself puts the former handler back when the run ends.
        """
        signal.signal(signal.SIGTERM, self._set_flag)
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop if any process got a signal.

        Raises:
            StoppedBySignal: on all processes.
        """
        # A checkpoint does not contain gradients that are still being accumulated.
        if trainer.global_step in (self._step, trainer.max_steps):
            return
        self._step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self._received, all=False):
            return
        checkpoint = _last_checkpoint(trainer)
        checkpoint.save(trainer)
        rank_zero_info(f"Stopped by a signal after step {self._step}, saved {checkpoint.path}")
        # Nobody leaves, and makes the others fail, before all have saved.
        trainer.strategy.barrier()
        raise StoppedBySignal

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put back the former handler of SIGUSR1."""
        signal.signal(signal.SIGUSR1, self._previous)

    def _set_flag(self, signum: int, frame: FrameType | None) -> None:
        self._received = True


def _last_checkpoint(trainer: L.Trainer) -> LastCheckpoint:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, LastCheckpoint):
            return callback
    raise ValueError(
        "StopOnSignal saves the checkpoint of LastCheckpoint, and there is none: add one to "
        "trainer.callbacks"
    )
