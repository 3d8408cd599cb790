from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2.analysis.hyper_encoder import RATES, REDUCTIONS, HyperEncoder


def make_encoder(reduction: int) -> HyperEncoder:
    torch.manual_seed(0)
    encoder: HyperEncoder = HyperEncoder(
        latent_channels=4, hidden_channels=16, out_channels=32, reduction=reduction
    )
    encoder.eval()
    return encoder


@pytest.mark.parametrize(
    ("name", "reduction", "codebook_size", "rounded"),
    [
        ("8x256", 8, 256, 0.0019),
        ("8x1024", 8, 1024, 0.0024),
        ("16x1024", 4, 1024, 0.0098),
        ("32x256", 2, 256, 0.0313),
        ("32x8192", 2, 8192, 0.0508),
        ("64x64", 1, 64, 0.0937),
        ("64x256", 1, 256, 0.1250),
    ],
)
def test_rates_of_the_paper(name: str, reduction: int, codebook_size: int, rounded: float) -> None:
    rate = RATES[name]
    assert rate.reduction == reduction
    assert rate.codebook_size == codebook_size
    # The paper rounds some figures and cuts others.
    assert rate.bits_per_pixel == pytest.approx(rounded, abs=6e-5)
    side = 512 // 8 // rate.reduction
    assert (
        rate.bits_per_pixel * 512**2 == side**2 * {64: 6, 256: 8, 1024: 10, 8192: 13}[codebook_size]
    )


def test_there_are_seven_rates_in_rising_order() -> None:
    rates = [rate.bits_per_pixel for rate in RATES.values()]
    assert len(rates) == 7
    assert rates == sorted(set(rates))


def expected_parameters(reduction: int, *, c: int, n: int, m: int) -> int:
    """Counted by hand from the paper's description."""

    def conv(channels_in: int, channels_out: int, kernel: int) -> int:
        return channels_in * channels_out * kernel**2 + channels_out

    def bottleneck(width: int) -> int:
        half = width // 2
        return conv(width, half, 1) + conv(half, half, 3) + conv(half, width, 1)

    def attention(width: int) -> int:
        return 6 * bottleneck(width) + conv(width, width, 1)

    strided = {1: 0, 2: 1, 4: 2, 8: 3}[reduction]
    kernels = [1] * (3 - strided) + [5] * strided
    groups = sum(conv(i, n, kernel) for i, kernel in zip((c, n, n), kernels, strict=True))
    return groups + 9 * bottleneck(n) + attention(n) + conv(n, m, 1) + attention(m)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_full_size_has_the_papers_parameters_and_grid(reduction: int) -> None:
    with torch.device("meta"):
        encoder = HyperEncoder(
            latent_channels=16, hidden_channels=192, out_channels=320, reduction=reduction
        )
        features = encoder(torch.empty(1, 16, 64, 64))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == expected_parameters(reduction, c=16, n=192, m=320)
    assert 4.1 <= round(count / 1e6, 1) <= 5.9
    assert features.shape == (1, 320, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@torch.no_grad()
def test_any_multiple_of_the_reduction_fits(reduction: int) -> None:
    encoder = make_encoder(reduction)
    for rows, cols in ((1, 1), (3, 5), (2, 7)):
        features = encoder(torch.randn(2, 4, rows * reduction, cols * reduction))
        assert features.shape == (2, 32, rows, cols)
        assert features.isfinite().all()


@pytest.mark.parametrize(("reduction", "shape"), [(2, (3, 4)), (4, (8, 6)), (8, (8, 12))])
def test_other_sizes_are_refused(reduction: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"pad the image to multiples of {8 * reduction} pixels"):
        make_encoder(reduction)(torch.zeros(1, 4, *shape))


@pytest.mark.parametrize("reduction", [0, 3, 16])
def test_other_reductions_are_refused(reduction: int) -> None:
    with pytest.raises(ValueError, match=rf"reduction is {reduction}: choose one of \(1, 2, 4, 8"):
        make_encoder(reduction)


@pytest.mark.parametrize("reduction", [1, 8])
def test_every_parameter_gets_a_gradient(reduction: int) -> None:
    encoder = make_encoder(reduction)
    encoder(torch.randn(2, 4, 4 * reduction, 4 * reduction)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


@torch.no_grad()
def test_saved_encoder_gives_equal_features(tmp_path: Path) -> None:
    encoder, latents = make_encoder(4), torch.randn(1, 4, 8, 12)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(HyperEncoder.from_pretrained(tmp_path)(latents), encoder(latents))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_attention_follows_the_second_group_and_the_last_convolution(reduction: int) -> None:
    """PerCo's order: three groups of a convolution and three blocks, attention behind two."""
    encoder = HyperEncoder(
        latent_channels=4, hidden_channels=8, out_channels=8, reduction=reduction
    )
    group = ["Conv2d", *["BottleneckBlock"] * 3]
    expected = [*group, *group, "AttentionBlock", *group, "Conv2d", "AttentionBlock"]
    assert [type(layer).__name__ for layer in encoder.layers] == expected
