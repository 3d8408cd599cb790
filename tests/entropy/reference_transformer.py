"""The integer transformer of docs/bitstream.md in NumPy integers: no torch, no floats.

Slow and plain: attention is dense, between all visible tokens of the same window.
Shape legend: M visible tokens in row-major order, d width, H heads, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ACTIVATION_MAX = 511
HIDDEN_MAX = 511
RESIDUAL_MAX = 1 << 15
LOGIT_MAX = 1 << 14
POSITION_BINS = 16
TOTAL = 1 << 24


def exp_table(bits: int) -> Integers:
    """round(2^bits exp(-i / 128)) for i = 0, 1, ... up to the first 0."""
    values: list[int] = []
    with localcontext() as context:
        context.prec = 60
        while not values or values[-1] > 0:
            exact = Decimal(2**bits) * (-Decimal(len(values)) / 128).exp()
            values.append(int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)))
    return np.array(values)


def shift_right(values: Integers, by: Integers | int) -> Integers:
    """round(values / 2^by), halves to the even neighbour."""
    by = np.broadcast_to(np.asarray(by, np.int64), values.shape)
    whole = values >> by
    rest = values - (whole << by)
    doubled, one = 2 * rest, np.int64(1) << by
    result: Integers = whole + ((doubled > one) | ((doubled == one) & (whole % 2 == 1)))
    return result


def project(part: str, integers: Mapping[str, Integers], x: Integers) -> Integers:
    """round((W x + b) / 2^shift), (..., in) to (..., out)."""
    weight, bias, shift = (integers[f"{part}.{name}"] for name in ("weight", "bias", "shift"))
    sums = x @ weight.T + bias
    assert np.abs(sums).max(initial=0) < 1 << 24
    return shift_right(sums, shift)


def normalise(x: Integers) -> Integers:
    """Root mean square normalisation of rows (M, d), unit 2^-9 to unit 2^-6."""
    gain = math.isqrt(x.shape[1] << 40) << 13
    rows = []
    for row in x.tolist():
        root = max(1, math.isqrt(sum(value * value for value in row) << 14))
        rows.append([value * (gain // root) for value in row])
    scaled = np.array(rows, np.int64).reshape(x.shape)
    return shift_right(scaled, 20).clip(-ACTIVATION_MAX, ACTIVATION_MAX)


class ReferenceTransformer:
    """Frequencies from the integers that `IntegerTransformer.integers` returns."""

    def __init__(self, integers: Mapping[str, Integers], *, num_heads: int, window: int) -> None:
        self.integers, self.num_heads, self.window = integers, num_heads, window
        self.blocks = len({name.split(".")[1] for name in integers if name.startswith("blocks.")})
        self.attention_exp, self.head_exp = exp_table(12), exp_table(20)

    def frequencies(self, tokens: Integers, groups: NDArray[np.int16], k: int) -> Integers:
        """(n, V) of group k's tokens (r, c) given the groups before it, in row-major order."""
        rows, cols = np.nonzero(groups <= k)
        asked = groups[rows, cols] == k
        integers = self.integers
        content = np.where(
            asked[:, None],
            integers["mask"],
            integers["tokens"][np.where(asked, 0, tokens[rows, cols])],
        )
        place = integers["rows"][rows * POSITION_BINS // groups.shape[0]]
        place = place + integers["cols"][cols * POSITION_BINS // groups.shape[1]]
        x = (content + place).clip(-RESIDUAL_MAX, RESIDUAL_MAX)
        for i in range(self.blocks):
            offset = self.window // 2 if i % 2 else 0
            attended = self._attend(f"blocks.{i}", normalise(x), rows + offset, cols + offset)
            x = x + project(f"blocks.{i}.out", integers, attended)
            x = x.clip(-RESIDUAL_MAX, RESIDUAL_MAX)
            hidden = project(f"blocks.{i}.mlp_in", integers, normalise(x)).clip(0, HIDDEN_MAX)
            x = x + project(f"blocks.{i}.mlp_out", integers, hidden)
            x = x.clip(-RESIDUAL_MAX, RESIDUAL_MAX)
        logits = project("head", integers, normalise(x[asked]))
        return self._to_frequencies(logits.clip(-LOGIT_MAX, LOGIT_MAX))

    def _attend(self, block: str, x: Integers, rows: Integers, cols: Integers) -> Integers:
        """(M, d) to the same; rows and columns count from where the first window begins."""
        side = self.window
        qkv = project(f"{block}.qkv", self.integers, x).clip(-ACTIVATION_MAX, ACTIVATION_MAX)
        q, k, v = qkv.reshape(len(x), 3, self.num_heads, -1).transpose(1, 2, 0, 3)
        together = (rows[:, None] // side == rows // side) & (cols[:, None] // side == cols // side)
        down = rows[:, None] % side - rows % side + side - 1
        across = cols[:, None] % side - cols % side + side - 1
        bias = self.integers[f"{block}.position_bias"][:, down * (2 * side - 1) + across]
        scores = shift_right(q @ k.transpose(0, 2, 1), 8) + bias  # (H, M, M)
        best = np.where(together, scores, -(1 << 40)).max(2, keepdims=True)
        below = (best - scores).clip(0, len(self.attention_exp) - 1)
        weights = np.where(together, self.attention_exp[below], 0)
        total = weights.sum(2, keepdims=True)
        power = np.array([int(t).bit_length() - 1 for t in total.ravel()]).reshape(total.shape)
        factor = (np.int64(1) << (12 + power)) // total
        weights = shift_right(weights * factor, np.broadcast_to(power, weights.shape))
        mixed = shift_right(weights @ v, 12).clip(-ACTIVATION_MAX, ACTIVATION_MAX)
        attended: Integers = mixed.transpose(1, 0, 2).reshape(len(x), -1)
        return attended

    def _to_frequencies(self, logits: Integers) -> Integers:
        below = (logits.max(1, keepdims=True) - logits).clip(0, len(self.head_exp) - 1)
        weights = self.head_exp[below]
        codes = logits.shape[1]
        frequencies: Integers = weights * (TOTAL - codes) // weights.sum(1, keepdims=True) + 1
        for row in frequencies:
            row[int(row.argmax())] += TOTAL - int(row.sum())
        return frequencies
