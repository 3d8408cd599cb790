"""ZeRO with real processes: `percov2.fit` on two of them, on the CPU.

One process with 4 pictures a step, DDP, ZeRO-2, ZeRO-3 and ZeRO-3 with offloading must draw the
same curve, since all draw the same noise for the same picture. Known trouble of Lightning with
DeepSpeed (optimiser, learning rate or schedule lost on resume: Lightning issues 7282, 8092, 8344,
11188, 15834; checkpoints of no use afterwards: 17673) is looked for in the resumed runs.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import percov2
from benchmarks.kill import Setup, differences, weights_of
from benchmarks.kill import run as run_killed
from percov2.training.checkpoint_weights import read_weights
from percov2.training.checkpointing import latest_checkpoint
from percov2.training.convert import main as convert
from tests.tiny_codec import save_tiny
from tests.training.tiny_runs import TinyRun

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

STEPS, SAVED = 6, 3
SHARDED = {"zero2": "zero2.yaml", "zero3": "zero3.yaml"}
LORA = '{"class_path": "percov2.training.adaptation.LoRA", "init_args": {"rank": 2, "alpha": 2}}'
OVERLAYS = {"ddp": "ddp.yaml", **SHARDED, "zero3_offload": "zero3_offload.yaml"}


class Runs:
    """Trains each run when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "start"
        save_tiny(self.model, from_prediction=True)
        self.get = cache(self._get)

    def _get(self, name: str) -> TinyRun:
        if (self.folder / name).exists():
            pytest.fail(f"the run {name} failed in an earlier test")
        base, _, variant = name.partition("-")
        options = {
            "": [],
            "resumed": [f"--ckpt_path={self.folder / base}/checkpoints/step={SAVED}.ckpt"],
            # All steps trained and nothing exported, in a folder of its own.
            "killed": [f"--ckpt_path={self.folder / base}/checkpoints/step={STEPS}.ckpt"],
            "bf16": ["--trainer.precision=bf16-mixed", "--trainer.max_steps=3"],
            "lora": [f"--model.adaptation={LORA}"],
        }[variant]
        if variant in ("resumed", "killed"):
            self.get(base)
        return TinyRun.train(
            self.folder / name,
            model=self.model,
            steps=STEPS,
            processes=1 if base == "one" else 2,
            overlay=OVERLAYS.get(base),
            options=options,
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return Runs(tmp_path_factory.mktemp("zero"))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight that has a say.

    Attention is blind to the bias of its keys: the gradient of that is rounding noise, which AdamW
    blows up to steps of the order of the learning rate.
    """
    found = differences(one, other)
    for key, difference in found.items():
        if key.endswith("k_proj.bias"):
            difference.zero_()
        elif key.endswith("attention.qkv.bias"):
            difference.view(3, -1)[1] = 0
    return max(float(difference.max()) for difference in found.values())


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_loss_curve_does_not_depend_on_the_strategy(runs: Runs, name: str) -> None:
    one, run = runs.get("one"), runs.get(name)
    assert list(run.losses) == list(range(1, STEPS + 1))
    assert list(run.losses.values()) == pytest.approx(list(one.losses.values()), rel=1e-5)
    # These are losses of the averages, put in place.
    assert list(run.validation) == [2, 4, 6]
    assert list(run.validation.values()) == pytest.approx(list(one.validation.values()), rel=1e-5)
    # The averages themselves.
    assert largest_difference(one.folder / "model", run.folder / "model") < 1e-5


def test_mixed_precision_means_the_same_as_without_zero(runs: Runs) -> None:
    ddp, zero = runs.get("ddp-bf16"), runs.get("zero2-bf16")
    assert list(zero.losses.values()) == pytest.approx(list(ddp.losses.values()), rel=1e-5)
    assert ddp.losses[1] != pytest.approx(runs.get("ddp").losses[1], rel=1e-5)
    # Frozen or not, no weight is rounded to bfloat16.
    assert largest_difference(ddp.folder / "model", zero.folder / "model") < 1e-4


@pytest.mark.parametrize("name", ["one", *SHARDED])
def test_a_resumed_run_continues_the_curve(runs: Runs, name: str) -> None:
    whole, resumed = runs.get(name), runs.get(f"{name}-resumed")
    assert list(resumed.losses) == list(range(SAVED + 1, STEPS + 1))
    expected = [whole.losses[step] for step in resumed.losses]
    # A lost moment or a learning rate that starts anew changes the second loss by more than this.
    assert list(resumed.losses.values()) == pytest.approx(expected, rel=1e-6)
    assert resumed.validation == pytest.approx(
        {step: whole.validation[step] for step in (4, 6)}, rel=1e-6
    )
    assert_same_weights(whole.folder / "model", resumed.folder / "model")


@pytest.mark.parametrize("name", SHARDED)
def test_every_process_averages_its_shard(runs: Runs, name: str) -> None:
    run = runs.get(name)
    key = "single_partition_of_fp32_groups" if name == "zero2" else "fp32_flat_groups"
    for rank in range(2):
        shards = run.shards(rank)
        assert len(shards) == STEPS
        averages = shards[0]
        for step in range(1, SAVED):
            averages = [torch.lerp(a, s, 0.5) for a, s in zip(averages, shards[step], strict=True)]
        file = run.checkpoint(SAVED) / "average" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        saved = torch.load(file, weights_only=True)
        assert saved["step"] == SAVED
        for average, found in zip(averages, saved["optimizer_state_dict"][key], strict=True):
            assert torch.equal(average, found)


@pytest.mark.parametrize("name", SHARDED)
def test_a_merged_checkpoint_has_the_masters_to_the_last_bit(runs: Runs, name: str) -> None:
    run = runs.get(name)
    weights = read_weights(run.checkpoint(SAVED), "trained")
    shards = torch.cat([shard for rank in range(2) for shard in run.shards(rank)[SAVED - 1]])
    one = torch.load(runs.get("one").checkpoint(SAVED), weights_only=True)
    assert weights.keys() == one["state_dict"].keys()
    trained = torch.cat([weights[name].flatten() for name in one["average"]["weights"]])
    # The shards are in another order, and padded with zeros.
    found, expected = (torch.sort(values[values != 0]).values for values in (shards, trained))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["one", *SHARDED, "zero3-lora"])
def test_a_converted_checkpoint_is_the_model_that_training_exported(
    runs: Runs, name: str, tmp_path: Path, photograph: Image.Image
) -> None:
    run, output = runs.get(name), tmp_path / "model"
    checkpoint = latest_checkpoint(run.folder / "checkpoints")
    assert checkpoint == run.checkpoint(STEPS)
    assert checkpoint.is_dir() == (name != "one")
    args = ["--config", str(run.config), "--checkpoint", str(checkpoint), "--output", str(output)]
    assert convert(args) == 0
    assert_same_weights(run.folder / "model", output)
    codec = percov2.load(str(output))
    data = codec.compress(photograph, caption="a cat")
    assert np.array_equal(codec.decode_tokens(data), codec.encode_tokens(photograph))
    assert codec.decompress(data, steps=2).size == photograph.size
    # The weights themselves are other ones than their average.
    assert convert([*args[:-1], str(tmp_path / "trained"), "--weights", "trained"]) == 0
    key = "transformer/pos_embed.proj.weight"
    assert not torch.equal(weights_of(tmp_path / "trained")[key], weights_of(output)[key])


@pytest.mark.parametrize("name", SHARDED)
def test_a_run_killed_before_its_export_is_exported_when_resumed(runs: Runs, name: str) -> None:
    whole, killed = runs.get(name), runs.get(f"{name}-killed")
    assert_same_weights(whole.folder / "model", killed.folder / "model")
    assert (killed.folder / "model" / "training.yaml").is_file()


def test_conversion_refuses_what_does_not_fit(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = runs.get("zero2"), tmp_path / "model"
    checkpoint = run.checkpoint(STEPS)
    for config, path, reason in [
        (run.folder / "no.yaml", checkpoint, "no.yaml is not a configuration"),
        (run.config, tmp_path / "no.ckpt", "no.ckpt is not a checkpoint"),
        (run.config, tmp_path, "not a sharded checkpoint"),
    ]:
        args = ["--config", str(config), "--checkpoint", str(path), "--output", str(output)]
        assert convert(args) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert reason in error
    assert not output.exists()


def test_killed_and_resumed_runs_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    setup = Setup(folder=tmp_path / "kill", steps=8, processes=2, overlay="zero2.yaml", window=0.3)
    assert run_killed(setup, kills=2, seed=0) <= 1e-6


@pytest.mark.parametrize("name", SHARDED)
def test_nothing_half_written_stays(runs: Runs, name: str) -> None:
    folder = runs.get(name).folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step=3.ckpt", "step=6.ckpt"}
