"""Codecs that are programs: two commands, one for each way."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from percov2.evaluation.codecs import Candidate, CodecInfo, Encoded, make_slug

_PLACES = ("{in}", "{out}")


def parse_external(text: str) -> ExternalCandidate:
    """``name:encoder {in} {out}:decoder {in} {out}`` to a codec.

    Raises:
        ValueError: another form.
    """
    name, _, commands = text.partition(":")
    splits = []
    for place, letter in enumerate(commands):
        encoder, decoder = commands[:place], commands[place + 1 :]
        if letter == ":" and _is_command(encoder) and _is_command(decoder):
            splits.append((encoder, decoder))
    if not name or len(splits) != 1:
        raise ValueError(
            f"--codec {text!r}: say 'NAME:ENCODER {{in}} {{out}}:DECODER {{in}} {{out}}', each "
            "of {in} and {out} once in a command and one colon between the commands"
        )
    return ExternalCandidate(name, *splits[0])


def _is_command(text: str) -> bool:
    """Whether both places occur once, and every quotation ends."""
    try:
        shlex.split(text)
    except ValueError:
        return False
    return all(text.count(place) == 1 for place in _PLACES)


class ExternalCandidate(Candidate):
    """A codec that is a pair of programs. The encoder reads PNG, the decoder writes PNG.

    The time is that of the whole program, with its start and its loading of weights.

    Args:
        name: of the codec.
        encoder: command line with ``{in}`` and ``{out}``; no shell interprets it.
        decoder: likewise.
    """

    def __init__(self, name: str, encoder: str, decoder: str) -> None:
        self._encoder, self._decoder = shlex.split(encoder), shlex.split(decoder)
        self.info = CodecInfo(
            codec=name,
            family="external",
            setting={"encoder": encoder.strip(), "decoder": decoder.strip()},
            label=name,
            slug=make_slug("external", name),
            suffix=".bin",
            identity=f"{encoder}:{decoder}",
        )
        self.stream = self.info.slug

    def encode(self, image: Image.Image, caption: str, target: int | None) -> Encoded:
        """See `Candidate`."""
        with tempfile.TemporaryDirectory() as folder:
            source, file = Path(folder, "original.png"), Path(folder, "stream.bin")
            image.save(source, compress_level=1)
            _run(self._encoder, source, file)
            return Encoded(data=file.read_bytes())

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """See `Candidate`."""
        with tempfile.TemporaryDirectory() as folder:
            file, target = Path(folder, "stream.bin"), Path(folder, "restored.png")
            file.write_bytes(data)
            _run(self._decoder, file, target)
            with Image.open(target) as image:
                return image.convert("RGB")


def _run(command: list[str], source: Path, target: Path) -> None:
    filled = [part.replace("{in}", str(source)).replace("{out}", str(target)) for part in command]
    done = subprocess.run(
        filled,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise RuntimeError(f"{filled[0]} ended with exit code {done.returncode}: {said}")
