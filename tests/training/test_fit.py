"""Every shipped configuration of the embedded default, shrunken, run through `percov2.fit`."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import percov2
from percov2.fit import main
from percov2.training.adversary import AdversarialLosses
from percov2.training.autoencoder_stage import AutoencoderStage
from percov2.training.callbacks.stop_on_signal import EXIT_CODE

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
AUTOENCODER = ["--model.autoencoder.encoder_width=8", "--model.component_batches=2"]
ENTROPY = [
    "--model.hyper_encoder.hidden_channels=8",
    "--vars.feature_channels=8",
    "--vars.codebook_size=16",
    "--model.latent_decoder.hidden_channels=8",
    "--model.latent_decoder.min_channels=8",
    "--model.masked_transformer.dim=16",
    "--model.masked_transformer.num_layers=2",
    "--model.masked_transformer.num_heads=2",
]
FLOW = [
    "--model.start.init_args.num_layers=1",
    "--model.start.init_args.num_heads=2",
    "--model.start.init_args.head_dim=8",
    "--model.start.init_args.vocab_size=520",
    "--model.start.init_args.text_dim=8",
    "--model.start.init_args.text_layers=2",
    "--model.start.init_args.text_heads=1",
]


@dataclass(frozen=True)
class Run:
    """Folders of a whole training: stage 0, 1, 2 and the lower rate."""

    root: Path
    data: Path

    def fit(self, configs: list[str], name: str, steps: int, *options: str) -> L.Trainer:
        """Train a configuration for a few steps of two 64-pixel crops."""
        args = [f"--config={CONFIGS / config}" for config in configs]
        args += [f"--vars.run={self.root / name}", f"--vars.data={self.data}"]
        args += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        args += ["--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
        args += ["--data.init_args.crop=64", "--data.init_args.batch_size=2"]
        args += ["--data.init_args.val_samples=2", "--data.init_args.num_workers=0"]
        args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        return main([*args, *options])

    def resume_flow(self, name: str) -> None:
        """Give the configuration of stage 2 once more, for its two steps."""
        tokenizer = f"--vars.tokenizer={self.model('s1')}"
        self.fit(["stage2.yaml"], name, 2, tokenizer, "--ckpt_path=auto", *FLOW)

    def model(self, name: str) -> Path:
        """The directory that a run exported."""
        return self.root / name / "model"

    def discriminator(self, name: str) -> str:
        """The option of a run that goes on with another run's discriminator."""
        return f"--vars.discriminator={self.root / name / 'checkpoints' / 'last.ckpt'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, training_data: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs"), training_data)
    run.fit(["autoencoder.yaml"], "ae", 2, *AUTOENCODER)
    entropy = [f"--vars.autoencoder={run.model('ae')}", *ENTROPY]
    run.fit(["stage1.yaml"], "s1", 4, "--vars.tokenizer_steps=2", *entropy)
    overlay = ["stage1.yaml", "low/stage1.yaml"]
    run.fit(overlay, "s1-low", 2, "--vars.tokenizer_steps=1", *entropy)
    run.fit(["stage2.yaml"], "s2", 2, f"--vars.tokenizer={run.model('s1')}", *FLOW)
    adversarial = ["stage2.yaml", "adversarial.yaml"]
    tokenizer = f"--vars.tokenizer={run.model('s1')}"
    decoder = "--model.adversary.init_args.train_decoder=true"
    run.fit(adversarial, "adv", 2, tokenizer, f"--vars.start={run.model('s2')}", decoder)
    start = f"--vars.start={run.model('adv')}"
    run.fit([*adversarial, "joint.yaml"], "joint", 2, start, run.discriminator("adv"))
    tokenizer = f"--vars.tokenizer={run.model('joint')}"
    overlays = ["stage1.yaml", "masked.yaml", "masked_joint.yaml"]
    run.fit(overlays, "joint-masked", 2, tokenizer, *ENTROPY)
    tokenizer = f"--vars.tokenizer={run.model('joint-masked')}"
    start = f"--vars.start={run.model('joint')}"
    overlays = [*adversarial, "joint.yaml", "settle.yaml"]
    run.fit(overlays, "settle", 2, tokenizer, start, run.discriminator("joint"))
    overlays.append("low/adversarial.yaml")
    tokenizer = f"--vars.tokenizer={run.model('s1-low')}"
    run.fit(overlays, "adv-low", 2, tokenizer, f"--vars.start={run.model('settle')}")
    return run


