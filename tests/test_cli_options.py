"""That every option of the command line arrives where it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from percov2 import cli
from percov2.analysis import captioner
from percov2.cli import main
from percov2.codec import Codec


class _Spy:
    """Keeps the options of a method, and calls it with those that cost nothing."""

    def __init__(self, method: Any, **instead: Any) -> None:
        self.method, self.instead = method, instead
        self.options: dict[str, Any] = {}

    def __get__(self, codec: Any, kind: Any = None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.options = options
            return self.method(codec, *arguments, **self.instead)

        return call


@pytest.fixture
def picture(tmp_path: Path, photograph: Image.Image) -> Path:
    path = tmp_path / "photo.png"
    photograph.save(path)
    return path


def test_options_of_compress(
    picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = _Spy(Codec.compress, caption="")
    monkeypatch.setattr(Codec, "compress", spy)
    command = ["compress", str(picture), str(picture.with_suffix(".pcv2"))]
    command += ["--model", str(tiny_model)]
    given = {"schedule-steps": 2, "max-bytes": 900}
    given |= {"rate-weight": 0.01, "color-weight": 0.02, "latent-weight": 0.03}  # type: ignore[dict-item]
    options = [f"--{name}={value}" for name, value in given.items()]
    assert main([*command, *options, "--entropy=uniform"]) == 0
    expected = {name.replace("-", "_"): value for name, value in given.items()}
    assert spy.options == {**expected, "uniform": True}
    assert main(command) == 0
    assert spy.options == {**dict.fromkeys(expected), "uniform": False}


def test_options_of_decompress(
    picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, out = picture.with_suffix(".pcv2"), picture.with_name("out.png")
    model = ["--model", str(tiny_model)]
    assert main(["compress", str(picture), str(stream), *model]) == 0
    spy = _Spy(Codec.decompress, steps=1)
    monkeypatch.setattr(Codec, "decompress", spy)
    given = {"steps": 3, "guidance": 1.5, "seed": 4, "sharpness": 0.25, "grain": 0.125}
    command = ["decompress", str(stream), str(out), *model]
    options = [f"--{name}={value}" for name, value in given.items()]
    assert main([*command, *options, "--allow-truncated"]) == 0
    assert spy.options == {**given, "allow_truncated": True}


@pytest.mark.parametrize("command", ["compress", "decompress", "truncate"])
def test_where_and_how_the_networks_run(
    command: str, picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = picture.with_suffix(".pcv2")
    model = ["--model", str(tiny_model)]
    assert main(["compress", str(picture), str(stream), *model]) == 0
    loaded: list[tuple[str, dict[str, Any]]] = []
    load = Codec.from_pretrained

    def spy(name: str, **options: Any) -> Codec:
        loaded.append((name, {k: v for k, v in options.items() if k != "captioner"}))
        return load(name)

    monkeypatch.setattr(Codec, "from_pretrained", spy)
    source = picture if command == "compress" else stream
    target = picture.with_name("out.png" if command == "decompress" else "out.pcv2")
    more = {"truncate": ["--steps=1"], "decompress": ["--steps=1"]}.get(command, [])
    options = ["--device=cpu:0", "--dtype=bfloat16", "--offload"]
    assert main([command, str(source), str(target), *model, *options, *more]) == 0
    how = {"device": "cpu:0", "dtype": "bfloat16", "offload": True}
    assert loaded == [(str(tiny_model), how)]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("spec", ["none", "auto", "auto:some/model", "automatic doors"])
def test_captions_and_whose_code_may_run(
    spec: str, trust: bool, picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, bool]] = []

    def make(spec: str, *, device: str, trust_remote_code: bool) -> Any:
        asked.append((spec, device, trust_remote_code))
        return captioner.GivenCaptioner("a made caption")

    monkeypatch.setattr(captioner, "make_captioner", make)
    stream = picture.with_suffix(".pcv2")
    command = ["compress", str(picture), str(stream), "--model", str(tiny_model)]
    command += [f"--caption={spec}", *(["--trust-remote-code"] if trust else [])]
    assert main(command) == 0
    text = Codec.from_pretrained(str(tiny_model))
    caption = text._read(text._parse(stream.read_bytes()))[0]
    if spec == "automatic doors":
        assert (asked, caption) == ([], spec)
    else:
        assert (asked, caption) == ([(spec, "cpu", trust)], "a made caption")


def test_an_interrupt_has_the_shells_exit_code(
    picture: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_check_paths", interrupt)
    assert main(["compress", str(picture), "x.pcv2", "--model", str(tiny_model)]) == 130
    assert capsys.readouterr().err == "percov2: interrupted\n"


def test_a_picture_is_restored_in_its_size(picture: Path, tiny_model: Path) -> None:
    stream, out = picture.with_suffix(".pcv2"), picture.with_name("out.png")
    model = ["--model", str(tiny_model)]
    assert main(["compress", str(picture), str(stream), *model]) == 0
    assert main(["decompress", str(stream), str(out), *model]) == 0
    with Image.open(out) as restored, Image.open(picture) as original:
        assert np.asarray(restored).shape == np.asarray(original).shape
