"""Losses of the training stages: every term has a gradient, frozen parts stay frozen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import percov2
from percov2.components import TokenizerComponents
from percov2.data.samples import Batch
from percov2.data.transforms import image_to_tensor
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.synthesis.flow import Flow
from percov2.synthesis.sampler import Tiling
from percov2.token_chooser import TokenChooser
from percov2.training import AutoencoderStage, EntropyStage, FlowStage
from percov2.training.adaptation import FullFinetune
from percov2.training.adversary import Adversary
from percov2.training.callbacks.monitoring import tokens_of
from percov2.training.flow_start import FlowStart, FromModel
from percov2.training.optimization import Optimization
from tests.tiny_codec import CODEBOOK_SIZE, save_tiny, tiny_tokenizer

FAST = Optimization(lr=1e-3, warmup_steps=0)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    return Batch(image=image, caption=["a cat", ""], key=["0", "1"])


@pytest.fixture(autouse=True)
def _unattached_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages run here without a Trainer, which is where `log` sends its values."""
    for stage in (AutoencoderStage, EntropyStage, FlowStage):
        monkeypatch.setattr(stage, "log", lambda *args, **kwargs: None)
        monkeypatch.setattr(stage, "global_step", 0, raising=False)


def _step(stage: nn.Module, loss: Tensor) -> None:
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _without_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]


def entropy_stage(directory: Path, *, tokenizer_steps: int, masked_from: int) -> EntropyStage:
    parts = tiny_tokenizer()
    parts.save(directory)
    return stage_of(
        parts,
        autoencoder=str(directory),
        tokenizer_steps=tokenizer_steps,
        masked_steps_from=masked_from,
        start=None if tokenizer_steps else directory,
    )


def stage_of(parts: TokenizerComponents, **options: Any) -> EntropyStage:
    return EntropyStage(
        hyper_encoder=parts.hyper_encoder,
        quantizer=parts.quantizer,
        latent_decoder=parts.latent_decoder,
        masked_transformer=parts.masked_transformer,
        schedule="quincunx",
        tokenizer_optimization=FAST,
        masked_optimization=FAST,
        pixel_weight=1.0,
        commitment_weight=0.25,
        **options,
    ).train()


def flow_stage(
    directory: Path,
    *,
    train_tokenizer: bool,
    from_prediction: bool,
    lpips_weight: float = 0.0,
    train_text_encoders: bool = True,
    cached_text: bool = False,
    caption_dropout: float = 0.1,
    adversary: Adversary | None = None,
    start: FlowStart | None = None,
    rate_weight: float = 0.0,
    color_weight: float = 0.0,
    latent_weight: float = 0.0,
    sharpness: float = 0.0,
    grain: float = 0.0,
) -> FlowStage:
    save_tiny(directory, from_prediction=from_prediction)
    flow = Flow(shift=3.0, from_prediction=from_prediction, sigma=0.5 if from_prediction else 1.0)
    stage = FlowStage(
        tokenizer=directory,
        start=start or FromModel(directory=directory),
        adaptation=FullFinetune(),
        flow=flow,
        tiling=Tiling(size=8, overlap=2),
        optimization=FAST,
        name="test",
        schedule="quincunx",
        caption_dropout=caption_dropout,
        train_tokenizer=train_tokenizer,
        train_text_encoders=train_text_encoders,
        cached_text=cached_text,
        default_steps=2,
        default_guidance=1.0,
        lpips_weight=lpips_weight,
        lpips_net="squeeze",
        adversary=adversary,
        rate_weight=rate_weight,
        color_weight=color_weight,
        latent_weight=latent_weight,
        sharpness=sharpness,
        grain=grain,
    ).train()
    stage.on_train_start()
    return stage


