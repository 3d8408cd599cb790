"""The contact sheet: pictures are not scaled, and no text is cut or covers another picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.contact_sheet import contact_sheet

RED, BLUE = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))


def _dark(sheet: Image.Image) -> NDArray[np.bool_]:
    return (np.asarray(sheet).max(-1) < 100).astype(bool)


def test_texts_stay_clear_of_pictures_and_edges() -> None:
    long = "a text that is far wider than its picture"
    sheet = contact_sheet([[(RED, long), (BLUE, long)], [(BLUE, "short")]])
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 600
    assert (pixels == (0, 0, 255)).all(-1).sum() == 1200
    dark = _dark(sheet)
    assert not dark[:, -10:].any()
    assert not dark[-10:].any()
    # Both texts are drawn in full, each as wide as the other.
    starts = np.flatnonzero((pixels[12] == (0, 0, 255)).all(-1))[0]
    assert dark[32:60, :starts].sum() == dark[32:60, starts:].sum() > 100


def test_lines_are_drawn_below_each_other() -> None:
    one, two = (contact_sheet([[(RED, text)]]) for text in ("line", "line\nline"))
    assert one.width == two.width
    assert two.height > one.height + 10
    assert _dark(two).sum() == 2 * _dark(one).sum()


def test_columns_are_aligned() -> None:
    wide = Image.new("RGB", (60, 20), "red")
    sheet = np.asarray(contact_sheet([[(RED, "a"), (BLUE, "b")], [(wide, "a"), (BLUE, "b")]]))
    blue = (sheet == (0, 0, 255)).all(-1)
    starts = {int(np.flatnonzero(row)[0]) for row in blue if row.any()}
    assert len(starts) == 1
