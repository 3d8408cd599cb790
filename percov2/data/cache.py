"""Computes latents and text embeddings once and keeps them in shards.

``python -m percov2.data.cache --model DIR --data 'shards/*.tar' --output CACHE --crop 512`` writes

* ``CACHE/NAME-0000.tar`` ...: for every input shard NAME its samples in parts; a sample has
  ``.safetensors`` (float16 ``latents``, and ``text_embeddings``, ``text_pooled``), ``.json`` (key
  and caption) and maybe ``.png`` (the crop);
* ``CACHE/empty.safetensors``: the text embeddings of the empty caption, for caption dropout;
* ``CACHE/cache.json``: settings, how the input shards begin, and which are finished.

A part appears whole or not at all. An interrupted run goes on when it is started again with the
same settings. `CachedDataModule` reads the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset as wds
from jsonargparse import auto_cli
from torch import Tensor

from percov2.analysis.autoencoder import Autoencoder
from percov2.components import load_autoencoder
from percov2.data.cache_manifest import CacheManifest
from percov2.data.cached import EMPTY_NAME, pack, save_empty
from percov2.data.coco import CocoRecords, read_annotations
from percov2.data.faults import FaultError, FilteredError
from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.folder import FolderRecords
from percov2.data.module import read_items
from percov2.data.samples import Records, Sample, picture_decoder, seeded_rng
from percov2.data.shards import DEFAULT_RETRY, expand_shards
from percov2.data.stream import Item, read_record
from percov2.files import atomic_path
from percov2.messages import one_line
from percov2.model_store import resolve_model
from percov2.synthesis.text_conditioner import CONFIG_NAME, ENCODER_FOLDERS, TextConditioner

NO_TEXT = "none"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What is cached, and how.

    Attributes:
        model: preset, or directory with an autoencoder (of stage 0, 1 or 2, or SD3's).
        data: shards as `expand_shards` takes them, or one folder of pictures.
        output: folder of the cache; made if missing.
        crop: side of the square crops in pixels.
        text_model: directory with text encoders (of stage 2, or SD3's); null takes ``model``,
            `none` stores no text embeddings.
        t5: use the third text encoder if the directory has one.
        dtype: of the text encoders; the autoencoder works in float32.
        annotations: a `captions_*.json` of COCO for the folder ``data``.
        max_zoom: see `CropTransform`.
        color_jitter: likewise.
        crops: random crops per picture; 0 takes one centre crop (for validation).
        images: keep the crops as PNG too (for validation).
        captions: weights of caption sources, see `CaptionMix`; null is ``{txt: 1}``.
        filters: which samples are refused.
        shard_size: pictures per part.
        batch_size: pictures encoded at once.
        num_workers: threads that decode pictures.
        seed: of crops and captions.
        device: that encodes.

    Raises:
        ValueError: a number out of range.
    """

    model: str
    data: str | list[str]
    output: Path
    crop: int
    text_model: str | None = None
    t5: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    annotations: Path | None = None
    max_zoom: float = 1.0
    color_jitter: float = 0.0
    crops: int = 1
    images: bool = False
    captions: dict[str, float] | None = None
    filters: Filters = NO_FILTERS
    shard_size: int = 1000
    batch_size: int = 8
    num_workers: int = 4
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.crops < 0 or min(self.batch_size, self.num_workers, self.shard_size) < 1:
            raise ValueError(
                f"crops {self.crops} must not be negative; batch_size {self.batch_size}, "
                f"num_workers {self.num_workers} and shard_size {self.shard_size} must be at "
                "least 1"
            )


# No methods of the class: its command line would offer them as subcommands.
def _content(settings: CacheSettings) -> dict[str, Any]:
    """The settings that the content of a cache depends on, for JSON."""
    elsewhere = {"data", "output", "annotations", "batch_size", "num_workers", "device"}
    return {name: value for name, value in asdict(settings).items() if name not in elsewhere}


