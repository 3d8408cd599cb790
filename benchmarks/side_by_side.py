"""Sets what an evaluation wrote side by side: the README's picture.

``python benchmarks/side_by_side.py RUN --codecs SLUG... --images NAME... --output out.jpg`` takes a
row per picture: the original, then what every codec made of it, with the bytes of its file. RUN is
the output of ``percov2 evaluate``; the slugs and names are those of its ``images.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from percov2.contact_sheet import contact_sheet
from percov2.evaluation.report_data import Results, read_results

Cell = tuple[Image.Image, str]


def cells_of(results: Results, slugs: list[str], name: str) -> list[Cell]:
    """The original and the codecs' pictures, each with its text.

    Raises:
        ValueError: the run has no such picture, or not of every codec.
    """
    codecs = {codec.slug: codec for codec in results.codecs if name in codec.names}
    if missing := [slug for slug in slugs if slug not in codecs]:
        raise ValueError(f"no {name} of {', '.join(missing)}; there is that of {', '.join(codecs)}")
    original = Image.open(results.kept_original(name))
    cells = [(original, f"{name}: original, {original.width}x{original.height}")]
    for codec in (codecs[slug] for slug in slugs):
        row = codec.names.index(name)
        size, bpp = codec.columns["bytes"][row], codec.columns["bpp"][row]
        text = f"{codec.label}\n{size:.0f} bytes, {bpp:.4f} bpp"
        cells.append((Image.open(codec.picture(name)), text))
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
    results = read_results(options.run)
    rows = [cells_of(results, options.codecs, name) for name in options.images]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(options.output, quality=options.quality)


if __name__ == "__main__":
    main()
