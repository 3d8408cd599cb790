"""Where stage 2's transformer and text encoders come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from percov2.components import CodecComponents
from percov2.synthesis.flow_transformer import extend_patch_embedding
from percov2.synthesis.text_conditioner import (
    TextConditioner,
    tiny_text_conditioner,
    train_clip_tokenizer,
)
from percov2.training.hub import local_copy

WIDENED = ("pos_embed.proj.weight",)
"""Parameters that differ in shape from the published model's; none is missing, none is new.

The patch embedding's weight (D, C, p, p) becomes (D, C + K, p, p) for K condition channels: the
first C are the published ones, the rest starts at zero.
"""


class FlowStart(ABC):
    """A starting point for stage 2."""

    @abstractmethod
    def build(
        self, condition_channels: int, latent_channels: int
    ) -> tuple[SD3Transformer2DModel, TextConditioner]:
        """The transformer, already extended by the condition channels, and text encoders."""


@dataclass(frozen=True, kw_only=True)
class FromScratch(FlowStart):
    """Small, randomly initialised networks of SD3's classes.

    Attributes:
        num_layers: transformer blocks.
        num_heads: attention heads.
        head_dim: channels per head.
        max_patches: side of the table of position embeddings, in 2x2 patches of latents.
        captions: text file, a caption a line, that the tokenizer's vocabulary is learned from.
        vocab_size: of the tokenizer.
        text_length: captions are cut to this many tokens.
        text_dim: channels of each of the two CLIP encoders.
        text_layers: of each.
        text_heads: of each.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    max_patches: int
    captions: Path
    vocab_size: int
    text_length: int
    text_dim: int
    text_layers: int
    text_heads: int

    def build(
        self, condition_channels: int, latent_channels: int
    ) -> tuple[SD3Transformer2DModel, TextConditioner]:
        """See `FlowStart.build`."""
        lines = Path(self.captions).read_text(encoding="utf-8").splitlines()
        text = tiny_text_conditioner(
            tokenizer=train_clip_tokenizer(
                lines, vocab_size=self.vocab_size, max_length=self.text_length
            ),
            hidden_size=self.text_dim,
            layers=self.text_layers,
            heads=self.text_heads,
        )
        transformer = SD3Transformer2DModel(
            sample_size=2 * self.max_patches,
            patch_size=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=self.num_layers,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.num_heads,
            joint_attention_dim=2 * self.text_dim,
            caption_projection_dim=self.num_heads * self.head_dim,
            pooled_projection_dim=2 * self.text_dim,
            pos_embed_max_size=self.max_patches,
            qk_norm="rms_norm",
        )
        # Nothing is known yet: a flow from the prediction then begins by painting the prediction.
        torch.nn.init.zeros_(transformer.proj_out.weight)
        torch.nn.init.zeros_(transformer.proj_out.bias)
        return extend_patch_embedding(transformer, condition_channels), text


@dataclass(frozen=True, kw_only=True)
class FromModel(FlowStart):
    """Transformer and text encoders of a percov2 model, for another rate of the same shape.

    Attributes:
        directory: a stage 2 directory.
    """

    directory: Path

    def build(
        self, condition_channels: int, latent_channels: int
    ) -> tuple[SD3Transformer2DModel, TextConditioner]:
        """See `FlowStart.build`.

        Raises:
            ValueError: the model's condition has another number of channels.
        """
        model = CodecComponents.load(Path(self.directory))
        found = model.transformer.config.in_channels
        if found != latent_channels + condition_channels:
            raise ValueError(
                f"{self.directory}: its transformer takes {found} channels, this stage 1 gives "
                f"{latent_channels} + {condition_channels}: use a stage 1 of the same widths"
            )
        return model.transformer, model.text_conditioner


@dataclass(frozen=True, kw_only=True)
class FromStableDiffusion3(FlowStart):
    """SD3-medium or SD3.5 in diffusers' layout, from the hub (gated) or a directory.

    Attributes:
        model: hub id or directory.
        use_t5: load the third text encoder (10 GB in float16).
        revision: of the hub repository.
    """

    model: str
    use_t5: bool
    revision: str | None = None

    def build(
        self, condition_channels: int, latent_channels: int
    ) -> tuple[SD3Transformer2DModel, TextConditioner]:
        """See `FlowStart.build`.

        Raises:
            ValueError: the repository cannot be reached or read, or does not fit stage 1; says
                what to do.
        """
        folders = [f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2")]
        if self.use_t5:
            folders += ["text_encoder_3", "tokenizer_3"]
        directory = local_copy(self.model, ["transformer", *folders], revision=self.revision)
        transformer = load_transformer(directory)
        if transformer.config.in_channels != latent_channels:
            raise ValueError(
                f"{self.model} paints {transformer.config.in_channels} latent channels, stage 1's "
                f"autoencoder has {latent_channels}: train stage 1 with this model's own"
            )
        text = TextConditioner.from_sd3(
            directory,
            use_t5=self.use_t5,
            joint_dim=int(transformer.config.joint_attention_dim),
        )
        return extend_strictly(transformer, condition_channels), text


def load_transformer(directory: Path) -> SD3Transformer2DModel:
    """The float32 transformer of a directory in diffusers' layout, key by key.

    Raises:
        ValueError: weights that are missing, unknown or of another shape.
    """
    folder = directory / "transformer"
    try:
        transformer, info = SD3Transformer2DModel.from_pretrained(
            str(folder),
            # Master weights: the files hold half precision.
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load {folder} ({reason}): fetch the model again") from error
    faults = {fault: sorted(map(str, keys)) for fault, keys in info.items() if keys}
    if faults:
        raise ValueError(
            f"weights in {folder} do not fit its config.json ({faults}): fetch the model again"
        )
    loaded: SD3Transformer2DModel = transformer
    return loaded


def extend_strictly(
    transformer: SD3Transformer2DModel, condition_channels: int
) -> SD3Transformer2DModel:
    """`extend_patch_embedding`, and the proof that nothing but `WIDENED` has changed."""
    before = {name: value.shape for name, value in transformer.state_dict().items()}
    extended = extend_patch_embedding(transformer, condition_channels)
    after = {name: value.shape for name, value in extended.state_dict().items()}
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == set(WIDENED), changed
    return extended
