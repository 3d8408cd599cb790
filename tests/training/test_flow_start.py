"""Where stage 2 starts from; a whole codec on small models of Stable Diffusion 3's classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import percov2
from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.components import CodecComponents
from percov2.training.flow_start import FromModel, FromScratch, FromStableDiffusion3
from tests.tiny_codec import save_tiny, tiny_components
from tests.tiny_models import CAPTIONS, tiny_sd3_pipeline


@pytest.fixture(scope="module")
def sd3_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline saved by diffusers itself, in SD3's layout, with T5."""
    directory = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    tiny_sd3_pipeline(with_t5=True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("use_t5", [False, True])
def test_stable_diffusion_3_is_loaded_and_extended(sd3_directory: Path, use_t5: bool) -> None:
    transformer, text = FromStableDiffusion3(model=str(sd3_directory), use_t5=use_t5).build(7, 4)
    assert transformer.config.in_channels == 4 + 7
    assert transformer.config.out_channels == 4
    assert (transformer.pos_embed.proj.weight[:, 4:] == 0).all()
    assert text.has_t5 == use_t5


def test_an_unreachable_repository_names_licence_and_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = FromStableDiffusion3(
        model="stabilityai/stable-diffusion-3-medium-diffusers", use_t5=False
    )
    with pytest.raises(ValueError, match="accept the licence") as refusal:
        start.build(8, 16)
    assert "HF_TOKEN" in str(refusal.value)


def test_another_rate_of_other_widths_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match="same widths"):
        FromModel(directory=tmp_path).build(99, 4)


def test_from_scratch_learns_its_vocabulary_from_the_captions(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    start = FromScratch(
        num_layers=1,
        num_heads=2,
        head_dim=8,
        max_patches=8,
        captions=tmp_path / "captions.txt",
        vocab_size=520,
        text_length=12,
        text_dim=8,
        text_layers=2,
        text_heads=1,
    )
    transformer, text = start.build(5, 4)
    assert transformer.config.in_channels == 9
    assert text(["a cat"]).embeddings.shape == (1, 12, 16)


def test_a_codec_with_stable_diffusion_3s_autoencoder(
    tmp_path: Path, photograph: Image.Image
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    components = tiny_components()
    tokenizer = replace(components.tokenizer, autoencoder=StableDiffusionAutoencoder(vae).eval())
    replace(components, tokenizer=tokenizer).save(tmp_path)
    assert (tmp_path / "vae" / "config.json").is_file()
    loaded = CodecComponents.load(tmp_path)
    assert isinstance(loaded.tokenizer.autoencoder, StableDiffusionAutoencoder)
    codec = percov2.load(str(tmp_path))
    data = codec.compress(photograph, caption="a")
    assert np.array_equal(codec.decode_tokens(data), codec.encode_tokens(photograph))
    assert codec.decompress(data, steps=2).size == photograph.size
