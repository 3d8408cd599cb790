"""The memory table: counts against published figures, activations against a step that computes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from percov2.synthesis.flow_transformer import extend_patch_embedding, predict
from percov2.training import sd3_reference
from percov2.training.adaptation import FullFinetune, LoRA
from percov2.training.live_memory import GpuKernels, LiveMemory
from percov2.training.memory import GIB, HEADROOM, STRATEGIES, Row, main, make_row
from percov2.training.memory_setup import (
    Sizes,
    StageSetup,
    build_stage_transformer,
    measure_sizes,
    measure_step,
    read_setup,
)
from tests.tiny_codec import save_tiny

TINY = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 56,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
SETUP = StageSetup(
    model="tiny",
    transformer=TINY,
    condition_channels=5,
    tokenizer=1000,
    train_tokenizer=False,
    train_text_encoders=False,
    use_t5=False,
    cached_text=False,
    adaptation=FullFinetune(),
    gradient_checkpointing=False,
    optimizer="adamw",
    average=True,
    lpips_net=None,
    precision="32-true",
    batch_size=2,
    crop=32,
)
SIZES = Sizes(
    trained=800,
    frozen=200,
    weight_bytes=4000,
    table_bytes=40,
    transformer=800,
    largest_layer=100,
    sent_bytes=(2,),
    activations=5000,
    kept=4000,
)
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


def paint(
    device: str, *, autocast: torch.dtype | None = None, checkpoint: bool = False
) -> tuple[int, int]:
    """Forward and backward of the tiny transformer: what forward keeps, and the peak."""
    kernels = GpuKernels(autocast)
    transformer = extend_patch_embedding(sd3_reference.build_transformer(TINY), 5)
    transformer = transformer.to_empty(device=device)
    if checkpoint:
        transformer.enable_gradient_checkpointing(kernels.checkpoint)
    for parameter in transformer.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with torch.device(device), kernels, LiveMemory() as memory:
        inputs = [torch.zeros(2, 16, 4, 4), torch.zeros(2, 5, 4, 4), torch.ones(2) / 2]
        output = predict(transformer, *inputs, torch.zeros(2, 9, 96), torch.zeros(2, 56))
        loss = output.square().mean()
        kernels.end_forward()
        kept = memory.now
        loss.backward()
    return kept, memory.peak


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_meta_device_takes_what_a_real_step_takes(checkpoint: bool) -> None:
    assert paint("meta", checkpoint=checkpoint) == paint("cpu", checkpoint=checkpoint)


def test_what_forward_keeps_is_what_autograd_saves() -> None:
    transformer = extend_patch_embedding(sd3_reference.build_transformer(TINY), 5)
    transformer = transformer.to_empty(device="cpu")
    own = {t.untyped_storage()._cdata for t in [*transformer.parameters(), *transformer.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    inputs = [torch.zeros(2, 16, 4, 4), torch.zeros(2, 5, 4, 4), torch.ones(2) / 2]
    text, pooled = torch.zeros(2, 9, 96), torch.zeros(2, 56)
    given = {t.untyped_storage()._cdata for t in [*inputs, text, pooled]}
    with LiveMemory() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = predict(transformer, *inputs, text, pooled)
    total = sum(
        tensor.untyped_storage().nbytes()
        for key, tensor in saved.items()
        if key not in own and key not in given
    )
    assert total > 100_000
    assert memory.now == total + output.nbytes


def test_checkpointing_and_autocast_save_what_they_should() -> None:
    kept, peak = paint("meta")
    kept_less, peak_less = paint("meta", checkpoint=True)
    # Inputs of three blocks instead of all that they compute; one block at a time again.
    assert kept_less < 0.15 * kept
    assert peak_less < 0.6 * peak
    kept_half, _ = paint("meta", autocast=torch.bfloat16)
    assert kept_half != kept


def test_attention_keeps_no_matrix_of_pairs() -> None:
    q = torch.zeros(1, 2, 512, 8, device="meta", requires_grad=True)
    with GpuKernels(None), LiveMemory() as memory:
        output = F.scaled_dot_product_attention(q, q, q)
    assert output.shape == q.shape
    assert memory.now < 2 * 512 * 512 * 4


def test_autocast_follows_cuda() -> None:
    weight = torch.zeros(4, 4, device="meta", requires_grad=True)
    x = torch.zeros(2, 4, device="meta")
    with GpuKernels(torch.bfloat16):
        product = F.linear(x, weight)
        assert product.dtype == torch.bfloat16
        assert F.layer_norm(product, (4,)).dtype == torch.float32
        assert (product * 2).dtype == torch.bfloat16


def test_a_step_encodes_and_decodes_only_when_asked() -> None:
    transformer = build_stage_transformer(SETUP)
    peak, kept = measure_step(SETUP, transformer)
    with_lpips, _ = measure_step(replace(SETUP, lpips_net="alex", crop=64), transformer)
    without, _ = measure_step(replace(SETUP, crop=64), transformer)
    assert 0 < kept < peak
    assert with_lpips > 2 * without


def test_the_peak_grows_with_the_batch() -> None:
    transformer = build_stage_transformer(SETUP)
    single, _ = measure_step(replace(SETUP, batch_size=4), transformer)
    double, _ = measure_step(replace(SETUP, batch_size=8), transformer)
    assert double == pytest.approx(2 * single, rel=0.1)


def test_lora_has_fewer_trained_values_and_activations() -> None:
    full = measure_sizes(SETUP)
    lora = measure_sizes(replace(SETUP, adaptation=LoRA(rank=2, alpha=2)))
    assert lora.transformer - full.transformer == lora.trained - _patch_values(SETUP)
    assert lora.kept < full.kept
    # Query and key norms are trained in full only; they are no linear layers.
    assert (full.sent_bytes, lora.sent_bytes) == ((4,), (4,))
    mixed = replace(SETUP, precision="bf16-mixed")
    assert measure_sizes(mixed).sent_bytes == (2, 4)


def _patch_values(setup: StageSetup) -> int:
    projection = build_stage_transformer(setup).pos_embed.proj
    return sum(p.numel() for p in projection.parameters())


def test_stable_diffusion_3_medium_has_2_03_billion_values() -> None:
    transformer = sd3_reference.build_transformer(
        sd3_reference.TRANSFORMERS["stabilityai/stable-diffusion-3-medium-diffusers"]
    )
    assert sd3_reference.parameter_count(transformer) == pytest.approx(2.03e9, rel=0.005)
    extended = extend_patch_embedding(transformer, 336)
    added = sd3_reference.parameter_count(extended) - sd3_reference.parameter_count(transformer)
    assert added == 1536 * 336 * 2 * 2


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("ddp", 8, (4040, 3200, 6400, 3200)),
        ("zero2", 8, (4040, 400, 1200, 400)),
        ("zero3", 8, (540, 400, 1200, 400)),
        ("zero2+offload", 8, (4040, 0, 0, 0)),
        ("zero3+offload", 8, (40, 0, 0, 0)),
        ("zero2", 1, (4040, 3200, 9600, 3200)),
    ],
)
def test_states_by_strategy(name: str, gpus: int, expected: tuple[int, ...]) -> None:
    row = make_row(SETUP, SIZES, BY_NAME[name], gpus)
    assert (row.parameters, row.gradients, row.optimizer, row.average) == expected
    if name == "zero3+offload":
        # Weights, and per trained value gradient, master, two moments, average.
        assert row.host == 4000 // 8 + 20 * 800 // 8


def test_other_optimisers_and_no_average() -> None:
    eight_bit = replace(SETUP, optimizer="adamw_8bit", average=False)
    row = make_row(eight_bit, SIZES, BY_NAME["ddp"], 1)
    assert (row.optimizer, row.average, row.step) == (1600, 0, 0)
    assert make_row(SETUP, SIZES, BY_NAME["ddp"], 1).step == 3200


def test_the_peak_takes_the_larger_of_activations_and_step() -> None:
    row = make_row(SETUP, SIZES, BY_NAME["ddp"], 1)
    held = row.parameters + row.gradients + row.optimizer + row.average + row.buffers
    assert row.total == held + 5000
    assert replace(row, step=6000).total == held + 6000


def test_cards_leave_headroom() -> None:
    row = make_row(SETUP, SIZES, BY_NAME["ddp"], 1)

    def of(total: float) -> Row:
        return replace(row, activations=int(total * GIB) - (row.total - row.activations))

    assert of(24 * HEADROOM).card == 24
    assert of(24 * HEADROOM + 0.1).card == 40
    assert of(79).card is None


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_counts_the_same_state_in_another_precision() -> None:
    """Theirs: 2 bytes per weight, 18 / N beside. Ours without average: 4 and 16 / N, and 4 / N."""
    sizes = replace(
        SIZES,
        trained=8_000_000,
        frozen=0,
        weight_bytes=32_000_000,
        table_bytes=0,
        transformer=8_000_000,
    )
    row = make_row(replace(SETUP, average=False), sizes, BY_NAME["zero2"], 8)
    assert row.deepspeed_gpu == 8_000_000 * (2 + 18 // 8) + 8_000_000 * 2 // 8
    ours = row.parameters + row.gradients + row.optimizer + row.step
    assert ours - row.deepspeed_gpu == 8_000_000 * 2 + 8_000_000 * 2 // 8


def _write(path: Path, content: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def stage2(tmp_path: Path) -> dict[str, object]:
    """A configuration of stage 2 in the shipped one's shape."""
    model = {
        "tokenizer": "${vars.tokenizer}",
        "start": {
            "class_path": "percov2.training.flow_start.FromStableDiffusion3",
            "init_args": {
                "model": "stabilityai/stable-diffusion-3-medium-diffusers",
                "use_t5": True,
            },
        },
        "optimization": {"lr": 1.0e-5, "warmup_steps": 1, "optimizer": "adamw_fused"},
        "adaptation": {
            "class_path": "percov2.training.adaptation.LoRA",
            "init_args": {"rank": 8, "alpha": 8},
        },
        "gradient_checkpointing": True,
        "train_tokenizer": False,
        "train_text_encoders": False,
        "lpips_weight": 0.0,
    }
    return {
        "vars": {"tokenizer": str(tmp_path / "stage1")},
        "model": {"class_path": "percov2.training.FlowStage", "init_args": model},
        "data": {"class_path": "x", "init_args": {"batch_size": 10, "crop": 512}},
        "trainer": {
            "precision": "bf16-mixed",
            "callbacks": [{"class_path": "percov2.training.callbacks.WeightEMA", "init_args": {}}],
        },
    }


