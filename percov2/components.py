"""Model directories: one folder per component in diffusers' layout, and `model_index.json`.

A stage 1 directory holds `autoencoder` (or `vae`), `hyper_encoder`, `quantizer`,
`latent_decoder` and `masked_transformer`; stage 2 adds `transformer` and the text encoders.
Weights are safetensors and load strictly: a missing or unknown key is an error.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin, SD3Transformer2DModel
from safetensors import safe_open
from torch import nn

from percov2.analysis.autoencoder import (
    Autoencoder,
    PatchAutoencoder,
    StableDiffusionAutoencoder,
)
from percov2.analysis.hyper_encoder import HyperEncoder
from percov2.analysis.vector_quantizer import VectorQuantizer
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import SCHEDULES
from percov2.entropy.token_choice import check_choice_weights
from percov2.entropy.token_coder import TokenCoder
from percov2.files import give_usual_permissions
from percov2.messages import one_line
from percov2.model_store import INDEX_NAME
from percov2.synthesis.flow import Flow
from percov2.synthesis.latent_decoder import LatentDecoder
from percov2.synthesis.sampler import Tiling
from percov2.synthesis.sharpening import check_amount
from percov2.synthesis.text_conditioner import (
    ENCODER_FOLDERS,
    TOKENIZER_FOLDERS,
    TextConditioner,
)

M = TypeVar("M", bound=ModelMixin)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """What a codec needs beside its weights; stored in `model_index.json`.

    Attributes:
        name: shown by `info`, for instance ``tiny``.
        model_id: 16 bits in every stream's header, a hash of masked transformer, codebook and
            schedule (`compute_model_id`).
        schedule: one of `percov2.entropy.schedules.SCHEDULES`.
        latents_per_token: reduction f of the hyper-encoder.
        flow: path, shift and source.
        tiling: how large grids are painted.
        default_steps: sampling steps when the user names none.
        default_guidance: classifier-free guidance when the user names none; 1 is off, 0 ignores the
            caption.
        sharpness: of `percov2.synthesis.sharpening.sharpen` when the user names none; 0 for models
            that were stored before there was one.
        grain: of `percov2.synthesis.grain.add_grain`, likewise.
        rate_weight: of `percov2.token_chooser.TokenChooser` when the user names none; 0 for
            models that were stored before there was one.
        color_weight: likewise.
        latent_weight: likewise.

    Raises:
        ValueError: a value out of range.
    """

    name: str
    model_id: int
    schedule: str
    latents_per_token: int
    flow: Flow
    tiling: Tiling
    default_steps: int
    default_guidance: float
    sharpness: float = 0.0
    grain: float = 0.0
    rate_weight: float = 0.0
    color_weight: float = 0.0
    latent_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if type(self.model_id) is not int or not 0 <= self.model_id < 2**16:
            raise ValueError(f"model_id is {self.model_id!r}: it must be 0 to 65535")
        if self.default_steps < 1 or self.default_guidance < 0:
            raise ValueError(
                f"default_steps {self.default_steps} must be at least 1 and default_guidance "
                f"{self.default_guidance} at least 0"
            )
        check_amount("sharpness", self.sharpness)
        check_amount("grain", self.grain)
        check_choice_weights(
            rate_weight=self.rate_weight,
            color_weight=self.color_weight,
            latent_weight=self.latent_weight,
            schedule=self.schedule,
        )

    def to_json(self) -> str:
        """Text of `model_index.json`."""
        return json.dumps({"_class_name": "percov2.Codec", **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CodecConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, not of this class, or unknown, missing or bad fields.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{INDEX_NAME} is not JSON ({error}): download the model again"
            ) from error
        name = fields.pop("_class_name", None) if isinstance(fields, dict) else None
        if name != "percov2.Codec":
            raise ValueError(
                f"{INDEX_NAME} is of class {name!r}: this is not a percov2 model, give one that "
                "stage 2 wrote"
            )
        try:
            flow, tiling = Flow(**fields.pop("flow")), Tiling(**fields.pop("tiling"))
            return cls(flow=flow, tiling=tiling, **fields)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{INDEX_NAME} does not fit this version of percov2: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerComponents:
    """What stage 1 trains: image to tokens, tokens to bits, tokens to predicted latents."""

    autoencoder: Autoencoder
    hyper_encoder: HyperEncoder
    quantizer: VectorQuantizer
    latent_decoder: LatentDecoder
    masked_transformer: MaskedTransformer

    def save(self, directory: Path) -> None:
        """Write one folder per component."""
        save_autoencoder(self.autoencoder, directory)
        self.hyper_encoder.save_pretrained(directory / "hyper_encoder")
        self.quantizer.save_pretrained(directory / "quantizer")
        self.latent_decoder.save_pretrained(directory / "latent_decoder")
        self.masked_transformer.save_pretrained(directory / "masked_transformer")
        _forget_paths(directory)
        give_usual_permissions(directory)

    @classmethod
    def load(cls, directory: Path) -> TokenizerComponents:
        """Read them, in float32 and evaluation mode.

        Raises:
            ValueError: a folder or a weight is missing.
        """
        return cls(
            autoencoder=load_autoencoder(directory),
            hyper_encoder=load_component(HyperEncoder, directory, "hyper_encoder"),
            quantizer=load_component(VectorQuantizer, directory, "quantizer"),
            latent_decoder=load_component(LatentDecoder, directory, "latent_decoder"),
            masked_transformer=load_component(MaskedTransformer, directory, "masked_transformer"),
        )

    def token_coder(self, schedule: str, *, device: str | torch.device = "cpu") -> TokenCoder:
        """The entropy coder of the tokens, with the masked transformer in its present state.

        Raises:
            ValueError: weights too large for exact arithmetic, or an unknown schedule.
        """
        return TokenCoder(
            None
            if schedule == "uniform"
            else IntegerTransformer(self.masked_transformer, device=device),
            schedule=schedule,
            codebook_size=self.quantizer.codebook_size,
        )

    def modules(self) -> dict[str, nn.Module]:
        """The components by field name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def load_component(
    cls: type[M],
    directory: Path,
    subfolder: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> M:
    """Load a diffusers model from a folder of a model directory, strictly.

    Raises:
        ValueError: no such folder, a component of another class, or weights that do not fit the
            configuration key by key.
    """
    folder = directory / subfolder
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{directory} has no {subfolder}/config.json: it is not a complete percov2 model "
            "directory (run stage 1 for a tokenizer, stage 2 for a codec, or download it again)"
        )
    try:
        found = cls.load_config(folder, local_files_only=True).get("_class_name")
        if found != cls.__name__:
            raise ValueError(f"config.json is of {found}, not of {cls.__name__}")
        model, info = cls.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, TypeError, ValueError) as error:
        # Only the first sentence: diffusers goes on with advice that is not for our users.
        reason = one_line(error).split(". ")[0].rstrip(".")
        raise ValueError(f"cannot load {folder}: {reason}; download the model again") from error
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if faults:
        raise ValueError(
            f"weights in {folder} do not fit its config.json: {faults}; download the model again"
        )
    loaded: M = model.eval()
    return loaded


