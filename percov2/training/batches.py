"""What a stage takes from a batch, whether its pictures were encoded now or cached before."""

from __future__ import annotations

from torch import Tensor

from percov2.analysis.autoencoder import Autoencoder
from percov2.data.samples import Batch


def image_of(batch: Batch, *, needed_by: str) -> Tensor:
    """Pictures (B, 3, H, W) of a batch.

    Args:
        batch: of a DataModule.
        needed_by: what cannot do without them, for the error.

    Raises:
        ValueError: it comes from a cache without pictures.
    """
    if "image" not in batch:
        raise ValueError(
            f"{needed_by} needs pictures and the cache has none: write it with "
            "`python -m percov2.data.cache --images true`, or do without"
        )
    return batch["image"]


def latents_of(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """Latents (B, C, h, w) of a batch, float32: cached ones, or those of its pictures."""
    if "latents" in batch:
        return batch["latents"]
    # Under autocast they come in bfloat16, and noise, targets and times would follow: of the times
    # above 0.5 only 128 would be left.
    return autoencoder.encode(image_of(batch, needed_by="a batch without latents")).float()
