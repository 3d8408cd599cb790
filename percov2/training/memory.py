"""Memory of stage 2 per GPU: ``python -m percov2.training.memory --config configs/stage2.yaml``.

Weights, gradients and optimiser are counted on the real architecture, built on the meta device;
activations are measured there, by a training step without values (`live_memory`). A GPU is not
needed, nor access to the weights. All figures are computed; they do not contain CUDA's context,
kernels' workspaces and fragmentation (`HEADROOM`).

What a GPU holds, in bytes per value, for N processes:

=================  ===========  ===========  ===========  ===========
                   ddp          zero2        zero3        +offload
=================  ===========  ===========  ===========  ===========
weight             4            4            4 / N        stage's (3: 0)
frozen CLIP, T5    2            2            2 / N        stage's (3: 0)
gradient           4            4 / N        4 / N        0
master weight      (the same)   4 / N        4 / N        0
AdamW's moments    8 (8 bit 2)  8 / N        8 / N        0
WeightEMA          4            4 / N        4 / N        0
=================  ===========  ===========  ===========  ===========

With offload the rest lies in the main memory. `bf16-mixed` is autocast over float32 weights, under
ZeRO too (`percov2.training.strategy.ZeroStrategy`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from percov2.training.memory_setup import Sizes, StageSetup, measure_sizes, read_setup

GIB = 2**30
CARDS = (24, 40, 80)
"""Memory of common cards in GiB."""
HEADROOM = 0.9
"""Share of a card that the computed total may take: CUDA's context, workspaces, fragmentation."""

_BUCKET = 200_000_000
"""Values of a bucket of gradients, Lightning's ``reduce_bucket_size``."""
MAX_LIVE = 200_000_000
"""Most gathered values that ZeRO-3 keeps: ``stage3_max_live_parameters`` in configs/strategy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How the state is divided.

    Attributes:
        name: as printed.
        stage: of ZeRO; 0 is DDP.
        offload_optimizer: gradients, masters, moments and averages lie in the main memory.
        offload_parameters: weights too, where the stage divides them.
    """

    name: str
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False


