"""A real SLURM for the tests of the launchers."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.cluster import COMMANDS, Cluster, one_node


def _missing() -> list[str]:
    return [command for command in COMMANDS if shutil.which(command) is None]


def _install() -> str:
    """Install SLURM from Debian's packages; returns what went wrong, or nothing."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(_missing())} missing, and only root can install slurm-wlm with apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ("update -q", "install -q -y --no-install-recommends slurm-wlm munge"):
        try:
            done = subprocess.run(
                ["apt-get", *command.split()],
                env=environment,
                check=False,
                capture_output=True,
                text=True,
                timeout=240,
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {command}: no answer within 4 minutes"
        if done.returncode:
            return f"apt-get {command}: {done.stderr.strip()}"
    return f"{_missing()} missing in slurm-wlm and munge" if _missing() else ""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node, of SLURM's own programs."""
    # pytest-xdist's workers must not install at the same time.
    with (Path(tempfile.gettempdir()) / "percov2-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = _install() if _missing() else ""
    if problem:
        pytest.skip(f"no SLURM here: {problem}")
    with one_node(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
