"""Text conditioning of the flow transformer: captions become what SD3 attends to.

Stable Diffusion 3 (Esser et al., 2024, section 4) reads a caption with two CLIP text encoders and,
optionally, a T5 encoder. `TextConditioner` computes what `encode_prompt` of diffusers'
`StableDiffusion3Pipeline` computes, as a module: it trains, saves and loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)

from percov2.files import give_usual_permissions
from percov2.messages import one_line

CONFIG_NAME = "text_conditioner.json"
TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
BYTE_SYMBOLS = 256
# T5 pads its embedding table to a multiple of 128.
T5_SPARE_TOKENS = 127


@dataclass(frozen=True, kw_only=True)  # no slots: ZeRO-3 reads a result's __dict__
class TextCondition:
    """What the flow transformer is told about a batch of captions.

    Attributes:
        embeddings: (B, L, joint_dim), one vector per text token, for joint attention.
        pooled: (B, pooled_dim), one vector per caption, for modulation.
    """

    embeddings: Tensor
    pooled: Tensor


class TextConditioner(nn.Module):
    """Encodes captions with two CLIP text encoders and an optional T5 encoder, as SD3 does.

    The penultimate hidden states of both CLIPs are concatenated on channels and zero-padded to
    `joint_dim`; `t5_length` T5 embeddings follow on the sequence axis (zeros without T5). The
    projected pooled outputs of both CLIPs are concatenated.

    Args:
        tokenizers: two CLIP tokenizers of equal `model_max_length`, and T5's if there is one.
        text_encoders: as many encoders, in the same order.
        joint_dim: channels of the embeddings; T5's width where there is a T5.
        t5_length: number of T5 tokens; 0 appends nothing.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        *,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[nn.Module],
        joint_dim: int,
        t5_length: int,
    ) -> None:
        super().__init__()
        _check_parts(tokenizers, text_encoders, joint_dim, t5_length)
        self.tokenizers = list(tokenizers)
        self.text_encoders = nn.ModuleList(text_encoders)
        self.joint_dim = joint_dim
        self.t5_length = t5_length

    @property
    def has_t5(self) -> bool:
        """Whether a T5 encoder takes part."""
        return len(self.text_encoders) == 3

    @property
    def pooled_dim(self) -> int:
        """Channels of `TextCondition.pooled`."""
        return sum(_config(encoder).projection_dim for encoder in self.text_encoders[:2])

    def forward(self, captions: Sequence[str]) -> TextCondition:
        """Encode captions; those that are too long are truncated, as in SD3.

        Args:
            captions: B captions, at least one; "" is the unconditional caption.

        Returns:
            The condition, in the encoders' dtype and on their device.

        Raises:
            ValueError: `captions` is a bare string or empty.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions must be a list of captions, got the text {captions!r}")
        if not captions:
            raise ValueError("captions must hold at least one caption, got none")
        hidden_1, pooled_1 = self._encode_clip(0, captions)
        hidden_2, pooled_2 = self._encode_clip(1, captions)
        embeddings = torch.cat([hidden_1, hidden_2], dim=-1)
        embeddings = functional.pad(embeddings, (0, self.joint_dim - embeddings.shape[-1]))
        if self.t5_length:
            embeddings = torch.cat([embeddings, self._encode_t5(captions, embeddings)], dim=1)
        return TextCondition(embeddings=embeddings, pooled=torch.cat([pooled_1, pooled_2], dim=-1))

    def _encode_clip(self, index: int, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoder: Any = self.text_encoders[index]
        ids = self._ids(index, captions, self.tokenizers[index].model_max_length)
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def _encode_t5(self, captions: Sequence[str], clip_embeddings: Tensor) -> Tensor:
        if not self.has_t5:
            shape = (len(captions), self.t5_length, self.joint_dim)
            return clip_embeddings.new_zeros(shape)
        encoder: Any = self.text_encoders[2]
        hidden: Tensor = encoder(self._ids(2, captions, self.t5_length)).last_hidden_state
        # T5 keeps some layers in float32 whatever its dtype, so its output may be wider.
        return hidden.to(dtype=encoder.dtype)

    def _ids(self, index: int, captions: Sequence[str], length: int) -> Tensor:
        encoded = self.tokenizers[index](
            list(captions),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        encoder: Any = self.text_encoders[index]
        return ids.to(device=encoder.device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizers, encoders and `text_conditioner.json` in diffusers' layout."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for tokenizer, folder in zip(self.tokenizers, TOKENIZER_FOLDERS, strict=False):
            tokenizer.save_pretrained(directory / folder)
        encoder: Any
        for encoder, folder in zip(self.text_encoders, ENCODER_FOLDERS, strict=False):
            encoder.save_pretrained(directory / folder)
        give_usual_permissions(directory)
        config = {"joint_dim": self.joint_dim, "t5_length": self.t5_length}
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, use_t5: bool, dtype: torch.dtype | None = None
    ) -> TextConditioner:
        """Load what `save_pretrained` wrote.

        Args:
            directory: a directory with `text_conditioner.json`.
            use_t5: load the T5 encoder; without it zeros take the place of its embeddings.
            dtype: the encoders' dtype; None keeps the stored one.

        Raises:
            ValueError: a file is missing or malformed, or the weights do not match the model.
        """
        joint_dim, t5_length = read_text_config(Path(directory))
        return cls.from_sd3(
            directory, use_t5=use_t5, joint_dim=joint_dim, t5_length=t5_length, dtype=dtype
        )

    @classmethod
    def from_sd3(
        cls,
        directory_or_hub_id: str | Path,
        *,
        use_t5: bool,
        joint_dim: int = 4096,
        t5_length: int = 256,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> TextConditioner:
        """Load the text encoders of an SD3 model in diffusers' layout.

        Args:
            directory_or_hub_id: a directory, or a repository such as
                `stabilityai/stable-diffusion-3-medium-diffusers`.
            use_t5: load the T5 encoder; without it zeros take the place of its embeddings.
            joint_dim: the transformer's `joint_attention_dim`.
            t5_length: number of T5 tokens.
            dtype: the encoders' dtype; None keeps the stored one.
            revision: branch, tag or commit of a hub repository.
            token: hub access token; None uses the one of `hf auth login`.

        Raises:
            ValueError: a part is missing or out of reach, or weights do not match the model.
        """
        source = str(directory_or_hub_id)
        if use_t5 and Path(source).is_dir() and not (Path(source) / ENCODER_FOLDERS[2]).is_dir():
            raise ValueError(
                f"{source} has no {ENCODER_FOLDERS[2]} (T5); pass use_t5=False to do without it"
            )
        tokenizer_classes = [CLIPTokenizer, CLIPTokenizer, T5Tokenizer]
        encoder_classes = [CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]
        hub = {"revision": revision, "token": token}
        count = 3 if use_t5 else 2
        tokenizers = [
            _load(tokenizer_classes[i], source, TOKENIZER_FOLDERS[i], **hub) for i in range(count)
        ]
        text_encoders = [
            _load_encoder(encoder_classes[i], source, ENCODER_FOLDERS[i], dtype=dtype, **hub)
            for i in range(count)
        ]
        return cls(
            tokenizers=tokenizers,
            text_encoders=text_encoders,
            joint_dim=joint_dim,
            t5_length=t5_length,
        )


def train_clip_tokenizer(
    captions: Iterable[str], *, vocab_size: int, max_length: int
) -> CLIPTokenizer:
    """Train a tokenizer of CLIP's kind: lower-casing byte-level BPE, padded with the end token.

    Every byte is in the vocabulary both inside and at the end of a word, so no text is unknown;
    the end token has the highest id. Training is deterministic.

    Args:
        captions: the texts to learn from.
        vocab_size: size of the vocabulary, at least 514; smaller if the captions are too few.
        max_length: tokens per caption, the start and end tokens included; at least 2.

    Raises:
        ValueError: `vocab_size` or `max_length` is too small.
    """
    specials = 2
    if vocab_size < 2 * BYTE_SYMBOLS + specials:
        raise ValueError(
            f"vocab_size must be at least {2 * BYTE_SYMBOLS + specials} "
            f"(every byte twice and {specials} special tokens), got {vocab_size}"
        )
    if max_length < specials:
        raise ValueError(f"max_length must be at least {specials}, got {max_length}")
    # Text is split the way CLIPTokenizer will split it: with its own normaliser and splitter.
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = template.normalizer
    learner.pre_tokenizer = template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - specials,
        initial_alphabet=alphabet,
        # Not special, but this way all word-final bytes get an id, and a fixed one.
        special_tokens=[symbol + "</w>" for symbol in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges: Any = [(left, right) for left, right in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def tiny_text_conditioner(
    *,
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int,
    layers: int,
    heads: int,
    joint_dim: int | None = None,
) -> TextConditioner:
    """Build two small untrained CLIP text encoders, without T5.

    Weights come from torch's global generator.

    Args:
        tokenizer: used by both encoders; its `model_max_length` bounds the positions.
        hidden_size: width of each encoder and of its pooled output.
        layers: transformer layers of each encoder. The embeddings are the input of the last one.
        heads: attention heads; must divide `hidden_size`.
        joint_dim: channels of the embeddings, 2 * `hidden_size` if None.

    Raises:
        ValueError: `heads` does not divide `hidden_size`, or the tokenizer's end token is 2.
    """
    if hidden_size % heads:
        raise ValueError(f"heads={heads} must divide hidden_size={hidden_size}")
    if tokenizer.eos_token_id == 2:
        raise ValueError(
            "the tokenizer's end token has id 2, which CLIP reads as 'pool at the highest id'; "
            "give the end token another id"
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextConditioner(
        tokenizers=[tokenizer, tokenizer],
        text_encoders=[CLIPTextModelWithProjection(config) for _ in range(2)],
        joint_dim=2 * hidden_size if joint_dim is None else joint_dim,
        t5_length=0,
    )


def _config(encoder: nn.Module) -> Any:
    return encoder.config


def _check_parts(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    text_encoders: Sequence[nn.Module],
    joint_dim: int,
    t5_length: int,
) -> None:
    if len(tokenizers) != len(text_encoders) or len(text_encoders) not in (2, 3):
        raise ValueError(
            "give two CLIP tokenizers and encoders, or these and T5's; "
            f"got {len(tokenizers)} tokenizers and {len(text_encoders)} encoders"
        )
    spares = (0, 0, T5_SPARE_TOKENS)
    for tokenizer, encoder, spare in zip(tokenizers, text_encoders, spares, strict=False):
        size, known = len(tokenizer), _config(encoder).vocab_size
        # transformers falls back to an all but empty vocabulary when a tokenizer's file is missing.
        if not known - spare <= size <= known:
            raise ValueError(
                f"the tokenizer has {size} tokens, its {type(encoder).__name__} {known}; its "
                "vocabulary file is missing or belongs to another model, fetch the model again"
            )
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers[:2]]
    if lengths[0] != lengths[1]:
        raise ValueError(f"both CLIP tokenizers need one model_max_length, got {lengths}")
    for tokenizer, encoder in zip(tokenizers[:2], text_encoders[:2], strict=True):
        positions = _config(encoder).max_position_embeddings
        if tokenizer.model_max_length > positions:
            raise ValueError(
                f"the tokenizer's model_max_length={tokenizer.model_max_length} exceeds the "
                f"encoder's {positions} positions; set model_max_length={positions}"
            )
    clip_dim = sum(_config(encoder).hidden_size for encoder in text_encoders[:2])
    if joint_dim < clip_dim:
        raise ValueError(f"joint_dim={joint_dim} must be at least the CLIPs' width, {clip_dim}")
    if t5_length < 0:
        raise ValueError(f"t5_length must not be negative, got {t5_length}")
    if len(text_encoders) == 3:
        if t5_length == 0:
            raise ValueError("t5_length=0 leaves the T5 encoder unused; leave it out")
        if _config(text_encoders[2]).d_model != joint_dim:
            raise ValueError(
                f"joint_dim={joint_dim} must equal T5's width, {_config(text_encoders[2]).d_model}"
            )


def read_text_config(directory: Path) -> tuple[int, int]:
    """Channels of the embeddings and number of T5's tokens, as `save_pretrained` wrote them.

    Raises:
        ValueError: the file is missing or malformed.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; load an original SD3 model with TextConditioner.from_sd3"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); save the model again") from error
    fields = {"joint_dim", "t5_length"}
    if not isinstance(config, dict) or set(config) != fields:
        raise ValueError(f"{path} must hold exactly {sorted(fields)}, got {config!r}")
    if not all(type(value) is int for value in config.values()):
        raise ValueError(f"{path} must hold whole numbers, got {config!r}")
    return config["joint_dim"], config["t5_length"]


