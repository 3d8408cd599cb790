"""Random numbers of training that depend on seed, step and sample, not on the process.

The same run on one, two or eight processes then draws the same noise for the same sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch


def sample_generators(
    seed: int, step: int, keys: Sequence[str], *, purpose: str
) -> list[torch.Generator]:
    """One CPU generator per sample; draws for different purposes are independent."""
    texts = (f"{seed}/{step}/{purpose}/{key}" for key in keys)
    return [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
