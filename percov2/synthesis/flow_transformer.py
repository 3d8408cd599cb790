"""SD3's transformer with a patch embedding that also takes the tokens' features.

Shape legend: B batch, C latent channels, K condition channels, h and w latent rows and columns
(multiples of the patch size, 2), L text length, D text channels, P pooled text channels.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from percov2.synthesis.flow import NUM_TRAIN_TIMESTEPS


def extend_patch_embedding(
    transformer: SD3Transformer2DModel, condition_channels: int
) -> SD3Transformer2DModel:
    """A copy of the transformer that takes K more input channels, their weights zero.

    With any features in the new channels the output equals the original's, so that finetuning
    starts from SD3. The result is a plain ``SD3Transformer2DModel`` (``in_channels = C + K``,
    ``out_channels = C``): diffusers saves and loads it like any other.

    Args:
        transformer: the original; its weights are shared with the copy, not cloned.
        condition_channels: K > 0.

    Raises:
        ValueError: K < 1, or a transformer that is already extended.
    """
    if condition_channels < 1:
        raise ValueError(f"condition_channels is {condition_channels}: it must be at least 1")
    config, latent_channels = transformer.config, transformer.out_channels
    if config.in_channels != latent_channels:
        raise ValueError(
            f"the transformer takes {config.in_channels} channels and returns {latent_channels}: "
            "it is extended already"
        )
    with torch.device("meta"):
        extended = SD3Transformer2DModel.from_config(
            config,
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
        )
    state = dict(transformer.state_dict(keep_vars=True))
    old = state["pos_embed.proj.weight"]
    added = old.new_zeros(old.shape[0], condition_channels, *old.shape[2:])
    state["pos_embed.proj.weight"] = nn.Parameter(torch.cat([old.detach(), added], dim=1))
    extended.load_state_dict(state, assign=True)
    return extended.train(transformer.training)


def predict_velocity(
    transformer: SD3Transformer2DModel,
    x_t: Tensor,
    condition: Tensor,
    t: Tensor,
    text: Tensor,
    pooled_text: Tensor,
) -> Tensor:
    """Velocity (B, C, h, w) from x_t (B, C, h, w), condition (B, K, h, w) and times t (B,).

    ``text`` is (B, L, D), ``pooled_text`` (B, P). Times are in [0, 1], 1 is the source.
    """
    velocity: Tensor = transformer(
        hidden_states=torch.cat([x_t, condition], dim=1),
        encoder_hidden_states=text,
        pooled_projections=pooled_text,
        timestep=t * NUM_TRAIN_TIMESTEPS,
        return_dict=False,
    )[0]
    return velocity
