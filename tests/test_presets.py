"""The models that ship in the package, on photographs that scikit-image ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import percov2
from percov2.cli import main
from percov2.demo import contact_sheet
from percov2.model_store import PRESETS_DIRECTORY, ModelSummary, preset_names

PRESETS = ("tiny", "tiny-low")
MAX_PRESET_BYTES = 25e6


def test_the_presets_are_there_with_their_cards() -> None:
    assert preset_names() == sorted(PRESETS)
    for name in PRESETS:
        folder = PRESETS_DIRECTORY / name
        assert ModelSummary.read(folder).name == name
        card = (folder / "README.md").read_text()
        assert "generated" in card
        assert "Kodak" in card
        assert sum(p.stat().st_size for p in folder.rglob("*")) < MAX_PRESET_BYTES


def test_presets_hold_weights_as_safetensors_only() -> None:
    suffixes = {p.suffix for p in PRESETS_DIRECTORY.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md"}


def _psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


@pytest.mark.parametrize(("model", "most_bpp"), [("tiny", 0.035), ("tiny-low", 0.0125)])
def test_a_preset_shows_the_picture_at_its_rate(
    model: str, most_bpp: float, tmp_path: Path
) -> None:
    codec = percov2.load(model)
    scores = []
    for name in ("chelsea", "coffee"):
        original = Image.fromarray(getattr(skimage.data, name)())
        data = codec.compress(original, caption="a photograph")
        assert percov2.info(data)["model"] == model
        assert percov2.info(data)["bpp"] < most_bpp
        restored = codec.decompress(data)
        grey = Image.new("RGB", original.size, tuple(np.asarray(original).mean((0, 1)).astype(int)))
        # The mean colour alone is the floor: the picture must be above it, by 3.5 and 6.8 dB when
        # this was written (the cat's fur is hard at this rate).
        scores.append(_psnr(restored, original) - _psnr(grey, original))
    assert min(scores) > 3, scores


def test_command_line_finds_the_preset_of_a_stream(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    Image.fromarray(skimage.data.chelsea()).resize((150, 100)).save(picture)
    stream, out = tmp_path / "cat.pcv2", tmp_path / "out.png"
    assert main(["compress", str(picture), str(stream), "--model", "tiny"]) == 0
    assert main(["decompress", str(stream), str(out), "--steps", "1"]) == 0
    with Image.open(out) as image:
        assert image.size == (150, 100)
        assert image.text["percov2:model"] == "tiny"


def test_contact_sheet_holds_every_picture_unscaled() -> None:
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    sheet = contact_sheet([[(red, "a"), (blue, "b")], [(blue, "c")]])
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 600
    assert (pixels == (0, 0, 255)).all(-1).sum() == 1200


@pytest.mark.slow
def test_the_largest_picture_goes_through() -> None:
    original = Image.fromarray(skimage.data.astronaut()).resize((4096, 4096))
    codec = percov2.load("tiny")
    data = codec.compress(original, caption="")
    assert percov2.info(data)["bpp"] < 0.035
    assert (codec.decode_tokens(data) == codec.encode_tokens(original)).all()
    restored = codec.decompress(data, steps=1)
    assert restored.size == original.size
    assert _psnr(restored, original) > 20
