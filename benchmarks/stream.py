"""Compares the training stream with a bare webdataset pipeline over the same shards and crops.

``python benchmarks/stream.py --shards 'shards/*.tar'`` prints tables in Markdown: images per
second (median of several runs) for 1 and 2 workers and their ratio, then the memory of the process
and its workers while 20,000 samples go by.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from percov2.data.laion import LaionDataModule
from percov2.data.shards import expand_shards
from percov2.data.transforms import CropTransform
from percov2.images import to_srgb

MAX_ZOOM = 1.5


class Decode:
    """The bare pipeline's samples: the same decoding and crops, nothing checked or counted."""

    def __init__(self, crop: int) -> None:
        self.crop, self.rng = CropTransform(size=crop, max_zoom=MAX_ZOOM), random.Random(0)

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Picture, caption and key."""
        picture, _ = to_srgb(Image.open(io.BytesIO(raw["jpg"])))
        caption = raw["txt"].decode().strip()
        return {
            "image": self.crop(picture, self.rng),
            "caption": caption,
            "key": raw["__key__"],
        }


def bare_loader(shards: list[str], options: argparse.Namespace, workers: int) -> Iterable[Any]:
    """webdataset with resampled shards and a shuffle buffer."""
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=None)
    data = data.shuffle(options.block).map(Decode(options.crop))
    data = data.batched(options.batch, collation_fn=default_collate, partial=False)
    return wds.WebLoader(data, batch_size=None, num_workers=workers)


def our_loader(shards: list[str], options: argparse.Namespace, workers: int) -> DataLoader[Any]:
    """The DataModule's training loader."""
    module = LaionDataModule(
        train_shards=shards[1:],
        val_shards=shards[0],
        crop=options.crop,
        max_zoom=MAX_ZOOM,
        batch_size=options.batch,
        val_samples=1,
        num_workers=workers,
        shuffle_block=options.block,
    )
    return module.train_dataloader()


def images_per_second(loader: Iterable[Any], options: argparse.Namespace) -> float:
    """After one block of warm-up."""
    batches = iter(loader)
    for _ in range(-(-options.block // options.batch)):
        next(batches)
    count = -(-options.images // options.batch)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * options.batch / (time.perf_counter() - started)


def memory_mib() -> float:
    """Resident memory of this process and of its children, shared pages split between them."""
    me = Path("/proc/self").resolve().name
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for process in (me, *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def memory_over(loader: Iterable[Any], options: argparse.Namespace) -> list[tuple[int, float]]:
    """Memory after every tenth of the samples."""
    samples, found = 0, []
    for number, _ in enumerate(loader, start=1):
        samples = number * options.batch
        if samples >= (len(found) + 1) * options.memory_samples / 10:
            found.append((samples, round(memory_mib(), 1)))
        if samples >= options.memory_samples:
            break
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="pattern of at least two shards")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=500, help="samples shuffled together")
    parser.add_argument("--images", type=int, default=2000, help="timed, per run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory-samples", type=int, default=20_000, help="0 leaves memory out")
    options = parser.parse_args()
    shards = expand_shards(options.shards)
    print(f"{len(shards) - 1} shards, {options.crop}x{options.crop}, {options.runs} runs.\n")
    print("| workers | bare webdataset, images/s | ours, images/s | ours / bare |")
    print("|---:|---:|---:|---:|")
    for workers in options.workers:
        speeds: dict[str, list[float]] = {"bare": [], "ours": []}
        for _ in range(options.runs):  # in turn, so that a busy machine disturbs both
            speeds["bare"].append(
                images_per_second(bare_loader(shards[1:], options, workers), options)
            )
            speeds["ours"].append(images_per_second(our_loader(shards, options, workers), options))
        bare, ours = (statistics.median(speeds[name]) for name in ("bare", "ours"))
        print(f"| {workers} | {bare:.1f} | {ours:.1f} | {ours / bare:.3f} |", flush=True)
    if options.memory_samples:
        workers = max(options.workers)
        grown = zip(
            memory_over(our_loader(shards, options, workers), options),
            memory_over(bare_loader(shards[1:], options, workers), options),
            strict=True,
        )
        print(f"\n| samples, {workers} workers | ours, MiB | bare webdataset, MiB |")
        print("|---:|---:|---:|")
        for (samples, mib), (_, bare_mib) in grown:
            print(f"| {samples} | {mib} | {bare_mib} |")


if __name__ == "__main__":
    main()