STRATEGIES = (
    Strategy(name="ddp", stage=0),
    Strategy(name="zero2", stage=2),
    Strategy(name="zero3", stage=3),
    Strategy(name="zero2+offload", stage=2, offload_optimizer=True),
    Strategy(name="zero3+offload", stage=3, offload_optimizer=True, offload_parameters=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Bytes on one GPU, and what its process has in the main memory.

    Attributes:
        strategy: name.
        gpus: N, in nodes of at most eight.
        parameters: weights, frozen ones and tables too.
        gradients: of trained weights.
        optimizer: moments, and under ZeRO the master weights.
        average: of `WeightEMA`.
        buffers: ZeRO's buckets and gathered layers, at most.
        activations: peak of a step.
        step: what the optimiser's step takes for itself, when no activation lives.
        host: main memory per process.
        deepspeed_gpu: DeepSpeed's own estimate for the transformer's state, None for DDP.
        deepspeed_host: the same for the main memory per process.
    """

    strategy: str
    gpus: int
    parameters: int
    gradients: int
    optimizer: int
    average: int
    buffers: int
    activations: int
    step: int
    host: int
    deepspeed_gpu: int | None
    deepspeed_host: int | None

    @property
    def total(self) -> int:
        """Peak on the GPU."""
        held = self.parameters + self.gradients + self.optimizer + self.average + self.buffers
        return held + max(self.activations, self.step)

    @property
    def card(self) -> int | None:
        """Smallest of `CARDS` that it fits, with headroom; None if it fits none."""
        return next((card for card in CARDS if self.total <= HEADROOM * card * GIB), None)


def make_row(setup: StageSetup, sizes: Sizes, strategy: Strategy, gpus: int) -> Row:
    """Add up one strategy on N GPUs."""
    n = gpus if strategy.stage else 1
    n_weights = gpus if strategy.stage == 3 else 1
    trained, state = sizes.trained, setup.state_bytes
    gradients, masters, average = 4 * trained // n, 4 * trained // n, 4 * trained // n
    optimizer = state * trained // n + (masters if strategy.stage else 0)
    average = average if setup.average else 0
    weights = sizes.weight_bytes // n_weights
    host = 0
    if strategy.offload_optimizer:
        host += gradients + optimizer + average
        gradients = optimizer = average = 0
    if strategy.offload_parameters:
        host += weights
        weights = 0
    # Torch's AdamW of many tensors at once keeps a root of the second moment for all of them, and
    # ZeRO flattens its gradients first; offloaded, both happen in the main memory.
    needs_copy = strategy.stage > 0 or setup.optimizer == "adamw"
    step = 4 * trained // n if needs_copy and not strategy.offload_optimizer else 0
    theirs = deepspeed_estimate(sizes, strategy, gpus)
    return Row(
        strategy=strategy.name,
        gpus=gpus,
        parameters=weights + sizes.table_bytes,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        buffers=_buffers(sizes, strategy),
        activations=sizes.activations,
        step=step,
        host=host,
        deepspeed_gpu=theirs[0] if theirs else None,
        deepspeed_host=theirs[1] if theirs else None,
    )


def _buffers(sizes: Sizes, strategy: Strategy) -> int:
    if strategy.stage == 0:
        return 0  # with gradient_as_bucket_view the buckets are the gradients
    if strategy.stage == 2:
        # Two buckets, one filled while the other travels, for every dtype that is sent.
        return 2 * 4 * _BUCKET * len(sizes.sent_bytes)
    gathered = 4 * min(sizes.trained + sizes.frozen, MAX_LIVE)
    return gathered + sum(_BUCKET * size for size in sizes.sent_bytes)


def deepspeed_estimate(sizes: Sizes, strategy: Strategy, gpus: int) -> tuple[int, int] | None:
    """DeepSpeed's own figures for the transformer: bytes per GPU and, per process, on the host.

    They know no frozen parts, no averages and no activations, and take bfloat16 weights and
    gradients for granted; None for DDP and where DeepSpeed is not installed.
    """
    if strategy.stage == 0 or find_spec("deepspeed") is None:
        return None
    local = min(gpus, 8)
    cluster = {"num_gpus_per_node": local, "num_nodes": -(-gpus // 8)}
    with redirect_stdout(sys.stderr):  # where DeepSpeed's greeting belongs
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    if strategy.stage == 2:
        host, gpu = estimate_zero2_model_states_mem_needs(
            sizes.transformer, cpu_offload=strategy.offload_optimizer, **cluster
        )
    else:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            sizes.transformer,
            sizes.largest_layer,
            cpu_offload=strategy.offload_optimizer,
            cpu_offload_params=strategy.offload_parameters,
            **cluster,
        )
    return int(gpu), int(host) // local


def render(setup: StageSetup, sizes: Sizes, rows: Sequence[Row]) -> str:
    """The table in Markdown, with what it was computed for."""
    checkpointed = "with" if setup.gradient_checkpointing else "without"
    lines = [
        f"{setup.model}, {setup.adaptation_name}, optimizer {setup.optimizer}, "
        f"{setup.batch_size} pictures of {setup.crop}x{setup.crop} per GPU, {setup.precision}, "
        f"{checkpointed} gradient checkpointing.",
        f"Trained: {sizes.trained / 1e6:,.1f} M values; frozen: {sizes.frozen / 1e6:,.1f} M.",
        *setup.notes,
        "GiB per GPU, computed, not run on a GPU. The peak is the sum of the columns before it, of "
        "activations and step the larger.",
        "",
        "| strategy | GPUs | parameters | gradients | optimiser | average | buffers | activations "
        "| step | peak | fits | host | DeepSpeed: GPU | host |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        values = (
            row.parameters,
            row.gradients,
            row.optimizer,
            row.average,
            row.buffers,
            row.activations,
            row.step,
            row.total,
        )
        cells = [row.strategy, str(row.gpus), *(f"{value / GIB:.1f}" for value in values)]
        cells.append(f"{row.card} GB" if row.card else "none")
        cells.append(f"{row.host / GIB:.1f}")
        for theirs in (row.deepspeed_gpu, row.deepspeed_host):
            cells.append("" if theirs is None else f"{theirs / GIB:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gpu_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if any(count < 1 or (count > 8 and count % 8) for count in counts):
        raise argparse.ArgumentTypeError(f"{text}: 1 to 8, or a multiple of 8")
    return counts


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m percov2.training.memory", description="Memory of stage 2 per GPU."
    )
    parser.add_argument(
        "--config", type=Path, action="append", required=True, help="stage 2; later ones override"
    )
    parser.add_argument(
        "--stage1",
        type=Path,
        action="append",
        default=[],
        help="configuration of stage 1, where its model does not exist yet",
    )
    parser.add_argument("--gpus", type=_gpu_counts, default=[1, 8, 64], help="such as 1,8,64")
    parser.add_argument(
        "--batch-size", type=int, help="pictures per GPU; that of the file if left out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.add_argument(
        "overrides", nargs="*", metavar="FIELD=VALUE", help="such as data.init_args.crop=256"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        setup = read_setup(options.config, stage1=options.stage1, overrides=options.overrides)
        if options.batch_size is not None:
            setup = dataclasses.replace(setup, batch_size=options.batch_size)
        sizes = measure_sizes(setup)
    except ValueError as error:
        print(f"percov2.training.memory: error: {error}", file=sys.stderr)
        return 2
    rows = [
        make_row(setup, sizes, strategy, gpus) for gpus in options.gpus for strategy in STRATEGIES
    ]
    if options.json:
        table = [asdict(row) | {"total": row.total, "fits_gb": row.card} for row in rows]
        record = {"setup": asdict(setup), "sizes": asdict(sizes), "rows": table}
        print(json.dumps(record, indent=2, default=str))
    else:
        print(render(setup, sizes, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
