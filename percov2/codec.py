"""The codec: photograph to bytes and back.

```
compress                                    decompress
image                                       bytes
  | padded to whole patches, [-1, 1]          | container: header, caption, tokens
  v                                           v
latents         autoencoder                 tokens          token coder + masked transformer
  v                                           v             (groups not sent are sampled)
features        hyper-encoder               features        quantiser's codebook
  v                                           v
tokens          quantiser's codes, chosen   condition       latent decoder     caption -> text
  v                                           v                                   |
  |             by nearness, bits and       latents         flow transformer <----+
  v             what they decode to           v             from the source, Euler steps
bytes           token coder + masked        image           autoencoder, cropped,
                transformer; caption                        sharpened, with grain
                coder; container
```

Shape legend: B = 1, H and W padded image rows and columns in pixels, h = H / 8 and w = W / 8
latent rows and columns, r and c token rows and columns.
"""

from __future__ import annotations

import logging
import operator
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.analysis.captioner import Captioner, NoCaptioner
from percov2.bitstream import BitstreamError, Stream, is_intact
from percov2.components import COMPONENT_FOLDERS, CodecComponents, is_half
from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.entropy.caption_coder import CaptionCoder
from percov2.entropy.range_coder import RangeDecoder, RangeEncoder
from percov2.entropy.schedules import num_groups
from percov2.entropy.token_choice import check_choice_weights
from percov2.entropy.token_coder import TokenCoder, Tokens
from percov2.images import check_size, read_image, to_srgb
from percov2.model_card import CARD_NAME, carry_texts, write_model_card
from percov2.model_store import ModelSummary, resolve_model
from percov2.noise import seeded_noise
from percov2.rate_control import Content, first_that_fits
from percov2.synthesis.flow import Flow
from percov2.synthesis.flow_transformer import predict_velocity
from percov2.synthesis.grain import add_grain
from percov2.synthesis.sampler import Velocity, guided, sample, tiled
from percov2.synthesis.sharpening import check_amount, sharpen
from percov2.token_chooser import TokenChooser

logger = logging.getLogger("percov2")

_LOADING = threading.Lock()
"""diffusers and transformers change torch's globals while they load."""
_OFFLOADING = threading.Lock()
"""Reentry by one thread does not happen: text encoders and transformer take turns."""

MAX_SAMPLING_STEPS = 1000
ImageInput = Image.Image | NDArray[np.uint8] | str | Path


