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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import percov2
from benchmarks.entropy import cross_entropy, seconds, written_bits
from percov2.bitstream import MAX_STEPS
from percov2.codec import Codec
from percov2.components import CodecComponents, TokenizerComponents, load_component
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import SCHEDULES
from percov2.entropy.token_coder import TokenCoder, Tokens
from percov2.evaluation.protocols import CROPS, find_protocol, with_captions


def codec_of(parts: TokenizerComponents, schedule: str, tiny: CodecComponents) -> Codec:
    """Writes files of these tokens; it cannot paint, its transformer is that of `tiny`."""
    reduction = int(parts.hyper_encoder.config.reduction)
    config = replace(
        tiny.config,
        schedule=schedule,
        latents_per_token=reduction,
        rate_weight=0.0,
        color_weight=0.0,
        latent_weight=0.0,
    )
    return Codec(replace(tiny, config=config, tokenizer=parts))


def row(coder: TokenCoder, grids: list[Tokens], zero_order: float | None) -> str:
    """Cells of a schedule."""
    total = coder.steps_total(*grids[0].shape)
    bits = written_bits(coder, grids)
    saved = 100 * (1 - bits / np.log2(coder.codebook_size))
    other = "" if zero_order is None else f" {100 * (1 - bits / zero_order):.1f} % |"
    encode, decode = seconds(coder, grids[0], repeats=5 if total <= MAX_STEPS else 1)
    return f"{total} | {bits:.3f} | {saved:.1f} % |{other} {encode:.2f} s and {decode:.2f} s |"


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="as of percov2 evaluate")
    parser.add_argument("--held-out", metavar="DATA", help="others, for the zero-order entropy")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--masked", nargs="+", required=True, metavar="SCHEDULE=DIR")
    parser.add_argument("--crop", choices=list(CROPS), default="full")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th picture")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="JSON, name to caption")
    args = parser.parse_args()
    parts = TokenizerComponents.load(args.tokenizer)
    tiny = percov2.load("tiny").components
    codec = codec_of(parts, "uniform", tiny)
    protocol = find_protocol(args.data, crop=args.crop)
    protocol = replace(protocol, items=protocol.items[:: args.every])
    if args.captions is not None:
        protocol = with_captions(protocol, args.captions)
    images = [protocol.read(item) for item in protocol.items]
    grids = [codec.encode_tokens(image) for image in images]
    zero_order, codes = None, parts.quantizer.codebook_size
    if args.held_out is not None:
        other = find_protocol(args.held_out, crop="full")
        others = [codec.encode_tokens(other.read(item)) for item in other.items]
        zero_order = cross_entropy(grids, others, codes)
        print(f"zero-order entropy, histogram of the other pictures: {zero_order:.3f} bits\n")
    shape = "x".join(map(str, grids[0].shape))
    print(
        f"| schedule | groups | bits per token | against uniform ({np.log2(codes):.0f} bits) |"
        + ("" if zero_order is None else " against zero-order |")
        + f" encode and decode {shape} tokens |"
    )
    print("|---|---|---|---|" + "---|" * (2 if zero_order is not None else 1))
    sizes: dict[str, list[int]] = {}
    for name in args.masked:
        schedule, _, folder = name.partition("=")
        masked = load_component(MaskedTransformer, Path(folder), "masked_transformer")
        trained = replace(parts, masked_transformer=masked)
        print(f"| {schedule} | {row(trained.token_coder(schedule), grids, zero_order)}", flush=True)
        if args.captions is not None and schedule in SCHEDULES:
            writer = codec_of(trained, schedule, tiny)
            sizes[schedule] = [
                len(writer.compress(image, caption=item.caption))
                for item, image in zip(protocol.items, images, strict=True)
            ]
    for schedule, found in sizes.items():
        every = ", ".join(f"{i.name} {n}" for i, n in zip(protocol.items, found, strict=True))
        print(f"\n{schedule}: {np.mean(found):.1f} bytes a file ({every})")


if __name__ == "__main__":
    main()
