"""`python -m tests.golden.make`: freeze a model and streams of it into this folder.

Streams begin with tokens, not with pictures: the networks that look at pixels compute with floats,
and their results may differ between machines.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace

import numpy as np
import torch

from percov2.codec import Codec
from percov2.components import CodecComponents
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.token_coder import Tokens
from tests.golden.store import (
    FOLDER,
    MANIFEST,
    MODEL,
    STREAMS,
    TOKENS,
    GoldenStream,
    encode,
    golden_codec,
    write_manifest,
)
from tests.tiny_codec import CODEBOOK_SIZE, tiny_components
from tests.tiny_models import randomise

SCHEDULES = ("quincunx", "qlds", "var", "checkerboard")

# Name, schedule, size, caption, groups sent (None is all), uniform, surprising tokens.
# Surprising tokens are drawn at random; the others are what the model expects, and cost fewer bits.
_Plan = tuple[str, str, tuple[int, int], str, int | None, bool, bool]
PLANS: tuple[_Plan, ...] = (
    ("smallest", "quincunx", (16, 16), "", None, False, True),
    ("smallest-caption", "checkerboard", (16, 16), "A dog.", None, False, False),
    ("line", "quincunx", (300, 16), "", None, False, True),
    ("column", "var", (16, 260), "a lamp post", None, False, True),
    ("odd", "qlds", (100, 37), "A red door, half open — ☃.", None, False, True),
    ("square", "quincunx", (512, 512), "a man riding a wave on a surfboard", None, False, False),
    ("square-surprising", "quincunx", (512, 512), "", None, False, True),
    ("square-hybrid", "quincunx", (512, 512), "a cat on a sofa", 4, False, False),
    ("square-uniform", "quincunx", (512, 512), "a cat on a sofa", None, True, False),
    ("square-uniform-hybrid", "var", (512, 512), "", 6, True, True),
    ("landscape", "qlds", (768, 512), "A view of Kyiv (Київ) at 7:30.", None, False, False),
    ("landscape-hybrid", "var", (768, 512), "", 9, False, False),
    ("landscape-two-groups", "checkerboard", (768, 512), "zebras", None, False, False),
    ("portrait-one-group", "qlds", (480, 640), "", 1, False, True),
    ("spelled-size", "checkerboard", (333, 222), "\0\n a NUL and a line", 1, False, True),
)


def build_model() -> CodecComponents:
    """Random, but opinionated: windows of the usual size and two heads."""
    components = tiny_components(schedule=SCHEDULES[0], name="golden")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        masked: MaskedTransformer = MaskedTransformer(
            codebook_size=CODEBOOK_SIZE, dim=32, num_layers=2, num_heads=2, window=8
        )
        randomise(masked, std=0.25)
    tokenizer = replace(components.tokenizer, masked_transformer=masked.eval())
    return replace(components, tokenizer=tokenizer)


def draw_tokens(codec: Codec, plan: _Plan, seed: int) -> Tokens:
    """Tokens (r, c) of a plan."""
    grid = codec.summary.token_grid(*plan[2])
    if plan[6]:
        return np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, grid)
    return codec._coders[False].fill(np.full(grid, -1), seed=seed)


def make_streams() -> None:
    """Write streams, manifest and tokens, with the model that lies in `MODEL`."""
    STREAMS.mkdir()
    manifest, tokens = [], {}
    for seed, plan in enumerate(PLANS):
        name, schedule, size, caption, steps, uniform, _ = plan
        codec = golden_codec(schedule)
        stream = GoldenStream(
            name=name,
            schedule=schedule,
            model_id=codec.config.model_id,
            width=size[0],
            height=size[1],
            caption=caption,
            steps=codec.summary.steps_total(*size) if steps is None else steps,
            uniform=uniform,
        )
        drawn = draw_tokens(codec, plan, seed)
        data = encode(codec, stream, drawn)
        stream.path.write_bytes(data)
        sent = codec._coders[False].groups(*drawn.shape) < stream.steps
        tokens[name] = np.where(sent, drawn, -1).astype(np.int16)
        manifest.append(stream)
        print(f"{name}: {size[0]}x{size[1]}, {len(data)} bytes")
    write_manifest(manifest)
    np.savez_compressed(TOKENS, **tokens)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make", description=__doc__)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    args = parser.parse_args()
    there = [path for path in (MODEL, STREAMS, MANIFEST, TOKENS) if path.exists()]
    if there and not args.force:
        names = ", ".join(path.name for path in there)
        print(
            f"{FOLDER} holds {names}: streams in the wild depend on what they prove; "
            "--force replaces them",
            file=sys.stderr,
        )
        return 2
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    build_model().save(MODEL, half=True)
    make_streams()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
