"""Several processes: nothing hangs, and what is logged is what one process logs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed, multiprocessing

from percov2.training.callbacks.stream_faults import _sum_over_processes
from tests.training.callbacks.watched_runs import Events
from tests.training.tiny_runs import TinyRun

pytestmark = pytest.mark.slow

WATCHERS = {
    "RateDistortionSamples": {"images": 1, "scatter_images": 2, "steps": [1, 2]},
    "TokenRate": {"images": 2},
    "CodebookUsage": {},
    "GradientNorms": {"every_n_steps": 1},
    "Throughput": {"every_n_steps": 1},
}


SIZE = 64
"""Side of the pictures of `tests.training.tiny_runs`, in pixels."""
A_BYTE = {
    "samples/bytes": 1.0,
    "samples/bpp": 8 / SIZE**2,
    "rate/token_bytes": 1.0,
    "rate/bits_per_token/stream": 8 / (SIZE // 16) ** 2,
}
"""What is measured from written files, and a byte of it: gradients that are summed in another order
differ in the last bits, weights near a half then round to other integers, and where a stream just
fills a byte one more follows. `rate/bits_per_token/ideal` has no such steps."""

CHOOSING = ("--model.init_args.train_tokenizer=false", "--model.init_args.rate_weight=0.05")
"""Of a stage 2 whose tokens the frozen masked transformer has a say in."""


def watched_run(
    folder: Path,
    *,
    model: Path,
    processes: int,
    overlay: str | None,
    options: tuple[str, ...] = (),
) -> Events:
    """Four steps and two validations of a stage 2 whose tokenizer is trained too."""
    config = folder.parent / f"{folder.name}-watch.yaml"
    callbacks = [
        {"class_path": f"percov2.training.callbacks.{name}", "init_args": options}
        for name, options in WATCHERS.items()
    ]
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "csv", "version": 0},
    }
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks, "logger": logger}}))
    TinyRun.train(
        folder,
        model=model,
        steps=4,
        processes=processes,
        overlay=overlay,
        options=[f"--config={config}", *options],
    )
    return Events.read(folder / "csv" / "version_0")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Events:
    folder = tmp_path_factory.mktemp("one") / "run"
    return watched_run(folder, model=tiny_model, processes=1, overlay=None)


@pytest.mark.parametrize("overlay", ["ddp.yaml", "zero2.yaml", "zero3.yaml"])
def test_two_processes_log_what_one_logs(
    overlay: str, one: Events, tiny_model: Path, tmp_path: Path
) -> None:
    if overlay != "ddp.yaml" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    two = watched_run(tmp_path / "run", model=tiny_model, processes=2, overlay=overlay)
    assert two.tags("images") == one.tags("images") != set()
    same = {tag for tag in one.tags("scalars") if not tag.startswith(("throughput/", "lr"))}
    assert {"gradient_norm/total", "samples/bytes", "codebook/dead"} <= same
    for tag in same:
        assert two.steps(tag) == one.steps(tag), tag
        if tag.startswith(("gradient_norm/", "rate/", "samples/", "codebook/")):
            expected = pytest.approx(one.values(tag), rel=2e-3, abs=A_BYTE.get(tag))
            assert two.values(tag) == expected, tag
    uses, of_one = (
        events.accumulator.Histograms("codebook/uses_per_code")[-1].histogram_value
        for events in (two, one)
    )
    # Both processes validate on the same pictures here.
    assert uses.sum == 2 * of_one.sum
    assert all(speed > 0 for speed in two.values("throughput/images_per_s"))


def test_tokens_are_chosen_alike_by_sharded_weights(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    one, two = (
        watched_run(
            tmp_path / str(processes),
            model=tiny_model,
            processes=processes,
            overlay=overlay,
            options=CHOOSING,
        )
        for processes, overlay in ((1, None), (2, "zero3.yaml"))
    )
    for tag in ("val/flow", "rate/token_bytes", "codebook/dead", "samples/bytes"):
        assert two.values(tag) == pytest.approx(one.values(tag), rel=2e-3), tag


def _count(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    met = [{"corrupt_image": 2, "missing_caption": 1}, {"corrupt_image": 3}][rank]
    total = _sum_over_processes(met)
    torch.save(dict(total), f"{folder}/total{rank}.pt")
    distributed.destroy_process_group()


def test_faults_of_all_processes_are_added(tmp_path: Path) -> None:
    multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _count, args=(str(tmp_path),), nprocs=2, start_method="spawn"
    )
    for rank in range(2):
        total = torch.load(tmp_path / f"total{rank}.pt")
        assert total == {"corrupt_image": 5, "missing_caption": 1}
