"""What validation images cost and how they come back, as pictures and as points."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from percov2.codec import Codec, check_sampling
from percov2.contact_sheet import contact_sheet
from percov2.data.samples import Batch
from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.entropy.token_coder import TokenCoder
from percov2.messages import counted
from percov2.synthesis.text_conditioner import TextCondition, TextConditioner
from percov2.training.autoencoder_stage import psnr
from percov2.training.batches import image_of
from percov2.training.callbacks.monitoring import Stage, ValidationMonitor, coder_of
from percov2.training.entropy_stage import EntropyStage
from percov2.training.flow_stage import FlowStage
from percov2.training.strategy import whole_weights

_SEED = 0
"""Of the noise: a picture changes from one validation to the next by training alone."""
_FONT_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A picture as it came back.

    Attributes:
        picture: of the original's size.
        label: how it was made.
        size: real bytes of what it was decoded from.
        psnr: against the original in dB, on 8-bit values.
    """

    picture: Image.Image
    label: str
    size: int
    psnr: float

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return 8 * self.size / (self.picture.width * self.picture.height)

    @property
    def text(self) -> str:
        """What stands under it on the contact sheet."""
        return f"{self.label}: {self.psnr:.2f} dB\n{self.size} bytes, {self.bpp:.4f} bpp"


class RateDistortionSamples(ValidationMonitor):
    """A contact sheet and a rate-distortion scatter of validation images, in real bytes.

    `FlowStage`: the sheet has, of each image, the original with its caption, what the codec makes
    of its complete stream in 4 and in 20 steps, and what it makes in hybrid mode of a stream with
    half the groups. The bytes are those of the `.pcv2` stream that `percov2.codec.Codec` writes,
    header and caption included. The points of the scatter are in the first number of steps.

    `EntropyStage`: the original, and the prediction that is decoded from the tokens without a
    flow; the bytes are those of the token stream alone.

    Logs the images ``samples/contact_sheet`` and ``samples/rate_distortion`` and, as means over
    the scatter, ``samples/bytes``, ``samples/bpp`` and ``samples/psnr``.

    Args:
        every_n_validations: see `ValidationMonitor`.
        images: rows of the sheet, the first so many of the first process's validation images.
        scatter_images: points of the scatter, from each process; at least ``images``.
        steps: sampling steps of `FlowStage`; the hybrid picture takes the last one.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        every_n_validations: int = 1,
        images: int = 4,
        scatter_images: int = 16,
        steps: tuple[int, ...] = (4, 20),
    ) -> None:
        super().__init__(every_n_validations=every_n_validations)
        if not 1 <= images <= scatter_images:
            raise ValueError(
                f"images is {images}: it must be at least 1 and at most scatter_images "
                f"({scatter_images})"
            )
        if not steps:
            raise ValueError("steps is empty: name a number of sampling steps")
        for count in steps:
            check_sampling(steps=count)
        self.images, self.scatter_images, self.steps = images, scatter_images, tuple(steps)

    def begin(self, stage: Stage) -> None:
        """Forget the validation before."""
        self._rows: list[list[tuple[Image.Image, str]]] = []
        # Rows of bytes, bpp and dB; the same shape on every process, NaN where it has no image.
        self._points = torch.full((self.scatter_images, 3), torch.nan)
        self._seen = 0

    def observe(self, stage: Stage, batch: Batch) -> None:
        """Code and decode the first images.

        Raises:
            ValueError: the batch holds no pictures, or cached text without that of an empty
                caption.
        """
        left = self.scatter_images - self._seen
        if left == 0:
            return
        images = image_of(batch, needed_by="RateDistortionSamples")
        text = codec = coder = None
        if isinstance(stage, FlowStage):
            text = CachedText(batch) if stage.text_conditioner is None else stage.text_conditioner
            codec = live_codec(stage, text)
        else:
            coder = coder_of(stage)
        pairs = zip(images[:left], batch["caption"][:left], strict=True)
        for row, (image, caption) in enumerate(pairs):
            if isinstance(text, CachedText):
                text.row = row
            original = tensor_to_image(image)
            on_sheet = self._seen < self.images
            if codec is None:
                assert isinstance(stage, EntropyStage)
                assert coder is not None
                restored = [predict(stage, coder, original)]
            else:
                steps = self.steps if on_sheet else self.steps[:1]
                restored = decode_all(codec, original, caption, steps=steps, hybrid=on_sheet)
            if on_sheet:
                shown = [(one.picture, one.text) for one in restored]
                self._rows.append([(original, _describe(original, caption)), *shown])
            first = restored[0]
            self._points[self._seen] = torch.tensor([first.size, first.bpp, first.psnr])
            self._seen += 1

    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """Log the first process's sheet and all processes' points."""
        gathered = stage.all_gather(self._points.to(stage.device))
        assert isinstance(gathered, Tensor)
        points = gathered.reshape(-1, 3).cpu()
        points = points[~points.isnan().any(1)]
        if trainer.is_global_zero:
            writer, step = self.writer(trainer), trainer.global_step
            sheet = np.asarray(contact_sheet(self._rows, font_size=_FONT_SIZE))
            writer.add_image("samples/contact_sheet", sheet, step, dataformats="HWC")
            made = counted(self.steps[0], "step") if isinstance(stage, FlowStage) else "prediction"
            figure = scatter(points, title=f"step {step}: {len(points)} images, {made}")
            writer.add_figure("samples/rate_distortion", figure, step)
            means = zip(("bytes", "bpp", "psnr"), points.mean(0).tolist(), strict=True)
            scalars = {f"samples/{name}": mean for name, mean in means}
            self.log_scalars(trainer, scalars, step=step)
        self._rows = []


class CachedText(nn.Module):
    """Stands in for text encoders where a batch holds what they said of its captions.

    Args:
        batch: with text, and with that of an empty caption.

    Raises:
        ValueError: there is none of an empty caption, which guidance needs.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        if "empty_embeddings" not in batch:
            raise ValueError(
                "RateDistortionSamples needs the text of an empty caption: set "
                "data.init_args.empty_text or remove it from trainer.callbacks"
            )
        self.batch, self.row = batch, 0

    def forward(self, captions: Sequence[str]) -> TextCondition:
        """Text of the empty caption, and for every other caption that of the present row."""
        batch, row = self.batch, self.row
        empty = batch["empty_embeddings"], batch["empty_pooled"]
        own = batch["text_embeddings"][row], batch["text_pooled"][row]
        chosen = [own if caption else empty for caption in captions]
        embeddings, pooled = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        return TextCondition(embeddings=embeddings, pooled=pooled)


