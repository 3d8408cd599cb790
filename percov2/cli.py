"""The command line: ``percov2 compress | decompress | truncate | info | evaluate | doctor``.

Errors that a user can mend are one line on standard error and exit code 2; a folder in which
some files failed ends with exit code 1. Heavy imports happen when a command needs them.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from percov2 import __version__
from percov2.bitstream import Stream, is_intact, read_stream
from percov2.evaluation.command import add_evaluate
from percov2.files import IMAGE_SUFFIXES, atomic_path, list_files, list_images
from percov2.inspection import GENERATED_NOTE, describe, info, png_metadata
from percov2.messages import one_line, printable
from percov2.model_store import preset_names, resolve_stream_model

if TYPE_CHECKING:
    from percov2.codec import Codec

STREAM_SUFFIX = ".pcv2"
EXIT_SOME_FAILED = 1
EXIT_USER_ERROR = 2

# ValueError and OSError are what our code raises and lets through; the others come from torch
# (a device out of memory, an operation it lacks) and from models that need a missing package.
_REPORTED = (ValueError, OSError, MemoryError, RuntimeError, ImportError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"percov2: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="percov2: %(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A caption or a file's name that the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Pillow warns of pictures over its own limit, which `read_image` refuses in a line of its own.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # A dependency of a dependency still uses torch.jit; a user of the codec cannot mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit.*")
    try:
        code: int = args.run(args)
    except _REPORTED as error:
        print(f"percov2: {printable(one_line(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("percov2: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="percov2",
        description="Photographs in a few hundred bytes. " + GENERATED_NOTE,
    )
    parser.add_argument("--version", action="version", version=f"percov2 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands)
    _add_decompress(commands)
    _add_truncate(commands)
    _add_info(commands)
    _add_doctor(commands)
    add_evaluate(commands)
    return parser


def _add_model_options(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    presets = ", ".join(preset_names())
    parser.add_argument(
        "--model",
        default=default,
        metavar="M",
        help=f"preset ({presets}), model directory or hub id "
        + (f"(default: {default})" if default else "(default: the preset that wrote the file)"),
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the painting networks (default: float32)",
    )
    parser.add_argument(
        "--offload", action="store_true", help="keep unused networks off the device"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser("compress", help="photograph to .pcv2", description="Compress.")
    parser.add_argument("input", type=Path, metavar="IN", help="picture, or folder of pictures")
    parser.add_argument("output", type=Path, metavar="OUT", help=".pcv2 file, or folder")
    _add_model_options(parser, default="tiny")
    parser.add_argument(
        "--caption",
        default="none",
        metavar="TEXT|auto|none",
        help="text to store; auto, or auto:MODEL, asks an image-to-text model (default: none)",
    )
    parser.add_argument(
        "--schedule-steps",
        type=int,
        metavar="K",
        help="send the first K token groups only; the decoder invents the rest",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="the file's largest size: leaves out the caption, chooses cheaper tokens, then "
        "leaves out groups, until it fits; as few groups as possible",
    )
    parser.add_argument(
        "--rate-weight",
        type=float,
        metavar="W",
        help="how much similarity a bit is worth in the choice of a token; 0 ignores bits; with "
        "--max-bytes the first one tried (default: the model's)",
    )
    parser.add_argument(
        "--color-weight",
        type=float,
        metavar="W",
        help="how much similarity an error of the decoded colour is worth in that choice; 0 "
        "ignores it (default: the model's)",
    )
    parser.add_argument(
        "--latent-weight",
        type=float,
        metavar="W",
        help="how much similarity an error of the decoded latents is worth in that choice; 0 "
        "spares the search for tokens that decode well (default: the model's)",
    )
    parser.add_argument(
        "--entropy",
        choices=("model", "uniform"),
        default="model",
        help="uniform: code the tokens without the masked model, decodable with the codebook alone",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let a captioner of the hub run its own code (Molmo needs it)",
    )
    parser.set_defaults(run=_compress)


def _add_decompress(commands: Any) -> None:
    parser = commands.add_parser("decompress", help=".pcv2 to PNG", description="Decompress.")
    parser.add_argument("input", type=Path, metavar="IN", help=".pcv2 file, or folder of them")
    parser.add_argument("output", type=Path, metavar="OUT", help=".png file, or folder")
    _add_model_options(parser, default=None)
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: model's)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="caption guidance, 1 is off, 0 ignores the caption (default: model's)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise (default: the file's)")
    parser.add_argument(
        "--sharpness",
        type=float,
        metavar="A",
        help="local contrast added to the picture, 0 adds none (default: model's)",
    )
    parser.add_argument(
        "--grain",
        type=float,
        metavar="A",
        help="noise added at last, as a share of local contrast, 0 adds none (default: model's)",
    )
    parser.add_argument(
        "--allow-truncated",
        action="store_true",
        help="decode what is left of a cut stream, unverified; the rest is invented",
    )
    parser.set_defaults(run=_decompress)


def _add_truncate(commands: Any) -> None:
    parser = commands.add_parser(
        "truncate", help="keep the first token groups of a .pcv2", description="Truncate."
    )
    parser.add_argument("input", type=Path, metavar="IN", help=".pcv2 file, or folder of them")
    parser.add_argument("output", type=Path, metavar="OUT", help=".pcv2 file, or folder")
    parser.add_argument(
        "--steps", type=int, metavar="K", required=True, help="token groups to keep"
    )
    _add_model_options(parser, default=None)
    parser.set_defaults(run=_truncate)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check that this machine decodes exactly",
        description="Compute known probabilities and compare them bit by bit.",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)"
    )
    parser.set_defaults(run=_doctor)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what a .pcv2 file holds", description="Describe.")
    parser.add_argument("input", type=Path, metavar="IN", help=".pcv2 file")
    parser.add_argument("--model", metavar="M", help="the model that wrote it, if it is no preset")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_info)


def _compress(args: argparse.Namespace) -> int:
    from percov2.codec import Codec

    _check_paths(args, STREAM_SUFFIX)
    _quieten_libraries()
    codec = Codec.from_pretrained(args.model, **_load_options(args), captioner=_captioner(args))

    def one(source: Path, target: Path) -> dict[str, Any]:
        data = codec.compress(
            source,
            schedule_steps=args.schedule_steps,
            max_bytes=args.max_bytes,
            rate_weight=args.rate_weight,
            color_weight=args.color_weight,
            latent_weight=args.latent_weight,
            uniform=args.entropy == "uniform",
        )
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)
        return describe(data, codec.summary)

    code = _run(args, one, list_images, STREAM_SUFFIX)
    if args.input.is_dir():
        _tell_left_alone(args.input)
    return code


def _tell_left_alone(folder: Path) -> None:
    """Say which files of a folder were not taken for pictures: some may be, HEIC for instance."""
    taken = IMAGE_SUFFIXES | {STREAM_SUFFIX}
    found = [path.suffix.lower() for path in list_files(folder, None)]
    others = Counter(suffix for suffix in found if suffix not in taken)
    if others:
        kinds = ", ".join(
            f"{count} {kind or 'no suffix'}" for kind, count in sorted(others.items())
        )
        print(
            f"percov2: left alone, no pictures by their names: {printable(kinds)}", file=sys.stderr
        )


def _captioner(args: argparse.Namespace) -> Any:
    from percov2.analysis.captioner import GivenCaptioner, make_captioner

    if args.caption in ("none", "auto") or args.caption.startswith("auto:"):
        return make_captioner(
            args.caption, device=args.device, trust_remote_code=args.trust_remote_code
        )
    return GivenCaptioner(args.caption)


def _decompress(args: argparse.Namespace) -> int:
    from percov2.codec import check_sampling
    from percov2.images import write_png

    _check_paths(args, ".png")
    names = ("steps", "guidance", "seed", "sharpness", "grain")
    sampling = {name: getattr(args, name) for name in names}
    check_sampling(**sampling)
    _quieten_libraries()
    codec_of = _codec_loader(args)

    def one(source: Path, target: Path) -> dict[str, Any]:
        data = read_stream(source)
        codec = codec_of(data)
        image = codec.decompress(data, **sampling, allow_truncated=args.allow_truncated)
        verified = is_intact(data)
        description = {
            **describe(data, codec.summary, verify=verified),
            "verified": verified,
            "steps_whole": codec.steps_whole(data),
        }
        metadata = {"Software": f"percov2 {__version__}", **png_metadata(description)}
        write_png(target, image, metadata)
        return description

    return _run(args, one, _list_streams, ".png")


def _truncate(args: argparse.Namespace) -> int:
    _check_paths(args, STREAM_SUFFIX)
    _quieten_libraries()
    codec_of = _codec_loader(args)

    def one(source: Path, target: Path) -> dict[str, Any]:
        data = read_stream(source)
        codec = codec_of(data)
        shorter = codec.truncate(data, schedule_steps=args.steps)
        with atomic_path(target) as temporary:
            temporary.write_bytes(shorter)
        return describe(shorter, codec.summary)

    return _run(args, one, _list_streams, STREAM_SUFFIX)


def _doctor(args: argparse.Namespace) -> int:
    from percov2.entropy.self_test import run

    print(run(args.device))
    return 0


def _codec_loader(args: argparse.Namespace) -> Callable[[bytes], Codec]:
    """Which codec reads a stream: the one named, or the preset that wrote it."""
    from percov2.codec import Codec

    codecs: dict[str, Codec] = {}

    def load(model: str) -> Codec:
        if model not in codecs:
            codecs[model] = Codec.from_pretrained(model, **_load_options(args))
        return codecs[model]

    if args.model is not None:
        load(args.model)

    def codec_of(data: bytes) -> Codec:
        # A damaged id would send the user after another model.
        verify = not getattr(args, "allow_truncated", False)
        model_id = Stream.from_bytes(data, verify=verify).model_id
        return load(args.model or resolve_stream_model(model_id))

    return codec_of


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "dtype": args.dtype, "offload": args.offload}


def _quieten_libraries() -> None:
    """Their bars count the files of each component, which tells a user of the codec nothing."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _check_paths(args: argparse.Namespace, suffix: str) -> None:
    """Refuse paths that cannot work before any model is loaded."""
    if args.input.is_dir():
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(
                f"IN {args.input} is a folder, OUT {args.output} is a file: name a folder"
            )
        if args.output.resolve() == args.input.resolve():
            raise ValueError(f"IN and OUT are the same folder {args.input}: name another for OUT")
        return
    if not args.input.exists():
        raise ValueError(f"{args.input} does not exist: check its name")
    if args.output.is_dir():
        raise ValueError(f"OUT {args.output} is a folder, IN is a file: name a {suffix} file")
    if args.output.suffix.lower() != suffix:
        raise ValueError(f"output {args.output} must end in {suffix}, or IN be a folder")
    if not args.output.parent.is_dir():
        raise ValueError(f"folder {args.output.parent} does not exist: make it first")


