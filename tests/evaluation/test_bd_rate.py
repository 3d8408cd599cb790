"""Bjontegaard deltas: cases worked out by hand, a reference, and the bootstrap."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from percov2.evaluation.bd_rate import (
    NotComparableError,
    bd_quality,
    bd_rate,
    compare,
    pchip_integral,
    quality_unit,
)
from percov2.evaluation.report_curves import Curve, describe
from percov2.evaluation.report_data import CodecResult

RATES = np.array([0.1, 0.2, 0.4, 0.8])
QUALITY = np.array([24.0, 27.0, 29.0, 30.5])


def test_shift_in_rate_is_its_percentage() -> None:
    assert bd_rate((RATES, QUALITY), (0.8 * RATES, QUALITY)) == pytest.approx(-20)
    assert bd_rate((RATES, QUALITY), (3 * RATES, QUALITY)) == pytest.approx(200)


def test_shift_in_quality_is_itself() -> None:
    assert bd_quality((RATES, QUALITY), (RATES, QUALITY + 1.25)) == pytest.approx(1.25)


def test_lines_of_different_slope() -> None:
    # Quality is 10 L and 20 L of the decades L of the rate. From quality 0 to 30, which both
    # reach, the rates differ by -q / 20 decades, on average by -0.75; from rate 0 to 3 decades
    # the qualities differ by 10 L, on average by 15.
    decades = np.arange(4.0)
    anchor, test = (10**decades, 10 * decades), (10**decades, 20 * decades)
    assert bd_rate(anchor, test) == pytest.approx(100 * (10**-0.75 - 1))
    assert bd_quality(anchor, test) == pytest.approx(15)


def test_equals_reference() -> None:
    # By the package bjontegaard 1.3.0, method "pchip", require_matching_points False.
    anchor = ([0.11, 0.2, 0.37, 0.8], [24.1, 26.3, 28.2, 31.9])
    test = ([0.09, 0.17, 0.31, 0.7, 1.1], [24.6, 26.1, 29.0, 31.0, 33.5])
    assert bd_rate(anchor, test) == pytest.approx(-17.243430554128903)
    assert bd_quality(anchor, test) == pytest.approx(0.6678746139612524)


def test_order_of_points_does_not_matter() -> None:
    order = [2, 0, 3, 1]
    test = 0.9 * RATES, QUALITY + 0.3
    shuffled = bd_rate((RATES[order], QUALITY[order]), test)
    assert shuffled == pytest.approx(bd_rate((RATES, QUALITY), test))


@pytest.mark.parametrize("points", [3, 4, 7])
def test_integral_equals_scipy(points: int) -> None:
    generator = np.random.default_rng(points)
    x = np.cumsum(generator.uniform(0.1, 3, (50, points)), axis=1)
    # Steps of any sign and size, some zero: turns, plateaus and the limits at the ends.
    steps = generator.normal(size=x.shape) * generator.integers(0, 2, x.shape)
    y = np.cumsum(steps * 10 ** generator.uniform(-2, 1, x.shape), axis=1)
    low, high = np.sort(generator.uniform(x[:, 0], x[:, -1], (2, 50)), axis=0)
    expected = [
        PchipInterpolator(*curve).integrate(*ends)
        for curve, ends in zip(zip(x, y, strict=True), zip(low, high, strict=True), strict=True)
    ]
    assert pchip_integral(x, y, low, high) == pytest.approx(np.array(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ((RATES[:3], QUALITY[:3]), "the curve has 3 points, the method needs 4"),
        ((RATES, QUALITY[::-1]), "the quality of the curve does not rise with its rate"),
        ((RATES, QUALITY + 10), "the curves have no quality in common"),
    ],
)
def test_no_delta(test: tuple[np.ndarray, np.ndarray], reason: str) -> None:
    with pytest.raises(NotComparableError, match=reason):
        bd_rate((RATES, QUALITY), test)


def test_no_common_rate() -> None:
    with pytest.raises(NotComparableError, match="no rate in common"):
        bd_quality((RATES, QUALITY), (100 * RATES, QUALITY))


def _curve(label: str, factors: np.ndarray, *, metric: str = "psnr", sign: float = 1) -> Curve:
    """A curve whose rates are `RATES` times the images' factors."""
    points = tuple(
        CodecResult(
            codec=label,
            family=label,
            setting={},
            label=f"{label} {index}",
            slug=f"{label}-{index}",
            at_smallest=False,
            images=len(factors),
            failures=(),
            summary={},
            set_metrics={},
            absent={},
            names=tuple(f"image{at}" for at in range(len(factors))),
            columns={"bpp": rate * factors, metric: np.full(len(factors), sign * quality)},
            directory=Path(),
        )
        for index, (rate, quality) in enumerate(zip(RATES, QUALITY, strict=True))
    )
    return Curve(label=label, points=points, ours=False)


