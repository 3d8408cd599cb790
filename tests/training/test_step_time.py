"""The benchmark of the step time runs, and compares what it says it compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import step_time
from tests.tiny_codec import tiny_tokenizer
from tests.training.test_fit import FLOW


def test_it_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save(tmp_path)
    options = ["--steps=2", "--warmup=1", "--repeats=1", "--crop=64", "--batch=2"]
    assert step_time.main([*options, f"--tokenizer={tmp_path}", "--", *FLOW]) == 0
    *_, head, rule, bare, plain, shipped = capsys.readouterr().out.splitlines()
    assert head.startswith("| loop | median step, ms |")
    assert rule.count("|") == head.count("|")
    for line, name in ((bare, "bare PyTorch"), (plain, "no callbacks"), (shipped, "as shipped")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert name in cells[0]
        assert float(cells[1]) > 0
    assert bare.endswith("| 1.000 |")


def test_the_made_up_tokenizer_has_the_shipped_sizes(tmp_path: Path) -> None:
    step_time.write_tokenizer(tmp_path)
    parts = step_time.TokenizerComponents.load(tmp_path)
    assert parts.quantizer.codebook_size == 1024
    assert parts.autoencoder.latent_channels == 16


def test_steps_are_timed_from_end_to_end_after_the_warm_up() -> None:
    assert step_time._durations([1.0, 3.0, 4.0, 6.0], 2) == [1.0, 2.0]


def test_medians_of_the_runs_are_compared() -> None:
    table = step_time.render({"bare": [0.1, 0.3, 0.2], "ours": [0.21, 0.2, 0.9]})
    assert table.splitlines()[-1] == "| ours | 210.0 | 210.0, 200.0, 900.0 | 1.050 |"


def test_batches_are_one_and_the_same() -> None:
    loader = iter(step_time.SyntheticDataModule(crop=16, batch_size=2).train_dataloader())
    first, second = next(loader), next(loader)
    assert torch.equal(first["image"], second["image"])
    assert first["key"] == ["0", "1"]
