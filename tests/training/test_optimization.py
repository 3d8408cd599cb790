"""The optimiser: its settings arrive, frozen weights do not, and misfits are refused early."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from percov2.training.optimization import (
    STATE_BYTES,
    Optimization,
    OptimizerName,
    Phase,
    build_optimizer,
    offloads_optimizer,
)


def phase(model: nn.Module, **fields: object) -> Phase:
    optimization = Optimization(lr=1e-2, warmup_steps=0, **fields)  # type: ignore[arg-type]
    return Phase(optimization=optimization, parameters=model.parameters(), first=0, last=10)


def test_settings_arrive() -> None:
    model = nn.Linear(3, 2)
    given = phase(model, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    [group] = build_optimizer(given)["optimizer"].param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.3)


def test_frozen_weights_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    [group] = build_optimizer(phase(model))["optimizer"].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[1].parameters()]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(phase(nn.Linear(3, 2).requires_grad_(False)))


@pytest.mark.parametrize("name", ["adamw", "adamw_fused"])
def test_a_resumed_run_takes_its_configured_options(name: OptimizerName, tmp_path: Path) -> None:
    def build(model: nn.Module, lr: float, last: int, **fields: object) -> dict[str, Any]:
        optimization = Optimization(lr=lr, warmup_steps=4, optimizer=name, **fields)  # type: ignore[arg-type]
        phase = Phase(optimization=optimization, parameters=model.parameters(), first=0, last=last)
        return build_optimizer(phase)

    def step(model: nn.Module, parts: dict[str, Any]) -> None:
        model(torch.ones(1, 3)).square().mean().backward()
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()

    model = nn.Linear(3, 2)
    before = build(model, 1e-2, 1)
    step(model, before)
    assert before["optimizer"].param_groups[0]["lr"] == 0, "the run is at its end"
    moments = before["optimizer"].state_dict()["state"]
    after = build(model, 1e-4, 10, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3)
    after["optimizer"].load_state_dict(before["optimizer"].state_dict())
    after["lr_scheduler"]["scheduler"].load_state_dict(
        before["lr_scheduler"]["scheduler"].state_dict()
    )
    torch.testing.assert_close(after["optimizer"].state_dict()["state"], moments)
    [group] = after["optimizer"].param_groups
    # The second of four steps of warm-up, before and after it is taken.
    assert group["lr"] == pytest.approx(0.5e-4)
    step(model, after)
    assert group["lr"] == pytest.approx(0.75e-4)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)


def test_the_fused_kernel_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = torch.randn(4, 3)
    names: tuple[OptimizerName, ...] = ("adamw", "adamw_fused")
    for model, name in zip(models, names, strict=True):
        optimizer = build_optimizer(phase(model, optimizer=name))["optimizer"]
        assert bool(optimizer.defaults["fused"]) == (name == "adamw_fused")
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6)


def test_adamw_keeps_as_many_bytes_as_memory_is_told() -> None:
    model = nn.Linear(40, 50, bias=False)
    optimizer = build_optimizer(phase(model))["optimizer"]
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    moments = [v for v in optimizer.state[model.weight].values() if v.numel() > 1]
    assert sum(v.nbytes for v in moments) == STATE_BYTES["adamw"] * model.weight.numel()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_named_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match=r"pip install '\.\[8bit\]'"):
        Optimization(lr=1.0, warmup_steps=0, optimizer="adamw_8bit")


def test_eight_bits_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("percov2.training.optimization.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="CUDA GPU only, the weights are on cpu"):
        build_optimizer(phase(nn.Linear(3, 2), optimizer="adamw_8bit"))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_offload_and_optimizer_must_fit() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    offloading = DeepSpeedStrategy(stage=2, offload_optimizer=True)
    assert offloads_optimizer(offloading)
    assert not offloads_optimizer(DeepSpeedStrategy(stage=2))
    with pytest.raises(ValueError, match="needs a strategy with offload_optimizer"):
        build_optimizer(phase(nn.Linear(3, 2), optimizer="deepspeed_cpu_adam"))
    with pytest.raises(ValueError, match="choose 'deepspeed_cpu_adam'"):
        build_optimizer(phase(nn.Linear(3, 2)), strategy=offloading)
    assert isinstance(offloading.config, dict)
    offloading.config["zero_force_ds_cpu_optimizer"] = False
    build_optimizer(phase(nn.Linear(3, 2)), strategy=offloading)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_eight_bits_do_not_go_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    monkeypatch.setattr("percov2.training.optimization.find_spec", lambda name: object())
    given = phase(nn.Linear(3, 2), optimizer="adamw_8bit")
    with pytest.raises(ValueError, match=r"does not go with DeepSpeed.*ddp\.yaml"):
        build_optimizer(given, strategy=DeepSpeedStrategy(stage=2))


class Fused(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 1e6 * self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return build_optimizer(phase(self.layer, optimizer="adamw_fused"))

    def on_before_zero_grad(self, optimizer: object) -> None:
        gradients = [p.grad for p in self.layer.parameters() if p.grad is not None]
        if gradients:
            assert nn.utils.get_total_norm(gradients) <= 1.01


def test_gradients_of_the_fused_kernel_are_clipped_under_autocast(tmp_path: Path) -> None:
    stage = Fused()
    before = stage.layer.weight.detach().clone()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(stage, DataLoader([torch.ones(4, 3)] * 2, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 2
    assert not torch.equal(stage.layer.weight, before)


def test_phases_of_two_optimisers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['adamw', 'adamw_fused'\]: choose one"):
        build_optimizer(phase(nn.Linear(1, 1)), phase(nn.Linear(1, 1), optimizer="adamw_fused"))


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0},
        {"warmup_steps": -1},
        {"eps": 0.0},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -0.1},
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        Optimization(**({"lr": 1.0, "warmup_steps": 0} | fields))  # type: ignore[arg-type]


def test_the_rate_follows_steps_not_epochs() -> None:
    scheduler = build_optimizer(phase(nn.Linear(3, 2)))["lr_scheduler"]
    assert scheduler["interval"] == "step"
