"""Stage 2: the flow transformer learns to paint the latents from tokens and caption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.components import CodecComponents, CodecConfig, TokenizerComponents
from percov2.data.samples import Batch
from percov2.entropy.masked_transformer import draw_training_masks, masked_cross_entropy
from percov2.entropy.schedules import make_schedule
from percov2.noise import seeded_noise
from percov2.synthesis.flow import Flow
from percov2.synthesis.flow_transformer import predict, predict_velocity
from percov2.synthesis.sampler import Tiling, sample
from percov2.synthesis.text_conditioner import TextCondition, TextConditioner
from percov2.token_chooser import TokenChooser
from percov2.training.adaptation import Adaptation
from percov2.training.adversary import Adversary, as_shown
from percov2.training.autoencoder_stage import psnr
from percov2.training.batches import image_of, latents_of
from percov2.training.flow_start import FlowStart
from percov2.training.notice import autoencoder_changes, write_notice
from percov2.training.optimization import Optimization, Phase, build_optimizer
from percov2.training.perceptual import LpipsNet, PerceptualLoss
from percov2.training.randomness import sample_generators


class _Condition(NamedTuple):
    """What the flow gets to know of latents (B, C, h, w).

    Attributes:
        tokens: (B, r, c).
        features: (B, K, h, w), of the latent decoder.
        prediction: (B, C, h, w), of the latents.
        commitment: of the quantiser, a scalar; 0 for a frozen one.
    """

    tokens: Tensor
    features: Tensor
    prediction: Tensor
    commitment: Tensor


class FlowStage(L.LightningModule):
    """Conditional flow matching on stage 1's tokens.

    With ``train_tokenizer`` the hyper-encoder, quantiser and latent decoder learn from the flow's
    loss too, on the tokens that the encoder would choose at present, and the masked transformer
    follows on detached tokens, so that the entropy model stays true; otherwise all of them are
    frozen.

    Args:
        tokenizer: stage 1 directory.
        start: where transformer and text encoders come from.
        adaptation: which weights of the transformer are trained.
        flow: path, shift, source and training times.
        tiling: stored with the model: tiles of at most the training crop.
        optimization: of all that is trained.
        name: of the model, shown by `percov2 info`.
        schedule: that stage 1's masked transformer learned.
        caption_dropout: share of samples trained without caption, in [0, 1].
        train_tokenizer: see above.
        train_text_encoders: whether the text encoders learn (tiny ones must, SD3's must not).
        default_steps: stored with the model.
        default_guidance: stored with the model.
        sharpness: stored with the model; an adversary judges pictures that are sharpened so.
        grain: likewise, with this grain.
        cached_text: whether the data bring the text of their captions (a cache). The text encoders
            are then not loaded until the model is exported.
        gradient_checkpointing: compute the transformer's activations anew in the backward pass:
            a third more compute, far less memory.
        lpips_weight: of LPIPS between the decoded estimate of the data and the image, with
            gradient through the autoencoder's decoder; 0 spares it. The paper uses 0.1 above
            0.05 bpp.
        lpips_net: backbone of LPIPS.
        commitment_weight: of the quantiser's commitment loss, for a tokenizer that learns; 0 is
            PerCo's choice.
        rate_weight: with which tokens are chosen, in training and by the model's encoder; see
            `percov2.token_chooser`.
        color_weight: likewise; what codes decode to is measured when training begins, and at every
            step of a tokenizer that learns.
        latent_weight: likewise.
        adversary: judges the decoded estimates of the data, for a flow that is to paint in a few
            steps; training times are then those of its sampling grid.
        validation_steps: sampling steps of the validation images.
        half: export float16 weights.
        seed: of noise, times and caption drop.

    Raises:
        ValueError: parts that do not fit together; ``cached_text`` with text encoders that are
            to learn or do not exist yet.
    """

    def __init__(
        self,
        *,
        tokenizer: Path,
        start: FlowStart,
        adaptation: Adaptation,
        flow: Flow,
        tiling: Tiling,
        optimization: Optimization,
        name: str,
        schedule: str,
        caption_dropout: float,
        train_tokenizer: bool,
        train_text_encoders: bool,
        default_steps: int,
        default_guidance: float,
        sharpness: float = 0.0,
        grain: float = 0.0,
        cached_text: bool = False,
        gradient_checkpointing: bool = False,
        lpips_weight: float = 0.0,
        lpips_net: LpipsNet = "vgg",
        commitment_weight: float = 0.0,
        rate_weight: float = 0.0,
        color_weight: float = 0.0,
        latent_weight: float = 0.0,
        adversary: Adversary | None = None,
        validation_steps: int = 4,
        half: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        parts = TokenizerComponents.load(tokenizer)
        self.autoencoder = parts.autoencoder.requires_grad_(False)
        trained = {"hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"}
        for part, module in parts.modules().items():
            setattr(self, part, module.requires_grad_(train_tokenizer and part in trained))
        start.take_over_decoder(self.autoencoder)
        if adversary is not None:
            adversary.prepare(self.autoencoder)
        self.parts, self.adversary = parts, adversary
        self.decoder_trained = adversary is not None and adversary.train_decoder
        self.autoencoder.decoder.requires_grad_(self.decoder_trained)
        self.start, self.cached_text, self._t5_checked = start, cached_text, False
        self.text_conditioner = self._text_encoders(train_text_encoders)
        self.transformer = start.build_transformer(
            parts.latent_decoder.condition_channels, parts.autoencoder.latent_channels
        )
        adaptation.apply(self.transformer)
        self.adaptation = adaptation
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.config = CodecConfig(
            name=name,
            model_id=0,
            schedule=schedule,
            latents_per_token=int(parts.hyper_encoder.config.reduction),
            flow=flow,
            tiling=tiling,
            default_steps=default_steps,
            default_guidance=default_guidance,
            sharpness=sharpness,
            grain=grain,
            rate_weight=rate_weight,
            color_weight=color_weight,
            latent_weight=latent_weight,
        )
        self._choose = TokenChooser(parts, schedule=schedule)
        self.flow, self.optimization = flow, optimization
        self.lpips_weight = lpips_weight
        self.lpips = PerceptualLoss(lpips_net) if lpips_weight else None
        self.caption_dropout, self.train_tokenizer = caption_dropout, train_tokenizer
        self.commitment_weight = commitment_weight
        self.validation_steps, self.half_export, self.seed = validation_steps, half, seed

    def _text_encoders(self, trained: bool) -> TextConditioner | None:
        """None if a cache stands in for them."""
        if not self.cached_text:
            text = self.start.build_text().requires_grad_(trained)
            # Half precision, as they may be stored, cannot hold the steps of an optimiser.
            return text.float() if trained else text
        if trained:
            raise ValueError(
                "cached_text and train_text_encoders are both true: what the encoders would learn "
                "could not enter the cache; set one of them false"
            )
        self.start.check_text()
        return None

    def setup(self, stage: str) -> None:
        """Convolutions are up to twice as fast with channels last, on CPU and GPU.

        Before the strategy wraps the module: DDP's buckets then have the gradients' layout.
        """
        self.to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        """Frozen parts stay in evaluation mode: the quantiser must not move its codebook.

        (Lightning calls no start of an epoch when it resumes in the middle of one.)
        """
        for module in self.parts.modules().values():
            module.train(self.train_tokenizer)

    def _condition(self, latents: Tensor) -> _Condition:
        """Latents (B, C, h, w) to tokens and what they tell."""
        with torch.set_grad_enabled(self.train_tokenizer and torch.is_grad_enabled()):
            hyper = self.parts.hyper_encoder(latents)
            tokens = self.choose_tokens(latents, hyper)
            if self.train_tokenizer:
                quantized = self.parts.quantizer(hyper, tokens)
                features, commitment = quantized.features, quantized.commitment_loss
            else:
                features = self.parts.quantizer.tokens_to_features(tokens)
                commitment = latents.new_zeros(())
            return _Condition(tokens, *self.parts.latent_decoder.condition(features), commitment)

    def choose_tokens(self, latents: Tensor, features: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) to tokens (B, r, c), as the model's encoder will choose them.

        Args:
            latents: of pictures.
            features: the hyper-encoder's of these latents, where they are known already.
        """
        config = self.config
        if self.train_tokenizer:
            self._choose.forget()
        return self._choose(
            latents,
            features,
            rate_weight=config.rate_weight,
            color_weight=config.color_weight,
            latent_weight=config.latent_weight,
        )

    def _text(self, batch: Batch, dropped: list[bool]) -> TextCondition:
        """Text of the captions, cached or computed; that of an empty caption where dropped.

        Raises:
            ValueError: the batch holds cached text and ``cached_text`` is false, or the reverse.
        """
        if self.cached_text != ("text_embeddings" in batch):
            holds = "no cached text" if self.cached_text else "cached text"
            raise ValueError(
                f"cached_text is {str(self.cached_text).lower()} and the batch holds {holds}: "
                "change model.cached_text or the data"
            )
        if self.text_conditioner is not None:
            captions = zip(batch["caption"], dropped, strict=True)
            found: TextCondition = self.text_conditioner(
                ["" if drop else c for c, drop in captions]
            )
            return found
        embeddings, pooled = batch["text_embeddings"].clone(), batch["text_pooled"].clone()
        self._check_t5(embeddings)
        if any(dropped):
            if "empty_embeddings" not in batch:
                raise ValueError(
                    f"caption_dropout is {self.caption_dropout} and the data has no text of an "
                    "empty caption: set data.init_args.empty_text, or caption_dropout 0"
                )
            where = torch.tensor(dropped, device=embeddings.device)
            embeddings[where], pooled[where] = batch["empty_embeddings"], batch["empty_pooled"]
        return TextCondition(embeddings=embeddings, pooled=pooled)

    def _check_t5(self, embeddings: Tensor) -> None:
        """Refuse cached text (B, L, D) of other encoders than the model will be exported with.

        Without T5 zeros take the place of its embeddings, so that no shape tells.

        Raises:
            ValueError: it is with T5 and the start without, or the reverse.
        """
        if self._t5_checked:
            return
        self._t5_checked = True
        wanted, found = self.start.uses_t5(), bool(embeddings[0, -1].any())
        if wanted is not None and found != wanted:
            cached, start = ("with" if one else "without" for one in (found, wanted))
            raise ValueError(
                f"the data hold text {cached} T5, model.start is {start} it: write the cache "
                "anew from the same model and with the same T5, or change model.start"
            )

    def _flow_loss(
        self, latents: Tensor, condition: Tensor, prediction: Tensor, batch: Batch, *, step: int
    ) -> Tensor:
        """Mean squared error of the network's output (velocity or residual), and LPIPS."""
        draws = sample_generators(self.seed, step, batch["key"], purpose="flow")
        t = self._times(draws).to(latents)
        dropped = [bool(torch.rand((), generator=g) < self.caption_dropout) for g in draws]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws])
        # A flow that learns the sampling grid learns the sampler's noise too.
        source = self.flow.source if self.adversary is None else self.flow.sampling_source
        x_1 = source(prediction, noise.to(latents))
        x_t = self.flow.interpolate(latents, x_1, t)
        text = self._text(batch, dropped)
        output = predict(self.transformer, x_t, condition, t, text.embeddings, text.pooled)
        loss = F.mse_loss(output, self.flow.target(latents, x_1, prediction))
        if not self.training:
            return loss
        self.log("train/flow", loss, prog_bar=True)
        if self.lpips is None and self.adversary is None:
            return loss
        estimate = self.flow.output_to_data(output, x_t, prediction, t)
        return self._picture_loss(loss, self.parts.autoencoder.decode(estimate), prediction, batch)

    def _times(self, draws: list[torch.Generator]) -> Tensor:
        """Training times (B,): logit-normal, or with an adversary those of its sampling grid."""
        if self.adversary is None:
            normal = torch.stack([torch.randn((), generator=g) for g in draws])
            return self.flow.normal_to_time(normal)
        grid = self.flow.time_grid(self.adversary.steps)[:-1]
        return torch.stack([grid[torch.randint(len(grid), (), generator=g)] for g in draws])

    def _picture_loss(
        self, flow: Tensor, painted: Tensor, prediction: Tensor, batch: Batch
    ) -> Tensor:
        """The flow's loss, and what LPIPS and adversary say of the painted pictures."""
        loss = flow
        if self.adversary is not None:
            draws = sample_generators(self.seed, self.global_step, batch["key"], purpose="grain")
            sharpness, grain = self.config.sharpness, self.config.grain
            shown = as_shown(painted, sharpness=sharpness, grain=grain, draws=draws)
            original = image_of(batch, needed_by="adversary")
            found = self.adversary(painted, shown, original, prediction)
            for name, value in found._asdict().items():
                self.log(f"train/{name}", value)
            loss = self.adversary.total(flow, found)
        if self.lpips is not None:
            picture = image_of(batch, needed_by=f"lpips_weight {self.lpips_weight}")
            distance = self.lpips(painted, picture)
            self.log("train/lpips", distance)
            loss = loss + self.lpips_weight * distance
        return loss

    def _masked_loss(self, tokens: Tensor, keys: list[str]) -> Tensor:
        """Bits per token of the masked transformer on the present, detached tokens."""
        masks = draw_training_masks(
            make_schedule(self.config.schedule, *tokens.shape[1:]),
            random_share=0.0,
            generators=sample_generators(self.seed, self.global_step, keys, purpose="masks"),
        )
        return masked_cross_entropy(self.parts.masked_transformer, tokens, masks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow matching, and the rate of tokens that move."""
        with torch.no_grad():
            latents = latents_of(batch, self.parts.autoencoder)
        tokens, condition, prediction, commitment = self._condition(latents)
        loss = self._flow_loss(latents, condition, prediction, batch, step=self.global_step)
        if self.train_tokenizer:
            bits = self._masked_loss(tokens, batch["key"])
            self.log("train/bits_per_token", bits, prog_bar=True)
            self.log("train/commitment", commitment)
            loss = loss + bits + self.commitment_weight * commitment
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Flow loss with fixed draws, and PSNR of pictures painted with captions."""
        image = image_of(batch, needed_by="validation")
        size = len(image)
        latents = latents_of(batch, self.parts.autoencoder)
        _, condition, prediction, _ = self._condition(latents)
        loss = self._flow_loss(latents, condition, prediction, batch, step=0)
        self.log("val/flow", loss, batch_size=size, sync_dist=True, prog_bar=True)
        text = self._text(batch, [False] * size)
        noise = seeded_noise(latents.shape, seed=self.seed)

        def velocity(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
            captions = text.embeddings, text.pooled
            return predict_velocity(self.flow, self.transformer, x_t, condition, t, *captions)

        x_1 = self.flow.source(prediction, noise.to(latents))
        painted = sample(self.flow, velocity, condition, x_1, steps=self.validation_steps)
        decoded = self.parts.autoencoder.decode(painted)
        self.log("val/psnr", psnr(decoded, image), batch_size=size, sync_dist=True, prog_bar=True)
        flat = self.parts.autoencoder.decode(prediction)
        self.log("val/psnr_prediction", psnr(flat, image), batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW over all that requires a gradient; the adversary's heads at their own rate."""
        judges = [] if self.adversary is None else list(self.adversary.parameters())
        known = {id(p) for p in judges}
        painters = [p for p in self.parameters() if id(p) not in known]
        phases = [self._phase(self.optimization, painters)]
        if self.adversary is not None:
            phases.append(self._phase(self.adversary.optimization, judges))
        return build_optimizer(*phases, strategy=self.trainer.strategy)

    def _phase(self, optimization: Optimization, parameters: list[nn.Parameter]) -> Phase:
        """The whole run."""
        last = int(self.trainer.estimated_stepping_batches)
        return Phase(optimization=optimization, parameters=parameters, first=0, last=last)

    def components(self, text: TextConditioner) -> CodecComponents:
        """The codec in its present state, sharing the stage's weights.

        Args:
            text: what encodes its captions; the stage's own where it has one.
        """
        return CodecComponents(
            config=self.config,
            tokenizer=self.parts,
            transformer=self.transformer,
            text_conditioner=text,
        )

    def export(self, directory: Path) -> None:
        """Write a complete model directory, adapters merged into the weights.

        With ``cached_text`` the text encoders, as they came, pass through the main memory now.
        """
        plain = self.adaptation.merged(self.transformer)
        text = self.start.build_text() if self.text_conditioner is None else self.text_conditioner
        replace(self.components(text), transformer=plain).save(directory, half=self.half_export)
        changes = self.start.changes() + autoencoder_changes(
            self.parts.autoencoder, decoder_trained=self.decoder_trained
        )
        write_notice(directory, changes)
