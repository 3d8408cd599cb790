"""The report as one HTML file that needs neither a server nor the network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from percov2.evaluation.plots import FOREGROUND, Plot
from percov2.evaluation.report_curves import Curve, Metric, metrics_of
from percov2.evaluation.report_data import CodecResult, Results
from percov2.evaluation.report_tables import SMALLEST_MARK, Table
from percov2.files import atomic_path

PREVIEW_EDGE = 2048
"""Pictures whose longer edge has more pixels are shown scaled down to it."""

_TEMPLATES = Path(__file__).with_name("html")
_THUMBNAIL_EDGE = 144
_PIXELS_PER_POINT = 1.6
_SVG_ID = re.compile(r'(\bid="|url\(#|xlink:href="#)')


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows besides the pictures.

    Attributes:
        results: all codecs.
        runs: the evaluations that `results` were merged from.
        curves: the codecs' order.
        tables: with their titles.
        plots: as written to files.
    """

    results: Results
    runs: Sequence[Results]
    curves: Sequence[Curve]
    tables: Sequence[tuple[str, Table]]
    plots: Sequence[Plot]


def write_html(path: Path, page: Page, *, max_pictures: int, quality: int) -> None:
    """Write the page.

    Args:
        path: of the file.
        page: what to show.
        max_pictures: images to embed, evenly spread over the sorted names; those whose original
            was not kept cannot be shown.
        quality: of the embedded WebP previews, 1 to 100.
    """
    names = [name for name in page.results.image_names if page.results.original(name)]
    shown = _spread(names, max_pictures)
    codecs = [codec for curve in page.curves for codec in curve.points]
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").stream(
        page=page,
        title=f"Evaluation on {page.results.protocol.name}",
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sides=_sides(codecs),
        images=_images(page.results, codecs, shown, quality),
        thumbnails=[(name, _thumbnail(page.results, name)) for name in shown],
        total=len(page.results.image_names),
        quality=quality,
        preview_edge=PREVIEW_EDGE,
        svgs=[Markup(_inline(plot)) for plot in page.plots],
        environments=[_environment(run) for run in page.runs],
    )
    with atomic_path(path) as temporary:
        text.dump(str(temporary), encoding="utf-8")


def _sides(codecs: Sequence[CodecResult]) -> dict[str, Any]:
    """What both sides of the slider can show, the original first, and where they start."""
    return {
        "labels": ["Original", *(codec.label for codec in codecs)],
        "left": 0,
        "right": min(1, len(codecs)),
    }


def _images(
    results: Results, codecs: Sequence[CodecResult], names: Sequence[str], quality: int
) -> Iterator[dict[str, Any]]:
    """One record per image for the page's script, made as the page is written."""
    metrics = [
        metric
        for metric in metrics_of(results)
        if any(metric.name in codec.columns for codec in codecs)
    ]
    rows = {codec.slug: {name: at for at, name in enumerate(codec.names)} for codec in codecs}
    for name in names:
        original = results.original(name)
        assert original is not None
        picture, scale, size = _preview(original, quality)
        record: dict[str, Any] = {
            "name": name,
            "width": size[0],
            "height": size[1],
            "scale": scale,
            "rows": ["Bytes", "bpp", *(metric.heading for metric in metrics)],
            "pictures": [picture],
            "missing": [None],
            "values": [None],
        }
        for codec in codecs:
            path, at = codec.picture(name), rows[codec.slug].get(name)
            kept = path.is_file()
            record["pictures"].append(_preview(path, quality)[0] if kept else None)
            record["missing"].append(None if kept else _why_missing(codec, name))
            record["values"].append(None if at is None else _values(codec, at, metrics))
        yield record


def _values(codec: CodecResult, at: int, metrics: Sequence[Metric]) -> list[str]:
    """What is known of one picture: bytes, bits per pixel and metrics."""

    def value(column: str) -> float | None:
        return float(codec.columns[column][at]) if column in codec.columns else None

    mark = f" {SMALLEST_MARK}" if value("at_smallest") == 1 else ""
    size, bpp = f"{value('bytes'):.0f}{mark}", f"{value('bpp'):.4f}"
    return [size, bpp, *(metric.text(value(metric.name)) for metric in metrics)]


def _why_missing(codec: CodecResult, image: str) -> str:
    errors = [failure.error for failure in codec.failures if failure.image == image]
    return f"failed: {errors[0]}" if errors else "the picture was not kept"


def _preview(path: Path, quality: int) -> tuple[str, float, tuple[int, int]]:
    """A picture as a data URI, its scale and the size that it has before scaling."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    size = picture.size
    scale = min(1.0, PREVIEW_EDGE / max(size))
    if scale < 1:
        shrunk = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        picture = picture.resize(shrunk, Image.Resampling.LANCZOS)
    return _webp(picture, quality), scale, size


def _thumbnail(results: Results, name: str) -> str:
    original = results.original(name)
    assert original is not None
    with Image.open(original) as image:
        picture = image.convert("RGB")
    picture.thumbnail((_THUMBNAIL_EDGE, _THUMBNAIL_EDGE))
    return _webp(picture, 75)


def _webp(picture: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` names, evenly spread."""
    if len(names) <= count:
        return list(names)
    return [names[index * len(names) // count] for index in range(count)]


def _inline(plot: Plot) -> str:
    """The plot's SVG for the page: its own ids, and the page's colours for text and paper."""
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = _SVG_ID.sub(rf"\g<1>{plot.name}-", svg)
    svg = svg.replace(FOREGROUND, "currentColor").replace("fill: #ffffff", "fill: var(--surface)")
    # Plots of few panels do not grow to the page's width.
    width = re.search(r'\bwidth="([\d.]+)pt"', svg)
    assert width is not None
    attributes = (
        f'role="img" aria-labelledby="caption-{plot.name}" '
        f'style="max-width: {_PIXELS_PER_POINT * float(width[1]):.0f}px"'
    )
    return svg.replace("<svg", f"<svg {attributes}", 1)


def _environment(run: Results) -> dict[str, str]:
    """What there is to say about how a run was made."""
    facts: Mapping[str, Any] = {
        "created": run.created,
        "command": " ".join(run.command),
        "commit": run.commit or "-",
        "data": run.protocol.data,
        **run.environment,
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
    }
