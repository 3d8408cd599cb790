"""What only a GPU can show; ``pytest -m gpu tests/gpu``. A few minutes, SD3 itself aside.

- the entropy model: do streams from the GPU equal those from the CPU?
- memory: does a step take what `percov2.training.memory` says?
- one real step of Stable Diffusion 3, where its licence has been accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.entropy.range_coder import RangeDecoder
from percov2.synthesis.flow_transformer import extend_patch_embedding, predict
from percov2.training import sd3_reference
from percov2.training.adaptation import Adaptation, FullFinetune, LoRA
from percov2.training.flow_start import FromStableDiffusion3
from percov2.training.memory_setup import (
    build_stage_transformer,
    measure_step,
    step_loss,
)
from tests.tiny_codec import CODEBOOK_SIZE, tiny_tokenizer
from tests.training.test_memory import SETUP as TINY_SETUP

pytestmark = pytest.mark.gpu

MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"
SETUP = replace(
    TINY_SETUP,
    model=MEDIUM,
    transformer=sd3_reference.TRANSFORMERS[MEDIUM] | {"num_layers": 4},
    condition_channels=336,
    tokenizer=0,
    average=False,
    precision="bf16-mixed",
    crop=512,
)


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("schedule", ["quincunx", "qlds", "checkerboard"])
def test_streams_of_the_gpu_are_those_of_the_cpu(schedule: str) -> None:
    """The integer arithmetic promises it; the report counts what differs."""
    tokens = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (8, 16, 16))
    parts = tiny_tokenizer()
    coders = {device: parts.token_coder(schedule, device=device) for device in ("cpu", "cuda")}
    steps = coders["cpu"].steps_total(16, 16)
    streams = {
        device: [coder.encode(grid, steps=steps) for grid in tokens]
        for device, coder in coders.items()
    }
    for grid, stream in zip(tokens, streams["cuda"], strict=True):
        own = coders["cuda"].read(RangeDecoder(stream), 16, 16, steps=steps)
        assert np.array_equal(own, grid), "the GPU cannot decode its own stream"
    differing = sum(a != b for a, b in zip(streams["cpu"], streams["cuda"], strict=True))
    assert differing == 0, (
        f"{differing} of {len(tokens)} streams differ between the CPU and "
        f"{torch.cuda.get_device_name()}: the arithmetic is not exact there, please report it"
    )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("adaptation", [FullFinetune(), LoRA(rank=16, alpha=16)])
def test_a_step_takes_the_memory_that_was_computed(
    adaptation: Adaptation, checkpoint: bool
) -> None:
    """Four blocks of SD3-medium's width, autocast, against the meta device, within 15 %."""
    setup = replace(SETUP, adaptation=adaptation, gradient_checkpointing=checkpoint)
    computed, _ = measure_step(setup, build_stage_transformer(setup))
    transformer = extend_patch_embedding(
        sd3_reference.build_transformer(dict(setup.transformer)), setup.condition_channels
    ).to_empty(device="cuda")
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    setup.adaptation.apply(transformer)
    if checkpoint:
        transformer.enable_gradient_checkpointing()
    for parameter in transformer.train().parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    vae = sd3_reference.build_autoencoder().to_empty(device="cuda").requires_grad_(False)
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    autoencoder = StableDiffusionAutoencoder(vae)
    for _ in range(2):  # the first step loads libraries
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
            loss = step_loss(setup, transformer, autoencoder, None)
        loss.backward()
        del loss
    taken = torch.cuda.max_memory_allocated() - before
    assert taken == pytest.approx(computed, rel=0.15)


def test_one_real_step_of_stable_diffusion_3() -> None:
    """LoRA and checkpointing, one picture of 512x512; loads 5 GB, fits a 24 GB card."""
    try:
        start = FromStableDiffusion3(model=MEDIUM, use_t5=False)
        transformer, text = start.build_transformer(336, 16), start.build_text()
    except ValueError as refusal:
        pytest.skip(str(refusal))
    LoRA(rank=16, alpha=16).apply(transformer)
    transformer.enable_gradient_checkpointing()
    transformer.to("cuda").train()
    text.requires_grad_(False).to("cuda")
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    captions = text(["a dog runs along the beach"])
    generator = torch.Generator("cuda").manual_seed(0)
    latents = torch.randn(1, 16, 64, 64, device="cuda", generator=generator)
    noise = torch.randn(1, 16, 64, 64, device="cuda", generator=generator)
    condition = torch.randn(1, 336, 64, 64, device="cuda", generator=generator)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            t = torch.full((1,), 0.5, device="cuda")
            x_t = 0.5 * (latents + noise)
            output = predict(transformer, x_t, condition, t, captions.embeddings, captions.pooled)
            loss = F.mse_loss(output, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0], losses
    assert torch.cuda.max_memory_allocated() < 22 * 2**30