def test_a_configuration_is_read_without_building(tmp_path: Path) -> None:
    path = _write(tmp_path / "stage2.yaml", stage2(tmp_path))
    overlay = _write(tmp_path / "more.yaml", {"data": {"init_args": {"batch_size": 3}}})
    setup = read_setup([path, overlay], overrides=["data.init_args.crop=256"])
    assert setup.adaptation == LoRA(rank=8, alpha=8)
    assert (setup.optimizer, setup.gradient_checkpointing) == ("adamw_fused", True)
    assert (setup.batch_size, setup.crop, setup.precision) == (3, 256, "bf16-mixed")
    assert setup.average
    assert setup.lpips_net is None
    assert (setup.condition_channels, setup.tokenizer) == (336, 0)
    assert "does not exist: 336 condition channels are assumed" in setup.notes[0]


def test_stage_1s_model_is_counted_where_it_exists(tmp_path: Path) -> None:
    components = save_tiny(tmp_path / "stage1")
    setup = read_setup([_write(tmp_path / "stage2.yaml", stage2(tmp_path))])
    parts = components.tokenizer
    assert setup.condition_channels == parts.latent_decoder.condition_channels
    counted = (parts.hyper_encoder, parts.quantizer, parts.latent_decoder, parts.masked_transformer)
    values = sum(t.numel() for part in counted for t in part.state_dict().values())
    assert setup.tokenizer == values
    assert setup.notes == ()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("data"), "'data'"),
        (lambda c: c["trainer"].update(precision="bf16-true"), "trainer.precision is bf16-true"),
        (
            lambda c: c["model"]["init_args"]["start"].update(class_path="a.FromScratch"),
            "counted for FromStableDiffusion3",
        ),
        (lambda c: c["data"]["init_args"].update(crop=500), "crop 500"),
        (
            lambda c: c["model"]["init_args"]["start"]["init_args"].update(model="x/y"),
            "architecture of 'x/y' is not known",
        ),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, change: object, complaint: str) -> None:
    content = stage2(tmp_path)
    assert callable(change)
    change(content)
    with pytest.raises(ValueError, match=complaint):
        read_setup([_write(tmp_path / "stage2.yaml", content)])


def test_a_missing_file_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("percov2.training.memory: error: cannot read")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_the_program_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "stage2.yaml", stage2(tmp_path))
    options = ["--config", str(path), "--batch-size", "1", "--gpus", "1,8"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert sum(line.startswith(("| ddp", "| zero")) for line in printed.splitlines()) == 10
    assert "computed, not run on a GPU" in printed
    assert main([*options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["rows"]) == 10
    assert all(row["total"] > 0 for row in record["rows"])