def test_autoencoder_loss_reaches_both_residuals(batch: Batch) -> None:
    from percov2.analysis.autoencoder import PatchAutoencoder

    autoencoder = PatchAutoencoder(
        latent_channels=4, encoder_width=8, encoder_blocks=1, decoder_width=8, decoder_blocks=1
    )
    stage = AutoencoderStage(autoencoder=autoencoder, optimization=FAST)
    for _ in range(3):  # zero-initialised layers open one after the other
        _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    assert _without_gradient(autoencoder) == []


def test_entropy_stage_trains_the_tokenizer_first(batch: Batch, tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=10)
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    for part in (stage.hyper_encoder, stage.quantizer, stage.latent_decoder):
        assert _without_gradient(part) == []
    assert all(p.grad is None for p in stage.masked_transformer.parameters())


def test_commitment_alone_reaches_the_hyper_encoder(batch: Batch, tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=10)
    latents = stage.autoencoder.encode(batch["image"])
    stage.quantizer(stage.hyper_encoder(latents)).commitment_loss.backward()
    assert _without_gradient(stage.hyper_encoder) == []
    assert all(p.grad is None for p in stage.latent_decoder.parameters())


def test_the_pixel_error_reaches_the_tokenizer_through_the_frozen_decoder(
    batch: Batch, tmp_path: Path
) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=10)
    latents = stage.autoencoder.encode(batch["image"]).detach()
    stage.quantizer.eval()
    stage.pixel_weight = 0.0
    without, _ = stage._tokenizer_loss(batch, latents)
    stage.pixel_weight = 3.0
    with_pixels, _ = stage._tokenizer_loss(batch, latents)
    prediction = stage.latent_decoder(stage.quantizer(stage.hyper_encoder(latents)).features)
    error = (stage.autoencoder.decode(prediction) - batch["image"]).square().mean()
    assert (with_pixels - without).item() == pytest.approx(3 * error.item(), rel=1e-4)
    (with_pixels - without).backward()
    assert any(p.grad.abs().sum() > 0 for p in stage.hyper_encoder.parameters())
    assert all(p.grad is None for p in stage.autoencoder.parameters())


def test_entropy_stage_then_trains_the_masked_transformer_alone(
    batch: Batch, tmp_path: Path
) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=0, masked_from=0)
    codebook = stage.quantizer.codebook.clone()
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    assert _without_gradient(stage.masked_transformer) == []
    assert all(p.grad is None for p in stage.hyper_encoder.parameters())
    assert torch.equal(stage.quantizer.codebook, codebook)


