"""Where stage 2 starts from; a whole codec on small models of Stable Diffusion 3's classes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import httpx2
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

import percov2
from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.components import CodecComponents, load_autoencoder
from percov2.training import sd3_reference
from percov2.training.flow_start import (
    WIDENED,
    FromModel,
    FromScratch,
    FromStableDiffusion3,
    extend_strictly,
    load_transformer,
)
from percov2.training.hub import local_copy
from percov2.training.notice import write_notice
from tests.tiny_codec import save_tiny, tiny_components
from tests.tiny_models import CAPTIONS, tiny_sd3_pipeline, tiny_sd3_transformer, tiny_vae


@pytest.fixture(scope="module")
def sd3_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline saved by diffusers itself, in SD3's layout, with T5."""
    directory = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    tiny_sd3_pipeline(with_t5=True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("use_t5", [False, True])
def test_stable_diffusion_3_is_loaded_and_extended(sd3_directory: Path, use_t5: bool) -> None:
    start = FromStableDiffusion3(model=str(sd3_directory), use_t5=use_t5)
    start.check_text()
    transformer, text = start.build_transformer(7, 4), start.build_text()
    assert transformer.config.in_channels == 4 + 7
    assert transformer.config.out_channels == 4
    assert (transformer.pos_embed.proj.weight[:, 4:] == 0).all()
    assert text.has_t5 == use_t5
    assert transformer.dtype == torch.float32


def test_other_latents_than_stage_1s_are_refused(sd3_directory: Path) -> None:
    start = FromStableDiffusion3(model=str(sd3_directory), use_t5=False)
    with pytest.raises(ValueError, match="paints 4 latent channels, stage 1's autoencoder has 16"):
        start.build_transformer(7, 16)


def test_a_directory_without_t5_names_the_folder(
    sd3_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("no-t5")
    for folder in sd3_directory.iterdir():
        if not folder.name.endswith("_3"):
            (directory / folder.name).symlink_to(folder)
    start = FromStableDiffusion3(model=str(directory), use_t5=True)
    for refused in (start.build_text, start.check_text):
        with pytest.raises(ValueError, match="no folder text_encoder_3, tokenizer_3"):
            refused()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("proj_out.bias"), "proj_out.bias"),
        (lambda state: state.update(novelty=torch.zeros(1)), "novelty"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(3)}), "proj_out.bias"),
    ],
)
def test_weights_must_fit_key_by_key(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    tiny_sd3_transformer().save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=complaint):
        load_transformer(tmp_path)


