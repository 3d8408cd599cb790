"""A data folder in the layout that the shipped configurations expect, made of real photographs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import skimage.data
import torch
import torchvision
import webdataset as wds
from PIL import Image

from tests.tiny_models import CAPTIONS


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`laion-mini/0000{0,3,8}.tar` with 6 photographs each and `captions/train.txt`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "laion-mini").mkdir()
    (folder / "captions").mkdir()
    (folder / "captions" / "train.txt").write_text("\n".join(CAPTIONS) + "\n")
    names = ("astronaut", "chelsea", "coffee", "rocket", "astronaut", "coffee")
    for shard in (0, 3, 8):
        with wds.TarWriter(str(folder / "laion-mini" / f"{shard:05d}.tar")) as writer:
            for number, name in enumerate(names):
                image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
                image = image.resize((96 + 8 * number, 80))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=95)
                key = f"{shard:05d}{number:04d}"
                writer.write(
                    {"__key__": key, "jpg": buffer.getvalue(), "txt": CAPTIONS[number % 3]}
                )
    return folder


@pytest.fixture
def random_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """SqueezeNet's weights are random instead of fetched; all the rest is the real thing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: state
    )
