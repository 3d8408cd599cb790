"""Model directories: what is saved is what is loaded, and nothing else is accepted."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.components import (
    CodecComponents,
    CodecConfig,
    TokenizerComponents,
    compute_model_id,
    is_half,
    load_autoencoder,
    load_component,
    read_index,
    save_autoencoder,
)
from percov2.data.cached import save_empty
from percov2.entropy.schedules import SCHEDULES
from percov2.model_store import INDEX_NAME
from percov2.synthesis.flow_transformer import predict_velocity
from percov2.synthesis.latent_decoder import LatentDecoder
from tests.tiny_codec import CODEBOOK_SIZE, save_tiny, tiny_components
from tests.tiny_models import tiny_vae

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FOLDERS = ("autoencoder", "hyper_encoder", "quantizer", "latent_decoder", "masked_transformer")


@pytest.fixture(scope="module")
def components() -> CodecComponents:
    return tiny_components()


@pytest.fixture(scope="module")
def saved(components: CodecComponents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that no test changes."""
    directory = tmp_path_factory.mktemp("models") / "new" / "model"
    components.save(directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def all_parts(components: CodecComponents) -> dict[str, nn.Module]:
    return {
        **components.tokenizer.modules(),
        "transformer": components.transformer,
        "text_conditioner": components.text_conditioner,
    }


def weights(components: CodecComponents) -> dict[str, Tensor]:
    return {
        f"{part}.{key}": value
        for part, module in all_parts(components).items()
        for key, value in module.state_dict().items()
    }


def assert_equal_weights(left: CodecComponents, right: CodecComponents) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


def model_id(components: CodecComponents) -> int:
    parts = components.tokenizer
    return compute_model_id(
        parts.masked_transformer, parts.quantizer.codebook, components.config.schedule
    )


@torch.no_grad()
def outputs(components: CodecComponents) -> list[Tensor]:
    """What every part makes of one picture, one after the other."""
    parts = components.tokenizer
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    latents = parts.autoencoder.encode(picture)
    quantized = parts.quantizer(parts.hyper_encoder(latents))
    condition, prediction = parts.latent_decoder.condition(quantized.features)
    known = torch.zeros_like(quantized.tokens, dtype=torch.bool)
    known[:, ::2] = True
    logits = parts.masked_transformer(quantized.tokens, known, ~known)
    text = components.text_conditioner(["a dog runs"])
    velocity = predict_velocity(
        components.config.flow,
        components.transformer,
        latents,
        condition,
        torch.tensor([0.5]),
        text.embeddings,
        text.pooled,
    )
    decoded = parts.autoencoder.decode(prediction)
    return [latents, quantized.tokens, prediction, logits, text.pooled, velocity, decoded]


def refusal(directory: Path) -> str:
    """The message with which a directory is refused: one line that names the directory."""
    with pytest.raises(ValueError, match=re.escape(str(directory))) as refused:
        CodecComponents.load(directory)
    message = str(refused.value)
    assert "\n" not in message
    return message


# -- round trips ---------------------------------------------------------------------------------


def test_loaded_model_equals_the_saved_one(components: CodecComponents, saved: Path) -> None:
    loaded = CodecComponents.load(saved)
    assert loaded.config == components.config
    assert_equal_weights(loaded, components)
    for found, expected in zip(outputs(loaded), outputs(components), strict=True):
        assert torch.equal(found, expected)
    assert not any(module.training for module in all_parts(loaded).values())


def test_directory_has_diffusers_layout_without_pickles(saved: Path) -> None:
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    for folder in (*FOLDERS, "transformer"):
        assert {f"{folder}/config.json", f"{folder}/{WEIGHTS_NAME}"} <= files
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json", INDEX_NAME} <= files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".txt"}


def test_index_round_trips(components: CodecComponents) -> None:
    assert CodecConfig.from_json(components.config.to_json()) == components.config


def test_dtype_is_that_of_transformer_and_text_only(saved: Path) -> None:
    loaded = CodecComponents.load(saved, dtype=torch.bfloat16)
    found = {
        part: {value.dtype for value in module.parameters()}
        for part, module in all_parts(loaded).items()
    }
    half = {"transformer", "text_conditioner"}
    assert found == {
        part: {torch.bfloat16 if part in half else torch.float32} for part in all_parts(loaded)
    }


def test_stage_1_directory_loads_without_stage_2(
    components: CodecComponents, tmp_path: Path
) -> None:
    components.tokenizer.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FOLDERS)
    loaded = TokenizerComponents.load(tmp_path)
    assert_equal_weights(replace(components, tokenizer=loaded), components)


def test_sd3_autoencoder_is_saved_as_vae(tmp_path: Path) -> None:
    original = StableDiffusionAutoencoder(tiny_vae(levels=4))
    save_autoencoder(original, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    loaded = load_autoencoder(tmp_path)
    assert isinstance(loaded, StableDiffusionAutoencoder)
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.encode(picture), original.encode(picture))


# -- half precision ------------------------------------------------------------------------------


