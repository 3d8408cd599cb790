"""Batches from folders of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from percov2.data.folder import FolderDataModule
from percov2.data.laion import Batch

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pictures")
    return {"train_folder": fill(root / "train"), "val_folder": fill(root / "val")}


def module(folders: dict[str, Path], **changes: Any) -> FolderDataModule:
    options: dict[str, Any] = {"crop": 32, "max_zoom": 2.0, "batch_size": 2, "num_workers": 0}
    return FolderDataModule(**{**options, **folders, **changes})


def keys_of(loader: Any) -> list[list[str]]:
    """The keys of all batches, whose pictures and captions are those of the keys."""
    batches: list[Batch] = list(loader)
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


def test_training_is_shuffled_and_drops_a_short_batch(folders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    loader = module(folders).train_dataloader()
    epochs = [keys_of(loader) for _ in range(8)]
    assert all([len(batch) for batch in epoch] == [2, 2] for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 1
    assert {key for epoch in epochs for batch in epoch for key in batch} == set(COLOURS)


def test_fewer_pictures_than_a_batch_still_train(folders: dict[str, Path]) -> None:
    (batch,) = keys_of(module(folders, batch_size=9).train_dataloader())
    assert sorted(batch) == sorted(COLOURS)


def test_worker_process(folders: dict[str, Path]) -> None:
    data = module(folders, num_workers=1)
    assert len(keys_of(data.train_dataloader())) == 2
    assert keys_of(data.val_dataloader())[0] == ["a", "b"]


def test_pictures_of_training_and_validation_must_differ(folders: dict[str, Path]) -> None:
    deep = folders["train_folder"] / "deep"
    with pytest.raises(ValueError, match=r"2 pictures are in training and in validation.*c\.png"):
        module(folders, val_folder=deep)


def test_folder_without_pictures_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        module(folders, train_folder=tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        module(folders, val_folder=tmp_path / "nowhere")
