"""WebDataset shards in img2dataset's layout (`.jpg .txt .json`), as LAION is downloaded."""

from __future__ import annotations

import glob
import io
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from percov2.data.transforms import CropTransform
from percov2.images import to_srgb


class Batch(TypedDict):
    """What a DataModule yields.

    image: (B, 3, H, W) float32 in [-1, 1]; caption: B texts, maybe empty; key: B sample names.
    """

    image: Tensor
    caption: list[str]
    key: list[str]


def expand_shards(pattern: str | list[str]) -> list[str]:
    """Shell patterns (gaps in the numbering are fine) to a sorted list of shards.

    Raises:
        ValueError: nothing matches.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    shards = sorted({path for one in patterns for path in glob.glob(one)})
    if not shards:
        raise ValueError(f"no shard matches {pattern!r}: give the path of .tar files")
    return shards


class LaionDataModule(L.LightningDataModule):
    """Training and validation batches from shards.

    Args:
        train_shards: shell pattern, or several.
        val_shards: shell pattern, or several; never those of training.
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        batch_size: per process.
        val_samples: number of validation images, the first of the shards.
        num_workers: loader processes.
        shuffle_buffer: samples held for shuffling.

    Raises:
        ValueError: no shard matches, or one is both of training and of validation.
    """

    def __init__(
        self,
        *,
        train_shards: str | list[str],
        val_shards: str | list[str],
        crop: int,
        max_zoom: float,
        batch_size: int,
        val_samples: int,
        num_workers: int = 1,
        shuffle_buffer: int = 500,
    ) -> None:
        super().__init__()
        self.train_shards = expand_shards(train_shards)
        self.val_shards = expand_shards(val_shards)
        shared = {Path(p).resolve() for p in self.train_shards} & {
            Path(p).resolve() for p in self.val_shards
        }
        if shared:
            raise ValueError(
                f"{sorted(map(str, shared))} are in training and in validation: change a pattern"
            )
        self.crop, self.max_zoom = crop, max_zoom
        self.batch_size, self.val_samples = batch_size, val_samples
        self.num_workers, self.shuffle_buffer = num_workers, shuffle_buffer

    def _samples(self, shards: list[str], *, train: bool) -> Any:
        transform = CropTransform(size=self.crop, max_zoom=self.max_zoom, train=train)

        def to_sample(sample: dict[str, Any]) -> dict[str, Any]:
            image, _ = to_srgb(Image.open(io.BytesIO(sample["jpg"])))
            return {
                "image": transform(image),
                "caption": sample["txt"].decode().strip(),
                "key": sample["__key__"],
            }

        data = wds.WebDataset(
            shards,
            resampled=train,
            shardshuffle=False,
            # Resampled shards differ by process anyway; validation samples are shared out by
            # Lightning's sampler, so that every process must read the same ones.
            nodesplitter=None,
            empty_check=False,
        )
        if train:
            data = data.shuffle(self.shuffle_buffer)
        # Not `data.map`, which would add `__key__` to what the function returns.
        return data.compose(lambda stream: map(to_sample, stream))

    def train_dataloader(self) -> Any:
        """An endless stream; shards are drawn with replacement by every worker."""
        stream = self._samples(self.train_shards, train=True)
        stream = stream.batched(self.batch_size, collation_fn=default_collate, partial=False)
        return wds.WebLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The first ``val_samples`` images, the same each time."""
        samples = list(self._samples(self.val_shards, train=False).slice(self.val_samples))
        return DataLoader(samples, batch_size=self.batch_size)  # type: ignore[arg-type]
