"""Shards are found, read, and read again when a source fails."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

import pytest

from percov2.data import shards
from percov2.data.faults import FaultError
from percov2.data.shards import Retry, expand_shards, read_shard
from tests.data.shard_factory import sample, write_shard, write_shards

QUICK = Retry(attempts=3, first_wait=0.001, longest_wait=0.002, timeout=5.0)


def numbers(shard: Path | str, *, start: int = 0, retry: Retry = QUICK) -> list[int]:
    return [int(raw["__key__"]) for _, raw in read_shard(str(shard), start=start, retry=retry)]


def read_until_fault(shard: Path | str) -> tuple[list[int], FaultError]:
    found: list[int] = []
    try:
        for _, raw in read_shard(str(shard), start=0, retry=QUICK):
            found.append(int(raw["__key__"]))
    except FaultError as fault:
        return found, fault
    pytest.fail(f"{shard} shows no fault")


def test_a_shard_gives_its_samples_in_order(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(3), sample(1)])
    (first, raw), (second, _) = read_shard(str(shard), start=0, retry=QUICK)
    assert (first, second) == (0, 1)
    assert raw == {**sample(3), "__url__": str(shard)}
    assert numbers(shard, start=1) == [1]
    assert numbers(shard, start=2) == []


def test_an_empty_archive_is_a_shard_without_samples(tmp_path: Path) -> None:
    assert numbers(write_shard(tmp_path / "a.tar", [])) == []


def test_every_truncation_is_found_and_costs_only_what_is_behind(tmp_path: Path) -> None:
    """Also one between two files or inside a header, which `tarfile` takes for the end."""
    whole = write_shard(tmp_path / "whole.tar", map(sample, range(3))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = {m.offset + more for m in members for more in (0, 100, 512, 520) if m.offset + more}
    for cut in sorted(cuts | {end, end - 1}):
        shard = tmp_path / "cut.tar"
        shard.write_bytes(whole[:cut])
        found, fault = read_until_fault(shard)
        assert fault.kind == "damaged_shard", cut
        assert fault.where == str(shard)
        # A sample is known to be complete when the first file of the next one was read.
        complete = sum(m.offset_data + m.size <= cut for m in members[3::3])
        assert found == list(range(complete)), cut


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", map(sample, range(3)))
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[3].offset
    data = bytearray(shard.read_bytes())
    data[place : place + 8] = b"\xff" * 8
    shard.write_bytes(data)
    found, fault = read_until_fault(shard)
    assert (found, fault.kind) == ([], "damaged_shard")


@pytest.mark.parametrize("content", [b"", b"no archive", bytes(5) + b"x" * 4000])
def test_other_files_are_damaged_shards(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert read_until_fault(tmp_path / "a.tar")[1].kind == "damaged_shard"


def test_a_missing_file_is_not_waited_for(tmp_path: Path) -> None:
    patient = Retry(attempts=5, first_wait=60.0)
    with pytest.raises(FaultError) as caught:
        list(read_shard(str(tmp_path / "0.tar"), start=0, retry=patient))
    assert caught.value.kind == "missing_shard"


def test_a_pipe_is_read_and_its_failure_seen(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", map(sample, range(3)))
    assert numbers(f"pipe:cat {shard}") == [0, 1, 2]
    found, fault = read_until_fault("pipe:exit 3")
    assert (found, fault.kind) == ([], "missing_shard")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """A sender that is slower than we are, with padding behind the archive's end."""
    shard, opened = write_shard(tmp_path / "a.tar", map(sample, range(3))), tmp_path / "opened"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(bytes(2**20))
    slow = (
        f"pipe:echo >> {opened}; head -c {size} {shard}; sleep 0.3; tail -c +{size + 1} {shard} "
        "|| exit 1"
    )
    assert numbers(slow) == [0, 1, 2]
    assert opened.read_text() == "\n"


def test_a_client_that_fails_in_its_own_way_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, asked = write_shard(tmp_path / "a.tar", map(sample, range(3))), []

    class ConnectError(Exception):
        pass

    def failing(name: str) -> IO[bytes]:
        asked.append(name)
        if len(asked) == 1:
            raise ConnectError("timed out")
        return shard.open("rb")

    monkeypatch.setattr(shards, "gopen", failing)
    assert numbers("hf://somewhere/a.tar") == [0, 1, 2]
    assert len(asked) == 2


