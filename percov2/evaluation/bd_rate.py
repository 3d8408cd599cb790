"""Bjontegaard deltas between two curves, with bootstrap intervals over the images.

BD-rate is the mean difference of the logarithm of the rate at equal quality, over the qualities
that both curves reach, as a percentage; below zero, the test curve needs fewer bits. BD-quality
(BD-PSNR, if the quality is PSNR) is the mean difference of quality at equal rate, over the
logarithms of the rates that both curves reach.

Source: G. Bjontegaard, VCEG-M33, 2001, for the idea and the four points a curve needs; the
interpolation is the monotone piecewise cubic of Fritsch and Butland (PCHIP) instead of M33's one
polynomial, as in the JVET common test conditions, because a polynomial overshoots between points
that lie far apart. It equals `scipy.interpolate.PchipInterpolator`, which takes one curve at a
time and so would need minutes for the resampled ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from percov2.evaluation.report_curves import Curve, Metric
from percov2.messages import counted

MIN_POINTS = 4
CONFIDENCE = 0.95

_ANCHOR, _TEST = "the anchor", "the curve"
_CHUNK = 64
"""Resamples at a time, which bounds the memory on sets of many images."""

Array = NDArray[np.float64]


class NotComparableError(ValueError):
    """Two curves have no Bjontegaard delta; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the bounds of its bootstrap interval of `CONFIDENCE`.

    `low` and `high` are None where a resample has no delta, because its curves do not overlap or
    do not rise: an interval from the others would be too narrow.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """How a curve compares to the anchor in one metric.

    Attributes:
        anchor: label of the curve that it is compared to.
        test: label of the curve.
        metric: quality that is compared.
        rate: BD-rate in percent; None if absent.
        quality: BD-quality in the unit of `quality_unit`, above zero where the metric's values are
            higher in the test curve, whether or not higher is better; None if absent.
        images: on how many images both curves have all their points.
        reasons: why figures or intervals are absent.
    """

    anchor: str
    test: str
    metric: Metric
    rate: Interval | None
    quality: Interval | None
    images: int
    reasons: tuple[str, ...]


def bd_rate(anchor: tuple[ArrayLike, ArrayLike], test: tuple[ArrayLike, ArrayLike]) -> float:
    """BD-rate in percent.

    Args:
        anchor: rates (above zero) and qualities (higher is better), each of shape (points,), in
            any order.
        test: the same; the numbers of points may differ.

    Raises:
        NotComparableError: A curve has fewer than `MIN_POINTS` points or does not rise, or no
            quality is reached by both.
    """
    curves = _single(anchor, _ANCHOR), _single(test, _TEST)
    return float(_checked(_rate_deltas(*curves), "quality")[0])


def bd_quality(anchor: tuple[ArrayLike, ArrayLike], test: tuple[ArrayLike, ArrayLike]) -> float:
    """BD-quality in the unit of the quality; arguments and errors as `bd_rate`."""
    curves = _single(anchor, _ANCHOR), _single(test, _TEST)
    return float(_checked(_quality_deltas(*curves), "rate")[0])


def quality_unit(metric: Metric) -> str:
    """The unit in which `compare` gives BD-quality; empty if it has none."""
    return "dB" if metric.name == "ms_ssim" else metric.unit


