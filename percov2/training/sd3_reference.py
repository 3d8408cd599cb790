"""The published configurations of Stable Diffusion 3 and 3.5, as data.

Nothing is fetched: with these a model of the right shape is built on the meta device, to count its
memory (`percov2.training.memory`) and to test the warm start. The originals are gated, so the
values were read from public copies of the same files:

- SD3-medium, transformer: https://huggingface.co/v2ray/stable-diffusion-3-medium-diffusers
- SD3.5-medium, transformer: https://huggingface.co/Prgckwb/trpfrog-sd3.5-medium
- SD3.5-large, transformer: https://huggingface.co/frankjoshua/stable-diffusion-3.5-large
- autoencoder: https://huggingface.co/shivi/stable-diffusion-3-medium-diffusers
- text encoders: https://huggingface.co/bhoomikagp/sd3-interior-model (CLIP bigG),
  https://huggingface.co/cwz/trained-sd3 (CLIP L), https://huggingface.co/jatr96/trained-sd3 (T5)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

_MEDIUM: dict[str, Any] = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _MEDIUM,
    "stabilityai/stable-diffusion-3.5-medium": _MEDIUM
    | {
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    },
    "stabilityai/stable-diffusion-3.5-large": _MEDIUM
    | {
        "caption_projection_dim": 2432,
        "num_attention_heads": 38,
        "num_layers": 38,
        "qk_norm": "rms_norm",
    },
}
"""`transformer/config.json` by hub id."""

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""`vae/config.json`; the same for all three."""

CLIP_L: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
"""`text_encoder/config.json`."""

CLIP_G: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "max_position_embeddings": 77,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
"""`text_encoder_2/config.json`."""

T5_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
"""`text_encoder_3/config.json`."""

TEXT_LENGTH = 77 + 256
"""Text tokens that the transformer attends to: CLIP's and T5's (zeros where T5 is left out)."""

STORED_BYTES = 2
"""Bytes per weight in the published files, float16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenParts:
    """Parameters of what stage 2 uses beside the transformer.

    Attributes:
        autoencoder: of SD3's autoencoder.
        clip: of both CLIP text encoders.
        t5: of T5's encoder.
        t5_widened: those of them that transformers loads in float32 from files in float16, in
            which they would overflow.
    """

    autoencoder: int
    clip: int
    t5: int
    t5_widened: int

    def text_bytes(self, *, use_t5: bool) -> int:
        """Of the text encoders' weights, loaded as they are stored."""
        if not use_t5:
            return STORED_BYTES * self.clip
        return STORED_BYTES * (self.clip + self.t5) + (4 - STORED_BYTES) * self.t5_widened


def transformer_config(model: str) -> dict[str, Any]:
    """Configuration of the transformer of a hub id, or of a directory in diffusers' layout.

    Raises:
        ValueError: neither a directory with `transformer/config.json` nor a known hub id.
    """
    path = Path(model) / "transformer" / "config.json"
    if path.is_file():
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in config.items() if not name.startswith("_")}
    if model not in TRANSFORMERS:
        raise ValueError(
            f"the architecture of {model!r} is not known: give a directory with "
            f"transformer/config.json or one of {', '.join(TRANSFORMERS)}"
        )
    return TRANSFORMERS[model]


def build_transformer(config: dict[str, Any]) -> SD3Transformer2DModel:
    """The transformer of a configuration, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return SD3Transformer2DModel(**config)


def build_autoencoder() -> AutoencoderKL:
    """SD3's autoencoder on the meta device."""
    with torch.device("meta"):
        return AutoencoderKL(**VAE)


def build_text_encoders() -> list[nn.Module]:
    """CLIP L, CLIP bigG and T5 XXL on the meta device."""
    with torch.device("meta"):
        return [
            CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)),
            CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
            T5EncoderModel(T5Config(**T5_XXL)),
        ]


def frozen_parts() -> FrozenParts:
    """Count the parameters of autoencoder and text encoders."""
    encoders = build_text_encoders()
    clip_l, clip_g, t5 = (parameter_count(encoder) for encoder in encoders)
    return FrozenParts(
        autoencoder=parameter_count(build_autoencoder()),
        clip=clip_l + clip_g,
        t5=t5,
        t5_widened=widened_count(encoders[2]),
    )


def widened_count(encoder: nn.Module) -> int:
    """Values of the layers that transformers keeps in float32 when it loads float16."""
    widened = encoder._keep_in_fp32_modules
    assert isinstance(widened, set)
    return sum(
        parameter_count(module)
        for name, module in encoder.named_modules()
        if name.rpartition(".")[2] in widened
    )


def parameter_count(module: nn.Module) -> int:
    """Values of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
