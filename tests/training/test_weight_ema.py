"""The averages of the trained weights, without ZeRO (with it: test_zero.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from percov2.training.callbacks import ExportModel, WeightEMA

DECAY = 0.75


class Line(L.LightningModule):
    """A trained and a frozen layer, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        self.register_buffer("steps", torch.zeros(()))
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        loss: Tensor = self.frozen(self.trained(batch)).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.trained.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def export(self, directory: Path) -> None:
        torch.save(self.state_dict(), directory)


class History(L.Callback):
    """The weights after every batch; saves a checkpoint after the second step.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append(pl_module.trained.weight.detach().clone())
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.folder / "two.ckpt")


def _fit(
    folder: Path,
    *,
    steps: int,
    callbacks: list[L.Callback] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Line, list[Tensor]]:
    """The trained module, and its weights after every batch."""
    history = History(folder)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        default_root_dir=folder,
        callbacks=[*(callbacks or [WeightEMA(DECAY)]), history],
        **{"val_check_interval": 16, **options},
    )
    samples = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    data = DataLoader(samples, batch_size=4)  # type: ignore[arg-type]
    module = Line()
    trainer.fit(module, data, data, ckpt_path=ckpt_path)
    return module, history.weights


def _averages(weights: list[Tensor]) -> list[Tensor]:
    averages = [weights[0]]
    for weight in weights[1:]:
        averages.append(torch.lerp(averages[-1], weight, 1 - DECAY))
    return averages


def test_the_average_is_what_training_leaves(tmp_path: Path) -> None:
    module, weights = _fit(tmp_path, steps=4)
    assert torch.equal(module.trained.weight, _averages(weights)[-1])
    assert torch.equal(module.frozen.weight, Line().frozen.weight)
    assert module.steps == 4  # buffers are those of the last step


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    module, weights = _fit(tmp_path, steps=6, val_check_interval=2)
    averages = _averages(weights)
    assert len(module.validated) == 3
    for seen, average in zip(module.validated, averages[1::2], strict=True):
        assert torch.equal(seen, average)
    _, undisturbed = _fit(tmp_path, steps=6)
    for one, other in zip(weights, undisturbed, strict=True):
        assert torch.equal(one, other)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module, weights = _fit(tmp_path, steps=3, accumulate_grad_batches=2)
    assert len(weights) == 6
    assert torch.equal(module.trained.weight, _averages(weights[1::2])[-1])


def test_a_resumed_run_continues_its_average(tmp_path: Path) -> None:
    _, first = _fit(tmp_path, steps=2)
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert list(saved["average"]["weights"]) == ["trained.weight", "trained.bias"]
    assert torch.equal(saved["average"]["weights"]["trained.weight"], _averages(first)[-1])
    assert torch.equal(saved["state_dict"]["trained.weight"], first[-1])
    resumed, rest = _fit(tmp_path, steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert len(rest) == 2
    assert torch.equal(resumed.trained.weight, _averages([*first, *rest])[-1])


def test_a_run_resumed_without_an_average_starts_one(tmp_path: Path) -> None:
    _fit(tmp_path, steps=2, callbacks=[L.Callback()])
    with pytest.warns(UserWarning, match="holds no average"):
        resumed, rest = _fit(tmp_path, steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(resumed.trained.weight, _averages(rest)[-1])


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        WeightEMA(1.0)
    with pytest.raises(ValueError, match=r"trained\.weight is torch\.bfloat16.*bf16-mixed"):
        _fit(tmp_path, steps=1, precision="bf16-true")


def test_the_average_of_other_weights_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, steps=2)
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    saved["average"]["weights"].pop("trained.bias")
    torch.save(saved, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="other weights than those trained now"):
        _fit(tmp_path, steps=4, ckpt_path=tmp_path / "two.ckpt")


def test_export_comes_after_the_average(tmp_path: Path) -> None:
    export, average = ExportModel(tmp_path / "model.pt"), WeightEMA(DECAY)
    with pytest.raises(ValueError, match="put WeightEMA before ExportModel"):
        _fit(tmp_path, steps=1, callbacks=[export, average])
    module, weights = _fit(tmp_path, steps=3, callbacks=[average, export])
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(saved["trained.weight"], _averages(weights)[-1])
    assert torch.equal(saved["trained.weight"], module.trained.weight)
