from __future__ import annotations

import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.bitstream import MAX_STEPS
from percov2.entropy.schedules import RASTER, SCHEDULES, Groups, make_schedule, num_groups

# The schedules are part of the file format: a change here makes old files unreadable.
GOLDEN = {
    ("checkerboard", 3, 4): """
        0 1 0 1
        1 0 1 0
        0 1 0 1""",
    ("quincunx", 4, 4): """
        0 2 0 2
        2 1 2 1
        0 2 0 2
        2 1 2 1""",
    ("quincunx", 8, 8): """
        0 4 2 4 0 4 2 4
        4 3 4 3 4 3 4 3
        2 4 1 4 2 4 1 4
        4 3 4 3 4 3 4 3
        0 4 2 4 0 4 2 4
        4 3 4 3 4 3 4 3
        2 4 1 4 2 4 1 4
        4 3 4 3 4 3 4 3""",
    ("qlds", 4, 4): """
        11  3  7 10
        11 10  2  6
         1  5  9 11
         8 10  0  4""",
    ("qlds", 5, 7): """
         8  3  9  6  9  7 10
         9  7 10  8  2  9  5
         1  8  5 11  6 11  7
         6 11 11  0 11  4 11
        11 10  7 10  8 10  9""",
    ("var", 4, 4): """
        2 3 2 2
        3 1 3 1
        2 3 0 2
        2 1 2 1""",
    ("var", 5, 7): """
        3 2 3 2 3 2 3
        3 1 3 4 3 1 3
        4 2 4 0 4 2 4
        3 1 3 4 3 1 3
        3 2 3 2 3 2 3""",
    ("uniform", 2, 3): """
        0 0 0
        0 0 0""",
}
# CRC-32 of the groups as little-endian int16, row by row.
GOLDEN_CRC = {
    "checkerboard": 0x44B44099,
    "quincunx": 0x235DAB40,
    "qlds": 0x57F9B057,
    "var": 0xF63B97FC,
}

sides = st.integers(1, 40)
names = st.sampled_from(SCHEDULES)


def known_after(groups: Groups) -> list[int]:
    """Tokens known after each step."""
    return [int(n) for n in np.bincount(groups.ravel()).cumsum()]


@pytest.mark.parametrize(("name", "rows", "cols"), GOLDEN)
def test_small_grids_are_as_published(name: str, rows: int, cols: int) -> None:
    expected = [line.split() for line in GOLDEN[name, rows, cols].split("\n") if line.strip()]
    np.testing.assert_array_equal(make_schedule(name, rows, cols), np.array(expected, int))


@pytest.mark.parametrize("name", GOLDEN_CRC)
def test_a_larger_grid_is_as_published(name: str) -> None:
    assert zlib.crc32(make_schedule(name, 37, 53).astype("<i2").tobytes()) == GOLDEN_CRC[name]


@settings(deadline=None)
@given(names, sides, sides)
def test_every_token_is_in_one_group_and_no_group_is_empty(name: str, rows: int, cols: int) -> None:
    groups = make_schedule(name, rows, cols)
    assert groups.shape == (rows, cols)
    assert groups.dtype == np.int16
    np.testing.assert_array_equal(np.unique(groups), np.arange(num_groups(groups)))
    assert num_groups(groups) <= MAX_STEPS


@settings(deadline=None, max_examples=30)
@given(names, sides, sides)
def test_schedules_are_repeatable_and_read_only(name: str, rows: int, cols: int) -> None:
    groups = make_schedule(name, rows, cols)
    before = groups.copy()
    with pytest.raises(ValueError, match="read-only"):
        groups[0, 0] = 1
    make_schedule.cache_clear()
    np.testing.assert_array_equal(make_schedule(name, rows, cols), before)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_fit_the_header_at_any_size(name: str) -> None:
    rng = np.random.default_rng(0)
    lines = [size for n in range(1, 257, 5) for size in ((n, 1), (1, n))]
    any_shape = [tuple(size) for size in rng.integers(1, 257, (20, 2)).tolist()]
    largest = [(256, 256), (256, 255), (512, 512)]
    for rows, cols in (*lines, *any_shape, *largest):
        assert num_groups(make_schedule(name, rows, cols)) <= MAX_STEPS, (rows, cols)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_largest_grid_takes_less_than_a_second(name: str) -> None:
    make_schedule.cache_clear()
    start = time.process_time()
    make_schedule(name, 256, 256)
    assert time.process_time() - start < 1


