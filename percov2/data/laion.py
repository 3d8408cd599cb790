"""WebDataset shards in img2dataset's layout (`.jpg .txt .json`), as LAION is downloaded."""

from __future__ import annotations

from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.module import ShardDataModule
from percov2.data.samples import picture_decoder
from percov2.data.shards import DEFAULT_RETRY, Retry


class LaionDataModule(ShardDataModule):
    """Training and validation batches from shards of pictures.

    Args:
        train_shards: shell pattern, brace pattern, URL (http, https, pipe, ...), or several.
        val_shards: as ``train_shards``; never those of training.
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        color_jitter: likewise; 0, the default, leaves colours as they are.
        batch_size: per process.
        val_samples: number of validation images, the first good ones of the shards.
        num_workers: loader processes.
        seed: of order, crops and captions.
        shuffle_block: samples shuffled together; each worker holds as many files in memory.
        captions: weights of caption sources, see `CaptionMix`; None is ``{txt: 1}``.
        filters: which samples are refused; in validation too.
        retry: for sources that fail.
        max_consecutive_faults: more unusable samples or shards in a row are an error.

    Raises:
        ValueError: no shard matches, one is both of training and of validation, or a number out
            of range.
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
        seed: int = 0,
        shuffle_block: int = 500,
        captions: dict[str, float] | None = None,
        color_jitter: float = 0.0,
        filters: Filters = NO_FILTERS,
        retry: Retry = DEFAULT_RETRY,
        max_consecutive_faults: int = 100,
    ) -> None:
        super().__init__(
            train_shards=train_shards,
            val_shards=val_shards,
            decoder=picture_decoder(
                crop=crop,
                max_zoom=max_zoom,
                color_jitter=color_jitter,
                captions=captions,
                filters=filters,
            ),
            batch_size=batch_size,
            val_samples=val_samples,
            num_workers=num_workers,
            seed=seed,
            shuffle_block=shuffle_block,
            retry=retry,
            max_consecutive_faults=max_consecutive_faults,
        )
