from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from percov2.files import atomic_path, list_images

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


def write_and_fail(target: Path, failure: type[BaseException]) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise failure


def test_success_moves_the_file_into_place(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    with pytest.raises(failure):
        write_and_fail(target, failure)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_failure_without_an_old_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "out.png", RuntimeError)
    assert list(tmp_path.iterdir()) == []


@posix_only
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_new_file(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        with atomic_path(tmp_path / "out"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~umask


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "missing" / "out"):
        pytest.fail("the block must not run")


def test_folder_as_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"), atomic_path(tmp_path):
        pytest.fail("the block must not run")


@posix_only
def test_device_as_target_is_refused() -> None:
    with pytest.raises(ValueError, match="not a regular file"), atomic_path(Path(os.devnull)):
        pytest.fail("the block must not run")


@posix_only
def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.bin"
    link.symlink_to(tmp_path / "real" / "out.bin")
    with atomic_path(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "out.bin").read_bytes() == b"new"


def test_list_images(tmp_path: Path) -> None:
    names = ["b.PNG", "a.jpeg", "sub/c.tif", "sub/deep/d.AvIf", "sub-2/e.webp", "a.jpeg.gif"]
    others = ["notes.txt", ".hidden.png", ".cache/f.png", "png", "g.pcv2", "._a.jpg"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == [
        "a.jpeg",
        "a.jpeg.gif",
        "b.PNG",
        "sub/c.tif",
        "sub/deep/d.AvIf",
        "sub-2/e.webp",
    ]


def test_list_images_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        list_images(tmp_path / "missing")