def test_the_masked_transformer_starts_from_the_codebook_once(batch: Batch, tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    before = stage.masked_transformer.token_embedding.weight.clone()
    stage.on_train_batch_start(batch, 0)
    started = stage.masked_transformer.token_embedding.weight.clone()
    assert not torch.equal(before, started)
    _step(stage, stage.training_step(batch, 0))
    trained = stage.masked_transformer.token_embedding.weight.clone()
    assert not torch.equal(trained, started)
    stage.on_train_batch_start(batch, 1)
    assert torch.equal(stage.masked_transformer.token_embedding.weight, trained)


def test_joint_phase_has_both_losses(batch: Batch, tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    assert _without_gradient(stage.hyper_encoder) == []
    assert _without_gradient(stage.masked_transformer) == []


def test_a_start_gives_its_tokenizer_and_its_masked_transformer(
    batch: Batch, tmp_path: Path
) -> None:
    source = tiny_tokenizer(seed=1)
    source.save(tmp_path)
    options = {"autoencoder": str(tmp_path), "tokenizer_steps": 0, "masked_steps_from": 0}
    stage = stage_of(tiny_tokenizer(seed=0), start=tmp_path, **options)
    for name in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
        taken = getattr(stage, name).state_dict()
        for key, value in source.modules()[name].state_dict().items():
            assert torch.equal(value, taken[key]), (name, key)
    before = {key: value.clone() for key, value in stage.masked_transformer.state_dict().items()}
    stage.on_train_batch_start(batch, 0)  # must not start anew from the codebook
    for key, value in stage.masked_transformer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_masked_transformer_of_another_architecture_starts_anew(
    batch: Batch, tmp_path: Path
) -> None:
    tiny_tokenizer(seed=1).save(tmp_path)
    options = {"autoencoder": str(tmp_path), "tokenizer_steps": 0, "masked_steps_from": 0}
    deeper = MaskedTransformer(
        codebook_size=CODEBOOK_SIZE, dim=16, num_layers=3, num_heads=2, window=4
    )
    with pytest.warns(UserWarning, match="masked_transformer.num_layers is 3, but 2 in"):
        stage = stage_of(
            replace(tiny_tokenizer(seed=0), masked_transformer=deeper), start=tmp_path, **options
        )
    before = [p.clone() for p in deeper.parameters()]
    stage.on_train_batch_start(batch, 0)
    assert not all(torch.equal(p, b) for p, b in zip(deeper.parameters(), before, strict=True))
    # The same configuration, weights of another version of the class.
    file = tmp_path / "masked_transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    key, value = sorted(weights.items())[0]
    save_file({**weights, key: torch.cat([value, value])}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=rf"masked_transformer.{re.escape(key)} is \("):
        stage_of(tiny_tokenizer(seed=0), start=tmp_path, **options)


def test_a_start_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(reduction=4).save(tmp_path)
    options = {"autoencoder": str(tmp_path), "tokenizer_steps": 5, "masked_steps_from": 0}
    with pytest.raises(ValueError, match=r"hyper_encoder\.reduction is 2, but 4 in"):
        stage_of(tiny_tokenizer(reduction=2), start=tmp_path, **options)
    with pytest.raises(ValueError, match="hyper_encoder"):
        stage_of(tiny_tokenizer(), start=tmp_path / "nowhere", **options)
    options["tokenizer_steps"] = 0
    with pytest.raises(ValueError, match="start is null, so the tokenizer would stay random"):
        stage_of(tiny_tokenizer(), **options)


def test_phases_with_a_gap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masked_steps_from 3 > tokenizer_steps 2"):
        entropy_stage(tmp_path, tokenizer_steps=2, masked_from=3)


@pytest.mark.parametrize("from_prediction", [False, True])
def test_flow_stage_with_a_frozen_tokenizer(
    batch: Batch, tmp_path: Path, from_prediction: bool
) -> None:
    stage = flow_stage(tmp_path, train_tokenizer=False, from_prediction=from_prediction)
    codebook = stage.parts.quantizer.codebook.clone()
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    # The text queries of SD3's last block have no output: it paints only.
    unused = {"add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight"}
    last = "transformer_blocks.1.attn."
    assert set(_without_gradient(stage.transformer)) <= {last + name for name in unused}
    encoders = stage.text_conditioner
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoders.parameters())
    for module in stage.parts.modules().values():
        assert all(p.grad is None for p in module.parameters())
    assert torch.equal(stage.parts.quantizer.codebook, codebook)


def test_flow_stage_with_a_joint_tokenizer_trains_all(batch: Batch, tmp_path: Path) -> None:
    stage = flow_stage(tmp_path, train_tokenizer=True, from_prediction=True)
    codebook = stage.parts.quantizer.codebook.clone()
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
        assert _without_gradient(stage.parts.modules()[part]) == [], part
    assert all(p.grad is None for p in stage.parts.autoencoder.parameters())
    assert not torch.equal(stage.parts.quantizer.codebook, codebook)


def test_a_joint_tokenizer_commits_to_its_codes(batch: Batch, tmp_path: Path) -> None:
    losses, norms = [], []
    for weight in (0.0, 0.5):
        stage = flow_stage(tmp_path, train_tokenizer=True, from_prediction=True)
        stage.commitment_weight = weight
        losses.append(stage.training_step(batch, 0))
        losses[-1].backward()
        gradient = stage.parts.quantizer.project_in.weight.grad
        norms.append(float(gradient.norm()))
    stage = flow_stage(tmp_path, train_tokenizer=True, from_prediction=True)
    with torch.no_grad():
        commitment = stage._condition(stage.parts.autoencoder.encode(batch["image"])).commitment
    assert commitment > 0.01
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * commitment)
    assert norms[1] != norms[0]


