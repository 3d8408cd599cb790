"""Plots of a fake evaluation."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from percov2.evaluation import plots
from percov2.evaluation.report_curves import Curve, curves_of, describe
from percov2.evaluation.report_data import Results, read_results
from tests.evaluation.fake_output import write_fake_output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read_results(write_fake_output(tmp_path_factory.mktemp("plots") / "output"))


@pytest.fixture(scope="module")
def curves(results: Results) -> list[Curve]:
    return curves_of(results)


def _text(svg: str) -> set[str]:
    tree = ElementTree.fromstring(svg)
    return {
        "".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")
    }


def test_files(results: Results, curves: list[Curve], tmp_path: Path) -> None:
    made = plots.write_plots(results, curves, tmp_path / "plots")
    names = ["rate_psnr", "rate_lpips_alex", "distortion_perception"]
    assert [plot.name for plot in made] == names
    files = {path.name for path in (tmp_path / "plots").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    with Image.open(tmp_path / "plots" / "rate_psnr.png") as picture:
        assert picture.width > 1000
    assert (tmp_path / "plots" / "rate_psnr.svg").read_text(encoding="utf-8") == made[0].svg
    texts = _text(made[0].svg)
    assert {"PSNR (dB) ↑", "JPEG", "AVIF", "smallest file"} <= texts
    assert {curve.label for curve in curves} <= texts
    assert {"percov2 tiny, guidance 1", "percov2 tiny, guidance 3", "20"} <= _text(made[2].svg)


def test_rate_figure(curves: list[Curve]) -> None:
    figure = plots.rate_figure(curves, describe("psnr"))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len(lines) == len(curves)
    jpeg = lines[[curve.label for curve in curves].index("JPEG")]
    assert len(jpeg.get_xdata()) == 5
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata()[0] for line in hollow] == [jpeg.get_xdata()[0]]
    low, high = axes.get_xlim()
    ticks = axes.get_xticks()
    assert len(ticks) >= 4
    assert all(low <= tick <= high for tick in ticks)


def test_no_values_no_figure(curves: list[Curve]) -> None:
    assert plots.rate_figure(curves, describe("kid")) is None


def test_every_rate_has_a_tick() -> None:
    axes = Figure().subplots()
    for rate in np.geomspace(0.001, 1, 300):
        plots._rate_axis(axes, [float(rate)])
        low, high = axes.get_xlim()
        assert any(low <= tick <= high for tick in axes.get_xticks()), rate


def test_rates_within_a_tenth_have_ticks() -> None:
    axes = Figure().add_subplot()
    plots._rate_axis(axes, [0.0301, 0.0312])
    assert len(axes.get_xticks()) >= 1


def test_distortion_perception_needs_several_settings(results: Results) -> None:
    figure = plots.distortion_perception_figure(results)
    assert figure is not None
    (axes,) = figure.axes
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 3]
    assert [text.get_text() for text in axes.texts] == ["1", "4", "20"] * 2
    low = tuple(codec for codec in results.codecs if codec.codec != "percov2 tiny")
    assert plots.distortion_perception_figure(replace(results, codecs=low)) is None


def test_curves_look_different() -> None:
    looks = list(islice(plots._looks(), 42))
    assert len(set(looks)) == 42
