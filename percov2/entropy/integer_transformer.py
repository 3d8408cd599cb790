"""The masked transformer in exact integer arithmetic: the same probabilities on every machine.

Every number is an integer carried in a float. Sums and products of integers are exact, whatever
their order, as long as they stay below 2^24 in float32 (2^53 in float64), and the conversion from
the float model checks that they do. Everything else is a multiplication by a power of two, a
rounding (half to even), a clamp or a table lookup, exact too. docs/bitstream.md specifies it, and
tests/entropy/reference_transformer.py computes it again in NumPy without floats.

Number formats ("2^-6" means that the integer 64 stands for 1.0):

| what                                        | unit  | range            |
|---------------------------------------------|-------|------------------|
| residual stream, embeddings                 | 2^-9  | +-2^15           |
| normalised activations, queries, keys, values | 2^-6  | +-511            |
| hidden activations of the MLP               | 2^-5  | 0 .. 511         |
| attention scores, logits                    | 2^-7  |                  |
| attention weights                           | 2^-12 | 0 .. 2^12        |
| weights of a projection                     | 2^-s, s chosen per output row | see `_Projection` |

Shape legend: as in `masked_transformer`; M visible tokens, W windows.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.entropy.masked_transformer import (
    ACTIVATION_RANGE,
    ATTENTION_SCALE,
    HIDDEN_RANGE,
    RESIDUAL_RANGE,
    MaskedTransformer,
    WindowAttention,
    position_bin,
)
from percov2.entropy.range_coder import TOTAL, Frequencies
from percov2.entropy.schedules import Groups
from percov2.entropy.window_partition import WindowPartition

RESIDUAL_BITS = 9
ACTIVATION_BITS = 6
HIDDEN_BITS = 5
SCORE_BITS = 7
WEIGHT_BITS = 12
_RESIDUAL_MAX = int(RESIDUAL_RANGE * 2**RESIDUAL_BITS)
_ACTIVATION_MAX = int(ACTIVATION_RANGE * 2**ACTIVATION_BITS) - 1
_HIDDEN_MAX = int(HIDDEN_RANGE * 2**HIDDEN_BITS) - 1
_SCORE_MAX = 2**14
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}
_FPMATH_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""Environment variables, the new one and the old, by which oneDNN rounds float32 on some CPUs."""
_LARGEST_SHIFT = 15
_ATTENTION_ELEMENTS = 2**24
"""Scores that are held at a time: large grids are attended to a few windows at a time."""
_HEAD_ELEMENTS = 2**21
"""Probabilities that are made at a time."""


@lru_cache(maxsize=2)
def _exp_table(scale_bits: int) -> tuple[int, ...]:
    """round(2^scale_bits exp(-i / 2^SCORE_BITS)) up to the first 0, in decimal arithmetic.

    Python's `decimal` rounds correctly by definition; the platform's exp need not.
    """
    table: list[int] = []
    with localcontext() as context:
        context.prec = 40
        while not table or table[-1]:
            power = (Decimal(-len(table)) / 2**SCORE_BITS).exp()
            table.append(int((power * 2**scale_bits).to_integral_value()))
    return tuple(table)


def _isqrt(value: Tensor) -> Tensor:
    """floor(sqrt(value)) of int64 in [0, 2^60], whatever the rounding of the platform's sqrt."""
    root = value.double().sqrt().long()
    root = root - (root * root > value).long()
    above: Tensor = (root + 1) * (root + 1) <= value
    return root + above.long()


def _float32_may_be_rounded() -> bool:
    """Whether a setting of this process lets float32 products on a CPU be computed with fewer bits.

    ``torch.set_float32_matmul_precision("medium")``, which Lightning recommends, is one of them.
    """
    # Its module is replaced by an object that type checkers do not see.
    backend: Any = torch.backends.mkldnn
    if backend.matmul.fp32_precision not in ("none", "ieee"):
        return True
    return any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in _FPMATH_MODES)


