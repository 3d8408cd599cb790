"""The files of a finished run: results.json, and images.csv with a row for a picture and codec."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from percov2 import __version__
from percov2.evaluation.journal import Record
from percov2.evaluation.metrics import PAIR_METRICS
from percov2.files import atomic_path

COLUMNS = (
    "slug",
    "image",
    "width",
    "height",
    "bytes",
    "bpp",
    "header_bytes",
    "caption_bytes",
    "token_bytes",
    *PAIR_METRICS,
    "encode_seconds",
    "decode_seconds",
    "at_smallest",
    "token_saving_against_uniform",
)
_NOT_SUMMED = ("slug", "image", "width", "height", "at_smallest")
_PACKAGES = (
    "torch",
    "torchvision",
    "torchmetrics",
    "torch-fidelity",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "imagecodecs",
    "pillow-heif",
    "compressai",
)


def summarise(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every column over the pictures that have a value."""
    summary = {}
    for column in COLUMNS:
        if column in _NOT_SUMMED:
            continue
        values = [record[column] for record in records if record.get(column) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[column] = {"mean": statistics.fmean(values), "std": spread}
    return summary


def write_table(path: Path, rows: Iterable[tuple[str, Iterable[Record]]]) -> None:
    """images.csv; a value that is absent is an empty cell.

    Args:
        path: to write.
        rows: records by slug; records with an error are left out, they have no values.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for slug, records in rows:
            writer.writerows({**record, "slug": slug} for record in records)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def provenance() -> dict[str, Any]:
    """When, by what command and from which commit results were made."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "commit": _commit(),
    }


def environment(*, device: str, processes: int) -> dict[str, Any]:
    """Versions and hardware."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "percov2": __version__}
    for package in _PACKAGES:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return found | {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _cpu() -> str:
    """The processor's name; Python's own answer is often only its architecture."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this package's sources, None where they are no repository's."""
    folder = Path(__file__).parent
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        return _git(folder, "rev-parse", "HEAD") if tracked is not None else None
    except FileNotFoundError:
        return None  # there is no git


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