def test_flow_stage_paints_the_tokens_that_its_encoder_will_choose(
    photograph: Image.Image, tmp_path: Path
) -> None:
    stage = flow_stage(
        tmp_path / "start",
        train_tokenizer=False,
        from_prediction=True,
        rate_weight=0.1,
        color_weight=20.0,
        latent_weight=0.03,
    )
    stage.export(tmp_path / "model")
    codec = percov2.load(str(tmp_path / "model"))
    picture = photograph.crop((0, 0, 64, 64))
    latents = stage.parts.autoencoder.encode(image_to_tensor(picture)[None])
    tokens, condition, _, _ = stage._condition(latents)
    seen = Batch(image=image_to_tensor(picture)[None], caption=[""], key=["0"])
    assert torch.equal(tokens_of(stage.eval(), seen), tokens)
    assert np.array_equal(tokens[0].numpy(), codec.encode_tokens(picture))
    for other in ({"rate_weight": 0.0}, {"color_weight": 0.0}, {"latent_weight": 0.0}):
        assert not np.array_equal(tokens[0].numpy(), codec.encode_tokens(picture, **other))
    features = stage.parts.quantizer.tokens_to_features(tokens)
    assert torch.equal(condition, stage.parts.latent_decoder.condition(features)[0])


CHOICE = {"rate_weight": 0.1, "color_weight": 20.0, "latent_weight": 0.03}


def test_a_joint_tokenizer_learns_from_the_tokens_that_its_encoder_chooses(
    batch: Batch, tmp_path: Path
) -> None:
    stage = flow_stage(tmp_path, train_tokenizer=True, from_prediction=True, **CHOICE)
    parts = stage.parts
    latents = parts.autoencoder.encode(batch["image"])
    codebook = parts.quantizer.codebook.clone()
    chosen = TokenChooser(parts, schedule="quincunx")(latents, **CHOICE)
    similarity = parts.quantizer.similarity(parts.hyper_encoder(latents))
    assert not torch.equal(chosen, similarity.argmax(-1))
    taken = similarity.gather(-1, chosen[..., None])
    condition = stage._condition(latents)
    assert torch.equal(condition.tokens, chosen)
    torch.testing.assert_close(condition.commitment, 1 - taken.mean())
    assert not torch.equal(parts.quantizer.codebook, codebook)
    _step(stage, stage.training_step(batch, 0))
    stage.training_step(batch, 0).backward()
    for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
        assert _without_gradient(parts.modules()[part]) == [], part


def test_what_codes_of_a_joint_tokenizer_decode_to_is_measured_anew(
    batch: Batch, tmp_path: Path
) -> None:
    stage = flow_stage(tmp_path, train_tokenizer=True, from_prediction=True, **CHOICE)
    latents = stage.parts.autoencoder.encode(batch["image"])
    chooser = TokenChooser(stage.parts, schedule="quincunx")
    assert torch.equal(stage.choose_tokens(latents), chooser(latents, **CHOICE))
    with torch.no_grad():
        stage.parts.quantizer.project_out.weight.mul_(-3)
    anew = TokenChooser(stage.parts, schedule="quincunx")(latents, **CHOICE)
    assert not torch.equal(chooser(latents, **CHOICE), anew), "the old colours are of no use"
    assert torch.equal(stage.choose_tokens(latents), anew)


