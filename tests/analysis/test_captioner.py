"""Captioners, run on tiny random models saved to disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from percov2.analysis.captioner import (
    KNOWN_CAPTIONERS,
    GivenCaptioner,
    HubCaptioner,
    NoCaptioner,
    make_captioner,
)
from tests.tiny_models import (
    SYLLABLES,
    save_tiny_blip2,
    save_tiny_llava,
    syllable_tokenizer,
    tiny_clip_encoder,
    tiny_clip_tokenizer,
)

RED = Image.new("RGB", (40, 30), "red")
GRADIENT = Image.linear_gradient("L")


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("blip2")
    save_tiny_blip2(directory)
    return str(directory)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("llava")
    save_tiny_llava(directory)
    return str(directory)


def test_captions_without_a_model() -> None:
    assert NoCaptioner().caption(RED) == ""
    assert GivenCaptioner("a red wall").caption(RED) == "a red wall"
    assert make_captioner("none", device="cpu") == NoCaptioner()


def test_blip2_speaks_one_repeatable_line(blip2: str) -> None:
    captioner = make_captioner(f"auto:{blip2}", device="cpu")
    caption = captioner.caption(GRADIENT)
    # The model puts each syllable on a line of its own.
    assert len(caption.split(" ")) == 32
    assert set(caption.split(" ")) <= set(SYLLABLES)
    assert captioner.caption(GRADIENT) == caption
    assert make_captioner(f"auto:{blip2}", device="cpu").caption(GRADIENT) == caption
    assert captioner.caption(RED) != caption


@pytest.mark.parametrize("model", ["blip2", "llava"])
def test_prompt_steers_and_is_not_repeated(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(model)
    plain = HubCaptioner(directory, device="cpu", max_new_tokens=8)
    prompted = HubCaptioner(directory, device="cpu", max_new_tokens=8, prompt="a photo of")
    caption = prompted.caption(RED)
    assert caption != plain.caption(RED)
    assert set(caption.split(" ")) <= set(SYLLABLES)
    assert len(caption.split(" ")) == 8


def test_dtype_is_used(blip2: str) -> None:
    captioner = HubCaptioner(blip2, device="cpu", dtype=torch.bfloat16, max_new_tokens=2)
    assert captioner._model.dtype == torch.bfloat16
    assert captioner.caption(RED)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_blip2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["language_projection.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['language_projection.bias'\]"):
        HubCaptioner(str(tmp_path), device="cpu")


def test_models_that_do_not_caption_are_refused_in_one_line(tmp_path: Path) -> None:
    tiny_clip_encoder().save_pretrained(tmp_path)
    tiny_clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load captioner .*CLIPTextConfig") as caught:
        HubCaptioner(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["", "auto:", "blip2", "a dog on a beach", "AUTO"])
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="captioner must be 'none', 'auto'"):
        make_captioner(spec, device="cpu")


def test_length_must_be_positive(blip2: str) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        HubCaptioner(blip2, device="cpu", max_new_tokens=0)


@pytest.mark.parametrize(
    ("spec", "model"),
    [
        ("auto", KNOWN_CAPTIONERS["blip2"]),
        ("auto:molmo", KNOWN_CAPTIONERS["molmo"]),
        ("auto:no/such-model", "no/such-model"),
    ],
)
def test_unreachable_model_names_the_remedy(
    spec: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"cannot load captioner {model}") as caught:
        make_captioner(spec, device="cpu")
    assert "--caption none" in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIG_CODE = """
from transformers import PreTrainedConfig

class ParrotConfig(PreTrainedConfig):
    model_type = "parrot"
"""
PROCESSOR_CODE = """
import torch
from transformers import ProcessorMixin

class ParrotProcessor(ProcessorMixin):
    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def process(self, images, text):
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        size = torch.tensor(images[0].size, dtype=torch.float32)
        return {"input_ids": ids, "size": size}
"""
MODEL_CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_parrot import ParrotConfig

class ParrotModel(PreTrainedModel):
    config_class = ParrotConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))
        self.post_init()

    def generate_from_batch(self, batch, options, tokenizer):
        assert batch["size"].dtype == self.dtype and not options.do_sample
        words = f"\\n{int(batch['size'][0, 0])}\\n {int(batch['size'][0, 1])}"
        new = tokenizer(words, return_tensors="pt").input_ids[:, : options.max_new_tokens]
        return torch.cat([batch["input_ids"], new], dim=1)
"""


@pytest.fixture
def published_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with Molmo's interface, whose code lies beside its weights; it tells the size."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = tmp_path / "parrot"
    syllable_tokenizer().save_pretrained(directory)
    (directory / "configuration_parrot.py").write_text(CONFIG_CODE)
    (directory / "processing_parrot.py").write_text(PROCESSOR_CODE)
    (directory / "modeling_parrot.py").write_text(MODEL_CODE)
    auto_map = {
        "AutoConfig": "configuration_parrot.ParrotConfig",
        "AutoProcessor": "processing_parrot.ParrotProcessor",
        "AutoModelForCausalLM": "modeling_parrot.ParrotModel",
    }
    config = {"model_type": "parrot", "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"scale": torch.ones(1)}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_published_code_runs_only_when_allowed(published_code: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        make_captioner(f"auto:{published_code}", device="cpu")
    captioner = make_captioner(f"auto:{published_code}", device="cpu", trust_remote_code=True)
    assert captioner.caption(RED) == "40 30"


def test_published_code_that_does_not_run_is_explained(published_code: Path) -> None:
    code = "from transformers import NoSuchName\n" + MODEL_CODE
    (published_code / "modeling_parrot.py").write_text(code)
    with pytest.raises(ValueError, match=r"does not run with transformers .*NoSuchName"):
        HubCaptioner(str(published_code), device="cpu", trust_remote_code=True)


def test_import_is_light() -> None:
    code = (
        "import sys, percov2.analysis.captioner\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
