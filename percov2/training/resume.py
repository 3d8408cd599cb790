"""What a run can be resumed from."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from percov2.training.checkpointing import (
    ShardRecord,
    compare_shapes,
    read_checkpoint,
    shapes_of,
)
from percov2.training.strategy import ZeroStrategy


def check_checkpoint(path: Path, module: L.LightningModule, trainer: L.Trainer) -> None:
    """Refuse, before any device memory is taken, a checkpoint that cannot be resumed.

    Raises:
        ValueError: damaged, of another stage or architecture, or sharded otherwise.
    """
    zero = trainer.strategy.zero_stage if isinstance(trainer.strategy, ZeroStrategy) else None
    stage, expected = type(module).__name__, shapes_of(module.state_dict())
    if not path.is_dir():
        if zero is not None:
            raise ValueError(
                f"{path} is one file, ZeRO-{zero} resumes from a folder of shards: resume without "
                "ZeroStrategy"
            )
        found = shapes_of(read_checkpoint(path, meta=True)["state_dict"])
        compare_shapes(path, found, expected, stage=stage)
        return
    record = ShardRecord.read(path)
    if record.stage != stage:
        raise ValueError(f"{path} is a checkpoint of {record.stage}, the configuration has {stage}")
    compare_shapes(path, record.shapes, expected, stage=stage)
    processes = trainer.num_devices * trainer.num_nodes
    if (record.zero_stage, record.processes) != (zero, processes):
        now = f"ZeRO-{zero}" if zero is not None else type(trainer.strategy).__name__
        raise ValueError(
            f"{path} was written by ZeRO-{record.zero_stage} on {record.processes} processes, now "
            f"it is {now} on {processes}: resume as it was, or convert it with `python -m "
            "percov2.training.convert` and start from that model"
        )
