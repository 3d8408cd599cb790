"""Compares the step time of `percov2.fit` with a bare PyTorch loop, on the tiny stage 2.

``python -m benchmarks.step_time [--steps 60] [--repeats 5]`` trains configs/tiny/stage2.yaml in
three ways, one after the other and again: in a plain loop, by `percov2.fit` without callbacks, and
by `percov2.fit` with the callbacks that the configuration ships. Model, batch and optimiser are the
same; pictures and captions are made up once, so no data set is needed and no decoding is measured.
Validation is off, and the step in which a checkpoint is written does not change a median. Prints a
table in Markdown: the median over the repeats of each run's median step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from percov2.analysis.autoencoder import PatchAutoencoder
from percov2.analysis.hyper_encoder import HyperEncoder
from percov2.analysis.vector_quantizer import VectorQuantizer
from percov2.components import TokenizerComponents
from percov2.data.samples import Batch
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.fit import FitCLI
from percov2.fit import main as fit
from percov2.synthesis.flow_transformer import predict
from percov2.synthesis.latent_decoder import LatentDecoder
from percov2.training import FlowStage
from percov2.training.optimization import Phase, build_optimizer

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"
_WORDS = ("red", "dog", "boat", "near", "tall", "house", "two", "people", "under", "bright", "sky")


class StepTimer(L.Callback):
    """Takes the time between the ends of successive steps, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over."""
        self.ends.append(time.perf_counter())


class _SameBatch(IterableDataset[Batch]):
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


class SyntheticDataModule(L.LightningDataModule):
    """One batch of noise, again and again.

    Args:
        crop: side of the pictures.
        batch_size: pictures.
    """

    def __init__(self, *, crop: int, batch_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = batch_size, 3, crop, crop
        self.batch = Batch(
            image=torch.rand(shape, generator=generator) * 2 - 1,
            caption=[" ".join(_WORDS[i % 3 : i % 3 + 6]) for i in range(batch_size)],
            key=[str(i) for i in range(batch_size)],
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Without end."""
        return DataLoader(_SameBatch(self.batch), batch_size=None)


def write_tokenizer(directory: Path) -> None:
    """A stage 1 directory of the shipped sizes with random weights."""
    autoencoder, parts = (
        _resolved(CONFIGS / f"{name}.yaml")["model"]["init_args"]
        for name in ("autoencoder", "stage1")
    )
    torch.manual_seed(0)
    TokenizerComponents(
        autoencoder=PatchAutoencoder(**autoencoder["autoencoder"]),
        hyper_encoder=HyperEncoder(**parts["hyper_encoder"]),
        quantizer=VectorQuantizer(**parts["quantizer"]),
        latent_decoder=LatentDecoder(**parts["latent_decoder"]),
        masked_transformer=MaskedTransformer(**parts["masked_transformer"]),
    ).save(directory)


def _resolved(config: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def _arguments(folder: Path, options: argparse.Namespace) -> list[str]:
    """Of `percov2.fit`, for all three ways."""
    return [
        f"--config={CONFIGS / 'stage2.yaml'}",
        f"--config={folder / 'overlay.yaml'}",
        f"--vars.run={folder / 'run'}",
        f"--vars.tokenizer={options.tokenizer or folder / 'tokenizer'}",
        f"--model.start.init_args.captions={folder / 'captions.txt'}",
        f"--trainer.max_steps={options.warmup + options.steps}",
        *options.overrides,
    ]


def _overlay(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": {
            "class_path": "benchmarks.step_time.SyntheticDataModule",
            "init_args": {"crop": options.crop, "batch_size": options.batch},
        },
        "trainer": {
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks+": [{"class_path": "benchmarks.step_time.StepTimer"}],
        },
    }


def _durations(ends: Sequence[float], warmup: int) -> list[float]:
    return [after - before for before, after in pairwise(ends[warmup - 1 :])]


def time_fit(arguments: list[str], warmup: int) -> float:
    """Median seconds of a step of `percov2.fit`."""
    callbacks: list[L.Callback] = fit(arguments).callbacks  # type: ignore[attr-defined]
    (timer,) = (callback for callback in callbacks if isinstance(callback, StepTimer))
    return statistics.median(_durations(timer.ends, warmup))


