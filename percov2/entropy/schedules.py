"""Fixed orders in which token groups are coded: which token belongs to which group.

Group k is predicted in parallel from groups 1 .. k-1. A schedule is a function of the grid's size
alone and uses integers only, so that encoder and decoder agree everywhere.
Sources: checkerboard (He et al. 2021), quincunx (El-Nouby et al. 2023, PQ-MIM), qlds (Mentzer et
al. 2023, M2T), var (Tian et al. 2024, VAR; here without its residual quantiser).
Shape legend: r and c token rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RASTER = "raster"
"""A pass a token, for comparison only: no header counts so many groups, no model may have it."""

Groups = NDArray[np.int16]
"""(r, c) array: the group of each token, 0 .. S-1, none empty."""

_MAX_STRIDE = 8
"""Coarsest quincunx stride: half a window, so that every window holds tokens of group 1."""
_QLDS_SHARES = (
    74322629760,
    341497130175,
    833273994645,
    1569108766675,
    2563628419926,
    3828721867644,
    5374483772615,
    7209730636362,
    9342316766762,
    11779342995171,
    14527302345478,
)
"""Tokens known after step k of 12, as a share of all: round(2^44 (k / 12)^2.2), k = 1 .. 11.

Literal, because a power in floating point may differ in its last bit between machines.
"""


def _compact(groups: NDArray[np.integer[Any]]) -> Groups:
    """Renumber so that no group is empty: small grids lack some levels."""
    inverse = np.unique(groups, return_inverse=True)[1]
    compact: Groups = inverse.reshape(groups.shape).astype(np.int16)
    return compact


def _uniform(rows: int, cols: int) -> Groups:
    return np.zeros((rows, cols), np.int16)


def _checkerboard(rows: int, cols: int) -> Groups:
    y, x = np.indices((rows, cols))
    return _compact((y + x) % 2)


def _quincunx(rows: int, cols: int) -> Groups:
    """Square and quincunx lattices in turn, each doubling the number of known tokens."""
    y, x = np.indices((rows, cols))
    stride = min(_MAX_STRIDE, 1 << max(0, max(rows, cols).bit_length() - 2))
    levels = 2 * (stride.bit_length() - 1)
    groups = np.full((rows, cols), levels)
    for level in range(levels - 1, -1, -1):
        step = stride >> (level // 2)
        square = (y % step == 0) & (x % step == 0)
        half = step // 2
        centres = (y % step == half) & (x % step == half)
        groups[square | centres if level % 2 else square] = level
    return _compact(groups)


def _qlds(rows: int, cols: int) -> Groups:
    """The R2 sequence in 32-bit fixed point, cells in order of their first visit."""
    count = rows * cols
    # 2^32 / g and 2^32 / g^2 with g the real root of g^3 = g + 1 (Roberts 2018).
    alpha_y, alpha_x = np.uint64(3242174889), np.uint64(2447445413)
    chunk, seen, first = max(4096, 4 * count), np.zeros(count, bool), np.uint64(0)
    order: list[NDArray[np.int64]] = []
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    while not seen.all():
        n = np.arange(1, chunk + 1, dtype=np.uint64) + first
        y = ((n * alpha_y & mask) * np.uint64(rows)) >> shift
        x = ((n * alpha_x & mask) * np.uint64(cols)) >> shift
        cells = (y * np.uint64(cols) + x).astype(np.int64)
        unique, where = np.unique(cells, return_index=True)
        fresh = ~seen[unique]
        order.append(unique[fresh][np.argsort(where[fresh])])
        seen[unique] = True
        first += np.uint64(chunk)
    rank = np.empty(count, np.int64)
    rank[np.concatenate(order)] = np.arange(count)
    ends = [max(k, count * share >> 44) for k, share in enumerate(_QLDS_SHARES, start=1)]
    return _compact(np.searchsorted(np.array(ends), rank, side="right").reshape(rows, cols))


def _var(rows: int, cols: int) -> Groups:
    """Tokens nearest to the nodes of ever finer grids, each not yet visited."""
    finest = max(rows, cols)
    groups = np.full((rows, cols), -1)
    nodes, level = 1, 0
    while (groups < 0).any():
        n = np.arange(min(nodes, finest))
        y = np.unique((2 * n + 1) * rows // (2 * len(n)))
        x = np.unique((2 * n + 1) * cols // (2 * len(n)))
        visited = groups[np.ix_(y, x)]
        groups[np.ix_(y, x)] = np.where(visited < 0, level, visited)
        level += 1
        nodes = max(nodes + 1, nodes * 5 // 4)
    return _compact(groups)


def _raster(rows: int, cols: int) -> Groups:
    """Token by token, row by row."""
    if rows * cols > np.iinfo(np.int16).max:
        raise ValueError(f"token grid is {rows}x{cols}: too large for a group a token")
    return np.arange(rows * cols, dtype=np.int16).reshape(rows, cols)


_SCHEDULES: dict[str, Callable[[int, int], Groups]] = {
    "checkerboard": _checkerboard,
    "quincunx": _quincunx,
    "qlds": _qlds,
    "var": _var,
    "uniform": _uniform,
    RASTER: _raster,
}
SCHEDULES = tuple(name for name in _SCHEDULES if name != RASTER)
"""Names that a model may have. ``uniform`` is one group coded without a model."""


@lru_cache(maxsize=64)
def make_schedule(name: str, rows: int, cols: int) -> Groups:
    """The group of every token of a grid.

    Args:
        name: one of `SCHEDULES`, or `RASTER`.
        rows: token rows, at least 1.
        cols: token columns, at least 1.

    Returns:
        Read-only int16 array (rows, cols) with values 0 .. S-1, none empty.

    Raises:
        ValueError: unknown name, a grid without tokens, or one too large for `RASTER`.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    if rows < 1 or cols < 1:
        raise ValueError(f"token grid is {rows}x{cols}: it needs at least one token")
    groups = _SCHEDULES[name](rows, cols)
    groups.flags.writeable = False
    return groups


def num_groups(groups: Groups) -> int:
    """S, the number of groups (steps) of a schedule."""
    return int(groups.max()) + 1
