"""The tables of the report, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from percov2.evaluation.bd_rate import CONFIDENCE, Delta, Interval, quality_unit
from percov2.evaluation.report_curves import Curve, Metric, describe, metrics_of
from percov2.evaluation.report_data import CodecResult, Results
from percov2.messages import counted

SMALLEST_MARK = "†"
_PARTS = ("header_bytes", "caption_bytes", "token_bytes")
_LISTED_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
        header: one text per column; the first column is text, the others are figures.
        rows: of as many texts.
        notes: what stands below.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def results_table(results: Results, curves: Sequence[Curve]) -> Table:
    """A row per codec and setting, in the order of the curves; codecs without a rate at the end."""
    ordered = [codec for curve in curves for codec in curve.points]
    on_curves = {codec.slug for codec in ordered}
    ordered += [codec for codec in results.codecs if codec.slug not in on_curves]
    metrics = metrics_of(results)
    parts = any(codec.value(name) is not None for codec in ordered for name in _PARTS)
    header = ["Codec", "Images", "bpp", "Bytes"]
    header += ["Header + caption + tokens"] if parts else []
    header += [metric.heading for metric in metrics] + ["Encode (s)", "Decode (s)"]
    rows = []
    for codec in ordered:
        row = [
            f"{codec.label} {SMALLEST_MARK}" if codec.at_smallest else codec.label,
            str(codec.images),
            _fixed(codec.value("bpp"), 4),
            _fixed(codec.value("bytes"), 1),
        ]
        row += [_parts(codec)] if parts else []
        row += [metric.text(codec.value(metric.name)) for metric in metrics]
        row += [_seconds(codec.value(f"{name}_seconds")) for name in ("encode", "decode")]
        rows.append(tuple(row))
    notes = ["Means over the images; rates are those of the files, headers included."]
    if any(codec.at_smallest for codec in ordered):
        notes.append(
            f"{SMALLEST_MARK} On all images or some, the smallest file that the codec writes, "
            "which is larger than asked for."
        )
    notes += [f"{name} was not measured: {why}" for name, why in results.absent_codecs.items()]
    notes += _absences(ordered) + _failures(ordered)
    return Table(header=tuple(header), rows=tuple(rows), notes=tuple(notes))


def delta_tables(deltas: Sequence[Delta]) -> list[tuple[str, Table]]:
    """BD-rate and BD-quality against one anchor, each with its title; none without deltas.

    The notes on both stand below the second.
    """
    if not deltas:
        return []
    metrics = list({delta.metric.name: delta.metric for delta in deltas}.values())
    cells = {(delta.test, delta.metric.name): delta for delta in deltas}
    tests = list(dict.fromkeys(delta.test for delta in deltas))
    rates = Table(
        header=("Codec", *(f"at equal {metric.title} (%)" for metric in metrics)),
        rows=tuple(
            (test, *(_interval(cells[test, m.name].rate, 1) for m in metrics)) for test in tests
        ),
        notes=(),
    )
    qualities = Table(
        header=("Codec", *(_quality_heading(metric) for metric in metrics)),
        rows=tuple(
            (test, *(_interval(cells[test, m.name].quality, _digits(m)) for m in metrics))
            for test in tests
        ),
        notes=tuple(_delta_notes(deltas)),
    )
    anchor = deltas[0].anchor
    return [(f"BD-rate against {anchor}", rates), (f"BD-quality against {anchor}", qualities)]


def markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table with its notes below."""
    lines = [_row(table.header), "|".join(["", ":--", *["--:"] * (len(table.header) - 1), ""])]
    lines += [_row(row) for row in table.rows]
    notes = [f"- {markdown_text(note)}" for note in table.notes]
    return "\n".join(lines + [""] * bool(notes) + notes) + "\n"


def markdown_text(text: str) -> str:
    """Text on one line that is neither HTML nor the end of a table's cell."""
    line = " ".join(text.split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(markdown_text(text) for text in texts)} |"


def _parts(codec: CodecResult) -> str:
    values = [codec.value(name) for name in _PARTS]
    if all(value is None for value in values):
        return "-"
    return " + ".join(_fixed(value, 1) for value in values)


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _absences(codecs: Sequence[CodecResult]) -> list[str]:
    """Why metrics are absent, equal reasons together."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for codec in codecs:
        for name, reason in codec.absent.items():
            metrics.setdefault((describe(name).title, reason), []).append(codec.label)
    notes = []
    for (title, reason), labels in metrics.items():
        where = "" if len(labels) == len(codecs) else f" for {'; '.join(labels)}"
        notes.append(f"{title} is absent{where}: {reason}")
    return notes


def _failures(codecs: Sequence[CodecResult]) -> list[str]:
    notes = []
    for codec in codecs:
        if not codec.failures:
            continue
        count = len(codec.failures)
        shown = [f"{f.image}: {f.error}" for f in codec.failures[:_LISTED_FAILURES]]
        if count > len(shown):
            shown.append(f"{count - len(shown)} more in results.json")
        images = counted(count, "image")
        notes.append(f"{codec.label} failed on {images}: {'; '.join(shown)}")
    return notes


def _delta_notes(deltas: Sequence[Delta]) -> list[str]:
    notes = [
        "Bjontegaard deltas with monotone piecewise cubic interpolation over the range that both "
        f"curves have; in brackets the {CONFIDENCE:.0%} interval of a bootstrap over the images."
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for delta in deltas:
        for reason in delta.reasons:
            reasons.setdefault((delta.test, reason), []).append(delta.metric.title)
    count = len({delta.metric.name for delta in deltas})
    tests: dict[tuple[str, str], list[str]] = {}
    for (test, reason), titles in reasons.items():
        where = "" if len(titles) == count else f" (at {_listed(titles)})"
        tests.setdefault((where, reason), []).append(test)
    return notes + [f"{'; '.join(names)}{where}: {why}" for (where, why), names in tests.items()]


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _quality_heading(metric: Metric) -> str:
    unit = quality_unit(metric)
    arrow = "↑" if metric.better == "higher" else "↓"
    return f"{metric.title} at equal rate{f' ({unit})' if unit else ''} {arrow}"


def _digits(metric: Metric) -> int:
    return 2 if quality_unit(metric) == "dB" else 4


def _interval(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    value = f"{interval.value:+.{digits}f}"
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
