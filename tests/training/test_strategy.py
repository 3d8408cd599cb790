"""What `ZeroStrategy` refuses before anything starts. That it trains: test_zero.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import Strategy
from torch import nn

from percov2.training import strategy as strategy_module
from percov2.training.checkpointing import ShardRecord
from percov2.training.memory import MAX_LIVE
from percov2.training.resume import check_checkpoint
from percov2.training.strategy import (
    ZeroStrategy,
    _put,
    _without_weights,
)
from tests.training.test_stages import entropy_stage

CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
needs_deepspeed = pytest.mark.skipif(
    strategy_module.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def _trainer(strategy: Strategy | str, folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **{"devices": 1, **options},
    )


def _sharded(path: Path, **fields: Any) -> Path:
    shapes = {name: tuple(w.shape) for name, w in BoringModel().state_dict().items()}
    record = ShardRecord(
        **{"zero_stage": 2, "processes": 2, "stage": "BoringModel", "shapes": shapes, **fields}
    )
    path.mkdir()
    record.write(path)
    assert ShardRecord.read(path) == record
    return path


def test_a_missing_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[deepspeed\]'"):
        ZeroStrategy()


@needs_deepspeed
def test_a_stage_that_zero_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="stage is 4"):
        ZeroStrategy(stage=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stage3_prefetch_bucket_size is for stage 3, stage is 2"):
        ZeroStrategy(stage=2, stage3_prefetch_bucket_size=1)


@needs_deepspeed
def test_a_cpu_must_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cpu"):
        _trainer(ZeroStrategy(), tmp_path).fit(BoringModel())


@needs_deepspeed
@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_precisions_that_round_the_weights_are_refused(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ValueError, match=f"precision is {precision}.*bf16-mixed"):
        _trainer(ZeroStrategy(), tmp_path, precision=precision).fit(BoringModel())


@needs_deepspeed
def test_stage_1_is_refused(tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path / "model", tokenizer_steps=1, masked_from=1)
    with pytest.raises(ValueError, match=r"EntropyStage sets weights itself.*ddp\.yaml"):
        _trainer(ZeroStrategy(), tmp_path).fit(stage)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [("zero2.yaml", 2, False), ("zero3.yaml", 3, False), ("zero3_offload.yaml", 3, True)],
)
def test_the_shipped_overlays_mean_what_they_say(name: str, stage: int, offload: bool) -> None:
    content = yaml.safe_load((CONFIGS / name).read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate(
        parser.parse_object({"strategy": content["trainer"]["strategy"]})
    ).strategy
    assert isinstance(strategy, ZeroStrategy)
    assert isinstance(strategy.config, dict)
    assert strategy.zero_stage == stage
    assert ("offload_optimizer" in strategy.config["zero_optimization"]) == offload
    zero = strategy.config["zero_optimization"]
    assert ("offload_param" in zero) == offload
    assert zero.get("stage3_max_live_parameters") == (MAX_LIVE if stage == 3 else None)
    # What is kept and what is fetched ahead must fit below it.
    together = ("stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    assert sum(zero.get(name, 0) for name in together) <= MAX_LIVE


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    trainer, path = _trainer("auto", tmp_path), tmp_path / "last.ckpt"
    torch.save({"state_dict": BoringModel().state_dict()}, path)
    check_checkpoint(path, BoringModel(), trainer)
    stage = entropy_stage(tmp_path / "model", tokenizer_steps=1, masked_from=1)
    with pytest.raises(ValueError, match=r"last\.ckpt is of another.*EntropyStage.*missing.*layer"):
        check_checkpoint(path, stage, trainer)
    wide = BoringModel()
    wide.layer = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=r"layer\.weight \(2, 32\) instead of \(2, 5\)"):
        check_checkpoint(path, wide, trainer)


@needs_deepspeed
def test_a_sharded_checkpoint_wants_the_same_strategy(tmp_path: Path) -> None:
    path, model = _sharded(tmp_path / "last.ckpt"), BoringModel()
    fitting = _trainer(ZeroStrategy(stage=2), tmp_path, devices=2)
    check_checkpoint(path, model, fitting)
    with pytest.raises(ValueError, match="ZeRO-2 on 2 processes, now it is ZeRO-3 on 2"):
        check_checkpoint(path, model, _trainer(ZeroStrategy(stage=3), tmp_path, devices=2))
    with pytest.raises(ValueError, match=r"now it is ZeRO-2 on 4: .*percov2\.training\.convert"):
        check_checkpoint(path, model, _trainer(ZeroStrategy(stage=2), tmp_path, devices=4))
    with pytest.raises(ValueError, match="now it is SingleDeviceStrategy on 1"):
        check_checkpoint(path, model, _trainer("auto", tmp_path))
    other = _sharded(tmp_path / "other.ckpt", stage="FlowStage")
    with pytest.raises(ValueError, match="of FlowStage, the configuration has BoringModel"):
        check_checkpoint(other, model, fitting)
    smaller = _sharded(tmp_path / "small.ckpt", shapes={"layer.weight": (2, 16)})
    with pytest.raises(ValueError, match=r"layer\.bias.*\(2, 16\) instead of \(2, 32\)"):
        check_checkpoint(smaller, model, fitting)
    file = tmp_path / "file.ckpt"
    torch.save({"state_dict": model.state_dict()}, file)
    with pytest.raises(ValueError, match="one file, ZeRO-2 resumes from a folder"):
        check_checkpoint(file, model, fitting)
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(ValueError, match="not a sharded checkpoint"):
        check_checkpoint(tmp_path / "empty.ckpt", model, fitting)


def test_a_module_is_copied_without_its_weights_and_filled_again() -> None:
    class Tied(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.parts = {"second": self.second}
            self.register_buffer("kept", torch.randn(2), persistent=False)

    module = Tied()
    copied = _without_weights(module)
    assert all(p.is_meta for p in [*copied.parameters(), *copied.buffers()])
    assert not any(p.is_meta for p in [*module.parameters(), *module.buffers()])
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        value = weight.detach().clone()
        _put(copied, name, nn.Parameter(value) if isinstance(weight, nn.Parameter) else value)
    assert copied.second.weight is copied.first.weight
    assert copied.parts["second"] is copied.second
    assert torch.equal(copied.second.weight, module.second.weight)
    assert torch.equal(copied.second.bias, module.second.bias)
    assert torch.equal(copied.kept, module.kept)
