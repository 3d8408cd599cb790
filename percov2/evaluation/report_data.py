"""What an evaluation wrote: `results.json` and `images.csv`, read and checked."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = 2
"""Version of `results.json` that this package writes and reads."""
RESULTS_NAME, IMAGES_NAME = "results.json", "images.csv"
PICTURES_NAME, ORIGINAL_NAME = "pictures", "original"
OURS = "percov2"
"""`CodecResult.family` of this package's own codec."""

_CELLS = {"": float("nan"), "False": 0.0, "True": 1.0}
_REQUIRED_COLUMNS = ("slug", "image", "width", "height", "bytes", "bpp")


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A mean over images and its standard deviation (None where there is none)."""

    mean: float
    std: float | None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image that a codec could not process, and what it said."""

    image: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was measured on.

    Attributes:
        name: of the protocol, such as "kodak".
        crop: how the images were cropped or resized.
        data: name of the folder of images.
        images: how many there are.
        checksum: of the images' names and files.
    """

    name: str
    crop: str
    data: str
    images: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class CodecResult:
    """A codec in one setting.

    Attributes:
        codec: the codec's name, the same in all its settings, such as "percov2 tiny".
        family: what kind of codec it is; `OURS` for this package's.
        setting: what was chosen, such as ``{"steps": 4, "guidance": 1.0}``.
        label: codec and setting for people; unique.
        slug: codec and setting in file names; unique.
        at_smallest: the codec's smallest file, larger than the rate that was asked for.
        images: how many images were measured.
        failures: images that failed.
        summary: of what is measured per image, by metric.
        set_metrics: of what is measured on the whole set, by metric.
        absent: why a metric is missing, by metric.
        names: the images in `columns`, in the order of the file.
        columns: the numeric columns of `images.csv`, each of shape (len(names),), NaN where a cell
            is empty.
        directory: the evaluation's folder.
    """

    codec: str
    family: str
    setting: Mapping[str, Any]
    label: str
    slug: str
    at_smallest: bool
    images: int
    failures: tuple[Failure, ...]
    summary: Mapping[str, Statistic]
    set_metrics: Mapping[str, float]
    absent: Mapping[str, str]
    names: tuple[str, ...]
    columns: Mapping[str, NDArray[np.float64]]
    directory: Path

    def value(self, metric: str) -> float | None:
        """The metric on the set of images: the summary's mean, or measured on the whole set.

        A column of `images.csv` that has no summary, such as the bytes, is averaged here.
        """
        if metric in self.summary:
            return self.summary[metric].mean
        if metric in self.set_metrics:
            return self.set_metrics[metric]
        column = self.columns.get(metric)
        if column is None or np.isnan(column).all():
            return None
        return float(np.nanmean(column))

    def picture(self, image: str) -> Path:
        """Where the decoded picture lies, if it was kept."""
        return self.directory / PICTURES_NAME / self.slug / f"{image}.png"


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation, or several of the same protocol together (`merge`).

    Attributes:
        protocol: what was measured on.
        created: when, in ISO 8601.
        command: the command line.
        commit: of the source tree; None where there is none.
        environment: versions and hardware, for people.
        codecs: what was measured.
        absent_codecs: why a codec that was asked for could not be measured, by name.
        directories: where it was read from.
    """

    protocol: Protocol
    created: str
    command: tuple[str, ...]
    commit: str | None
    environment: Mapping[str, Any]
    codecs: tuple[CodecResult, ...]
    absent_codecs: Mapping[str, str]
    directories: tuple[Path, ...]

    @property
    def image_names(self) -> tuple[str, ...]:
        """Every image that some codec has processed, sorted."""
        return tuple(sorted({name for codec in self.codecs for name in codec.names}))

    def codec(self, slug: str) -> CodecResult:
        """The codec of that slug.

        Raises:
            ValueError: there is none.
        """
        codecs = {codec.slug: codec for codec in self.codecs}
        if slug not in codecs:
            raise ValueError(f"no {slug} in {self.directories[0]}: choose of {', '.join(codecs)}")
        return codecs[slug]

    def original(self, image: str) -> Path | None:
        """The original picture, as the codecs got it; None if it was not kept."""
        for directory in self.directories:
            path = directory / PICTURES_NAME / ORIGINAL_NAME / f"{image}.png"
            if path.is_file():
                return path
        return None

    def kept_original(self, image: str) -> Path:
        """The same, where it is needed.

        Raises:
            ValueError: it was not kept.
        """
        path = self.original(image)
        if path is None:
            raise ValueError(f"the original {image} was not kept: evaluate it again")
        return path


