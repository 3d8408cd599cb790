"""Objects of all processes of a training."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank. A collective call: every process must make it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all of them are filled now