def test_the_tokenizer_of_64_tokens_reduces_by_eight_latents(trained: Run) -> None:
    options = ["--vars.tokenizer_steps=1", f"--vars.autoencoder={trained.model('ae')}", *ENTROPY]
    stage = trained.fit(["stage1.yaml", "64_tokens.yaml"], "s64", 2, *options).lightning_module
    assert stage.hyper_encoder.config.reduction == 8
    assert stage.choose_tokens(torch.randn(1, 16, 64, 64)).numel() == 64


def test_a_masked_transformer_is_retrained_on_a_finished_tokenizer(trained: Run) -> None:
    for name, overlay in (("s1", []), ("s1-low", ["low/stage1.yaml"])):
        configs = [
            "stage1.yaml",
            *overlay,
            "masked.yaml",
            *(["low/masked.yaml"] if overlay else []),
        ]
        options = [f"--vars.autoencoder={trained.model('ae')}", *ENTROPY]
        trainer = trained.fit(
            configs, f"{name}-masked", 2, f"--vars.tokenizer={trained.model(name)}", *options
        )
        assert trainer.lightning_module.masked_steps_from == 0
        for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
            before, after = (
                load_file(trained.model(run) / part / "diffusion_pytorch_model.safetensors")
                for run in (name, f"{name}-masked")
            )
            same = {key: torch.equal(value, after[key]) for key, value in before.items()}
            assert all(same.values()) == (part != "masked_transformer"), (part, same)
        folder = trained.root / f"{name}-masked" / "checkpoints"
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [("s2", 4, 6), ("adv", 4, 6), ("joint", 4, 6), ("settle", 4, 6), ("adv-low", 2, 3)],
)
def test_the_trained_directories_are_codecs(
    trained: Run, photograph: Image.Image, name: str, rows: int, cols: int
) -> None:
    codec = percov2.load(str(trained.model(name)))
    data = codec.compress(photograph, caption="a cat")
    assert codec.decode_tokens(data).shape == (rows, cols)
    assert np.array_equal(codec.decode_tokens(data), codec.encode_tokens(photograph))
    assert codec.decompress(data, steps=2).size == photograph.size
    assert codec.config.name == ("tiny-low" if name.endswith("low") else "tiny")


def test_a_joint_tokenizer_moves_and_settles(trained: Run) -> None:
    weights = {
        (name, part): load_file(trained.model(name) / part / "diffusion_pytorch_model.safetensors")
        for name in ("adv", "joint", "joint-masked", "settle")
        for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer")
    }

    def same(one: str, other: str, part: str) -> bool:
        first, second = weights[one, part], weights[other, part]
        # The others store float16.
        return all(torch.equal(v.half(), second[key].half()) for key, v in first.items())

    for part in ("hyper_encoder", "quantizer", "latent_decoder"):
        assert not same("adv", "joint", part), part
        assert same("joint", "joint-masked", part), part
        assert same("joint", "settle", part), part
    assert not same("joint", "joint-masked", "masked_transformer")
    assert same("joint-masked", "settle", "masked_transformer")
    config = percov2.load(str(trained.model("settle"))).config
    weights = config.rate_weight, config.color_weight, config.latent_weight
    assert weights == (0.016, 2.0, 0.017)
    assert (config.default_guidance, config.flow.gain, config.sharpness) == (0, 0.9, 0.18)


def test_rates_have_ids_of_their_own(trained: Run) -> None:
    ids = {percov2.load(str(trained.model(name))).config.model_id for name in ("adv", "adv-low")}
    assert len(ids) == 2


def test_stage_2_keeps_the_tokenizer_of_stage_1(trained: Run) -> None:
    for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
        before, after = (
            load_file(trained.model(name) / part / "diffusion_pytorch_model.safetensors")
            for name in ("s1", "s2")
        )
        assert before.keys() == after.keys()
        for key, value in before.items():
            # Stage 2 stores float16.
            stored = value if key.startswith("ema_") else value.half().float()
            assert torch.equal(stored, after[key].float()), (part, key)


