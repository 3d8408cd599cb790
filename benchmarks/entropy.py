"""Measures the entropy coding of models on a folder of pictures, and prints it as markdown.

``python -m benchmarks.entropy --data KODAK --held-out COCO --model tiny tiny-low``

For each model: bits per token of every schedule group from real payloads; the saving against
log2(V) bits and against the zero-order entropy of the tokens of *other* pictures (``--held-out``);
what the integers cost against the float model; seconds; rate and quality of hybrid mode for every
number of groups (``--hybrid``, which paints), of rate weights (``--rate-weights``, likewise), of
colour weights and of latent weights. Tokens are chosen by the model's own weights; ``--nearest``
takes the nearest codes. Schedules are compared by ``benchmarks.schedules``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import peak_signal_noise_ratio

import percov2
from percov2.codec import Codec
from percov2.components import TokenizerComponents
from percov2.data.transforms import image_to_tensor
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.range_coder import RangeDecoder, RangeEncoder
from percov2.entropy.schedules import make_schedule
from percov2.entropy.token_coder import TokenCoder, Tokens
from percov2.evaluation.pixel_metrics import gradient_energy
from percov2.files import list_images
from percov2.images import read_image


def grids_of(codec: Codec, folder: Path, *, nearest: bool) -> list[Tokens]:
    """Tokens of all pictures of a folder."""
    weight = 0.0 if nearest else None
    return [
        codec.encode_tokens(path, rate_weight=weight, color_weight=weight, latent_weight=weight)
        for path in list_images(folder)
    ]


def cross_entropy(grids: list[Tokens], others: list[Tokens], codes: int) -> float:
    """Bits per token of ``grids`` under the histogram (plus one each) of ``others``."""
    counts = sum(np.bincount(g.ravel(), minlength=codes) for g in others) + 1
    bits = -np.log2(counts / counts.sum())
    return float(np.concatenate([bits[g.ravel()] for g in grids]).mean())


@torch.no_grad()
def float_passes(
    model: MaskedTransformer, schedule: str, grid: Tokens
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (N, V) of the float model and tokens (N,) of a grid, group by group."""
    order = torch.from_numpy(make_schedule(schedule, *grid.shape).astype(np.int64))[None]
    tokens = torch.from_numpy(grid)[None]
    for k in range(int(order.max()) + 1):
        where = order == k
        yield model(tokens, order < k, where), tokens[where]


def float_bits(model: MaskedTransformer, schedule: str, grid: Tokens) -> float:
    """Bits of a grid under the float model."""
    total = 0.0
    for logits, tokens in float_passes(model, schedule, grid):
        total -= float(logits.double().log_softmax(-1).gather(1, tokens[:, None]).sum())
    return total / np.log(2)


def written_bits(coder: TokenCoder, grids: list[Tokens]) -> float:
    """Bits per token of the payloads of all grids."""
    written = [len(coder.encode(grid, steps=coder.steps_total(*grid.shape))) for grid in grids]
    return 8 * sum(written) / sum(grid.size for grid in grids)


def seconds(coder: TokenCoder, grid: Tokens, *, repeats: int = 5) -> tuple[float, float]:
    """Medians of several encodings and decodings of a grid, model included."""
    steps, rows = coder.steps_total(*grid.shape), []
    for _ in range(repeats):
        started = time.perf_counter()
        payload = coder.encode(grid, steps=steps)
        encoded = time.perf_counter()
        read = coder.read(RangeDecoder(payload), *grid.shape, steps=steps)
        rows.append((encoded - started, time.perf_counter() - encoded))
        assert (read == grid).all()
    encode, decode = np.median(rows, 0)
    return float(encode), float(decode)


def float_seconds(
    model: MaskedTransformer, schedule: str, grid: Tokens, *, repeats: int = 5
) -> float:
    """Median of what the float model's passes over all groups take, without any coding."""
    rows = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in float_passes(model, schedule, grid):
            pass
        rows.append(time.perf_counter() - started)
    return float(np.median(rows))


