"""What `percov2.training.memory` counts: a configuration of stage 2, and a step on the meta device.

Shape legend: B pictures, C latent channels, K condition channels, h and w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.analysis.autoencoder import StableDiffusionAutoencoder
from percov2.analysis.hyper_encoder import HyperEncoder
from percov2.analysis.vector_quantizer import VectorQuantizer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.messages import one_line
from percov2.model_store import PATCH
from percov2.synthesis.flow_transformer import extend_patch_embedding, predict
from percov2.synthesis.latent_decoder import LatentDecoder
from percov2.training import sd3_reference
from percov2.training.adaptation import Adaptation, FullFinetune, LoRA
from percov2.training.live_memory import GpuKernels, LiveMemory
from percov2.training.optimization import STATE_BYTES, OptimizerName
from percov2.training.perceptual import LpipsNet

_TOKENIZER = {
    "hyper_encoder": HyperEncoder,
    "quantizer": VectorQuantizer,
    "latent_decoder": LatentDecoder,
    "masked_transformer": MaskedTransformer,
}
_PERCO_FEATURES = 320


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSetup:
    """What a configuration says about memory.

    Attributes:
        model: hub id or directory of the published model.
        transformer: its transformer's configuration.
        condition_channels: K.
        tokenizer: values of stage 1's parts; 0 where they are not known.
        train_tokenizer: whether they are trained.
        train_text_encoders: whether both CLIPs are.
        use_t5: whether T5 is loaded.
        cached_text: whether no text encoder is.
        adaptation: of the transformer.
        gradient_checkpointing: of the transformer.
        optimizer: which AdamW.
        average: whether `WeightEMA` runs.
        lpips_net: LPIPS's backbone; None without it.
        precision: ``bf16-mixed`` or ``32-true``.
        batch_size: B per GPU.
        crop: side of the pictures in pixels.
        notes: what had to be assumed, a sentence each.

    Raises:
        ValueError: a size out of range or another precision.
    """

    model: str
    transformer: Mapping[str, Any]
    condition_channels: int
    tokenizer: int
    train_tokenizer: bool
    train_text_encoders: bool
    use_t5: bool
    cached_text: bool
    adaptation: Adaptation
    gradient_checkpointing: bool
    optimizer: OptimizerName
    average: bool
    lpips_net: LpipsNet | None
    precision: str
    batch_size: int
    crop: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.crop < 1 or self.crop % (2 * PATCH):
            raise ValueError(
                f"batch_size {self.batch_size} must be positive and crop {self.crop} a positive "
                f"multiple of {2 * PATCH}"
            )
        if self.precision not in ("bf16-mixed", "32-true"):
            raise ValueError(
                f"trainer.precision is {self.precision}: memory is counted for bf16-mixed and "
                "32-true"
            )

    @property
    def state_bytes(self) -> int:
        """Of AdamW's moments per trained value."""
        return STATE_BYTES[self.optimizer]

    @property
    def adaptation_name(self) -> str:
        """For people."""
        if isinstance(self.adaptation, LoRA):
            return f"LoRA of rank {self.adaptation.rank}"
        return "all weights trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What was counted and measured.

    Attributes:
        trained: values that have a gradient.
        frozen: values that have none.
        weight_bytes: of both.
        table_bytes: of the tables that no strategy divides (position embeddings).
        transformer: values of the transformer, adapters included.
        largest_layer: values of its largest layer.
        sent_bytes: bytes per value of the dtypes in which ZeRO sends gradients.
        activations: bytes at the peak of a step, beyond weights and gradients.
        kept: of them, what the forward pass leaves for the backward pass.
    """

    trained: int
    frozen: int
    weight_bytes: int
    table_bytes: int
    transformer: int
    largest_layer: int
    sent_bytes: tuple[int, ...]
    activations: int
    kept: int


def read_setup(
    configs: Sequence[Path], *, stage1: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> StageSetup:
    """Read stage 2's configuration without building anything.

    Args:
        configs: as for `percov2.fit`; later ones override.
        stage1: stage 1's configuration; needed where its model does not exist yet.
        overrides: of single fields, such as ``data.init_args.batch_size=4``.

    Raises:
        ValueError: a file or a field is missing or not of stage 2.
    """
    config = _load(configs, overrides)
    try:
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        start = model["start"]
        if not start["class_path"].endswith("FromStableDiffusion3"):
            raise ValueError(
                f"model.init_args.start is {start['class_path']}: memory is counted for "
                "FromStableDiffusion3"
            )
        channels, tokenizer, notes = _tokenizer(Path(model["tokenizer"]), stage1)
        for field in ("train_tokenizer", "train_text_encoders"):
            if model[field]:
                notes += (f"{field} is true: its activations are not counted.",)
        callbacks = config["trainer"].get("callbacks") or []
        return StageSetup(
            model=start["init_args"]["model"],
            transformer=sd3_reference.transformer_config(start["init_args"]["model"]),
            condition_channels=channels,
            tokenizer=tokenizer,
            train_tokenizer=model["train_tokenizer"],
            train_text_encoders=model["train_text_encoders"],
            use_t5=start["init_args"]["use_t5"],
            cached_text=model.get("cached_text", False),
            adaptation=_adaptation(model.get("adaptation")),
            gradient_checkpointing=model.get("gradient_checkpointing", False),
            optimizer=model["optimization"].get("optimizer", "adamw"),
            average=any(c["class_path"].endswith("WeightEMA") for c in callbacks),
            lpips_net=model.get("lpips_net", "vgg") if model.get("lpips_weight") else None,
            precision=str(config["trainer"].get("precision", "32-true")),
            batch_size=data["batch_size"],
            crop=data["crop"],
            notes=notes,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{', '.join(map(str, configs))} is no configuration of stage 2: {error!r} is missing "
            "or of a wrong type"
        ) from error


def _load(configs: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    try:
        files = (OmegaConf.load(path) for path in configs)
        merged = OmegaConf.merge(*files, OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"cannot read {', '.join(map(str, configs))}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{', '.join(map(str, configs))} is no configuration: it has no fields")
    return {str(name): value for name, value in content.items()}


def _adaptation(field: Mapping[str, Any] | None) -> Adaptation:
    if field is None or field["class_path"].endswith("FullFinetune"):
        return FullFinetune()
    if field["class_path"].endswith("LoRA"):
        return LoRA(**field["init_args"])
    raise ValueError(
        f"model.init_args.adaptation is {field['class_path']}: choose FullFinetune or LoRA"
    )


def _tokenizer(directory: Path, stage1: Sequence[Path]) -> tuple[int, int, tuple[str, ...]]:
    """Condition channels and values of stage 1's model, and what was assumed."""
    if stage1:
        fields = _load(stage1)["model"]["init_args"]
        with torch.device("meta"):
            parts = {name: cls(**fields[name]) for name, cls in _TOKENIZER.items()}
        values = sum(sd3_reference.parameter_count(part) for part in parts.values())
        return parts["latent_decoder"].condition_channels, values, ()
    if (directory / "latent_decoder").is_dir():
        config = LatentDecoder.load_config(directory / "latent_decoder", local_files_only=True)
        values = sum(_stored_values(directory / name) for name in _TOKENIZER)
        return config["feature_channels"] + config["latent_channels"], values, ()
    channels = _PERCO_FEATURES + sd3_reference.VAE["latent_channels"]
    return (
        channels,
        0,
        (
            f"{directory} does not exist: {channels} condition channels are assumed and stage 1's "
            "parts are not counted (name its configuration with --stage1).",
        ),
    )


