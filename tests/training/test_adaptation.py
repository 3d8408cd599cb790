"""Adapters: what they train, that they start at nothing, and that merging loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from percov2.components import load_component
from percov2.synthesis.flow_transformer import extend_patch_embedding
from percov2.training.adaptation import ATTENTION, FullFinetune, LoRA
from tests.tiny_models import JOINT_DIM, POOLED_DIM, randomise, tiny_sd3_transformer

LATENTS, CONDITION = 4, 3


def transformer() -> SD3Transformer2DModel:
    """Two blocks, extended, with random weights in the condition's channels too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extended = extend_patch_embedding(tiny_sd3_transformer(), CONDITION)
        randomise(extended.pos_embed.proj, std=0.1)
        randomise(extended.proj_out, std=0.1)
    return extended


def paint(model: SD3Transformer2DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(2, LATENTS + CONDITION, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, JOINT_DIM, generator=generator),
        pooled_projections=torch.randn(2, POOLED_DIM, generator=generator),
        timestep=torch.tensor([100.0, 900.0]),
        return_dict=False,
    )[0]


def trained(model: SD3Transformer2DModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted() -> SD3Transformer2DModel:
    """With adapters that do something."""
    model = transformer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        LoRA(rank=2, alpha=4).apply(model)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def test_fresh_adapters_change_nothing() -> None:
    model = transformer()
    before = paint(model)
    LoRA(rank=2, alpha=2).apply(model)
    assert torch.equal(paint(model), before)


def test_adapters_and_patch_embedding_alone_are_trained() -> None:
    model = adapted()
    patch = {"pos_embed.proj.weight", "pos_embed.proj.bias"}
    names = trained(model)
    assert patch < names
    assert all(".lora_" in name for name in names - patch)
    # Both matrices of eight projections in the first block; the last one puts out no text.
    assert len(names - patch) == 2 * (8 + 7)
    paint(model).square().mean().backward()
    # The text queries of the last block have no output.
    unused = "transformer_blocks.1.attn.add_q_proj"
    for name, p in model.named_parameters():
        moves = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert moves == (name in names and unused not in name), name


def test_full_finetune_trains_all_and_merges_to_itself() -> None:
    model = transformer().requires_grad_(False)
    FullFinetune().apply(model)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert FullFinetune().merged(model) is model


def test_the_merged_model_is_plain_and_computes_the_same(tmp_path: Path) -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted_output = paint(model)
    plain = LoRA(rank=2, alpha=4).merged(model)
    assert plain.state_dict().keys() == transformer().state_dict().keys()
    # One product of summed matrices instead of a sum of products.
    assert torch.allclose(paint(plain), adapted_output, atol=1e-5)
    assert not torch.allclose(paint(transformer()), adapted_output, atol=1e-2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain.save_pretrained(tmp_path / "transformer")
    loaded = load_component(SD3Transformer2DModel, tmp_path, "transformer")
    assert torch.equal(paint(loaded), paint(plain))


def test_merging_follows_alpha() -> None:
    model = adapted()
    name = "transformer_blocks.0.attn.to_q"
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 4 / 2 * (b @ a)
    merged = LoRA(rank=2, alpha=4).merged(model).get_submodule(name).weight
    assert torch.allclose(merged, expected, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(lora: bool) -> None:
    model = adapted() if lora else transformer()
    model.train()
    paint(model).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.transformer_blocks[0].ff.register_forward_hook(count)
    paint(model).square().mean().backward()
    assert calls == 2, "the block was not computed again"
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys() == trained(model)
    for name, gradient in again.items():
        assert torch.equal(gradient, plain[name]), name


def test_unknown_targets_are_refused() -> None:
    lora = LoRA(rank=2, alpha=2, targets=("to_q", "to_qq"))
    with pytest.raises(ValueError, match=r"called to_qq: choose targets among to_q, "):
        lora.apply(transformer())


def test_feed_forward_layers_may_be_targets() -> None:
    model = transformer()
    LoRA(rank=1, alpha=1, targets=("ff.net.2",)).apply(model)
    assert len(trained(model)) == 2 + 2 * 2


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rank": 0, "alpha": 1}, "rank is 0"),
        ({"rank": 1, "alpha": 0}, "alpha is 0"),
        ({"rank": 1, "alpha": 1, "dropout": 1.0}, r"dropout is 1\.0"),
        ({"rank": 1, "alpha": 1, "targets": ()}, "targets is empty"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LoRA(**fields)  # type: ignore[arg-type]


def test_attention_is_what_diffusers_calls_it() -> None:
    names = [name for name, _ in transformer().transformer_blocks[0].attn.named_modules()]
    assert set(ATTENTION) <= set(names)
