"""`percov2 doctor`: does this machine compute the probabilities that streams are coded with?

A small masked transformer is filled with integers from a recurrence, without any floating-point
arithmetic; its frequencies are hashed and compared with a constant. Tests compute the same hash
with a NumPy implementation that shares no code with torch.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from percov2.devices import check_device
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import make_schedule, num_groups

EXPECTED = "e734e1f77ce697548dc352063e6d53c44f6dc87d0bc24f8d29efc076814edef1"
"""SHA-256 of the frequencies of every group of `sample_tokens` under `sample_model`."""


def _integers(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Pseudo-random integers in [-1024, 1024), the same everywhere (Knuth's MMIX recurrence)."""
    state, values = seed, np.empty(count, np.int64)
    for i in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values[i] = (state >> 53) - 1024
    return values


def sample_model() -> MaskedTransformer:
    """A masked transformer whose weights are multiples of 2^-13."""
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=64, dim=64, num_layers=2, num_heads=2, window=8
    ).float()
    for seed, (name, weight) in enumerate(sorted(model.named_parameters())):
        values = torch.from_numpy(_integers(weight.numel(), seed)).view(weight.shape)
        # Embeddings and position biases near +-1, projections near +-1/8.
        scale = 2.0**-10 if "embedding" in name or "position" in name else 2.0**-12
        weight.data.copy_(values.to(weight) * scale)
    model.eval()
    return model


def sample_tokens() -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """A grid of 13 x 21 tokens: windows of every kind, at the borders too."""
    return (_integers(13 * 21, 99) % 64).reshape(13, 21)


def frequencies_digest(model: IntegerTransformer) -> str:
    """SHA-256 of the frequencies of all groups, little-endian 64-bit integers."""
    tokens = sample_tokens()
    groups = make_schedule("quincunx", *tokens.shape)
    digest = hashlib.sha256()
    for k in range(num_groups(groups)):
        for frequencies in model.predict(torch.from_numpy(tokens)[None], groups, k):
            digest.update(frequencies.astype("<i8").tobytes())
    return digest.hexdigest()


def run(device: str) -> str:
    """Check the exactness of this machine.

    Returns:
        A line for the user.

    Raises:
        ValueError: no such device.
        RuntimeError: the probabilities differ: streams of other machines would not decode here.
    """
    check_device(device)
    found = frequencies_digest(IntegerTransformer(sample_model(), device=device))
    if found != EXPECTED:
        raise RuntimeError(
            f"probabilities computed on {device} differ from the format's (torch "
            f"{torch.__version__}, hash {found[:16]}): use --device cpu, or another machine"
        )
    return f"{device}: probabilities are exact (torch {torch.__version__}, {found[:16]})"
