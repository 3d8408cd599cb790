from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from percov2.analysis.autoencoder import PATCH, PatchAutoencoder, StableDiffusionAutoencoder
from percov2.layers import ResidualBlock
from tests.tiny_models import randomise

SHIFT, SCALE = 0.0609, 1.5305
TILE = 64
UNPADDED = [(1, 3, 60, 64), (1, 3, 64, 65), (1, 4, 64, 64), (3, 64, 64)]


def make_vae(*, levels: int = 4, shift_factor: float | None = SHIFT) -> AutoencoderKL:
    """SD3's kind of autoencoder; the same weights at every call."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift_factor,
        scaling_factor=SCALE,
        sample_size=TILE,
    )
    return vae.eval()


def make_image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, height, width, generator=generator) * 2 - 1


@torch.no_grad()
def test_stable_diffusion_autoencoder_equals_diffusers() -> None:
    vae, image = make_vae(), make_image(64, 40)
    autoencoder = StableDiffusionAutoencoder(make_vae())
    latents = autoencoder.encode(image)
    assert autoencoder.latent_channels == 16
    assert latents.shape == (1, 16, 8, 5)
    assert torch.equal(latents, (vae.encode(image).latent_dist.mode() - SHIFT) * SCALE)
    assert torch.equal(autoencoder.encode(image), latents)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == image.shape
    assert torch.equal(decoded, vae.decode(latents / SCALE + SHIFT).sample)


@torch.no_grad()
def test_stable_diffusion_autoencoder_tiles_large_images() -> None:
    vae, image = make_vae(), make_image(72, 104)
    vae.enable_tiling()
    autoencoder = StableDiffusionAutoencoder(make_vae())
    latents = autoencoder.encode(image)
    assert latents.shape == (1, 16, 9, 13)
    assert torch.equal(latents, (vae.encode(image).latent_dist.mode() - SHIFT) * SCALE)
    assert autoencoder.decode(latents).shape == image.shape


@torch.no_grad()
def test_a_vae_without_shift_only_scales() -> None:
    vae, image = make_vae(shift_factor=None), make_image(16, 16)
    latents = StableDiffusionAutoencoder(make_vae(shift_factor=None)).encode(image)
    assert torch.equal(latents, vae.encode(image).latent_dist.mode() * SCALE)


@pytest.mark.parametrize(("levels", "factor"), [(3, 4), (5, 16)])
def test_a_vae_of_another_reduction_is_refused(levels: int, factor: int) -> None:
    with pytest.raises(ValueError, match=f"reduces by {factor}, percov2 needs 8"):
        StableDiffusionAutoencoder(make_vae(levels=levels))


@pytest.mark.parametrize("shape", UNPADDED)
def test_images_must_be_padded(shape: tuple[int, ...]) -> None:
    for autoencoder in (StableDiffusionAutoencoder(make_vae()), make_patches(4)):
        with pytest.raises(ValueError, match="multiples of 8; pad it first"):
            autoencoder.encode(torch.zeros(shape))


def make_patches(latent_channels: int) -> PatchAutoencoder:
    torch.manual_seed(0)
    autoencoder: PatchAutoencoder = PatchAutoencoder(
        latent_channels=latent_channels,
        encoder_width=8,
        encoder_blocks=1,
        decoder_width=8,
        decoder_blocks=2,
    )
    return autoencoder


@pytest.fixture(scope="module")
def photographs() -> list[Tensor]:
    """Four 128x160 crops as (1, 3, H, W) in [-1, 1]."""
    names = ("astronaut", "coffee", "chelsea", "rocket")
    crops = [getattr(skimage.data, name)()[64:192, 96:256] for name in names]
    return [torch.from_numpy(crop / 127.5 - 1).float().movedim(-1, 0)[None] for crop in crops]


def patches_of(images: list[Tensor]) -> NDArray[np.float64]:
    """(N, 192) patches, in numpy and in any one order of pixels."""
    rows = []
    for image in images:
        _, _, height, width = image.shape
        grid = image[0].double().numpy().reshape(3, height // PATCH, PATCH, width // PATCH, PATCH)
        rows.append(grid.transpose(1, 3, 0, 2, 4).reshape(-1, 3 * PATCH * PATCH))
    return np.concatenate(rows)


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))


@torch.no_grad()
def test_linear_part_is_principal_component_analysis(photographs: list[Tensor]) -> None:
    patches = patches_of(photographs)
    mean = patches.mean(0)
    directions = np.linalg.svd(patches - mean, full_matrices=False)[2]
    quality = []
    for count in (4, 8, 16, 32):
        autoencoder = make_patches(count)
        autoencoder.fit_principal_components(photographs)
        decoded = [autoencoder.decode(autoencoder.encode(image)) for image in photographs]
        expected = mean + (patches - mean) @ directions[:count].T @ directions[:count]
        np.testing.assert_allclose(patches_of(decoded), expected, atol=2e-5)
        quality.append(psnr(patches_of(decoded), patches))
    assert quality == sorted(quality)
    assert quality[0] > 20
    assert quality[-1] > quality[0] + 5


@torch.no_grad()
def test_latents_are_half_whitened_with_unit_mean_square(photographs: list[Tensor]) -> None:
    autoencoder = make_patches(16)
    autoencoder.fit_principal_components(photographs)
    latents = torch.cat([autoencoder.encode(image)[0].flatten(1) for image in photographs], 1)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    deviations = np.linalg.svd(
        patches_of(photographs) - patches_of(photographs).mean(0), compute_uv=False
    )[:16]
    ratio = latents.var(1).double().numpy() / deviations
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_fitting_is_repeatable_and_replaces_the_earlier_fit(photographs: list[Tensor]) -> None:
    once, twice = make_patches(16), make_patches(16)
    once.fit_principal_components(photographs)
    twice.fit_principal_components(photographs[:1])
    assert not torch.equal(once.components, twice.components)
    twice.fit_principal_components(photographs)
    for name, buffer in once.named_buffers():
        assert torch.equal(buffer, twice.get_buffer(name)), name


def test_too_few_patches_are_refused() -> None:
    autoencoder = make_patches(16)
    with pytest.raises(ValueError, match="16 patches cannot give 16 components"):
        autoencoder.fit_principal_components([make_image(32, 32)])
    autoencoder.fit_principal_components([make_image(32, 40)])
    assert autoencoder.components.isfinite().all()


@torch.no_grad()
def test_flat_images_give_finite_latents() -> None:
    autoencoder = make_patches(4)
    image = torch.full((1, 3, 64, 64), 0.25)
    autoencoder.fit_principal_components([image])
    assert autoencoder.encode(image).isfinite().all()
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(image)), image)


@torch.no_grad()
def test_residuals_are_zero_at_initialisation(photographs: list[Tensor]) -> None:
    autoencoder = make_patches(16)
    autoencoder.fit_principal_components(photographs)
    patches = F.pixel_unshuffle(photographs[0], PATCH)
    assert autoencoder.encoder_residual(patches).count_nonzero() == 0
    assert autoencoder.decoder_residual(autoencoder.encode(photographs[0])).count_nonzero() == 0


def test_gradients_reach_both_residual_nets(photographs: list[Tensor]) -> None:
    """The zero convolutions hide those before them, one layer a step."""
    autoencoder = make_patches(4)
    autoencoder.fit_principal_components(photographs)
    image = photographs[0]
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(autoencoder.decode(autoencoder.encode(image)), image)
        loss.backward()
        losses.append(loss.item())
        silent = {
            name
            for name, parameter in autoencoder.named_parameters()
            if parameter.grad is None or parameter.grad.count_nonzero() == 0
        }
        if step == 1:
            assert all(".body.0." in name for name in silent)
        optimizer.step()
    assert silent == set()
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_saved_patch_autoencoder_gives_equal_outputs(
    photographs: list[Tensor], tmp_path: Path
) -> None:
    autoencoder = make_patches(4).eval()
    autoencoder.fit_principal_components(photographs)
    randomise(autoencoder, std=0.1)
    autoencoder.save_pretrained(tmp_path)
    loaded = PatchAutoencoder.from_pretrained(tmp_path)
    latents = autoencoder.encode(photographs[0])
    assert loaded.latent_channels == 4
    assert latents.shape == (1, 4, 16, 20)
    assert torch.equal(loaded.encode(photographs[0]), latents)
    assert torch.equal(loaded.decode(latents), autoencoder.decode(latents))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@torch.no_grad()
def test_a_new_refiner_changes_nothing_and_a_trained_one_crosses_the_patches() -> None:
    autoencoder, image = make_patches(4), make_image(32, 48)
    latents = autoencoder.encode(image)
    before = autoencoder.decode(latents)
    autoencoder.add_refiner(4, 2)
    assert torch.equal(autoencoder.decode(latents), before)
    assert autoencoder.refiner is not None
    torch.nn.init.normal_(autoencoder.refiner.at_half[-2].weight)
    moved = latents.clone()
    moved[:, :, 2, 2] += 1
    changed = (autoencoder.decode(moved) != autoencoder.decode(latents)).any(1)[0]
    rows, cols = (axis.unique() for axis in changed.nonzero(as_tuple=True))
    assert rows.min() < 16
    assert rows.max() >= 24
    assert cols.min() < 16
    assert cols.max() >= 24


def test_a_refiner_of_another_size_is_refused() -> None:
    autoencoder = make_patches(4)
    autoencoder.add_refiner(4, 2)
    autoencoder.add_refiner(4, 2)
    for width, blocks in ((8, 2), (4, 4)):
        with pytest.raises(ValueError, match=r"'refiner_width': 4, 'refiner_blocks': 2\}: use"):
            autoencoder.add_refiner(width, blocks)
    with pytest.raises(ValueError, match="only the light autoencoder takes a refiner"):
        StableDiffusionAutoencoder(make_vae()).add_refiner(4, 2)


def test_a_refiner_is_saved_and_loaded(tmp_path: Path) -> None:
    autoencoder = make_patches(4)
    autoencoder.add_refiner(4, 2)
    autoencoder.save_pretrained(tmp_path)
    loaded: PatchAutoencoder = PatchAutoencoder.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == autoencoder.state_dict().keys()
    assert (loaded.refiner_width, loaded.refiner_blocks) == (4, 2)


@pytest.mark.parametrize(("width", "blocks"), [(4, 0), (0, 2), (4, 3), (-1, 2)])
def test_refuses_a_refiner_without_width_or_with_odd_blocks(width: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=f"refiner_width is {width} and refiner_blocks {blocks}"):
        PatchAutoencoder(
            latent_channels=4,
            encoder_width=8,
            encoder_blocks=1,
            decoder_width=8,
            decoder_blocks=1,
            refiner_width=width,
            refiner_blocks=blocks,
        )


def test_a_refiner_has_half_as_many_blocks_at_half_the_resolution() -> None:
    autoencoder = make_patches(4)
    autoencoder.add_refiner(4, 6)
    assert autoencoder.refiner is not None
    parts = autoencoder.refiner.at_quarter, autoencoder.refiner.at_half
    assert [sum(isinstance(x, ResidualBlock) for x in part) for part in parts] == [6, 3]
