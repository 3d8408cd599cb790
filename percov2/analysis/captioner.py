"""Captions for images: none, a given text, or one written by a pretrained image-to-text model.

The caption travels in the stream, so it is one line of plain text. PerCo and PerCoV2 caption with
BLIP-2 (Li et al., 2023); PerCoV2 also tries Molmo (Deitke et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from percov2.messages import first_line, one_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

KNOWN_CAPTIONERS = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "molmo": "allenai/Molmo-7B-D-0924",
}
DEFAULT_CAPTIONER = "blip2"
INSTRUCTION = "Describe this image in one short sentence."
# CLIP reads at most 75 tokens of a caption, and each of them costs bytes in the stream.
MAX_NEW_TOKENS = 32
REMEDY = (
    "check the name, log in with 'hf auth login' if the model is gated, "
    "or pass --caption TEXT or --caption none"
)


class Captioner(Protocol):
    """Describes an image."""

    def caption(self, image: Image.Image) -> str:
        """Return a caption on one line; "" means no caption."""
        ...


@dataclass(frozen=True, slots=True)
class NoCaptioner:
    """Gives every image the empty caption."""

    def caption(self, image: Image.Image) -> str:
        """Return ""."""
        return ""


@dataclass(frozen=True, slots=True)
class GivenCaptioner:
    """Gives every image the same text.

    Attributes:
        text: the caption, used as it is.
    """

    text: str

    def caption(self, image: Image.Image) -> str:
        """Return the given text."""
        return self.text


class HubCaptioner:
    """Captions with a pretrained image-to-text model of transformers.

    Decoding is greedy, so the same model on the same machine repeats its caption. Three kinds of
    model are understood: those that continue a prompt (BLIP-2), those with a chat template (LLaVA
    and its like), and those whose code is published with their weights and has Molmo's interface.
    The latter run the publisher's code, hence `trust_remote_code`.

    Args:
        model: hub id, or directory written by `save_pretrained`.
        device: where the model runs.
        dtype: the weights' dtype; None keeps the stored one.
        prompt: beginning of the caption for a model that continues a prompt, instruction for the
            others; None means no prompt, respectively a request for one sentence.
        max_new_tokens: longest caption, in the model's tokens.
        trust_remote_code: allow the model's repository to run its own code.

    Raises:
        ValueError: the model cannot be reached or loaded, needs code that was not allowed, or an
            option is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | torch.device,
        dtype: torch.dtype | None = None,
        prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        trust_remote_code: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        published_code = _needs_published_code(model)
        if published_code and not trust_remote_code:
            raise ValueError(
                f"captioner {model} runs code from its own repository; read that code, then pass "
                "trust_remote_code=True, or use another captioner"
            )
        from percov2.devices import check_device

        check_device(device)
        if published_code:
            self._processor, self._model = _load_published_code(model, dtype)
        else:
            self._processor, self._model = _load(model, dtype)
        self._model.to(device).eval()
        self._published_code = published_code
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens

    def caption(self, image: Image.Image) -> str:
        """Return the model's caption, white space collapsed.

        Args:
            image: any size and mode.
        """
        image = image.convert("RGB")
        if self._published_code:
            text = self._generate_with_published_code(image)
        else:
            text = self._generate(image)
        return " ".join(text.split())

    def _generate(self, image: Image.Image) -> str:
        inputs = self._inputs(image).to(self._model.device, self._model.dtype)
        output = self._model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self._max_new_tokens
        )[0]
        if "input_ids" in inputs:
            output = output[_common_prefix(output, inputs["input_ids"][0]) :]
        text: str = self._processor.decode(output, skip_special_tokens=True)
        return text

    def _inputs(self, image: Image.Image) -> Any:
        if self._processor.chat_template is not None:
            instruction = INSTRUCTION if self._prompt is None else self._prompt
            content = [{"type": "image", "image": image}, {"type": "text", "text": instruction}]
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        if self._prompt is None:
            return self._processor(images=image, return_tensors="pt")
        return self._processor(images=image, text=self._prompt, return_tensors="pt")

    def _generate_with_published_code(self, image: Image.Image) -> str:
        from transformers import GenerationConfig

        instruction = INSTRUCTION if self._prompt is None else self._prompt
        inputs = self._processor.process(images=[image], text=instruction)
        batch = {name: value.unsqueeze(0) for name, value in inputs.items()}
        batch = {name: _move(value, self._model) for name, value in batch.items()}
        options = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_new_tokens,
            stop_strings="<|endoftext|>",
        )
        tokenizer = self._processor.tokenizer
        output = self._model.generate_from_batch(batch, options, tokenizer=tokenizer)[0]
        new = output[batch["input_ids"].shape[1] :]
        text: str = tokenizer.decode(new, skip_special_tokens=True)
        return text


def make_captioner(
    spec: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Captioner:
    """Build a captioner from its description.

    Args:
        spec: "none"; "auto" for BLIP-2; or "auto:MODEL" with a key of `KNOWN_CAPTIONERS`, a hub id
            or a directory.
        device: where a model runs.
        dtype: a model's dtype; None keeps the stored one.
        trust_remote_code: allow a model's repository to run its own code.

    Raises:
        ValueError: `spec` is none of these, or the model does not load.
    """
    if spec == "none":
        return NoCaptioner()
    kind, separator, model = spec.partition(":")
    if kind != "auto" or (separator and not model):
        raise ValueError(
            f"captioner must be 'none', 'auto' or 'auto:MODEL' with MODEL one of "
            f"{sorted(KNOWN_CAPTIONERS)}, a hub id or a directory, got {spec!r}"
        )
    model = model or DEFAULT_CAPTIONER
    return HubCaptioner(
        KNOWN_CAPTIONERS.get(model, model),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def _needs_published_code(model: str) -> bool:
    """Whether `model` brings its own code for an architecture transformers does not have."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except OSError as error:
        raise _not_loaded(model, error) from error
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def _load(model: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(model, error) from error
    network, info = loaded
    # Weights the network lacks would be drawn at random; weights it does not use change nothing.
    if info["missing_keys"]:
        raise ValueError(
            f"captioner {model} lacks the weights {sorted(info['missing_keys'])}; "
            "fetch the model again or use another captioner"
        )
    return processor, network


def _load_published_code(model: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Load with the code in the model's repository, which the caller has been allowed to run."""
    import transformers
    from safetensors import SafetensorError

    options = {"trust_remote_code": True}
    try:
        processor = transformers.AutoProcessor.from_pretrained(model, **options)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype or "auto", use_safetensors=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise _not_loaded(model, error) from error
    except (AttributeError, ImportError, TypeError) as error:
        reason = one_line(error)
        raise ValueError(
            f"the code published with captioner {model} does not run with transformers "
            f"{transformers.__version__}: {reason}; use another captioner or pass --caption TEXT"
        ) from error
    return processor, network


def _not_loaded(model: str, error: Exception) -> ValueError:
    """Keep the first line of transformers' message; the rest lists all it knows."""
    return ValueError(f"cannot load captioner {model}: {first_line(error)} ({REMEDY})")


def _common_prefix(output: torch.Tensor, prompt: torch.Tensor) -> int:
    """Count the tokens at the start of `output` that repeat `prompt`; both are 1-D.

    Models differ in how much of the prompt they return: decoder-only ones all of it, some without
    its last token, encoder-decoders nothing.
    """
    length = min(len(output), len(prompt))
    return int((output[:length] == prompt[:length]).int().cumprod(0).sum())


def _move(value: torch.Tensor, model: Any) -> torch.Tensor:
    if value.is_floating_point():
        return value.to(model.device, model.dtype)
    return value.to(model.device)
