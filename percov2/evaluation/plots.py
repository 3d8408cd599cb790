"""Rate-distortion, rate-perception and distortion-perception plots of an evaluation."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from percov2.evaluation.report_curves import (
    Curve,
    Metric,
    metrics_of,
    rate,
    sampling_text,
    short,
)
from percov2.evaluation.report_data import OURS, CodecResult, Results
from percov2.files import atomic_path

logger = logging.getLogger("percov2")

FOREGROUND = "#1b1e23"
"""Of text and axes; the HTML report replaces it by the page's own colour."""
PLOTS_NAME = "plots"

# Okabe and Ito's palette without black, which is the foreground, and yellow, too pale for lines.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# As many markers as are told apart at a glance; 7 and 6 have no common factor, so that 42 curves
# differ in colour or marker.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "grid.color": FOREGROUND,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Without these the same results would give another file each time.
    "svg.hashsalt": "percov2",
    "text.color": FOREGROUND,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot that lies in files.

    Attributes:
        name: of the files, without suffix.
        caption: one sentence that says what is seen.
        svg: the plot with transparent background, as an SVG document.
    """

    name: str
    caption: str
    svg: str


def write_plots(results: Results, curves: Sequence[Curve], folder: Path) -> list[Plot]:
    """Draw all plots for which there are values; NAME.png and NAME.svg each in `folder`.

    One plot per metric of distortion and perception over the rate, then distortion against
    perception if our codec was measured in several settings of its sampler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    with mpl.rc_context(_STYLE):
        for drawn in metrics_of(results):
            if drawn.kind == "other":
                continue
            figure = rate_figure(curves, drawn)
            if figure is not None:
                caption = f"{drawn.title} over the rate. {_better(drawn)}"
                plots.append(_saved(figure, folder, f"rate_{drawn.name}", caption))
        figure = distortion_perception_figure(results)
        if figure is not None:
            caption = (
                "Distortion against perception over the sampler's settings; the figure at a point "
                "is its number of steps."
            )
            plots.append(_saved(figure, folder, "distortion_perception", caption))
    return plots


def rate_figure(curves: Sequence[Curve], drawn: Metric) -> Figure | None:
    """A metric over the mean bits per pixel, on a logarithmic axis; None without values.

    Hollow markers are codecs at their smallest file. Each curve has the same colour and marker in
    all plots of the same curves.
    """
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rates: list[float] = []
    handles: list[Line2D] = []
    hollow = False
    for curve, (colour, marker) in zip(curves, _looks(), strict=False):
        points = [
            (rate(codec), value, codec.at_smallest)
            for codec in curve.points
            if (value := _finite(codec, drawn.name)) is not None
        ]
        if not points:
            continue
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 7,
            "zorder": 3 + curve.ours,
        }
        width = 2.2 if curve.ours else 1.4
        axes.plot(*zip(*[p[:2] for p in points], strict=True), **style | {"linewidth": width})
        for x, y, at_smallest in points:
            if at_smallest:
                hollow = True
                axes.plot(
                    x, y, **style | {"markerfacecolor": "white", "markeredgewidth": 1.5}, ls=""
                )
        handles.append(Line2D([], [], **style, linewidth=width, label=curve.label))
        rates += [point[0] for point in points]
    if not rates:
        return None
    _rate_axis(axes, rates)
    axes.set_ylabel(drawn.heading)
    axes.grid(True)
    if hollow:
        style = {"color": FOREGROUND, "marker": "o", "markerfacecolor": "none", "markersize": 7}
        handles.append(Line2D([], [], linestyle="", label="smallest file", **style))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, labelspacing=0.7)
    return figure


