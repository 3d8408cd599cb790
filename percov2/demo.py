"""``python -m percov2.demo``: the main job on four photographs that scikit-image ships.

Writes the streams, the reconstructions and a contact sheet with originals, reconstructions,
bytes and bits per pixel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import skimage.data
from PIL import Image

import percov2
from percov2.contact_sheet import contact_sheet
from percov2.files import atomic_path
from percov2.images import write_png
from percov2.inspection import GENERATED_NOTE, png_metadata
from percov2.model_store import preset_names

PHOTOGRAPHS = {
    "astronaut": "a woman in an orange space suit smiling in front of a flag",
    "chelsea": "a close up of a tabby cat",
    "coffee": "a cup of coffee and a spoon on a wooden table",
    "rocket": "a rocket standing on a launch pad at dusk",
}
"""Names in `skimage.data`, with the captions that are stored."""


def run(output: Path) -> Path:
    """Compress and decompress the photographs with every preset; returns the sheet's path."""
    output.mkdir(parents=True, exist_ok=True)
    codecs = {name: percov2.load(name) for name in preset_names()}
    rows = []
    for name, caption in PHOTOGRAPHS.items():
        original = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        row = [(original, f"{name}: original, {original.width}x{original.height}")]
        for model, codec in codecs.items():
            started = time.perf_counter()
            data = codec.compress(original, caption=caption)
            encoded = time.perf_counter()
            with atomic_path(output / f"{name}.{model}.pcv2") as temporary:
                temporary.write_bytes(data)
            restored = codec.decompress(data)
            seconds = f"{encoded - started:.1f} s + {time.perf_counter() - encoded:.1f} s"
            description = percov2.info(data)
            write_png(output / f"{name}.{model}.png", restored, png_metadata(description))
            bpp = description["bpp"]
            print(f"{name}: {model}, {len(data)} bytes, {bpp:.4f} bpp, {seconds}")
            row.append((restored, f"{model}: {len(data)} bytes, {bpp:.4f} bpp"))
        rows.append(row)
    sheet = output / "contact-sheet.png"
    write_png(sheet, contact_sheet(rows), {"Comment": GENERATED_NOTE})
    print(f"contact sheet: {sheet}")
    return sheet


def main() -> int:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    run(parser.parse_args().output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
