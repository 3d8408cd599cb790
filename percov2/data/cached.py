"""Training from a cache of latents and text embeddings, see `percov2.data.cache`."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from percov2.data.faults import FaultError
from percov2.data.filters import NO_FILTERS
from percov2.data.module import ShardDataModule
from percov2.data.samples import Batch, RawSample, Sample, decode_picture, read_metadata
from percov2.data.shards import DEFAULT_RETRY, Retry
from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.files import atomic_path
from percov2.messages import one_line

EMPTY_NAME = "empty.safetensors"
_EMBEDDINGS, _POOLED = "text_embeddings", "text_pooled"


def pack(sample: Sample, tensors: Mapping[str, Tensor], *, with_image: bool) -> dict[str, bytes]:
    """A sample's files in a shard, by suffix.

    Args:
        sample: caption, key and image.
        tensors: ``latents`` (C, h, w), maybe ``text_embeddings`` (L, D) and ``text_pooled`` (P,).
        with_image: keep the picture too, as PNG.

    Raises:
        ValueError: a value that float16 cannot hold.
    """
    small = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    for name, tensor in small.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of {sample['key']} do not fit into float16: leave it out")
    description: dict[str, Any] = {"key": sample["key"], "caption": sample["caption"]}
    if _EMBEDDINGS in small:
        description["text_shape"] = list(small[_EMBEDDINGS].shape)
        small[_EMBEDDINGS] = _without_zeros(small[_EMBEDDINGS])
    files = {"safetensors": save(small), "json": json.dumps(description).encode()}
    if with_image:
        buffer = io.BytesIO()
        tensor_to_image(sample["image"]).save(buffer, format="PNG")
        files["png"] = buffer.getvalue()
    return files


def _without_zeros(matrix: Tensor) -> Tensor:
    """Without the rows and columns of zeros at its end: SD3 pads CLIP's half, and an absent T5."""
    rows, columns = (matrix.any(axis).nonzero().flatten() for axis in (1, 0))
    height, width = (int(kept[-1]) + 1 if len(kept) else 0 for kept in (rows, columns))
    return matrix[:height, :width].contiguous()


class CachedDecoder:
    """Latents and text of a cached sample; a `Decoder` that never draws."""

    def __call__(self, raw: RawSample, rng: random.Random | None) -> Sample:
        """See `Decoder`."""
        description = read_metadata(raw)
        try:
            tensors = load(raw["safetensors"])
            sample: Sample = {
                "latents": tensors["latents"].float(),
                "caption": description["caption"],
                "key": description["key"],
            }
            if _EMBEDDINGS in tensors:
                full = tensors[_EMBEDDINGS].new_zeros(description["text_shape"])
                height, width = tensors[_EMBEDDINGS].shape
                full[:height, :width] = tensors[_EMBEDDINGS]
                sample[_EMBEDDINGS], sample[_POOLED] = full, tensors[_POOLED]
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise FaultError("corrupt_latents", one_line(error)) from error
        if "png" in raw:
            sample["image"] = image_to_tensor(decode_picture(raw["png"], NO_FILTERS))
        return sample


def save_empty(path: Path, embeddings: Tensor, pooled: Tensor) -> None:
    """Write the embeddings (L, D) and (P,) of the empty caption."""
    tensors = {"embeddings": embeddings.half(), "pooled": pooled.half()}
    with atomic_path(path) as temporary:
        content = save({name: value.contiguous() for name, value in tensors.items()})
        temporary.write_bytes(content)


class CachedDataModule(ShardDataModule):
    """Training and validation batches of latents (and text embeddings) from a cache.

    Args:
        train_shards: shell pattern, brace pattern, URL, or several, of cached shards.
        val_shards: as ``train_shards``; made with ``--crops 0 --images true`` if the stage
            compares pictures.
        batch_size: per process.
        val_samples: number of validation samples, the first good ones of the shards.
        empty_text: `empty.safetensors` of the cache, which every batch then carries for captions
            that are dropped; None for a cache without text.
        num_workers: loader processes.
        seed: of the order.
        shuffle_block: samples shuffled together; each worker holds as many files in memory.
        retry: for sources that fail.
        max_consecutive_faults: more unusable samples or shards in a row are an error.

    Raises:
        ValueError: no shard matches, one is both of training and of validation, no such file of
            empty embeddings, or a number out of range.
    """

    def __init__(
        self,
        *,
        train_shards: str | list[str],
        val_shards: str | list[str],
        batch_size: int,
        val_samples: int,
        empty_text: Path | None = None,
        num_workers: int = 1,
        seed: int = 0,
        shuffle_block: int = 500,
        retry: Retry = DEFAULT_RETRY,
        max_consecutive_faults: int = 100,
    ) -> None:
        super().__init__(
            train_shards=train_shards,
            val_shards=val_shards,
            decoder=CachedDecoder(),
            batch_size=batch_size,
            val_samples=val_samples,
            num_workers=num_workers,
            seed=seed,
            shuffle_block=shuffle_block,
            retry=retry,
            max_consecutive_faults=max_consecutive_faults,
        )
        self.empty = None if empty_text is None else _load_empty(empty_text)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Add the embeddings of the empty caption; see `StreamDataModule`."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.empty is not None:
            batch["empty_embeddings"] = self.empty["embeddings"]
            batch["empty_pooled"] = self.empty["pooled"]
        return batch


def _load_empty(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"empty_text {path} cannot be read ({one_line(error)}): name {EMPTY_NAME} of the "
            "cache, or null for a cache without text"
        ) from error
