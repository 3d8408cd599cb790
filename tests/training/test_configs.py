"""Every shipped configuration: built at full size without memory, and run for two steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import percov2
from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.analysis.hyper_encoder import RATES
from percov2.components import TokenizerComponents
from percov2.fit import FitCLI, main
from percov2.model_card import NOTICE_NAME
from percov2.synthesis.flow_transformer import extend_patch_embedding
from percov2.synthesis.text_conditioner import TextConditioner
from percov2.training import EntropyStage, FlowStage
from percov2.training.flow_start import FromStableDiffusion3
from percov2.training.notice import read_changes
from percov2.training.sd3_reference import build_autoencoder, build_transformer, transformer_config
from tests.synthesis.test_text_conditioner import conditioner_of
from tests.tiny_models import tiny_sd3_pipeline, tiny_vae

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OVERLAYS = Path(__file__).parent / "overlays"
STRATEGIES = sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml"))
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))


class ParseOnly(FitCLI):
    """Reads a configuration; builds nothing."""

    def instantiate_classes(self) -> None:
        """Left to the test."""

    def build(self) -> Any:
        """Everything that the configuration names, on the meta device."""
        with torch.device("meta"):
            return self.parser.instantiate_classes(self.config)


def arguments(*configs: str, **variables: object) -> list[str]:
    """Command line of configurations below `configs`, and values of `vars`."""
    paths = [f"--config={CONFIGS / config}" for config in configs]
    return paths + [f"--vars.{name}={value}" for name, value in variables.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, training_data: Path) -> Path:
    """What the shipped data configurations expect below `vars.data`."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(training_data, folder, dirs_exist_ok=True)
    for part, shard in (("train", "00000"), ("val", "00008")):
        (folder / "laion" / part).mkdir(parents=True)
        source = training_data / "laion-mini" / f"{shard}.tar"
        shutil.copy(source, folder / "laion" / part / "00000.tar")
        _write_pictures(folder / "pictures" / part, range(4))
        annotations = folder / "coco" / "annotations"
        annotations.mkdir(exist_ok=True, parents=True)
        numbers = range(4) if part == "train" else range(4, 8)
        _write_pictures(folder / "coco" / f"{part}2017", numbers)
        images = [
            {"id": n, "file_name": f"{n:012d}.jpg", "width": 320, "height": 300} for n in numbers
        ]
        captions = [{"id": n, "image_id": n, "caption": f"picture {n}"} for n in numbers]
        text = json.dumps({"images": images, "annotations": captions})
        (annotations / f"captions_{part}2017.json").write_text(text)
    return folder


