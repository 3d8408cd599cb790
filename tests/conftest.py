"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_codec import save_tiny


@pytest.fixture(autouse=True)
def _restore_torch_state() -> Iterator[None]:
    """No test may leave its seed, threads or default dtype to the next one."""
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a complete tiny random model (quincunx, source = prediction + noise)."""
    directory = tmp_path_factory.mktemp("tiny-model")
    save_tiny(directory, from_prediction=True)
    return directory


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A real photograph that scikit-image ships, 96x64 pixels."""
    import skimage.data

    return Image.fromarray(skimage.data.astronaut()).crop((100, 0, 484, 256)).resize((96, 64))


@pytest.fixture
def noise_image() -> Image.Image:
    """A small picture of noise, 40x24 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    return Image.fromarray(pixels)
