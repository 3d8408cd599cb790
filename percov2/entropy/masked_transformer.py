"""The masked image model: predicts unknown tokens from known ones.

Sources: MaskGIT (Chang et al. 2022), M2T (Mentzer et al. 2023), Swin (Liu et al. 2021) for
attention in bounded, alternately shifted windows: cost grows linearly with the grid. Tokens that
are neither known nor asked for take no part (as in the encoder of MAE, He et al. 2022), so that a
stream whose groups double in size costs two passes over its tokens and not one pass a group.

What is coded with is the integer form of this model (`integer_transformer`). Its number formats
are the constants below, and the ranges bound the activations here too, so that both compute the
same function up to rounding.
Shape legend: B batch, r and c token rows and columns, V codebook size, d model width, H heads,
n positions of a window, W windows, M visible positions: known, or asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.entropy.schedules import Groups, num_groups
from percov2.entropy.window_partition import WindowPartition

RESIDUAL_RANGE = 64.0
"""Bound of the residual stream's magnitude."""
ACTIVATION_RANGE = 8.0
"""Bound of the magnitude of normalised activations, queries, keys and values."""
HIDDEN_RANGE = 16.0
"""Bound of the MLP's hidden activations, which are not negative."""
ATTENTION_SCALE = 1 / 8
"""Of query times key, a power of two; the projections learn the rest."""
POSITION_BINS = 16
"""Learned positions down and across a grid of any size."""


def _rms_norm(x: Tensor) -> Tensor:
    """Root mean square normalisation; its gain would be part of the projection that follows."""
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return normed.clamp(-ACTIVATION_RANGE, ACTIVATION_RANGE)


def _residual(x: Tensor) -> Tensor:
    return x.clamp(-RESIDUAL_RANGE, RESIDUAL_RANGE)


def position_bin(index: Tensor, length: int) -> Tensor:
    """The learned position of rows or columns ``index`` in a grid of ``length`` of them."""
    return index * POSITION_BINS // length


class WindowAttention(nn.Module):
    """Multi-head attention in windows with a learned bias per relative position."""

    def __init__(self, dim: int, num_heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.offset = window // 2 if shifted else 0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, (2 * window - 1) ** 2))

    def forward(self, x: Tensor, partition: WindowPartition) -> Tensor:
        """(M, d) to the same shape; see `Block.forward`."""
        qkv = self.qkv(x).clamp(-ACTIVATION_RANGE, ACTIVATION_RANGE)
        # The row behind the last is what empty slots point to.
        qkv = F.pad(qkv, (0, 0, 0, 1)).index_select(0, partition.slots.flatten())
        qkv = qkv.view(*partition.slots.shape, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (W, H, n, d / H)
        offsets = partition.offsets()
        # An embedding would look them up as well, at ten times the time.
        bias = self.position_bias.index_select(1, offsets.flatten())
        bias = bias.view(-1, *offsets.shape).transpose(0, 1)  # (W, H, n, n)
        bias.masked_fill_(partition.empty[:, None, None, :], float("-inf"))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=ATTENTION_SCALE)
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        out: Tensor = self.out(attended.index_select(0, partition.where))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.attention = WindowAttention(dim, num_heads, window, shifted=shifted)
        self.mlp_in, self.mlp_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, partition: WindowPartition) -> Tensor:
        """The visible positions, (M, d), to the same shape.

        Args:
            x: of all samples, in the partition's order.
            partition: of them, into windows that start at ``attention.offset``.
        """
        x = _residual(x + self.attention(_rms_norm(x), partition))
        hidden = self.mlp_in(_rms_norm(x)).clamp(0, HIDDEN_RANGE)
        return _residual(x + self.mlp_out(hidden))