def _to_integers(values: Tensor, bits: int, largest: int) -> Tensor:
    """Floats to integers of unit 2^-bits, float64; exact but for the rounding."""
    integers: Tensor = (values.detach().cpu().double() * 2**bits).round()
    return integers.clamp(-largest, largest)


@dataclass(frozen=True, slots=True)
class _Projection:
    """A linear layer: integers in, ``round((W x + b) 2^-shift)`` out.

    Attributes:
        weight: (out, in) integers.
        bias: (out,) integers.
        scale: (out,) 2^-shift.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        name: str,
        *,
        bits_in: int,
        largest_in: int,
        bits_out: int,
        dtype: torch.dtype,
    ) -> _Projection:
        """Give every output row the finest unit whose worst-case sum is still exact.

        Raises:
            ValueError: weights too large for any unit.
        """
        weight, bias = (w.detach().cpu().double() for w in (linear.weight, linear.bias))
        chosen_weight, chosen_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        shift = torch.full_like(bias, -1)
        for weight_bits in range(_LARGEST_SHIFT, bits_out - bits_in - 1, -1):
            integers = (weight * 2**weight_bits).round()
            offset = (bias * 2 ** (bits_in + weight_bits)).round()
            # Bounded for float32 whatever the carrier: all carriers must have the same integers.
            worst = largest_in * integers.abs().sum(1) + offset.abs()
            fits = (shift < 0) & (worst < _EXACT[torch.float32])
            chosen_weight[fits], chosen_bias[fits] = integers[fits], offset[fits]
            shift[fits] = bits_in + weight_bits - bits_out
        if (shift < 0).any():
            row = int((shift < 0).nonzero()[0])
            raise ValueError(
                f"weights of {name}, row {row}, are too large for exact arithmetic (sum of "
                f"magnitudes {float(weight[row].abs().sum()):.3g}): train with weight decay"
            )
        scale = 1 / (torch.ones_like(shift, dtype=torch.int64) << shift.long()).to(dtype)
        return cls(chosen_weight.to(dtype), chosen_bias.to(dtype), scale)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias).mul_(self.scale).round_()

    def to(self, device: torch.device, dtype: torch.dtype) -> _Projection:
        return _Projection(*(t.to(device, dtype) for t in (self.weight, self.bias, self.scale)))

    def named(self, prefix: str) -> dict[str, Tensor]:
        # 2^-shift is a half times 2 to the power of 1 - shift.
        shift = 1 - torch.frexp(self.scale).exponent
        return {
            f"{prefix}.weight": self.weight,
            f"{prefix}.bias": self.bias,
            f"{prefix}.shift": shift,
        }


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Projection
    out: _Projection
    mlp_in: _Projection
    mlp_out: _Projection
    position_bias: Tensor
    offset: int

    @classmethod
    def of(cls, block: nn.Module, name: str, dtype: torch.dtype) -> _Layer:
        attention = block.attention
        assert isinstance(attention, WindowAttention)

        def projection(
            part: str, linear: object, largest: int, bits: tuple[int, int]
        ) -> _Projection:
            assert isinstance(linear, nn.Linear)
            return _Projection.of(
                linear,
                f"{name}.{part}",
                bits_in=bits[0],
                largest_in=largest,
                bits_out=bits[1],
                dtype=dtype,
            )

        a, r, h = ACTIVATION_BITS, RESIDUAL_BITS, HIDDEN_BITS
        return cls(
            qkv=projection("attention.qkv", attention.qkv, _ACTIVATION_MAX, (a, a)),
            out=projection("attention.out", attention.out, _ACTIVATION_MAX, (a, r)),
            mlp_in=projection("mlp_in", block.mlp_in, _ACTIVATION_MAX, (a, h)),
            mlp_out=projection("mlp_out", block.mlp_out, _HIDDEN_MAX, (h, r)),
            position_bias=_to_integers(attention.position_bias, SCORE_BITS, _SCORE_MAX).to(dtype),
            offset=attention.offset,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> _Layer:
        return _Layer(
            qkv=self.qkv.to(device, dtype),
            out=self.out.to(device, dtype),
            mlp_in=self.mlp_in.to(device, dtype),
            mlp_out=self.mlp_out.to(device, dtype),
            position_bias=self.position_bias.to(device, dtype),
            offset=self.offset,
        )

    def named(self, prefix: str) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for part in ("qkv", "out", "mlp_in", "mlp_out"):
            parts |= getattr(self, part).named(f"{prefix}.{part}")
        return {**parts, f"{prefix}.position_bias": self.position_bias}


class IntegerTransformer:
    """`MaskedTransformer` as integers; gives frequencies for the range coder.

    No setting of the process around it changes them: autocast is left aside, and where float32
    products on the CPU may be rounded, float64 carries the integers.

    Args:
        model: float model. Its weights are rounded to integers once, in a way that gives the
            same integers everywhere.
        device: where to compute; the CPU in place of ``mps``, which has no float64.
        dtype: carrier of the integers, float32 or float64; None is float32 on the CPU and
            float64 elsewhere, where no setting of TF32 or reduced precision applies.

    Raises:
        ValueError: weights too large for exact arithmetic.
    """

    def __init__(
        self,
        model: MaskedTransformer,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        config = model.config
        self.codebook_size: int = config.codebook_size
        self.num_heads: int = config.num_heads
        self.window: int = config.window
        self.dim: int = config.dim
        self.device = torch.device(device)
        if self.device.type == "mps":
            self.device = torch.device("cpu")  # it has no float64
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.float64
        head_dim = self.dim // self.num_heads
        if head_dim * _ACTIVATION_MAX**2 >= _EXACT[torch.float32]:
            raise ValueError(f"{head_dim} channels a head are too many for exact arithmetic: 64")

        def embedding(weight: Tensor) -> Tensor:
            return _to_integers(weight, RESIDUAL_BITS, _RESIDUAL_MAX).to(self.device, dtype)

        self._tokens = embedding(model.token_embedding.weight)
        self._mask = embedding(model.mask_embedding)
        self._rows = embedding(model.row_embedding.weight)
        self._cols = embedding(model.col_embedding.weight)
        self._layers = [
            _Layer.of(block, f"blocks.{i}", dtype).to(self.device, dtype)
            for i, block in enumerate(model.blocks)
        ]
        self._head = _Projection.of(
            model.head,
            "head",
            bits_in=ACTIVATION_BITS,
            largest_in=_ACTIVATION_MAX,
            bits_out=SCORE_BITS,
            dtype=dtype,
        ).to(self.device, dtype)
        self._attention_exp = torch.tensor(_exp_table(WEIGHT_BITS), dtype=dtype, device=self.device)
        self._head_exp = torch.tensor(_exp_table(20), dtype=torch.float64, device=self.device)
        self._double: IntegerTransformer | None = None

    def integers(self) -> dict[str, NDArray[np.int64]]:
        """All that the frequencies depend on beside the numbers of heads and the window's side.

        Returns:
            ``tokens`` (V, d), ``mask`` (d,), ``rows`` and ``cols`` (bins, d); of block i and its
            ``qkv``, ``out``, ``mlp_in`` and ``mlp_out``, and of ``head``: ``weight`` (out, in),
            ``bias`` (out,) and ``shift`` (out,), as in ``blocks.0.qkv.weight``; of block i also
            ``position_bias`` (H, (2 window - 1)^2).
        """
        named = {"tokens": self._tokens, "mask": self._mask, "rows": self._rows, "cols": self._cols}
        for i, layer in enumerate(self._layers):
            named |= layer.named(f"blocks.{i}")
        named |= self._head.named("head")
        return {name: values.cpu().numpy().astype(np.int64) for name, values in named.items()}

    def digest(self) -> bytes:
        """SHA-256 of all integers: two models with the same digest code alike."""
        digest = hashlib.sha256(f"{self.num_heads} {self.window}".encode())
        for name, values in self.integers().items():
            digest.update(f"{name} {values.shape}".encode())
            digest.update(values.astype("<i8").tobytes())
        return digest.digest()

    @torch.no_grad()
    def predict(self, tokens: Tensor, groups: Groups, k: int) -> Iterator[Frequencies]:
        """Frequencies of group k's tokens given the groups before it, a chunk at a time.

        Args:
            tokens: (B, r, c) int64; entries of group k and later are not looked at.
            groups: (r, c) schedule.
            k: the group to predict.

        Yields:
            (n, V) for the next n tokens of the group, in row-major order, sample by sample.
        """
        exact = self._exact_carrier()
        tokens = tokens.to(self.device)
        # Not around the yield: whoever asks would then be without autocast, too.
        with torch.autocast(self.device.type, enabled=False):
            hidden = exact._hidden(tokens, torch.from_numpy(groups <= k), groups == k)
        chunk = max(1, _HEAD_ELEMENTS // self.codebook_size)
        hidden = hidden.flatten(0, 1)
        for first in range(0, len(hidden), chunk):
            with torch.autocast(self.device.type, enabled=False):
                frequencies = exact._frequencies(hidden[first : first + chunk])
            yield frequencies

    def _exact_carrier(self) -> IntegerTransformer:
        """Itself, or the same integers in float64 while float32 might not be exact."""
        exposed = self.device.type == "cpu" and self._mask.dtype == torch.float32
        if not (exposed and _float32_may_be_rounded()):
            return self
        if self._double is None:
            self._double = self._carried_by(torch.float64)
        return self._double

    def _carried_by(self, dtype: torch.dtype) -> IntegerTransformer:
        other = copy.copy(self)
        for name in ("_tokens", "_mask", "_rows", "_cols", "_attention_exp"):
            setattr(other, name, getattr(self, name).to(dtype))
        other._layers = [layer.to(self.device, dtype) for layer in self._layers]
        other._head = self._head.to(self.device, dtype)
        return other

    def _hidden(
        self,
        tokens: Tensor,
        visible: Tensor,
        target: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    ) -> Tensor:
        """Normalised activations (B, n_k, d) of the tokens to predict."""
        rows, cols = visible.to(self.device).nonzero().unbind(1)
        asked = torch.from_numpy(target).to(self.device)[rows, cols]
        content = self._tokens[torch.where(asked, 0, tokens[:, rows, cols])]
        content[:, asked] = self._mask
        place = self._rows[position_bin(rows, visible.shape[0])]
        place = place + self._cols[position_bin(cols, visible.shape[1])]
        x = (content + place).clamp_(-_RESIDUAL_MAX, _RESIDUAL_MAX)
        partitions = {
            offset: WindowPartition.of(rows, cols, side=self.window, offset=offset)
            for offset in {layer.offset for layer in self._layers}
        }
        for layer in self._layers:
            update = layer.out(self._attend(layer, _normalise(x), partitions[layer.offset]))
            x = x.add_(update).clamp_(-_RESIDUAL_MAX, _RESIDUAL_MAX)
            hidden = layer.mlp_in(_normalise(x)).clamp_(0, _HIDDEN_MAX)
            x = x.add_(layer.mlp_out(hidden)).clamp_(-_RESIDUAL_MAX, _RESIDUAL_MAX)
        return _normalise(x[:, asked])

    def _attend(self, layer: _Layer, x: Tensor, partition: WindowPartition) -> Tensor:
        """Attention in windows, (B, M, d) to the same shape."""
        batch, _, dim = x.shape
        qkv = layer.qkv(x).clamp_(-_ACTIVATION_MAX, _ACTIVATION_MAX)
        qkv = F.pad(qkv, (0, 0, 0, 1))  # what empty slots point to
        count, length = partition.slots.shape
        chunk = max(1, _ATTENTION_ELEMENTS // (batch * self.num_heads * length**2))
        done = [
            self._attend_windows(layer, qkv, partition.part(slice(first, first + chunk)))
            for first in range(0, count, chunk)
        ]
        attended = torch.cat(done, 1).view(batch, count * length, dim)
        return attended.index_select(1, partition.where)

    def _attend_windows(self, layer: _Layer, qkv: Tensor, partition: WindowPartition) -> Tensor:
        """Attention in some windows: (B, M + 1, 3 d) to (B, W, n, d)."""
        gathered = qkv.index_select(1, partition.slots.flatten())
        gathered = gathered.view(len(qkv), *partition.slots.shape, 3, self.num_heads, -1)
        q, k, v = gathered.permute(3, 0, 1, 4, 2, 5)  # each (B, W, H, n, d / H)
        offset = partition.offsets()
        bias = layer.position_bias.index_select(1, offset.flatten())
        bias = bias.view(-1, *offset.shape).transpose(0, 1)  # (W, H, n, n)
        unit = ATTENTION_SCALE * 2.0 ** (SCORE_BITS - 2 * ACTIVATION_BITS)
        scores = (q @ k.transpose(-1, -2)).mul_(unit).round_().add_(bias)
        scores.masked_fill_(partition.empty[:, None, None, :], -(2**20))
        below = (scores.amax(-1, keepdim=True) - scores).clamp_(max=len(self._attention_exp) - 1)
        weights = _normalised_weights(_look_up(self._attention_exp, below))
        mixed: Tensor = (weights @ v).mul_(2.0**-WEIGHT_BITS).round_()
        mixed.clamp_(-_ACTIVATION_MAX, _ACTIVATION_MAX)
        return mixed.transpose(2, 3).flatten(3)

    def _frequencies(self, hidden: Tensor) -> Frequencies:
        """Activations (n, d) to frequencies (n, V): 1 each, the rest of `TOTAL` as exp(logit)."""
        logits = self._head(hidden).clamp_(-_SCORE_MAX, _SCORE_MAX)
        below = logits.amax(-1, keepdim=True) - logits
        weight = _look_up(self._head_exp, below.clamp_(max=len(self._head_exp) - 1))
        # Quotients of integers below 2^53: rounding cannot lift one over the next integer.
        share = weight * (TOTAL - self.codebook_size) / weight.sum(-1, keepdim=True)
        frequencies = share.floor_().long().cpu().numpy() + 1
        rows = np.arange(len(frequencies))
        frequencies[rows, frequencies.argmax(1)] += TOTAL - frequencies.sum(1)
        result: Frequencies = frequencies
        return result


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table (n,), in the shape of ``index``; indexing with brackets is slower."""
    return table.index_select(0, index.int().flatten()).view(index.shape)


def _normalise(x: Tensor) -> Tensor:
    """Root mean square normalisation, (..., d) of unit 2^-9 to unit 2^-6."""
    squares = x.double().square().sum(-1, keepdim=True).long()
    root = _isqrt(squares << 14).clamp_(min=1)  # 2^7 times the root of the sum
    gain = math.isqrt(x.shape[-1] << 40) << 13
    factor = (gain // root).double()
    normed = (x.double() * factor).mul_(2.0**-20).round_()
    return normed.clamp_(-_ACTIVATION_MAX, _ACTIVATION_MAX).to(x.dtype)


def _normalised_weights(weights: Tensor) -> Tensor:
    """Attention weights (..., n) that sum to about 2^12, in place.

    ``weights`` times a factor of 12 bits times a power of two: a product below 2^24.
    """
    total = weights.sum(-1, keepdim=True)
    power = torch.frexp(total).exponent.long() - 1  # 2^power <= total < 2^(power + 1)
    unit = torch.ones_like(power) << power
    factor = (unit << WEIGHT_BITS) // total.long()
    # Shifts, as 2^power by a library's exponential may be off by the last bit.
    return weights.mul_((factor.double() / unit.double()).to(weights.dtype)).round_()
