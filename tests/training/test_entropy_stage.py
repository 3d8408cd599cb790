"""Stage 1 under a real Trainer: the masked transformer alone, and counts over all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from percov2.components import TokenizerComponents
from percov2.data.samples import Batch
from percov2.entropy.token_choice import choose_tokens
from percov2.entropy.token_coder import TokenCoder
from percov2.token_chooser import TokenChooser
from percov2.training import EntropyStage
from percov2.training import entropy_stage as entropy_module
from percov2.training.callbacks import ExportModel, WeightEMA
from percov2.training.callbacks.weight_ema import _trained
from tests.tiny_codec import CODEBOOK_SIZE
from tests.training.callbacks.watched_runs import PictureDataModule, fit
from tests.training.test_stages import entropy_stage


def test_a_masked_transformer_alone_is_trained_averaged_and_exported(tmp_path: Path) -> None:
    stage = entropy_stage(tmp_path / "start", tokenizer_steps=0, masked_from=0)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    average = WeightEMA(decay=0.5)
    export = ExportModel(tmp_path / "model")
    trainer = fit(stage, tmp_path / "run", [average, export], steps=4)
    (group,) = trainer.optimizers[0].param_groups
    trained = {id(p) for p in group["params"]}
    assert trained == {id(p) for p in stage.masked_transformer.parameters() if p.requires_grad}
    for name, value in stage.state_dict().items():
        if not name.startswith("masked_transformer."):
            assert torch.equal(value, before[name]), name
    exported = TokenizerComponents.load(tmp_path / "model").masked_transformer
    averages = dict(zip(_trained(stage), average._average, strict=True))
    for name, value in exported.named_parameters():
        assert torch.equal(value, averages[f"masked_transformer.{name}"]), name
    assert not all(torch.equal(v, before[n]) for n, v in averages.items())


def test_tokens_of_a_frozen_tokenizer_are_the_encoders_choice(tmp_path: Path) -> None:
    """Training and validation see the tokens that a codec with this rate weight would write."""
    stage = entropy_stage(tmp_path, tokenizer_steps=0, masked_from=0)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    nearest = stage.choose_tokens(latents)
    similarity = stage.quantizer.similarity(stage.hyper_encoder(latents))
    assert torch.equal(nearest, similarity.argmax(-1))
    stage.rate_weight = 0.05
    chosen = stage.choose_tokens(latents)
    expected = choose_tokens(
        similarity, stage.masked_transformer, schedule="quincunx", rate_weight=0.05
    ).tokens
    assert torch.equal(chosen, expected)
    assert not torch.equal(chosen, nearest)
    by_decoding = TokenChooser(stage.components(), schedule="quincunx")
    for color_weight, latent_weight in ((5.0, 0.0), (0.0, 0.1)):
        stage.color_weight, stage.latent_weight = color_weight, latent_weight
        expected = by_decoding(
            latents, rate_weight=0.05, color_weight=color_weight, latent_weight=latent_weight
        )
        assert torch.equal(stage.choose_tokens(latents), expected)
        assert not torch.equal(expected, chosen)


def test_a_tokenizer_that_learns_takes_the_encoders_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EntropyStage, "log", lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    batch = Batch(image=image, caption=["", ""], key=["0", "1"])
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    weights = {"rate_weight": 0.05, "color_weight": 5.0, "latent_weight": 0.1}
    for weight, value in weights.items():
        setattr(stage, weight, value)
    parts = stage.components()
    latents = parts.autoencoder.encode(batch["image"])
    chosen = TokenChooser(parts, schedule="quincunx")(latents, **weights)
    similarity = parts.quantizer.similarity(parts.hyper_encoder(latents))
    assert not torch.equal(chosen, similarity.argmax(-1))
    codebook = parts.quantizer.codebook.clone()
    loss, tokens = stage._tokenizer_loss(batch, latents)
    assert torch.equal(tokens, chosen)
    loss.backward()
    for part in (parts.hyper_encoder, parts.latent_decoder, parts.quantizer):
        assert all(p.grad is not None for p in part.parameters())
    assert not torch.equal(parts.quantizer.codebook, codebook)
    with torch.no_grad():
        parts.quantizer.project_out.weight.mul_(-3)
    anew = TokenChooser(parts, schedule="quincunx")(latents, **weights)
    assert torch.equal(stage.choose_tokens(latents), anew), "colours are measured at every step"
    with torch.no_grad():
        parts.quantizer.project_out.weight.mul_(-1)
    anew = TokenChooser(parts, schedule="quincunx")(latents, **weights)
    monkeypatch.setattr(EntropyStage, "global_step", 10)
    assert torch.equal(stage.choose_tokens(latents), anew), "and once more behind the last"


class WithAnotherProcess(SingleDeviceStrategy):
    """One process that is told the same sums as if there were a second one."""

    def __init__(self, other: Tensor) -> None:
        super().__init__()
        self.other = other

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.shape == self.other.shape:
            assert kwargs["reduce_op"] == "sum"
            return tensor + self.other
        return tensor


def test_held_out_tokens_are_counted_over_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    coders = 0
    build = TokenizerComponents.token_coder

    def counted(*args: Any, **kwargs: Any) -> TokenCoder:
        nonlocal coders
        coders += 1
        return build(*args, **kwargs)

    monkeypatch.setattr(TokenizerComponents, "token_coder", counted)
    # The other process has met 100 tokens, all of them of code 3, and spent 50 bytes on them.
    other = torch.zeros(CODEBOOK_SIZE + 1, dtype=torch.int64)
    other[3], other[-1] = 100, 50
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(strategy=WithAnotherProcess(other), accelerator="cpu", **options)
    trainer.validate(stage, datamodule=PictureDataModule(), verbose=False)
    # Its integer transformer takes longer to build than a batch takes to encode.
    assert coders == 1
    logged = trainer.callback_metrics
    counts = stage._counts + other[:-1]
    assert int(counts.sum()) == 100 + 3 * 16
    bits = 8 * (stage._bytes + 50) / int(counts.sum())
    assert logged["val/bits_per_token"] == pytest.approx(bits)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log2()).sum()
    assert logged["val/zero_order_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert logged["val/codes_used"] == len(share)


def test_what_processes_reduce_lies_on_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL takes tensors on GPUs only; the meta device stands for one."""
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    logged = {}
    monkeypatch.setattr(EntropyStage, "device", torch.device("meta"))
    monkeypatch.setattr(EntropyStage, "trainer", None)
    monkeypatch.setattr(stage, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(entropy_module, "total_over_processes", lambda _, counts: counts)
    stage._coder, stage._bytes = None, 10  # type: ignore[assignment]
    stage._counts = torch.ones(CODEBOOK_SIZE, dtype=torch.int64)
    stage.on_validation_epoch_end()
    assert set(logged) == {"val/bits_per_token", "val/zero_order_entropy", "val/codes_used"}
    # Lightning itself puts a number on the module's device.
    tensors = [value for value in logged.values() if isinstance(value, Tensor)]
    assert len(tensors) == 2
    assert {value.device.type for value in tensors} == {"meta"}


class Observer(SingleDeviceStrategy):
    """Notes the layout of the weights that it is to wrap."""

    def setup(self, trainer: L.Trainer) -> None:
        assert self.model is not None
        self.layouts = {
            name: weight.is_contiguous(memory_format=torch.channels_last)
            for name, weight in self.model.named_parameters()
            if weight.ndim == 4
        }
        super().setup(trainer)


def test_the_layout_is_chosen_before_the_strategy_wraps_the_weights(tmp_path: Path) -> None:
    """DDP would otherwise warn that gradients and buckets differ in their strides."""
    observer = Observer()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_steps": 1}
    trainer = L.Trainer(strategy=observer, accelerator="cpu", limit_val_batches=0, **options)
    stage = entropy_stage(tmp_path, tokenizer_steps=10, masked_from=0)
    trainer.fit(stage, datamodule=PictureDataModule())
    assert len(observer.layouts) > 10
    assert all(observer.layouts.values())