def _info(args: argparse.Namespace) -> int:
    description = info(read_stream(args.input), model=args.model)
    print(
        json.dumps(description) if args.json else f"{_describe(description)}\n{description['note']}"
    )
    return 0


def _list_streams(folder: Path) -> list[Path]:
    return list_files(folder, frozenset((STREAM_SUFFIX,)))


def _run(
    args: argparse.Namespace,
    one: Callable[[Path, Path], dict[str, Any]],
    listing: Callable[[Path], list[Path]],
    suffix: str,
) -> int:
    """Apply a command to a file, or to every file of a folder."""
    if not args.input.is_dir():
        result = one(args.input, args.output)
        print(json.dumps(result) if args.json else f"{args.output}: {_describe(result)}")
        return 0
    return _run_folder(args, one, listing(args.input), suffix)


def _run_folder(
    args: argparse.Namespace,
    one: Callable[[Path, Path], dict[str, Any]],
    sources: list[Path],
    suffix: str,
) -> int:
    """Each file by itself; failures are listed at the end and change the exit code."""
    from tqdm import tqdm

    if args.output.resolve().is_relative_to(args.input.resolve()):
        # What an earlier run has written is none of its input.
        own = args.output.resolve()
        sources = [source for source in sources if not source.resolve().is_relative_to(own)]
    if not sources:
        raise ValueError(f"folder {args.input} holds no file that this command reads")
    inputs = {_identity(source) for source in sources}
    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    written: dict[tuple[int, int] | None, Path] = {}
    for source in tqdm(sources, unit="image", disable=None):
        target = args.output / source.relative_to(args.input).with_suffix(suffix)
        try:
            if not source.is_file():
                raise ValueError(f"{source}: is no regular file")
            if target.exists() and _identity(target) in inputs:
                raise ValueError(f"the output {target} is one of the inputs: name another OUT")
            earlier = written.get(_identity(target))
            if earlier is not None:
                raise ValueError(f"{earlier} has taken the output {target}: rename one")
            target.parent.mkdir(parents=True, exist_ok=True)
            result = one(source, target)
        except _REPORTED as error:
            failures.append({"input": str(source), "error": one_line(error)})
            continue
        written[_identity(target)] = source
        results.append({"input": str(source), "output": str(target), **result})
    if args.json:
        print(json.dumps({"files": results, "failures": failures}))
    else:
        for result in results:
            print(f"{printable(result['output'])}: {_describe(result)}")
    for failure in failures:
        # Most errors begin with the file's name.
        name = printable(" ".join(failure["input"].split()))
        reason = printable(failure["error"])
        shown = reason if reason.startswith(name) else f"{name}: {reason}"
        print(f"percov2: {shown}", file=sys.stderr)
    if failures:
        print(f"percov2: {len(failures)} of {len(sources)} files failed", file=sys.stderr)
    return EXIT_SOME_FAILED if failures else 0


def _identity(path: Path) -> tuple[int, int] | None:
    """The file behind a path, if any: some file systems do not tell a.pcv2 from A.pcv2."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _describe(description: dict[str, Any]) -> str:
    """One line for people."""
    sizes = description["bytes"]
    total = description["steps_total"]
    whole = ""
    if not description.get("verified", True):
        whole = f" ({description['steps_whole']} of them could be read, unverified)"
    caption = f", caption {description['caption']!r}" if description["caption"] else ""
    return (
        f"{description['width']}x{description['height']}, model {description['model']}, "
        f"{sizes['total']} bytes (header {sizes['header']}, caption {sizes['caption']}, "
        f"tokens {sizes['tokens']}), {description['bpp']:.4f} bpp, "
        f"{description['steps_sent']} of {'?' if total is None else total} groups{whole}{caption}"
    )
