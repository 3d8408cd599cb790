"""The callbacks that watch a training: what they log is true, and they change nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor

from percov2.analysis.autoencoder import PatchAutoencoder
from percov2.codec import Codec
from percov2.data.folder import FolderDataModule
from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.entropy.token_coder import TokenCoder
from percov2.training import AutoencoderStage, EntropyStage, FlowStage
from percov2.training.autoencoder_stage import psnr
from percov2.training.callbacks import (
    CodebookUsage,
    GradientNorms,
    RateDistortionSamples,
    StreamFaults,
    Throughput,
    TokenRate,
    WeightEMA,
)
from percov2.training.callbacks.rate_distortion import decode_all
from percov2.training.optimization import Optimization
from tests.tiny_codec import CODEBOOK_SIZE
from tests.training.callbacks.watched_runs import (
    BATCH,
    Events,
    PictureDataModule,
    Pictures,
    fit,
)
from tests.training.test_stages import entropy_stage, flow_stage

TOKENS = 16
"""Of a 64x64 picture at 16 pixels a token."""


def new_stage(name: str, directory: Path) -> EntropyStage | FlowStage:
    """A stage all of whose parts are trained."""
    if name == "flow":
        return flow_stage(directory, train_tokenizer=True, from_prediction=True)
    return entropy_stage(directory, tokenizer_steps=100, masked_from=0)


def watchers() -> list[L.Callback]:
    """All that every stage can have."""
    return [
        RateDistortionSamples(images=2, scatter_images=3, steps=(1, 2)),
        TokenRate(images=3),
        CodebookUsage(),
        GradientNorms(every_n_steps=1),
        Throughput(every_n_steps=1),
    ]


class GradientRecorder(L.Callback):
    """Keeps the gradients of the last step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {
            name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None
        }


@dataclass(frozen=True)
class Watched:
    """A run of four steps and two validations, the last one behind the last step."""

    stage: EntropyStage | FlowStage
    events: Events
    gradients: dict[str, Tensor]
    random_state: Tensor


