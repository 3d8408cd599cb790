"""``percov2 evaluate``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from percov2.evaluation.codecs import Candidate
    from percov2.evaluation.distributed import Processes
    from percov2.evaluation.protocols import Protocol

_SHOWN = ("bytes", "bpp", "psnr", "ms_ssim", "gradient_energy", "lpips_alex", "dists")
_EXIT_SOME_FAILED = 1
_DESCRIPTION = """Measure models and competitors on a data set, every picture through its real file.
Repeating the command resumes it; a command with other codecs and the same --output adds them.
docs/evaluation.md describes data sets, metrics and files."""


def add_evaluate(commands: Any) -> None:
    """Add the command to the parsers of `percov2`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="measure models and competitors", description=_DESCRIPTION
    )
    _add_data_options(parser)
    _add_codec_options(parser)
    _add_metric_options(parser)
    parser.add_argument("--no-report", action="store_true", help="no plots and no HTML page")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="folder of pictures; or kodak, coco30k, clic2020, div2k; or kodak=FOLDER",
    )
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="holds the data sets (default: PERCOV2_DATA)"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch a data set whose checksum is known"
    )
    parser.add_argument(
        "--crop",
        metavar="C",
        help="full, centre-512, crop-512 or squash-512 (default: the data set's, or full)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="JSON, picture's name to caption; stored in the streams",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to fill")


def _add_codec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        default=["tiny"],
        metavar="M",
        help="presets, model directories or hub ids (default: tiny)",
    )
    parser.add_argument(
        "--steps", type=_numbers(int), metavar="N,...", help="sampling steps (default: model's)"
    )
    parser.add_argument(
        "--guidance", type=_numbers(float), metavar="G,...", help="guidance (default: model's)"
    )
    parser.add_argument(
        "--competitors",
        type=_names,
        default=[],
        metavar="C,...",
        help="jpeg, jpeg2000, webp, avif, jxl, heic, all, or a model of CompressAI",
    )
    parser.add_argument(
        "--rates",
        type=_names,
        default=["same"],
        metavar="R,...",
        help="of the competitors: same bytes as each model, or a multiple, 2x (default: same)",
    )
    parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="NAME:ENC:DEC",
        help="an external codec, 'NAME:encoder {in} {out}:decoder {in} {out}'; repeatable",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the painting networks (default: float32)",
    )


