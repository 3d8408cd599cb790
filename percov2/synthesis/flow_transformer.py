"""SD3's transformer with a patch embedding that also takes the tokens' features.

Shape legend: B batch, C latent channels, K condition channels, h and w latent rows and columns
(multiples of the patch size, 2), L text length, D text channels, P pooled text channels.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from percov2.synthesis.flow import NUM_TRAIN_TIMESTEPS, Flow


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


def predict(
    transformer: SD3Transformer2DModel,
    x_t: Tensor,
    condition: Tensor,
    t: Tensor,
    text: Tensor,
    pooled_text: Tensor,
) -> Tensor:
    """The network's output (B, C, h, w), float32, computed in the network's own precision.

    Args:
        transformer: extended by K channels.
        x_t: (B, C, h, w).
        condition: (B, K, h, w).
        t: (B,) times in [0, 1], 1 is the source.
        text: (B, L, D).
        pooled_text: (B, P).
    """
    output: Tensor = transformer(
        hidden_states=torch.cat([x_t, condition], dim=1).to(transformer.dtype),
        encoder_hidden_states=text.to(transformer.dtype),
        pooled_projections=pooled_text.to(transformer.dtype),
        # In float32: in half precision 1000 t would be off by several steps.
        timestep=t.float() * NUM_TRAIN_TIMESTEPS,
        return_dict=False,
    )[0]
    return output.float()


def predict_velocity(
    flow: Flow,
    transformer: SD3Transformer2DModel,
    x_t: Tensor,
    condition: Tensor,
    t: Tensor,
    text: Tensor,
    pooled_text: Tensor,
) -> Tensor:
    """Velocity (B, C, h, w) of the flow; arguments as of `predict`, t > 0.

    The predicted latents are the last C channels of the condition
    (`percov2.synthesis.latent_decoder.LatentDecoder.condition`).
    """
    output = predict(transformer, x_t, condition, t, text, pooled_text)
    prediction = condition[:, condition.shape[1] - x_t.shape[1] :]
    return flow.output_to_velocity(output, x_t, prediction, t)
