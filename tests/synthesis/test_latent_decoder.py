"""The light decoder from token features to latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2.synthesis.latent_decoder import LatentDecoder

FEATURES, LATENTS = 6, 4


def decoder(reduction: int, *, hidden_channels: int = 16, min_channels: int = 8) -> LatentDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LatentDecoder(
            feature_channels=FEATURES,
            latent_channels=LATENTS,
            hidden_channels=hidden_channels,
            min_channels=min_channels,
            blocks=1,
            reduction=reduction,
        )


def features(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(2, FEATURES, rows, cols, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@torch.no_grad()
def test_latents_have_reduction_times_the_tokens_sides(reduction: int) -> None:
    latents = decoder(reduction)(features(3, 5))
    assert latents.shape == (2, LATENTS, 3 * reduction, 5 * reduction)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@torch.no_grad()
def test_condition_is_repeated_features_then_prediction(reduction: int) -> None:
    model, grid = decoder(reduction), features(2, 3)
    condition, prediction = model.condition(grid)
    assert condition.shape[1] == model.condition_channels == FEATURES + LATENTS
    repeated = grid.repeat_interleave(reduction, 2).repeat_interleave(reduction, 3)
    assert torch.equal(condition[:, :FEATURES], repeated)
    assert torch.equal(condition[:, FEATURES:], prediction)
    assert torch.equal(prediction, model(grid))


def test_gradient_reaches_every_weight_and_feature() -> None:
    model, grid = decoder(4), features(2, 3).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(grid).square().mean().backward()
    optimizer.step()  # blocks start as identity: their first convolutions wait for one step
    optimizer.zero_grad()
    grid.grad = None
    model(grid).square().mean().backward()
    assert all((p.grad != 0).any() for p in model.parameters())
    assert (grid.grad != 0).all()


@torch.no_grad()
def test_a_token_reaches_its_own_latents() -> None:
    model, grid = decoder(2), features(9, 9)
    changed = grid.clone()
    changed[:, :, 4, 4] += 1
    moved = (model(changed) - model(grid)).abs().sum(1)[0]
    assert moved.argmax().item() in {8 * 18 + 8, 8 * 18 + 9, 9 * 18 + 8, 9 * 18 + 9}
    assert moved[0, 0] == 0, "the decoder is local"


def test_channels_are_halved_down_to_the_least() -> None:
    widths = [
        layer.out_channels // 4
        for layer in decoder(8, hidden_channels=32, min_channels=12).layers
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1)
    ]
    assert widths[1:] == [16, 12, 12]


@pytest.mark.parametrize("reduction", [0, 3, -2])
def test_other_reductions_are_refused(reduction: int) -> None:
    with pytest.raises(ValueError, match=f"reduction is {reduction}: it must be a power of two"):
        decoder(reduction)


@torch.no_grad()
def test_saves_and_loads(tmp_path: Path) -> None:
    model = decoder(2)
    model.save_pretrained(tmp_path)
    loaded = LatentDecoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(features(2, 2)), model(features(2, 2)))
