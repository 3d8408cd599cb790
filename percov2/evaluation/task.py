"""What a run is to do, and what run.json says that it did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from percov2.evaluation.codecs import Candidate
from percov2.evaluation.distributed import Processes
from percov2.evaluation.metrics import Suite
from percov2.evaluation.protocols import Protocol
from percov2.evaluation.results import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be done.

    Attributes:
        protocol: the pictures.
        candidates: the codecs; those whose rate is matched to a stream stand behind its codec.
        suite: the metrics.
        output: folder of the run.
        reference: folder with the originals' features, which runs may share.
        absent_codecs: why a codec that was asked for is not there, by name.
        processes: this process among its peers.
        device: of pictures and networks.
    """

    protocol: Protocol
    candidates: Sequence[Candidate]
    suite: Suite
    output: Path
    reference: Path
    absent_codecs: dict[str, str]
    processes: Processes
    device: str


def merge_description(task: Task) -> dict[str, Any]:
    """Describe the run in run.json, with what earlier commands have put there.

    Raises:
        ValueError: a setting differs from theirs.
    """
    path, reference = task.output / "run.json", task.reference / "reference.json"
    protocol = {"name": task.protocol.name, "crop": task.protocol.crop}
    fixed = {"protocol": protocol, "metrics": task.suite.identities()}
    codecs = {
        candidate.info.slug: {
            **{key: value for key, value in asdict(candidate.info).items() if key != "suffix"},
            "identity": f"{candidate.info.identity}, captions of {task.protocol.captions}",
        }
        for candidate in task.candidates
    }
    extractors = {name: fixed["metrics"][name] for name in task.suite.extractors}
    described = _agree(path, {**fixed, "codecs": codecs}, "--output")
    shared = _agree(reference, {"protocol": protocol, "metrics": extractors}, "--reference")
    task.processes.wait()  # all have read before the first writes
    if task.processes.is_first:
        for target, content in ((path, described), (reference, shared)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, content)
    task.processes.wait()
    return described


def _agree(path: Path, wanted: dict[str, Any], option: str) -> dict[str, Any]:
    """What a file says and what is wanted, joined."""
    if not path.is_file():
        return wanted
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        joined = {}
        for part, content in wanted.items():
            for key, value in content.items():
                if found[part].get(key, value) != value:
                    raise ValueError(
                        f"{path} says {part} {key} {found[part][key]!r}, now it is {value!r}: "
                        f"choose another {option}"
                    )
            joined[part] = found[part] | content
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not of percov2 evaluate: choose another {option}") from error
    return joined