@pytest.mark.usefixtures("random_backbone")
@pytest.mark.parametrize("from_prediction", [False, True])
def test_lpips_reaches_the_transformer_through_the_decoder(
    batch: Batch, tmp_path: Path, from_prediction: bool
) -> None:
    stage, plain = (
        flow_stage(
            tmp_path / str(weight),
            train_tokenizer=False,
            from_prediction=from_prediction,
            lpips_weight=weight,
        )
        for weight in (1.0, 0.0)
    )
    difference = stage.training_step(batch, 0) - plain.training_step(batch, 0).detach()
    assert difference.item() > 1e-3  # the distance itself
    gradients = []
    for model in (stage, plain):
        model.training_step(batch, 0).backward()
        gradients.append(model.transformer.proj_out.weight.grad)
    assert not torch.allclose(*gradients, rtol=1e-3)
    assert stage.state_dict().keys() == plain.state_dict().keys()
    stage.eval()
    assert torch.equal(stage.training_step(batch, 0), plain.eval().training_step(batch, 0))


@pytest.mark.parametrize("caption_dropout", [0.0, 0.5, 1.0])
def test_cached_latents_and_text_give_the_same_loss(
    batch: Batch, tmp_path: Path, caption_dropout: float
) -> None:
    stage, from_cache = (
        flow_stage(
            tmp_path,
            train_tokenizer=False,
            from_prediction=True,
            train_text_encoders=False,
            cached_text=cached,
            caption_dropout=caption_dropout,
        )
        for cached in (False, True)
    )
    assert from_cache.text_conditioner is None
    assert stage.text_conditioner is not None
    text, empty = (stage.text_conditioner(captions) for captions in (batch["caption"], [""]))
    cached = Batch(
        latents=stage.parts.autoencoder.encode(batch["image"]),
        caption=batch["caption"],
        key=batch["key"],
        text_embeddings=text.embeddings,
        text_pooled=text.pooled,
        empty_embeddings=empty.embeddings[0],
        empty_pooled=empty.pooled[0],
    )
    # Text of a whole batch and of one caption differ by float32 rounding.
    expected = stage.training_step(batch, 0)
    assert torch.allclose(from_cache.training_step(cached, 0), expected, rtol=1e-5)
    if caption_dropout == 1.0:
        del cached["empty_embeddings"]
        with pytest.raises(ValueError, match="empty_text"):
            from_cache.training_step(cached, 0)


def test_a_cache_that_does_not_suit_is_refused(batch: Batch, tmp_path: Path) -> None:
    stage = flow_stage(tmp_path / "flow", train_tokenizer=False, from_prediction=True)
    text = stage.text_conditioner(batch["caption"])
    latents = stage.parts.autoencoder.encode(batch["image"])
    cached = Batch(latents=latents, caption=batch["caption"], key=batch["key"])
    with pytest.raises(ValueError, match="--images true"):
        stage.validation_step(cached, 0)
    with pytest.raises(ValueError, match="cached_text and train_text_encoders are both true"):
        flow_stage(tmp_path / "both", train_tokenizer=False, from_prediction=True, cached_text=True)
    from_cache = flow_stage(
        tmp_path / "cached",
        train_tokenizer=False,
        from_prediction=True,
        train_text_encoders=False,
        cached_text=True,
    )
    with pytest.raises(ValueError, match="cached_text is true and the batch holds no cached text"):
        from_cache.training_step(cached, 0)
    cached["text_embeddings"], cached["text_pooled"] = text.embeddings, text.pooled
    with pytest.raises(ValueError, match="cached_text is false and the batch holds cached text"):
        stage.training_step(cached, 0)
    entropy = entropy_stage(tmp_path / "entropy", tokenizer_steps=1, masked_from=1)
    with pytest.raises(ValueError, match="pixel_weight"):
        entropy.training_step(cached, 0)
    entropy.pixel_weight = 0.0
    assert entropy.training_step(cached, 0).requires_grad


