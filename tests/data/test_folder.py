"""Batches from folders of pictures."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from percov2.data.folder import FolderDataModule

COLOURS = {
    "a": (0, 0, 0),
    "b": (250, 0, 0),
    "deep/c": (0, 250, 0),
    "deep/d": (0, 0, 250),
    "e": (120, 60, 180),
}
CAPTIONS = {"a": "a black wall", "deep/c": "ein grüner Hügel"}


def fill(folder: Path) -> Path:
    """Five pictures in two folders, two of them with captions, and a file that is no picture."""
    for number, (key, colour) in enumerate(COLOURS.items()):
        path = folder / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 9 * number, 70 - 8 * number), colour).save(path)
    for key, caption in CAPTIONS.items():
        (folder / f"{key}.txt").write_text(f"{caption}\n", encoding="utf-8")
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {"train_folder": fill(tmp_path / "train"), "val_folder": fill(tmp_path / "val")}


def module(folders: dict[str, Path], **changes: Any) -> FolderDataModule:
    options: dict[str, Any] = {"crop": 32, "max_zoom": 2.0, "batch_size": 2, "num_workers": 0}
    return FolderDataModule(**{**options, **folders, **changes})


def keys_of(batches: Any) -> list[list[str]]:
    """The keys of all batches, whose pictures and captions are those of the keys."""
    batches = list(batches)
    for batch in batches:
        assert batch["image"].shape == (len(batch["key"]), 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        for image, caption, key in zip(batch["image"], batch["caption"], batch["key"], strict=True):
            assert caption == CAPTIONS.get(key, "")
            expected = torch.tensor(COLOURS[key]) / 127.5 - 1
            assert (image - expected[:, None, None]).abs().max() < 1e-6
    return [batch["key"] for batch in batches]


def test_validation_takes_all_pictures_in_order(folders: dict[str, Path]) -> None:
    data = module(folders)
    expected = [["a", "b"], ["deep/c", "deep/d"], ["e"]]
    assert keys_of(data.val_dataloader()) == keys_of(data.val_dataloader()) == expected
    assert keys_of(module(folders, val_samples=3).val_dataloader()) == [["a", "b"], ["deep/c"]]


def test_training_is_shuffled_and_sees_every_picture_once_an_epoch(
    folders: dict[str, Path],
) -> None:
    batches = keys_of(islice(module(folders).train_dataloader(), 10))
    assert all(len(batch) == 2 for batch in batches)
    keys = [key for batch in batches for key in batch]
    epochs = [keys[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(COLOURS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_fewer_pictures_than_a_batch_still_train(folders: dict[str, Path]) -> None:
    (batch,) = keys_of(islice(module(folders, batch_size=9).train_dataloader(), 1))
    assert set(batch) == set(COLOURS)


def test_a_stream_resumes(folders: dict[str, Path]) -> None:
    data, other = module(folders), module(folders)
    whole = keys_of(islice(data.train_dataloader(), 7))
    for batch in islice(data.train_dataloader(), 4):
        data.on_before_batch_transfer(batch, 0)  # type: ignore[arg-type]
    other.load_state_dict(data.state_dict())
    assert keys_of(islice(other.train_dataloader(), 3)) == whole[4:]


def test_damaged_and_vanished_pictures_are_counted(folders: dict[str, Path]) -> None:
    data = module(folders)
    (folders["train_folder"] / "a.png").unlink()
    (folders["train_folder"] / "b.png").write_bytes(b"no picture")
    for batch in islice(data.train_dataloader(), 4):
        data.on_before_batch_transfer(batch, 0)  # type: ignore[arg-type]
    assert data.faults.keys() == {"missing_image", "corrupt_image"}


def test_a_damaged_picture_is_left_out_of_validation(folders: dict[str, Path]) -> None:
    data = module(folders)
    (folders["val_folder"] / "b.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="left out of validation: {'corrupt_image': 1}"):
        loader = data.val_dataloader()
    assert keys_of(loader) == [["a", "deep/c"], ["deep/d", "e"]]


def test_pictures_of_training_and_validation_must_differ(folders: dict[str, Path]) -> None:
    deep = folders["train_folder"] / "deep"
    with pytest.raises(ValueError, match=r"2 pictures are in training and in validation.*c\.png"):
        module(folders, val_folder=deep)


def test_folder_without_pictures_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        module(folders, train_folder=tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere"):
        module(folders, val_folder=tmp_path / "nowhere")