def live_codec(stage: FlowStage, text: TextConditioner | CachedText) -> Codec:
    """The codec in the stage's present state, on its device, sharing its weights.

    Its streams are of the size that the exported model's will have, but of no model: their
    model id is 0.
    """
    # All that a codec asks of text encoders is to be called with captions.
    components = stage.components(cast(TextConditioner, text))
    with whole_weights(stage.parts.masked_transformer):
        return Codec(components, device=stage.device, in_step=True)


def decode_all(
    codec: Codec, original: Image.Image, caption: str, *, steps: tuple[int, ...], hybrid: bool
) -> list[Restored]:
    """The picture from its complete stream in each number of steps, then in hybrid mode.

    Args:
        codec: in evaluation mode.
        original: picture.
        caption: stored in the stream.
        steps: numbers of sampling steps.
        hybrid: add one from a stream with half the groups, in the last number of steps; not of a
            picture with one group.
    """

    def restored(data: bytes, count: int, label: str) -> Restored:
        picture = codec.decompress(data, steps=count, seed=_SEED)
        distance = measure(original, picture)
        return Restored(picture=picture, label=label, size=len(data), psnr=distance)

    data = codec.compress(original, caption=caption)
    made = [restored(data, count, counted(count, "step")) for count in steps]
    total = codec.summary.steps_total(*original.size)
    if hybrid and total > 1:
        data = codec.compress(original, caption=caption, schedule_steps=total // 2)
        label = f"{total // 2} of {total} groups, {counted(steps[-1], 'step')}"
        made.append(restored(data, steps[-1], label))
    return made


@torch.no_grad()
def predict(stage: EntropyStage, coder: TokenCoder, original: Image.Image) -> Restored:
    """The picture that stage 1 predicts from the tokens, and the bytes of their stream."""
    parts = stage.components()
    latents = parts.autoencoder.encode(image_to_tensor(original)[None].to(stage.device))
    quantized = parts.quantizer(parts.hyper_encoder(latents))
    decoded = parts.autoencoder.decode(parts.latent_decoder(quantized.features))
    tokens = quantized.tokens[0].cpu().numpy()
    data = coder.encode(tokens, steps=coder.steps_total(*tokens.shape))
    picture = tensor_to_image(decoded[0])
    return Restored(
        picture=picture, label="prediction", size=len(data), psnr=measure(original, picture)
    )


def measure(a: Image.Image, b: Image.Image) -> float:
    """PSNR in dB of two 8-bit pictures of one size."""
    return float(psnr(image_to_tensor(a)[None], image_to_tensor(b)[None]))


def scatter(points: Tensor, *, title: str) -> Figure:
    """Bits per pixel against PSNR, from rows of bytes, bpp and dB."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(points[:, 1].numpy(), points[:, 2].numpy())
    axes.set(xlabel="bits per pixel, from real bytes", ylabel="PSNR [dB]", title=title)
    axes.grid(visible=True, alpha=0.3)
    return figure


def _describe(original: Image.Image, caption: str) -> str:
    text = textwrap.shorten(caption, 36, placeholder=" ...") or "(no caption)"
    return f"original, {original.width}x{original.height}\n{text}"