def test_interval_holds_the_value_and_is_repeatable() -> None:
    anchor = _curve("anchor", np.array([0.7, 1.3, 1.0, 0.9, 1.1, 1.0]))
    test = _curve("test", np.array([0.5, 0.6, 1.3, 0.8, 1.0, 0.6]))
    delta = compare(anchor, test, describe("psnr"), resamples=200)
    assert delta.rate is not None
    assert delta.rate.value == pytest.approx(-20)
    assert delta.rate.low is not None
    assert delta.rate.high is not None
    assert delta.rate.low < -20 < delta.rate.high
    assert delta.images == 6
    assert delta.reasons == ()
    assert delta == compare(anchor, test, describe("psnr"), resamples=200)
    assert delta != compare(anchor, test, describe("psnr"), resamples=200, seed=1)


def test_bootstrap_is_paired() -> None:
    # Every image needs 20 % less, whatever the image: drawing other images changes nothing.
    factors = np.array([0.2, 3.0, 1.0, 0.5])
    anchor, test = _curve("anchor", factors), _curve("test", 0.8 * factors)
    rate = compare(anchor, test, describe("psnr"), resamples=50).rate
    assert rate is not None
    assert (rate.low, rate.value, rate.high) == pytest.approx((-20, -20, -20))


def test_lower_is_better() -> None:
    factors = np.ones(3)
    anchor = _curve("anchor", factors, metric="dists", sign=-1)
    test = _curve("test", 0.8 * factors, metric="dists", sign=-1)
    delta = compare(anchor, test, describe("dists"), resamples=20)
    assert delta.rate is not None
    assert delta.rate.value == pytest.approx(-20)
    # The better curve has the lower values.
    assert delta.quality is not None
    assert delta.quality.value < 0


def test_ms_ssim_is_compared_in_decibels() -> None:
    def curve(label: str, decibels: float) -> Curve:
        made = _curve(label, np.ones(2))
        for point in made.points:
            level = point.columns["psnr"] / 10 + decibels
            point.columns["ms_ssim"] = 1 - 10 ** (-level / 10)  # type: ignore[index]
        return made

    delta = compare(curve("anchor", 0), curve("test", 0.5), describe("ms_ssim"), resamples=5)
    assert delta.quality is not None
    assert delta.quality.value == pytest.approx(0.5)
    assert quality_unit(delta.metric) == "dB"


def test_reason_instead_of_interval() -> None:
    # Resamples that hold only the second image put the curve at higher rates altogether.
    anchor = _curve("anchor", np.array([1.0, 1.0]))
    test = _curve("test", np.array([1.0, 9.0]))
    delta = compare(anchor, test, describe("psnr"), resamples=200)
    assert delta.quality is not None
    assert (delta.quality.low, delta.quality.high) == (None, None)
    (reason,) = delta.reasons
    assert re.fullmatch(r"no interval: \d+ of 200 resamples have no delta", reason)
    assert delta.rate is not None
    assert delta.rate.low is not None


def test_missing_values() -> None:
    anchor, test = _curve("anchor", np.ones(3)), _curve("test", np.ones(3))
    assert compare(anchor, test, describe("dists")).reasons == ("anchor 0 has no DISTS per image",)
    test.points[2].columns["psnr"][1] = np.nan
    assert compare(anchor, test, describe("psnr"), resamples=5).images == 2
    test.points[2].columns["psnr"][:] = np.inf
    delta = compare(anchor, test, describe("psnr"), resamples=5)
    assert delta.reasons == ("no image has PSNR at all points of both curves",)
    assert (delta.rate, delta.quality, delta.images) == (None, None, 0)
