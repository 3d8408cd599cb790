"""Measures models on a folder of pictures: real file bytes, PSNR, MS-SSIM, seconds, memory.

``python benchmarks/kodak.py --data KODAK --captions captions.json --model tiny --output DIR``
writes DIR/NAME-STEPS-steps.csv, a row per picture, with the streams and reconstructions beside it,
and prints means.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)

import percov2
from percov2.codec import Codec
from percov2.data.transforms import image_to_tensor
from percov2.files import list_images
from percov2.images import read_image, write_png
from percov2.inspection import png_metadata


def _quality(original: torch.Tensor, restored: torch.Tensor) -> dict[str, float]:
    """PSNR in dB and MS-SSIM of (3, H, W) in [0, 1], both on RGB."""
    pair = (restored[None], original[None])
    return {
        "psnr": float(peak_signal_noise_ratio(*pair, data_range=1.0)),
        "ms_ssim": float(multiscale_structural_similarity_index_measure(*pair, data_range=1.0)),
    }


def measure(codec: Codec, path: Path, caption: str, output: Path, steps: int) -> dict[str, Any]:
    """One picture through a written file and back."""
    image, _ = read_image(path)
    started = time.perf_counter()
    data = codec.compress(image, caption=caption)
    encode_seconds = time.perf_counter() - started
    stream = output / f"{path.stem}.pcv2"
    stream.write_bytes(data)
    data = stream.read_bytes()
    started = time.perf_counter()
    restored = codec.decompress(data, steps=steps)
    decode_seconds = time.perf_counter() - started
    described = percov2.info(data, model=str(codec.summary.directory))
    write_png(output / f"{path.stem}.png", restored, png_metadata(described))
    tokens = codec.decode_tokens(data)
    uniform = tokens.size * np.log2(codec.components.tokenizer.quantizer.codebook_size)
    return {
        "image": path.stem,
        "width": image.width,
        "height": image.height,
        "bytes": described["bytes"]["total"],
        "header_bytes": described["bytes"]["header"],
        "caption_bytes": described["bytes"]["caption"],
        "token_bytes": described["bytes"]["tokens"],
        "bpp": described["bpp"],
        "token_saving_against_uniform": 1 - 8 * described["bytes"]["tokens"] / float(uniform),
        "steps": steps,
        **_quality(image_to_tensor(image) / 2 + 0.5, image_to_tensor(restored) / 2 + 0.5),
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--captions", type=Path, help="JSON: picture's stem to caption")
    parser.add_argument("--model", nargs="+", default=["tiny"])
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--output", type=Path, default=Path("runs/kodak"))
    args = parser.parse_args()
    captions = json.loads(args.captions.read_text()) if args.captions else {}
    for model in args.model:
        codec = percov2.load(model)
        output = args.output / codec.config.name
        output.mkdir(parents=True, exist_ok=True)
        steps = codec.config.default_steps if args.steps is None else args.steps
        rows = []
        for path in list_images(args.data):
            rows.append(measure(codec, path, captions.get(path.stem, ""), output, steps))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()})
        with (output.parent / f"{output.name}-{steps}-steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        print(model, {k: round(statistics.mean(row[k] for row in rows), 4) for k in numbers})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
