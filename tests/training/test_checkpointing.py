"""Checkpoints appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from percov2.training.checkpointing import (
    AtomicCheckpointIO,
    compare_shapes,
    latest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    replace_folder,
    resolve_checkpoint,
    shapes_of,
)


def _state(value: float, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((size,), value)}, "global_step": int(value)}


def _folder(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "shard").write_text(content)
    return path


@contextmanager
def _disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond a number of bytes: the system's answer is that of a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "made" / "last.ckpt"
    for value in (1.0, 2.0):
        io.save_checkpoint(_state(value), path)
        loaded = io.load_checkpoint(path)
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((1000,), value))
    assert list(path.parent.iterdir()) == [path]


def test_checkpoints_are_read_memory_mapped(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(_state(1.0), path)
    weight = io.load_checkpoint(path)["state_dict"]["weight"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    # A later checkpoint takes the name; what was read of the earlier one stays as it was.
    io.save_checkpoint(_state(2.0), path)
    assert torch.all(weight == 1)
    weight.add_(3)
    assert torch.all(io.load_checkpoint(path)["state_dict"]["weight"] == 2)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(_state(1.0), path)
    with _disk_of(100_000), pytest.raises(ValueError, match="File too large") as raised:
        io.save_checkpoint(_state(2.0, size=10**6), path)
    assert str(path) in str(raised.value)
    assert "free space" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert read_checkpoint(path)["global_step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "last.ckpt"
    with pytest.raises(ValueError, match=r"cannot save checkpoint .*write permission"):
        AtomicCheckpointIO().save_checkpoint(_state(1.0), path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_missing_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"Permission denied.*write permission"):
        AtomicCheckpointIO().save_checkpoint(_state(1.0), tmp_path / "last.ckpt")
    tmp_path.chmod(0o700)


def _save_forever(path: Path) -> None:
    torch.set_num_threads(1)  # threads that have run before a fork are not there after it
    step = 1
    while True:
        AtomicCheckpointIO().save_checkpoint(_state(step, size=500_000), path)
        step += 1


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, draw = tmp_path / "last.ckpt", random.Random(0)
    AtomicCheckpointIO().save_checkpoint(_state(0), path)
    interrupted = 0
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=_save_forever, args=(path,))
        process.start()
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2:  # until it has begun to save
            assert time.monotonic() < deadline
        time.sleep(draw.uniform(0.0, 0.004))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += len(list(tmp_path.iterdir())) > 1
        remove_leftovers(tmp_path)
        state = read_checkpoint(path)
        assert torch.all(state["state_dict"]["weight"] == state["global_step"])
        assert latest_checkpoint(tmp_path) == path
    assert interrupted  # or no kill fell into a save
    (tmp_path / ".last.ckpt").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(_state(1), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    old = _folder(tmp_path / "last.ckpt", "old")
    replace_folder(_folder(tmp_path / ".last.ckpt", "new"), old)
    assert (old / "shard").read_text() == "new"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_replaces_what_else_has_its_name(tmp_path: Path, kind: str) -> None:
    target, other = tmp_path / "last.ckpt", _folder(tmp_path / "other.ckpt", "other")
    target.write_text("") if kind == "file" else target.symlink_to(other.name)
    replace_folder(_folder(tmp_path / ".last.ckpt", "new"), target)
    assert (target / "shard").read_text() == "new"
    assert (other / "shard").read_text() == "other"
    assert sorted(tmp_path.iterdir()) == [target, other]


def test_an_interrupted_replacement_is_found_and_then_finished(tmp_path: Path) -> None:
    # The moment between the two renames.
    replaced = _folder(tmp_path / "last.ckpt.replaced", "old")
    hidden = _folder(tmp_path / ".last.ckpt", "new")
    assert latest_checkpoint(tmp_path) == replaced
    target = tmp_path / "last.ckpt"
    replace_folder(hidden, target)
    assert latest_checkpoint(tmp_path) == target
    # A kill while the old one is deleted: it is newer by date, and no longer whole.
    _folder(tmp_path / "last.ckpt.replaced", "half")
    assert latest_checkpoint(tmp_path) == target
    replace_folder(_folder(tmp_path / ".last.ckpt", "newer"), target)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "shard").read_text() == "newer"


def test_the_latest_checkpoint_is_the_youngest_whole_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    for age, name in enumerate(["step=10.ckpt", "step=9.ckpt", "last.ckpt"]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".abcdef.ckpt").write_text("half")
    (tmp_path / "gone.ckpt").symlink_to("deleted.ckpt")
    (tmp_path / "notes.txt").write_text("")
    assert latest_checkpoint(tmp_path) == tmp_path / "step=10.ckpt"
    os.utime(_folder(tmp_path / "step=11.ckpt", "shard"), (2000, 2000))
    assert latest_checkpoint(tmp_path) == tmp_path / "step=11.ckpt"


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "last.ckpt", tmp_path / ".gitignore"]
    for path in (*kept, tmp_path / ".a1.ckpt"):
        path.write_text("")
    _folder(tmp_path / ".step=3.ckpt", "half")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_are_removed(tmp_path: Path, sharded: bool) -> None:
    path = tmp_path / "last.ckpt"
    _folder(path, "x") if sharded else path.write_text("x")
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_what_ckpt_path_means(tmp_path: Path) -> None:
    assert resolve_checkpoint(None, [tmp_path]) is None
    assert resolve_checkpoint("auto", [tmp_path]) is None
    path = tmp_path / "step=1.ckpt"
    path.write_text("")
    assert resolve_checkpoint("auto", [tmp_path]) == path
    assert resolve_checkpoint(str(path), [tmp_path]) == path
    with pytest.raises(ValueError, match=r"no\.ckpt does not exist.*auto"):
        resolve_checkpoint(str(tmp_path / "no.ckpt"), [tmp_path])


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "last.ckpt"
    if content is None:  # a checkpoint whose second half is missing
        torch.save(_state(1.0), path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*choose another") as raised:
        read_checkpoint(path, meta=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [3, [], {}, {"state_dict": 3}])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"damaged.*choose another"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_weights_of_another_model_are_named() -> None:
    found = {"a": (1,), "b": (2, 3), "old": (1,)}
    expected = {"a": (1,), "b": (2, 4), "x": (1,), "y": (1,), "z": (1,)}
    with pytest.raises(
        ValueError, match=r"x\.ckpt.*FlowStage: 3 weights are missing \(x, y"
    ) as got:
        compare_shapes(Path("x.ckpt"), found, expected, stage="FlowStage")
    assert "1 weights are unknown (old)" in str(got.value)
    assert "b (2, 3) instead of (2, 4)" in str(got.value)
    compare_shapes(Path("x.ckpt"), expected, expected, stage="FlowStage")
    assert shapes_of({"a": torch.zeros(2, 3)}) == {"a": (2, 3)}


def test_a_checkpoint_reaches_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents first, then the name, then the folder that holds the name."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        order.append(kind)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert order == ["file", "name", "folder"]
