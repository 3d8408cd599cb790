"""The command line's contract: files, folders, exit codes, one line for what went wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import percov2
from percov2 import cli
from percov2.bitstream import Stream
from percov2.cli import main


@pytest.fixture
def picture(tmp_path: Path, photograph: Image.Image) -> Path:
    path = tmp_path / "photo.png"
    photograph.save(path)
    return path


@pytest.fixture
def stream(tmp_path: Path, picture: Path, tiny_model: Path) -> Path:
    path = tmp_path / "photo.pcv2"
    command = ["compress", str(picture), str(path), "--model", str(tiny_model), "--caption", "a b"]
    assert main(command) == 0
    return path


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("percov2: ")
    return lines[0]


def test_compress_then_decompress_in_another_process(
    stream: Path, tiny_model: Path, tmp_path: Path, photograph: Image.Image
) -> None:
    out = tmp_path / "out.png"
    command = [sys.executable, "-m", "percov2", "decompress", stream, out, "--model", tiny_model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with Image.open(out) as image:
        assert image.size == photograph.size
        assert image.text["percov2:bytes"] == str(stream.stat().st_size)
        assert "generated" in image.text["Comment"]
        here = percov2.load(str(tiny_model)).decompress(stream.read_bytes())
        assert np.array_equal(np.asarray(image), np.asarray(here))


def test_json_of_compress_and_info_is_the_same_dict(
    picture: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.pcv2"
    model = ["--model", str(tiny_model), "--json"]
    assert main(["compress", str(picture), str(out), "--schedule-steps", "2", *model]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["info", str(out), *model]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert printed == percov2.info(out.read_bytes(), model=str(tiny_model))
    assert printed["steps_sent"] == 2
    contract = {"width", "height", "model", "caption", "bpp", "bytes", "steps_sent", "steps_total"}
    assert contract <= set(printed)
    assert set(printed["bytes"]) == {"header", "caption", "tokens", "total"}


def test_a_stream_of_fewer_groups_is_made_without_its_picture(
    picture: Path, stream: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = picture.parent / "short.pcv2", ["--model", str(tiny_model), "--json"]
    picture.unlink()
    capsys.readouterr()
    assert main(["truncate", str(stream), str(out), "--steps", "1", *model]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == percov2.info(out.read_bytes(), model=str(tiny_model))
    assert described["steps_sent"] == 1
    assert described["caption"] == "a b"
    assert out.stat().st_size < stream.stat().st_size
    assert main(["truncate", str(stream), str(out), "--steps", "4", *model]) == 2
    assert "the stream has 3 groups, choose 1 to 3" in _one_line(capsys)


def test_a_cut_stream_is_shown_unverified_if_that_is_asked_for(
    photograph: Image.Image,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    picture, stream, out = (tmp_path / name for name in ("p.png", "s.pcv2", "o.png"))
    photograph.resize((256, 256)).save(picture)
    model = ["--model", str(tiny_model), "--json"]
    assert main(["compress", str(picture), str(stream), *model]) == 0
    command = ["decompress", str(stream), str(out), "--steps", "1", *model]
    capsys.readouterr()
    assert main([*command, "--allow-truncated"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["verified"] is True
    assert whole["steps_whole"] == whole["steps_sent"]
    assert "truncated" not in caplog.text
    with Image.open(out) as image:
        assert "percov2:unverified" not in image.text
    out.unlink()
    stream.write_bytes(stream.read_bytes()[:-40])
    assert main(command) == 2
    assert "checksum" in _one_line(capsys)
    assert not out.exists()
    assert main([*command, "--allow-truncated"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["verified"] is False
    assert described["bytes"]["total"] == stream.stat().st_size
    assert "groups are whole, the rest is invented; unverified" in caplog.text
    kept, sent = described["steps_whole"], described["steps_sent"]
    assert 1 <= kept < sent
    with Image.open(out) as image:
        assert image.size == (256, 256)
        assert f"{kept} of its {sent} token groups" in image.text["percov2:unverified"]
    assert main([*command[:-1], "--allow-truncated"]) == 0
    assert f"({kept} of them could be read, unverified)" in capsys.readouterr().out


def test_a_largest_size_is_kept_and_what_was_left_out_is_told(
    picture: Path,
    stream: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, most = picture.parent / "small.pcv2", stream.stat().st_size - 1
    command = ["compress", str(picture), str(out), "--model", str(tiny_model), "--caption", "a b"]
    assert main([*command, "--max-bytes", str(most)]) == 0
    assert out.stat().st_size <= most
    assert f"to fit {most} bytes:" in caplog.text
    capsys.readouterr()
    assert main([*command, "--max-bytes", "8"]) == 2
    assert "nothing fits in 8 bytes" in _one_line(capsys)


def test_the_rate_weight_reaches_the_encoder(picture: Path, stream: Path, tiny_model: Path) -> None:
    out = picture.parent / "cheap.pcv2"
    command = ["compress", str(picture), str(out), "--model", str(tiny_model)]
    assert main([*command, "--rate-weight", "0.1"]) == 0
    codec = percov2.load(str(tiny_model))
    assert out.read_bytes() == codec.compress(picture, caption="", rate_weight=0.1)
    assert out.stat().st_size < stream.stat().st_size


def test_portable_streams_from_the_command_line(
    picture: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, out = tmp_path / "u.pcv2", tmp_path / "u.png"
    model = ["--model", str(tiny_model), "--json"]
    assert main(["compress", str(picture), str(stream), "--entropy", "uniform", *model]) == 0
    assert json.loads(capsys.readouterr().out)["entropy"] == "uniform"
    assert main(["decompress", str(stream), str(out), "--steps", "1", *model]) == 0
    assert out.is_file()


def test_info_for_people(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(stream)]) == 0
    text = capsys.readouterr().out
    assert "96x64" in text
    assert f"{stream.stat().st_size} bytes" in text
    assert "'a b'" in text
    assert "Detail is generated" in text


def test_a_folder_with_a_bad_file_does_the_rest_and_exits_1(
    tmp_path: Path,
    photograph: Image.Image,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, streams, pictures = tmp_path / "in", tmp_path / "streams", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    photograph.save(source / "a.png")
    photograph.save(source / "deep" / "b.jpg")
    photograph.save(source / "a.webp")
    (source / "broken.png").write_bytes(b"not a picture")
    for name in ("LICENSE", "b.heic", "deep/c.HEIC", ".hidden"):
        (source / name).touch()
    model = ["--model", str(tiny_model), "--json"]
    assert main(["compress", str(source), str(streams), *model]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert {Path(f["output"]).name for f in result["files"]} == {"a.pcv2", "b.pcv2"}
    failed = {Path(f["input"]).name: f["error"] for f in result["failures"]}
    assert set(failed) == {"a.webp", "broken.png"}
    assert "2 of 4 files failed" in captured.err
    assert "left alone, no pictures by their names: 1 no suffix, 2 .heic" in captured.err
    assert sorted(p.name for p in streams.rglob("*") if p.is_file()) == ["a.pcv2", "b.pcv2"]
    assert main(["decompress", str(streams), str(pictures), "--steps", "1", *model]) == 0
    assert (pictures / "deep" / "b.png").is_file()


def test_a_folder_within_its_own_output_loses_nothing(
    tmp_path: Path,
    photograph: Image.Image,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    streams, below = tmp_path / "streams", tmp_path / "streams" / "small"
    below.mkdir(parents=True)
    photograph.save(tmp_path / "p.png")
    photograph.resize((64, 48)).save(tmp_path / "q.png")
    model = ["--model", str(tiny_model)]
    for picture, stream in (("p.png", streams / "c.pcv2"), ("q.png", below / "c.pcv2")):
        assert main(["compress", str(tmp_path / picture), str(stream), *model]) == 0
    other = (below / "c.pcv2").read_bytes()
    # OUT within IN: what lies in OUT is no input.
    for _ in range(2):
        assert main(["truncate", str(streams), str(below), "--steps", "1", *model]) == 0
    assert sorted(path.name for path in below.rglob("*")) == ["c.pcv2"]
    # IN within OUT, and an output that is an input of the same run.
    deep = below / "small"
    deep.mkdir()
    (deep / "c.pcv2").write_bytes(other)
    capsys.readouterr()
    assert main(["truncate", str(below), str(streams), "--steps", "1", *model]) == 1
    assert "is one of the inputs: name another OUT" in capsys.readouterr().err
    assert percov2.info((below / "c.pcv2").read_bytes())["width"] == photograph.width


def test_a_pipe_in_a_folder_is_a_failure_and_not_waited_for(
    stream: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "a.pcv2")
    shutil.copy(stream, folder / "z.pcv2")
    command = ["truncate", str(folder), str(tmp_path / "out"), "--steps", "1"]
    assert main([*command, "--model", str(tiny_model)]) == 1
    assert "a.pcv2: is no regular file" in capsys.readouterr().err
    assert (tmp_path / "out" / "z.pcv2").is_file()


def test_a_huge_file_is_no_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = tmp_path / "huge.pcv2"
    with huge.open("wb") as file:
        file.truncate(10**10)
    assert main(["info", str(huge)]) == 2
    assert "larger than any stream" in _one_line(capsys)


def test_names_cannot_write_lines_of_their_own(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "new\nline\x1b[31m.png").write_bytes(b"junk")
    command = ["compress", str(folder), str(tmp_path / "out"), "--model", str(tiny_model)]
    assert main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("percov2")]
    assert len(lines) == 2
    assert r"new line\x1b[31m.png: not a picture" in lines[0]
    assert lines[0].count(".png") == 1


def test_doctor_names_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "xpu"]) == 2
    assert "device xpu cannot be used" in _one_line(capsys)


def test_names_that_the_file_system_does_not_tell_apart_are_not_overwritten(
    tmp_path: Path,
    photograph: Image.Image,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, streams = tmp_path / "in", tmp_path / "streams"
    source.mkdir()
    photograph.save(source / "Photo.jpg")
    photograph.save(source / "photo.png")
    monkeypatch.setattr(cli, "_identity", lambda path: path.name.casefold())
    assert main(["compress", str(source), str(streams), "--model", str(tiny_model)]) == 1
    assert "Photo.jpg has taken the output" in capsys.readouterr().err
    assert [path.name for path in streams.iterdir()] == ["Photo.pcv2"]


def test_what_the_terminal_cannot_print_is_escaped(
    picture: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    command = ["compress", str(picture), str(tmp_path / "s.pcv2"), "--model", str(tiny_model)]
    assert main([*command, "--caption", "赤いドア"]) == 0
    sys.stdout.flush()
    assert rb"caption '\u8d64\u3044" in printed.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0 cut"], ids=len
)
def test_what_is_no_picture_is_one_line_exit_2_and_no_output(
    content: bytes, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.png", tmp_path / "out.pcv2"
    bad.write_bytes(content)
    assert main(["compress", str(bad), str(out), "--model", str(tiny_model)]) == 2
    assert "bad.png" in _one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


def test_a_damaged_stream_is_one_line_exit_2_and_leaves_an_old_output_alone(
    stream: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(stream.read_bytes())
    data[-1] ^= 1
    stream.write_bytes(bytes(data))
    out = tmp_path / "old.png"
    out.write_bytes(b"precious")
    capsys.readouterr()
    assert main(["decompress", str(stream), str(out), "--model", str(tiny_model)]) == 2
    assert "checksum" in _one_line(capsys)
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize("bit", range(16))
def test_a_damaged_model_id_is_damage(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bit: int
) -> None:
    data = bytearray(stream.read_bytes())
    data[4 + bit // 8] ^= 1 << bit % 8
    stream.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["decompress", str(stream), str(tmp_path / "o.png")]) == 2
    assert "checksum" in _one_line(capsys)


def test_more_groups_than_there_are_is_inconsistent(
    stream: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = replace(Stream.from_bytes(stream.read_bytes()), steps_sent=63)
    stream.write_bytes(forged.to_bytes())
    capsys.readouterr()
    assert main(["info", str(stream), "--model", str(tiny_model)]) == 2
    assert "it claims 63 of" in _one_line(capsys)


def test_a_stream_of_no_preset_asks_for_its_model(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["decompress", str(stream), str(tmp_path / "o.png")]) == 2
    assert "--model" in _one_line(capsys)
    assert main(["info", str(stream), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["model"].startswith("0x")
    assert described["steps_total"] is None


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["compress", "PICTURE", "out.jpg"], ".pcv2"),
        (["compress", "PICTURE", "no/such/folder/x.pcv2"], "does not exist"),
        (["compress", "missing.png", "x.pcv2"], "missing.png"),
        (["compress", "PICTURE", "x.pcv2", "--schedule-steps", "99"], "choose 1 to"),
        (["compress", "PICTURE", "x.pcv2", "--device", "abacus"], "abacus"),
        (["decompress", "missing.pcv2", "x.png"], "missing.pcv2"),
        (["info", "missing.pcv2"], "missing.pcv2"),
        (["truncate", "missing.pcv2", "x.pcv2", "--steps", "1"], "missing.pcv2"),
        (["truncate", "PICTURE", "x.pcv2", "--steps", "1"], "wrong magic"),
    ],
)
def test_wrong_uses_are_one_line_and_exit_2(
    command: list[str],
    expected: str,
    picture: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(picture.parent)
    command = [str(picture) if part == "PICTURE" else part for part in command]
    assert main([*command, "--model", str(tiny_model)]) == 2
    assert expected in _one_line(capsys)
    assert not (picture.parent / "x.pcv2").exists()


@pytest.mark.parametrize("command", [[], ["paint"], ["compress"], ["compress", "a", "b", "--what"]])
def test_a_wrong_command_line_is_one_line_and_exit_2(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "--help" in _one_line(capsys)


def test_an_unknown_model_is_named(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(picture), str(tmp_path / "x.pcv2"), "--model", "huge"]) == 2
    assert "'huge'" in _one_line(capsys)


def test_package_and_help_need_no_torch() -> None:
    program = (
        "import sys, percov2, percov2.cli\n"
        "try:\n    percov2.cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'lightning'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_output_permissions_are_those_of_any_new_file(stream: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert stream.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_caption_with_nul_survives_in_the_stream_and_is_escaped_in_the_png(
    picture: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stream, out, model = tmp_path / "n.pcv2", tmp_path / "n.png", ["--model", str(tiny_model)]
    assert main(["compress", str(picture), str(stream), "--caption", "a\0b", *model]) == 0
    assert percov2.info(stream.read_bytes())["caption"] == "a\0b"
    assert main(["decompress", str(stream), str(out), "--steps", "1", *model]) == 0
    with Image.open(out) as image:
        assert image.text["Description"] == "a\\0b"


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("folder", "file.txt", "OUT"),
        ("folder", "folder", "same folder"),
        ("photo.png", "folder", "is a folder"),
    ],
)
def test_folders_and_files_are_not_mixed(
    source: str,
    target: str,
    expected: str,
    picture: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    if source == "folder":
        picture.rename(tmp_path / "folder" / "p.png")
    (tmp_path / "file.txt").write_text("mine")
    paths = [str(tmp_path / source), str(tmp_path / target)]
    assert main(["compress", *paths, "--model", str(tiny_model)]) == 2
    assert expected in _one_line(capsys)
    assert (tmp_path / "file.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "option",
    [
        ["--seed", str(2**64)],
        ["--steps", "0"],
        ["--guidance", "-1"],
        ["--sharpness", "-0.1"],
        ["--grain", "-0.1"],
    ],
)
def test_sampling_options_are_checked_once_for_a_whole_folder(
    option: list[str], stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["decompress", str(tmp_path), str(tmp_path / "out"), *option]) == 2
    assert "it must be" in _one_line(capsys)


def test_what_torch_raises_is_one_line_too(
    stream: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ["decompress", str(stream), str(tmp_path / "o.png"), "--model", str(tiny_model)]
    assert main([*command, "--device", "meta"]) == 2
    _one_line(capsys)
    assert not (tmp_path / "o.png").exists()
