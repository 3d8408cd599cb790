"""Sets what an evaluation wrote side by side: the README's picture.

``python benchmarks/side_by_side.py RUN --codecs SLUG... --images NAME... --output out.jpg`` takes a
row per picture: the original, then what every codec made of it, with the bytes of its file. RUN is
the output of ``percov2 evaluate``; the slugs and names are those of its ``images.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from PIL import Image

from percov2.contact_sheet import contact_sheet

Cell = tuple[Image.Image, str]


def cells_of(run: Path, codecs: list[str], name: str) -> list[Cell]:
    """The original and the codecs' pictures, each with its text.

    Raises:
        ValueError: the run has no such picture, or not of every codec.
    """
    labels = {
        codec["slug"]: codec["label"]
        for codec in json.loads((run / "results.json").read_text(encoding="utf-8"))["codecs"]
    }
    with (run / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["slug"]: row for row in csv.DictReader(file) if row["image"] == name}
    if missing := [slug for slug in codecs if slug not in rows]:
        raise ValueError(f"{run} has no {name} of {', '.join(missing)}; it has {', '.join(rows)}")
    original = Image.open(run / "pictures" / "original" / f"{name}.png")
    cells = [(original, f"{name}: original, {original.width}x{original.height}")]
    for slug in codecs:
        picture = Image.open(run / "pictures" / slug / f"{name}.png")
        text = f"{labels[slug]}\n{rows[slug]['bytes']} bytes, {float(rows[slug]['bpp']):.4f} bpp"
        cells.append((picture, text))
    return cells


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--codecs", nargs="+", required=True, metavar="SLUG")
    parser.add_argument("--images", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quality", type=int, default=88, help="of a JPEG")
    options = parser.parse_args()
    rows = [cells_of(options.run, options.codecs, name) for name in options.images]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(options.output, quality=options.quality)


if __name__ == "__main__":
    main()
