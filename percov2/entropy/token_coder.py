"""Token grids to bytes and back under the masked image model.

Groups are coded in schedule order with a range coder (constriction). Encoder and decoder go
through one function, `TokenCoder._predict`, with the same shapes, so that on one machine they
see the same probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import constriction
import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bitstream import BitstreamError
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import Groups, make_schedule, num_groups

Tokens = NDArray[np.int64]
"""(r, c) array of tokens in [0, V)."""

_WORD_BYTES = 4
_MIN_PROBABILITY = 2.0**-16
"""Floor of every symbol: the coder's fixed point has 24 bits, and no symbol may vanish."""


def _words_to_bytes(words: NDArray[np.uint32]) -> bytes:
    """Big-endian: the least significant bytes, which may be cut, come last."""
    return words.astype(">u4").tobytes()


def _bytes_to_words(data: bytes) -> NDArray[np.uint32]:
    padded = data + bytes(-len(data) % _WORD_BYTES)
    return np.frombuffer(padded, ">u4").astype(np.uint32)


@dataclass(frozen=True, slots=True)
class _Coded:
    """Symbols of one group with their probabilities (n, V), or None for equal ones."""

    symbols: NDArray[np.int32]
    probabilities: NDArray[np.float32] | None


class TokenCoder:
    """Entropy coder of token grids.

    Args:
        model: the masked image model, in evaluation mode; None only with schedule ``uniform``.
        schedule: name of the schedule.
        codebook_size: V.

    Raises:
        ValueError: a schedule that needs a model without one.
    """

    def __init__(
        self, model: MaskedTransformer | None, *, schedule: str, codebook_size: int
    ) -> None:
        if (model is None) != (schedule == "uniform"):
            raise ValueError(
                f"schedule {schedule!r} with model {type(model).__name__}: 'uniform' codes "
                "without a masked model, every other schedule needs one"
            )
        self.model = model
        self.schedule = schedule
        self.codebook_size = codebook_size

    def groups(self, rows: int, cols: int) -> Groups:
        """The schedule of a grid of this size."""
        return make_schedule(self.schedule, rows, cols)

    def steps_total(self, rows: int, cols: int) -> int:
        """S, the number of groups of a grid of this size."""
        return num_groups(self.groups(rows, cols))

    def encode(self, tokens: Tokens, *, steps: int) -> bytes:
        """Tokens (r, c) of the first ``steps`` groups to bytes.

        Raises:
            ValueError: tokens out of range, or steps not in 1 .. S.
        """
        if tokens.min() < 0 or tokens.max() >= self.codebook_size:
            raise ValueError(
                f"tokens lie in [{tokens.min()}, {tokens.max()}]: the codebook has "
                f"{self.codebook_size} codes"
            )
        groups = self.groups(*tokens.shape)
        if not 1 <= steps <= num_groups(groups):
            raise ValueError(
                f"steps is {steps}: this image's schedule has {num_groups(groups)} groups, "
                f"choose 1 to {num_groups(groups)}"
            )
        coded = [
            _Coded(tokens[groups == k].astype(np.int32), self._predict(tokens, groups, k))
            for k in range(steps)
        ]
        encoder = constriction.stream.queue.RangeEncoder()
        for part in coded:
            if part.probabilities is None:
                encoder.encode(part.symbols, self._uniform())
            else:
                encoder.encode(part.symbols, _family(), part.probabilities)
        return self._shortest(_words_to_bytes(encoder.get_compressed()), coded)

    def decode(self, data: bytes, rows: int, cols: int, *, steps: int) -> Tokens:
        """The inverse of `encode`; groups that were not sent are -1.

        Raises:
            BitstreamError: steps not in 1 .. S, or bytes that no encoder wrote.
        """
        groups = self.groups(rows, cols)
        if not 1 <= steps <= num_groups(groups):
            raise BitstreamError(
                f"stream has {steps} schedule steps, this size has {num_groups(groups)}: "
                "it is corrupt or of another model"
            )
        tokens = np.full((rows, cols), -1, np.int64)
        decoder = constriction.stream.queue.RangeDecoder(_bytes_to_words(data))
        for k in range(steps):
            probabilities = self._predict(tokens, groups, k)
            tokens[groups == k] = self._decode_group(
                decoder, int((groups == k).sum()), probabilities
            )
        return tokens

    def fill(self, tokens: Tokens, *, seed: int) -> Tokens:
        """Sample the groups that were not sent (-1) from the model, group by group.

        Args:
            tokens: (r, c), -1 where unknown.
            seed: of the sampling.
        """
        groups = self.groups(*tokens.shape)
        generator = np.random.default_rng(seed)
        filled = tokens.copy()
        for k in range(num_groups(groups)):
            here = groups == k
            if (filled[here] >= 0).all():
                continue
            probabilities = self._predict(filled, groups, k)
            assert probabilities is not None, "a uniform stream has one group, which is sent"
            cumulative = probabilities.astype(np.float64).cumsum(1)
            draw = generator.random((len(cumulative), 1)) * cumulative[:, -1:]
            filled[here] = (cumulative < draw).sum(1)
        return filled

    def bits_per_group(self, tokens: Tokens) -> list[float]:
        """Ideal code length of each group in bits; the file's bytes are what counts."""
        groups = self.groups(*tokens.shape)
        bits = []
        for k in range(num_groups(groups)):
            probabilities = self._predict(tokens, groups, k)
            symbols = tokens[groups == k]
            if probabilities is None:
                bits.append(float(len(symbols) * np.log2(self.codebook_size)))
            else:
                chosen = probabilities[np.arange(len(symbols)), symbols].astype(np.float64)
                bits.append(float(-np.log2(chosen).sum()))
        return bits

    @torch.no_grad()
    def _predict(self, tokens: Tokens, groups: Groups, k: int) -> NDArray[np.float32] | None:
        """Probabilities (n_k, V) of group k's tokens from groups before it; None if equal.

        Entries of ``tokens`` of group k and later are not looked at.
        """
        if self.model is None:
            return None
        if self.model.training:
            raise ValueError("the masked transformer is in training mode: call its eval() first")
        device = self.model.mask_embedding.device
        known = torch.from_numpy(groups < k).to(device)[None]
        where = torch.from_numpy(groups == k).to(device)[None]
        visible = torch.from_numpy(np.where(groups < k, tokens, 0)).to(device)[None]
        logits = self.model(visible, known, where)
        probabilities = torch.softmax(logits.double(), -1).clamp_min(_MIN_PROBABILITY)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        result: NDArray[np.float32] = probabilities.float().cpu().numpy()
        return result

    def _uniform(self) -> constriction.stream.model.Uniform:
        return constriction.stream.model.Uniform(self.codebook_size)

    def _decode_group(
        self,
        decoder: constriction.stream.queue.RangeDecoder,
        count: int,
        probabilities: NDArray[np.float32] | None,
    ) -> NDArray[np.int32]:
        try:
            if probabilities is None:
                return np.asarray(decoder.decode(self._uniform(), count), np.int32)
            return np.asarray(decoder.decode(_family(), probabilities), np.int32)
        except AssertionError as error:  # what constriction raises on impossible data
            raise BitstreamError(
                "tokens cannot be decoded: the stream is corrupt or of another model"
            ) from error

    def _shortest(self, data: bytes, coded: list[_Coded]) -> bytes:
        """The fewest bytes that decode to the same symbols.

        A range coder may end with any number of the last symbol's interval; the decoder reads
        zeros behind the end. The numbers that fit are contiguous and hold the encoder's own, so
        a length that does not fit is too short, as is every smaller one.
        """
        shortest = data
        for length in range(len(data) - 1, -1, -1):
            fitting = [end for end in _neighbours(data[:length]) if self._decodes_to(end, coded)]
            if not fitting:
                break
            shortest = fitting[0]
        return shortest

    def _decodes_to(self, data: bytes, coded: list[_Coded]) -> bool:
        decoder = constriction.stream.queue.RangeDecoder(_bytes_to_words(data))
        try:
            return all(
                np.array_equal(
                    self._decode_group(decoder, len(part.symbols), part.probabilities),
                    part.symbols,
                )
                for part in coded
            )
        except BitstreamError:  # outside the interval there may be no symbol at all
            return False


def _neighbours(prefix: bytes) -> list[bytes]:
    """A prefix and the next larger number of its length: around the number it was cut from."""
    following = int.from_bytes(prefix, "big") + 1
    if following >> 8 * len(prefix):
        return [prefix]
    return [prefix, following.to_bytes(len(prefix), "big")]


def _family() -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(perfect=False)
