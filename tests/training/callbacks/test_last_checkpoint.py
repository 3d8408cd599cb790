"""last.ckpt is of whole steps, of the last one too, and holds the weights that are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from percov2.training.callbacks import LastCheckpoint, WeightEMA


class Counter(L.LightningModule):
    """A weight that grows by one with every step, and what each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.batches: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(self.global_step)
        return -self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([torch.ones(1, 1)] * 64, batch_size=None)  # type: ignore[arg-type]


class _Saved(LastCheckpoint):
    """Writes down after how many batches of this run, and which step, it saves."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.saved: list[tuple[int, int]] = []

    def save(self, trainer: L.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Counter)
        self.saved.append((len(module.batches), trainer.global_step))
        super().save(trainer)


def _fit(
    folder: Path, steps: int, *, every: int, resume: bool = False, accumulate: int = 1
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    checkpoints = _Saved(folder, every)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        # The averages come last on purpose: what is saved holds them all the same.
        callbacks=[checkpoints, WeightEMA(decay=0.75)],
    )
    path = checkpoints.path if resume else None
    trainer.fit(Counter(), ckpt_path=path, weights_only=True)
    return torch.load(checkpoints.path, weights_only=True), checkpoints.saved


def test_the_last_step_is_saved_with_trained_weights_and_can_be_extended(tmp_path: Path) -> None:
    short, saved = _fit(tmp_path / "short", 5, every=1000)
    assert saved == [(5, 5)]
    assert short["state_dict"]["layer.weight"] == 5
    average = short["average"]["weights"]["layer.weight"]
    assert 1 < average < 5
    extended, _ = _fit(tmp_path / "short", 7, every=1000, resume=True)
    whole, _ = _fit(tmp_path / "whole", 7, every=1000)
    for part in ("state_dict", "average"):
        torch.testing.assert_close(extended[part], whole[part], rtol=0, atol=0)
    assert extended["state_dict"]["layer.weight"] == 7


def test_a_resumed_run_saves_after_whole_steps_only(tmp_path: Path) -> None:
    _, saved = _fit(tmp_path, 4, every=2, accumulate=3)
    assert saved == [(6, 2), (12, 4)]
    _, saved = _fit(tmp_path, 7, every=2, accumulate=3, resume=True)
    assert saved == [(6, 6), (9, 7)]


def test_a_number_of_steps_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_train_steps is 0"):
        LastCheckpoint(tmp_path, 0)
