from __future__ import annotations

import sys
from pathlib import Path

import pytest

from percov2.evaluation.external import parse_external
from tests.evaluation.pictures import make_picture

PROGRAM = """
import io, sys
from PIL import Image
way, source, target = sys.argv[1:]
if way == "encode":
    Image.open(source).save(target, "WEBP", lossless=True)
else:
    Image.open(source).save(target, "PNG")
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A codec that is a program."""
    path = tmp_path / "my codec.py"
    path.write_text(PROGRAM)
    return f"{sys.executable} '{path}'"


def test_programs_make_a_codec(program: str) -> None:
    codec = parse_external(f"My:{program} encode {{in}} {{out}}:{program} decode {{in}} {{out}}")
    image = make_picture(0)
    encoded = codec.encode(image, "", None)
    assert encoded.data[8:12] == b"WEBP"
    assert codec.decode(encoded.data, image.size).tobytes() == image.tobytes()
    assert (codec.info.codec, codec.info.slug) == ("My", "external-my")
    assert codec.rate is None


def test_colons_in_commands() -> None:
    codec = parse_external("a:enc --rate 1:2 {in} {out}:dec {out} {in} c:d")
    assert codec.info.setting == {
        "encoder": "enc --rate 1:2 {in} {out}",
        "decoder": "dec {out} {in} c:d",
    }


def test_colons_in_quotes() -> None:
    codec = parse_external("a:enc 'x:y' {in} {out}:dec 'x:y' {in} {out}")
    assert codec.info.setting["encoder"] == "enc 'x:y' {in} {out}"


@pytest.mark.parametrize(
    "text",
    ["a", "a:enc {in} {out}", "a:enc {in}:dec {in} {out}", ":e {in} {out}:d {in} {out}"],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"say 'NAME:ENCODER \{in\} \{out\}:DECODER"):
        parse_external(text)


def test_failure_of_a_program_is_told(program: str) -> None:
    codec = parse_external(f"My:{program} encode {{in}} {{out}}:{program} decode {{in}} {{out}}")
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: .*cannot identify image"):
        codec.decode(b"no picture", (1, 1))
    silent = parse_external("x:true {in} {out}:true {in} {out}")
    with pytest.raises(RuntimeError, match="true ended with exit code 0: no word"):
        silent.encode(make_picture(0), "", None)
