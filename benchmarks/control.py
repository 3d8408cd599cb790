"""Whether the Fréchet distance falls for grain: the control of `percov2.evaluation.control`.

``python benchmarks/control.py RUN --codecs SLUG...`` blurs the pictures of each codec of an
evaluation and gives them grain until their gradient energy is the original's. As sharp as the
originals by that measure, they must be farther from them than what they were made from, and than a
codec that claims to look real. RUN is the output of ``percov2 evaluate``; the slugs are those of
its ``images.csv``.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from percov2.evaluation.control import blurred_with_grain
from percov2.evaluation.features import Rows
from percov2.evaluation.metrics import MetricOptions, make_suite
from percov2.evaluation.report_data import read_results

METRIC = "efficientnet_frechet"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--codecs", nargs="+", required=True, metavar="SLUG")
    options = parser.parse_args()
    results = read_results(options.run)
    codecs = [results.codec(slug) for slug in options.codecs]
    suite = make_suite([METRIC], MetricOptions(), captions=False)
    if suite.absent:
        raise ValueError(f"{METRIC} is absent: {suite.absent[METRIC]}")
    extract = suite.extractors[suite.features_of(METRIC)]

    @torch.inference_mode()
    def features(picture: Image.Image) -> list[Rows]:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)
        rows = extract(pixels[None])
        return [] if rows is None else [rows]  # a picture smaller than a patch has none

    @cache
    def original_features(name: str) -> list[Rows]:
        return features(Image.open(results.kept_original(name)))

    print("| codec | EfficientNet-Lite1 Fréchet | blurred, with grain |\n|---|---|---|")
    for codec in codecs:
        originals: list[Rows] = []
        honest: list[Rows] = []
        control: list[Rows] = []
        for name in codec.names:
            original = Image.open(results.kept_original(name))
            restored = Image.open(codec.picture(name))
            originals += original_features(name)
            honest += features(restored)
            control += features(blurred_with_grain(original, restored))
        found, cheat = (suite.sets[METRIC](originals, other) for other in (honest, control))
        print(f"| {codec.slug} | {found:.0f} | {cheat:.0f} |")


if __name__ == "__main__":
    main()
