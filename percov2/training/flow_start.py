"""Where stage 2's transformer and text encoders come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from percov2.analysis.autoencoder import Autoencoder
from percov2.components import load_autoencoder, load_component, read_index
from percov2.messages import one_line
from percov2.synthesis.flow_transformer import extend_patch_embedding
from percov2.synthesis.text_conditioner import (
    ENCODER_FOLDERS,
    TOKENIZER_FOLDERS,
    TextConditioner,
    read_text_config,
    tiny_text_conditioner,
    train_clip_tokenizer,
)
from percov2.training.checkpointing import shapes_of
from percov2.training.hub import local_copy
from percov2.training.notice import read_changes

WIDENED = ("pos_embed.proj.weight",)
"""Parameters that differ in shape from the published model's; none is missing, none is new.

The patch embedding's weight (D, C, p, p) becomes (D, C + K, p, p) for K condition channels: the
first C are the published ones, the rest starts at zero.
"""


class FlowStart(ABC):
    """A starting point for stage 2."""

    @abstractmethod
    def build_text(self) -> TextConditioner:
        """The text encoders."""

    @abstractmethod
    def check_text(self) -> None:
        """Refuse at the start what `build_text`, put off to the export, would refuse at the end.

        Raises:
            ValueError: the text encoders' files are incomplete, or there are none.
        """

    def uses_t5(self) -> bool | None:
        """Whether a T5 takes part; None where none could, so that no place is kept for it."""
        return None

    @abstractmethod
    def build_transformer(
        self, condition_channels: int, latent_channels: int
    ) -> SD3Transformer2DModel:
        """The transformer, already extended by the condition channels."""

    @abstractmethod
    def take_over_decoder(self, autoencoder: Autoencoder) -> None:
        """Give stage 1's autoencoder the decoder that the flow was trained with, if it has one."""

    @abstractmethod
    def changes(self) -> tuple[str, ...]:
        """What a notice must say of weights that were finetuned from here: a line each."""


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

    def build_text(self) -> TextConditioner:
        """See `FlowStart.build_text`."""
        lines = Path(self.captions).read_text(encoding="utf-8").splitlines()
        return tiny_text_conditioner(
            tokenizer=train_clip_tokenizer(
                lines, vocab_size=self.vocab_size, max_length=self.text_length
            ),
            hidden_size=self.text_dim,
            layers=self.text_layers,
            heads=self.text_heads,
        )

    def check_text(self) -> None:
        """See `FlowStart.check_text`."""
        raise ValueError(
            "cached_text is true and start is FromScratch: no cache can hold what its new text "
            "encoders say; set cached_text false"
        )

    def build_transformer(
        self, condition_channels: int, latent_channels: int
    ) -> SD3Transformer2DModel:
        """See `FlowStart.build_transformer`."""
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
        return extend_patch_embedding(transformer, condition_channels)

    def take_over_decoder(self, autoencoder: Autoencoder) -> None:
        """See `FlowStart.take_over_decoder`: there is none."""

    def changes(self) -> tuple[str, ...]:
        """See `FlowStart.changes`: nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class FromModel(FlowStart):
    """Transformer, text encoders and decoder of a percov2 model, to train on or for another rate.

    Attributes:
        directory: a stage 2 directory.
    """

    directory: Path

    @property
    def _has_t5(self) -> bool:
        return (self.directory / ENCODER_FOLDERS[2]).is_dir()

    def build_text(self) -> TextConditioner:
        """See `FlowStart.build_text`.

        Raises:
            ValueError: they are incomplete.
        """
        return TextConditioner.from_pretrained(self.directory, use_t5=self._has_t5).eval()

    def check_text(self) -> None:
        """See `FlowStart.check_text`."""
        check_text_files(self.directory, use_t5=self._has_t5)

    def uses_t5(self) -> bool | None:
        """See `FlowStart.uses_t5`."""
        _, t5_length = read_text_config(self.directory)
        return self._has_t5 if t5_length else None

    def build_transformer(
        self, condition_channels: int, latent_channels: int
    ) -> SD3Transformer2DModel:
        """See `FlowStart.build_transformer`.

        Raises:
            ValueError: it is incomplete, or its condition has another number of channels.
        """
        read_index(self.directory)
        transformer = load_component(SD3Transformer2DModel, self.directory, "transformer")
        found = transformer.config.in_channels
        if found != latent_channels + condition_channels:
            raise ValueError(
                f"{self.directory}: its transformer takes {found} channels, this stage 1 gives "
                f"{latent_channels} + {condition_channels}: use a stage 1 of the same widths"
            )
        return transformer

    def take_over_decoder(self, autoencoder: Autoencoder) -> None:
        """See `FlowStart.take_over_decoder`: adversarial finetuning may have changed it.

        Raises:
            ValueError: the model's autoencoder has another architecture.
        """
        source = load_autoencoder(self.directory)
        if source.refiner_width:
            autoencoder.add_refiner(source.refiner_width, source.refiner_blocks)
        if shapes_of(source.state_dict()) != shapes_of(autoencoder.state_dict()):
            raise ValueError(
                f"{self.directory}: its autoencoder differs from stage 1's: use a stage 1 that was "
                "trained with the same autoencoder"
            )
        autoencoder.decoder.load_state_dict(source.decoder.state_dict())

    def changes(self) -> tuple[str, ...]:
        """See `FlowStart.changes`: those of that model."""
        return read_changes(self.directory)


@dataclass(frozen=True, kw_only=True)
class FromStableDiffusion3(FlowStart):
    """SD3-medium or SD3.5 in diffusers' layout, from the hub (gated) or a directory.

    Attributes:
        model: hub id (``owner/name``, or ``owner/name@revision``) or directory.
        use_t5: load the third text encoder (10 GB in float16).
    """

    model: str
    use_t5: bool

    @cached_property
    def _local(self) -> Path:
        """Transformer and text encoders, whichever is needed: what is missing shows at once.

        The hub is asked once: at the end of a training it may be out of reach, or have moved on.
        """
        count = 3 if self.use_t5 else 2
        text = [*ENCODER_FOLDERS[:count], *TOKENIZER_FOLDERS[:count]]
        return local_copy(self.model, ["transformer", *text])

    def build_text(self) -> TextConditioner:
        """See `FlowStart.build_text`.

        Raises:
            ValueError: the repository cannot be reached or read; says what to do.
        """
        directory = self._local
        config = SD3Transformer2DModel.load_config(directory / "transformer", local_files_only=True)
        return TextConditioner.from_sd3(
            directory, use_t5=self.use_t5, joint_dim=int(config["joint_attention_dim"])
        )

    def check_text(self) -> None:
        """See `FlowStart.check_text`."""
        check_text_files(self._local, use_t5=self.use_t5)

    def uses_t5(self) -> bool | None:
        """See `FlowStart.uses_t5`."""
        return self.use_t5

    def build_transformer(
        self, condition_channels: int, latent_channels: int
    ) -> SD3Transformer2DModel:
        """See `FlowStart.build_transformer`.

        Raises:
            ValueError: the repository cannot be reached or read, or does not fit stage 1; says
                what to do.
        """
        transformer = load_transformer(self._local)
        if transformer.config.in_channels != latent_channels:
            raise ValueError(
                f"{self.model} paints {transformer.config.in_channels} latent channels, stage 1's "
                f"autoencoder has {latent_channels}: train stage 1 with this model's own"
            )
        return extend_strictly(transformer, condition_channels)

    def take_over_decoder(self, autoencoder: Autoencoder) -> None:
        """See `FlowStart.take_over_decoder`: stage 1 was trained with the published one."""

    def changes(self) -> tuple[str, ...]:
        """See `FlowStart.changes`."""
        return (
            f"transformer: that of {self.model}, its patch embedding widened by the channels of a "
            "condition, finetuned to paint pictures from percov2's tokens and captions.",
            f"text encoders: those of {self.model}, at most rounded to 16 bits.",
        )


def check_text_files(directory: Path, *, use_t5: bool) -> None:
    """Refuse a directory that lacks files of the text encoders.

    Raises:
        ValueError: names the folder.
    """
    for folder in ENCODER_FOLDERS[: 3 if use_t5 else 2]:
        path = directory / folder
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise ValueError(
                f"{path} lacks config.json or weights, which the exported model needs: fetch the "
                "model again"
            )


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
        reason = one_line(error)
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