@settings(deadline=None)
@given(sides, sides)
def test_checkerboard_alternates(rows: int, cols: int) -> None:
    groups = make_schedule("checkerboard", rows, cols)
    assert groups[0, 0] == 0
    assert (np.diff(groups, axis=0) != 0).all()
    assert (np.diff(groups, axis=1) != 0).all()


@settings(deadline=None)
@given(sides, sides)
def test_uniform_is_one_group(rows: int, cols: int) -> None:
    assert num_groups(make_schedule("uniform", rows, cols)) == 1


@pytest.mark.parametrize(
    ("side", "known"),
    [
        (4, [4, 8, 16]),
        (8, [4, 8, 16, 32, 64]),
        (16, [4, 8, 16, 32, 64, 128, 256]),
        (32, [16, 32, 64, 128, 256, 512, 1024]),
    ],
)
def test_quincunx_doubles_the_known_tokens(side: int, known: list[int]) -> None:
    assert known_after(make_schedule("quincunx", side, side)) == known


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (16, 24), (61, 47)])
def test_qlds_sizes_follow_the_power_law(rows: int, cols: int) -> None:
    known = known_after(make_schedule("qlds", rows, cols))
    count = rows * cols
    law = [max(k, int(count * (k / 12) ** 2.2)) for k in range(1, 13)]
    assert known == law


def discrepancy(first: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> float:
    """Star discrepancy on the grid: the worst difference of share and area of a corner's box."""
    rows, cols = first.shape
    share = first.cumsum(0).cumsum(1) / first.sum()
    area = np.outer(np.arange(1, rows + 1) / rows, np.arange(1, cols + 1) / cols)
    return float(np.abs(share - area).max())


@pytest.mark.parametrize("step", [3, 5, 8])
def test_qlds_spreads_its_tokens(step: int) -> None:
    groups = make_schedule("qlds", 32, 48)
    first = groups < step
    raster = np.arange(first.size).reshape(first.shape) < first.sum()
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(first.ravel()).reshape(first.shape) for _ in range(20)]
    assert discrepancy(first) < 0.3 * discrepancy(raster)
    assert discrepancy(first) < min(discrepancy(random) for random in shuffled)


@settings(deadline=None)
@given(sides, sides)
def test_var_begins_in_the_centre(rows: int, cols: int) -> None:
    first = np.argwhere(make_schedule("var", rows, cols) == 0)
    assert first.tolist() == [[rows // 2, cols // 2]]


@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (32, 48), (64, 64)])
def test_var_grows_from_grid_to_grid(rows: int, cols: int) -> None:
    sizes = np.bincount(make_schedule("var", rows, cols).ravel())
    assert sizes[:3].tolist() == [1, 4, 8]
    # Later grids meet more and more tokens that are known already.
    early = sizes[: int(np.searchsorted(sizes.cumsum(), rows * cols // 4)) + 1]
    assert len(early) >= 9
    assert (np.diff(early) > 0).all()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'spiral': choose one of checkerboard"):
        make_schedule("spiral", 4, 4)


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_grids_are_refused(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=f"token grid is {rows}x{cols}"):
        make_schedule("qlds", rows, cols)


def test_raster_order_is_for_comparison_only() -> None:
    np.testing.assert_array_equal(make_schedule(RASTER, 2, 3), [[0, 1, 2], [3, 4, 5]])
    assert RASTER not in SCHEDULES
    with pytest.raises(ValueError, match="token grid is 256x256: too large"):
        make_schedule(RASTER, 256, 256)
