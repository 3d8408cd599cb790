from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.frechet import pairs_of, rows_of
from percov2.evaluation.features import Patches
from percov2.evaluation.report_data import read_results
from tests.evaluation.fake_output import write_fake_output


class _Mean(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_pairs_are_the_originals_and_the_codecs_pictures(tmp_path: Path) -> None:
    results = read_results(write_fake_output(tmp_path / "run"))
    codec = results.codecs[0]
    pairs = pairs_of(results, codec.slug, 2)
    assert [original.stem for original, _ in pairs] == sorted(codec.names)[::2]
    assert all(original.is_file() and restored.is_file() for original, restored in pairs)
    assert all(original.stem == restored.stem for original, restored in pairs)
    with pytest.raises(ValueError, match=codec.slug):
        pairs_of(results, "no-such-codec", 1)


def test_rows_are_of_every_patch(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    extract = Patches(_Mean(), "mean", patch=16, grids=((0, 0),))
    rows = rows_of(extract, tmp_path / "picture.png")
    assert rows.shape == (6, 3)
    np.testing.assert_allclose(rows[0], pixels[:16, :16].mean((0, 1)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"picture\.png is smaller"):
        rows_of(Patches(_Mean(), "mean", patch=64, grids=((0, 0),)), tmp_path / "picture.png")
