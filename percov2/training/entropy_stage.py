"""Stage 1: hyper-encoder, quantiser, latent decoder and masked image model. It needs no SD3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import ModelMixin
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from percov2.analysis.hyper_encoder import HyperEncoder
from percov2.analysis.vector_quantizer import VectorQuantizer
from percov2.components import TokenizerComponents, load_autoencoder
from percov2.data.samples import Batch
from percov2.entropy.masked_transformer import (
    MaskedTransformer,
    draw_training_masks,
    masked_cross_entropy,
)
from percov2.entropy.schedules import make_schedule
from percov2.synthesis.latent_decoder import LatentDecoder
from percov2.token_chooser import TokenChooser
from percov2.training.autoencoder_stage import psnr
from percov2.training.batches import image_of, latents_of
from percov2.training.hub import local_copy
from percov2.training.notice import autoencoder_changes, write_notice
from percov2.training.optimization import Optimization, Phase, build_optimizer
from percov2.training.processes import total_over_processes
from percov2.training.randomness import sample_generators
from percov2.training.take_over import take_over, take_over_if_equal


class EntropyStage(L.LightningModule):
    """Latent reconstruction + rate, in two phases that may overlap.

    Steps 0 .. ``tokenizer_steps`` - 1 train hyper-encoder, quantiser and latent decoder; steps
    from ``masked_steps_from`` on train the masked transformer on detached tokens. With
    ``tokenizer_steps`` equal to ``masked_steps_from`` no compute is spent on modelling tokens
    that still move. With ``start`` both may be 0: the tokenizer is then frozen and the masked
    transformer trained alone.

    Args:
        autoencoder: directory that holds an `autoencoder` or a `vae` folder, or the hub id of a
            model in diffusers' layout, whose `vae` is fetched; frozen.
        hyper_encoder: to be trained.
        quantizer: to be trained.
        latent_decoder: to be trained.
        masked_transformer: to be trained.
        schedule: that the masked transformer learns.
        tokenizer_optimization: of hyper-encoder, quantiser's projections and latent decoder.
        masked_optimization: of the masked transformer.
        tokenizer_steps: see above.
        masked_steps_from: see above.
        pixel_weight: of the squared error of the decoded prediction, beside that of the latents;
            0 spares the autoencoder's decoder.
        commitment_weight: of the quantiser's commitment loss; 0 is PerCo's choice.
        random_mask_share: share of samples with random instead of scheduled masks, in [0, 1].
        min_targets: of a sample with a scheduled mask, see `draw_training_masks`.
        rate_weight: with which tokens are chosen, see `percov2.token_chooser`: those of the encoder
            that tokenizer and masked transformer are for.
        color_weight: likewise; what codes decode to is measured when training begins, and at every
            step of a tokenizer that learns.
        latent_weight: likewise.
        seed: of the masks.
        start: stage 1 directory whose hyper-encoder, quantiser and latent decoder are taken over,
            and the masked transformer too if its architecture is the same.

    Raises:
        ValueError: phases that leave a gap, a tokenizer that is neither trained nor taken over, or
            a ``start`` that is configured otherwise.
    """

    def __init__(
        self,
        *,
        autoencoder: str,
        hyper_encoder: HyperEncoder,
        quantizer: VectorQuantizer,
        latent_decoder: LatentDecoder,
        masked_transformer: MaskedTransformer,
        schedule: str,
        tokenizer_optimization: Optimization,
        masked_optimization: Optimization,
        tokenizer_steps: int,
        masked_steps_from: int,
        pixel_weight: float,
        commitment_weight: float,
        random_mask_share: float = 0.1,
        min_targets: int = 1,
        rate_weight: float = 0.0,
        color_weight: float = 0.0,
        latent_weight: float = 0.0,
        seed: int = 0,
        start: Path | None = None,
    ) -> None:
        super().__init__()
        if not tokenizer_steps and start is None:
            raise ValueError(
                "tokenizer_steps is 0 and start is null, so the tokenizer would stay random: name "
                "a stage 1 directory as start, or train for some steps"
            )
        if masked_steps_from > tokenizer_steps:
            raise ValueError(
                f"masked_steps_from {masked_steps_from} > tokenizer_steps {tokenizer_steps}: "
                "nothing would be trained in between"
            )
        local = Path(autoencoder).is_dir()
        directory = Path(autoencoder) if local else local_copy(autoencoder, ["vae"])
        self.autoencoder = load_autoencoder(directory).requires_grad_(False)
        self.hyper_encoder, self.quantizer = hyper_encoder, quantizer
        self.latent_decoder, self.masked_transformer = latent_decoder, masked_transformer
        self.schedule, self.seed = schedule, seed
        self.tokenizer_optimization = tokenizer_optimization
        self.masked_optimization = masked_optimization
        self.tokenizer_steps, self.masked_steps_from = tokenizer_steps, masked_steps_from
        self.pixel_weight, self.commitment_weight = pixel_weight, commitment_weight
        self.random_mask_share, self.min_targets = random_mask_share, min_targets
        self.rate_weight, self.color_weight = rate_weight, color_weight
        self.latent_weight = latent_weight
        self._choose = TokenChooser(self.components(), schedule=schedule)
        self._masked_started = False
        if start is not None:
            self._take_over(start)
        if not tokenizer_steps:
            for part in self._tokenizer().values():
                part.requires_grad_(False)

    def _tokenizer(self) -> dict[str, ModelMixin]:
        """What the first phase trains, by name."""
        return {
            "hyper_encoder": self.hyper_encoder,
            "quantizer": self.quantizer,
            "latent_decoder": self.latent_decoder,
        }

    def _take_over(self, start: Path) -> None:
        for name, part in self._tokenizer().items():
            take_over(part, start, name)
        difference = take_over_if_equal(self.masked_transformer, start, "masked_transformer")
        self._masked_started = difference is None
        if difference is not None:
            rank_zero_warn(f"{difference}: the masked transformer is trained from the beginning")

    def setup(self, stage: str) -> None:
        """Convolutions are up to twice as fast with channels last, on CPU and GPU.

        Before the strategy wraps the module: DDP's buckets then have the gradients' layout.
        """
        self.to(memory_format=torch.channels_last)

    def _tokenizer_loss(self, batch: Batch, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction + commitment, and the tokens (B, r, c)."""
        features = self.hyper_encoder(latents)
        tokens = self.choose_tokens(latents, features)
        quantized = self.quantizer(features, tokens)
        prediction = self.latent_decoder(quantized.features)
        loss = F.mse_loss(prediction, latents)
        self.log("train/latent_mse", loss, prog_bar=True)
        if self.pixel_weight:
            image = image_of(batch, needed_by=f"pixel_weight {self.pixel_weight}")
            pixel_error = F.mse_loss(self.autoencoder.decode(prediction), image)
            self.log("train/pixel_mse", pixel_error, prog_bar=True)
            loss = loss + self.pixel_weight * pixel_error
        self.log("train/commitment", quantized.commitment_loss)
        loss = loss + self.commitment_weight * quantized.commitment_loss
        return loss, tokens

    def _masked_loss(self, tokens: Tensor, keys: list[str], *, step: int) -> Tensor:
        """Bits per token of the masked transformer."""
        groups = make_schedule(self.schedule, *tokens.shape[1:])
        masks = draw_training_masks(
            groups,
            random_share=self.random_mask_share,
            generators=sample_generators(self.seed, step, keys, purpose="masks"),
            min_targets=self.min_targets,
        )
        return masked_cross_entropy(self.masked_transformer, tokens, masks)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the masked transformer start from the codebook that it finds."""
        # Not at every batch of the step: gradients may be accumulated over several.
        if self.global_step == self.masked_steps_from and not self._masked_started:
            self.masked_transformer.init_from_codebook(self.quantizer.codebook, seed=self.seed)
            self._masked_started = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the phase or phases that this step belongs to."""
        tokenizing = self.global_step < self.tokenizer_steps
        with torch.no_grad():
            latents = latents_of(batch, self.autoencoder)
        if tokenizing:
            loss, tokens = self._tokenizer_loss(batch, latents)
        else:
            tokens = self.choose_tokens(latents)
            loss = latents.new_zeros(())
        if self.global_step >= self.masked_steps_from:
            bits = self._masked_loss(tokens, batch["key"], step=self.global_step)
            self.log("train/bits_per_token", bits, prog_bar=True)
            loss = loss + bits
        return loss

    def choose_tokens(self, latents: Tensor, features: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) to tokens (B, r, c), without moving the codebook.

        Args:
            latents: of pictures.
            features: the hyper-encoder's of these latents, where they are known already.
        """
        # Behind the tokenizer's last step too, which has moved what was measured before it.
        if self.global_step <= self.tokenizer_steps:
            self._choose.forget()
        return self._choose(
            latents,
            features,
            rate_weight=self.rate_weight,
            color_weight=self.color_weight,
            latent_weight=self.latent_weight,
        )

    def on_validation_epoch_start(self) -> None:
        """Start the histogram of held-out tokens; the coder serves the whole epoch."""
        self._coder = self.components().token_coder(self.schedule, device=self.device)
        self._counts = torch.zeros(self.quantizer.codebook_size, dtype=torch.int64)
        self._bytes = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """PSNR of the predicted latents; real bytes of the token streams."""
        image = image_of(batch, needed_by="validation")
        latents = latents_of(batch, self.autoencoder)
        chosen = self.choose_tokens(latents)
        prediction = self.latent_decoder(self.quantizer.tokens_to_features(chosen))
        size = len(image)
        self.log("val/latent_mse", F.mse_loss(prediction, latents), batch_size=size, sync_dist=True)
        decoded = self.autoencoder.decode(prediction)
        self.log("val/psnr", psnr(decoded, image), batch_size=size, sync_dist=True, prog_bar=True)
        tokens = chosen.cpu()
        self._counts += torch.bincount(tokens.flatten(), minlength=len(self._counts))
        steps = self._coder.steps_total(*tokens.shape[1:])
        for grid in tokens.numpy():
            self._bytes += len(self._coder.encode(grid, steps=steps))

    def on_validation_epoch_end(self) -> None:
        """Bits per token from bytes, beside the entropy that a mere histogram would give."""
        del self._coder  # Of weights that go on to change.
        counted = torch.cat([self._counts, torch.tensor([self._bytes])])
        counted = total_over_processes(self.trainer, counted)
        counts, size = counted[:-1], int(counted[-1])
        share = counts.double() / counts.sum()
        entropy = -(share * share.clamp_min(1e-12).log2()).sum()
        # The same on all processes; Lightning warns of what is not synchronised.
        bits = 8 * size / int(counts.sum())
        self.log("val/bits_per_token", bits, prog_bar=True, sync_dist=True)
        # Lightning reduces a value where it lies, and NCCL knows no main memory.
        used = (counts > 0).sum()
        self.log("val/zero_order_entropy", entropy.float().to(self.device), sync_dist=True)
        self.log("val/codes_used", used.float().to(self.device), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a parameter group, and a schedule, per phase."""
        last = int(self.trainer.estimated_stepping_batches)
        tokenizer = Phase(
            optimization=self.tokenizer_optimization,
            parameters=[p for part in self._tokenizer().values() for p in part.parameters()],
            first=0,
            last=min(self.tokenizer_steps, last),
        )
        masked = Phase(
            optimization=self.masked_optimization,
            parameters=self.masked_transformer.parameters(),
            first=self.masked_steps_from,
            last=last,
        )
        phases = [tokenizer, masked] if self.tokenizer_steps else [masked]
        return build_optimizer(*phases, strategy=self.trainer.strategy)

    def components(self) -> TokenizerComponents:
        """The tokenizer in its present state, sharing the stage's weights."""
        return TokenizerComponents(
            autoencoder=self.autoencoder,
            hyper_encoder=self.hyper_encoder,
            quantizer=self.quantizer,
            latent_decoder=self.latent_decoder,
            masked_transformer=self.masked_transformer,
        )

    def export(self, directory: Path) -> None:
        """Write a stage 1 directory."""
        self.components().save(directory)
        write_notice(directory, autoencoder_changes(self.autoencoder))
