"""The command line: ``percov2 compress | decompress | info``.

Errors that a user can mend are one line on standard error and exit code 2; a folder in which
some files failed ends with exit code 1. Heavy imports happen when a command needs them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from percov2 import __version__
from percov2.bitstream import Stream
from percov2.files import atomic_path, list_images
from percov2.inspection import GENERATED_NOTE, info
from percov2.model_store import preset_names, resolve_stream_model

if TYPE_CHECKING:
    from percov2.codec import Codec

STREAM_SUFFIX = ".pcv2"
EXIT_SOME_FAILED = 1
EXIT_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"percov2: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="percov2: %(message)s", level=logging.WARNING)
    # A dependency of a dependency still uses torch.jit; a user of the codec cannot mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit.*")
    try:
        code: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"percov2: {_one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("percov2: interrupted", file=sys.stderr)
        return 130
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="percov2",
        description="Photographs in a few hundred bytes. " + GENERATED_NOTE,
    )
    parser.add_argument("--version", action="version", version=f"percov2 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands)
    _add_decompress(commands)
    _add_info(commands)
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
    parser.set_defaults(run=_compress)


def _add_decompress(commands: Any) -> None:
    parser = commands.add_parser("decompress", help=".pcv2 to PNG", description="Decompress.")
    parser.add_argument("input", type=Path, metavar="IN", help=".pcv2 file, or folder of them")
    parser.add_argument("output", type=Path, metavar="OUT", help=".png file, or folder")
    _add_model_options(parser, default=None)
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: model's)")
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="caption guidance, 1 is off (default: model's)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise (default: the file's)")
    parser.set_defaults(run=_decompress)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="what a .pcv2 file holds", description="Describe.")
    parser.add_argument("input", type=Path, metavar="IN", help=".pcv2 file")
    parser.add_argument("--model", metavar="M", help="the model that wrote it, if it is no preset")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_info)


def _compress(args: argparse.Namespace) -> int:
    caption, captioner = _caption_options(args)
    codec = _load(args.model, args, captioner=captioner)

    def one(source: Path, target: Path) -> dict[str, Any]:
        data = codec.compress(source, caption=caption, schedule_steps=args.schedule_steps)
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)
        return info(data, model=args.model)

    return _run(args, one, list_images, STREAM_SUFFIX)


def _caption_options(args: argparse.Namespace) -> tuple[str | None, Any]:
    """Text for every picture, or None and the captioner that writes it."""
    if args.caption == "none":
        return "", None
    if args.caption != "auto" and not args.caption.startswith("auto:"):
        return args.caption, None
    from percov2.analysis.captioner import make_captioner

    return None, make_captioner(args.caption, device=args.device)


def _decompress(args: argparse.Namespace) -> int:
    codecs: dict[str, Codec] = {}

    def one(source: Path, target: Path) -> dict[str, Any]:
        data = source.read_bytes()
        model = args.model or resolve_stream_model(Stream.from_bytes(data).model_id)
        if model not in codecs:
            codecs[model] = _load(model, args)
        image = codecs[model].decompress(
            data, steps=args.steps, guidance=args.guidance, seed=args.seed
        )
        description = info(data, model=model)
        _write_png(target, image, description)
        return description

    return _run(args, one, _list_streams, ".png")


def _write_png(target: Path, image: Any, description: dict[str, Any]) -> None:
    from percov2.images import write_png

    write_png(
        target,
        image,
        {
            "Software": f"percov2 {__version__}",
            "Comment": GENERATED_NOTE,
            "percov2:model": description["model"],
            "percov2:bytes": str(description["bytes"]["total"]),
            "percov2:bpp": f"{description['bpp']:.6f}",
            **({"Description": description["caption"]} if description["caption"] else {}),
        },
    )


def _info(args: argparse.Namespace) -> int:
    description = info(args.input.read_bytes(), model=args.model)
    print(json.dumps(description) if args.json else _describe(description))
    return 0


def _load(model: str, args: argparse.Namespace, *, captioner: Any = None) -> Codec:
    import diffusers
    import transformers

    from percov2.codec import Codec

    # Their bars count the files of each component, which tells a user of the codec nothing.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return Codec.from_pretrained(
        model, device=args.device, dtype=args.dtype, offload=args.offload, captioner=captioner
    )


def _list_streams(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob(f"*{STREAM_SUFFIX}") if not p.name.startswith("."))


def _run(
    args: argparse.Namespace,
    one: Callable[[Path, Path], dict[str, Any]],
    listing: Callable[[Path], list[Path]],
    suffix: str,
) -> int:
    """Apply a command to a file, or to every file of a folder."""
    if not args.input.is_dir():
        if args.output.suffix.lower() != suffix:
            raise ValueError(f"output {args.output} must end in {suffix}, or IN be a folder")
        if not args.output.parent.is_dir():
            raise ValueError(f"folder {args.output.parent} does not exist: make it first")
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

    if not sources:
        raise ValueError(f"folder {args.input} holds no file that this command reads")
    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    written: dict[Path, Path] = {}
    for source in tqdm(sources, unit="image", disable=None):
        target = args.output / source.relative_to(args.input).with_suffix(suffix)
        try:
            if target in written:
                raise ValueError(f"{written[target]} has taken the output {target}: rename one")
            target.parent.mkdir(parents=True, exist_ok=True)
            result = one(source, target)
        except (ValueError, OSError) as error:
            failures.append({"input": str(source), "error": _one_line(error)})
            continue
        written[target] = source
        results.append({"input": str(source), "output": str(target), **result})
    if args.json:
        print(json.dumps({"files": results, "failures": failures}))
    else:
        for result in results:
            print(f"{result['output']}: {_describe(result)}")
    for failure in failures:
        print(f"percov2: {failure['input']}: {failure['error']}", file=sys.stderr)
    if failures:
        print(f"percov2: {len(failures)} of {len(sources)} files failed", file=sys.stderr)
    return EXIT_SOME_FAILED if failures else 0


def _describe(description: dict[str, Any]) -> str:
    """One line for people."""
    sizes = description["bytes"]
    total = description["steps_total"]
    caption = f", caption {description['caption']!r}" if description["caption"] else ""
    return (
        f"{description['width']}x{description['height']}, model {description['model']}, "
        f"{sizes['total']} bytes (header {sizes['header']}, caption {sizes['caption']}, "
        f"tokens {sizes['tokens']}), {description['bpp']:.4f} bpp, "
        f"{description['steps_sent']} of {'?' if total is None else total} groups{caption}"
    )