def test_a_stage_1_directory_is_refused_as_a_codec(trained: Run) -> None:
    with pytest.raises(ValueError, match="stage 2"):
        percov2.load(str(trained.model("s1")))


def test_the_run_folder_holds_config_curves_and_checkpoints(trained: Run) -> None:
    folder = trained.root / "s2"
    events = EventAccumulator(str(folder / "tensorboard" / "version_0")).Reload()
    for tag in ("train/flow", "val/flow", "val/psnr"):
        assert all(np.isfinite(event.value) for event in events.Scalars(tag))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert list(folder.rglob("config.yaml"))


def test_a_checkpoint_resumes_where_it_stopped(trained: Run) -> None:
    checkpoint = trained.root / "s1" / "checkpoints" / "last.ckpt"
    entropy = [f"--vars.autoencoder={trained.model('ae')}", *ENTROPY]
    resumed = trained.fit(
        ["stage1.yaml"],
        "s1-resumed",
        6,
        "--vars.tokenizer_steps=2",
        f"--ckpt_path={checkpoint}",
        *entropy,
    )
    assert resumed.global_step == 6
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    assert state["global_step"] == 4
    assert state["state_dict"]["quantizer.updates"] == 2
    final = load_file(
        trained.model("s1-resumed") / "quantizer" / "diffusion_pytorch_model.safetensors"
    )
    assert torch.equal(final["codebook"], state["state_dict"]["quantizer.codebook"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.autoencoder.widht=8", "'widht', the nearest known name is 'refiner_width'"),
        ("--trainer.max_stepss=4", "no option --trainer.max_stepss, .* 'trainer.max_steps'"),
        ("--vars.autoencode=x", "no option --vars.autoencode, .* 'vars.autoencoder'"),
        ("--trainer.precision=bf16mixed", "trainer.precision: .*'bf16-mixed'.*value: bf16mixed"),
        ("--config=nowhere.yaml", ".*File does not exist: .*nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    training_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    message: str,
) -> None:
    run = Run(tmp_path, training_data)
    with pytest.raises(SystemExit) as stopped:
        run.fit(["autoencoder.yaml"], "x", 1, option)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"percov2.fit: error: .*{message}", line)


def test_a_folder_that_cannot_hold_files_is_refused(training_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"vars\.run is .*x, .*Not a directory.*choose"):
        Run(tmp_path / "file", training_data).fit(["autoencoder.yaml"], "x", 1, *AUTOENCODER)


def test_a_finished_run_is_not_exported_anew(trained: Run) -> None:
    """Lightning would skip the callbacks that put averages in place."""
    with pytest.raises(ValueError, match="convert"):
        trained.resume_flow("s2")


def test_a_run_killed_before_its_export_is_exported_when_resumed(trained: Run) -> None:
    """Its averages, as training itself would have; what the kill left half written is replaced."""
    shutil.copytree(trained.root / "s2" / "checkpoints", trained.root / "killed" / "checkpoints")
    (trained.model("killed") / "transformer").mkdir(parents=True)
    trained.resume_flow("killed")
    expected, found = (
        {
            str(path.relative_to(trained.model(name))): path.read_bytes()
            for path in trained.model(name).rglob("*")
            # A tokenizer's file tells whether it has been used.
            if path.suffix == ".safetensors" or path.name == "model_index.json"
        }
        for name in ("s2", "killed")
    )
    assert len(expected) == 9
    assert found == expected
    assert (trained.model("killed") / "training.yaml").is_file()
    with pytest.raises(ValueError, match="nothing is left to train"):
        trained.resume_flow("killed")


def test_an_extended_run_killed_in_its_export_is_exported_when_resumed(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(steps: int) -> None:
        trained.fit(["autoencoder.yaml"], "extended", steps, "--ckpt_path=auto", *AUTOENCODER)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    fit(1)
    (weights,) = trained.model("extended").rglob("*.safetensors")
    first = weights.read_bytes()
    export = AutoencoderStage.export
    monkeypatch.setattr(AutoencoderStage, "export", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(2)
    monkeypatch.setattr(AutoencoderStage, "export", export)
    assert not (trained.model("extended") / "training.yaml").exists()
    fit(2)
    assert weights.read_bytes() != first
    assert (trained.model("extended") / "training.yaml").is_file()


def test_auto_looks_where_the_checkpoints_are_written(trained: Run, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks+:\n  - class_path: percov2.training.callbacks.LastCheckpoint\n"
        f"    init_args: {{dirpath: {tmp_path / 'scratch'}, every_n_train_steps: 1}}\n"
    )
    options = [f"--config={overlay}", "--ckpt_path=auto", *AUTOENCODER]
    trained.fit(["autoencoder.yaml"], "elsewhere", 1, *options)
    shutil.rmtree(trained.root / "elsewhere" / "checkpoints")
    with pytest.raises(ValueError, match="nothing is left to train"):
        trained.fit(["autoencoder.yaml"], "elsewhere", 1, *options)
    none = "--trainer.callbacks=[]"
    with pytest.raises(ValueError, match="no callback writes checkpoints: add"):
        trained.fit(["autoencoder.yaml"], "elsewhere", 1, *options, none)


def test_a_run_that_sigterm_ends_is_not_taken_for_finished(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would leave with exit code 0."""
    start = AutoencoderStage.on_train_start

    def terminated(stage: AutoencoderStage) -> None:
        start(stage)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(AutoencoderStage, "on_train_start", terminated)
    with pytest.raises(SystemExit) as stopped:
        trained.fit(["autoencoder.yaml"], "terminated", 2, *AUTOENCODER)
    assert stopped.value.code == EXIT_CODE
    assert not trained.model("terminated").exists()


def test_processes_wait_for_the_export(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    complete: list[bool] = []

    def barrier(strategy: object, name: str | None = None, *_: object) -> None:
        if name == "export":
            complete.append((trained.model("waiting") / "training.yaml").is_file())

    monkeypatch.setattr(SingleDeviceStrategy, "barrier", barrier)
    trained.fit(["autoencoder.yaml"], "waiting", 1, *AUTOENCODER)
    assert complete == [True]


def test_a_missing_checkpoint_and_one_of_another_stage_are_refused(trained: Run) -> None:
    entropy = [f"--vars.autoencoder={trained.model('ae')}", *ENTROPY]
    with pytest.raises(ValueError, match="does not exist"):
        trained.fit(["stage1.yaml"], "s1-x", 6, "--ckpt_path=nowhere.ckpt", *entropy)
    other = trained.root / "s2" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="another stage or architecture"):
        trained.fit(["stage1.yaml"], "s1-x", 6, f"--ckpt_path={other}", *entropy)


def test_auto_starts_afresh_without_a_checkpoint(trained: Run) -> None:
    trainer = trained.fit(["autoencoder.yaml"], "ae-fresh", 1, "--ckpt_path=auto", *AUTOENCODER)
    assert trainer.global_step == 1
    assert (trained.model("ae-fresh") / "training.yaml").is_file()


def test_adversarial_finetuning_keeps_the_encoder_and_the_model_id(trained: Run) -> None:
    """What enters the stream is stage 1's: streams of the flow before decode with it."""
    before, after = (percov2.load(str(trained.model(name))) for name in ("s2", "adv"))
    assert before.config.model_id == after.config.model_id
    assert after.config.default_steps == 1
    encoders = [c.components.tokenizer.autoencoder.encoder_residual for c in (before, after)]
    for one, other in zip(encoders[0].parameters(), encoders[1].parameters(), strict=True):
        assert torch.equal(one, other)
    decoders = [c.components.tokenizer.autoencoder.decoder for c in (before, after)]
    pairs = zip(decoders[0].parameters(), decoders[1].parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_an_adversary_is_watched_and_does_not_ship(trained: Run) -> None:
    folder = trained.root / "adv"
    events = EventAccumulator(str(folder / "tensorboard" / "version_0")).Reload()
    for tag in (f"train/{n}" for n in AdversarialLosses._fields):
        assert all(np.isfinite(event.value) for event in events.Scalars(tag))
    assert {path.name for path in trained.model("adv").iterdir()} == {
        path.name for path in trained.model("s2").iterdir()
    }