class MaskedTransformer(ModelMixin, ConfigMixin):
    """Logits of unknown tokens given the known ones.

    Args:
        codebook_size: V.
        dim: d, a multiple of ``num_heads``.
        num_layers: blocks; every second one has shifted windows.
        num_heads: H.
        window: side of the attention windows in tokens.
    """

    @register_to_config
    def __init__(
        self, *, codebook_size: int, dim: int, num_layers: int, num_heads: int, window: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(codebook_size, dim)
        self.mask_embedding = nn.Parameter(torch.randn(dim))
        self.row_embedding = nn.Embedding(POSITION_BINS, dim)
        self.col_embedding = nn.Embedding(POSITION_BINS, dim)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window, shifted=layer % 2 == 1) for layer in range(num_layers)
        )
        self.head = nn.Linear(dim, codebook_size)

    @torch.no_grad()
    def init_from_codebook(self, codebook: Tensor, *, seed: int) -> None:
        """Start with embeddings and logits that are alike for codes that are alike.

        Without this the model must learn from the data alone which of V codes resemble each
        other, which takes most of a short training.

        Args:
            codebook: (V, code dimension), rows of unit length.
            seed: of the projection; the same on every process.
        """
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(codebook.shape[1], self.config.dim, generator=generator)
        embedding = codebook @ projection.to(codebook)
        self.token_embedding.weight.copy_(embedding)
        self.head.weight.copy_(embedding / self.config.dim)

    def forward(self, tokens: Tensor, known: Tensor, where: Tensor) -> Tensor:
        """Logits at some positions.

        Args:
            tokens: (B, r, c) int64 in [0, V); values where ``known`` is false do not matter.
            known: (B, r, c) bool.
            where: (B, r, c) bool, the positions to predict; they see each other as unknown.

        Returns:
            (number of true in ``where``, V), in row-major order of the positions.
        """
        rows, cols = (torch.arange(n, device=tokens.device) for n in tokens.shape[1:])
        place = self.row_embedding(position_bin(rows, len(rows)))[:, None] + self.col_embedding(
            position_bin(cols, len(cols))
        )
        content = torch.where(known[..., None], self.token_embedding(tokens), self.mask_embedding)
        visible = known | where
        x = _residual(content + place)[visible]
        partitions = self._partitions(visible)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, partitions[block.attention.offset])
        logits: Tensor = self.head(_rms_norm(x[where[visible]]))
        return logits

    def _partitions(self, visible: Tensor) -> dict[int, WindowPartition]:
        """Of the visible positions of (B, r, c), by the windows' offset.

        Once for all blocks: on a GPU they wait for what is computed so far.
        """
        samples, rows, cols = visible.nonzero().unbind(1)
        side = self.config.window
        # One sample below the other, so far that no window holds tokens of two.
        rows = rows + samples * side * (visible.shape[1] // side + 2)
        return {
            offset: WindowPartition.of(rows, cols, side=side, offset=offset)
            for offset in {0, side // 2}
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMasks:
    """One draw of what is known and what is to be predicted, both (B, r, c) bool."""

    known: Tensor
    target: Tensor


def draw_training_masks(
    groups: Groups,
    *,
    random_share: float,
    generators: Sequence[torch.Generator],
    min_targets: int = 1,
) -> TrainingMasks:
    """Draw a step of the schedule per sample, or random tokens for a share of the samples.

    A step is drawn with probability proportional to its group's size, so that a sample's mean
    cross entropy over its targets estimates the bits per token of the whole stream.

    Args:
        groups: (r, c) schedule with S groups.
        random_share: share of samples with a random set of known tokens instead, in [0, 1].
        generators: B CPU generators, one a sample; the result is on the CPU.
        min_targets: where the drawn step has fewer targets, the tokens of the next steps are
            targets too, until there are so many: single tokens would teach too little.
    """
    group = torch.from_numpy(groups.astype("int64"))
    sizes = torch.bincount(group.flatten(), minlength=num_groups(groups)).double()
    ends = sizes.cumsum(0)
    known, target = [], []
    for generator in generators:
        if torch.rand((), generator=generator) < random_share:
            ratio = torch.rand((), generator=generator)
            score = torch.rand(group.shape, generator=generator)
            # One token at least stays unknown, or the sample would have nothing to predict.
            unknown = (score >= ratio) | (score == score.max())
            known.append(~unknown)
            target.append(unknown)
        else:
            step = torch.multinomial(sizes, 1, generator=generator)
            last = torch.searchsorted(ends, ends[step] - sizes[step] + min_targets)
            known.append(group < step)
            target.append((group >= step) & (group <= last))
    return TrainingMasks(known=torch.stack(known), target=torch.stack(target))


def masked_cross_entropy(model: MaskedTransformer, tokens: Tensor, masks: TrainingMasks) -> Tensor:
    """Mean over samples of the mean cross entropy, in bits per token, of their target tokens.

    Every sample weighs the same, however many targets it has: `draw_training_masks` has drawn its
    step in proportion to them already.

    Args:
        model: gives the logits.
        tokens: (B, r, c) int64 in [0, V).
        masks: (B, r, c) each, on any device; every sample has a target.
    """
    target = masks.target.to(tokens.device)
    logits = model(tokens, masks.known.to(tokens.device), target)
    nats = F.cross_entropy(logits.float(), tokens[target], reduction="none")
    weight = (target / target.sum((1, 2), keepdim=True))[target]
    return (nats * weight).sum() / (len(tokens) * math.log(2))
