"""What a run has done so far, on disk: records of pictures and rows of features.

Every process writes files of its own and only ever appends to them, so that processes on several
nodes share a folder without locks, and a killed run loses at most the line it was writing. A
reader merges all files: the number of processes may change when a run resumes.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
Rows = NDArray[np.float32]

_FEATURES = "features:"


class Journal:
    """Records of one codec by picture, and their features.

    Args:
        folder: is made when the first record is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = secrets.token_hex(8)
        self._maps: dict[str, Rows] = {}

    def append(
        self, image: str, values: Mapping[str, Any], features: Mapping[str, Rows] | None = None
    ) -> None:
        """Write down values and features of a picture; later ones replace those of equal name.

        Args:
            image: name of the picture.
            values: anything that JSON holds.
            features: rows (N, D) by name of the feature set. They are on disk before the record.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"image": image, "time": time.time(), **values}
        for name, rows in (features or {}).items():
            record[_FEATURES + name] = self._append_rows(name, rows)
        with (self.folder / f"{self._name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _append_rows(self, name: str, rows: Rows) -> dict[str, Any]:
        path = self.folder / f"{self._name}.{name}.f32"
        with path.open("ab") as file:
            start = file.tell()
            file.write(np.ascontiguousarray(rows, "<f4").tobytes())
        return {"file": path.name, "start": start, "shape": list(rows.shape)}

    def read(self) -> dict[str, Record]:
        """Records by picture, merged. An unfinished last line is left out.

        Raises:
            ValueError: a finished line that is no record.
        """
        merged: dict[str, Record] = {}
        for record in sorted(self._lines(), key=lambda record: float(record["time"])):
            merged.setdefault(record["image"], {}).update(record)
        return merged

    def _lines(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.jsonl")):
            text = path.read_text(encoding="utf-8")
            for line in text[: text.rfind("\n") + 1].splitlines():
                try:
                    record = json.loads(line)
                    known = {"image", "time"} <= record.keys()
                except (ValueError, AttributeError):
                    known = False
                if not known:
                    raise ValueError(
                        f"{path} holds a line that is no record: delete the file to measure its "
                        "pictures again"
                    )
                yield record

    def rows(self, record: Record, name: str) -> Rows:
        """Features (N, D) of a record, read when they are used.

        Raises:
            ValueError: the file is missing or too short.
        """
        place = record[_FEATURES + name]
        shape, path = tuple(place["shape"]), self.folder / place["file"]
        start = place["start"] // 4
        stop = start + math.prod(shape)
        if path.name not in self._maps or len(self._maps[path.name]) < stop:
            # One map a file: tens of thousands of maps are more than Linux allows a process.
            if not path.is_file() or path.stat().st_size < 4 * stop:
                raise ValueError(
                    f"{path} lacks features of {record['image']}: delete its folder to compute "
                    "them again"
                )
            self._maps[path.name] = np.memmap(path, dtype="<f4", mode="r")
        return self._maps[path.name][start:stop].reshape(shape)


def has_features(record: Record, name: str) -> bool:
    """Whether a record comes with features of this name."""
    return _FEATURES + name in record