@dataclass(kw_only=True)
class Summary:
    """What a run did.

    Attributes:
        samples: written.
        parts: written.
        skipped: parts or input shards that an earlier run had finished.
        faults: by kind.
        filtered: by filter.
        missing: input shards that could not be opened, or not be read to their end for a reason
            that may pass (a connection that breaks); the only thing that a new run tries again.
    """

    samples: int = 0
    parts: int = 0
    skipped: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """Pictures and captions to the tensors that are stored."""

    autoencoder: Autoencoder
    text: TextConditioner | None
    device: torch.device

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Tensors of each sample, on the CPU."""
        images = torch.stack([sample["image"] for sample in samples]).to(self.device)
        tensors = {"latents": self.autoencoder.encode(images)}
        if self.text is not None:
            condition = self.text([sample["caption"] for sample in samples])
            tensors["text_embeddings"] = condition.embeddings
            tensors["text_pooled"] = condition.pooled
        tensors = {name: value.cpu() for name, value in tensors.items()}
        return [
            {name: value[row] for name, value in tensors.items()} for row in range(len(samples))
        ]


class _Job:
    """Turns raw samples into written parts."""

    def __init__(
        self,
        *,
        settings: CacheSettings,
        encoder: _Encoder,
        summary: Summary,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.settings, self.encoder, self.summary, self.pool = settings, encoder, summary, pool
        self.decoder = picture_decoder(
            crop=settings.crop,
            max_zoom=settings.max_zoom,
            color_jitter=settings.color_jitter,
            captions=settings.captions,
            filters=settings.filters,
        )

    def write_input(self, name: str, items: Iterable[Item]) -> bool:
        """Write the parts of one input that are not there; False if not all could be read now."""
        for number, part in enumerate(_batched(items, self.settings.shard_size)):
            last = part[-1]
            if isinstance(last, FaultError) and (last.kind == "missing_shard" or last.passing):
                self.summary.missing.append(last.where)
                return False
            path = self.settings.output / f"{name}-{number:04}.tar"
            if path.exists():
                self.summary.skipped += 1
            else:
                self._write_part(path, part)
        return True

    def _write_part(self, path: Path, items: Sequence[Item]) -> None:
        with (
            atomic_path(path) as temporary,
            wds.TarWriter(str(temporary), encoder=False, mtime=0) as writer,
        ):
            # Running names: an original key may hold a dot, which would end the name here.
            for number, files in enumerate(self._records(items)):
                writer.write({"__key__": f"{path.stem}-{number:06}", **files})
                self.summary.samples += 1
        self.summary.parts += 1

    def _records(self, items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
        """Files of all crops of all good items."""
        work = [(item, crop) for item in items for crop in range(max(1, self.settings.crops))]
        for chunk in _batched(work, self.settings.batch_size):
            samples: list[Sample] = []
            for (_, crop), outcome in zip(chunk, self.pool.map(self._decode, chunk), strict=True):
                if isinstance(outcome, dict):
                    samples.append(outcome)
                elif crop == 0:  # a fault is one, however many crops it costs
                    self._count(outcome)
            if samples:
                for sample, tensors in zip(samples, self.encoder(samples), strict=True):
                    yield pack(sample, tensors, with_image=self.settings.images)

    def _decode(self, work: tuple[Item, int]) -> Sample | FaultError | FilteredError:
        item, crop = work
        if isinstance(item, FaultError):
            return item
        crops, key = self.settings.crops, item["__key__"]
        rng = seeded_rng(self.settings.seed, "cache", crop, key) if crops else None
        try:
            sample = self.decoder(item, rng)
        except (FaultError, FilteredError) as problem:
            return problem
        return {**sample, "key": f"{key}#{crop}"} if crops > 1 else sample

    def _count(self, problem: FaultError | FilteredError) -> None:
        if isinstance(problem, FaultError):
            counts, name = self.summary.faults, problem.kind
        else:
            counts, name = self.summary.filtered, problem.name
        counts[name] = counts.get(name, 0) + 1


def cache(settings: CacheSettings) -> Summary:
    """Write latents and text embeddings of pictures to shards.

    Raises:
        ValueError: wrong options, sources or model, or a cache of other options or data in the
            folder.
    """
    inputs = _inputs(settings.data, settings.annotations)
    settings.output.mkdir(parents=True, exist_ok=True)
    manifest = CacheManifest(settings.output, _content(settings))
    encoder = _load_encoder(settings)
    if encoder.text is not None:
        with torch.inference_mode():
            empty = encoder.text([""])
        save_empty(settings.output / EMPTY_NAME, empty.embeddings[0].cpu(), empty.pooled[0].cpu())
    summary = Summary()
    with ThreadPoolExecutor(settings.num_workers) as pool:
        job = _Job(settings=settings, encoder=encoder, summary=summary, pool=pool)
        looked_at = False
        for name, items in inputs.items():
            finished = manifest.is_finished(name)
            # One of the finished inputs tells of which data they are; all take a cluster minutes.
            if not (finished and looked_at):
                items, looked_at = manifest.begin(name, items), looked_at or manifest.knows(name)
            if finished:
                summary.skipped += 1
            elif job.write_input(name, items):
                manifest.finish(name)
    return summary


def _batched(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` values; the last may be shorter."""
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _inputs(data: str | list[str], annotations: Path | None) -> dict[str, Iterable[Item]]:
    """Raw samples by name of the shard or folder; nothing is read yet."""
    folder = Path(data) if isinstance(data, str) else None
    if folder is not None and folder.is_dir():
        name = folder.resolve().name
        records: Records = (
            FolderRecords(folder)
            if annotations is None
            else CocoRecords(read_annotations(annotations), folder)
        )
        return {name: (read_record(records, i, name) for i in range(len(records)))}
    if annotations is not None:
        raise ValueError(f"--annotations goes with a folder of pictures, {data!r} is none")
    inputs: dict[str, Iterable[Item]] = {}
    for shard in expand_shards(data):
        name = Path(shard).name.split(".")[0]
        if name in inputs:
            raise ValueError(f"two input shards are called {name}: cache them to two folders")
        inputs[name] = read_items(shard, DEFAULT_RETRY)
    return inputs