def _load(component: Any, source: str, folder: str, **options: Any) -> Any:
    try:
        return component.from_pretrained(source, subfolder=folder, **options)
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise ValueError(
            f"cannot load {folder} of {source}: {reason} "
            "(check the path, or log in with 'hf auth login' for a gated model)"
        ) from error


def _load_encoder(
    component: Any, source: str, folder: str, *, dtype: torch.dtype | None, **hub: Any
) -> nn.Module:
    """Load an encoder whose safetensors hold exactly the weights the model has."""
    encoder: nn.Module
    encoder, info = _load(
        component,
        source,
        folder,
        # Without a dtype, transformers keeps the one the weights are stored in.
        **({} if dtype is None else {"dtype": dtype}),
        **hub,
        use_safetensors=True,
        output_loading_info=True,
        # Not to accept other sizes, but to have them reported below with the rest.
        ignore_mismatched_sizes=True,
    )
    # transformers leaves out `position_ids`, a buffer that old files hold and the model recomputes.
    problems = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "mismatched": {key for key, *_ in info["mismatched_keys"]},
    }
    complaints = [f"{kind} {sorted(keys)}" for kind, keys in problems.items() if keys]
    if complaints:
        raise ValueError(
            f"the weights in {folder} of {source} do not fit its config: {'; '.join(complaints)}; "
            "fetch or save the model again"
        )
    return encoder
