from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from percov2.cli import main
from tests.evaluation.pictures import make_folder, make_picture


@pytest.fixture
def options(tmp_path: Path, tiny_model: Path) -> list[str]:
    """A small run."""
    folder = make_folder(tmp_path / "pictures", 2)
    return [
        "evaluate",
        *("--data", str(folder), "--model", str(tiny_model), "--output", str(tmp_path / "out")),
        *("--metrics", "psnr,ms_ssim,gradient_energy", "--no-report"),
    ]


def test_a_run(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text('{"a": "a dog on a beach", "b": ""}')
    external = f"copy:{sys.executable} -c {_COPY} {{in}} {{out}}:{sys.executable} -c {_COPY} " + (
        "{in} {out}"
    )
    more = ["--steps", "1,2", "--guidance", "1", "--competitors", "webp,jpeg", "--codec", external]
    assert main([*options, *more, "--rates", "same,2x", "--captions", str(captions)]) == 0
    shown = capsys.readouterr().out
    assert "percov2 test, 1 step, guidance 1" in shown
    assert "WebP, 2x the bytes of percov2 test" in shown
    assert "times the codec calls" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    slugs = {entry["slug"]: entry for entry in results["codecs"]}
    assert set(slugs) == {
        "percov2-test-1-g1",
        "percov2-test-2-g1",
        "webp-test-same",
        "webp-test-2x",
        "jpeg-test-same",
        "jpeg-test-2x",
        "external-copy",
    }
    assert slugs["jpeg-test-same"]["at_smallest"], "JPEG makes no file of some dozen bytes"
    assert slugs["external-copy"]["absent"]["psnr"].startswith("2 of 2 pictures")
    assert slugs["percov2-test-1-g1"]["summary"]["caption_bytes"]["mean"] > 0
    assert slugs["percov2-test-1-g1"]["setting"] == {"steps": 1, "guidance": 1.0}


_COPY = "'import shutil, sys; shutil.copy(*sys.argv[1:])'"


def test_failures_change_the_exit_code(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures" / "b.png").write_bytes(b"no picture")
    assert main([*options, "--json"]) == 1
    captured = capsys.readouterr()
    results: dict[str, Any] = json.loads(captured.out)
    assert [entry["images"] for entry in results["codecs"]] == [1]
    assert "1 pictures failed" in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data nowhere is neither a folder nor one of kodak"),
        (["--metrics", "fidd"], "metric 'fidd'"),
        (["--competitors", "bpg"], "competitor 'bpg': choose from jpeg, "),
        (["--competitors", "webp", "--rates", "half"], "rate 'half'"),
        (["--codec", "x:y"], "--codec 'x:y': say"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "four"], "argument --steps: invalid list of int value: 'four'"),
        (["--guidance", "-1"], "guidance is -1.0"),
        (["--weights", "nowhere"], "--weights nowhere is no folder"),
        (["--steps", "1,1"], "two codecs have the name percov2-test-1"),
        (["--limit", "0"], "limit is 0"),
        (["--captions", "nowhere.json"], "nowhere.json: no JSON object"),
    ],
)
def test_errors_are_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    try:
        code = main([*options, *more])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("percov2: ")


def test_output_that_is_a_file(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture(0).save(tmp_path / "out.png")
    assert main([*options, "--output", str(tmp_path / "out.png")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
