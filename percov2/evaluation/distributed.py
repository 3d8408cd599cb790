"""Several processes that share the pictures of a run.

Each process takes every n-th picture and writes its records and features into the same folder;
the first process reads them all, in the order of the pictures. So a result does not depend on the
number of processes, to the last bit. torchrun sets the variables that are read here;
launchers/evaluate.sbatch sets them for SLURM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# The others wait for the slowest share.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0 to ``count`` - 1.
        local_rank: on this node.
        count: of processes.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """Those that this process works on."""
        return list(things[self.rank :: self.count])

    def device(self, name: str) -> str:
        """The device of this process: ``cuda`` is the GPU of its number on the node."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    def gather(self, thing: T) -> list[T]:
        """What every process gives, in the order of the ranks."""
        from percov2.data.processes import gather_objects

        return gather_objects(thing)


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes of this run, connected while the block runs.

    Raises:
        ValueError: variables that do not fit together.
    """
    try:
        found = Processes(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            count=int(os.environ.get("WORLD_SIZE", "1")),
        )
    except ValueError as error:
        raise ValueError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from error
    if not 0 <= found.rank < found.count:
        raise ValueError(
            f"RANK is {found.rank} and WORLD_SIZE is {found.count}: start with torchrun, or unset "
            "both"
        )
    if found.count == 1:
        yield found
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield found
    finally:
        distributed.destroy_process_group()
