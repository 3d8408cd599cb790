from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from percov2.entropy.window_partition import WindowPartition


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    side=st.integers(1, 7),
    shifted=st.booleans(),
    share=st.floats(0, 1),
)
def test_every_visible_token_sits_at_its_place_of_its_window(
    rows: int, cols: int, side: int, shifted: bool, share: float
) -> None:
    visible = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) <= share
    visible[rows // 2, cols // 2] = True
    y, x = visible.nonzero().unbind(1)
    offset = side // 2 if shifted else 0
    found = WindowPartition.of(y, x, side=side, offset=offset)
    tokens = len(y)
    assert torch.equal(found.slots.flatten()[found.where], torch.arange(tokens))
    assert int((~found.empty).sum()) == tokens, "each once"
    counts = (~found.empty).sum(1)
    assert counts.min() > 0, "no window without a token"
    assert counts.max() == found.slots.shape[1], "no wider than the fullest"
    windows: dict[tuple[int, int], int] = {}
    for window, slots in enumerate(found.slots.tolist()):
        for place, token in enumerate(slots):
            if token == tokens:
                assert (found.y[window, place], found.x[window, place]) == (0, 0)
                continue
            down, at_y = divmod(int(y[token]) + offset, side)
            across, at_x = divmod(int(x[token]) + offset, side)
            assert windows.setdefault((down, across), window) == window
            assert (found.y[window, place], found.x[window, place]) == (at_y, at_x)
    assert len(windows) == len(found.slots)


def test_offsets_tell_how_places_lie_to_each_other() -> None:
    y, x = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 1])
    offsets = WindowPartition.of(y, x, side=3, offset=0).offsets()
    # 5 x 5 of them, and no move at all in the middle.
    assert offsets.tolist() == [[[12, 10, 1], [14, 12, 3], [23, 21, 12]]]


@pytest.mark.parametrize("first", [0, 1])
def test_a_part_is_of_some_windows(first: int) -> None:
    y, x = torch.ones(8, 8).nonzero().unbind(1)
    whole = WindowPartition.of(y, x, side=4, offset=2)
    part = whole.part(slice(first, first + 2))
    assert torch.equal(part.slots, whole.slots[first : first + 2])
    assert torch.equal(part.empty, whole.empty[first : first + 2])
    assert torch.equal(part.offsets(), whole.offsets()[first : first + 2])