def coder_milliseconds(count: int = 1536, codes: int = 256) -> tuple[float, float]:
    """Medians for the range coder alone: ``count`` symbols of ``codes``, frequencies at hand."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(codes, 0.1), count)
    frequencies = 1 + np.floor(share * (2**24 - codes)).astype(np.int64)
    frequencies[np.arange(count), frequencies.argmax(1)] += 2**24 - frequencies.sum(1)
    symbols = np.array([rng.choice(codes, p=row / 2**24) for row in frequencies], np.int32)
    rows = []
    for _ in range(9):
        started = time.perf_counter()
        encoder = RangeEncoder()
        encoder.encode(symbols, frequencies)
        payload = encoder.finish()
        encoded = time.perf_counter()
        assert (RangeDecoder(payload).decode(frequencies) == symbols).all()
        rows.append((encoded - started, time.perf_counter() - encoded))
    encode, decode = 1000 * np.median(rows, 0)
    return float(encode), float(decode)


def measure(
    name: str,
    parts: TokenizerComponents,
    schedule: str,
    grids: list[Tokens],
    held_out: list[Tokens] | None,
) -> None:
    """Print the rate of one masked transformer."""
    coder = parts.token_coder(schedule)
    codes, written = coder.codebook_size, written_bits(coder, grids)
    per_group = [coder.bits_per_group(grid) for grid in grids]
    model, ideal = parts.masked_transformer, sum(map(sum, per_group))
    as_float = sum(float_bits(model, schedule, grid) for grid in grids)
    uniform = np.log2(codes)
    print(f"| {name}, {schedule} | |\n|---|---|")
    print(f"| bits per token, from bytes | {written:.3f} |")
    print(
        f"| saving against uniform ({uniform:.0f} bits) | {100 * (1 - written / uniform):.1f} % |"
    )
    if held_out is not None:
        zero = cross_entropy(grids, held_out, codes)
        print(f"| zero-order entropy, histogram of other pictures | {zero:.3f} |")
        print(f"| saving against it | {100 * (1 - written / zero):.1f} % |")
    print(f"| integers against the float model | {100 * (ideal / as_float - 1):+.3f} % |")
    encode, decode = seconds(coder, grids[0])
    shape = "x".join(map(str, grids[0].shape))
    print(f"| encode and decode {shape} tokens | {encode:.2f} s and {decode:.2f} s |")
    passes = float_seconds(model, schedule, grids[0])
    print(f"| the float model's passes alone | {passes:.2f} s |")
    rates = ", ".join(f"{rate:.2f}" for rate in group_rates(coder, grids, per_group))
    print(f"| bits per token of each group | {rates} |\n")


def group_rates(
    coder: TokenCoder, grids: list[Tokens], per_group: list[list[float]]
) -> list[float]:
    """Bits per token of each group, over grids that may differ in shape and number of groups."""
    most = max(len(bits) for bits in per_group)
    bits, tokens = np.zeros(most), np.zeros(most)
    for grid, found in zip(grids, per_group, strict=True):
        bits[: len(found)] += found
        tokens += np.bincount(coder.groups(*grid.shape).ravel(), minlength=most)
    return [float(rate) for rate in bits / tokens]


Points = list[tuple[str, float, float]]
"""What was asked for, bpp and PSNR in dB."""


def painted(codec: Codec, paths: list[Path], option: str, values: list[Any]) -> Points:
    """Print mean rate and quality of streams for every value of an option of `compress`."""
    cells = "bytes | bpp | PSNR (dB) | gradient energy | squared error of 16x16 means"
    print(f"| {codec.config.name}: {option} | {cells} |\n|---|---|---|---|---|---|")
    points = []
    for value in values:
        rows = []
        for path in paths:
            image, _ = read_image(path)
            data = codec.compress(image, caption="", **{option: value})
            restored, original = (
                image_to_tensor(x)[None] / 2 + 0.5 for x in (codec.decompress(data), image)
            )
            psnr = float(peak_signal_noise_ratio(restored, original, data_range=1.0))
            energy = gradient_energy(restored) / gradient_energy(original)
            bpp = 8 * len(data) / (image.width * image.height)
            color = float(avg_pool2d(255 * (restored - original), 16).square().mean())
            rows.append((len(data), bpp, psnr, energy, color))
        size, bpp, psnr, energy, color = np.mean(rows, 0)
        cells = f"{size:.0f} | {bpp:.4f} | {psnr:.2f} | {energy:.2f} | {color:.1f}"
        print(f"| {value:g} | {cells} |", flush=True)
        points.append((f"{value:g}", float(bpp), float(psnr)))
    print()
    return points


def draw(curves: dict[str, Points], path: Path) -> None:
    """Rate against PSNR, each point with its value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, points), marker in zip(curves.items(), itertools.cycle("osD^v<>p"), strict=False):
        rates, psnr = [p[1] for p in points], [p[2] for p in points]
        axes.plot(rates, psnr, marker=marker, label=label)
        for text, x, y in points:
            axes.annotate(text, (x, y), (4, -10), textcoords="offset points", fontsize=7)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--held-out", type=Path, help="other pictures, for the zero-order entropy")
    parser.add_argument("--model", nargs="+", default=["tiny", "tiny-low"])
    parser.add_argument("--nearest", action="store_true", help="take the nearest codes")
    parser.add_argument("--hybrid", action="store_true", help="paint every number of groups too")
    parser.add_argument(
        "--rate-weights", nargs="*", type=float, default=[], metavar="W", help="paint with each"
    )
    parser.add_argument(
        "--color-weights", nargs="*", type=float, default=[], metavar="W", help="likewise"
    )
    parser.add_argument(
        "--latent-weights", nargs="*", type=float, default=[], metavar="W", help="likewise"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="rate and PSNR of the painted")
    args = parser.parse_args()
    weights = {
        "rate_weight": args.rate_weights,
        "color_weight": args.color_weights,
        "latent_weight": args.latent_weights,
    }
    if args.plot and not (args.hybrid or any(weights.values())):
        parser.error("--plot needs --hybrid or weights: nothing is painted")
    encode, decode = coder_milliseconds()
    print(f"range coder alone, 1,536 symbols of 256: {encode:.1f} ms and {decode:.1f} ms\n")
    curves: dict[str, Points] = {}
    for model in args.model:
        codec = percov2.load(model)
        parts, schedule = codec.components.tokenizer, codec.config.schedule
        nearest, held_out = args.nearest, None
        if args.held_out is not None:
            held_out = grids_of(codec, args.held_out, nearest=nearest)
        grids = grids_of(codec, args.data, nearest=nearest)
        measure(model, parts, schedule, grids, held_out)
        paths = list_images(args.data)
        if args.hybrid:
            total = min(codec.summary.steps_total(*read_image(path)[0].size) for path in paths)
            steps = list(range(1, total + 1))
            curves[f"{model}, groups sent"] = painted(codec, paths, "schedule_steps", steps)
        for option, values in weights.items():
            if values:
                label = f"{model}, {option.replace('_', ' ')}"
                curves[label] = painted(codec, paths, option, values)
    if args.plot:
        draw(curves, args.plot)


if __name__ == "__main__":
    main()
