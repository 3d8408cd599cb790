"""Token grids to symbols of the range coder and back, under the masked image model.

Groups are coded in schedule order. The probabilities are the integers of `IntegerTransformer`:
whoever decodes computes the same ones, on whatever machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bitstream import BitstreamError
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.range_coder import TOTAL, Frequencies, RangeDecoder, RangeEncoder
from percov2.entropy.schedules import Groups, make_schedule, num_groups

Tokens = NDArray[np.int64]
"""(r, c) array of tokens in [0, V), -1 where unknown."""


class TokenCoder:
    """Entropy coder of token grids.

    Args:
        model: the masked image model; None codes every token as equally likely, in the order of
            the same groups: log2(V) bits a token, decodable with the codebook alone.
        schedule: name of the schedule.
        codebook_size: V.

    Raises:
        ValueError: schedule ``uniform``, which has no order to predict in, with a model.
    """

    def __init__(
        self, model: IntegerTransformer | None, *, schedule: str, codebook_size: int
    ) -> None:
        if schedule == "uniform" and model is not None:
            raise ValueError(
                "schedule 'uniform' with a masked model: it codes without one, choose another "
                "schedule to use the model"
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
        """Tokens (r, c) of the first ``steps`` groups as a payload of their own; see `write`."""
        encoder = RangeEncoder()
        self.write(encoder, tokens, steps=steps)
        return encoder.finish()

    def write(self, encoder: RangeEncoder, tokens: Tokens, *, steps: int) -> None:
        """Append the tokens (r, c) of the first ``steps`` groups.

        Raises:
            ValueError: tokens out of range, or steps not in 1 .. S.
        """
        groups = self.groups(*tokens.shape)
        if not 1 <= steps <= num_groups(groups):
            raise ValueError(
                f"steps is {steps}: this image's schedule has {num_groups(groups)} groups, "
                f"choose 1 to {num_groups(groups)}"
            )
        sent = tokens[groups < steps]
        if sent.min() < 0 or sent.max() >= self.codebook_size:
            raise ValueError(
                f"tokens lie in [{sent.min()}, {sent.max()}]: the codebook has "
                f"{self.codebook_size} codes"
            )
        for k in range(steps):
            if self.model is None:
                encoder.encode_uniform(tokens[groups == k].astype(np.int32), self.codebook_size)
                continue
            for part, frequencies in self._predicted(tokens, groups, k):
                encoder.encode(part, frequencies)

    def read(self, decoder: RangeDecoder, rows: int, cols: int, *, steps: int) -> Tokens:
        """The inverse of `write`: (rows, cols), -1 in groups that were not sent.

        Raises:
            BitstreamError: steps not in 1 .. S, or a payload that no encoder wrote.
        """
        groups = self.groups(rows, cols)
        if not 1 <= steps <= num_groups(groups):
            raise BitstreamError(
                f"stream has {steps} schedule steps, this size has {num_groups(groups)}: "
                "it is corrupt or of another model"
            )
        tokens = np.full((rows, cols), -1, np.int64)
        for k in range(steps):
            tokens[groups == k] = self._read_group(decoder, tokens, groups, k)
        return tokens

    def read_cut(
        self, decoders: tuple[RangeDecoder, RangeDecoder], rows: int, cols: int, *, steps: int
    ) -> Tokens:
        """The groups of a cut payload that are certainly whole: (rows, cols), -1 elsewhere.

        Args:
            decoders: of the same bytes, filled up with two different bytes behind the cut. A
                group that both read alike is determined by the bytes that are there.
            rows: token rows.
            cols: token columns.
            steps: groups that were sent.
        """
        groups = self.groups(rows, cols)
        tokens = np.full((rows, cols), -1, np.int64)
        for k in range(min(steps, num_groups(groups))):
            try:
                one, other = (self._read_group(d, tokens, groups, k) for d in decoders)
            except BitstreamError:  # what lies behind the cut need not be decodable
                break
            if not np.array_equal(one, other):
                break
            tokens[groups == k] = one
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
            if self.model is None:
                filled[here] = generator.integers(self.codebook_size, size=int(here.sum()))
                continue
            drawn = [
                (frequencies.cumsum(1) <= generator.integers(TOTAL, size=(len(frequencies), 1)))
                for frequencies in self._predict(filled, groups, k)
            ]
            filled[here] = np.concatenate([below.sum(1) for below in drawn])
        return filled

    def bits_per_group(self, tokens: Tokens) -> list[float]:
        """Ideal code length of each group in bits; the file's bytes are what counts."""
        groups = self.groups(*tokens.shape)
        bits = []
        for k in range(num_groups(groups)):
            if self.model is None:
                bits.append(float((groups == k).sum() * np.log2(self.codebook_size)))
                continue
            shares = [
                frequencies[np.arange(len(part)), part] / TOTAL
                for part, frequencies in self._predicted(tokens, groups, k)
            ]
            bits.append(-float(np.log2(np.concatenate(shares)).sum()))
        return bits

    def _predict(self, tokens: Tokens, groups: Groups, k: int) -> Iterator[Frequencies]:
        """Frequencies (n, V) of group k's tokens from the groups before it, in chunks.

        Entries of ``tokens`` of group k and later are not looked at.
        """
        assert self.model is not None
        visible = np.where(groups < k, tokens, 0)
        return self.model.predict(torch.from_numpy(visible)[None], groups, k)

    def _predicted(
        self, tokens: Tokens, groups: Groups, k: int
    ) -> Iterator[tuple[NDArray[np.int32], Frequencies]]:
        """Group k's tokens (n,) beside their frequencies (n, V), in chunks."""
        symbols = tokens[groups == k].astype(np.int32)
        for frequencies in self._predict(tokens, groups, k):
            part, symbols = np.split(symbols, [len(frequencies)])
            yield part, frequencies

    def _read_group(
        self, decoder: RangeDecoder, tokens: Tokens, groups: Groups, k: int
    ) -> NDArray[np.int32]:
        if self.model is None:
            return decoder.decode_uniform(int((groups == k).sum()), self.codebook_size)
        return np.concatenate([decoder.decode(f) for f in self._predict(tokens, groups, k)])