def compare(
    anchor: Curve, test: Curve, metric: Metric, *, resamples: int = 1000, seed: int = 0
) -> Delta:
    """Compare two curves whose points are means over the images that all points have.

    MS-SSIM is compared in dB, as -10 log10(1 - mean). The bootstrap draws images with replacement,
    the same ones for all points of both curves.

    Args:
        anchor: what to compare to.
        test: what is compared.
        metric: one of which higher or lower values are better.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    assert metric.better is not None
    names: list[str] = []
    reasons: list[str] = []
    figures: dict[str, Interval | None] = {"rate": None, "quality": None}
    try:
        names = _common_images(anchor, test, metric)
        means = _Means(anchor, names, metric), _Means(test, names, metric)
        every = np.full((1, len(names)), 1 / len(names))
        single = _rising(means[0](every), _ANCHOR), _rising(means[1](every), _TEST)
    except NotComparableError as error:
        reasons.append(str(error))
    else:
        resampled = _resampled(means, len(names), resamples, seed)
        for name, common, deltas in (
            ("rate", "quality", _rate_deltas),
            ("quality", "rate", _quality_deltas),
        ):
            try:
                value = float(_checked(deltas(*single), common)[0])
            except NotComparableError as error:
                reasons.append(str(error))
                continue
            figures[name], reason = _interval(value, deltas(*resampled))
            reasons += reason
    quality = figures["quality"]
    if quality is not None and metric.better == "lower":
        quality = _negated(quality)
    return Delta(
        anchor=anchor.label,
        test=test.label,
        metric=metric,
        rate=figures["rate"],
        quality=quality,
        images=len(names),
        reasons=tuple(dict.fromkeys(reasons)),
    )


@dataclass(frozen=True)
class _Curves:
    """A batch of curves.

    Attributes:
        rates: logarithms of the rates, shape (batch, points), sorted.
        qualities: of the same shape; higher is better.
        rising: which curves rise strictly in rate and quality, shape (batch,).
    """

    rates: Array
    qualities: Array
    rising: NDArray[np.bool_]

    @classmethod
    def joined(cls, batches: Sequence[_Curves]) -> _Curves:
        """Several batches as one."""
        return cls(
            np.concatenate([batch.rates for batch in batches]),
            np.concatenate([batch.qualities for batch in batches]),
            np.concatenate([batch.rising for batch in batches]),
        )


def _curves(rates: Array, qualities: Array) -> _Curves:
    """From rates and qualities, each of shape (batch, points), in any order."""
    order = np.argsort(rates, axis=1)
    rates = np.log(np.take_along_axis(rates, order, axis=1))
    qualities = np.take_along_axis(qualities, order, axis=1)
    rising = (np.diff(rates) > 0).all(axis=1) & (np.diff(qualities) > 0).all(axis=1)
    finite = np.isfinite(rates).all(axis=1) & np.isfinite(qualities).all(axis=1)
    return _Curves(rates, qualities, rising & finite)


def _single(points: tuple[ArrayLike, ArrayLike], label: str) -> _Curves:
    rates, qualities = (np.asarray(values, dtype=np.float64)[None] for values in points)
    _check_points(rates.shape[1], label)
    return _rising(_curves(rates, qualities), label)


def _check_points(count: int, label: str) -> None:
    if count < MIN_POINTS:
        points = counted(count, "point")
        raise NotComparableError(f"{label} has {points}, the method needs {MIN_POINTS}")


def _rising(curves: _Curves, label: str) -> _Curves:
    if not curves.rising[0]:
        raise NotComparableError(f"the quality of {label} does not rise with its rate")
    return curves


def _checked(deltas: Array, what: str) -> Array:
    if np.isnan(deltas[0]):
        raise NotComparableError(f"the curves have no {what} in common")
    return deltas


class _Means:
    """The points of a curve as weighted means over images."""

    def __init__(self, curve: Curve, names: Sequence[str], metric: Metric) -> None:
        rates, values = [], []
        for point in curve.points:
            at = {name: index for index, name in enumerate(point.names)}
            rows = [at[name] for name in names]
            rates.append(point.columns["bpp"][rows])
            values.append(point.columns[metric.name][rows])
        self._rates, self._values = np.stack(rates, axis=1), np.stack(values, axis=1)
        self._metric = metric

    def __call__(self, weights: Array) -> _Curves:
        """The curves for weights of shape (batch, images) whose rows sum to one."""
        qualities = weights @ self._values
        if self._metric.name == "ms_ssim":
            with np.errstate(divide="ignore"):
                qualities = -10 * np.log10(1 - qualities)
        elif self._metric.better == "lower":
            qualities = -qualities
        return _curves(weights @ self._rates, qualities)


def _resampled(
    means: tuple[_Means, _Means], images: int, resamples: int, seed: int
) -> tuple[_Curves, _Curves]:
    """Both curves for bootstrap samples of the images, the same for both."""
    generator = np.random.default_rng(seed)
    drawn: tuple[list[_Curves], list[_Curves]] = ([], [])
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        counts = generator.multinomial(images, np.full(images, 1 / images), size=size)
        for curves, means_of in zip(drawn, means, strict=True):
            curves.append(means_of(counts / images))
    return _Curves.joined(drawn[0]), _Curves.joined(drawn[1])


def _common_images(anchor: Curve, test: Curve, metric: Metric) -> list[str]:
    """The images of which every point of both curves has a finite value of the metric."""
    common: set[str] | None = None
    for curve, label in ((anchor, _ANCHOR), (test, _TEST)):
        _check_points(len(curve.points), label)
        for point in curve.points:
            if metric.name not in point.columns:
                raise NotComparableError(f"{point.label} has no {metric.title} per image")
            finite = np.isfinite(point.columns[metric.name])
            names = {name for name, is_finite in zip(point.names, finite, strict=True) if is_finite}
            common = names if common is None else common & names
    if not common:
        raise NotComparableError(f"no image has {metric.title} at all points of both curves")
    return sorted(common)


def _interval(value: float, deltas: Array) -> tuple[Interval, list[str]]:
    """The percentile interval, or why there is none."""
    failed = int(np.isnan(deltas).sum())
    if failed:
        reason = f"no interval: {failed} of {len(deltas)} resamples have no delta"
        return Interval(value=value, low=None, high=None), [reason]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(deltas, (tail, 1 - tail))
    return Interval(value=value, low=float(low), high=float(high)), []


def _negated(interval: Interval) -> Interval:
    if interval.low is None or interval.high is None:
        return Interval(value=-interval.value, low=None, high=None)
    return Interval(value=-interval.value, low=-interval.high, high=-interval.low)


def _rate_deltas(anchor: _Curves, test: _Curves) -> Array:
    """BD-rates in percent, shape (batch,); NaN where there is none."""
    gaps = _mean_gaps(anchor.qualities, anchor.rates, test.qualities, test.rates)
    return np.where(anchor.rising & test.rising, 100 * np.expm1(gaps), np.nan)


def _quality_deltas(anchor: _Curves, test: _Curves) -> Array:
    """BD-qualities, shape (batch,); NaN where there is none."""
    gaps = _mean_gaps(anchor.rates, anchor.qualities, test.rates, test.qualities)
    return np.where(anchor.rising & test.rising, gaps, np.nan)


def _mean_gaps(x_anchor: Array, y_anchor: Array, x_test: Array, y_test: Array) -> Array:
    """Mean of test minus anchor over the common range of x, shape (batch,); NaN if it is empty."""
    low = np.maximum(x_anchor[:, 0], x_test[:, 0])
    high = np.minimum(x_anchor[:, -1], x_test[:, -1])
    # Curves that do not rise give nonsense, which the callers discard.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        difference = pchip_integral(x_test, y_test, low, high)
        difference -= pchip_integral(x_anchor, y_anchor, low, high)
        return np.where(low < high, difference / (high - low), np.nan)


def pchip_integral(x: Array, y: Array, low: Array, high: Array) -> Array:
    """Integrals of the monotone piecewise cubics through points, shape (batch,).

    Args:
        x: strictly increasing along the points, shape (batch, points), at least three points.
        y: of the same shape.
        low: where to begin, within x, shape (batch,).
        high: where to end, likewise.
    """
    width = np.diff(x)
    slopes = _pchip_slopes(width, np.diff(y) / width)

    def until(end: Array) -> Array:
        """Integral of every piece up to `end`, of its cubic in Hermite form."""
        t = np.clip((end[:, None] - x[:, :-1]) / width, 0, 1)
        values = y[:, :-1] * (t - t**3 + t**4 / 2) + y[:, 1:] * (t**3 - t**4 / 2)
        tangents = slopes[:, :-1] * (t**2 / 2 - 2 * t**3 / 3 + t**4 / 4)
        tangents += slopes[:, 1:] * (t**4 / 4 - t**3 / 3)
        result: Array = (width * (values + width * tangents)).sum(axis=1)
        return result

    return until(high) - until(low)


def _pchip_slopes(width: Array, secant: Array) -> Array:
    """Slopes at the points, (batch, points), from the pieces' widths and secants.

    Inside, the weighted harmonic mean of the neighbouring secants, zero at a turn; at the ends, a
    parabola through three points, limited so that the cubic stays monotone.
    """
    before, after = 2 * width[:, 1:] + width[:, :-1], width[:, 1:] + 2 * width[:, :-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        harmonic = (before + after) / (before / secant[:, :-1] + after / secant[:, 1:])
    inside = np.where(secant[:, :-1] * secant[:, 1:] > 0, harmonic, 0)
    first = _end_slope(width[:, 0], width[:, 1], secant[:, 0], secant[:, 1])
    last = _end_slope(width[:, -1], width[:, -2], secant[:, -1], secant[:, -2])
    return np.concatenate([first[:, None], inside, last[:, None]], axis=1)


def _end_slope(width: Array, next_width: Array, secant: Array, next_secant: Array) -> Array:
    slope = ((2 * width + next_width) * secant - width * next_secant) / (width + next_width)
    turns = np.sign(secant) != np.sign(next_secant)
    slope = np.where(turns & (abs(slope) > 3 * abs(secant)), 3 * secant, slope)
    return np.where(np.sign(slope) != np.sign(secant), 0, slope)
