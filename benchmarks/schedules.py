"""Compares masked transformers that were trained for different schedules, on the same tokens.

``python -m benchmarks.schedules --data KODAK --held-out COCO --tokenizer DIR --masked var=DIR``

Prints a row a schedule: bits per token from real payloads, the saving against log2(V) bits and
against the zero-order entropy of the tokens of *other* pictures (``--held-out``), seconds. Tokens
are the nearest codes: others would have been chosen for one of the models. ``raster``, a pass a
token, takes minutes a picture: ``--every N`` takes each N-th. ``--captions FILE`` prints the bytes
of whole files too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import percov2
from benchmarks.entropy import cross_entropy, seconds
from percov2.bitstream import MAX_STEPS
from percov2.codec import Codec
from percov2.components import TokenizerComponents, load_component
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.token_coder import TokenCoder, Tokens
from percov2.evaluation.protocols import CROPS
from percov2.files import list_images
from percov2.images import read_image


def codec_of(parts: TokenizerComponents, schedule: str) -> Codec:
    """Writes files of these tokens; it cannot paint, its transformer is that of `tiny`."""
    tiny = percov2.load("tiny").components
    reduction = int(parts.hyper_encoder.config.reduction)
    config = replace(tiny.config, schedule=schedule, latents_per_token=reduction, rate_weight=0.0)
    return Codec(replace(tiny, config=config, tokenizer=parts))


def pictures(folder: Path, crop: str, every: int) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures."""
    for path in list_images(folder)[::every]:
        yield path.stem, CROPS[crop](read_image(path)[0])


def row(coder: TokenCoder, grids: list[Tokens], zero_order: float | None) -> str:
    """Cells of a schedule."""
    total = coder.steps_total(*grids[0].shape)
    written = [len(coder.encode(g, steps=coder.steps_total(*g.shape))) for g in grids]
    bits = 8 * sum(written) / sum(g.size for g in grids)
    saved = 100 * (1 - bits / np.log2(coder.codebook_size))
    other = "" if zero_order is None else f" {100 * (1 - bits / zero_order):.1f} % |"
    encode, decode = seconds(coder, grids[0], repeats=5 if total <= MAX_STEPS else 1)
    return f"{total} | {bits:.3f} | {saved:.1f} % |{other} {encode:.2f} s and {decode:.2f} s |"


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--held-out", type=Path, help="others, for the zero-order entropy")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--masked", nargs="+", required=True, metavar="SCHEDULE=DIR")
    parser.add_argument("--crop", choices=list(CROPS), default="full")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th picture")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="JSON, name to caption")
    args = parser.parse_args()
    parts = TokenizerComponents.load(args.tokenizer)
    codec = codec_of(parts, "uniform")
    images = dict(pictures(args.data, args.crop, args.every))
    grids = [codec.encode_tokens(image) for image in images.values()]
    zero_order, codes = None, parts.quantizer.codebook_size
    if args.held_out is not None:
        others = [codec.encode_tokens(x) for _, x in pictures(args.held_out, "full", 1)]
        zero_order = cross_entropy(grids, others, codes)
        print(f"zero-order entropy, histogram of the other pictures: {zero_order:.3f} bits\n")
    shape = "x".join(map(str, grids[0].shape))
    print(
        f"| schedule | groups | bits per token | against uniform ({np.log2(codes):.0f} bits) |"
        + ("" if zero_order is None else " against zero-order |")
        + f" encode and decode {shape} tokens |"
    )
    print("|---|---|---|---|" + "---|" * (2 if zero_order is not None else 1))
    captions = {} if args.captions is None else json.loads(args.captions.read_text("utf-8"))
    for name in args.masked:
        schedule, _, folder = name.partition("=")
        masked = load_component(MaskedTransformer, Path(folder), "masked_transformer")
        trained = replace(parts, masked_transformer=masked)
        print(f"| {schedule} | {row(trained.token_coder(schedule), grids, zero_order)}", flush=True)
        if captions:
            writer = codec_of(trained, schedule)
            sizes = {n: len(writer.compress(x, caption=captions[n])) for n, x in images.items()}
            every = ", ".join(f"{n} {size}" for n, size in sizes.items())
            print(f"\n{schedule}: {np.mean(list(sizes.values())):.1f} bytes a file ({every})\n")


if __name__ == "__main__":
    main()
