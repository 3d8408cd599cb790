"""The folder of a small evaluation that nobody has run, for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 96, 64
COLUMNS = (
    *("slug", "image", "width", "height", "bytes", "bpp"),
    *("header_bytes", "caption_bytes", "token_bytes"),
    *("psnr", "ms_ssim", "gradient_energy", "lpips_alex", "lpips_vgg", "dists", "clip_score"),
    *("miou", "encode_seconds", "decode_seconds", "at_smallest"),
)
_QUALITY = ("psnr", "ms_ssim", "gradient_energy", "lpips_alex", "dists")
NOT_FOUND = "Inception weights not found: put them into the hub's cache"


def write_fake_output(
    directory: Path,
    *,
    images: Sequence[str] = ("kodim01", "kodim02", "kodim03"),
    metrics: Sequence[str] = ("psnr", "lpips_alex"),
    fid: bool = False,
    ours: bool = True,
    pictures: bool = True,
) -> Path:
    """Three codecs: ours in two models and six settings, JPEG at five rates, AVIF at four.

    FID is absent for AVIF, the CLIP score for all; JPEG fails on the last image at its smallest
    file. Without `ours`, only a codec that the other call does not write. Metrics are few because
    their plots take seconds each.
    """
    directory.mkdir(parents=True)
    originals = {name: _photograph(index) for index, name in enumerate(images)}
    for name, picture in originals.items():
        if pictures:
            _save(directory / "pictures" / "original" / f"{name}.png", picture)
    codecs = _codecs() if ours else [_codec("WebP", "webp", {"quality": 1}, 0.2, gain=1.0)]
    rows: list[dict[str, Any]] = []
    for codec in codecs:
        gain, failing = codec.pop("gain"), codec.pop("failing")
        own = [
            _row(codec, name, index, gain)
            for index, name in enumerate(images)
            if not (failing and index == len(images) - 1)
        ]
        if failing:
            codec["failures"] = [{"image": images[-1], "error": "encoder failed"}]
        for row in own if pictures else []:
            blur = max(0.2, 26 - row["psnr"])
            picture = originals[row["image"]].filter(ImageFilter.GaussianBlur(blur / 2))
            _save(directory / "pictures" / codec["slug"] / f"{row['image']}.png", picture)
        dropped = set(_QUALITY) - set(metrics)
        own = [{key: row[key] for key in row if key not in dropped} for row in own]
        if not fid:
            codec["set_metrics"] = {}
        codec["images"] = len(own)
        codec["summary"] = _summary(own)
        rows += own
    results = {
        "schema": 2,
        "protocol": {
            "name": "kodak",
            "crop": "full",
            "data": "kodak",
            "images": len(images),
            "checksum": "0f1e2d3c",
        },
        "created": "2026-01-31T12:00:00+00:00",
        "command": ["percov2", "evaluate", "--data", "kodak", "--output", "output"],
        "commit": "0123456789abcdef",
        "environment": {"python": "3.11.2", "torch": "2.14.1", "threads": 2, "gpu": None},
        "codecs": codecs,
        "absent_codecs": {"HEIC": "pillow-heif is not installed"},
    }
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with (directory / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return directory


def _codecs() -> list[dict[str, Any]]:
    codecs = [
        _codec("percov2 tiny", "percov2", {"steps": steps, "guidance": guidance}, 0.03, gain=gain)
        for guidance, more in ((1.0, 0.0), (3.0, 0.8))
        for steps, gain in ((1, 3.0 - more), (4, 2.4 - more), (20, 1.2 - more))
    ]
    low = {"steps": 4, "guidance": 1.0}
    codecs.append(_codec("percov2 tiny-low", "percov2", low, 0.012, gain=2.4))
    for quality, rate in ((1, 0.11), (3, 0.16), (5, 0.23), (10, 0.36), (20, 0.6)):
        codecs.append(_codec("JPEG", "jpeg", {"quality": quality}, rate, gain=0.0))
    codecs[7] |= {"at_smallest": True, "failing": True}
    for quality, rate in ((1, 0.05), (10, 0.1), (25, 0.22), (40, 0.5)):
        avif = _codec("AVIF", "avif", {"quality": quality}, rate, gain=1.5)
        codecs.append(avif | {"set_metrics": {}, "absent": avif["absent"] | {"fid": NOT_FOUND}})
    return codecs


def _codec(
    name: str, family: str, setting: dict[str, Any], rate: float, *, gain: float
) -> dict[str, Any]:
    words = ", ".join(f"{key} {value:g}" for key, value in setting.items())
    return {
        "codec": name,
        "family": family,
        "setting": setting,
        "label": f"{name}, {words}",
        "slug": "-".join([name.replace(" ", "-").lower(), *(f"{v:g}" for v in setting.values())]),
        "at_smallest": False,
        "rate": rate,
        "failures": [],
        "set_metrics": {"fid": 90 - 25 * math.log10(rate / 0.01) - (3 - gain) * 8},
        "absent": {"clip_score": "offline"},
        "gain": gain,
        "failing": False,
    }


def _row(codec: dict[str, Any], image: str, index: int, gain: float) -> dict[str, Any]:
    """Figures that follow the rate as a codec's do; `gain` shifts PSNR, and LPIPS against it."""
    size = round(codec["rate"] * WIDTH * HEIGHT / 8 * (1 + 0.1 * index))
    bpp = 8 * size / (WIDTH * HEIGHT)
    level = math.log2(bpp)
    ours = codec["family"] == "percov2"
    lpips = 0.42 - 0.06 * level + 0.05 * gain - (0.45 if ours else 0) + 0.02 * index
    lpips += 0.02 * codec["setting"].get("guidance", 1.0)
    row = {
        "slug": codec["slug"],
        "image": image,
        "width": WIDTH,
        "height": HEIGHT,
        "bytes": size,
        "bpp": bpp,
        "psnr": 29 + 1.9 * level + gain + 0.7 * index,
        "ms_ssim": 1 - 0.09 * 2 ** (-0.45 * level) + 0.01 * gain,
        "gradient_energy": 0.8,
        "lpips_alex": lpips,
        "dists": 0.6 * lpips,
        "at_smallest": codec["at_smallest"],
        "encode_seconds": 0.01,
        "decode_seconds": 0.2 * codec["setting"].get("steps", 0.01),
    }
    if ours:
        row |= {"header_bytes": 9, "caption_bytes": 3, "token_bytes": size - 12}
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    names = [name for name in rows[0] if name in COLUMNS[5:-1] and "bytes" not in name]
    values = {name: np.array([row[name] for row in rows]) for name in names}
    return {name: {"mean": float(v.mean()), "std": float(v.std())} for name, v in values.items()}


def _photograph(seed: int) -> Image.Image:
    """Waves and discs in colour."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
    random = np.random.default_rng(seed)
    channels: list[NDArray[np.float64]] = []
    for _ in range(3):
        a, b, c = random.uniform(2, 9, 3)
        disc = (x - a / 9) ** 2 + (y - b / 12) ** 2 < 0.06
        channels.append(0.5 + 0.3 * np.sin(a * x + b * y + c) + 0.25 * disc)
    return Image.fromarray((np.stack(channels, -1).clip(0, 1) * 255).astype(np.uint8))


def _save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
