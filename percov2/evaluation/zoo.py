"""CompressAI's pretrained models as competitors, through a file of their strings.

The file: width and height of the coded picture, quality, rows and columns of the strings' tensor,
and the strings, all but the last with their length. CompressAI defines no file format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.evaluation.competitors import Format
from percov2.evaluation.weights import weights_from

# Qualities that are published for each model, trained for mean squared error.
ZOO = {
    "bmshj2018-factorized": 8,
    "bmshj2018-hyperprior": 8,
    "mbt2018-mean": 8,
    "mbt2018": 8,
    "cheng2020-anchor": 6,
    "cheng2020-attn": 6,
}

_HEADER = struct.Struct(">HHBHH")
_LENGTH = struct.Struct(">I")
_MULTIPLE = 64


class ZooFormat(Format):
    """A model of CompressAI with its qualities.

    Args:
        name: of the model.
        load: quality, from 0, to a model in evaluation mode whose tables are up to date.
        qualities: how many there are.
        device: of the models.
    """

    suffix = ".bin"
    settings = "CompressAI, mean squared error"

    def __init__(
        self, name: str, load: Callable[[int], Any], *, qualities: int, device: str
    ) -> None:
        self.name, self.qualities = name, qualities
        self.model, self._device = cache(load), device

    @torch.inference_mode()
    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See `Format`."""
        pixels = (image_to_tensor(image)[None].to(self._device) + 1) / 2
        right, bottom = -image.width % _MULTIPLE, -image.height % _MULTIPLE
        padded = F.pad(pixels, (0, right, 0, bottom), mode="replicate")
        answer = self.model(quality).compress(padded)
        strings = [string for (string,) in answer["strings"]]
        header = _HEADER.pack(image.width, image.height, quality, *answer["shape"])
        lengths = b"".join(_LENGTH.pack(len(string)) for string in strings[:-1])
        return header + lengths + b"".join(strings)

    @torch.inference_mode()
    def decode(self, data: bytes) -> Image.Image:
        """See `Format`."""
        width, height, quality, rows, cols = _HEADER.unpack_from(data)
        model = self.model(quality)
        count = 2 if hasattr(model, "gaussian_conditional") else 1
        place = _HEADER.size + _LENGTH.size * (count - 1)
        lengths = [value for (value,) in _LENGTH.iter_unpack(data[_HEADER.size : place])]
        strings = []
        for length in [*lengths, len(data) - place - sum(lengths)]:
            strings.append([data[place : place + length]])
            place += length
        pixels = model.decompress(strings, (rows, cols))["x_hat"][0, :, :height, :width]
        return tensor_to_image(pixels * 2 - 1)


def zoo_format(name: str, *, weights: Path | None, device: str) -> ZooFormat:
    """A pretrained model; its lowest quality is loaded at once.

    Args:
        name: one of `ZOO`.
        weights: see `weights_from`.
        device: of the models.

    Raises:
        AbsentError: the weights are not to be had.
    """
    from compressai.zoo import image_models

    def load(quality: int) -> Any:
        with weights_from(weights, f"CompressAI's {name}, quality {quality + 1}"):
            model = image_models[name](quality=quality + 1, metric="mse", pretrained=True)
        model.update()
        return model.to(device).eval()

    made = ZooFormat(name, load, qualities=ZOO[name], device=device)
    made.model(0)
    return made
