"""Batches from shards in img2dataset's layout."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from percov2.data.filters import Filters
from percov2.data.laion import LaionDataModule
from percov2.data.samples import Batch
from tests.data.shard_factory import sample, write_shard

COLOURS = [(0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250), (120, 60, 180)]
NO_CAPTION = "000000001"


def coloured(number: int) -> dict[str, Any]:
    """One picture of a colour of its own, of any size, as img2dataset stores it."""
    import io

    buffer = io.BytesIO()
    size = (40 + 10 * number, 60 - 5 * number)
    Image.new("RGB", size, COLOURS[number]).save(buffer, format="JPEG", quality=95)
    changes: dict[str, Any] = {"jpg": buffer.getvalue()}
    if number == int(NO_CAPTION):
        changes["txt"] = b""
    return sample(number, **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 0, 2 and 3 with two pictures each; shard 1 was lost."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in ((0, (0, 1)), (2, (2, 3)), (3, (4, 5))):
        write_shard(folder / f"{shard:05}.tar", map(coloured, numbers))
    return folder


def module(shards: Path, **changes: Any) -> LaionDataModule:
    options: dict[str, Any] = {
        "train_shards": str(shards / "0000[0-2].tar"),
        "val_shards": str(shards / "00003.tar"),
        "crop": 32,
        "max_zoom": 2.0,
        "batch_size": 3,
        "val_samples": 2,
        "num_workers": 0,
        "shuffle_block": 4,
    }
    return LaionDataModule(**{**options, **changes})


def check(batch: Batch, *, train: bool) -> None:
    """Every picture has the colour and the caption of its key."""
    size = len(batch["key"])
    assert batch.keys() == {"image", "caption", "key"} | ({"stream"} if train else set())
    assert batch["image"].shape == (size, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    for image, caption, key in zip(batch["image"], batch["caption"], batch["key"], strict=True):
        assert caption == ("" if key == NO_CAPTION else f"picture {int(key)}")
        expected = torch.tensor(COLOURS[int(key)]) / 127.5 - 1
        assert (image - expected[:, None, None]).abs().max() < 0.05


def test_training_stream_never_ends_and_skips_the_gap(shards: Path) -> None:
    batches: list[Any] = list(islice(module(shards).train_dataloader(), 40))
    for batch in batches:
        assert len(batch["key"]) == 3
        check(batch, train=True)
    keys = [key for batch in batches for key in batch["key"]]
    assert {keys.count(f"{number:09}") for number in range(4)} == {30}


def test_a_stage_does_not_see_the_state_of_the_stream(shards: Path) -> None:
    data = module(shards)
    batch: Any = next(iter(data.train_dataloader()))
    seen = data.on_before_batch_transfer(batch, 0)
    check(seen, train=False)
    assert data.progress.positions == {0: [0, 0, 0, 0, 3]}


def test_an_iteration_begins_behind_what_was_trained_on(shards: Path) -> None:
    """Lightning iterates anew in every epoch of its own."""
    data = module(shards)
    loader = data.train_dataloader()
    whole = [batch["key"] for batch in islice(data.train_dataloader(), 5)]
    batches: list[Any] = list(islice(loader, 3))
    for batch in batches[:2]:
        data.on_before_batch_transfer(batch, 0)
    assert [batch["key"] for batch in islice(loader, 3)] == whole[2:]


def test_training_stream_from_a_worker_process(shards: Path) -> None:
    loader = module(shards, num_workers=1).train_dataloader()
    batches: list[Any] = list(islice(loader, 3))
    alone: list[Any] = list(islice(module(shards).train_dataloader(), 3))
    assert [batch["key"] for batch in batches] == [batch["key"] for batch in alone]
    for batch, expected in zip(batches, alone, strict=True):
        assert torch.equal(batch["image"], expected["image"])


def test_an_error_in_a_worker_is_one_line(shards: Path, tmp_path: Path) -> None:
    bad = write_shard(tmp_path / "bad.tar", [sample(number, jpg=b"") for number in range(4)])
    data = module(shards, train_shards=str(bad), num_workers=1, max_consecutive_faults=2)
    with pytest.raises(ValueError, match=r"^3 faults in a row in the data stream.*$") as caught:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(caught.value)
    assert "bad.tar" in str(caught.value)


def read(loader: Any) -> tuple[list[str], torch.Tensor]:
    batches = list(loader)
    for batch in batches:
        check(batch, train=False)
    return [k for b in batches for k in b["key"]], torch.cat([b["image"] for b in batches])


def test_validation_is_the_same_each_time(shards: Path) -> None:
    data = module(shards)
    first_keys, first_images = read(data.val_dataloader())
    keys, images = read(data.val_dataloader())
    assert keys == first_keys == ["000000004", "000000005"]
    assert torch.equal(images, first_images)


def test_validation_takes_the_first_good_samples(shards: Path, tmp_path: Path) -> None:
    faulty = [sample(7, jpg=b""), coloured(0), sample(8, txt=None), coloured(1), coloured(2)]
    write_shard(tmp_path / "a.tar", faulty)
    write_shard(tmp_path / "b.tar", map(coloured, (3, 4, 5)))
    data = module(shards, val_shards=str(tmp_path / "{a,lost,b}.tar"), val_samples=4, batch_size=3)
    with pytest.warns(UserWarning, match="'corrupt_image': 1, 'missing_caption': 1"):
        loader = data.val_dataloader()
    assert [len(batch["key"]) for batch in loader] == [3, 1]
    assert read(loader)[0] == [f"{number:09}" for number in range(4)]


def test_validation_without_a_good_sample_is_refused(shards: Path) -> None:
    data = module(shards, filters=Filters(min_size=99))
    with (
        pytest.warns(UserWarning, match="min_size"),
        pytest.raises(ValueError, match="no good sample for validation"),
    ):
        data.val_dataloader()


def test_every_process_reads_the_same_validation_samples(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's sampler shares them out; split twice, some would be lost."""
    expected = read(module(shards).val_dataloader())[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert read(module(shards).val_dataloader())[0] == expected


def test_shards_of_training_and_validation_must_differ(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"00003\.tar.*in training and in validation"):
        module(shards, train_shards=str(shards / "*.tar"))
    (tmp_path / "link").symlink_to(shards)
    with pytest.raises(ValueError, match="in training and in validation"):
        module(shards, val_shards=str(tmp_path / "link" / "00000.tar"))


@pytest.mark.parametrize("pattern", ["9*.tar", ["7.tar", "8.tar"], []])
def test_no_shard_is_refused(shards: Path, pattern: str | list[str]) -> None:
    with pytest.raises(ValueError, match="no shard matches"):
        module(shards, train_shards=pattern)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"num_workers": -1}, {"val_samples": 0}, {"shuffle_block": 0}],
)
def test_numbers_out_of_range_are_refused(shards: Path, change: dict[str, int]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        module(shards, **change)