def distortion_perception_figure(results: Results) -> Figure | None:
    """PSNR (MS-SSIM without it) against every metric of perception, a panel each.

    A line is our codec at one guidance over the number of steps, written at the points. Codecs with
    one setting of steps and guidance are left out; None if no other is there.
    """
    lines = _sampling_lines(results)
    present = metrics_of(results)
    perceptions = [m for m in present if m.kind == "perception"]
    distortions = [m for m in present if m.kind == "distortion"]
    if not lines or not perceptions or not distortions:
        return None
    distortion = distortions[0]
    columns = min(len(perceptions), 3)
    rows = math.ceil(len(perceptions) / columns)
    figure = Figure(figsize=(max(3.4 * columns, 4.5), 3.1 * rows + 0.5), layout="constrained")
    handles = []
    for index, perception in enumerate(perceptions):
        axes = figure.add_subplot(rows, columns, index + 1)
        handles = [
            _sampling_line(axes, label, codecs, distortion, perception, look)
            for (label, codecs), look in zip(lines.items(), _looks(), strict=False)
        ]
        axes.set_xlabel(distortion.heading)
        axes.set_ylabel(perception.heading)
        axes.margins(0.16)
        axes.grid(True)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _sampling_line(
    axes: Axes,
    label: str,
    codecs: Sequence[CodecResult],
    distortion: Metric,
    perception: Metric,
    look: tuple[str, str],
) -> Line2D:
    points = [
        (x, y, codec.setting.get("steps"))
        for codec in codecs
        if (x := _finite(codec, distortion.name)) is not None
        and (y := _finite(codec, perception.name)) is not None
    ]
    colour, marker = look
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    (line,) = axes.plot(xs, ys, color=colour, marker=marker, markersize=6, label=label)
    # Distortion is traded for perception, so that this corner of the points is free of the line.
    left = perception.better == "lower"
    place: dict[str, Any] = {"xytext": (-5 if left else 5, 4), "ha": "right" if left else "left"}
    for x, y, steps in points:
        if steps is not None:
            axes.annotate(str(steps), (x, y), fontsize=9, textcoords="offset points", **place)
    return line


def _sampling_lines(results: Results) -> dict[str, list[CodecResult]]:
    """Our codecs by name, other settings and guidance, each over the steps."""
    ours = [codec for codec in results.codecs if codec.family == OURS]
    settings: dict[str, set[str]] = {}
    for codec in ours:
        settings.setdefault(codec.codec, set()).add(sampling_text(codec))
    lines: dict[str, list[CodecResult]] = {}
    for codec in ours:
        if len(settings[codec.codec]) < 2:
            continue
        others = {name: value for name, value in codec.setting.items() if name != "steps"}
        texts = [
            f"{name.replace('_', ' ')} {short(value)}"
            for name, value in others.items()
            if value is not None
        ]
        lines.setdefault(", ".join([codec.codec, *texts]), []).append(codec)
    for codecs in lines.values():
        codecs.sort(key=lambda codec: codec.setting.get("steps") or 0)
    return lines


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic axis with ticks at round figures, also over less than a decade."""
    axes.set_xscale("log")
    low, high = min(rates) / 1.15, max(rates) * 1.15
    axes.set_xlim(low, high)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [
            mantissa * 10.0**exponent
            for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            for mantissa in mantissas
        ]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    if not ticks:
        ticks = sorted({float(f"{rate:.3g}") for rate in (min(rates), max(rates))})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.12g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Rate (bits per pixel, log scale)")


def _looks() -> islice[tuple[str, str]]:
    """Colours and markers of the curves in order."""
    return islice(zip(cycle(_COLOURS), cycle(_MARKERS), strict=False), None)


def _finite(codec: CodecResult, name: str) -> float | None:
    """A value that can be drawn: the PSNR of a lossless codec cannot."""
    value = codec.value(name)
    return value if value is not None and math.isfinite(value) else None


def _better(drawn: Metric) -> str:
    return f"{'Higher' if drawn.better == 'higher' else 'Lower'} is better."


def _saved(figure: Figure, folder: Path, name: str, caption: str) -> Plot:
    # The layout is the same in all files and takes as long as drawing.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    with atomic_path(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=200)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    with atomic_path(folder / f"{name}.svg") as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
    logger.info("plot: %s", folder / f"{name}.png")
    return Plot(name=name, caption=caption, svg=buffer.getvalue())
