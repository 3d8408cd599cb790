from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from percov2.evaluation.features import (
    Patches,
    WholePictures,
    cut_patches,
    frechet_distance,
    half_shifted_grids,
    inception,
    kernel_distance,
    stride_grids,
)
from percov2.evaluation.weights import AbsentError
from tests.evaluation.pictures import TinyFeatures

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of pictures, 14 and 11."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (14, 3, 8, 8), dtype=torch.uint8, generator=generator)
    fake = torch.randint(20, 200, (11, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return real, fake


def _rows(images: torch.Tensor) -> list[np.ndarray]:
    extract = WholePictures(TinyFeatures(), "tiny")
    rows = [extract(image[None]) for image in images]
    assert all(row is not None and row.shape == (1, 6) for row in rows)
    return [row for row in rows if row is not None]


def test_frechet_distance_is_that_of_torchmetrics(
    sets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    metric = FrechetInceptionDistance(feature=TinyFeatures())
    for real, images in zip((True, False), sets, strict=True):
        metric.update(images, real=real)
    distance = frechet_distance(*(_rows(images) for images in sets))
    assert distance == pytest.approx(float(metric.compute()), rel=1e-4)
    assert distance > 0.001
    with pytest.raises(AbsentError, match="two rows"):
        frechet_distance(_rows(sets[0])[:1], _rows(sets[1]))


@pytest.mark.parametrize("size", [5, 11])
def test_kernel_distance_is_that_of_torchmetrics(
    sets: tuple[torch.Tensor, torch.Tensor], size: int
) -> None:
    metric = KernelInceptionDistance(feature=TinyFeatures(), subsets=7, subset_size=size)
    for real, images in zip((True, False), sets, strict=True):
        metric.update(images, real=real)
    torch.manual_seed(3)
    expected = float(metric.compute()[0])
    rows = [_rows(images) for images in sets]
    found = kernel_distance(*rows, subsets=7, subset_size=size, seed=3)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == kernel_distance(
        *([np.concatenate(part[:4]), *part[4:]] for part in rows),
        subsets=7,
        subset_size=size,
        seed=3,
    ), "how the rows are divided does not matter"
    with pytest.raises(AbsentError, match="two rows"):
        kernel_distance(rows[0], rows[1][:1])


def test_kernel_distance_of_small_sets_takes_them_whole() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(9, 4)).astype(np.float32) for _ in range(2)]
    once = kernel_distance([rows[0]], [rows[1]], subsets=1)
    assert kernel_distance([rows[0]], [rows[1]], subsets=50, seed=8) == pytest.approx(once)


def test_kernel_distance_of_the_same_pictures_is_zero() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 16)).astype(np.float32)
    for size in (30, 12):
        found = kernel_distance([rows], [rows], subset_size=size, subsets=200, paired=True)
        assert found == pytest.approx(0, abs=1e-6 if size == 30 else 0.02)
    assert kernel_distance([rows], [rows], subset_size=30) < -0.05


def test_kernel_distance_of_pairs_is_unbiased() -> None:
    """Pairs of one distribution that share most of what they are: the distance is zero."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        shared, own, other = rng.normal(size=(3, 20, 16))
        sets = [(np.sqrt(0.9) * shared + np.sqrt(0.1) * x).astype(np.float32) for x in (own, other)]
        found.append(
            [kernel_distance([sets[0]], [sets[1]], paired=paired) for paired in (True, False)]
        )
    (mean, biased), (error, _) = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert abs(mean) < 4 * error
    assert biased < -10 * error


def test_patches_of_both_grids() -> None:
    image = torch.arange(20 * 33).reshape(1, 1, 20, 33).expand(1, 3, 20, 33)
    patches = cut_patches(image, 8, half_shifted_grids(8))
    assert patches.shape == (2 * 4 + 2 * 3, 3, 8, 8)
    assert torch.equal(patches[0], image[0, :, :8, :8])
    assert torch.equal(patches[5], image[0, :, 8:16, 8:16])
    assert torch.equal(patches[8], image[0, :, 4:12, 4:12])
    assert torch.equal(patches[-1], image[0, :, 12:20, 20:28])
    assert len(cut_patches(image[..., :11, :], 8, half_shifted_grids(8))) == 4, "below 1.5 patches"
    assert len(cut_patches(image[..., :7], 8, half_shifted_grids(8))) == 0


def test_grids_of_a_stride_have_every_place_once() -> None:
    image = torch.arange(16 * 20).reshape(1, 1, 16, 20).expand(1, 3, 16, 20)
    corners = [int(patch[0, 0, 0]) for patch in cut_patches(image, 8, stride_grids(8, 4))]
    assert sorted(corners) == sorted(20 * y + x for y in (0, 4, 8) for x in (0, 4, 8, 12))


def test_patch_features_do_not_depend_on_batches() -> None:
    image = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8)
    extract = Patches(TinyFeatures(), "tiny", patch=4, grids=stride_grids(4, 2))
    rows = extract(image)
    assert rows is not None
    cut = cut_patches(image, 4, stride_grids(4, 2))
    assert len(rows) == len(cut) > 64
    np.testing.assert_allclose(rows, TinyFeatures()(cut).numpy(), atol=1e-6)
    assert extract(image[..., :3]) is None
    assert "patches of 4" in extract.identity


def test_networks_that_are_not_to_be_had_are_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    with pytest.raises(AbsentError, match=r"FID's Inception network are neither in .* nor to be"):
        inception(tmp_path, "cpu")
    (tmp_path / INCEPTION).write_bytes(b"hello")
    with pytest.raises(AbsentError, match="Inception"):
        inception(tmp_path, "cpu")


class _Code:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("forced", [None, "0"])
def test_weights_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: str | None
) -> None:
    pytest.importorskip("torch_fidelity")
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    if forced is not None:
        monkeypatch.setenv(name, forced)
    torch.save({"weight": _Code(tmp_path / "made")}, tmp_path / INCEPTION)
    with pytest.raises(AbsentError, match=r"Inception.*Weights only load failed"):
        inception(tmp_path, "cpu")
    assert not (tmp_path / "made").exists()
    assert os.environ.get(name) == forced


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # a network with random weights, to be saved
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        random = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(random.state_dict(), tmp_path / INCEPTION)
    images = torch.randint(0, 256, (2, 3, 64, 80), dtype=torch.uint8)
    found = inception(tmp_path, "cpu")(images)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, random(images)[0], rtol=1e-4, atol=1e-5)
