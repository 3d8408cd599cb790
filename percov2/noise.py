"""Noise that is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normal values on the CPU, float32, that depend on shape and seed alone.

    A GPU has another generator, and other defaults of torch draw other values: the same file should
    give the same picture.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)
