"""The extended transformer against diffusers' original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from percov2.synthesis.flow import NUM_TRAIN_TIMESTEPS
from percov2.synthesis.flow_transformer import extend_patch_embedding, predict

CHANNELS, CONDITION_CHANNELS, TEXT_DIM, POOLED_DIM = 4, 6, 24, 20
NEW_WEIGHT = "pos_embed.proj.weight"
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
STYLES: dict[str, dict[str, Any]] = {
    "SD3-medium": {},
    "SD3.5-large": {"qk_norm": "rms_norm"},
    "SD3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}


def original_transformer(style: str, seed: int = 0) -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=POOLED_DIM,
            pos_embed_max_size=12,
            **STYLES[style],
        ).eval()


@dataclass(frozen=True)
class Inputs:
    x_t: Tensor
    condition: Tensor
    t: Tensor
    text: Tensor
    pooled: Tensor


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        x_t=normal(2, CHANNELS, 8, 12),
        condition=5 * normal(2, CONDITION_CHANNELS, 8, 12),
        t=torch.tensor([0.3, 0.9]),
        text=normal(2, 7, TEXT_DIM),
        pooled=normal(2, POOLED_DIM),
    )


def velocity(
    transformer: SD3Transformer2DModel, inputs: Inputs, condition: Tensor | None = None
) -> Tensor:
    condition = inputs.condition if condition is None else condition
    return predict(transformer, inputs.x_t, condition, inputs.t, inputs.text, inputs.pooled)


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_random_features_leave_sd3_s_output_unchanged(style: str, inputs: Inputs) -> None:
    original = original_transformer(style)
    expected = original(
        hidden_states=inputs.x_t,
        encoder_hidden_states=inputs.text,
        pooled_projections=inputs.pooled,
        timestep=inputs.t * NUM_TRAIN_TIMESTEPS,
    ).sample
    found = velocity(extend_patch_embedding(original, CONDITION_CHANNELS), inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_features_get_a_gradient_only_after_the_first_step(inputs: Inputs) -> None:
    extended = extend_patch_embedding(original_transformer("SD3.5-medium"), CONDITION_CHANNELS)
    optimizer = torch.optim.AdamW(extended.parameters(), lr=1e-3)
    condition = inputs.condition.clone().requires_grad_()

    velocity(extended, inputs, condition).square().mean().backward()
    added = extended.get_parameter(NEW_WEIGHT).grad[:, CHANNELS:]
    assert (added.abs().amax(dim=(0, 2, 3)) > 0).all(), "a condition channel cannot be learned"
    assert condition.grad.abs().max() == 0

    optimizer.step()
    condition.grad = None
    velocity(extended, inputs, condition).square().mean().backward()
    assert (condition.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


@torch.no_grad()
def test_result_is_a_plain_transformer_that_saves_and_loads(tmp_path: Path, inputs: Inputs) -> None:
    extended = extend_patch_embedding(original_transformer("SD3.5-medium"), CONDITION_CHANNELS)
    extended.get_parameter(NEW_WEIGHT).normal_(std=0.1)
    assert type(extended) is SD3Transformer2DModel
    assert extended.config.in_channels == CHANNELS + CONDITION_CHANNELS
    assert extended.config.out_channels == CHANNELS
    extended.save_pretrained(tmp_path)
    loaded, faults = SD3Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(faults.values())
    assert torch.equal(velocity(loaded, inputs), velocity(extended, inputs))


def test_twice_extended_is_refused() -> None:
    extended = extend_patch_embedding(original_transformer("SD3-medium"), CONDITION_CHANNELS)
    with pytest.raises(ValueError, match=r"takes 10 channels and returns 4.*extended already"):
        extend_patch_embedding(extended, CONDITION_CHANNELS)


@pytest.mark.parametrize("channels", [0, -1])
def test_no_condition_is_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"condition_channels is {channels}"):
        extend_patch_embedding(original_transformer("SD3-medium"), channels)


def test_transformer_without_explicit_out_channels(inputs: Inputs) -> None:
    config = {**original_transformer("SD3-medium").config, "out_channels": None}
    extended = extend_patch_embedding(SD3Transformer2DModel.from_config(config), CONDITION_CHANNELS)
    assert velocity(extended, inputs).shape == inputs.x_t.shape


@pytest.mark.parametrize("training", [False, True])
def test_weights_are_shared_and_mode_is_kept(*, training: bool) -> None:
    original = original_transformer("SD3.5-large").train(training)
    extended = extend_patch_embedding(original, CONDITION_CHANNELS)
    assert extended.training is training
    theirs = dict(original.named_parameters())
    for name, parameter in extended.named_parameters():
        if name != NEW_WEIGHT:
            assert parameter is theirs[name], name
    assert torch.equal(extended.get_parameter(NEW_WEIGHT)[:, :CHANNELS], theirs[NEW_WEIGHT])


def test_full_size_sd3_medium_differs_in_one_shape_only() -> None:
    with torch.device("meta"):
        original = SD3Transformer2DModel(**SD3_MEDIUM)
    assert sum(p.numel() for p in original.parameters()) > 2e9
    extended = extend_patch_embedding(original, 336)
    before = {name: tensor.shape for name, tensor in original.state_dict().items()}
    after = {name: tensor.shape for name, tensor in extended.state_dict().items()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {NEW_WEIGHT}
    assert before[NEW_WEIGHT] == (1536, 16, 2, 2)
    assert after[NEW_WEIGHT] == (1536, 16 + 336, 2, 2)
