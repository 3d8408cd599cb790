"""What a stage takes from a batch."""

from __future__ import annotations

from typing import cast

import torch

from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.data.samples import Batch
from percov2.training.batches import latents_of
from tests.tiny_models import tiny_vae


def test_latents_are_float32_under_autocast() -> None:
    autoencoder = StableDiffusionAutoencoder(tiny_vae(levels=4))
    batch = cast(Batch, {"image": torch.zeros(1, 3, 32, 32)})
    with torch.autocast("cpu", torch.bfloat16):
        assert autoencoder.encode(batch["image"]).dtype == torch.bfloat16
        assert latents_of(batch, autoencoder).dtype == torch.float32