def _write_pictures(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        picture = Image.effect_noise((320, 300), 20 + 10 * number).convert("RGB")
        picture.save(folder / f"{number:012d}.jpg")
        (folder / f"{number:012d}.txt").write_text(f"picture {number}")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3 in diffusers' layout, tiny, with an autoencoder that reduces by 8."""
    pipeline = tiny_sd3_pipeline(with_t5=True)
    pipeline.vae = tiny_vae(levels=4)
    directory = tmp_path_factory.mktemp("hub") / "sd3"
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3's networks have their published sizes, and no weights instead of fetched ones."""
    monkeypatch.setattr("percov2.training.entropy_stage.local_copy", lambda *_: Path("sd3"))
    monkeypatch.setattr(
        "percov2.training.entropy_stage.load_autoencoder",
        lambda _: StableDiffusionAutoencoder(build_autoencoder()),
    )

    def build(self: FromStableDiffusion3, condition_channels: int, latent_channels: int) -> Any:
        transformer = build_transformer(transformer_config(self.model))
        assert transformer.config.in_channels == latent_channels
        return extend_patch_embedding(transformer, condition_channels)

    def build_text(self: FromStableDiffusion3) -> TextConditioner:
        return conditioner_of(tiny_sd3_pipeline(with_t5=True), use_t5=self.use_t5)

    monkeypatch.setattr(FromStableDiffusion3, "build_transformer", build)
    monkeypatch.setattr(FromStableDiffusion3, "build_text", build_text)


def test_no_configuration_escapes_these_tests() -> None:
    known = {"stage1.yaml", "stage2.yaml", "slurm.yaml"}
    known |= {f"rate/{rate}.yaml" for rate in RATES}
    known |= {f"strategy/{name}.yaml" for name in ("ddp", "zero2", "zero3", "zero3_offload")}
    known |= {f"data/{name}.yaml" for name in ("coco", "folder", "laion")}
    known |= {f"tiny/{name}.yaml" for name in ("autoencoder", "stage1", "masked", "stage2")}
    known |= {f"tiny/{name}.yaml" for name in ("adversarial", "joint", "masked_joint", "settle")}
    known |= {"tiny/64_tokens.yaml"}
    known |= {f"tiny/low/{name}.yaml" for name in ("adversarial", "masked", "stage1")}
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert found == known


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("rate", RATES)
def test_both_stages_are_built_at_full_size(
    rate: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = f"rate/{rate}.yaml"
    first = ParseOnly(arguments("stage1.yaml", overlay, data=data)).build().model
    assert isinstance(first, EntropyStage)
    parts = first.components()
    assert all(p.is_meta for p in parts.hyper_encoder.parameters())
    assert parts.hyper_encoder.config.reduction == RATES[rate].reduction
    assert parts.quantizer.codebook_size == RATES[rate].codebook_size
    # DESIGN: N = 192 and M = 320 make 4.1 to 5.9 million parameters.
    assert 4.05e6 < sum(p.numel() for p in parts.hyper_encoder.parameters()) < 5.95e6

    monkeypatch.setattr(TokenizerComponents, "load", lambda _: parts)
    monkeypatch.setattr("percov2.training.flow_stage.PerceptualLoss", lambda net: net)
    second = ParseOnly(arguments("stage2.yaml", overlay, data=data)).build().model
    assert isinstance(second, FlowStage)
    assert second.config.latents_per_token == RATES[rate].reduction
    assert second.config.name == f"sd3-{rate}"
    assert (second.lpips is not None) == (RATES[rate].bits_per_pixel > 0.05)
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {f"transformer.{name}" for name, _ in second.transformer.named_parameters()}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    "overlay", [*(f"strategy/{s}" for s in STRATEGIES), *(f"data/{d}" for d in DATA), "slurm"]
)
def test_overlays_are_built_with_stage_1(overlay: str, data: Path) -> None:
    built = ParseOnly(arguments("stage1.yaml", f"{overlay}.yaml", data=data)).build()
    kind, _, name = overlay.rpartition("/")
    if kind == "strategy":
        assert ("Zero" in type(built.trainer.strategy).__name__) == name.startswith("zero")
    elif kind == "data":
        assert type(built.data).__name__.lower() == f"{name}datamodule"
        assert built.data.batch_size == 20
    else:
        assert type(built.trainer.plugins[0]).__name__ == "SLURMEnvironment"


def _run(stage: str, root: Path, data: Path, *options: str, overlays: tuple[str, ...] = ()) -> Path:
    run = root / stage
    args = arguments(f"{stage}.yaml", *overlays, data=data, run=run)
    main([*args, f"--config={OVERLAYS / stage}.yaml", *options])
    return run / "model"


def _train(root: Path, data: Path, sd3: Path, *overlays: str) -> Path:
    first = _run("stage1", root, data, f"--vars.autoencoder={sd3}", overlays=overlays)
    options = (f"--vars.tokenizer={first}", f"--model.start.init_args.model={sd3}")
    return _run("stage2", root, data, *options, overlays=overlays)


def test_shrunken_stages_run_and_make_a_codec(data: Path, sd3: Path, tmp_path: Path) -> None:
    model = _train(tmp_path, data, sd3)
    codec = percov2.load(str(model))
    stream = codec.compress(Image.effect_noise((100, 80), 40).convert("RGB"), caption="noise")
    assert codec.decode_tokens(stream).shape == (5, 7)
    assert codec.decompress(stream, steps=1).size == (100, 80)
    notice = (model / NOTICE_NAME).read_text()
    assert (
        "licensed under the Stability AI Community License, Copyright © Stability AI Ltd" in notice
    )
    assert f"- transformer: that of {sd3}, its patch embedding widened" in notice
    assert "- vae: the autoencoder of Stable Diffusion 3" in notice
    # What stage 1 passes on is the autoencoder alone.
    assert len(read_changes(tmp_path / "stage1" / "model")) == 1
    resolved = (model / "training.yaml").read_text()
    assert "${" not in resolved
    assert "FromStableDiffusion3" in resolved


@pytest.mark.slow
@pytest.mark.usefixtures("random_backbone")
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_runs(rate: str, data: Path, sd3: Path, tmp_path: Path) -> None:
    codec = percov2.load(str(_train(tmp_path, data, sd3, f"rate/{rate}.yaml")))
    assert codec.config.name == f"sd3-{rate}"


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [*(f"data/{d}.yaml" for d in DATA), "strategy/ddp.yaml"])
def test_every_overlay_runs(overlay: str, data: Path, sd3: Path, tmp_path: Path) -> None:
    small = (
        "--data.init_args.filters.min_size=16"
        if overlay.startswith("data")
        else "--seed_everything=2"
    )
    args = arguments("stage1.yaml", overlay, data=data, run=tmp_path, autoencoder=sd3)
    args += [f"--config={OVERLAYS / 'stage1.yaml'}", small]
    # In a process of its own: process groups and their ports outlive a run.
    subprocess.run([sys.executable, "-m", "percov2.fit", *args], check=True, cwd=ROOT)
    assert TokenizerComponents.load(tmp_path / "model").quantizer.codebook_size == 256