def original_checkpoint(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Stability AI's own files have them, from the architecture alone.

    Esser et al. (2024), figure 2: two streams with weights of their own, joined in attention;
    every block modulates both with six vectors, the last one normalises the text stream only (two
    vectors) and ends it. SD3.5-medium adds a second attention of the pictures (three more vectors).
    """
    heads, depth = config["num_attention_heads"], config["num_layers"]
    assert isinstance(heads, int)
    assert isinstance(depth, int)
    dual, width = config.get("dual_attention_layers", ()), 64 * heads
    table = config["pos_embed_max_size"]
    assert isinstance(dual, tuple)
    assert isinstance(table, int)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, table**2, width)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def attention(name: str, *, puts_out: bool) -> None:
        linear(f"{name}.qkv", 3 * width, width)
        if puts_out:
            linear(f"{name}.proj", width, width)
        if "qk_norm" in config:
            shapes[f"{name}.ln_q.weight"] = shapes[f"{name}.ln_k.weight"] = (64,)

    shapes["x_embedder.proj.weight"] = (width, 16, 2, 2)
    shapes["x_embedder.proj.bias"] = (width,)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    linear("y_embedder.mlp.0", width, 2048)
    linear("y_embedder.mlp.2", width, width)
    linear("context_embedder", width, 4096)
    for i in range(depth):
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{i}.{stream}"
            ends = stream == "context_block" and i == depth - 1
            doubled = stream == "x_block" and i in dual
            attention(f"{name}.attn", puts_out=not ends)
            if doubled:
                attention(f"{name}.attn2", puts_out=True)
            linear(
                f"{name}.adaLN_modulation.1", (2 if ends else 9 if doubled else 6) * width, width
            )
            if not ends:
                linear(f"{name}.mlp.fc1", 4 * width, width)
                linear(f"{name}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", 2 * 2 * 16, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


# Values in the published files, table of positions included; the exact one is the total_size / 2 of
# https://huggingface.co/adamo1139/stable-diffusion-3.5-large-turbo-ungated, a copy of the turbo
# model, which has the same architecture. The others are sizes of files that hold 2 bytes a value:
# 4.17 GB (https://huggingface.co/ckpt/stable-diffusion-3-medium-diffusers) and 4.94 GB
# (https://huggingface.co/ckpt/stable-diffusion-3.5-medium), to the last digit shown.
PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": (4.17e9 / 2, 0.005e9 / 2),
    "stabilityai/stable-diffusion-3.5-medium": (4.94e9 / 2, 0.005e9 / 2),
    "stabilityai/stable-diffusion-3.5-large": (16_292_561_536 / 2, 0),
}


@pytest.mark.parametrize("model", sd3_reference.TRANSFORMERS)
def test_published_architectures_key_by_key(model: str) -> None:
    config = sd3_reference.TRANSFORMERS[model]
    transformer = sd3_reference.build_transformer(config)
    found = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    original = {
        name: torch.empty(shape, device="meta")
        for name, shape in original_checkpoint(config).items()
    }
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert found == {name: tuple(value.shape) for name, value in converted.items()}
    assert original == {}, "diffusers has no place for these"
    values, rounding = PUBLISHED[model]
    assert sum(torch.Size(shape).numel() for shape in found.values()) == pytest.approx(
        values, abs=rounding, rel=0
    )
    extended = extend_strictly(transformer, 336).state_dict()
    assert extended.keys() == found.keys()
    changed = [name for name, value in extended.items() if tuple(value.shape) != found[name]]
    assert tuple(changed) == WIDENED
    width = found[WIDENED[0]][0]
    assert tuple(extended[WIDENED[0]].shape) == (width, 16 + 336, 2, 2)


def test_published_sizes_of_the_frozen_parts() -> None:
    """Files of 168 MB (autoencoder), 1.39 GB (CLIP bigG) and 4.99 + 4.53 GB (T5), 2 bytes a value.

    From the same copies as `PUBLISHED`; CLIP L's 247 MB is not shown there.
    """
    parts = sd3_reference.frozen_parts()
    _, clip_g, t5 = (sd3_reference.parameter_count(e) for e in sd3_reference.build_text_encoders())
    assert 2 * parts.autoencoder == pytest.approx(168e6, abs=0.5e6)
    assert 2 * clip_g == pytest.approx(1.39e9, abs=0.005e9)
    assert 2 * t5 == pytest.approx(9.52e9, abs=0.01e9)
    assert parts.t5 == t5
    assert parts.clip > clip_g


def test_t5_takes_the_bytes_that_are_counted(tmp_path: Path) -> None:
    """Its files are in float16, and transformers widens some layers of those."""
    config = T5Config(**(sd3_reference.T5_XXL | {"d_ff": 96, "d_model": 32, "num_heads": 4}))
    T5EncoderModel(config).half().save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path)
    taken = sum(parameter.nbytes for parameter in loaded.parameters())
    parts = sd3_reference.FrozenParts(
        autoencoder=0,
        clip=0,
        t5=sd3_reference.parameter_count(loaded),
        t5_widened=sd3_reference.widened_count(loaded),
    )
    assert parts.text_bytes(use_t5=True) == taken
    assert taken > 2 * parts.t5
    assert parts.text_bytes(use_t5=False) == 0


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of stabilityai/stable-diffusion-3-medium-diffusers"):
        sd3_reference.transformer_config("someone/something")


def test_the_architecture_of_a_directory_is_its_own(sd3_directory: Path) -> None:
    config = sd3_reference.transformer_config(str(sd3_directory))
    stored = json.loads((sd3_directory / "transformer" / "config.json").read_text())
    assert config["num_layers"] == stored["num_layers"] == 2
    assert isinstance(sd3_reference.build_transformer(config), SD3Transformer2DModel)


REFUSALS = {
    "gated": (401, "GatedRepo"),
    "denied": (403, "GatedRepo"),
    "unknown": (404, "RepoNotFound"),
    "bare": (404, "EntryNotFound"),
    "old": (404, "RevisionNotFound"),
}


class _Hub(BaseHTTPRequestHandler):
    """Refuses as the hub does; the repository's name says how."""

    def _refuse(self) -> None:
        name = next(part for part in self.path.split("/") if part in REFUSALS)
        status, code = REFUSALS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET = _refuse  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of a local server that refuses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE set when the process starts."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "gated",
            r"accept its licence on https://huggingface\.co/owner/gated, then log in here with "
            r"`hf auth login` or set HF_TOKEN",
        ),
        ("denied", r"this account has no access: accept .*https://huggingface\.co/owner/denied"),
        ("unknown", "there is no public repository owner/unknown: check the name"),
        ("bare", "owner/bare is not in diffusers' layout"),
        ("old", "owner/old has no revision 'main-2'"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    _use_hub(monkeypatch, hub, tmp_path)
    start = FromStableDiffusion3(model=f"owner/{name}@main-2", use_t5=False)
    with pytest.raises(ValueError, match=complaint) as refusal:
        start.build_text()
    assert "\n" not in str(refusal.value)


def test_no_network_is_told_from_no_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        unused = server.server_port
    _use_hub(monkeypatch, f"http://127.0.0.1:{unused}", tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match="the hub cannot be reached: check the network"):
            local_copy("owner/gated", ["vae"])


@pytest.mark.parametrize(
    "error", [httpx2.ReadError("reset"), httpx2.ProxyError("403"), OSError(28, "No space left")]
)
def test_what_a_transfer_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("percov2.training.hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"cannot fetch owner/name .*: try again") as refusal:
        local_copy("owner/name", ["vae"])
    assert "\n" not in str(refusal.value)


def test_the_hub_is_asked_once(sd3_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoders of a run on cached text are loaded at its end, when it may be away."""
    asked: list[tuple[str, str | None]] = []

    def download(model: str, _: str, *, revision: str | None) -> None:
        asked.append((model, revision))

    monkeypatch.setattr("percov2.training.hub.hf_hub_download", download)
    monkeypatch.setattr(
        "percov2.training.hub.snapshot_download", lambda *_, **__: str(sd3_directory)
    )
    start = FromStableDiffusion3(model="owner/name@refs/pr/3", use_t5=False)
    start.check_text()
    first = list(asked)
    assert set(first) == {("owner/name", "refs/pr/3")}
    start.build_text()
    start.build_transformer(3, 4)
    assert asked == first


def test_neither_directory_nor_hub_id() -> None:
    with pytest.raises(ValueError, match="neither a directory nor a hub id"):
        local_copy("no/such/folder", ["vae"])


def test_stage_1_takes_the_autoencoder_out_of_the_hubs_layout(tmp_path: Path) -> None:
    """What `hf download MODEL --include 'vae/*' --local-dir DIR` leaves: half precision."""
    tiny_vae(levels=4, latent_channels=16).half().save_pretrained(tmp_path / "vae")
    autoencoder = load_autoencoder(local_copy(str(tmp_path), ["vae"]))
    assert autoencoder.latent_channels == 16
    assert all(p.dtype == torch.float32 for p in autoencoder.parameters())


def test_text_encoders_that_are_put_off_must_be_complete(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    start = FromModel(directory=tmp_path)
    start.check_text()
    (tmp_path / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text_encoder_2 lacks config\.json or weights"):
        start.check_text()


def test_a_model_passes_its_notice_on(tmp_path: Path) -> None:
    assert FromModel(directory=tmp_path).changes() == ()
    changes = FromStableDiffusion3(model="owner/sd3", use_t5=False).changes()
    write_notice(tmp_path, [*changes, changes[0]])
    assert FromModel(directory=tmp_path).changes() == changes
    text = (tmp_path / "NOTICE").read_text(encoding="utf-8")
    assert text.startswith(
        "This Stability AI Model is licensed under the Stability AI Community License, Copyright "
        "© Stability AI Ltd. All Rights Reserved\n"
    )
    assert "owner/sd3" in text
    assert "Powered by Stability AI" in text


def test_another_rate_of_other_widths_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match="same widths"):
        FromModel(directory=tmp_path).build_transformer(99, 4)


def test_a_models_decoder_comes_with_its_flow_and_its_encoder_does_not(tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    with torch.no_grad():
        for p in model.tokenizer.autoencoder.parameters():
            p.add_(0.5)
    model.save(tmp_path)
    own = tiny_components().tokenizer.autoencoder
    before = {key: value.clone() for key, value in own.state_dict().items()}
    FromModel(directory=tmp_path).take_over_decoder(own)
    changed = {
        key for key, value in own.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {f"decoder_{name}" for name, _ in own.decoder.named_parameters()}


def test_a_model_with_another_autoencoder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    other = StableDiffusionAutoencoder(tiny_vae(levels=4))
    with pytest.raises(ValueError, match="its autoencoder differs from stage 1's"):
        FromModel(directory=tmp_path).take_over_decoder(other)


def test_from_scratch_learns_its_vocabulary_from_the_captions(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    start = FromScratch(
        num_layers=1,
        num_heads=2,
        head_dim=8,
        max_patches=8,
        captions=tmp_path / "captions.txt",
        vocab_size=520,
        text_length=12,
        text_dim=8,
        text_layers=2,
        text_heads=1,
    )
    transformer, text = start.build_transformer(5, 4), start.build_text()
    assert transformer.config.in_channels == 9
    assert text(["a cat"]).embeddings.shape == (1, 12, 16)
    with pytest.raises(ValueError, match="start is FromScratch: no cache can hold"):
        start.check_text()


def test_a_codec_with_stable_diffusion_3s_autoencoder(
    tmp_path: Path, photograph: Image.Image
) -> None:
    torch.manual_seed(0)
    vae = StableDiffusionAutoencoder(tiny_vae(levels=4))
    components = tiny_components()
    tokenizer = replace(components.tokenizer, autoencoder=vae.eval())
    replace(components, tokenizer=tokenizer).save(tmp_path)
    assert (tmp_path / "vae" / "config.json").is_file()
    loaded = CodecComponents.load(tmp_path)
    assert isinstance(loaded.tokenizer.autoencoder, StableDiffusionAutoencoder)
    codec = percov2.load(str(tmp_path))
    data = codec.compress(photograph, caption="a")
    assert np.array_equal(codec.decode_tokens(data), codec.encode_tokens(photograph))
    assert codec.decompress(data, steps=2).size == photograph.size
