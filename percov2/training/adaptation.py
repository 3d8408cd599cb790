"""Which weights of the flow transformer stage 2 trains: all of them, or low-rank adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""The projections of SD3's joint attention: picture (``to_*``) and text (``add_*``)."""

ADAPTER = "default"


class Adaptation(ABC):
    """How the transformer is trained."""

    @abstractmethod
    def apply(self, transformer: SD3Transformer2DModel) -> None:
        """Choose the weights that require a gradient, in place; called once, before training.

        Raises:
            ValueError: the transformer does not suit the adaptation.
        """

    @abstractmethod
    def merged(self, transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
        """A plain model that computes what the adapted one computes, for export.

        Args:
            transformer: one that `apply` was called on, its weights whole (under ZeRO-3 they must
                have been gathered). It is left as it is.

        Returns:
            A model that shares the weights that needed no change.
        """


@dataclass(frozen=True, kw_only=True)
class FullFinetune(Adaptation):
    """Every weight of the transformer is trained."""

    def apply(self, transformer: SD3Transformer2DModel) -> None:
        """See `Adaptation.apply`."""
        transformer.requires_grad_(True)

    def merged(self, transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
        """See `Adaptation.merged`: the transformer itself."""
        return transformer


@dataclass(frozen=True, kw_only=True)
class LoRA(Adaptation):
    """Low-rank adapters (Hu et al., 2021) are trained, the weights under them are frozen.

    The patch embedding is trained in full beside them: its new channels start at zero, and without
    them the transformer would never see the tokens.

    Attributes:
        rank: of the adapters, at least 1.
        alpha: the adapters' output is multiplied by ``alpha / rank``.
        targets: ends of the names of the linear layers that get an adapter.
        dropout: before the adapters, in [0, 1).

    Raises:
        ValueError: a value out of range.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...] = ATTENTION
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: it must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: it must be positive, for instance the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must lie in [0, 1)")
        if not self.targets:
            raise ValueError(
                "targets is empty: name layers, for instance to_q, or use FullFinetune"
            )

    def apply(self, transformer: SD3Transformer2DModel) -> None:
        """See `Adaptation.apply`.

        Raises:
            ValueError: a target that no linear layer's name ends with.
        """
        linear = [name for name, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        unknown = [
            t for t in self.targets if not any(f".{name}".endswith(f".{t}") for name in linear)
        ]
        if unknown:
            raise ValueError(
                f"no linear layer of the transformer is called {', '.join(unknown)}: choose "
                f"targets among {', '.join(ATTENTION)}, ff.net.0.proj, ff.net.2"
            )
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=list(self.targets),
                lora_dropout=self.dropout,
            ),
            adapter_name=ADAPTER,
        )
        transformer.pos_embed.proj.requires_grad_(True)

    @torch.no_grad()
    def merged(self, transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
        """See `Adaptation.merged`."""
        state = {
            name.replace(".base_layer.", "."): value
            for name, value in transformer.state_dict(keep_vars=True).items()
            if ".lora_" not in name
        }
        for name, layer in transformer.named_modules():
            if isinstance(layer, LoraLinear):
                weight = layer.get_base_layer().get_parameter("weight")
                merged = weight + layer.get_delta_weight(ADAPTER).to(weight)
                state[f"{name}.weight"] = nn.Parameter(merged, requires_grad=False)
        with torch.device("meta"):
            plain = SD3Transformer2DModel.from_config(transformer.config)
        plain.load_state_dict(state, assign=True)
        return plain.train(transformer.training)