def _add_metric_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics", type=_names, metavar="M,...", help="default: all but patch_fid_64"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="files of torch's hub for LPIPS, DISTS and FID (default: the hub's cache)",
    )
    parser.add_argument("--clip-model", metavar="M", help="directory or hub id, for clip_score")
    parser.add_argument("--segmentation-model", metavar="M", help="directory or hub id, for miou")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="the originals' features, made or reused (default: OUTPUT/reference)",
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(kind: type[int] | type[float]) -> Any:
    def numbers(text: str) -> list[int | float]:
        return [kind(part) for part in text.split(",")]

    numbers.__name__ = f"list of {kind.__name__}"  # argparse names it in its message
    return numbers


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: an option that cannot work.
    """
    from percov2.evaluation.distributed import processes

    _check(args)
    with processes() as peers:
        results = _evaluate(args, peers)
    if not peers.is_first:
        return 0
    print(json.dumps(results) if args.json else describe(results))
    if not args.no_report:
        from percov2.evaluation.report import write_report

        page = write_report(args.output)
        print(f"percov2: {page}", file=sys.stderr)
    failed = sum(len(codec["failures"]) for codec in results["codecs"])
    if failed:
        listed = args.output / "results.json"
        print(f"percov2: {failed} pictures failed, see failures in {listed}", file=sys.stderr)
    return _EXIT_SOME_FAILED if failed else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    from percov2.codec import check_sampling

    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: name a folder")
    if args.weights is not None and not args.weights.is_dir():
        raise ValueError(f"--weights {args.weights} is no folder: name one, or leave it out")
    for steps in args.steps or []:
        check_sampling(steps=steps)
    for guidance in args.guidance or []:
        check_sampling(guidance=guidance)


def _evaluate(args: argparse.Namespace, peers: Processes) -> dict[str, Any]:
    from percov2.evaluation.metrics import (
        CLIP_MODEL,
        DEFAULT_METRICS,
        SEGMENTATION_MODEL,
        MetricOptions,
        make_suite,
    )
    from percov2.evaluation.runner import Runner
    from percov2.evaluation.task import Task

    device = peers.device(args.device)
    protocol = _protocol(args, peers)
    candidates, absent_codecs = _candidates(args, device)
    options = MetricOptions(
        device=device,
        weights=args.weights,
        clip_model=args.clip_model or CLIP_MODEL,
        segmentation_model=args.segmentation_model or SEGMENTATION_MODEL,
    )
    suite = make_suite(
        args.metrics or DEFAULT_METRICS,
        options,
        captions=any(item.caption for item in protocol.items),
    )
    if peers.is_first:
        for name, reason in (absent_codecs | suite.absent).items():
            print(f"percov2: {name} is absent: {reason}", file=sys.stderr)
    task = Task(
        protocol=protocol,
        candidates=candidates,
        suite=suite,
        output=args.output,
        reference=args.reference or args.output / "reference",
        absent_codecs=absent_codecs,
        processes=peers,
        device=device,
    )
    return Runner(task).run()


def _protocol(args: argparse.Namespace, peers: Processes) -> Protocol:
    from percov2.evaluation.protocols import find_protocol, with_captions

    root = args.data_root or os.environ.get("PERCOV2_DATA") or None
    protocol = None
    # One fetches a data set that is not there; nodes that share its folder find it, then.
    for my_turn in (peers.is_first, peers.local_rank == 0, True):
        if my_turn and protocol is None:
            protocol = find_protocol(
                args.data,
                root=None if root is None else Path(root),
                crop=args.crop,
                limit=args.limit,
                download=args.download,
            )
        peers.wait()
    assert protocol is not None
    return protocol if args.captions is None else with_captions(protocol, args.captions)


def _candidates(args: argparse.Namespace, device: str) -> tuple[list[Candidate], dict[str, str]]:
    """Models first, whose bytes the competitors are to match; and what is absent, and why."""
    from percov2.codec import Codec
    from percov2.evaluation.codecs import PercoCandidate
    from percov2.evaluation.external import parse_external

    made: list[Candidate] = [parse_external(text) for text in args.codec]
    models = []
    for model in args.model:
        codec = Codec.from_pretrained(model, device=device, dtype=args.dtype)
        models += [
            PercoCandidate(
                codec, steps=steps, guidance=guidance, store_captions=args.captions is not None
            )
            for steps in args.steps or [None]
            for guidance in args.guidance or [None]
        ]
    competitors, absent = _competitors(args, [model.stream for model in models], device)
    made = [*models, *competitors, *made]
    slugs = [candidate.info.slug for candidate in made]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise ValueError(f"two codecs have the name {slug}: rename one")
    return made, absent


def _competitors(
    args: argparse.Namespace, anchors: list[str], device: str
) -> tuple[list[Candidate], dict[str, str]]:
    from percov2.evaluation.competitors import FORMATS, FormatCandidate, parse_rate
    from percov2.evaluation.weights import AbsentError
    from percov2.evaluation.zoo import ZOO, zoo_format

    for rate in args.rates:
        parse_rate(rate)
    wanted = [n for name in args.competitors for n in (FORMATS if name == "all" else [name])]
    made: list[Candidate] = []
    absent: dict[str, str] = {}
    for name in wanted:
        if name not in FORMATS and name not in ZOO:
            raise ValueError(f"competitor {name!r}: choose from {', '.join([*FORMATS, *ZOO])}, all")
        try:
            found = (
                FORMATS[name]()
                if name in FORMATS
                else zoo_format(name, weights=args.weights, device=device)
            )
        except AbsentError as error:
            absent[name] = str(error)
            continue
        made += [
            FormatCandidate(found, anchor=anchor, rate=rate, family=name)
            for anchor in dict.fromkeys(anchors)
            for rate in args.rates
        ]
    return made, absent


def describe(results: dict[str, Any]) -> str:
    """A table for people, and where the time went."""
    width = max(len(codec["label"]) for codec in results["codecs"])
    sets = list(dict.fromkeys(n for c in results["codecs"] for n in c["set_metrics"]))
    seen = {name for codec in results["codecs"] for name in codec["summary"]}
    columns = [name for name in _SHOWN if name in seen]
    lines = ["  ".join([" " * width, *(f"{name:>10.20}" for name in columns + sets)])]
    for codec in results["codecs"]:
        means = {name: part["mean"] for name, part in codec["summary"].items()}
        cells = [_cell({**means, **codec["set_metrics"]}.get(n), n) for n in columns + sets]
        mark = "  (smallest files, larger than asked for)" if codec["at_smallest"] else ""
        lines.append("  ".join([f"{codec['label']:<{width}}", *cells]) + mark)
    timing = results["timing"]
    if timing["overhead"] is not None:
        lines.append(
            f"{timing['seconds']:.1f} s for {timing['pictures']:.0f} pictures: codec calls "
            f"{timing['codec_seconds']:.1f} s, metrics' networks "
            f"{timing['network_metric_seconds']:.1f} s, the rest included "
            f"{timing['overhead']:.2f} times the codec calls without networks; distances of sets "
            f"{timing['set_metric_seconds']:.1f} s"
        )
    return "\n".join(lines)


def _cell(value: float | None, name: str) -> str:
    width = max(10, min(20, len(name)))
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.4g}"
