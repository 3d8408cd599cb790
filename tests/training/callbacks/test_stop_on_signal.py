"""A run stopped by a signal is saved, not exported, and ends as if it had never been stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from percov2.training.callbacks import ExportModel, LastCheckpoint, WeightEMA
from percov2.training.callbacks.stop_on_signal import EXIT_CODE, StopOnSignal, StoppedBySignal

STEPS = 8


class Line(L.LightningModule):
    """Momentum and a learning rate that falls with the step, so that both must be resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[Tensor]:
        """The batches that the run has not seen yet."""
        batches = torch.randn(64, 4, 3, generator=torch.Generator().manual_seed(0))
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(list(batches[first:]), batch_size=None)  # type: ignore[arg-type]

    def export(self, directory: Path) -> None:
        directory.mkdir()
        torch.save(self.state_dict(), directory / "weights.pt")


class Send(Callback):
    """Sends this process a signal while it works on a batch."""

    def __init__(self, signum: signal.Signals, *, batch: int, rank: int = 0) -> None:
        self.signum, self.batch, self.rank = signum, batch, rank

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        if (trainer.fit_loop.batch_idx, trainer.global_rank) == (self.batch, self.rank):
            os.kill(os.getpid(), self.signum)


Fit = Callable[..., dict[str, Any]]


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Fit]:
    """Trains in a folder of its own; returns the last checkpoint and whether it exported."""

    def run(name: str, *callbacks: Callback, resume: bool = False, **options: Any) -> Any:
        folder = tmp_path / name
        checkpoints = LastCheckpoint(folder, every_n_train_steps=STEPS)
        # The averages come after StopOnSignal on purpose: it must see them all the same.
        standard = [StopOnSignal(), WeightEMA(decay=0.5), ExportModel(folder / "model")]
        trainer = L.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*standard, checkpoints, *callbacks],
            **options,
        )
        path = folder / "last.ckpt"
        trainer.fit(Line(), ckpt_path=path if resume else None, weights_only=True)
        return torch.load(path, weights_only=True)

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)}
    yield run
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def _assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stopped_and_resumed_run_ends_like_an_undisturbed_one(
    fit: Fit, tmp_path: Path, signum: signal.Signals, accumulate: int
) -> None:
    undisturbed = fit("undisturbed", accumulate_grad_batches=accumulate)
    with pytest.raises(StoppedBySignal) as stop:
        fit("stopped", Send(signum, batch=3 * accumulate), accumulate_grad_batches=accumulate)
    assert stop.value.code == EXIT_CODE
    saved = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert not (tmp_path / "stopped" / "model").exists()
    resumed = fit("stopped", resume=True, accumulate_grad_batches=accumulate)
    assert resumed["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        _assert_equal(resumed[key], undisturbed[key])
    exported = [tmp_path / name / "model" / "weights.pt" for name in ("stopped", "undisturbed")]
    _assert_equal(*(torch.load(path) for path in exported))


def test_the_last_step_is_not_interrupted(fit: Fit, tmp_path: Path) -> None:
    fit("run", Send(signal.SIGUSR1, batch=STEPS - 1))
    assert (tmp_path / "run" / "model").exists()


def test_handlers_are_put_back(fit: Fit) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)]
    fit("run")
    assert [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)] == before


def test_without_checkpoints_it_is_refused() -> None:
    trainer = L.Trainer(callbacks=[StopOnSignal()], logger=False, accelerator="cpu", max_steps=1)
    with pytest.raises(ValueError, match="there is none: add one"):
        trainer.fit(Line())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(fit: Fit, tmp_path: Path) -> None:
    send = Send(signal.SIGUSR1, batch=3, rank=1)
    with pytest.raises(ProcessExitedException) as stop:
        fit("run", send, strategy="ddp_fork", devices=2)
    assert stop.value.exit_code == EXIT_CODE
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
