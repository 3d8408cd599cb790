"""WebDataset shards: finding them, reading them, trying again when a source fails."""

from __future__ import annotations

import glob
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from percov2.data.faults import FaultError
from percov2.data.samples import RawSample
from percov2.messages import one_line

_BLOCK = tarfile.BLOCKSIZE
_READ_SIZE = 1 << 16
# Whatever a broken source, pipe or archive raises; ValueError is webdataset's for names that an
# archive holds twice.
_UNREADABLE = (OSError, HTTPException, tarfile.TarError, EOFError, ValueError)
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# The client's fault, but not for ever: time-out and too many requests.
_PASSING_STATUS = (408, 429)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and how long to wait for a source that fails.

    Attributes:
        attempts: to read a shard, the first included.
        first_wait: seconds before the second attempt, doubled before each further one.
        longest_wait: seconds, at most.
        timeout: seconds without a byte from an HTTP source that count as failure.

    Raises:
        ValueError: no attempt, or a negative time.
    """

    attempts: int = 5
    first_wait: float = 1.0
    longest_wait: float = 30.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.first_wait, self.longest_wait) < 0 or self.timeout <= 0:
            raise ValueError(f"{self}: attempts must be at least 1, times must not be negative")


DEFAULT_RETRY = Retry()
"""Five attempts within 15 seconds of waiting."""


def scheme_of(shard: str) -> str:
    """`http`, `pipe`, ... of a URL; "" of a path."""
    return urlparse(shard).scheme


def expand_shards(pattern: str | list[str]) -> list[str]:
    """Shell patterns, braces (`{00000..00999}`) and URLs to a sorted list of shards.

    Gaps in the numbering are fine: a shell pattern skips them; a path out of braces that does not
    exist stays in the list and is counted as a fault whenever it is its turn.

    Raises:
        ValueError: nothing matches, or a URL of an unknown kind.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    shards: set[str] = set()
    for one in (url for text in patterns for url in expand_urls(text)):
        scheme = scheme_of(one)
        if scheme and scheme not in gopen_schemes and scheme != "file":
            raise ValueError(f"{one!r} is a URL of unknown kind: use one of {sorted(_schemes())}")
        shards.update([one] if scheme or not glob.has_magic(one) else glob.glob(one))
    if not any(scheme_of(shard) or Path(shard).exists() for shard in shards):
        raise ValueError(f"no shard matches {pattern!r}: give the path of .tar files")
    return sorted(shards)


def _schemes() -> set[str]:
    return {name for name in gopen_schemes if not name.startswith("_")} | {"file"}


def read_shard(shard: str, *, start: int, retry: Retry) -> Iterator[tuple[int, RawSample]]:
    """Samples of a shard with their numbers, from number ``start`` on.

    After a failure that may pass, the shard is opened again and read on behind the last sample.

    Raises:
        FaultError: `missing_shard` if not one sample could be read, else `damaged_shard`; samples
            before the damage have been yielded.
    """
    following = start
    for attempt in range(retry.attempts):
        if attempt:
            time.sleep(min(retry.longest_wait, retry.first_wait * 2 ** (attempt - 1)))
        try:
            for number, raw in enumerate(_samples(shard, retry.timeout)):
                if number >= following:
                    following = number + 1
                    yield number, raw
            return
        except _UNREADABLE as error:
            failure = error
            if _is_permanent(shard, error):
                break
    lost = isinstance(failure, OSError | HTTPException)
    kind = "missing_shard" if lost and following == start else "damaged_shard"
    passing = lost and not _is_permanent(shard, failure)
    raise FaultError(kind, one_line(failure), where=shard, passing=passing) from failure


def _is_permanent(shard: str, error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in _PASSING_STATUS
    if scheme_of(shard) in ("", "file"):
        # The bytes of a file will be the same next time; a network file system may recover.
        return isinstance(error, _GONE) or not isinstance(error, OSError)
    return isinstance(error, ValueError) and not isinstance(error, OSError)


def _open(shard: str, timeout: float) -> Any:
    # webdataset would start curl here, which waits for ever for a source that stalls.
    if scheme_of(shard) in ("http", "https"):
        return urllib.request.urlopen(shard, timeout=timeout)
    try:
        return gopen(shard)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of a hub's client: a connection that fails is none of the above
        raise OSError(one_line(error)) from error


def _samples(shard: str, timeout: float) -> Iterator[RawSample]:
    with closing(_open(shard, timeout)) as source:
        samples: Iterator[RawSample] = group_by_keys(_members(shard, source))
        yield from samples


def _members(shard: str, source: Any) -> Iterator[dict[str, Any]]:
    """Files of an archive as webdataset's `group_by_keys` takes them."""
    with tarfile.open(
        fileobj=source, mode="r|*", bufsize=_READ_SIZE, tarinfo=_StrictTarInfo
    ) as archive:
        for member in archive:
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None, member.name
                yield {"fname": member.name, "data": file.read(), "__url__": shard}
            # Or the headers of a whole shard would pile up.
            archive.members = []  # type: ignore[attr-defined]
    # To the end, behind the archive's own: whoever sends would fail if the padding were not taken.
    while source.read(_READ_SIZE):
        pass


class _StrictTarInfo(tarfile.TarInfo):
    """A header; one that is damaged or missing is an error, not the end of the archive.

    An archive ends with blocks of zeros. `tarfile` also takes a bad header behind the first one
    for the end, so that a truncated shard would look like a short one.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        if len(buf) == _BLOCK and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what means "the end"
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{one_line(error)}: the archive is truncated") from error
