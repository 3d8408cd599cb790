"""Cosine-similarity vector quantiser with an EMA codebook and dead-code revival.

Sources: van den Oord et al. 2017 (vector quantisation, EMA updates), Yu et al. 2022 (cosine
similarity, low code dimension), PerCo's settings (code dimension 32).
Shape legend: B batch, M feature channels, r and c token rows and columns, V codebook size,
d code dimension, N = B r c vectors of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)  # no slots: ZeRO-3 reads a result's __dict__
class Quantized:
    """Result of quantising features.

    Attributes:
        features: (B, M, r, c), the codes brought back to M channels; gradients pass straight
            through the quantisation to the input.
        tokens: (B, r, c), int64 in [0, V).
        commitment_loss: scalar, 1 - cosine similarity of vector and code; gradient to the
            input only. With tokens that an encoder searched for it teaches the input to find them.
    """

    features: Tensor
    tokens: Tensor
    commitment_loss: Tensor


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(vectors: Tensor) -> Tensor:
    """Concatenate equally shaped vectors of all processes, in rank order."""
    if not _distributed():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)


class VectorQuantizer(ModelMixin, ConfigMixin):
    """Projects to ``code_dim``, normalises, picks the code of largest cosine similarity.

    The codebook moves by exponential averages of the vectors assigned to each code, never by
    gradient. A code whose average count falls below ``revival_threshold`` is replaced by a vector
    of the present batch and its averages are reset with it. Every process takes part in every
    collective of every training step, whatever its tokens are, so none waits for another; all
    compute the same codebook from the same gathered statistics. Arithmetic of similarity and
    averages is float32 whatever the surrounding precision.

    Args:
        feature_channels: M.
        codebook_size: V.
        code_dim: d (32 in the paper).
        decay: of the exponential averages, in (0, 1).
        revival_threshold: smallest average count of a living code, in vectors per step as a
            share of the mean count N / V; in [0, 1).
    """

    @register_to_config
    def __init__(
        self,
        *,
        feature_channels: int,
        codebook_size: int,
        code_dim: int,
        decay: float,
        revival_threshold: float,
    ) -> None:
        super().__init__()
        if not 0 < decay < 1 or not 0 <= revival_threshold < 1:
            raise ValueError(
                f"decay {decay} must lie in (0, 1) and revival_threshold {revival_threshold} "
                "in [0, 1)"
            )
        self.project_in = nn.Conv2d(feature_channels, code_dim, 1)
        self.project_out = nn.Conv2d(code_dim, feature_channels, 1)
        codebook = F.normalize(torch.randn(codebook_size, code_dim), dim=1)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("ema_sums", codebook.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_size(self) -> int:
        """V."""
        return int(self.config.codebook_size)

    def forward(self, features: Tensor, tokens: Tensor | None = None) -> Quantized:
        """Quantise (B, M, r, c); in training mode the codebook is updated afterwards.

        Args:
            features: of the hyper-encoder.
            tokens: (B, r, c) in [0, V), to be taken instead of the nearest codes: those of an
                encoder that weighs more than similarity. Gradients pass to the vector all the same,
                and the codebook moves to the vectors that such tokens stand for.
        """
        projected = self.project_in(features)
        unit = self._unit(projected)
        with torch.autocast(features.device.type, enabled=False):
            if tokens is None:
                tokens = self._compare(unit).argmax(-1)
            codes = F.embedding(tokens, self.codebook).movedim(-1, 1)
            commitment = (1 - (unit * codes).sum(1)).mean()
            straight_through = unit + (codes - unit).detach()
            if self.training:
                vectors = unit.detach().movedim(1, -1).flatten(0, 2)
                self._update(vectors, tokens.flatten())
        out = self.project_out(straight_through.to(projected.dtype))
        return Quantized(features=out, tokens=tokens, commitment_loss=commitment)

    @torch.no_grad()
    def similarity(self, features: Tensor) -> Tensor:
        """Cosine similarity of features (B, M, r, c) with every code, (B, r, c, V) in [-1, 1]."""
        return self._compare(self._unit(self.project_in(features)))

    def tokens_to_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, r, c) in [0, V) to features (B, M, r, c): what the decoder starts from."""
        codes = F.embedding(tokens, self.codebook).movedim(-1, 1)
        features: Tensor = self.project_out(codes.to(self.project_out.weight.dtype))
        return features

    @staticmethod
    def _unit(projected: Tensor) -> Tensor:
        """Projected (B, d, r, c) as unit vectors."""
        with torch.autocast(projected.device.type, enabled=False):
            return F.normalize(projected.float(), dim=1)

    def _compare(self, unit: Tensor) -> Tensor:
        """Similarity (B, r, c, V) of unit vectors (B, d, r, c) with every code, detached."""
        with torch.autocast(unit.device.type, enabled=False):
            similarity: Tensor = unit.detach().movedim(1, -1) @ self.codebook.float().T
            return similarity

    @torch.no_grad()
    def _update(self, vectors: Tensor, tokens: Tensor) -> None:
        """One EMA step from vectors (N, d) and their tokens (N,), over all processes.

        Nothing changes if a vector is not finite.
        """
        size, decay = self.codebook_size, self.config.decay
        counts = torch.bincount(tokens, minlength=size).float()
        sums = torch.zeros_like(self.ema_sums).index_add_(0, tokens, vectors)
        if _distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # The averages would never forget such a batch. All processes have the same sums.
        if not sums.isfinite().all():
            return
        self.ema_counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.ema_sums.mul_(decay).add_(sums, alpha=1 - decay)
        self.codebook.copy_(F.normalize(self.ema_sums, dim=1))
        self._revive(vectors, counts.sum() / size)
        self.updates.add_(1)

    def _revive(self, vectors: Tensor, mean_count: Tensor) -> None:
        """Replace dead codes by vectors of the batch, the same on every process."""
        size = self.codebook_size
        # Seeded by the step: every process draws the same choice without a further collective.
        generator = torch.Generator().manual_seed(int(self.updates))
        share = torch.randint(vectors.shape[0], (size,), generator=generator)
        candidates = _gather(vectors[share.to(vectors.device)])
        dead = self.ema_counts < self.config.revival_threshold * mean_count
        choice = torch.randperm(candidates.shape[0], generator=generator)[:size]
        fresh = candidates[choice.to(candidates.device)]
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        # A revived code starts at the mean count: from its old count it would die again at once.
        self.ema_counts.copy_(torch.where(dead, mean_count, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], fresh * mean_count, self.ema_sums))
