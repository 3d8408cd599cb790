"""A folder of pictures, captions in `.txt` files beside them if there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from percov2.data.laion import Batch
from percov2.data.transforms import CropTransform
from percov2.files import list_images
from percov2.images import read_image


class FolderDataset(Dataset[dict[str, Any]]):
    """Pictures of a folder, sorted by name, as samples.

    Raises:
        ValueError: no picture in the folder.
    """

    def __init__(self, folder: Path, transform: CropTransform) -> None:
        self.paths = list_images(folder)
        if not self.paths:
            raise ValueError(f"{folder} holds no picture")
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image (3, size, size), caption ("" without a `.txt`) and key of one picture."""
        path = self.paths[index]
        image, _ = read_image(path)
        text = path.with_suffix(".txt")
        return {
            "image": self.transform(image),
            "caption": text.read_text(encoding="utf-8").strip() if text.is_file() else "",
            "key": path.relative_to(self.folder).with_suffix("").as_posix(),
        }


class FolderDataModule(L.LightningDataModule):
    """Training and validation batches from two folders.

    Args:
        train_folder: searched recursively.
        val_folder: searched recursively.
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        batch_size: per process.
        num_workers: loader processes.

    Raises:
        ValueError: a folder without pictures, or a picture that both folders hold.
    """

    def __init__(
        self,
        *,
        train_folder: Path,
        val_folder: Path,
        crop: int,
        max_zoom: float,
        batch_size: int,
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_set, self.val_set = (
            FolderDataset(folder, CropTransform(size=crop, max_zoom=max_zoom, train=train))
            for folder, train in ((train_folder, True), (val_folder, False))
        )
        trained = {path.resolve() for path in self.train_set.paths}
        shared = [path for path in self.val_set.paths if path.resolve() in trained]
        if shared:
            raise ValueError(
                f"{len(shared)} pictures are in training and in validation, {shared[0]} first: "
                "move them out of one of the folders"
            )

    def _loader(self, data: FolderDataset, *, train: bool) -> DataLoader[Batch]:
        return DataLoader(
            data,  # type: ignore[arg-type]  # batches are collated samples
            batch_size=self.batch_size,
            shuffle=train,
            drop_last=train and len(data) >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches; a last short one is dropped if there is a full one."""
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """All pictures in order."""
        return self._loader(self.val_set, train=False)