class Codec:
    """A trained model with the means to write and read `.pcv2` streams.

    Args:
        components: all networks and the configuration.
        device: of the networks.
        offload: keep the flow transformer and the text encoders on the CPU while unused.
        captioner: writes the caption where `compress` is given none.
        source: directory that the components were loaded from, whose card and notice
            `save_pretrained` passes on.
        in_step: call the networks as often for no caption as for one, as processes must that
            hold a part of the weights each.
    """

    def __init__(
        self,
        components: CodecComponents,
        *,
        device: str | torch.device = "cpu",
        offload: bool = False,
        captioner: Captioner | None = None,
        source: Path | None = None,
        in_step: bool = False,
    ) -> None:
        self._source, self._in_step = source, in_step
        self.config = components.config
        self.components = components
        self.summary = ModelSummary(
            name=self.config.name,
            model_id=self.config.model_id,
            schedule=self.config.schedule,
            latents_per_token=self.config.latents_per_token,
        )
        self.device = torch.device(device)
        self.offload = offload
        self.captioner: Captioner = NoCaptioner() if captioner is None else captioner
        parts = components.tokenizer
        self._choose = TokenChooser(parts, schedule=self.config.schedule)
        for module in parts.modules().values():
            module.to(self.device).eval()
        if not offload:
            components.transformer.to(self.device)
            components.text_conditioner.to(self.device)
        self._captions = CaptionCoder.shipped()
        portable = TokenCoder(
            None,
            schedule=self.config.schedule,
            codebook_size=parts.quantizer.codebook_size,
        )
        # By whether a stream is uniform.
        self._coders = {
            False: parts.token_coder(self.config.schedule, device=self.device),
            True: portable,
        }

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
        captioner: Captioner | None = None,
    ) -> Codec:
        """Load a model.

        Args:
            model: preset (``tiny``), model directory, or hub id.
            device: ``cpu``, ``cuda``, ``cuda:1``, ...
            dtype: of the flow transformer and the text encoders: ``float32``, ``bfloat16`` or
                ``float16``. What enters the stream is computed in float32 regardless.
            offload: see `Codec`.
            captioner: see `Codec`.

        Raises:
            ValueError: no such model, incomplete or mixed files, unknown device or dtype.
        """
        torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if torch_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {dtype!r}: choose float32, bfloat16 or float16")
        directory = resolve_model(model)
        with _LOADING:
            components = CodecComponents.load(directory, dtype=torch_dtype)
        try:
            return cls(
                components, device=device, offload=offload, captioner=captioner, source=directory
            )
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"device {device!r} cannot be used: {error}") from error

    def save_pretrained(self, directory: str | Path, *, half: bool | None = None) -> None:
        """Write the model directory that `from_pretrained` reads, with its card and notice.

        Args:
            directory: is made if missing.
            half: store float16 weights; None does as the model's own files do.
        """
        if half is None:
            half = self._source is not None and is_half(self._source)
        self.components.save(Path(directory), half=half)
        if self._source is not None:
            carry_texts(self._source, Path(directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        licence: str | None = None,
        half: bool | None = None,
    ) -> str:
        """Upload the model directory to the hub; returns the commit's address.

        Args:
            repo_id: ``owner/name``.
            private: of a repository that is made now.
            token: of the hub; None takes that of ``hf auth login``.
            licence: SPDX-like name for the card, if the model has no card of its own; see
                `percov2.model_card.write_model_card`.
            half: see `save_pretrained`.

        Raises:
            ValueError: a licence that the card cannot name.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, half=half)
            # A card that was edited on the hub alone stays.
            if not api.file_exists(repo_id, CARD_NAME):
                write_model_card(Path(folder), model=repo_id, licence=licence)
            api.create_repo(repo_id, private=private, exist_ok=True)
            # Parts of another model that was there would be loaded with this one.
            patterns = [f"{name}/*" for name in COMPONENT_FOLDERS]
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=patterns)
            )

    # -- image -> bytes ------------------------------------------------------------------------

    def compress(
        self,
        image: ImageInput,
        *,
        caption: str | None = None,
        schedule_steps: int | None = None,
        max_bytes: int | None = None,
        rate_weight: float | None = None,
        color_weight: float | None = None,
        latent_weight: float | None = None,
        uniform: bool = False,
    ) -> bytes:
        """Photograph to the bytes of a `.pcv2` file. The same input gives the same bytes.

        Args:
            image: picture, uint8 array (H, W, 3) or (H, W), or path; 16 to 4096 pixels a side.
            caption: text to store; None asks the captioner, "" stores none.
            schedule_steps: send only the first so many token groups; the decoder invents the
                rest (hybrid mode). None sends all.
            max_bytes: the file's largest size. If it does not fit, the caption is left out, then
                tokens are chosen cheaper, then token groups are left out from the last one on,
                of the most similar tokens with which they fit; see `percov2.rate_control`.
            rate_weight: similarity that a bit is worth in the choice of a token, with
                ``max_bytes`` the first one tried; 0 ignores bits, None is the model's default.
                See `percov2.token_chooser`.
            color_weight: similarity that an error of the decoded colour is worth; 0 ignores it,
                None is the model's default. See there.
            latent_weight: similarity that an error of the decoded latents is worth; 0 spares the
                search for tokens that decode well, two fifths of the encoder's time; None is the
                model's default. See there.
            uniform: code the tokens without the masked model (portable mode): larger, and
                decodable with the codebook alone. Bits are ignored.

        Raises:
            ValueError: not an image, its size, the caption, the steps, a weight, or nothing fits.
        """
        schedule = "uniform" if uniform else self.config.schedule
        if rate_weight is None:
            rate_weight = 0.0 if uniform else self.config.rate_weight
        check_choice_weights(rate_weight=rate_weight, schedule=schedule)
        picture = _to_picture(image)
        total = self.summary.steps_total(*picture.size)
        steps = total if schedule_steps is None else schedule_steps
        if not 1 <= steps <= total:
            raise ValueError(
                f"schedule steps is {steps}: a {picture.width}x{picture.height} image has "
                f"{total} groups in model {self.config.name}, choose 1 to {total}"
            )
        text = self.captioner.caption(picture) if caption is None else caption

        @cache
        def choose(weight: float) -> Tokens:
            return self.encode_tokens(
                picture,
                rate_weight=weight,
                color_weight=color_weight,
                latent_weight=latent_weight,
            )

        def write(content: Content) -> bytes:
            tokens = choose(content.rate_weight)
            steps, text = content.steps, content.caption
            return self._write(tokens, picture.size, text, steps=steps, uniform=uniform)

        wanted = Content(steps=steps, caption=text, rate_weight=rate_weight)
        if max_bytes is None:
            return write(wanted)
        cheaper = schedule != "uniform"
        data, content = first_that_fits(write, wanted, max_bytes, cheaper=cheaper)
        if content != wanted:
            logger.warning("to fit %d bytes: %s", max_bytes, content.describe(total))
        return data

    def truncate(self, data: bytes, *, schedule_steps: int) -> bytes:
        """A stream with the first token groups of another; no pixel is decoded.

        Args:
            data: the file's bytes.
            schedule_steps: groups to keep, at least 1.

        Raises:
            BitstreamError: not a stream of this model, or damaged.
            ValueError: the stream does not have so many groups.
        """
        stream = self._parse(data)
        caption, tokens = self._read(stream)
        sent = self._steps_sent(stream)
        if not 1 <= schedule_steps <= sent:
            raise ValueError(
                f"schedule steps is {schedule_steps}: the stream has {sent} groups, choose 1 to "
                f"{sent}"
            )
        size = (stream.width, stream.height)
        return self._write(tokens, size, caption, steps=schedule_steps, uniform=stream.uniform)

    def _write(
        self, tokens: Tokens, size: tuple[int, int], caption: str, *, steps: int, uniform: bool
    ) -> bytes:
        """Tokens (r, c) and caption to the bytes of a file."""
        encoder = RangeEncoder()
        if caption:
            self._captions.encode(caption, encoder)
        self._coders[uniform].write(encoder, tokens, steps=steps)
        return Stream(
            model_id=self.config.model_id,
            width=size[0],
            height=size[1],
            steps_sent=None if steps == self.summary.steps_total(*size) else steps,
            has_caption=bool(caption),
            uniform=uniform,
            payload=encoder.finish(),
        ).to_bytes()

    @torch.no_grad()
    def encode_tokens(
        self,
        image: ImageInput,
        *,
        rate_weight: float | None = None,
        color_weight: float | None = None,
        latent_weight: float | None = None,
    ) -> Tokens:
        """Photograph to tokens (r, c), what `compress` entropy-codes unless it must fit a size.

        Args:
            image: see `compress`.
            rate_weight: likewise.
            color_weight: likewise.
            latent_weight: likewise.

        Raises:
            ValueError: not an image, its size, or a weight.
        """
        padded = self._pad(image_to_tensor(_to_picture(image))[None]).to(self.device)
        config = self.config
        chosen = self._choose(
            self.components.tokenizer.autoencoder.encode(padded),
            rate_weight=config.rate_weight if rate_weight is None else rate_weight,
            color_weight=config.color_weight if color_weight is None else color_weight,
            latent_weight=config.latent_weight if latent_weight is None else latent_weight,
        )
        tokens: Tokens = chosen[0].cpu().numpy()
        return tokens

    def _pad(self, image: Tensor) -> Tensor:
        """Repeat the last row and column up to whole patches; reflection fails on small images."""
        multiple = self.summary.multiple
        right, bottom = -image.shape[3] % multiple, -image.shape[2] % multiple
        return F.pad(image, (0, right, 0, bottom), mode="replicate")

    # -- bytes -> image ------------------------------------------------------------------------

    def decode_tokens(self, data: bytes) -> Tokens:
        """The tokens (r, c) in a stream; -1 where a group was not sent.

        Raises:
            BitstreamError: not a stream of this model, or damaged.
        """
        return self._read(self._parse(data))[1]

    def decompress(
        self,
        data: bytes,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        sharpness: float | None = None,
        grain: float | None = None,
        allow_truncated: bool = False,
    ) -> Image.Image:
        """Bytes of a `.pcv2` file to an RGB picture of the original's size.

        Args:
            data: the file's bytes.
            steps: sampling steps, 1 to 1000; None is the model's default.
            guidance: classifier-free guidance, at least 0: 1 is off, 0 ignores the caption; None
                is the default.
            seed: of the noise, 0 to 2**64 - 1; None derives it from the file, so that decoding
                twice gives the same picture.
            sharpness: share of its local contrast that is added to the painted picture, at least 0,
                which leaves it as it is; None is the model's default. See
                `percov2.synthesis.sharpening`.
            grain: strength of the noise that is added at last, as a share of local contrast, at
                least 0, which adds none; None is the model's default. See
                `percov2.synthesis.grain`.
            allow_truncated: decode what is there of a stream whose end is missing: the groups
                that its bytes determine; the rest is sampled. The checksum of a cut stream does
                not hold, so that the picture is unverified.

        Raises:
            BitstreamError: not a stream of this model, or damaged.
            ValueError: steps, guidance, seed, sharpness or grain out of range.
        """
        steps = self.config.default_steps if steps is None else steps
        guidance = self.config.default_guidance if guidance is None else guidance
        seed = zlib.crc32(data) if seed is None else operator.index(seed)
        sharpness = self.config.sharpness if sharpness is None else sharpness
        grain = self.config.grain if grain is None else grain
        check_sampling(steps=steps, guidance=guidance, seed=seed, sharpness=sharpness, grain=grain)
        cut = allow_truncated and not is_intact(data)
        stream = self._parse(data, verify=not cut)
        caption, tokens = self._read_cut(stream) if cut else self._read(stream)
        if cut:
            logger.warning("%s", self._describe_cut(stream, tokens))
        tokens = self._coders[False].fill(tokens, seed=seed)
        latents = self._paint(tokens, caption, steps=steps, guidance=guidance, seed=seed)
        with torch.no_grad():
            painted = self.components.tokenizer.autoencoder.decode(latents)
        picture = painted[..., : stream.height, : stream.width]
        return tensor_to_image(add_grain(sharpen(picture, sharpness), grain, seed=seed)[0])

    def _parse(self, data: bytes, *, verify: bool = True) -> Stream:
        stream = Stream.from_bytes(data, verify=verify)
        if stream.model_id != self.config.model_id:
            raise BitstreamError(
                f"stream was written by model {stream.model_id:#06x}, this is "
                f"{self.config.name} ({self.config.model_id:#06x}): load the model that wrote it"
            )
        return stream

    def _steps_sent(self, stream: Stream) -> int:
        if stream.steps_sent is not None:
            return stream.steps_sent
        return self.summary.steps_total(stream.width, stream.height)

    def _read(self, stream: Stream) -> tuple[str, Tokens]:
        """Caption and tokens (r, c) of a stream, -1 where a group was not sent."""
        decoder = RangeDecoder(stream.payload)
        caption = self._captions.decode(decoder) if stream.has_caption else ""
        coder = self._coders[stream.uniform]
        rows, cols = self.summary.token_grid(stream.width, stream.height)
        return caption, coder.read(decoder, rows, cols, steps=self._steps_sent(stream))

    def _read_cut(self, stream: Stream) -> tuple[str, Tokens]:
        """What the bytes of a cut stream determine."""
        decoders = RangeDecoder(stream.payload), RangeDecoder(stream.payload, fill=0xFF)
        caption = self._read_cut_caption(decoders) if stream.has_caption else ""
        coder = self._coders[stream.uniform]
        rows, cols = self.summary.token_grid(stream.width, stream.height)
        tokens = coder.read_cut(decoders, rows, cols, steps=self._steps_sent(stream))
        groups = coder.groups(rows, cols)
        whole = len(np.unique(groups[tokens >= 0]))
        if not whole:
            raise BitstreamError(
                f"truncated stream: its {len(stream.payload)} bytes of payload do not hold the "
                "first group of tokens"
            )
        return caption, tokens

    def _describe_cut(self, stream: Stream, tokens: Tokens) -> str:
        """For the user, of what `_read_cut` has read."""
        groups = self._coders[False].groups(*tokens.shape)
        whole, total = len(np.unique(groups[tokens >= 0])), num_groups(groups)
        if whole == self._steps_sent(stream):
            return (
                f"damaged stream: nothing is missing, but its checksum fails: any of its {whole} "
                f"groups of tokens may be wrong; unverified"
            )
        return (
            f"truncated stream: {whole} of {total} groups are whole, the rest is invented; "
            "unverified"
        )

    def steps_whole(self, data: bytes) -> int:
        """How many token groups a stream determines, whose end may be missing.

        Raises:
            BitstreamError: not a stream of this model, or nothing is left of it.
        """
        stream = self._parse(data, verify=False)
        if is_intact(data):
            return self._steps_sent(stream)
        _, tokens = self._read_cut(stream)
        return len(np.unique(self._coders[False].groups(*tokens.shape)[tokens >= 0]))

    def _read_cut_caption(self, decoders: tuple[RangeDecoder, RangeDecoder]) -> str:
        try:
            texts = {self._captions.decode(decoder) for decoder in decoders}
        except BitstreamError:  # what lies behind the cut need not be decodable
            texts = set()
        if len(texts) != 1:
            raise BitstreamError(
                "truncated stream: the cut is within its caption, nothing can be shown"
            )
        return texts.pop()

    @torch.no_grad()
    def _paint(
        self, tokens: Tokens, caption: str, *, steps: int, guidance: float, seed: int
    ) -> Tensor:
        """Tokens (r, c) and caption to latents (1, C, h, w)."""
        parts, flow = self.components.tokenizer, self.config.flow
        features = parts.quantizer.tokens_to_features(
            torch.from_numpy(tokens)[None].to(self.device)
        )
        condition, prediction = parts.latent_decoder.condition(features)
        noise = seeded_noise(prediction.shape, seed=seed).to(self.device)
        # Text encoders may be the slowest part: none runs for a caption that guidance leaves out,
        # and without a caption there is nothing to be guided by.
        if not caption and not self._in_step:
            guidance = 0.0
        captions = {0.0: [""], 1.0: [caption]}.get(guidance, ["", caption])
        with self._in_use(self.components.text_conditioner) as encoder:
            text = encoder(captions)
        with self._in_use(self.components.transformer) as transformer:
            velocities = [
                _velocity(flow, transformer, text.embeddings[i : i + 1], text.pooled[i : i + 1])
                for i in range(len(captions))
            ]
            velocity = tiled(guided(velocities[-1], velocities[0], guidance), self.config.tiling)
            source = flow.sampling_source(prediction, noise)
            return sample(flow, velocity, condition, source, steps=steps)

    @contextmanager
    def _in_use(self, module: nn.Module) -> Iterator[Any]:
        """The module on the device; with offloading it goes back to the CPU afterwards."""
        if not self.offload:
            yield module
            return
        with _OFFLOADING:  # or another thread would take it away
            module.to(self.device)
            try:
                yield module
            finally:
                module.to("cpu")


def _velocity(flow: Flow, transformer: Any, text: Tensor, pooled: Tensor) -> Velocity:
    """The network's velocity under one caption, text (1, L, D) and pooled (1, P)."""

    def velocity(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        batch = len(x_t)
        captions = text.expand(batch, -1, -1), pooled.expand(batch, -1)
        return predict_velocity(flow, transformer, x_t, condition, t, *captions)

    return velocity


def check_sampling(
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    sharpness: float | None = None,
    grain: float | None = None,
) -> None:
    """Refuse sampling options out of range; None, the model's default, is in range.

    Raises:
        ValueError: see `Codec.decompress`.
    """
    if steps is not None and not 1 <= steps <= MAX_SAMPLING_STEPS:
        raise ValueError(f"steps is {steps}: it must be 1 to {MAX_SAMPLING_STEPS}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: it must be 0 to 2**64 - 1")
    amounts = {"guidance": guidance, "sharpness": sharpness, "grain": grain}
    for name, amount in amounts.items():
        if amount is not None:
            check_amount(name, amount)


def _to_picture(image: ImageInput) -> Image.Image:
    """Any input to an 8-bit sRGB picture of a size that the format holds."""
    if isinstance(image, str | Path):
        picture, notes = read_image(Path(image))
        notes = [f"{image}: {note}" for note in notes]
    else:
        original = _array_to_picture(image) if isinstance(image, np.ndarray) else image
        check_size(*original.size)
        picture, notes = to_srgb(original)
    for note in notes:
        logger.warning("%s", note)
    return picture


def _array_to_picture(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or (array.ndim != 2 and array.shape[2:] != (3,)):
        raise ValueError(
            f"array of {array.dtype} with shape {array.shape}: give uint8 in 0 .. 255 of shape "
            "(H, W, 3) or (H, W)"
        )
    return Image.fromarray(array)
