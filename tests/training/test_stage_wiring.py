"""That the stages join their parts as they say: each part by itself has tests of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from percov2.data.samples import Batch
from percov2.training import EntropyStage, FlowStage, entropy_stage, flow_stage
from percov2.training.batches import latents_of
from percov2.training.optimization import Optimization, Phase
from percov2.training.randomness import sample_generators
from tests.training import test_stages as stages

STEP = 7
SHIFT = 3.0


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
    return Batch(
        image=image,
        caption=[f"a picture of {number} cats" for number in range(8)],
        key=[str(number) for number in range(8)],
    )


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a stage logs, at a step that is not the first."""
    values: dict[str, Any] = {}

    def log(stage: Any, name: str, value: Any, **_: Any) -> None:
        values[name] = value

    for stage in (EntropyStage, FlowStage):
        monkeypatch.setattr(stage, "log", log)
        monkeypatch.setattr(stage, "global_step", STEP, raising=False)
    return values


class _Network:
    """Stands in for `predict`: puts out zeros, and keeps what it is given."""

    def __call__(self, transformer: Any, x_t: Tensor, *rest: Tensor) -> Tensor:
        self.x_t, (self.condition, self.t, self.text, self.pooled) = x_t, rest
        return torch.zeros_like(x_t, requires_grad=True)