COMPONENT_FOLDERS = (
    *("autoencoder", "vae", "hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"),
    *("transformer", *ENCODER_FOLDERS, *TOKENIZER_FOLDERS),
)
"""All that a model directory may hold; no model holds them all."""


def is_half(directory: Path) -> bool:
    """Whether a model directory holds float16 weights, as `CodecComponents.save` writes them."""
    files = sorted((directory / "quantizer").glob("*.safetensors"))
    with safe_open(files[0], "pt") as weights:
        return bool(weights.get_slice("codebook").get_dtype() == "F16")


def _forget_paths(directory: Path) -> None:
    """Take out of the written configurations where on this machine the weights came from."""
    for path in directory.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_autoencoder(autoencoder: Autoencoder, directory: Path) -> None:
    """Write `autoencoder` (light) or `vae` (SD3's, as diffusers names it)."""
    if isinstance(autoencoder, StableDiffusionAutoencoder):
        autoencoder.vae.save_pretrained(directory / "vae")
    else:
        assert isinstance(autoencoder, PatchAutoencoder)
        autoencoder.save_pretrained(directory / "autoencoder")
    give_usual_permissions(directory)


def load_autoencoder(directory: Path) -> Autoencoder:
    """Read whichever autoencoder the directory holds.

    Raises:
        ValueError: it holds none.
    """
    if (directory / "vae").is_dir():
        return StableDiffusionAutoencoder(load_component(AutoencoderKL, directory, "vae")).eval()
    light: PatchAutoencoder = load_component(PatchAutoencoder, directory, "autoencoder")
    return light


