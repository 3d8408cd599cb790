"""``python -m percov2.evaluation.report OUTPUT [MORE_OUTPUTS...]``: draws and writes the report.

Into OUTPUT, from `results.json` and `images.csv` there and in the further folders, which must be
of the same protocol:

- `summary.md`: the results and the Bjontegaard deltas as tables;
- `bd_rate.csv`: the Bjontegaard deltas with their intervals;
- `plots/`: rate-distortion, rate-perception and distortion-perception, as PNG and SVG;
- `report.html`: all of that and the pictures side by side, in one file.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from percov2.evaluation.bd_rate import MIN_POINTS, Delta, compare
from percov2.evaluation.html_report import Page, write_html
from percov2.evaluation.plots import PLOTS_NAME, Plot, write_plots
from percov2.evaluation.report_curves import Curve, curves_of, metrics_of
from percov2.evaluation.report_data import Results, merge, read_results
from percov2.evaluation.report_tables import (
    Table,
    delta_tables,
    markdown,
    markdown_text,
    results_table,
)
from percov2.files import atomic_path

__all__ = ["Results", "main", "read_results", "write_report"]

SUMMARY_NAME, DELTAS_NAME, REPORT_NAME = "summary.md", "bd_rate.csv", "report.html"

logger = logging.getLogger("percov2")


def write_report(
    directory: str | Path,
    *,
    more: Sequence[str | Path] = (),
    anchor: str | None = None,
    curves: Mapping[str, str] | None = None,
    max_pictures: int = 24,
    quality: int = 90,
    resamples: int = 1000,
) -> Path:
    """Write tables, plots and the HTML page of an evaluation into its folder.

    Args:
        directory: the evaluation's folder, which gets the report.
        more: further evaluations of the same protocol to show with it.
        anchor: label of the curve that the others' Bjontegaard deltas are against; by default the
            first competitor's curve with enough points for one.
        curves: shell patterns of codec names that make a curve, by its label (`curves_of`).
        max_pictures: images shown side by side in the page, which carries all their pictures.
        quality: of these previews, WebP, 1 to 100.
        resamples: of the bootstrap for the intervals.

    Returns:
        The path of the HTML page.

    Raises:
        ValueError: The results cannot be read or do not fit together, or an option is wrong.
        OSError: A file cannot be read or written.
    """
    if max_pictures < 0:
        raise ValueError(f"max_pictures is {max_pictures}: choose 0 or more")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: choose 1 to 100")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: choose 1 or more")
    directory = Path(directory)
    runs = [read_results(folder) for folder in (directory, *more)]
    results = merge(runs)
    drawn = curves_of(results, curves)
    deltas = _deltas(results, drawn, anchor, resamples)
    tables = [("Results", results_table(results, drawn)), *delta_tables(deltas)]
    plots = write_plots(results, drawn, directory / PLOTS_NAME)
    _write_deltas(directory / DELTAS_NAME, deltas)
    with atomic_path(directory / SUMMARY_NAME) as temporary:
        temporary.write_text(_summary(results, tables, plots), encoding="utf-8")
    page = Page(results=results, runs=runs, curves=drawn, tables=tables, plots=plots)
    path = directory / REPORT_NAME
    write_html(path, page, max_pictures=max_pictures, quality=quality)
    logger.info("report: %s, %.1f MB", path, path.stat().st_size / 1e6)
    return path


def _deltas(
    results: Results, curves: Sequence[Curve], anchor: str | None, resamples: int
) -> list[Delta]:
    """Every curve against the anchor in every metric that there is per image."""
    by_label = {curve.label: curve for curve in curves}
    if anchor is not None and anchor not in by_label:
        raise ValueError(f"anchor {anchor!r} is no curve, there are {sorted(by_label)}")
    if anchor is None:
        competitors = [curve for curve in curves if not curve.ours]
        eligible = [curve for curve in competitors if len(curve.points) >= MIN_POINTS]
        anchor = next((curve.label for curve in (*eligible, *competitors)), None)
    if anchor is None:
        return []
    metrics = [
        metric
        for metric in metrics_of(results)
        if metric.better is not None
        and any(metric.name in codec.columns for codec in results.codecs)
    ]
    return [
        compare(by_label[anchor], curve, metric, resamples=resamples)
        for curve in curves
        if curve.label != anchor
        for metric in metrics
    ]


def _write_deltas(path: Path, deltas: Sequence[Delta]) -> None:
    """A row per curve and metric; absent figures are empty cells."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"{name}{end}" for name in ("bd_rate_percent", "bd_quality") for end in _ENDS]
        writer.writerow(["anchor", "codec", "metric", "images", *names, "reasons"])
        for delta in deltas:
            figures = [
                getattr(interval, attribute) if interval is not None else None
                for interval in (delta.rate, delta.quality)
                for attribute in _ENDS.values()
            ]
            row = [delta.anchor, delta.test, delta.metric.name, delta.images, *figures]
            writer.writerow([*row, "; ".join(delta.reasons)])


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _summary(results: Results, tables: Sequence[tuple[str, Table]], plots: Sequence[Plot]) -> str:
    protocol = results.protocol
    facts = (
        f"{protocol.images} images from {protocol.data}, crop {protocol.crop}, "
        f"{results.created}, commit {results.commit or '-'}"
    )
    parts = [
        f"# Evaluation on {markdown_text(protocol.name)}",
        markdown_text(facts),
        f"Command: `{' '.join(results.command)}`",
    ]
    for title, table in tables:
        parts += [f"## {markdown_text(title)}", markdown(table).rstrip()]
    if plots:
        parts.append("## Plots")
        parts += [f"![{plot.caption}]({PLOTS_NAME}/{plot.name}.png)" for plot in plots]
    return "\n\n".join(parts) + "\n"


def _curve(argument: str) -> tuple[str, str]:
    label, sign, pattern = argument.partition("=")
    if not (label and sign and pattern):
        raise argparse.ArgumentTypeError(f"{argument!r} is not LABEL=PATTERN")
    return label, pattern


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m percov2.evaluation.report",
        description="Draw and write the report of an evaluation.",
    )
    parser.add_argument("output", type=Path, help="folder of an evaluation; gets the report")
    parser.add_argument("more", type=Path, nargs="*", help="others of the same protocol")
    parser.add_argument("--anchor", metavar="LABEL", help="curve that BD-rates are against")
    parser.add_argument(
        "--curve",
        type=_curve,
        action="append",
        default=[],
        metavar="LABEL=PATTERN",
        help="join the codecs whose names match the shell pattern to one curve (repeatable)",
    )
    parser.add_argument("--max-pictures", type=int, default=24, help="images in the page (24)")
    parser.add_argument("--quality", type=int, default=90, help="of the page's previews (90)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (1000)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the report; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        path = write_report(
            args.output,
            more=args.more,
            anchor=args.anchor,
            curves=dict(args.curve),
            max_pictures=args.max_pictures,
            quality=args.quality,
            resamples=args.resamples,
        )
    except (ValueError, OSError) as error:
        print(f"percov2: {error}", file=sys.stderr)
        return 2
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
