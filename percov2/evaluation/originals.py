"""Which pictures a run is of, so that it goes on with the same ones only."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from percov2.evaluation.journal import Journal
from percov2.evaluation.protocols import Item


class OriginalFiles:
    """Checksums of the originals' files, kept with the run.

    A file of the size and time of change that were seen with its checksum is taken for the same;
    reading tens of thousands again would take minutes.

    Args:
        folder: of the journal.
    """

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder)
        self._known = self._journal.read()

    def is_seen(self, item: Item) -> bool:
        """Whether the file has been looked at, and is as it was then."""
        known = self._known.get(item.name)
        return known is not None and known["stamp"] == _stamp(item.path)

    def look_at(self, item: Item) -> int:
        """Checksum of the file.

        Raises:
            ValueError: it is not the picture that this run had under this name.
            OSError: it cannot be read.
        """
        stamp, checksum = _stamp(item.path), zlib.crc32(item.path.read_bytes())
        known = self._known.get(item.name)
        if known is not None and known["checksum"] != checksum:
            raise ValueError(
                f"{item.path} is not the picture that {self._journal.folder.parent} was made of "
                "under this name: choose another --output"
            )
        if known is None or known["stamp"] != stamp:
            record = {"stamp": stamp, "checksum": checksum}
            self._journal.append(item.name, record)
            self._known[item.name] = record
        return checksum

    def checksum(self, items: Sequence[Item]) -> str:
        """Of all pictures together, by all processes; a picture that nobody could read counts
        by its name alone."""
        known = self._journal.read()
        lines = (f"{item.name} {known.get(item.name, {}).get('checksum')}\n" for item in items)
        return f"{zlib.crc32(''.join(lines).encode()):08x}"


def _stamp(path: Path) -> list[int] | None:
    """Size in bytes and time of change in nanoseconds; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]
