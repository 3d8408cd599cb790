"""Files: outputs that appear whole or not at all, and the pictures in a folder."""

from __future__ import annotations

import os
import pickle
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What torch.load raises for a damaged file or another file. pickle is imported for the name of its
# error: nothing here unpickles objects, every load is weights_only.
DAMAGED_WEIGHTS = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    pickle.UnpicklingError,
)
_PRIVATE = 0o600
IMAGE_SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif"),
    )
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file that becomes `path` when the block succeeds.

    The temporary file lies in the same folder, is hidden, has the same suffix and the permissions
    of any new file (umask). It replaces `path` in one step, so that no other process ever sees a
    half-written file. If the block raises, whatever it raises, the temporary file is removed and
    `path` is left as it was. A symbolic link is followed, not replaced.

    Args:
        path: The file to write; its folder must exist.

    Raises:
        ValueError: `path` exists and is no regular file: replacing a folder, a device or a pipe
            is never meant.
        OSError: The folder is missing or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{path}: is not a regular file, choose another output file")
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def give_usual_permissions(folder: Path) -> None:
    """Make weights below a folder as readable as any new file there (umask).

    safetensors writes a temporary file that its owner alone may read, and renames it.
    """
    probe = folder / f".{secrets.token_hex(8)}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        if stat.S_IMODE(path.stat().st_mode) == _PRIVATE:
            path.chmod(mode)


def list_images(folder: Path) -> list[Path]:
    """The pictures in `folder` and below: files whose suffix is in `IMAGE_SUFFIXES`.

    See `list_files`.
    """
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: Path, suffixes: frozenset[str] | None) -> list[Path]:
    """The files in `folder` and below, sorted by path, without hidden files and folders.

    Only suffixes, in any case, of the given set (lower case); None is all. Symbolic links to
    folders are not followed.

    Raises:
        ValueError: `folder` is not a folder.
        OSError: A folder cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".")
            and (suffixes is None or Path(name).suffix.lower() in suffixes)
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error