def test_half_stores_float16_and_leaves_the_model_alone(
    components: CodecComponents, tmp_path: Path
) -> None:
    before = {key: value.clone() for key, value in weights(components).items()}
    components.save(tmp_path, half=True)
    for key, value in weights(components).items():
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key
    stored = [load_file(path) for path in tmp_path.rglob("*.safetensors")]
    assert len(stored) == len(FOLDERS) + 3
    dtypes = {
        value.dtype
        for state in stored
        for name, value in state.items()
        if not name.startswith("ema_")
    }
    assert dtypes - {torch.int64} == {torch.float16}
    assert is_half(tmp_path)


def test_half_keeps_counts_beyond_float16(components: CodecComponents, tmp_path: Path) -> None:
    quantizer = copy.deepcopy(components.tokenizer.quantizer)
    quantizer.ema_counts[3] = 7e4
    tokenizer = replace(components.tokenizer, quantizer=quantizer)
    replace(components, tokenizer=tokenizer).save(tmp_path, half=True)
    found = CodecComponents.load(tmp_path).tokenizer.quantizer
    assert torch.equal(found.ema_counts, quantizer.ema_counts)
    assert torch.equal(found.ema_sums, quantizer.ema_sums)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_are_as_readable_as_any_new_file(
    components: CodecComponents, tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        components.save(tmp_path / "model")
        components.tokenizer.save(tmp_path / "tokenizer")
        save_empty(tmp_path / "empty.safetensors", torch.ones(2, 3), torch.ones(3))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_half_model_has_the_id_of_its_rounded_weights(
    components: CodecComponents, tmp_path: Path
) -> None:
    components.save(tmp_path / "half", half=True)
    loaded, again = (CodecComponents.load(tmp_path / "half") for _ in range(2))
    assert_equal_weights(loaded, again)
    assert model_id(loaded) == loaded.config.model_id != components.config.model_id
    assert replace(loaded.config, model_id=components.config.model_id) == components.config
    for key, value in weights(components).items():
        rounded = value if "ema_" in key else value.half().to(value.dtype)
        assert torch.equal(weights(loaded)[key], rounded), key
    # Rounded weights are kept by rounding again, and by full precision.
    for half in (True, False):
        loaded.save(tmp_path / f"{half}", half=half)
        assert read_index(tmp_path / f"{half}") == loaded.config


# -- the model id --------------------------------------------------------------------------------


def test_id_depends_on_every_weight_of_the_masked_transformer() -> None:
    components = tiny_components()
    found = {"untouched": model_id(components)}
    for name, parameter in components.tokenizer.masked_transformer.named_parameters():
        last = parameter.data.view(-1)[-1:]
        kept = last.clone()
        last.add_(0.01)  # several units of any of the integers
        found[name] = model_id(components)
        last.copy_(kept)
    assert len(set(found.values())) == len(found)
    assert model_id(components) == found["untouched"]
    assert all(0 <= value < 2**16 for value in found.values())


def test_id_is_that_of_the_integers_and_not_of_the_floats() -> None:
    """A change too small for the integers codes alike, and is the same model."""
    components = tiny_components()
    before = model_id(components)
    weight = components.tokenizer.masked_transformer.token_embedding.weight.data
    weight.mul_(2**9).round_().mul_(2.0**-9)
    assert model_id(components) == before
    weight.add_(2.0**-12)
    assert model_id(components) == before


def test_id_depends_on_codebook_and_schedule(components: CodecComponents) -> None:
    parts = components.tokenizer
    found = {
        schedule: compute_model_id(parts.masked_transformer, parts.quantizer.codebook, schedule)
        for schedule in SCHEDULES
    }
    assert len(set(found.values())) == len(SCHEDULES)
    codebook = parts.quantizer.codebook.clone()
    codebook[CODEBOOK_SIZE - 1, -1] += 1e-4
    changed = compute_model_id(parts.masked_transformer, codebook, components.config.schedule)
    assert changed != components.config.model_id


def test_id_does_not_depend_on_how_weights_are_stored(components: CodecComponents) -> None:
    parts = tiny_components().tokenizer
    masked, codebook = parts.masked_transformer.half(), parts.quantizer.codebook.half()
    half = compute_model_id(masked, codebook, "var")
    assert compute_model_id(masked.float(), codebook.float(), "var") == half


def test_saving_computes_the_id_afresh(components: CodecComponents, tmp_path: Path) -> None:
    unnumbered = replace(components, config=replace(components.config, model_id=0))
    unnumbered.save(tmp_path)
    assert read_index(tmp_path) == components.config


# -- refusals: files -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [*FOLDERS, "transformer"])
def test_missing_folder(copied: Path, folder: str) -> None:
    shutil.rmtree(copied / folder)
    assert f"has no {folder}/config.json" in refusal(copied)


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "text_conditioner.json"])
def test_missing_text_part(copied: Path, name: str) -> None:
    path = copied / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=name) as refused:
        CodecComponents.load(copied)
    assert "\n" not in str(refused.value)


def test_missing_index(copied: Path) -> None:
    (copied / INDEX_NAME).unlink()
    assert f"has no {INDEX_NAME}" in refusal(copied)