def _load_encoder(settings: CacheSettings) -> _Encoder:
    directory = resolve_model(settings.model)
    device = torch.device(settings.device)
    autoencoder = load_autoencoder(directory).to(device)
    if settings.text_model == NO_TEXT:
        return _Encoder(autoencoder=autoencoder, text=None, device=device)
    source = directory if settings.text_model is None else resolve_model(settings.text_model)
    has_t5 = (source / ENCODER_FOLDERS[2]).is_dir()
    if settings.t5 and not has_t5:
        print(
            f"percov2.data.cache: {source} has no {ENCODER_FOLDERS[2]}: captions are stored "
            "without T5",
            file=sys.stderr,
        )
    options: dict[str, Any] = {
        "use_t5": settings.t5 and has_t5,
        "dtype": getattr(torch, settings.dtype),
    }
    if (source / CONFIG_NAME).is_file():
        text = TextConditioner.from_pretrained(source, **options)
    elif (source / "text_encoder").is_dir():
        text = TextConditioner.from_sd3(source, **options)
    else:
        raise ValueError(
            f"{source} holds no text encoders: name a stage 2 or SD3 directory with --text_model, "
            f"or store none with --text_model {NO_TEXT}"
        )
    return _Encoder(autoencoder=autoencoder, text=text.eval().to(device), device=device)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (1: some input shards were missing)."""
    try:
        summary = cache(
            auto_cli(
                CacheSettings,
                args=argv,
                as_positional=False,
                prog="python -m percov2.data.cache",
            )
        )
    except (ValueError, OSError) as error:
        print(f"percov2.data.cache: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(summary)))
    return 1 if summary.missing else 0


if __name__ == "__main__":
    sys.exit(main())
