"""Reading results, joining them, and the files of the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from percov2.evaluation.report import main, read_results, write_report
from percov2.evaluation.report_curves import curves_of, describe, metrics_of
from percov2.evaluation.report_data import merge
from percov2.evaluation.report_tables import Table, markdown, results_table
from tests.evaluation.fake_output import NOT_FOUND, write_fake_output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A fake evaluation without pictures."""
    return write_fake_output(tmp_path / "output", pictures=False)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake evaluation with its report."""
    folder = write_fake_output(tmp_path_factory.mktemp("report") / "output", metrics=["psnr"])
    assert write_report(folder, max_pictures=1, resamples=20) == folder / "report.html"
    return folder


def _change(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = output / "results.json"
    root = json.loads(path.read_text(encoding="utf-8"))
    change(root)
    path.write_text(json.dumps(root), encoding="utf-8")


def test_read(output: Path) -> None:
    results = read_results(output)
    assert results.protocol.name == "kodak"
    assert results.protocol.images == 3
    assert results.environment["threads"] == 2
    assert results.image_names == ("kodim01", "kodim02", "kodim03")
    assert len(results.codecs) == 16
    smallest = results.codecs[7]
    assert (smallest.label, smallest.at_smallest) == ("JPEG, quality 1", True)
    assert smallest.names == ("kodim01", "kodim02")
    assert smallest.failures[0].error == "encoder failed"
    assert smallest.value("psnr") == pytest.approx(smallest.columns["psnr"].mean())
    assert smallest.columns["at_smallest"].tolist() == [1, 1]
    assert np.isnan(smallest.columns["header_bytes"]).all()
    assert smallest.value("header_bytes") is None
    assert smallest.value("fid") is None
    assert results.codecs[0].setting == {"steps": 1, "guidance": 1.0}
    assert [metric.name for metric in metrics_of(results)] == ["psnr", "lpips_alex"]


def test_pictures(reported: Path) -> None:
    results = read_results(reported)
    assert results.codecs[0].picture("kodim01").is_file()
    assert results.original("kodim01") == reported / "pictures" / "original" / "kodim01.png"
    assert results.original("kodim99") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.update(schema=3), "field schema is 3, .* reads 2"),
        (lambda root: root.pop("protocol"), "field protocol is missing"),
        (lambda root: root["protocol"].update(images="3"), "protocol: field images is '3'"),
        (lambda root: root["protocol"].update(images=True), "protocol: field images is True"),
        (lambda root: root.update(command=[1]), r"field command\[0\] is 1, expected str"),
        (lambda root: root["codecs"][2].pop("label"), r"codecs\[2\]: field label is missing"),
        (lambda root: root["codecs"].append(3), r"codecs\[16\]: is 3, expected an object"),
        (
            lambda root: root["codecs"][0]["summary"]["psnr"].update(mean="x"),
            r"codecs\[0\].summary.psnr: field mean is 'x', expected int or float or null",
        ),
        (
            lambda root: root["codecs"][0]["absent"].update(kid=None),
            r"codecs\[0\].absent: field kid is None, expected str",
        ),
        (
            lambda root: root["codecs"][1].update(slug=root["codecs"][0]["slug"]),
            "slug 'percov2-tiny-1-1' occurs twice",
        ),
        (lambda root: root["codecs"].pop(), "column slug has 'avif-40', which is not in"),
    ],
)
def test_faulty_results(
    output: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _change(output, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_results(output)
    assert str(output) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_json(output: Path) -> None:
    (output / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json: is not JSON"):
        read_results(output)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slug,image,width,height,bytes\n", "column bpp is missing"),
        ("slug,image,width,height,bytes,bpp\na,b,1,1,1\n", "line 2: has 5 cells, expected 6"),
        ("slug,image,width,height,bytes,bpp\na,b,1,1,1,x\n", "line 2: column bpp is 'x'"),
        (
            "slug,image,width,height,bytes,bpp\na,b,1,1,1,1\na,b,1,1,1,1\n",
            "slug 'a' has an image twice",
        ),
    ],
)
def test_faulty_table(output: Path, text: str, message: str) -> None:
    (output / "images.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_results(output)


def test_null_metric_is_absent(output: Path) -> None:
    _change(output, lambda root: root["codecs"][0]["set_metrics"].update(fid=None))
    _change(output, lambda root: root["codecs"][0]["summary"].update(psnr=None))
    codec = read_results(output).codecs[0]
    assert "fid" not in codec.set_metrics
    assert "psnr" not in codec.summary


def test_merge(output: Path, tmp_path: Path) -> None:
    first = read_results(output)
    second = read_results(write_fake_output(tmp_path / "other", ours=False, pictures=False))
    merged = merge([first, second])
    assert merged.codecs == first.codecs + second.codecs
    assert merged.command == first.command
    with pytest.raises(ValueError, match="slug 'percov2-tiny-1-1' occurs twice"):
        merge([first, first])
    _change(output, lambda root: root["protocol"].update(crop="centre-512"))
    with pytest.raises(ValueError, match=r"protocol\.crop is 'full', but 'centre-512' in"):
        merge([read_results(output), second])


def test_curves(output: Path) -> None:
    results = read_results(output)
    curves = {curve.label: curve for curve in curves_of(results)}
    assert list(curves)[-2:] == ["JPEG", "AVIF"]
    joined = curves["percov2 tiny, 4 steps, guidance 1"]
    assert [point.codec for point in joined.points] == ["percov2 tiny-low", "percov2 tiny"]
    assert joined.ours
    assert not curves["JPEG"].ours
    assert len(curves["JPEG"].points) == 5
    assert "percov2 tiny, 1 step, guidance 3" in curves
    named = [curve.label for curve in curves_of(results, {"both": "*[EI]*"})]
    assert named[-1] == "both"
    with pytest.raises(ValueError, match="no codec is called 'JPG', there are"):
        curves_of(results, {"JPEG": "JPG"})


def test_unknown_metric_goes_by_its_name() -> None:
    assert describe("brisque").heading == "brisque"
    assert describe("psnr").heading == "PSNR (dB) ↑"
    assert describe("psnr").text(float("nan")) == "-"


def test_results_table(tmp_path: Path) -> None:
    results = read_results(write_fake_output(tmp_path / "output", fid=True, pictures=False))
    table = results_table(results, curves_of(results))
    assert len(table.rows) == len(results.codecs)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    smallest = rows["JPEG, quality 1 †"]
    assert smallest["Images"] == "2"
    assert smallest["Header + caption + tokens"] == "-"
    assert rows["AVIF, quality 10"]["FID ↓"] == "-"
    assert float(smallest["FID ↓"]) == pytest.approx(results.codecs[7].set_metrics["fid"], abs=0.01)
    assert rows["percov2 tiny, steps 4, guidance 1"]["Header + caption + tokens"].startswith("9.0")
    notes = "\n".join(table.notes)
    avif = "; ".join(f"AVIF, quality {quality}" for quality in (1, 10, 25, 40))
    assert f"FID is absent for {avif}: {NOT_FOUND}" in notes
    assert "CLIP score is absent: offline" in notes
    assert "JPEG, quality 1 failed on 1 image: kodim03: encoder failed" in notes
    assert "HEIC was not measured: pillow-heif is not installed" in notes


def test_markdown_is_escaped() -> None:
    table = Table(header=("a|b",), rows=(("<i>\nx",),), notes=("n & m",))
    assert markdown(table) == "| a\\|b |\n|:--|\n| &lt;i> x |\n\n- n &amp; m\n"


def test_summary(reported: Path) -> None:
    text = (reported / "summary.md").read_text(encoding="utf-8")
    assert "Command: `percov2 evaluate --data kodak --output output`" in text
    assert "| JPEG, quality 1 † |" in text
    assert "## BD-rate against JPEG" in text
    assert "percov2 tiny, 4 steps, guidance 1: the curve has 2 points, the method needs 4" in text
    assert "(plots/rate_psnr.png)" in text


def test_deltas(reported: Path) -> None:
    with (reported / "bd_rate.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["codec"]: row for row in csv.DictReader(file)}
    assert "JPEG" not in rows
    avif = rows["AVIF"]
    assert (avif["anchor"], avif["metric"], avif["images"]) == ("JPEG", "psnr", "2")
    # AVIF's fake PSNR is 1.5 dB higher at any rate, at a slope of 1.9 dB per doubling.
    assert float(avif["bd_quality"]) == pytest.approx(1.5, abs=0.02)
    assert float(avif["bd_rate_percent"]) == pytest.approx(100 * (2 ** (-1.5 / 1.9) - 1), abs=1)
    assert float(avif["bd_rate_percent_low"]) <= float(avif["bd_rate_percent"])
    ours = rows["percov2 tiny, 1 step, guidance 1"]
    assert ours["bd_rate_percent"] == ""
    assert ours["reasons"] == "the curve has 1 point, the method needs 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anchor", "JPG"], "anchor 'JPG' is no curve"),
        (["--quality", "0"], "quality is 0: choose 1 to 100"),
        (["--max-pictures", "-1"], "max_pictures is -1: choose 0 or more"),
        (["--resamples", "0"], "resamples is 0: choose 1 or more"),
        (["--curve", "x=nothing"], "curve 'x': no codec is called 'nothing'"),
    ],
)
def test_command_line_errors(
    output: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"percov2: {message}")
    assert error.count("\n") == 1
    assert not (output / "report.html").exists()


def test_command_line_joins_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_fake_output(tmp_path / "a", metrics=[])
    second = write_fake_output(tmp_path / "b", metrics=[], ours=False)
    assert main([str(first), str(second), "--max-pictures", "0"]) == 0
    assert capsys.readouterr().out == f"report: {first / 'report.html'}\n"
    page = (first / "report.html").read_text(encoding="utf-8")
    assert "WebP, quality 1" in page
    assert "data:image/webp" not in page
    assert not (second / "report.html").exists()
