"""A small recurrent word model in integers: embedding, GRU (Cho et al., 2014), tied softmax.

Weights have 8 or 16 bits and every sum stays far below 64 bits, so that the result does not depend
on the order of summation; the sigmoid and the exponential are tables of the model file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.caption_ngrams import ONE

GATE_BITS = 12
"""Binary places of the gates' sums."""
TABLE_BITS = 10
"""Binary places of the argument of the sigmoid's table, which spans [-8, 8)."""
STATE_BITS = 14
"""Binary places of the state and of the sigmoid."""
FEATURE_BITS = 16
"""Binary places of the features, each clipped to [-1, 1]."""
LOGIT_BITS = 8
"""Binary places of the logits and of the argument of the exponential's table."""

Integers = NDArray[np.int64]

_HALF_TABLE = 8 << TABLE_BITS


class RecurrentModel:
    """Predicts the next word from a state that has read the words before it.

    Args:
        tables: ``embedding`` (V, d) int8; ``input`` (3H, d), ``recurrent`` (3H, H) and
            ``projection`` (d, H) int16, with their binary places in ``places`` (3,);
            ``input_bias`` and ``recurrent_bias`` (3H,), ``projection_bias`` (d,), ``output_bias``
            (V,); ``sigmoid`` and ``exponential``, the tables. Gates are in the order reset,
            update, new.
    """

    def __init__(self, tables: Mapping[str, NDArray[Any]]) -> None:
        def wide(name: str) -> Integers:
            return tables[name].astype(np.int64)

        self._embedding = wide("embedding")
        # 8-bit weights times 17-bit features: 32-bit sums are exact, and faster.
        self._output = tables["embedding"].astype(np.int32)
        self._input, self._input_bias = wide("input"), wide("input_bias")
        self._recurrent, self._recurrent_bias = wide("recurrent"), wide("recurrent_bias")
        self._projection, self._projection_bias = wide("projection"), wide("projection_bias")
        self._output_bias = wide("output_bias")
        self._sigmoid, self._exponential = wide("sigmoid"), wide("exponential")
        places = [int(place) for place in tables["places"]]
        self._input_shift = places[0] - GATE_BITS
        self._recurrent_shift = places[1] + STATE_BITS - GATE_BITS
        self._projection_shift = places[2] + STATE_BITS - FEATURE_BITS

    def start(self) -> Integers:
        """The state (H,) that has read nothing."""
        return np.zeros(self._recurrent.shape[1], np.int64)

    def step(self, state: Integers, token: int) -> Integers:
        """The state after reading `token`."""
        hidden = len(state)
        fresh = (self._input @ self._embedding[token] >> self._input_shift) + self._input_bias
        old = (self._recurrent @ state >> self._recurrent_shift) + self._recurrent_bias
        gates = self._squash(fresh[: 2 * hidden] + old[: 2 * hidden])
        reset, update = gates[:hidden], gates[hidden:]
        inner = fresh[2 * hidden :] + (reset * old[2 * hidden :] >> STATE_BITS)
        new = 2 * self._squash(2 * inner) - (1 << STATE_BITS)  # tanh
        following: Integers = new + (update * (state - new) >> STATE_BITS)
        return following

    def distribution(self, state: Integers) -> Integers:
        """Weights (V,) of the next token; they sum to `ONE`, short of rounding."""
        features = (self._projection @ state >> self._projection_shift) + self._projection_bias
        limit = 1 << FEATURE_BITS
        clipped = np.clip(features, -limit, limit).astype(np.int32)
        logits = (self._output @ clipped).astype(np.int64) >> FEATURE_BITS - LOGIT_BITS
        logits += self._output_bias
        below = np.minimum(logits.max() - logits, len(self._exponential) - 1)
        weights = self._exponential[below]
        share: Integers = weights * ONE // weights.sum()
        return share

    def _squash(self, sums: Integers) -> Integers:
        """The sigmoid of values with `GATE_BITS` binary places."""
        index = (sums >> GATE_BITS - TABLE_BITS) + _HALF_TABLE
        return self._sigmoid[np.clip(index, 0, 2 * _HALF_TABLE - 1)]
