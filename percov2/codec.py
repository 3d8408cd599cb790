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
tokens          vector quantiser            condition       latent decoder     caption -> text
  v                                           v                                   |
bytes           token coder + masked        latents         flow transformer <----+
                transformer; caption          v             from the source, Euler steps
                coder; container            image           autoencoder, cropped
```

Shape legend: B = 1, H and W padded image rows and columns in pixels, h = H / 8 and w = W / 8
latent rows and columns, r and c token rows and columns.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.analysis.captioner import Captioner, NoCaptioner
from percov2.bitstream import BitstreamError, Stream
from percov2.components import CodecComponents
from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.entropy.caption_coder import decode_caption, encode_caption
from percov2.entropy.token_coder import TokenCoder, Tokens
from percov2.images import check_size, read_image, to_srgb
from percov2.model_store import ModelSummary, resolve_model
from percov2.synthesis.flow import Flow
from percov2.synthesis.flow_transformer import predict_velocity
from percov2.synthesis.sampler import Velocity, guided, sample, tiled

logger = logging.getLogger("percov2")

MAX_SAMPLING_STEPS = 1000
ImageInput = Image.Image | NDArray[np.uint8] | str | Path


class Codec:
    """A trained model with the means to write and read `.pcv2` streams.

    Args:
        components: all networks and the configuration.
        directory: where they were loaded from.
        device: of the networks.
        offload: keep the flow transformer and the text encoders on the CPU while unused.
        captioner: writes the caption where `compress` is given none.
    """

    def __init__(
        self,
        components: CodecComponents,
        directory: Path,
        *,
        device: str | torch.device = "cpu",
        offload: bool = False,
        captioner: Captioner | None = None,
    ) -> None:
        self.config = components.config
        self.components = components
        self.summary = ModelSummary.read(directory)
        self.device = torch.device(device)
        self.offload = offload
        self.captioner: Captioner = NoCaptioner() if captioner is None else captioner
        parts = components.tokenizer
        for module in parts.modules().values():
            module.to(self.device).eval()
        if not offload:
            components.transformer.to(self.device)
            components.text_conditioner.to(self.device)
        self._coder = TokenCoder(
            None if self.config.schedule == "uniform" else parts.masked_transformer,
            schedule=self.config.schedule,
            codebook_size=parts.quantizer.codebook_size,
        )

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
        components = CodecComponents.load(directory, dtype=torch_dtype)
        try:
            return cls(components, directory, device=device, offload=offload, captioner=captioner)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {error}") from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model directory that `from_pretrained` reads."""
        self.components.save(Path(directory))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model directory to the hub; returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    # -- image -> bytes ------------------------------------------------------------------------

    def compress(
        self, image: ImageInput, *, caption: str | None = None, schedule_steps: int | None = None
    ) -> bytes:
        """Photograph to the bytes of a `.pcv2` file. The same input gives the same bytes.

        Args:
            image: picture, uint8 array (H, W, 3) or (H, W), or path; 16 to 4096 pixels a side.
            caption: text to store; None asks the captioner, "" stores none.
            schedule_steps: send only the first so many token groups; the decoder invents the
                rest (hybrid mode). None sends all.

        Raises:
            ValueError: not an image, its size, the caption, or the steps.
        """
        picture = _to_picture(image)
        total = self.summary.steps_total(*picture.size)
        steps = total if schedule_steps is None else schedule_steps
        if not 1 <= steps <= total:
            raise ValueError(
                f"schedule steps is {steps}: a {picture.width}x{picture.height} image has "
                f"{total} groups in model {self.config.name}, choose 1 to {total}"
            )
        text = self.captioner.caption(picture) if caption is None else caption
        mode, coded_caption = encode_caption(text)
        return Stream(
            model_id=self.config.model_id,
            width=picture.width,
            height=picture.height,
            steps_sent=steps,
            caption_mode=mode,
            caption=coded_caption,
            tokens=self._coder.encode(self.encode_tokens(picture), steps=steps),
        ).to_bytes()

    @torch.no_grad()
    def encode_tokens(self, image: ImageInput) -> Tokens:
        """Photograph to tokens (r, c), what `compress` entropy-codes."""
        parts = self.components.tokenizer
        padded = self._pad(image_to_tensor(_to_picture(image))[None]).to(self.device)
        quantized = parts.quantizer(parts.hyper_encoder(parts.autoencoder.encode(padded)))
        tokens: Tokens = quantized.tokens[0].cpu().numpy()
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
        return self._decode_tokens(self._parse(data))

    def decompress(
        self,
        data: bytes,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
    ) -> Image.Image:
        """Bytes of a `.pcv2` file to an RGB picture of the original's size.

        Args:
            data: the file's bytes.
            steps: sampling steps, 1 to 1000; None is the model's default.
            guidance: classifier-free guidance, at least 0, 1 is off; None is the default.
            seed: of the noise, 0 to 2**64 - 1; None derives it from the file, so that decoding
                twice gives the same picture.

        Raises:
            BitstreamError: not a stream of this model, or damaged.
            ValueError: steps, guidance or seed out of range.
        """
        steps = self.config.default_steps if steps is None else steps
        guidance = self.config.default_guidance if guidance is None else guidance
        seed = zlib.crc32(data) if seed is None else seed
        check_sampling(steps=steps, guidance=guidance, seed=seed)
        stream = self._parse(data)
        tokens = self._coder.fill(self._decode_tokens(stream), seed=seed)
        caption = decode_caption(stream.caption_mode, stream.caption)
        latents = self._paint(tokens, caption, steps=steps, guidance=guidance, seed=seed)
        with torch.no_grad():
            image = self.components.tokenizer.autoencoder.decode(latents)[0]
        return tensor_to_image(image[:, : stream.height, : stream.width])

    def _parse(self, data: bytes) -> Stream:
        stream = Stream.from_bytes(data)
        if stream.model_id != self.config.model_id:
            raise BitstreamError(
                f"stream was written by model {stream.model_id:#06x}, this is "
                f"{self.config.name} ({self.config.model_id:#06x}): load the model that wrote it"
            )
        return stream

    def _decode_tokens(self, stream: Stream) -> Tokens:
        rows, cols = self.summary.token_grid(stream.width, stream.height)
        return self._coder.decode(stream.tokens, rows, cols, steps=stream.steps_sent)

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
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(prediction.shape, generator=generator).to(self.device)
        with self._in_use(self.components.text_conditioner) as encoder:
            text = encoder(["", caption])
        with self._in_use(self.components.transformer) as transformer:
            unconditional, conditional = (
                _velocity(flow, transformer, text.embeddings[i : i + 1], text.pooled[i : i + 1])
                for i in range(2)
            )
            velocity = tiled(guided(conditional, unconditional, guidance), self.config.tiling)
            return sample(flow, velocity, condition, flow.source(prediction, noise), steps=steps)

    @contextmanager
    def _in_use(self, module: nn.Module) -> Iterator[Any]:
        """The module on the device; with offloading it goes back to the CPU afterwards."""
        if not self.offload:
            yield module
            return
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


def check_sampling(*, steps: int | None, guidance: float | None, seed: int | None) -> None:
    """Refuse sampling options out of range; None, the model's default, is in range.

    Raises:
        ValueError: see `Codec.decompress`.
    """
    if steps is not None and not 1 <= steps <= MAX_SAMPLING_STEPS:
        raise ValueError(f"steps is {steps}: it must be 1 to {MAX_SAMPLING_STEPS}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance is {guidance}: it must be at least 0 and finite")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: it must be 0 to 2**64 - 1")


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
