"""A SLURM of one node, for tests: controller, node and munge under one folder, on free ports."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# More processors than the machine may have, so that jobs share it instead of queueing.
_CPUS = 8
# Jobs of the partition `urgent` preempt those of `main`, with a minute's notice.
# `cred_expire` is what a requeued job waits before it starts again: two minutes by default.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""


class Cluster:
    """A running cluster.

    Args:
        folder: of its configuration and logs.
        environment: in which its commands work.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, *command: str | Path, **variables: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, number: str, until: Callable[[dict[str, str]], bool], *, seconds: float) -> None:
        """Wait until a job's fields satisfy a condition.

        Raises:
            TimeoutError: they never did.
        """
        deadline = time.monotonic() + seconds
        while not until(self.job(number)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} after {seconds} s: {self.job(number)}")
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _daemon(*command: str | Path, environment: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


@contextmanager
def one_node(folder: Path) -> Iterator[Cluster]:
    """Start a cluster and stop it afterwards.

    Raises:
        TimeoutError: the node does not come up within a minute.
    """
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(
        _CONFIG.format(
            host=host,
            folder=folder,
            user=getpass.getuser(),
            cpus=_CPUS,
            controller_port=_free_port(),
            node_port=_free_port(),
        )
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = {**own, "SLURM_CONF": str(config)}
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "log-file", "pid-file")]
    munge += [f"--key-file={key}", f"--seed-file={folder}/munge.seed", "--foreground", "--force"]
    with ExitStack() as stack:
        for daemon in (["munged", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            log = folder / f"{daemon[0]}.out"
            stack.enter_context(_daemon(*daemon, environment=environment, log=log))
            time.sleep(1)
        cluster = Cluster(folder, environment)
        _wait_for_node(cluster)
        yield cluster
        # Without jobs the node's daemon leaves no process behind.
        cluster.run("scancel", "--user", getpass.getuser())


def _wait_for_node(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    command = ("sinfo", "--noheader", "--format=%T")
    while (
        subprocess.run(
            command, env=cluster.environment, check=False, capture_output=True, text=True
        ).stdout.strip()
        != "idle"
    ):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the node is not up: see the logs in {cluster.folder}")
        time.sleep(0.5)
