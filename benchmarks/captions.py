"""Measures the caption coder: bytes, ideal and written, and time.

``python benchmarks/captions.py --captions FILE --test FILE.json`` prints a line for the held-out
captions of FILE (those that `percov2.training.caption_model` leaves out) and one for every JSON
file, an object whose values are captions. ``--model`` takes another model file than the shipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from percov2.entropy.caption_coder import MODEL_FILE, CaptionCoder
from percov2.entropy.range_coder import RangeDecoder, RangeEncoder
from percov2.training.caption_model import held_out, read_captions


def measure(coder: CaptionCoder, captions: list[str]) -> dict[str, float]:
    """Means per caption, after checking that each one round-trips."""
    sizes, ideals, encoding, decoding = [], [], [], []
    for caption in captions:
        ideals.append(coder.bits(caption) / 8)
        started = time.perf_counter()
        encoder = RangeEncoder()
        coder.encode(caption, encoder)
        data = encoder.finish()
        encoded = time.perf_counter()
        decoded = coder.decode(RangeDecoder(data))
        decoding.append(time.perf_counter() - encoded)
        encoding.append(encoded - started)
        if decoded != caption:
            raise RuntimeError(f"caption does not round-trip: {caption!r} became {decoded!r}")
        sizes.append(len(data))
    return {
        "ideal_bytes": statistics.mean(ideals),
        "written_bytes": statistics.mean(sizes),
        "encode_ms": 1e3 * statistics.median(encoding),
        "decode_ms": 1e3 * statistics.median(decoding),
    }


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description="Measure the caption coder.")
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--test", type=Path, action="append", default=[])
    parser.add_argument("--model", type=Path, default=MODEL_FILE)
    options = parser.parse_args()
    coder = CaptionCoder.load(options.model)
    sets = {"held out": held_out(read_captions(options.captions))}
    for path in options.test:
        sets[path.stem] = list(json.loads(path.read_text(encoding="utf-8")).values())
    for name, captions in sets.items():
        figures = measure(coder, captions)
        line = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
        print(f"{name}: {len(captions)} captions, {line}", flush=True)


if __name__ == "__main__":
    main()
