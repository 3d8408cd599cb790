"""Where the networks of metrics get their weights: a folder, torch's hub cache, the network."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from percov2.files import DAMAGED_WEIGHTS
from percov2.messages import first_line

_SECONDS_TO_CONNECT = 20.0
# No network: URLError, an OSError, or what a broken connection raises.
_FAILURES = (http.client.HTTPException, *DAMAGED_WEIGHTS)
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class AbsentError(Exception):
    """Something cannot be measured here; the text says why, in one line."""


def _give(folder: Path, place: Path) -> None:
    """Let a place stand for a folder; a copy where links are not allowed, as on Windows."""
    try:
        place.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, place)


@contextmanager
def weights_from(folder: Path | None, what: str) -> Iterator[None]:
    """Have torch's hub read and write its files in a folder while the block runs.

    Files load as weights only, whatever the caller asks for: torchvision and torch-fidelity would
    unpickle objects, and so run code that a file brings with it.

    Args:
        folder: holds files under the names that the hub gives them, for instance
            ``alexnet-owt-7be5be79.pth``; None is the hub's own cache (``TORCH_HOME``).
        what: is made in the block, for the message.

    Raises:
        AbsentError: a file is neither there nor to be had.
    """
    import torch

    before, timeout = torch.hub.get_dir(), socket.getdefaulttimeout()
    forced = os.environ.get(_WEIGHTS_ONLY)
    with tempfile.TemporaryDirectory() as hub:
        if folder is not None:
            _give(folder.resolve(), Path(hub) / "checkpoints")
            torch.hub.set_dir(hub)
        socket.setdefaulttimeout(_SECONDS_TO_CONNECT)  # a host that swallows packets is no answer
        os.environ[_WEIGHTS_ONLY] = "1"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's about the way it is called
                yield
        except _FAILURES as error:
            where = f"in {folder}" if folder is not None else f"in {before}/checkpoints"
            raise AbsentError(
                f"the weights of {what} are neither {where} nor to be had ({first_line(error)})"
            ) from error
        finally:
            if folder is not None:
                torch.hub.set_dir(before)
            socket.setdefaulttimeout(timeout)
            if forced is None:
                del os.environ[_WEIGHTS_ONLY]
            else:
                os.environ[_WEIGHTS_ONLY] = forced
