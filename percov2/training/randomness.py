"""Random numbers of training that depend on seed, step and sample, not on the process.

The same run on one, two or eight processes then draws the same noise for the same sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch


def batch_generator(seed: int, step: int, keys: Sequence[str]) -> torch.Generator:
    """A CPU generator for everything drawn per batch."""
    return torch.Generator().manual_seed(_mix(seed, step, "\n".join(keys)))


def sample_generators(seed: int, step: int, keys: Sequence[str]) -> list[torch.Generator]:
    """One CPU generator per sample."""
    return [torch.Generator().manual_seed(_mix(seed, step, key)) for key in keys]


def _mix(seed: int, step: int, key: str) -> int:
    return zlib.crc32(f"{seed}/{step}/{key}".encode())
