from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from percov2.cli import main
from percov2.evaluation import command, protocols
from percov2.evaluation.distributed import Processes
from percov2.evaluation.protocols import Protocol
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


def test_one_process_of_a_node_fetches_before_the_others_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, done, overlapping = threading.local(), [], []
    barrier = threading.Barrier(4)

    class _Peer(Processes):
        def wait(self) -> None:
            barrier.wait(timeout=60)

    def find(data: str, **_: object) -> Protocol:
        before = list(done)
        time.sleep(0.05)  # long enough for all that are let in to be in
        overlapping.append((here.rank, before))
        done.append(here.rank)
        return Protocol(name="folder", crop="full", data=data, items=())

    def process(rank: int, local_rank: int) -> None:
        here.rank = rank
        peers = _Peer(rank=rank, local_rank=local_rank, count=4)
        assert command._protocol(args, peers).data == "somewhere"

    monkeypatch.setattr(protocols, "find_protocol", find)
    parser = argparse.ArgumentParser()
    command.add_evaluate(parser.add_subparsers())
    args = parser.parse_args(
        ["evaluate", "--data=somewhere", "--model=tiny", f"--output={tmp_path}"]
    )
    with ThreadPoolExecutor(4) as pool:  # two nodes of two processes
        list(pool.map(process, (0, 1, 2, 3), (0, 1, 0, 1)))
    before = dict(overlapping)
    assert before[0] == []
    assert before[2] == [0]
    assert set(before[1]) == set(before[3]) == {0, 2}
