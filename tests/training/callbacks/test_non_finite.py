"""Steps with gradients that are not finite change no weight, and too many of them end a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from percov2.training.callbacks import SkipNonFinite


class Line(L.LightningModule):
    """Remembers its weights before every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(self.layer.weight.detach().clone())
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(
    folder: Path, bad: Collection[int], callback: SkipNonFinite, *, steps: int = 6, **options: Any
) -> Line:
    """Train with infinity in these batches."""
    batches = torch.randn(steps, 4, 3, generator=torch.Generator().manual_seed(0))
    for index in bad:
        batches[index, 1] = torch.inf
    torch.manual_seed(0)
    line = Line()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": [callback],
    }
    loader = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
    L.Trainer(**{**settings, **options}).fit(line, loader)
    return line


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, precision: str) -> None:
    with pytest.warns(UserWarning, match="not finite at step 2: it is skipped"):
        line = fit(tmp_path, {2}, SkipNonFinite(), precision=precision)
    assert torch.equal(line.seen[3], line.seen[2])
    assert line.layer.weight.isfinite().all()
    taken = [not torch.equal(a, b) for a, b in zip(line.seen[:-1], line.seen[1:], strict=True)]
    assert taken == [True, True, False, True, True]


def test_without_it_one_batch_ruins_the_weights(tmp_path: Path) -> None:
    class Off(SkipNonFinite):
        def on_before_optimizer_step(self, *_: Any) -> None:
            pass

    line = fit(tmp_path, {2}, Off())
    assert not line.layer.weight.isfinite().any()


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite in 3 steps in a row, up to step 4"):
        fit(tmp_path, {2, 3, 4}, SkipNonFinite(max_in_a_row=3))
    fit(tmp_path, {1, 2, 4, 5}, SkipNonFinite(max_in_a_row=3))


def test_the_limit_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="max_in_a_row is 0"):
        SkipNonFinite(max_in_a_row=0)