def read_results(directory: str | Path) -> Results:
    """Read `results.json` and `images.csv` of an evaluation.

    `results.json` is an object (schema 2; other fields are ignored)::

        {"schema": 2,
         "protocol": {"name": str, "crop": str, "data": str, "images": int, "checksum": str},
         "created": str,              ISO 8601
         "command": [str, ...],
         "commit": str | null,
         "environment": {str: any},
         "codecs": [
           {"codec": str, "family": str, "setting": {str: any}, "label": str, "slug": str,
            "at_smallest": bool, "images": int,
            "failures": [{"image": str, "error": str}, ...],
            "summary": {metric: {"mean": number, "std": number | null}},   over the images
            "set_metrics": {metric: number},                               on the whole set
            "absent": {metric: str}},                                      reason
           ...],
         "absent_codecs": {str: str}}     reason by name; may be left out

    A metric that could not be measured is left out, or null; it should have its reason in
    "absent". Labels and slugs are unique.

    `images.csv` has a row per image and codec with the columns `slug`, `image`, `width`, `height`,
    `bytes` and `bpp`; all further columns are numbers, or True and False. An empty cell means
    absent.

    Raises:
        ValueError: A file is not of this layout; the message names file and field.
        OSError: A file cannot be read.
    """
    directory = Path(directory)
    path = directory / RESULTS_NAME
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    schema = _take(str(path), root, "schema", int)
    if schema != SCHEMA:
        raise ValueError(
            f"{path}: field schema is {schema}, this version of percov2 reads {SCHEMA}: "
            "use the version that wrote it"
        )
    images = _read_images(directory / IMAGES_NAME)
    protocol, where = _take(str(path), root, "protocol", dict), f"{path}: protocol"
    codecs = tuple(
        _codec(f"{path}: codecs[{index}]", record, images, directory)
        for index, record in enumerate(_take(str(path), root, "codecs", list))
    )
    _check_unique(codecs, str(path))
    strays = images.keys() - {codec.slug for codec in codecs}
    if strays:
        raise ValueError(
            f"{directory / IMAGES_NAME}: column slug has {min(strays)!r}, which is not in {path}"
        )
    return Results(
        protocol=Protocol(
            name=_take(where, protocol, "name", str),
            crop=_take(where, protocol, "crop", str),
            data=_take(where, protocol, "data", str),
            images=_take(where, protocol, "images", int),
            checksum=_take(where, protocol, "checksum", str),
        ),
        created=_take(str(path), root, "created", str),
        command=_strings(str(path), root, "command"),
        commit=_take(str(path), root, "commit", (str, type(None))),
        environment=_take(str(path), root, "environment", dict),
        codecs=codecs,
        absent_codecs=_reasons(str(path), root.get("absent_codecs", {}), "absent_codecs"),
        directories=(directory,),
    )


