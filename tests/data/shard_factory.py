"""Makes small shards in img2dataset's layout, whole and damaged."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture of coarse noise, so that crops differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """Picture, caption and JSON of number ``number``; a change to None leaves a file out."""
    key = f"{number:09}"
    fields = {
        "jpg": jpeg(number),
        "txt": f" picture {number}\n".encode(),
        "json": json.dumps({"key": key, "width": 24, "height": 20}).encode(),
        **changes,
    }
    return {"__key__": key, **{name: data for name, data in fields.items() if data is not None}}


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """An archive of samples whose files are bytes."""
    with wds.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for one in samples:
            writer.write(dict(one))
    return path


def write_shards(folder: Path, *sizes: int) -> Path:
    """Shards `00000.tar` ... of so many samples each, numbered through."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:05}.tar", map(sample, range(number, number + size)))
        number += size
    return folder
