"""Batches from shards in img2dataset's layout."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from PIL import Image

from percov2.data.laion import Batch, LaionDataModule, expand_shards

COLOURS = [(0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250), (120, 60, 180)]
NO_CAPTION = "000000001"


def sample(number: int) -> dict[str, Any]:
    """One picture of a colour of its own, of any size, as img2dataset stores it."""
    buffer = io.BytesIO()
    size = (40 + 10 * number, 60 - 5 * number)
    Image.new("RGB", size, COLOURS[number]).save(buffer, format="JPEG", quality=95)
    key = f"{number:09}"
    return {
        "__key__": key,
        "jpg": buffer.getvalue(),
        "txt": "" if key == NO_CAPTION else f" picture {number}\n",
        "json": {"key": key, "width": size[0], "height": size[1], "status": "success"},
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 0, 2 and 3 with two pictures each; shard 1 was lost."""
    folder = tmp_path_factory.mktemp("shards")
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for number in (0, 1, 0, 0, 2, 3, 4, 5):
            writer.write(sample(number))
    (folder / "00001.tar").unlink()
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
        "shuffle_buffer": 4,
    }
    return LaionDataModule(**{**options, **changes})


def check(batch: Batch) -> None:
    """Every picture has the colour and the caption of its key."""
    size = len(batch["key"])
    assert batch.keys() == {"image", "caption", "key"}
    assert batch["image"].shape == (size, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    for image, caption, key in zip(batch["image"], batch["caption"], batch["key"], strict=True):
        assert caption == ("" if key == NO_CAPTION else f"picture {int(key)}")
        expected = torch.tensor(COLOURS[int(key)]) / 127.5 - 1
        assert (image - expected[:, None, None]).abs().max() < 0.05


def test_training_stream_never_ends_and_skips_the_gap(shards: Path) -> None:
    batches = list(islice(module(shards).train_dataloader(), 40))
    for batch in batches:
        assert len(batch["key"]) == 3
        check(batch)
    assert {key for batch in batches for key in batch["key"]} == {f"{n:09}" for n in range(4)}


def test_training_stream_from_a_worker_process(shards: Path) -> None:
    loader = module(shards, num_workers=1).train_dataloader()
    batches = list(islice(loader, 3))
    assert [len(batch["key"]) for batch in batches] == [3, 3, 3]
    for batch in batches:
        check(batch)


def test_training_crops_differ_from_draw_to_draw(shards: Path) -> None:
    keys = [tuple(batch["key"]) for batch in islice(module(shards).train_dataloader(), 12)]
    assert len(set(keys)) > 1


def read(loader: Any) -> tuple[list[str], torch.Tensor]:
    batches = list(loader)
    for batch in batches:
        check(batch)
    return [k for b in batches for k in b["key"]], torch.cat([b["image"] for b in batches])


def test_validation_is_the_same_each_time(shards: Path) -> None:
    data = module(shards)
    first_keys, first_images = read(data.val_dataloader())
    keys, images = read(data.val_dataloader())
    assert keys == first_keys == ["000000004", "000000005"]
    assert torch.equal(images, first_images)


def test_validation_takes_the_first_samples(shards: Path) -> None:
    data = module(
        shards,
        train_shards=str(shards / "00003.tar"),
        val_shards=str(shards / "0000[02].tar"),
        val_samples=3,
        batch_size=2,
    )
    assert [len(batch["key"]) for batch in data.val_dataloader()] == [2, 1]
    assert read(data.val_dataloader())[0] == ["000000000", "000000001", "000000002"]


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


def test_patterns_are_expanded_in_order_without_repeats(shards: Path) -> None:
    names = [str(shards / f"{number:05}.tar") for number in (0, 2, 3)]
    assert expand_shards(str(shards / "0*.tar")) == names
    assert expand_shards([names[2], names[0], str(shards / "0000[0-2].tar")]) == names


@pytest.mark.parametrize("pattern", ["9*.tar", ["7.tar", "8.tar"], []])
def test_no_shard_is_refused(shards: Path, pattern: str | list[str]) -> None:
    with pytest.raises(ValueError, match="no shard matches"):
        module(shards, train_shards=pattern)