def time_bare(arguments: list[str], warmup: int) -> float:
    """Median seconds of a step of a plain loop over the same networks, batch and optimiser."""
    cli = FitCLI(arguments)
    stage, steps = cli.model, cli.trainer.max_steps
    assert isinstance(stage, FlowStage)
    stage.to(memory_format=torch.channels_last)
    stage.on_train_start()
    encoders, parts, flow = stage.text_conditioner, stage.parts, stage.flow
    batch: Batch = cli.datamodule.batch
    assert encoders is not None
    phase = Phase(
        optimization=stage.optimization, parameters=stage.parameters(), first=0, last=steps
    )
    made = build_optimizer(phase)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    trained = optimizer.param_groups[0]["params"]
    ends = []
    for _ in range(steps):
        with torch.no_grad():
            latents = parts.autoencoder.encode(batch["image"])
            tokens = parts.quantizer(parts.hyper_encoder(latents))
            condition, prediction = parts.latent_decoder.condition(tokens.features)
        t = flow.normal_to_time(torch.randn(len(latents)))
        x_1 = flow.source(prediction, torch.randn_like(latents))
        text = encoders(batch["caption"])
        x_t = flow.interpolate(latents, x_1, t)
        output = predict(stage.transformer, x_t, condition, t, text.embeddings, text.pooled)
        loss = F.mse_loss(output, flow.target(latents, x_1, prediction))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cli.trainer.gradient_clip_val)
        optimizer.step()
        scheduler.step()
        ends.append(time.perf_counter())
    return statistics.median(_durations(ends, warmup))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of every repeat, by way."""
    if options.tokenizer is None:
        write_tokenizer(folder / "tokenizer")
    (folder / "captions.txt").write_text("\n".join(" ".join(_WORDS[i:]) for i in range(6)))
    (folder / "overlay.yaml").write_text(OmegaConf.to_yaml(_overlay(options)))
    arguments = _arguments(folder, options)
    timer = '[{"class_path": "benchmarks.step_time.StepTimer"}]'
    plain = [f"--trainer.callbacks={timer}", "--trainer.logger=false"]
    plain += ["--trainer.enable_checkpointing=false"]
    ways: dict[str, Callable[[], float]] = {
        "bare PyTorch loop": lambda: time_bare(arguments, options.warmup),
        "percov2.fit, no callbacks": lambda: time_fit([*arguments, *plain], options.warmup),
        "percov2.fit, as shipped": lambda: time_fit(arguments, options.warmup),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        # Not always in the same order: what slows a machine down for a while hits all of them.
        names = list(ways)
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            seconds[name].append(ways[name]())
    return seconds


def render(seconds: dict[str, list[float]]) -> str:
    """The table."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bare = next(iter(medians.values()))
    lines = ["| loop | median step, ms | runs, ms | times the bare loop |", "|---|---:|---|---:|"]
    for name, values in seconds.items():
        runs = ", ".join(f"{1000 * value:.1f}" for value in values)
        lines.append(
            f"| {name} | {1000 * medians[name]:.1f} | {runs} | {medians[name] / bare:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them, at least 1")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each loop")
    parser.add_argument("--crop", type=int, default=320, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    parser.add_argument("--tokenizer", type=Path, help="stage 1 directory; random if left out")
    parser.add_argument("overrides", nargs="*", help="behind `--`: further options of percov2.fit")
    options = parser.parse_args(arguments)
    if min(options.steps, options.warmup, options.repeats) < 1:
        parser.error("--steps, --warmup and --repeats must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), options)
    print(
        f"configs/tiny/stage2.yaml, {options.batch} made-up pictures of {options.crop}x"
        f"{options.crop}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.repeats} runs of {options.steps} steps.\n\n{render(seconds)}"
    )
    return 0


if __name__ == "__main__":
    # The configurations name this module's classes: they must be those of the importable module.
    from benchmarks import step_time

    sys.exit(step_time.main())