def watch(name: str, folder: Path) -> Watched:
    stage, recorder = new_stage(name, folder / "start"), GradientRecorder()
    fit(stage, folder / "run", [*watchers(), recorder], steps=4)
    return Watched(
        stage.eval(), Events.read(folder / "run"), recorder.gradients, torch.get_rng_state()
    )


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch("flow", tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def entropy(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch("entropy", tmp_path_factory.mktemp("entropy"))


@pytest.fixture(params=["flow", "entropy"])
def watched(request: pytest.FixtureRequest) -> Watched:
    run: Watched = request.getfixturevalue(request.param)
    return run


def validation() -> list[tuple[Image.Image, str]]:
    return [(tensor_to_image(s["image"]), s["caption"]) for s in Pictures(3, first=100).samples]


def token_grids(stage: EntropyStage | FlowStage) -> list[Any]:
    parts = stage.parts if isinstance(stage, FlowStage) else stage.components()
    with torch.no_grad():
        images = torch.stack([image_to_tensor(picture) for picture, _ in validation()])
        features = parts.hyper_encoder(parts.autoencoder.encode(images))
        return list(parts.quantizer(features).tokens.numpy())


def coder(stage: EntropyStage | FlowStage) -> TokenCoder:
    parts = stage.parts if isinstance(stage, FlowStage) else stage.components()
    return parts.token_coder("quincunx")


@pytest.mark.parametrize("name", ["flow", "entropy"])
def test_watching_changes_neither_weights_nor_random_state(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    watched = request.getfixturevalue(name)
    stage = new_stage(name, tmp_path / "start")
    fit(stage, tmp_path / "run", [], steps=4)
    assert torch.equal(torch.get_rng_state(), watched.random_state)
    weights = watched.stage.state_dict()
    start = new_stage(name, tmp_path / "start").state_dict()
    for key, value in stage.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert any(not torch.equal(value, weights[key]) for key, value in start.items())


def test_modes_are_those_of_training_after_a_validation(tmp_path: Path) -> None:
    stage = flow_stage(tmp_path / "start", train_tokenizer=False, from_prediction=True)
    fit(stage, tmp_path / "run", watchers(), steps=3)
    assert stage.transformer.training
    assert not any(module.training for module in stage.parts.modules().values())


# --- Rate and distortion -------------------------------------------------------------------------


def test_bytes_are_those_of_the_exported_codec(flow: Watched, tmp_path: Path) -> None:
    assert isinstance(flow.stage, FlowStage)
    flow.stage.export(tmp_path)
    codec = Codec.from_pretrained(str(tmp_path))
    sizes, distances = [], []
    for picture, caption in validation():
        data = codec.compress(picture, caption=caption)
        restored = codec.decompress(data, steps=1, seed=0)
        sizes.append(len(data))
        distances.append(psnr(image_to_tensor(picture)[None], image_to_tensor(restored)[None]))
    assert flow.events.last("samples/bytes") == pytest.approx(np.mean(sizes))
    assert flow.events.last("samples/bpp") == pytest.approx(8 * np.mean(sizes) / 64**2)
    assert flow.events.last("samples/psnr") == pytest.approx(float(np.mean(distances)), abs=0.01)
    assert flow.events.steps("samples/bytes") == [2, 4]


def test_stage_1_counts_the_bytes_of_the_token_stream(entropy: Watched) -> None:
    grids = token_grids(entropy.stage)
    encoder = coder(entropy.stage)
    steps = encoder.steps_total(*grids[0].shape)
    sizes = [len(encoder.encode(grid, steps=steps)) for grid in grids]
    assert entropy.events.last("samples/bytes") == pytest.approx(np.mean(sizes))
    assert 5 < entropy.events.last("samples/psnr") < 40


def test_contact_sheet_shows_originals_and_what_came_back(watched: Watched) -> None:
    sheet = watched.events.image("samples/contact_sheet")
    assert sheet.shape[0] > 2 * 64
    original = np.asarray(validation()[0][0])
    assert np.array_equal(sheet[12:76, 12:76], original)
    # Right of the original: pictures, which are neither white nor the original again.
    beside = sheet[12:76, 80:]
    assert (beside < 250).any(-1).sum() > 1000
    figure = watched.events.image("samples/rate_distortion")
    assert figure.shape == (400, 600, 3)


def test_captions_of_the_sheet_carry_real_bytes(tiny_model: Path, photograph: Image.Image) -> None:
    codec = Codec.from_pretrained(str(tiny_model))
    made = decode_all(codec, photograph, "a cat", steps=(1, 3), hybrid=True)
    total = codec.summary.steps_total(*photograph.size)
    whole = codec.compress(photograph, caption="a cat")
    half = codec.compress(photograph, caption="a cat", schedule_steps=total // 2)
    assert len(half) < len(whole)
    assert [one.label for one in made] == [
        "1 step",
        "3 steps",
        f"{total // 2} of {total} groups, 3 steps",
    ]
    for one, data, steps in zip(made, (whole, whole, half), (1, 3, 3), strict=True):
        assert np.array_equal(one.picture, codec.decompress(data, steps=steps, seed=0))
        assert one.text.endswith(f"\n{len(data)} bytes, {8 * len(data) / 96 / 64:.4f} bpp")
    assert made[0].psnr != made[1].psnr


@pytest.mark.parametrize("average_first", [True, False])
def test_samples_are_of_the_averaged_weights(tmp_path: Path, average_first: bool) -> None:
    stage = new_stage("entropy", tmp_path / "start")
    callbacks = [WeightEMA(decay=0.9), RateDistortionSamples(images=1, scatter_images=3)]
    fit(stage, tmp_path / "run", callbacks if average_first else callbacks[::-1])
    # The averages are in place when training has ended; a picture decoded from others differs.
    parts = stage.eval().components()
    images = torch.stack([image_to_tensor(picture) for picture, _ in validation()])
    with torch.no_grad():
        features = parts.quantizer(parts.hyper_encoder(parts.autoencoder.encode(images))).features
        decoded = parts.autoencoder.decode(parts.latent_decoder(features))
    restored = torch.stack([image_to_tensor(tensor_to_image(one)) for one in decoded])
    expected = float(psnr(restored, images))
    assert Events.read(tmp_path / "run").last("samples/psnr") == pytest.approx(expected, abs=1e-4)


# --- Tokens --------------------------------------------------------------------------------------


def test_bits_per_token_by_step_are_the_coders(watched: Watched) -> None:
    grids, encoder = token_grids(watched.stage), coder(watched.stage)
    groups = encoder.groups(4, 4)
    bits = np.array([encoder.bits_per_group(grid) for grid in grids]).sum(0)
    sizes = 3 * np.bincount(groups.flatten())
    prefix = "rate/bits_per_token"
    logged = sorted(tag for tag in watched.events.tags("scalars") if f"{prefix}/step_" in tag)
    assert logged == [f"{prefix}/step_{k + 1:02d}" for k in range(len(sizes))]
    for tag, expected in zip(logged, bits / sizes, strict=True):
        assert watched.events.last(tag) == pytest.approx(expected, rel=1e-4)
    assert watched.events.last(f"{prefix}/ideal") == pytest.approx(bits.sum() / 48, rel=1e-4)
    size = sum(len(encoder.encode(grid, steps=len(sizes))) for grid in grids)
    assert watched.events.last(f"{prefix}/stream") == pytest.approx(8 * size / 48)
    assert watched.events.last("rate/token_bytes") == pytest.approx(size / 3)


def test_token_rate_stops_at_its_number_of_images(tmp_path: Path) -> None:
    stage = new_stage("entropy", tmp_path / "start")
    fit(stage, tmp_path / "run", [TokenRate(images=1)])
    grid, encoder = token_grids(stage.eval())[0], coder(stage)
    size = len(encoder.encode(grid, steps=encoder.steps_total(4, 4)))
    assert Events.read(tmp_path / "run").last("rate/token_bytes") == size


def test_dead_codes_and_uses(watched: Watched) -> None:
    tokens = np.concatenate(token_grids(watched.stage)).flatten()
    assert len(tokens) == 3 * TOKENS
    dead = CODEBOOK_SIZE - len(set(tokens.tolist()))
    assert 0 < dead < CODEBOOK_SIZE
    assert watched.events.last("codebook/dead") == dead
    uses = watched.events.accumulator.Histograms("codebook/uses_per_code")[-1].histogram_value
    assert uses.num == CODEBOOK_SIZE
    assert uses.sum == len(tokens)
    assert uses.max == np.bincount(tokens).max()


def test_codes_of_a_flat_codebook_are_dead(tmp_path: Path) -> None:
    """Number 7 is what all features are, the other codes are the opposite."""
    stage = new_stage("entropy", tmp_path / "start")
    assert isinstance(stage, EntropyStage)
    with torch.no_grad():
        stage.quantizer.project_in.weight.zero_()
        stage.quantizer.project_in.bias.fill_(1.0)
        stage.quantizer.codebook.copy_(-torch.ones(CODEBOOK_SIZE, 8) / 8**0.5)
        stage.quantizer.codebook[7] *= -1
    usage = CodebookUsage()
    stage.eval()
    usage.begin(stage)
    for batch in PictureDataModule().val_dataloader():
        usage.observe(stage, batch)
    assert usage._counts.tolist() == [3 * TOKENS if code == 7 else 0 for code in range(32)]


# --- Speed, gradients, data ----------------------------------------------------------------------


class Clock(L.Callback):
    """Seconds from the start of training to its end."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self._started


def test_throughput_leaves_validation_out_and_sees_waiting(tmp_path: Path) -> None:
    clock, pause, validation_pause = Clock(), 0.1, 0.3
    fit(
        new_stage("entropy", tmp_path / "start"),
        tmp_path / "run",
        [Throughput(every_n_steps=6), clock],
        steps=6,
        data=PictureDataModule(pause=pause, validation_pause=validation_pause),
    )
    events = Events.read(tmp_path / "run")
    (speed,) = events.values("throughput/images_per_s")
    assert speed > 0
    assert events.last("throughput/tokens_per_s") == pytest.approx(TOKENS * speed, rel=1e-5)
    seconds = 6 * BATCH / speed
    # Three validations of three pictures each.
    assert seconds <= clock.seconds - 9 * validation_pause
    # Waits are counted between steps 1 and 2, 3 and 4, 5 and 6: the others hold a validation.
    waited = events.last("throughput/data_wait") * seconds
    assert 3 * BATCH * pause <= waited < seconds


def test_gradient_norms_are_those_before_clipping(watched: Watched) -> None:
    squares: dict[str, float] = {}
    for name, gradient in watched.gradients.items():
        part = name.split(".")[0]
        squares[part] = squares.get(part, 0) + float(gradient.double().square().sum())
    squares["total"] = sum(squares.values())
    assert "autoencoder" not in squares
    assert squares["total"] > (1e-3) ** 2, "clipping would not have shown"
    logged = {tag for tag in watched.events.tags("scalars") if tag.startswith("gradient_norm/")}
    assert logged == {f"gradient_norm/{part}" for part in squares}
    for part, square in squares.items():
        assert watched.events.last(f"gradient_norm/{part}") == pytest.approx(
            square**0.5, rel=1e-4
        ), part
    assert watched.events.steps("gradient_norm/total") == [0, 1, 2, 3]


def test_intervals_count_optimiser_steps_and_validations(tmp_path: Path) -> None:
    callbacks = [
        GradientNorms(every_n_steps=2),
        Throughput(every_n_steps=2),
        CodebookUsage(every_n_validations=2),
    ]
    stage = new_stage("entropy", tmp_path / "start")
    fit(stage, tmp_path / "run", callbacks, steps=5, accumulate_grad_batches=2)
    events = Events.read(tmp_path / "run")
    # The steps are at batches 2, 3 (the end of an epoch), 5, 6 and 8.
    assert events.steps("gradient_norm/total") == [0, 2, 4]
    assert events.steps("throughput/images_per_s") == [2, 4]
    # Validations are at batches 2, 4, 6 and 8; the check before training does not count.
    assert events.steps("codebook/dead") == [1, 4]


def test_faults_of_the_stream_are_logged(tmp_path: Path) -> None:
    for folder, first in (("train", 0), ("val", 50)):
        (tmp_path / folder).mkdir()
        for number, sample in enumerate(Pictures(3, first=first).samples):
            tensor_to_image(sample["image"]).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "train" / "damaged.png").write_bytes(b"not a picture")
    data = FolderDataModule(
        train_folder=tmp_path / "train",
        val_folder=tmp_path / "val",
        crop=64,
        max_zoom=1.0,
        batch_size=BATCH,
        num_workers=0,
    )
    stage = new_stage("entropy", tmp_path / "start")
    fit(stage, tmp_path / "run", [StreamFaults(every_n_steps=3)], steps=6, data=data)
    events = Events.read(tmp_path / "run")
    assert data.faults["corrupt_image"] >= 3
    assert events.last("data/faults/corrupt_image") == data.faults["corrupt_image"]
    assert events.last("data/faults/total") == data.faults["corrupt_image"]
    assert events.values("data/filtered/total") == [0, 0]
    assert events.steps("data/faults/total") == [3, 6]


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("callback", [*watchers(), StreamFaults()], ids=lambda c: type(c).__name__)
def test_a_run_without_tensorboard_is_refused(callback: L.Callback, tmp_path: Path) -> None:
    stage, name = new_stage("entropy", tmp_path / "start"), type(callback).__name__
    for logger, found in ((False, "none"), (CSVLogger(tmp_path), "CSVLogger")):
        with pytest.raises(ValueError, match=f"{name} logs to TensorBoard, .* is {found}: add"):
            fit(stage, tmp_path / "run", [callback], logger=logger)


@pytest.mark.parametrize("callback", watchers(), ids=lambda c: type(c).__name__)
def test_another_module_is_refused(callback: L.Callback, tmp_path: Path) -> None:
    autoencoder = PatchAutoencoder(
        latent_channels=4, encoder_width=8, encoder_blocks=1, decoder_width=8, decoder_blocks=1
    )
    stage = AutoencoderStage(
        autoencoder=autoencoder, optimization=Optimization(lr=1e-3, warmup_steps=0)
    )
    with pytest.raises(ValueError, match="FlowStage, not AutoencoderStage: remove it"):
        fit(stage, tmp_path / "run", [callback])


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is PictureDataModule: remove it"):
        fit(new_stage("entropy", tmp_path / "start"), tmp_path / "run", [StreamFaults()])


def test_averaging_after_the_clock_is_refused(tmp_path: Path) -> None:
    stage = new_stage("entropy", tmp_path / "start")
    with pytest.raises(ValueError, match="put WeightEMA before Throughput"):
        fit(stage, tmp_path / "run", [Throughput(), WeightEMA(decay=0.9)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodebookUsage(every_n_validations=0), "every_n_validations is 0"),
        (lambda: TokenRate(images=0), "images is 0"),
        (lambda: GradientNorms(every_n_steps=0), "every_n_steps is 0"),
        (lambda: Throughput(every_n_steps=-1), "every_n_steps is -1"),
        (lambda: StreamFaults(every_n_steps=0), "every_n_steps is 0"),
        (lambda: RateDistortionSamples(images=5, scatter_images=4), "images is 5"),
        (lambda: RateDistortionSamples(steps=()), "steps is empty"),
        (lambda: RateDistortionSamples(steps=(4, 0)), "steps is 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_fast_dev_run_computes_all_and_writes_nothing(tmp_path: Path) -> None:
    stage = new_stage("flow", tmp_path / "start")
    fit(stage, tmp_path / "run", watchers(), fast_dev_run=True)
    assert not (tmp_path / "run").exists()
