"""How metrics are called and read, and which codecs in which settings make a curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from percov2.evaluation.report_data import OURS, CodecResult, Results

SAMPLING = ("steps", "guidance")
"""The settings of our decoder that leave the rate as it is: they part curves."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown.

    Attributes:
        name: in `results.json` and `images.csv`.
        title: for people.
        kind: what it speaks of; "other" is shown in tables only.
        better: which values are better, None where neither are.
        digits: after the decimal point.
        unit: for people, may be empty.
    """

    name: str
    title: str
    kind: Literal["distortion", "perception", "other"] = "other"
    better: Literal["higher", "lower"] | None = None
    digits: int = 4
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title, unit and an arrow that points to the better values."""
        unit = f" ({self.unit})" if self.unit else ""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return f"{self.title}{unit}{arrow}"

    def text(self, value: float | None) -> str:
        """The value for people, "-" if there is none."""
        return "-" if value is None or value != value else f"{value:.{self.digits}f}"


_KNOWN = {
    metric.name: metric
    for metric in (
        Metric(name="psnr", title="PSNR", kind="distortion", better="higher", digits=2, unit="dB"),
        Metric(name="ms_ssim", title="MS-SSIM", kind="distortion", better="higher"),
        Metric(name="lpips_alex", title="LPIPS (AlexNet)", kind="perception", better="lower"),
        Metric(name="lpips_vgg", title="LPIPS (VGG)", kind="perception", better="lower"),
        Metric(name="dists", title="DISTS", kind="perception", better="lower"),
        Metric(name="fid", title="FID", kind="perception", better="lower", digits=2),
        Metric(name="kid", title="KID", kind="perception", better="lower", digits=5),
        Metric(name="patch_fid", title="Patch FID", kind="perception", better="lower", digits=2),
        Metric(
            name="patch_fid_64", title="Patch FID (64)", kind="perception", better="lower", digits=2
        ),
        Metric(
            name="efficientnet_frechet",
            title="Fréchet distance (EfficientNet)",
            kind="perception",
            better="lower",
            digits=2,
        ),
        Metric(name="clip_score", title="CLIP score", kind="perception", better="higher", digits=2),
        Metric(name="miou", title="mIoU", kind="perception", better="higher"),
        Metric(name="gradient_energy", title="Gradient energy", digits=3, unit="original = 1"),
        Metric(
            name="gradient_magnitude", title="Gradient magnitude", digits=3, unit="original = 1"
        ),
        Metric(name="token_saving_against_uniform", title="Token saving", digits=3),
    )
}
_NOT_QUALITY = frozenset(("width", "height", "bpp"))
_NOT_QUALITY_ENDS = ("bytes", "_seconds")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points that belong together: one codec at several rates.

    Attributes:
        label: for people.
        points: in the order of their rate.
        ours: whether it is this package's codec.
    """

    label: str
    points: tuple[CodecResult, ...]
    ours: bool


def describe(name: str) -> Metric:
    """How a metric is shown; one that is unknown here goes by its name, in tables only."""
    return _KNOWN.get(name) or Metric(name=name, title=name)


def metrics_of(results: Results) -> list[Metric]:
    """The metrics of quality that some codec has, in a fixed order."""
    present = {
        name
        for codec in results.codecs
        for name in (*codec.summary, *codec.set_metrics)
        if name not in _NOT_QUALITY and not name.endswith(_NOT_QUALITY_ENDS)
    }
    order = [name for name in _KNOWN if name in present] + sorted(present - _KNOWN.keys())
    return [describe(name) for name in order]


def curves_of(results: Results, patterns: Mapping[str, str] | None = None) -> list[Curve]:
    """The codecs as curves, ours first, otherwise in the order of the results.

    A competitor's settings are one curve. Our codec's rate changes with the model, so a curve
    joins models, parted by `SAMPLING`: those whose names are equal up to the first hyphen behind
    the last slash, such as "percov2 tiny" and "percov2 tiny-low". Codecs without a rate (every
    image failed) are on no curve.

    Args:
        results: see `read_results`.
        patterns: shell patterns by label. Codecs whose name matches one are a curve of that label,
            instead of the rule above; ours are still parted by `SAMPLING`.

    Raises:
        ValueError: A pattern matches no codec.
    """
    patterns = patterns or {}
    for label, pattern in patterns.items():
        if not any(fnmatchcase(codec.codec, pattern) for codec in results.codecs):
            raise ValueError(
                f"curve {label!r}: no codec is called {pattern!r}, "
                f"there are {sorted({codec.codec for codec in results.codecs})}"
            )
    groups: dict[tuple[str, str], list[CodecResult]] = {}
    for codec in results.codecs:
        if codec.value("bpp") is None:
            continue
        stem = next(
            (label for label, pattern in patterns.items() if fnmatchcase(codec.codec, pattern)),
            _stem(codec),
        )
        groups.setdefault((stem, sampling_text(codec)), []).append(codec)
    samplings = {sampling for _, sampling in groups if sampling}
    curves = [
        Curve(
            label=f"{stem}, {sampling}" if sampling and len(samplings) > 1 else stem,
            points=tuple(sorted(codecs, key=rate)),
            ours=codecs[0].family == OURS,
        )
        for (stem, sampling), codecs in groups.items()
    ]
    return sorted(curves, key=lambda curve: not curve.ours)


def rate(codec: CodecResult) -> float:
    """Mean bits per pixel of a codec that has a rate."""
    value = codec.value("bpp")
    assert value is not None
    return value


def sampling_text(codec: CodecResult) -> str:
    """Steps and guidance of our codec for people; empty for the others."""
    if codec.family != OURS:
        return ""
    texts = []
    steps, guidance = (codec.setting.get(name) for name in SAMPLING)
    if steps is not None:
        texts.append("1 step" if steps == 1 else f"{short(steps)} steps")
    if guidance is not None:
        texts.append(f"guidance {short(guidance)}")
    return ", ".join(texts)


def short(value: object) -> str:
    """A setting's value for people, without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stem(codec: CodecResult) -> str:
    if codec.family != OURS:
        return codec.codec
    folder, slash, name = codec.codec.rpartition("/")
    return f"{folder}{slash}{name.split('-', 1)[0]}"