def compute_model_id(masked: MaskedTransformer, codebook: torch.Tensor, schedule: str) -> int:
    """First 16 bits of SHA-256 over everything that encoder and decoder must share.

    That is the schedule, the codebook and the integers that the masked transformer codes with.
    """
    digest = hashlib.sha256(schedule.encode())
    digest.update(IntegerTransformer(masked).digest())
    digest.update(codebook.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return int.from_bytes(digest.digest()[:2], "big")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecComponents:
    """All parts of a codec.

    Raises:
        ValueError: the parts do not fit together.
    """

    config: CodecConfig
    tokenizer: TokenizerComponents
    transformer: SD3Transformer2DModel
    text_conditioner: TextConditioner

    def __post_init__(self) -> None:
        parts = self.tokenizer
        reduction = parts.hyper_encoder.config.reduction
        if self.config.latents_per_token != reduction:
            raise ValueError(
                f"latents_per_token is {self.config.latents_per_token}, the hyper-encoder reduces "
                f"by {reduction}: files of two models are mixed, download the model again"
            )
        codes = parts.quantizer.codebook_size
        if parts.masked_transformer.config.codebook_size != codes:
            raise ValueError(
                f"the masked transformer knows {parts.masked_transformer.config.codebook_size} "
                f"codes, the quantiser {codes}: files of two models are mixed, download the model "
                "again"
            )
        patches = self.transformer.config.pos_embed_max_size
        if self.config.tiling.size > patches * self.transformer.config.patch_size:
            raise ValueError(
                f"tiles of {self.config.tiling.size} latents are larger than the transformer's "
                f"table of {patches} patches a side: use smaller tiles"
            )
        channels = parts.autoencoder.latent_channels + parts.latent_decoder.condition_channels
        if self.transformer.config.in_channels != channels:
            raise ValueError(
                f"the flow transformer takes {self.transformer.config.in_channels} channels, "
                f"latents and condition have {channels}: files of two models are mixed, download "
                "the model again"
            )

    def save(self, directory: Path, *, half: bool = False) -> None:
        """Write the model directory.

        Args:
            directory: made if missing.
            half: store float16 weights; the model id is that of the rounded weights, which
                is what every loader sees. The model itself keeps its weights.

        Raises:
            ValueError: the directory holds parts of another model that would stay behind.
        """
        self._refuse_leftovers(directory)
        if half:
            self._half().save(directory)
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(directory)
        self.transformer.save_pretrained(directory / "transformer")
        self.text_conditioner.save_pretrained(directory)
        _forget_paths(directory)
        give_usual_permissions(directory)
        model_id = compute_model_id(
            self.tokenizer.masked_transformer,
            self.tokenizer.quantizer.codebook,
            self.config.schedule,
        )
        index = replace(self.config, model_id=model_id).to_json()
        (directory / INDEX_NAME).write_text(index, encoding="utf-8")

    def _refuse_leftovers(self, directory: Path) -> None:
        sd3 = isinstance(self.tokenizer.autoencoder, StableDiffusionAutoencoder)
        foreign = {"autoencoder" if sd3 else "vae"}
        if not self.text_conditioner.has_t5:
            foreign |= {"text_encoder_3", "tokenizer_3"}
        left = sorted(name for name in foreign if (directory / name).exists())
        if left:
            raise ValueError(
                f"{directory} holds {', '.join(left)} of another model, which would be loaded "
                "with this one: choose an empty directory"
            )

    def _half(self) -> CodecComponents:
        """A copy with float16 weights."""
        parts = {
            name: copy.deepcopy(module).half() for name, module in self.tokenizer.modules().items()
        }
        quantizer = parts["quantizer"]
        # Counts and sums of a large batch are beyond float16, and training goes on from them.
        for name in ("ema_counts", "ema_sums"):
            setattr(quantizer, name, getattr(self.tokenizer.quantizer, name).clone())
        return replace(
            self,
            tokenizer=TokenizerComponents(**parts),  # type: ignore[arg-type]
            transformer=copy.deepcopy(self.transformer).half(),
            text_conditioner=copy.deepcopy(self.text_conditioner).half(),
        )

    @classmethod
    def load(cls, directory: Path, *, dtype: torch.dtype = torch.float32) -> CodecComponents:
        """Read a model directory; ``dtype`` is that of the flow transformer and text encoders.

        Raises:
            ValueError: not a complete model directory, or weights of another model id.
        """
        config = read_index(directory)
        tokenizer = TokenizerComponents.load(directory)
        found = compute_model_id(
            tokenizer.masked_transformer, tokenizer.quantizer.codebook, config.schedule
        )
        if found != config.model_id:
            raise ValueError(
                f"{directory}: weights hash to model {found:#06x}, {INDEX_NAME} says "
                f"{config.model_id:#06x}: files of two models are mixed, download it again"
            )
        return cls(
            config=config,
            tokenizer=tokenizer,
            transformer=load_component(
                SD3Transformer2DModel, directory, "transformer", dtype=dtype
            ),
            text_conditioner=TextConditioner.from_pretrained(
                directory, use_t5=(directory / "text_encoder_3").is_dir(), dtype=dtype
            ).eval(),
        )


def read_index(directory: Path) -> CodecConfig:
    """`model_index.json` of a model directory.

    Raises:
        ValueError: there is none, or it is not of this version of percov2.
    """
    path = directory / INDEX_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {INDEX_NAME}: give the name of a preset, a model directory "
            "that stage 2 wrote, or a hub id"
        )
    try:
        return CodecConfig.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