def merge(runs: Sequence[Results]) -> Results:
    """Several evaluations of the same protocol as one, with the first one's description.

    Raises:
        ValueError: They differ in protocol, crop or images, or have a codec in common.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("name", "crop", "images", "checksum"):
            ours, theirs = getattr(first.protocol, name), getattr(run.protocol, name)
            if ours != theirs:
                raise ValueError(
                    f"{run.directories[0] / RESULTS_NAME}: field protocol.{name} is {theirs!r}, "
                    f"but {ours!r} in {first.directories[0]}: only results of one protocol compare"
                )
    codecs = tuple(codec for run in runs for codec in run.codecs)
    _check_unique(codecs, " and ".join(str(run.directories[0]) for run in runs))
    directories = tuple(directory for run in runs for directory in run.directories)
    absent = {name: why for run in reversed(runs) for name, why in run.absent_codecs.items()}
    return replace(first, codecs=codecs, absent_codecs=absent, directories=directories)


def _codec(
    where: str,
    record: object,
    images: Mapping[str, tuple[tuple[str, ...], dict[str, NDArray[np.float64]]]],
    directory: Path,
) -> CodecResult:
    slug = _take(where, record, "slug", str)
    names, columns = images.get(slug, ((), {}))
    failures = _take(where, record, "failures", list)
    return CodecResult(
        codec=_take(where, record, "codec", str),
        family=_take(where, record, "family", str),
        setting=_take(where, record, "setting", dict),
        label=_take(where, record, "label", str),
        slug=slug,
        at_smallest=_take(where, record, "at_smallest", bool),
        images=_take(where, record, "images", int),
        failures=tuple(
            Failure(
                image=_take(f"{where}.failures[{index}]", failure, "image", str),
                error=_take(f"{where}.failures[{index}]", failure, "error", str),
            )
            for index, failure in enumerate(failures)
        ),
        summary=_statistics(f"{where}.summary", _take(where, record, "summary", dict)),
        set_metrics=_numbers(f"{where}.set_metrics", _take(where, record, "set_metrics", dict)),
        absent=_reasons(where, _take(where, record, "absent", dict), "absent"),
        names=names,
        columns=columns,
        directory=directory,
    )


def _statistics(where: str, record: Mapping[str, Any]) -> dict[str, Statistic]:
    statistics = {}
    for name in record:
        entry = _take(where, record, name, (dict, type(None)))
        if entry is None:
            continue
        mean = _take(f"{where}.{name}", entry, "mean", (int, float, type(None)))
        std = _take(f"{where}.{name}", entry, "std", (int, float, type(None)))
        if mean is not None:
            statistics[name] = Statistic(mean=float(mean), std=None if std is None else float(std))
    return statistics


def _numbers(where: str, record: Mapping[str, Any]) -> dict[str, float]:
    values = {name: _take(where, record, name, (int, float, type(None))) for name in record}
    return {name: float(value) for name, value in values.items() if value is not None}


def _reasons(where: str, record: object, name: str) -> dict[str, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: field {name} is {record!r}, expected dict")
    return {key: _take(f"{where}.{name}", record, key, str) for key in record}


def _strings(where: str, record: object, name: str) -> tuple[str, ...]:
    values = _take(where, record, name, list)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name}[{index}] is {value!r}, expected str")
    return tuple(values)


def _take(where: str, record: object, name: str, kind: type | tuple[type, ...]) -> Any:
    """The field of a JSON object, if it is of the kind; true and false do not count as numbers."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is {record!r}, expected an object")
    if name not in record:
        raise ValueError(f"{where}: field {name} is missing")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{where}: field {name} is {value!r}, expected {expected}")
    return value


def _check_unique(codecs: Sequence[CodecResult], where: str) -> None:
    for attribute in ("slug", "label"):
        seen: set[str] = set()
        for codec in codecs:
            value = getattr(codec, attribute)
            if value in seen:
                raise ValueError(f"{where}: {attribute} {value!r} occurs twice: leave one out")
            seen.add(value)


def _read_images(path: Path) -> dict[str, tuple[tuple[str, ...], dict[str, NDArray[np.float64]]]]:
    """By slug: the names of the images and the numeric columns."""
    names: dict[str, list[str]] = {}
    values: dict[str, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        missing = [column for column in _REQUIRED_COLUMNS if column not in header]
        if missing:
            raise ValueError(f"{path}: column {missing[0]} is missing")
        slug_at, image_at = header.index("slug"), header.index("image")
        numeric = [at for at in range(len(header)) if at not in (slug_at, image_at)]
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if len(row) != len(header):
                raise ValueError(f"{where}: has {len(row)} cells, expected {len(header)}")
            names.setdefault(row[slug_at], []).append(row[image_at])
            cells = [_number(where, header[at], row[at]) for at in numeric]
            values.setdefault(row[slug_at], []).append(cells)
    images = {}
    for slug, images_of_slug in names.items():
        if len(set(images_of_slug)) != len(images_of_slug):
            raise ValueError(f"{path}: slug {slug!r} has an image twice: evaluate it again")
        table = np.array(values[slug], dtype=np.float64)
        columns = {header[at]: table[:, index] for index, at in enumerate(numeric)}
        images[slug] = (tuple(images_of_slug), columns)
    return images


def _number(where: str, column: str, cell: str) -> float:
    if cell in _CELLS:
        return _CELLS[cell]
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"{where}: column {column} is {cell!r}, expected a number") from error
