"""A complete codec of the real classes, tiny and random, built without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from percov2.analysis.autoencoder import PATCH, PatchAutoencoder
from percov2.analysis.hyper_encoder import HyperEncoder
from percov2.analysis.vector_quantizer import VectorQuantizer
from percov2.components import (
    CodecComponents,
    CodecConfig,
    TokenizerComponents,
    compute_model_id,
)
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.synthesis.flow import Flow
from percov2.synthesis.flow_transformer import extend_patch_embedding
from percov2.synthesis.latent_decoder import LatentDecoder
from percov2.synthesis.sampler import Tiling
from percov2.synthesis.text_conditioner import tiny_text_conditioner
from tests.tiny_models import randomise, tiny_clip_tokenizer

LATENT_CHANNELS = 4
FEATURE_CHANNELS = 16
CODEBOOK_SIZE = 32
TEXT_WIDTH = 16


def _set_components(autoencoder: PatchAutoencoder) -> None:
    """Keep a patch's mean of each colour and its horizontal slope."""
    means = torch.eye(3).repeat_interleave(PATCH * PATCH, dim=1) / PATCH
    slope = torch.linspace(-1, 1, PATCH).repeat(3 * PATCH)
    autoencoder.components.copy_(torch.cat([means, slope[None] / slope.norm()]))
    autoencoder.scale.fill_(PATCH / 2)


@torch.no_grad()
def _fit_codebook(parts: TokenizerComponents, reduction: int) -> None:
    """Make the codes features of one random picture of 8x8 tokens, coloured in blocks."""
    colours = torch.rand(1, 3, 8, 8) * 2 - 1
    picture = torch.nn.functional.interpolate(colours, scale_factor=8.0 * reduction)
    features = parts.hyper_encoder(parts.autoencoder.encode(picture))
    vectors = parts.quantizer.project_in(features)[0].flatten(1).T
    choice = torch.randperm(len(vectors))[:CODEBOOK_SIZE]
    parts.quantizer.codebook.copy_(torch.nn.functional.normalize(vectors[choice], dim=1))


def tiny_tokenizer(*, reduction: int = 2, seed: int = 0) -> TokenizerComponents:
    """Stage 1's parts: random weights, 4 latent channels, 16 feature channels, 32 codes.

    The autoencoder keeps the mean colour of a patch, and the codes are features of a random
    picture, so that different pictures give different tokens.

    Args:
        reduction: latents per token along an axis: 1, 2, 4 or 8.
        seed: of all weights; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = PatchAutoencoder(
            latent_channels=LATENT_CHANNELS,
            encoder_width=8,
            encoder_blocks=1,
            decoder_width=8,
            decoder_blocks=1,
        )
        _set_components(autoencoder)
        parts = TokenizerComponents(
            autoencoder=autoencoder,
            hyper_encoder=HyperEncoder(
                latent_channels=LATENT_CHANNELS,
                hidden_channels=16,
                out_channels=FEATURE_CHANNELS,
                reduction=reduction,
            ),
            quantizer=VectorQuantizer(
                feature_channels=FEATURE_CHANNELS,
                codebook_size=CODEBOOK_SIZE,
                code_dim=8,
                decay=0.9,
                revival_threshold=0.05,
            ),
            latent_decoder=LatentDecoder(
                feature_channels=FEATURE_CHANNELS,
                latent_channels=LATENT_CHANNELS,
                hidden_channels=16,
                min_channels=8,
                blocks=1,
                reduction=reduction,
            ),
            masked_transformer=MaskedTransformer(
                codebook_size=CODEBOOK_SIZE, dim=16, num_layers=2, num_heads=2, window=4
            ),
        )
        _fit_codebook(parts, reduction)
        # Fresh weights make a model that predicts almost uniformly; these make it opinionated.
        randomise(parts.masked_transformer, std=0.3)
    for module in parts.modules().values():
        module.eval()
    return parts


def tiny_components(
    *,
    reduction: int = 2,
    schedule: str = "quincunx",
    from_prediction: bool = False,
    seed: int = 0,
    name: str = "test",
) -> CodecComponents:
    """All parts of a codec in evaluation mode, its model id computed.

    Args:
        reduction: latents per token along an axis: 1, 2, 4 or 8.
        schedule: one of `percov2.entropy.schedules.SCHEDULES`.
        from_prediction: the flow starts from the latent decoder's prediction, with sigma 0.5.
        seed: of all weights; torch's global generator is left as it was.
        name: of the model.
    """
    tokenizer = tiny_tokenizer(reduction=reduction, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        text_conditioner = tiny_text_conditioner(
            tokenizer=tiny_clip_tokenizer(), hidden_size=TEXT_WIDTH, layers=2, heads=2
        )
        transformer = extend_patch_embedding(
            SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * TEXT_WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * TEXT_WIDTH,
                pos_embed_max_size=16,
                qk_norm="rms_norm",
            ),
            tokenizer.latent_decoder.condition_channels,
        )
        # The new input channels start at zero: without this the tokens would not be seen.
        randomise(transformer.pos_embed, std=0.2)
    config = CodecConfig(
        name=name,
        model_id=0,
        schedule=schedule,
        latents_per_token=reduction,
        flow=Flow(shift=3.0, from_prediction=from_prediction, sigma=0.5 if from_prediction else 1),
        tiling=Tiling(size=16, overlap=4, batch=2),
        default_steps=2,
        default_guidance=2.0,
    )
    model_id = compute_model_id(
        tokenizer.masked_transformer, tokenizer.quantizer.codebook, schedule
    )
    return CodecComponents(
        config=replace(config, model_id=model_id),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        text_conditioner=text_conditioner.eval(),
    )


def save_tiny(
    directory: Path,
    *,
    reduction: int = 2,
    schedule: str = "quincunx",
    from_prediction: bool = False,
    seed: int = 0,
    name: str = "test",
) -> CodecComponents:
    """Save `tiny_components` as a model directory and return them."""
    components = tiny_components(
        reduction=reduction,
        schedule=schedule,
        from_prediction=from_prediction,
        seed=seed,
        name=name,
    )
    components.save(directory)
    return components
