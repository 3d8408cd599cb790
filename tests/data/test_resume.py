"""A real Trainer, stopped and resumed in the middle of an epoch, sees the very same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from percov2.data.laion import LaionDataModule
from percov2.data.samples import Batch
from tests.data.shard_factory import sample, write_shard, write_shards


class Recorder(L.LightningModule):
    """Trains one number and remembers what it was shown, in files by rank if asked to."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[str], list[str], Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.keys() == {"image", "caption", "key"}
        self.seen.append((batch["key"], batch["caption"], batch["image"]))
        return (self.weight - batch["image"].mean()) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.keys() == {"image", "caption", "key"}

    def on_train_end(self) -> None:
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"rank-{self.global_rank}.pt")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training shards 0 to 2 with 16 good samples and three faulty ones; validation in val.tar."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), 6, 5)
    faulty = [sample(11), sample(12, jpg=b""), sample(13), sample(14, txt=None), sample(15)]
    write_shard(folder / "00002.tar", faulty)
    (folder / "00003.tar").write_bytes((folder / "00001.tar").read_bytes()[:5000])
    write_shard(folder / "val.tar", [sample(90)])
    return folder


def module(shards: Path, **changes: Any) -> LaionDataModule:
    options: dict[str, Any] = {
        "train_shards": str(shards / "0*.tar"),
        "val_shards": str(shards / "val.tar"),
        "crop": 16,
        "max_zoom": 1.2,
        "batch_size": 3,
        "val_samples": 1,
        "num_workers": 0,
        "shuffle_block": 5,
        "captions": {"txt": 0.7, "empty": 0.3},
        "seed": 4,
    }
    return LaionDataModule(**{**options, **changes})


def train(
    data: LaionDataModule, folder: Path, *, steps: int, resume: Path | None = None, **options: Any
) -> Recorder:
    model = Recorder(folder if "strategy" in options else None)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        callbacks=[
            ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ],
        **{"val_check_interval": 3, "devices": 1, **options},
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    return model


def same(found: list[Any], expected: list[Any]) -> None:
    assert [(keys, captions) for keys, captions, _ in found] == [
        (keys, captions) for keys, captions, _ in expected
    ]
    for (_, _, image), (_, _, other) in zip(found, expected, strict=True):
        assert torch.equal(image, other)


@pytest.mark.parametrize(
    ("workers", "stops"), [(0, (1, 4, 7)), pytest.param(2, (3, 6), marks=pytest.mark.slow)]
)
def test_a_resumed_run_sees_what_the_whole_run_saw(
    shards: Path, tmp_path: Path, workers: int, stops: tuple[int, ...]
) -> None:
    steps = 12  # more than two epochs
    data = module(shards, num_workers=workers)
    whole = train(data, tmp_path, steps=steps)
    assert len(whole.seen) == steps
    for stop in stops:
        again = module(shards, num_workers=workers)
        resumed = train(again, tmp_path / "x", steps=steps, resume=tmp_path / f"step={stop}.ckpt")
        same(resumed.seen, whole.seen[stop:])
        assert again.faults == data.faults
        assert set(again.faults) == {"corrupt_image", "missing_caption", "damaged_shard"}


def test_lightning_epochs_do_not_repeat_samples(shards: Path, tmp_path: Path) -> None:
    """With a limit, Lightning iterates over the loader anew every two batches."""
    whole = train(module(shards), tmp_path / "a", steps=7)
    cut = train(module(shards), tmp_path / "b", steps=7, limit_train_batches=2)
    same(cut.seen, whole.seen)
    resumed = train(
        module(shards),
        tmp_path / "c",
        steps=7,
        resume=tmp_path / "b" / "step=3.ckpt",
        limit_train_batches=2,
    )
    same(resumed.seen, whole.seen[3:])


def test_the_state_is_plain_and_loads_with_weights_only(shards: Path, tmp_path: Path) -> None:
    train(module(shards), tmp_path, steps=2)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["LaionDataModule"]
    (rank,) = state["ranks"]
    assert rank["positions"].keys() == {0}
    assert all(type(number) is int for number in rank["positions"][0])
    assert state["identity"]["ranks"] == state["identity"]["workers"] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 5}, r"seed \(4 before, now 5\)"),
        ({"num_workers": 2}, r"workers \(1 before, now 2\)"),
        ({"shuffle_block": 6}, "shuffle_block"),
        ({"train_shards": "0000[0-1].tar"}, "data"),
    ],
)
def test_another_stream_begins_a_new_epoch_and_says_so(
    shards: Path, change: dict[str, Any], told: str
) -> None:
    data = module(shards)
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)  # type: ignore[arg-type]
        if data.progress.positions[0][0] == 2:
            break
    if "train_shards" in change:
        change = {"train_shards": str(shards / change["train_shards"])}
    other = module(shards, **change)
    with pytest.warns(UserWarning, match=f"{told}.*it begins epoch 3"):
        other.load_state_dict(data.state_dict())
    assert other.progress.first_epoch == 3
    assert not other.progress.positions


def test_one_worker_goes_on_where_the_training_process_stopped(shards: Path) -> None:
    data = module(shards)
    loader = iter(data.train_dataloader())
    for _ in range(2):
        data.on_before_batch_transfer(next(loader), 0)  # type: ignore[arg-type]
    other = module(shards, num_workers=1)
    other.load_state_dict(data.state_dict())
    expected: Any = next(loader)
    found: Any = next(iter(other.train_dataloader()))
    assert found["key"] == expected["key"]


def test_a_training_that_would_never_stop_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        train(module(shards), tmp_path, steps=-1)


@pytest.mark.slow
def test_two_ranks_resume_where_each_of_them_stopped(shards: Path, tmp_path: Path) -> None:
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp_spawn"}
    train(module(shards), tmp_path / "whole", steps=6, **ranks)
    train(
        module(shards),
        tmp_path / "resumed",
        steps=6,
        resume=tmp_path / "whole" / "step=2.ckpt",
        **ranks,
    )
    first: list[list[str]] = []
    for rank in range(2):
        whole, resumed = (
            torch.load(tmp_path / name / f"rank-{rank}.pt") for name in ("whole", "resumed")
        )
        assert len(whole) == 6
        same(resumed, whole[2:])
        first.append(whole[0][0])
    assert first[0] != first[1], "both ranks read the same samples"
    with pytest.warns(UserWarning, match=r"ranks \(2 before, now 1\)"):
        train(module(shards), tmp_path / "one", steps=3, resume=tmp_path / "whole" / "step=2.ckpt")
