"""What `percov2.data.cache` keeps in `cache.json`: settings, and how far it has come with what."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from percov2.data.faults import FaultError
from percov2.data.stream import Item
from percov2.files import atomic_path

MANIFEST_NAME = "cache.json"


class CacheManifest:
    """Settings of a cache, its finished inputs, and how each input begins.

    Names of shards are the same in every data set (`00000`, and its first key too), so that an
    input is known by its first sample.

    Args:
        folder: of the cache.
        settings: that its content depends on, as JSON holds them.

    Raises:
        ValueError: the folder holds a cache that was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = folder / MANIFEST_NAME, settings
        self._finished: list[str] = []
        self._beginnings: dict[str, str] = {}
        if not self._path.is_file():
            return
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            before = found["settings"]
            changed = [name for name, value in settings.items() if before.get(name) != value]
            self._finished, self._beginnings = list(found["finished"]), dict(found["beginnings"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._path} is not of this version of percov2.data.cache: choose an empty folder"
            ) from error
        if changed:
            raise ValueError(
                f"{folder} holds a cache made with another {', '.join(changed)}: choose an empty "
                "folder"
            )

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run has written all of an input."""
        return name in self._finished

    def knows(self, name: str) -> bool:
        """Whether it is known how an input begins."""
        return name in self._beginnings

    def begin(self, name: str, items: Iterable[Item]) -> Iterable[Item]:
        """The same samples, after a look at the first one, which is written down.

        Raises:
            ValueError: the input of this name was another one in an earlier run.
        """
        iterator = iter(items)
        first = list(islice(iterator, 1))
        beginning = _beginning(first[0]) if first else None
        if beginning is not None:
            if self._beginnings.get(name, beginning) != beginning:
                raise ValueError(
                    f"{self._path.parent} holds a cache of other data of which a part is called "
                    f"{name}, too: choose an empty folder"
                )
            self._beginnings[name] = beginning
            self._write()
        return chain(first, iterator)

    def finish(self, name: str) -> None:
        """Write down that all of an input is there."""
        self._finished.append(name)
        self._write()

    def _write(self) -> None:
        content = {
            "settings": self._settings,
            "finished": self._finished,
            "beginnings": self._beginnings,
        }
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _beginning(item: Item) -> str | None:
    """Key and checksum of a sample; None for a fault, which may be another one next time."""
    if isinstance(item, FaultError):
        return None
    checksum = 0
    for name in sorted(item):
        if isinstance(item[name], bytes):
            checksum = zlib.crc32(item[name], checksum)
    return f"{item['__key__']} {checksum:08x}"