class Server(ThreadingHTTPServer):
    """Serves one shard after a list of troubles, one per request."""

    def __init__(self, data: bytes, troubles: list[str | int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.troubles, self.requests = data, troubles, 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        trouble = self.server.troubles.pop(0) if self.server.troubles else 200
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        if trouble == "cut":
            self.wfile.write(self.server.data[:4000])
        elif trouble == "stall":
            time.sleep(0.5)
        elif trouble == 200:
            self.wfile.write(self.server.data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextmanager
def serving(data: bytes, *troubles: str | int) -> Iterator[tuple[str, Server]]:
    with Server(data, list(troubles)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a.tar", server
        server.shutdown()


def test_a_failing_server_is_asked_again_and_no_sample_comes_twice(tmp_path: Path) -> None:
    data = write_shard(tmp_path / "a.tar", map(sample, range(4))).read_bytes()
    with serving(data, 503, "cut") as (url, server):
        assert numbers(url) == [0, 1, 2, 3]
        assert server.requests == 3


def test_a_stalling_server_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    data = write_shard(tmp_path / "a.tar", map(sample, range(2))).read_bytes()
    retry = Retry(attempts=2, first_wait=0.001, timeout=0.1)
    with serving(data, "stall") as (url, server):
        assert numbers(url, retry=retry) == [0, 1]
        assert server.requests == 2


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (429, 3), (500, 3)])
def test_what_cannot_pass_is_asked_for_once(status: int, requests: int) -> None:
    with serving(b"", *[status] * 5) as (url, server):
        found, fault = read_until_fault(url)
        assert (found, fault.kind, server.requests) == ([], "missing_shard", requests)


def test_patterns_are_expanded_in_order_without_repeats(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 1, 1, 1, 1)
    (folder / "00001.tar").unlink()
    names = [str(folder / f"{number:05}.tar") for number in (0, 2, 3)]
    assert expand_shards(str(folder / "0*.tar")) == names
    assert expand_shards([names[2], names[0], str(folder / "0000[0-2].tar")]) == names


def test_a_gap_in_a_range_stays_to_be_counted(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 1, 1)
    (folder / "00000.tar").unlink()
    names = [str(folder / f"{number:05}.tar") for number in (0, 1)]
    assert expand_shards(str(folder / "{00000..00001}.tar")) == names


def test_urls_are_expanded_but_not_looked_for() -> None:
    urls = expand_shards("https://example.org/{00..02}.tar")
    assert urls == [f"https://example.org/0{number}.tar" for number in range(3)]
    with pytest.raises(ValueError, match=r"'x3://a.*unknown kind: use one of .*https"):
        expand_shards("x3://a/0.tar")


@pytest.mark.parametrize("pattern", ["9*.tar", ["7.tar", "8.tar"], [], "{7..9}.tar"])
def test_no_shard_is_refused(pattern: str | list[str]) -> None:
    with pytest.raises(ValueError, match="no shard matches"):
        expand_shards(pattern)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"first_wait": -1.0}, {"timeout": 0.0}])
def test_bad_retries_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        Retry(**options)  # type: ignore[arg-type]


class _Cut(io.BytesIO):
    """A response that breaks off: urllib says so by an exception that is no OSError."""

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        if not found:
            raise IncompleteRead(b"")
        return found


@pytest.mark.parametrize(("length", "kind"), [(300, "missing_shard"), (14000, "damaged_shard")])
def test_a_response_that_breaks_off_may_be_whole_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, kind: str
) -> None:
    whole = write_shard(tmp_path / "a.tar", map(sample, range(9))).read_bytes()
    monkeypatch.setattr(shards, "_open", lambda *_: _Cut(whole[:length]))
    found, fault = read_until_fault("http://somewhere/a.tar")
    assert (bool(found), fault.kind, fault.passing) == (length == 14000, kind, True)


def test_damage_to_a_file_does_not_pass(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", map(sample, range(9))).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:4000])
    assert not read_until_fault(tmp_path / "b.tar")[1].passing