@pytest.mark.parametrize("from_prediction", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_flow_loss_is_that_of_its_formula(
    batch: Batch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    from_prediction: bool,
    training: bool,
) -> None:
    """Esser et al. (2024): logit-normal times, shifted; x_t on the line; target x_1 - x_0."""
    network = _Network()
    monkeypatch.setattr(flow_stage, "predict", network)
    stage = stages.flow_stage(
        tmp_path, train_tokenizer=False, from_prediction=from_prediction, caption_dropout=0.5
    )
    stage.train(training)
    latents = latents_of(batch, stage.parts.autoencoder)
    _, condition, prediction, _ = stage._condition(latents)
    loss = stage._flow_loss(latents, condition, prediction, batch, step=STEP)
    times, dropped, noises = [], [], []
    for draw in sample_generators(stage.seed, STEP, batch["key"], purpose="flow"):
        normal = float(torch.randn((), generator=draw))
        plain = 1 / (1 + math.exp(-normal))
        times.append(SHIFT * plain / (1 + (SHIFT - 1) * plain))
        dropped.append(float(torch.rand((), generator=draw)) < 0.5)
        noises.append(torch.randn(latents.shape[1:], generator=draw))
    noise = torch.stack(noises)
    x_1 = prediction + 0.5 * noise if from_prediction else noise
    t = torch.tensor(times)
    assert torch.allclose(network.t, t, atol=1e-6)
    wide = t[:, None, None, None]
    assert torch.allclose(network.x_t, (1 - wide) * latents + wide * x_1, atol=1e-5)
    assert torch.equal(network.condition, condition)
    target = latents - prediction if from_prediction else x_1 - latents
    assert float(loss) == pytest.approx(float(target.square().mean()), rel=1e-5)
    assert 0 < sum(dropped) < len(dropped)
    assert stage.text_conditioner is not None
    captions = ["" if drop else c for c, drop in zip(batch["caption"], dropped, strict=True)]
    assert torch.allclose(network.text, stage.text_conditioner(captions).embeddings, atol=1e-5)


@pytest.mark.parametrize("train_tokenizer", [False, True])
def test_flow_stage_draws_anew_at_every_step_and_alike_in_validation(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_tokenizer: bool
) -> None:
    asked: list[tuple[str, int]] = []
    steps: list[int] = []

    def generators(seed: int, step: int, keys: list[str], *, purpose: str) -> Any:
        asked.append((purpose, step))
        return sample_generators(seed, step, keys, purpose=purpose)

    def sample(
        flow: Any, velocity: Any, condition: Tensor, source: Tensor, *, steps: int
    ) -> Tensor:
        steps_taken.append(steps)
        return source

    steps_taken = steps
    monkeypatch.setattr(flow_stage, "sample_generators", generators)
    monkeypatch.setattr(flow_stage, "sample", sample)
    stage = stages.flow_stage(tmp_path, train_tokenizer=train_tokenizer, from_prediction=True)
    stage.training_step(batch, 0)
    assert asked == [("flow", STEP), ("masks", STEP)][: 1 + train_tokenizer]
    asked.clear()
    stage.validation_steps = 3
    with torch.no_grad():
        stage.eval().validation_step(batch, 0)
    assert (asked, steps_taken) == ([("flow", 0)], [3])


def test_frozen_parts_stay_in_evaluation_mode(tmp_path: Path) -> None:
    for train_tokenizer in (False, True):
        stage = stages.flow_stage(
            tmp_path, train_tokenizer=train_tokenizer, from_prediction=True
        ).train()
        stage.on_train_start()
        assert stage.parts.quantizer.training == train_tokenizer
        assert stage.transformer.training


def test_activations_are_checkpointed_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FlowStage.__init__
    for wanted in (False, True):

        def init(self: FlowStage, wanted: bool = wanted, **options: Any) -> None:
            original(self, gradient_checkpointing=wanted, **options)

        monkeypatch.setattr(FlowStage, "__init__", init)
        stage = stages.flow_stage(tmp_path, train_tokenizer=False, from_prediction=True)
        assert stage.transformer.gradient_checkpointing == wanted


def test_stage_1_weighs_and_masks_as_configured(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: dict[str, Any]
) -> None:
    given: list[dict[str, Any]] = []
    draw = entropy_stage.draw_training_masks

    def masks(groups: Any, **options: Any) -> Tensor:
        given.append(options)
        return draw(groups, **options)

    steps: list[int] = []

    def generators(seed: int, step: int, keys: list[str], *, purpose: str) -> Any:
        steps.append(step)
        return sample_generators(seed, step, keys, purpose=purpose)

    monkeypatch.setattr(entropy_stage, "draw_training_masks", masks)
    monkeypatch.setattr(entropy_stage, "sample_generators", generators)
    stage = stages.entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    stage.random_mask_share, stage.min_targets = 0.625, 3
    stage.pixel_weight, stage.commitment_weight = 0.0, 5.0
    loss = stage.training_step(batch, 0)
    assert [(one["random_share"], one["min_targets"]) for one in given] == [(0.625, 3)]
    assert steps == [STEP]
    expected = logged["train/latent_mse"] + 5 * logged["train/commitment"]
    assert float(loss) == pytest.approx(float(expected + logged["train/bits_per_token"]), rel=1e-5)
    assert logged["train/commitment"] > 0


def test_stage_1_trains_its_parts_in_their_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[Phase] = []
    monkeypatch.setattr(entropy_stage, "build_optimizer", lambda *given, **_: phases.extend(given))
    stage = stages.entropy_stage(tmp_path, tokenizer_steps=30, masked_from=20)
    trainer = SimpleNamespace(estimated_stepping_batches=100, strategy=None)
    monkeypatch.setattr(EntropyStage, "trainer", trainer)
    stage.configure_optimizers()
    assert [(phase.first, phase.last) for phase in phases] == [(0, 30), (20, 100)]
    trainer.estimated_stepping_batches = 25
    phases.clear()
    stage.configure_optimizers()
    assert [(phase.first, phase.last) for phase in phases] == [(0, 25), (20, 25)]


def test_warm_up_and_decay_begin_with_their_phase() -> None:
    cosine = Optimization(lr=1.0, warmup_steps=10, decay="cosine")
    for step in range(100):
        early = cosine.factor(step, first=0, last=100)
        assert cosine.factor(step + 500, first=500, last=600) == pytest.approx(early)
    assert cosine.factor(504, first=500, last=600) == pytest.approx(0.5)


@pytest.mark.parametrize("judged", [False, True])
def test_only_a_judged_flow_learns_the_samplers_times_and_noise(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: bool
) -> None:
    network = _Network()
    monkeypatch.setattr(flow_stage, "predict", network)
    stage = stages.flow_stage(tmp_path, train_tokenizer=False, from_prediction=True).eval()
    stage.flow = replace(stage.flow, temperature=0.25)
    if judged:
        object.__setattr__(stage, "adversary", SimpleNamespace(steps=1))
    latents = latents_of(batch, stage.parts.autoencoder)
    _, condition, prediction, _ = stage._condition(latents)
    stage._flow_loss(latents, condition, prediction, batch, step=STEP)
    # At time 1 the network sees the source alone.
    assert bool((network.t == 1).all()) == judged
    wide = network.t[:, None, None, None]
    noise = (network.x_t - (1 - wide) * latents - wide * prediction) / (wide * stage.flow.sigma)
    assert float(noise.std()) == pytest.approx(0.25 if judged else 1.0, rel=0.1)