def test_missing_weights_file(copied: Path) -> None:
    (copied / "quantizer" / WEIGHTS_NAME).unlink()
    assert WEIGHTS_NAME in refusal(copied)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _garble(path: Path) -> None:
    path.write_bytes(b"not safetensors" * 9)


@pytest.mark.parametrize("damage", [_truncate, _garble])
def test_damaged_weights_file(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied / "transformer" / WEIGHTS_NAME)
    message = refusal(copied)
    assert f"cannot load {copied / 'transformer'}" in message
    assert "download" in message


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("hyper_encoder", "layers.0.weight"),
        ("quantizer", "codebook"),
        ("masked_transformer", "mask_embedding"),
        ("transformer", "proj_out.weight"),
    ],
)
def test_weights_that_do_not_fit(copied: Path, folder: str, key: str) -> None:
    path = copied / folder / WEIGHTS_NAME
    intact = path.read_bytes()
    edit_weights(path, lambda state: state.pop(key))
    assert f"{folder} do not fit its config.json: {{'missing_keys': ['{key}']}}" in refusal(copied)
    path.write_bytes(intact)
    edit_weights(path, lambda state: state.update(surplus=torch.zeros(1)))
    assert "{'unexpected_keys': ['surplus']}" in refusal(copied)
    path.write_bytes(intact)
    edit_weights(path, lambda state: state.update({key: torch.zeros(3, 7)}))
    message = refusal(copied)
    assert f"{key} expected shape" in message
    assert "download" in message


def test_component_of_another_class(copied: Path) -> None:
    shutil.rmtree(copied / "quantizer")
    shutil.copytree(copied / "hyper_encoder", copied / "quantizer")
    assert "is of HyperEncoder, not of VectorQuantizer" in refusal(copied)


def test_component_without_a_setting(copied: Path) -> None:
    path = copied / "latent_decoder" / "config.json"
    config = json.loads(path.read_text())
    del config["blocks"]
    path.write_text(json.dumps(config))
    assert "'blocks'" in refusal(copied)


def test_directory_without_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no autoencoder/config\.json"):
        load_autoencoder(tmp_path)


def test_load_component_names_the_folder(saved: Path) -> None:
    assert isinstance(load_component(LatentDecoder, saved, "latent_decoder"), LatentDecoder)
    with pytest.raises(ValueError, match=r"has no decoder/config\.json"):
        load_component(LatentDecoder, saved, "decoder")


# -- refusals: mixed models ----------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["quantizer", "masked_transformer"])
def test_files_of_two_models_are_noticed(copied: Path, tmp_path: Path, folder: str) -> None:
    save_tiny(tmp_path / "other", seed=7)
    shutil.rmtree(copied / folder)
    shutil.copytree(tmp_path / "other" / folder, copied / folder)
    message = refusal(copied)
    assert "files of two models are mixed" in message
    assert f"{read_index(copied).model_id:#06x}" in message


def test_schedule_of_another_model_is_noticed(copied: Path) -> None:
    edit_index(copied, lambda index: index.update(schedule="var"))
    assert "files of two models are mixed" in refusal(copied)


def test_parts_must_fit_together(components: CodecComponents) -> None:
    with pytest.raises(ValueError, match="latents_per_token is 4, the hyper-encoder reduces by 2"):
        replace(components, config=replace(components.config, latents_per_token=4))
    narrow = LatentDecoder.from_config(
        components.tokenizer.latent_decoder.config, latent_channels=3
    )
    with pytest.raises(ValueError, match="takes 24 channels, latents and condition have 23"):
        replace(components, tokenizer=replace(components.tokenizer, latent_decoder=narrow))


# -- refusals: the index -------------------------------------------------------------------------


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(_class_name="StableDiffusion3Pipeline"), "StableDiffusion3Pipeline"),
        (lambda i: i.pop("_class_name"), "is of class None"),
        (lambda i: i.update(surplus=1), "'surplus'"),
        (lambda i: i["flow"].update(surplus=1), "'surplus'"),
        (lambda i: i["tiling"].update(surplus=1), "'surplus'"),
        (lambda i: i.pop("default_steps"), "'default_steps'"),
        (lambda i: i.pop("flow"), "'flow'"),
        (lambda i: i["flow"].pop("sigma"), "'sigma'"),
        (lambda i: i.update(flow=3), "does not fit"),
        (lambda i: i.update(schedule="zigzag"), "schedule is 'zigzag'"),
        (lambda i: i.update(model_id="0x12"), "model_id is '0x12'"),
        (lambda i: i.update(model_id=2**16), "model_id is 65536"),
        (lambda i: i.update(default_steps=0), "default_steps 0"),
        (lambda i: i.update(sharpness=-1), "sharpness is -1"),
        (lambda i: i.update(grain=float("inf")), "grain is inf"),
        (lambda i: i["flow"].update(shift=0.5), "shift is 0.5"),
        (lambda i: i["tiling"].update(size=7), "tile size 7"),
    ],
)
def test_bad_index(copied: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_index(copied, change)
    assert message in refusal(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_index_that_is_no_object(copied: Path, text: str) -> None:
    (copied / INDEX_NAME).write_text(text)
    assert INDEX_NAME in refusal(copied)
