"""Checkpoints that appear whole or not at all, and the choice of the one to resume from.

Lightning writes a checkpoint into the system's temporary folder and moves it from there: on
another disk that move is a copy, which a kill leaves half done under the final name. Here the
temporary lies beside its target, reaches the disk, and then takes the name in one step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from percov2.files import DAMAGED_WEIGHTS, atomic_path
from percov2.messages import one_line

SUFFIX = ".ckpt"
_REPLACED = ".replaced"
_RECORD = "percov2.json"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """`percov2.json` of a sharded checkpoint: what must fit when it is resumed.

    Attributes:
        zero_stage: 1, 2 or 3.
        processes: number of shards.
        stage: class name of the LightningModule.
        shapes: of all weights and buffers, unsharded.
    """

    zero_stage: int
    processes: int
    stage: str
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, checkpoint: Path) -> ShardRecord:
        """From a sharded checkpoint.

        Raises:
            ValueError: it has none.
        """
        try:
            fields = json.loads((checkpoint / _RECORD).read_text(encoding="utf-8"))
            shapes = {name: tuple(shape) for name, shape in fields.pop("shapes").items()}
            return cls(shapes=shapes, **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{checkpoint} is not a sharded checkpoint of percov2.fit ({error}): choose the "
                f"folder that holds {_RECORD}"
            ) from error

    def write(self, checkpoint: Path) -> None:
        """Into a sharded checkpoint."""
        text = json.dumps(asdict(self)) + "\n"
        (checkpoint / _RECORD).write_text(text, encoding="utf-8")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; reads memory-mapped; removes by renaming first.

    The tensors stream into and out of the file: no second copy of the model in memory, and not one
    per process. Paths with a protocol (``s3://``) are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint file.

        Raises:
            ValueError: the disk is full or the folder cannot be written to. Whatever had the name
                before is untouched.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with explain_failed_save(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent)
            with atomic_path(target) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            sync(target.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The content of a checkpoint file; its tensors are read when they are used.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        state: dict[str, Any] = torch.load(
            path, map_location=map_location, mmap=True, weights_only=weights_only
        )
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint; a sharded one, a folder, first loses its name."""
        target = Path(path)
        if is_local(path) and target.is_dir():
            hidden = hidden_path(target)
            os.rename(target, hidden)
            shutil.rmtree(hidden)
        else:
            super().remove_checkpoint(path)


def is_local(path: str | Path) -> bool:
    """Whether a path names a local file, not an object store's."""
    return bool(get_protocol(str(path)) == "file")


def hidden_path(target: Path) -> Path:
    """Where a folder is written before, or deleted after, it has the name `target`."""
    return target.with_name("." + target.name)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written in a folder of checkpoints."""
    for path in folder.glob(f".*{SUFFIX}"):
        remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(folder: Path) -> None:
    """Have the disk hold a folder's entries: without it a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Have the disk hold the content of all files below a folder, and its own entries."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def replace_folder(new: Path, target: Path) -> None:
    """Give `new` the name `target`.

    Folders cannot be exchanged in one step: for an instant there is only ``target.replaced``,
    which is whole and which `latest_checkpoint` then returns.
    """
    replaced = target.with_name(target.name + _REPLACED)
    if os.path.lexists(target):
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(target, replaced)
    os.rename(new, target)
    sync(target.parent)
    if os.path.lexists(replaced):
        remove(replaced)


def latest_checkpoint(*folders: Path) -> Path | None:
    """The checkpoint written last in some folders, a file or a folder itself; None without any.

    Hidden temporaries and links that point nowhere are not candidates.
    """
    found = [path for folder in folders for path in folder.glob(f"[!.]*{SUFFIX}") if path.exists()]
    found += [
        path
        for folder in folders
        for path in folder.glob(f"[!.]*{SUFFIX}{_REPLACED}")
        if not path.with_suffix("").exists()
    ]
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def resolve_checkpoint(choice: str | None, folders: Sequence[Path]) -> Path | None:
    """What ``--ckpt_path`` means.

    Args:
        choice: None to start anew, ``auto`` for the latest checkpoint if there is one, or a path.
        folders: of the run's checkpoints.

    Raises:
        ValueError: there is no such path, or no folder to look into.
    """
    if choice is None:
        return None
    if choice == "auto":
        if not folders:
            raise ValueError(
                "--ckpt_path auto: no callback writes checkpoints: add "
                "percov2.training.callbacks.LastCheckpoint to trainer.callbacks, or leave it out"
            )
        return latest_checkpoint(*folders)
    path = Path(choice)
    if not path.exists():
        raise ValueError(
            f"--ckpt_path {choice} does not exist: give a checkpoint, `auto` for the latest of the "
            "run, or leave it out to start anew"
        )
    return path


@contextmanager
def explain_failed_save(target: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one line.

    Raises:
        ValueError: names the checkpoint and the remedy.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason: BaseException | str = error
        if isinstance(error, RuntimeError):
            # torch's writer hides what the system said, or at least that the file is too short.
            if "inline_container" not in str(error):
                raise
            system = error.__context__
            reason = system if isinstance(system, OSError) else "the file came out too short"
        raise ValueError(
            f"cannot save checkpoint {target} ({reason}): free space on that disk, get write "
            "permission, or choose another folder; earlier checkpoints are as they were"
        ) from error


def read_checkpoint(path: Path, *, meta: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file, memory-mapped.

    Args:
        path: of the file.
        meta: keep the tensors' shapes only.

    Raises:
        ValueError: not a checkpoint, or a damaged one.
    """
    try:
        state: dict[str, Any] = torch.load(
            path, map_location="meta" if meta else "cpu", mmap=True, weights_only=True
        )
        if not isinstance(state["state_dict"], dict):
            raise TypeError("its state_dict is none")
    except (*DAMAGED_WEIGHTS, TypeError) as error:
        reason = one_line(error).split(". ")[0]
        raise ValueError(
            f"{path} is not a checkpoint of percov2.fit, or a damaged one ({reason}): choose "
            "another"
        ) from error
    return state


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict."""
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def compare_shapes(path: Path, found: Shapes, expected: Shapes, *, stage: str) -> None:
    """Refuse weights of another stage or architecture.

    Args:
        path: of the checkpoint, for the message.
        found: in the checkpoint.
        expected: by the configured model.
        stage: class name of the configured model.

    Raises:
        ValueError: names the first few differences.
    """
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    parts = [
        f"{len(names)} weights are {what} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"
        for what, names in differences.items()
        if names
    ]
    if parts:
        raise ValueError(
            f"{path} is of another stage or architecture than the configured {stage}: "
            f"{'; '.join(parts)}: give a checkpoint of this configuration"
        )
