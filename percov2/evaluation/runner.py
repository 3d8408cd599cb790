"""The run: every codec on every picture, from real files, once.

OUTPUT holds ``streams`` and ``pictures`` by codec, ``records`` with what is known of each picture
so far, ``reference`` with the originals' features, ``originals`` with their checksums,
``run.json`` with what else a resumed run must find unchanged, and at the end ``results.json`` and
``images.csv``. A command that names other codecs for the same OUTPUT adds them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from percov2.data.transforms import image_to_tensor
from percov2.evaluation.codecs import Candidate
from percov2.evaluation.journal import Journal, Record, Rows, has_features
from percov2.evaluation.originals import OriginalFiles
from percov2.evaluation.pixel_metrics import Original
from percov2.evaluation.protocols import Item
from percov2.evaluation.report_data import SCHEMA
from percov2.evaluation.results import (
    environment,
    provenance,
    summarise,
    write_json,
    write_table,
)
from percov2.evaluation.task import Task, merge_description
from percov2.evaluation.weights import AbsentError
from percov2.files import atomic_path
from percov2.messages import first_line

# What codecs raise on a picture; torch's out-of-memory errors are RuntimeErrors.
_FAILURES = (ValueError, OSError, RuntimeError, MemoryError, AbsentError)


@dataclass(slots=True)
class Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started


@dataclass(frozen=True, kw_only=True, slots=True)
class _Todo:
    """What is missing of a picture."""

    code: bool
    pairs: frozenset[str]
    features: frozenset[str]


class Runner:
    """Works off a task, or what is left of it.

    Args:
        task: see `Task`.

    Raises:
        ValueError: OUTPUT or the reference belongs to a run with other settings.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.clock = task, Clock()
        self._journals = {
            candidate.info.slug: Journal(task.output / "records" / candidate.info.slug)
            for candidate in task.candidates
        }
        assert len(self._journals) == len(task.candidates), "slugs must differ"
        self._originals = Journal(task.reference / "originals")
        self._files = OriginalFiles(task.output / "originals")
        self._described = merge_description(task)
        # Bytes of every file by stream and picture: what competitors must match.
        self._sizes: dict[tuple[str, str], int] = {}

    # -- pictures ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All pictures, then the results, which the first process writes and all return."""
        mine = self.task.processes.share(self.task.protocol.items)
        todo, originals = self._todo(mine), self._originals.read()
        work = [
            item
            for item in mine
            if todo[item.name]
            or self._lacking(originals.get(item.name, {}))
            or not self._files.is_seen(item)
        ]
        total = sum(len(todo[item.name]) for item in work)
        started = time.perf_counter()
        from tqdm import tqdm

        disable = None if self.task.processes.is_first else True
        with tqdm(total=total, unit="picture", disable=disable) as bar, torch.inference_mode():
            for item in work:
                self._item(item, todo[item.name], originals.get(item.name, {}), bar)
        self.clock.seconds["pictures"] = time.perf_counter() - started
        self.clock.seconds["count"] = total
        self.task.processes.wait()
        return self._finish()

    def _todo(self, items: Sequence[Item]) -> dict[str, dict[str, _Todo]]:
        """What is missing, by picture and slug; only what is."""
        suite = self.task.suite
        todo: dict[str, dict[str, _Todo]] = {item.name: {} for item in items}
        same: dict[_Todo, _Todo] = {}  # most are equal: keep one of each
        for candidate in self.task.candidates:
            records = self._journals[candidate.info.slug].read()
            for item in items:
                record = records.get(item.name, {})
                done = "bytes" in record and record["error"] is None
                if done:
                    self._sizes[candidate.stream, item.name] = record["bytes"]
                part = _Todo(
                    code=not done,
                    pairs=frozenset(n for n in suite.pairs if not done or n not in record),
                    features=frozenset(
                        n for n in suite.extractors if not done or not _looked_at(record, n)
                    ),
                )
                if part.code or part.pairs or part.features:
                    todo[item.name][candidate.info.slug] = same.setdefault(part, part)
        return todo

    def _lacking(self, original: Record) -> list[str]:
        """Feature sets that an original has not been looked at for."""
        return [name for name in self.task.suite.extractors if not _looked_at(original, name)]

    def _item(self, item: Item, todo: dict[str, _Todo], known: Record, bar: Any) -> None:
        """One picture through all codecs that lack it."""
        try:
            image = self.task.protocol.read(item)
        except _FAILURES as error:
            # What is known of a file that has changed says nothing of it.
            for slug in todo if self._files.is_seen(item) else self._journals:
                self._journals[slug].append(item.name, {"error": first_line(error)})
            bar.update(len(todo))
            return
        pixels = self._pixels(image)
        original = Original(pixels=pixels, caption=item.caption)
        self._original(item, image, pixels, known)
        files: dict[str, tuple[bytes, Record]] = {}
        for candidate in self.task.candidates:
            part = todo.get(candidate.info.slug)
            if part is None:
                continue
            journal = self._journals[candidate.info.slug]
            try:
                values, restored = (
                    self._code(candidate, item, image, files)
                    if part.code
                    else ({}, self._load(candidate, item))
                )
                measured, rows = self._measure(part, original, restored)
            except _FAILURES as error:
                journal.append(item.name, {"error": first_line(error)})
            else:
                journal.append(item.name, {**values, **measured, "error": None}, rows)
            bar.update()

    def _original(self, item: Item, image: Image.Image, pixels: Tensor, known: Record) -> None:
        """Keep the original's picture and features; refuse another picture of its name."""
        checksum = self._files.look_at(item)
        path = self._path("pictures", "original", item, ".png")
        if not path.is_file():
            _write_png(path, image, None)
        if known.get("checksum", checksum) != checksum:
            raise ValueError(
                f"{self._originals.folder} holds features of another picture named {item.name}: "
                "choose another --reference"
            )
        missing = self._lacking(known)
        if missing or not known:
            values, rows = self._extract(missing, pixels)
            self._originals.append(item.name, {"checksum": checksum, **values}, rows)

    def _code(
        self,
        candidate: Candidate,
        item: Item,
        image: Image.Image,
        files: dict[str, tuple[bytes, Record]],
    ) -> tuple[Record, Image.Image]:
        """Picture to file and back; ``files`` holds those of this picture by stream."""
        if candidate.stream not in files:
            files[candidate.stream] = self._encode(candidate, item, image)
        data, values = files[candidate.stream]
        path = self._path("streams", candidate.info.slug, item, candidate.info.suffix)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        data = path.read_bytes()
        started = time.perf_counter()
        with self.clock.on("codec"):
            restored = candidate.decode(data, image.size)
        seconds = time.perf_counter() - started
        if restored.size != image.size:
            raise ValueError(
                f"decoded to {restored.width}x{restored.height} pixels, the original has "
                f"{image.width}x{image.height}"
            )
        picture = self._path("pictures", candidate.info.slug, item, ".png")
        details = candidate.details(data)
        _write_png(picture, restored, details.metadata)
        values = {**values, **details.columns, "decode_seconds": seconds}
        return values, restored

    def _encode(self, candidate: Candidate, item: Item, image: Image.Image) -> tuple[bytes, Record]:
        target = None
        if candidate.rate is not None:
            anchor, factor = candidate.rate
            size = self._sizes.get((anchor, item.name))
            if size is None:
                raise ValueError(f"{anchor} has no file of this picture to match the size of")
            target = int(size * factor)
        started = time.perf_counter()
        encoded = candidate.encode(image, item.caption or "", target)
        seconds = time.perf_counter() - started
        self.clock.seconds["codec"] += seconds - encoded.other_seconds
        size = len(encoded.data)
        self._sizes[candidate.stream, item.name] = size
        return encoded.data, {
            "width": image.width,
            "height": image.height,
            "bytes": size,
            "bpp": 8 * size / (image.width * image.height),
            "encode_seconds": seconds if encoded.seconds is None else encoded.seconds,
            "at_smallest": int(encoded.at_smallest),
        }

    def _load(self, candidate: Candidate, item: Item) -> Image.Image:
        with Image.open(self._path("pictures", candidate.info.slug, item, ".png")) as picture:
            return picture.convert("RGB")

    def _measure(
        self, part: _Todo, original: Original, restored: Image.Image
    ) -> tuple[Record, dict[str, Rows]]:
        pixels, values = self._pixels(restored), {}
        for name in sorted(part.pairs):
            metric = self.task.suite.pairs[name]
            with self.clock.on("networks" if metric.network else "pixels"):
                values[name] = metric(original, pixels)
        more, rows = self._extract(sorted(part.features), pixels)
        return {**values, **more}, rows

    def _extract(self, names: Sequence[str], pixels: Tensor) -> tuple[Record, dict[str, Rows]]:
        """Features by set; a picture that is too small for a set is marked as having none."""
        image = (pixels * 255).round().to(torch.uint8)
        values, rows = {}, {}
        for name in names:
            with self.clock.on("networks"):
                found = self.task.suite.extractors[name](image)
            if found is None:
                values[_none_of(name)] = True
            else:
                rows[name] = found
        return values, rows

    def _pixels(self, image: Image.Image) -> Tensor:
        return ((image_to_tensor(image)[None] + 1) / 2).clamp(0, 1).to(self.task.device)

    def _path(self, kind: str, slug: str, item: Item, suffix: str) -> Path:
        folder = self.task.output / kind / slug
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{item.name}{suffix}"

    # -- results -------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Distances of sets, by all processes; files, by the first."""
        processes, codecs = self.task.processes, self._described["codecs"]
        originals = self._originals.read() if self.task.suite.sets else {}
        entries: dict[str, dict[str, Any]] = {}
        with self.clock.on("sets"):
            for slug in processes.share(list(codecs)):
                entries[slug] = self._entry(slug, codecs[slug], originals)
        gathered = processes.gather((entries, dict(self.clock.seconds)))
        everything = {slug: entry for part, _ in gathered for slug, entry in part.items()}
        results = {
            "schema": SCHEMA,
            "protocol": self._described["protocol"]
            | {
                "data": self.task.protocol.data,
                "images": len(self.task.protocol.items),
                "checksum": self._files.checksum(self.task.protocol.items),
            },
            **provenance(),
            "environment": environment(device=self.task.device, processes=processes.count),
            "codecs": [everything[slug] for slug in codecs],
            "absent_codecs": self.task.absent_codecs,
            "timing": _timing([seconds for _, seconds in gathered]),
        }
        if processes.is_first:
            write_table(self.task.output / "images.csv", ((s, self._good(s)) for s in codecs))
            write_json(self.task.output / "results.json", results)
        return results

    def _records(self, slug: str) -> list[Record]:
        """A record for every picture, in their order; those without values have an error."""
        records = Journal(self.task.output / "records" / slug).read()
        missing = "not evaluated: repeat the command that names this codec"
        return [
            records.get(item.name) or {"image": item.name, "error": missing}
            for item in self.task.protocol.items
        ]

    def _good(self, slug: str) -> list[Record]:
        return [record for record in self._records(slug) if record.get("error") is None]

    def _entry(
        self, slug: str, described: dict[str, Any], originals: dict[str, Record]
    ) -> dict[str, Any]:
        """What results.json says of a codec."""
        records = self._records(slug)
        good = [record for record in records if record.get("error") is None]
        suite = self.task.suite
        # An earlier command may have measured what this one cannot.
        absent = {
            name: why
            for name, why in suite.absent.items()
            if not good or any(record.get(name) is None for record in good)
        }
        for name, metric in suite.pairs.items():
            unmeasured = sum(name not in record for record in good)
            lacking = sum(record.get(name) is None for record in good)
            if unmeasured:
                absent[name] = (
                    f"{unmeasured} of {len(good)} pictures were not measured: repeat the command "
                    "that names this codec"
                )
            elif lacking:
                absent[name] = f"{lacking} of {len(good)} pictures have none: needs {metric.needs}"
        sets = {}
        for name in suite.sets:
            try:
                sets[name] = self._distance(name, slug, good, originals)
            except AbsentError as error:
                absent[name] = str(error)
        at_smallest = sum(record.get("at_smallest", 0) for record in good)
        return {
            **{key: value for key, value in described.items() if key != "identity"},
            "at_smallest": at_smallest > 0,
            "at_smallest_images": at_smallest,
            "images": len(good),
            "failures": [
                {"image": record["image"], "error": record["error"]}
                for record in records
                if record.get("error") is not None
            ],
            "summary": summarise(good),
            "set_metrics": sets,
            "absent": absent,
        }

    def _distance(
        self, name: str, slug: str, good: Sequence[Record], originals: dict[str, Record]
    ) -> float:
        """A metric of two sets: the pictures that this codec has, and their originals."""
        wanted = self.task.suite.features_of(name)
        journal = Journal(self.task.output / "records" / slug)
        having = [record for record in good if has_features(record, wanted)]
        if len(having) < len(good) or not having:
            raise AbsentError(f"{len(having)} of {len(good)} pictures have features for it")
        restored = [journal.rows(record, wanted) for record in having]
        original = [self._originals.rows(originals[r["image"]], wanted) for r in having]
        return self.task.suite.sets[name](original, restored)


def _none_of(name: str) -> str:
    return f"no {name}"


def _looked_at(record: Record, name: str) -> bool:
    """Whether features of a set were computed, or found impossible."""
    return has_features(record, name) or _none_of(name) in record


def _write_png(path: Path, image: Image.Image, metadata: Any) -> None:
    with atomic_path(path) as temporary:
        # Fast rather than small: level 6 takes three times as long for 5 % less.
        image.save(temporary, format="PNG", compress_level=1, pnginfo=metadata)


def _timing(parts: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Seconds of all processes together. ``overhead`` is what the pictures took, without the
    metrics' networks, relative to the codecs' own calls; None if no codec was called."""
    total = {key: sum(part.get(key, 0.0) for part in parts) for part in parts for key in part}
    codec, networks = total.get("codec", 0.0), total.get("networks", 0.0)
    pictures, count = total["pictures"], total["count"]
    return {
        "pictures": count,
        "seconds": pictures,
        "codec_seconds": codec,
        "network_metric_seconds": networks,
        "pixel_metric_seconds": total.get("pixels", 0.0),
        "set_metric_seconds": total.get("sets", 0.0),
        "overhead": (pictures - networks) / codec if codec else None,
        "pictures_per_second_and_process": count / pictures if count else None,
    }