def _stored_values(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                total += torch.Size(file.get_slice(name).get_shape()).numel()
    return total


def build_stage_transformer(setup: StageSetup) -> SD3Transformer2DModel:
    """The transformer as stage 2 trains it, on the meta device."""
    transformer = extend_patch_embedding(
        sd3_reference.build_transformer(dict(setup.transformer)), setup.condition_channels
    )
    with torch.device("meta"):
        setup.adaptation.apply(transformer)
    return transformer.train()


def measure_sizes(setup: StageSetup) -> Sizes:
    """Count weights and measure a step; takes a minute for SD3-medium."""
    transformer = build_stage_transformer(setup)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    own = sum(p.numel() for p in trained)
    total = sd3_reference.parameter_count(transformer)
    others = sd3_reference.frozen_parts()
    text = 0 if setup.cached_text else others.clip + (others.t5 if setup.use_t5 else 0)
    text_bytes = 0 if setup.cached_text else others.text_bytes(use_t5=setup.use_t5)
    trained_values = (
        own
        + (setup.tokenizer if setup.train_tokenizer else 0)
        + (others.clip if setup.train_text_encoders else 0)
    )
    values = total + others.autoencoder + setup.tokenizer + text
    peak, kept = measure_step(setup, transformer)
    return Sizes(
        trained=trained_values,
        frozen=values - trained_values,
        weight_bytes=4 * (values - text) + text_bytes,
        table_bytes=4 * sum(buffer.numel() for buffer in transformer.buffers()),
        transformer=total,
        largest_layer=max(
            sum(p.numel() for p in module.parameters(recurse=False))
            for module in transformer.modules()
        ),
        sent_bytes=_sent_bytes(setup, transformer),
        activations=peak,
        kept=kept,
    )


def _sent_bytes(setup: StageSetup, transformer: nn.Module) -> tuple[int, ...]:
    """DeepSpeed sends bfloat16 for layers that autocast turns to it, float32 for the rest."""
    sizes = set()
    for module in transformer.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            lower = setup.precision == "bf16-mixed" and isinstance(module, nn.Linear | nn.Conv2d)
            sizes.add(2 if lower else 4)
    return tuple(sorted(sizes))


def measure_step(setup: StageSetup, transformer: SD3Transformer2DModel) -> tuple[int, int]:
    """Peak bytes of a training step beyond weights and gradients, and what forward keeps.

    The step is `FlowStage`'s: encode the pictures, paint, and with LPIPS decode; gradients of
    weights are dropped as soon as they are whole.

    Args:
        setup: B, crop, precision, LPIPS.
        transformer: on the meta device, its gradients chosen.
    """
    autoencoder = StableDiffusionAutoencoder(sd3_reference.build_autoencoder())
    autoencoder.requires_grad_(False)
    with torch.device("meta"):
        lpips = _lpips(setup.lpips_net)
    hooks = [
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in transformer.parameters()
        if p.requires_grad
    ]
    kernels = GpuKernels(torch.bfloat16 if setup.precision == "bf16-mixed" else None)
    if setup.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(kernels.checkpoint)
    else:
        transformer.disable_gradient_checkpointing()
    with torch.device("meta"), kernels, LiveMemory() as memory:
        loss = step_loss(setup, transformer, autoencoder, lpips)
        kernels.end_forward()
        kept = memory.now
        loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return memory.peak, kept


def _lpips(net: LpipsNet | None) -> nn.Module | None:
    if net is None:
        return None
    from torchmetrics.functional.image.lpips import _LPIPS

    # Random weights: only shapes count, and nothing is fetched.
    module: nn.Module = _LPIPS(pretrained=False, net=net, pnet_rand=True)
    return module.requires_grad_(False).to("meta")  # some of its buffers ignore the context


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def step_loss(
    setup: StageSetup,
    transformer: SD3Transformer2DModel,
    autoencoder: StableDiffusionAutoencoder,
    lpips: nn.Module | None,
) -> Tensor:
    """Loss of a training step on zeros, on torch's default device: `FlowStage`'s tensors."""
    config, batch, side = transformer.config, setup.batch_size, setup.crop // PATCH
    image = torch.zeros(batch, 3, setup.crop, setup.crop)
    condition = torch.zeros(batch, setup.condition_channels, side, side)
    text = torch.zeros(batch, sd3_reference.TEXT_LENGTH, config.joint_attention_dim)
    pooled = torch.zeros(batch, config.pooled_projection_dim)
    with torch.no_grad():
        latents = autoencoder.encode(image)
    t = torch.full((batch,), 0.5)
    x_t = latents + torch.zeros_like(latents)
    output = predict(transformer, x_t, condition, t, text, pooled)
    loss = F.mse_loss(output, latents)
    if lpips is not None:
        picture = autoencoder.decode(x_t - t.view(-1, 1, 1, 1) * output)
        loss = loss + lpips(picture.float(), image).mean()
    return loss