def test_cached_text_of_another_t5_is_refused(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shape tells: without T5 zeros take the place of its embeddings."""
    stage = flow_stage(
        tmp_path,
        train_tokenizer=False,
        from_prediction=True,
        train_text_encoders=False,
        cached_text=True,
        caption_dropout=0.0,
    )
    text = stage.start.build_text()(batch["caption"])
    rows = torch.randn(2, 3, text.embeddings.shape[-1])
    for cached in (False, True):
        more = rows if cached else torch.zeros_like(rows)
        data = Batch(
            latents=stage.parts.autoencoder.encode(batch["image"]),
            caption=batch["caption"],
            key=batch["key"],
            text_embeddings=torch.cat([text.embeddings, more], 1).detach(),
            text_pooled=text.pooled.detach(),
        )
        for wanted in (False, True, None):
            stage._t5_checked = False
            monkeypatch.setattr(FromModel, "uses_t5", lambda _, wanted=wanted: wanted)
            if wanted in (cached, None):
                assert stage.training_step(data, 0).isfinite()
            else:
                words = ("with", "without") if cached else ("without", "with")
                with pytest.raises(ValueError, match="text {} T5, .* is {} it".format(*words)):
                    stage.training_step(data, 0)


def test_text_encoders_keep_their_precision_unless_they_are_trained(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    source = flow_stage(tmp_path / "source", train_tokenizer=False, from_prediction=False)
    source.half_export = True
    source.export(tmp_path / "half")
    for trained, dtype in ((False, torch.float16), (True, torch.float32)):
        stage = flow_stage(
            tmp_path / "tokenizer",
            train_tokenizer=False,
            from_prediction=False,
            train_text_encoders=trained,
            start=FromModel(directory=tmp_path / "half"),
        )
        assert stage.text_conditioner is not None
        assert {p.dtype for p in stage.text_conditioner.parameters()} == {dtype}


def test_flow_loss_does_not_depend_on_how_samples_are_batched(batch: Batch, tmp_path: Path) -> None:
    stage = flow_stage(tmp_path, train_tokenizer=False, from_prediction=True)
    whole = stage.training_step(batch, 0)
    halves = [
        stage.training_step(
            Batch(
                image=batch["image"][i : i + 1],
                caption=[batch["caption"][i]],
                key=[batch["key"][i]],
            ),
            0,
        )
        for i in range(2)
    ]
    # float32 sums in another order
    assert torch.allclose(whole, torch.stack(halves).mean(), rtol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_a_run_on_cached_text_exports_the_same_model(tmp_path: Path, half: bool) -> None:
    for cached in (False, True):
        stage = flow_stage(
            tmp_path / "start",
            train_tokenizer=False,
            from_prediction=True,
            train_text_encoders=False,
            cached_text=cached,
        )
        stage.half_export = half
        assert any(name.startswith("text_cond") for name in stage.state_dict()) != cached
        stage.export(tmp_path / str(cached))
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "False", tmp_path / "True")
    ]
    assert files[0] == files[1]
    assert Path("text_encoder/model.safetensors") in files[1]


def test_export_writes_what_load_reads(tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path / "ae", tokenizer_steps=1, masked_from=1)
    stage.export(tmp_path / "out")
    loaded = TokenizerComponents.load(tmp_path / "out")
    for name, module in loaded.modules().items():
        state = getattr(stage, name).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)


def test_learning_rate_factors() -> None:
    cosine = Optimization(lr=1.0, warmup_steps=10, decay="cosine")
    assert cosine.factor(0, first=0, last=110) == pytest.approx(0.1)
    assert cosine.factor(10, first=0, last=110) == 1.0
    assert cosine.factor(60, first=0, last=110) == pytest.approx(0.5)
    assert cosine.factor(109, first=0, last=110) < 0.001
    assert cosine.factor(110, first=0, last=110) == 0
    assert cosine.factor(99, first=100, last=200) == 0
    assert Optimization(lr=1.0, warmup_steps=0).factor(50, first=0, last=100) == 1
