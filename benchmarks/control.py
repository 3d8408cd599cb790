"""Whether the Fréchet distance falls for grain: the control of `percov2.evaluation.control`.

``python benchmarks/control.py RUN --codecs SLUG...`` blurs the pictures of each codec of an
evaluation and gives them grain until their gradient energy is the original's. As sharp as the
originals by that measure, they must be farther from them than what they were made from, and than a
codec that claims to look real. RUN is the output of ``percov2 evaluate``; the slugs are those of
its ``images.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from percov2.evaluation.control import blurred_with_grain
from percov2.evaluation.features import (
    EfficientNetLite1,
    Patches,
    Rows,
    frechet_distance,
    stride_grids,
)
from percov2.evaluation.report_data import Results, read_results


def pairs_of(results: Results, slug: str) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Original and reconstruction, picture by picture.

    Raises:
        ValueError: no such codec, or an original that was not kept.
    """
    codecs = {codec.slug: codec for codec in results.codecs}
    if slug not in codecs:
        raise ValueError(f"there is no {slug}: choose of {', '.join(codecs)}")
    for name in codecs[slug].names:
        original = results.original(name)
        if original is None:
            raise ValueError(f"the original {name} was not kept: evaluate it again")
        yield Image.open(original), Image.open(codecs[slug].picture(name))


@torch.inference_mode()
def rows_of(extract: Patches, picture: Image.Image) -> list[Rows]:
    """Features of the patches of a picture; none of one that is smaller than a patch."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).movedim(-1, 0)
    rows = extract(pixels[None])
    return [] if rows is None else [rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--codecs", nargs="+", required=True, metavar="SLUG")
    options = parser.parse_args()
    results = read_results(options.run)
    # As efficientnet_frechet of `percov2 evaluate`.
    grids = stride_grids(128, 64)
    extract = Patches(EfficientNetLite1(), "EfficientNet-Lite1, 1280", patch=128, grids=grids)
    print("| codec | EfficientNet-Lite1 Fréchet | blurred, with grain |\n|---|---|---|")
    for slug in options.codecs:
        originals: list[Rows] = []
        honest: list[Rows] = []
        control: list[Rows] = []
        for original, restored in pairs_of(results, slug):
            originals += rows_of(extract, original)
            honest += rows_of(extract, restored)
            control += rows_of(extract, blurred_with_grain(original, restored))
        found, cheat = (frechet_distance(originals, other) for other in (honest, control))
        print(f"| {slug} | {found:.0f} | {cheat:.0f} |")


if __name__ == "__main__":
    main()
