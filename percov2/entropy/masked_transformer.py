"""The masked image model: predicts unknown tokens from known ones.

Sources: MaskGIT (Chang et al. 2022), M2T (Mentzer et al. 2023), Swin (Liu et al. 2021) for
attention in bounded, alternately shifted windows: cost grows linearly with the grid.
Shape legend: B batch, r and c token rows and columns, V codebook size, d model width, H heads,
y and x rows and columns of a window, n tokens in a window.
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


@dataclass(frozen=True, slots=True)
class _Windows:
    """Partition of a grid into windows of y x x tokens, rolled by half a window if shifted."""

    rows: int
    cols: int
    y: int
    x: int
    shift_y: int
    shift_x: int

    @classmethod
    def of(cls, rows: int, cols: int, window: int, *, shifted: bool) -> _Windows:
        y, x = min(window, rows), min(window, cols)
        shift_y = y // 2 if shifted and rows > y else 0
        shift_x = x // 2 if shifted and cols > x else 0
        return cls(rows, cols, y, x, shift_y, shift_x)

    def split(self, grid: Tensor, fill: float = 0.0) -> Tensor:
        """(B, r, c, d) to (B windows, n, d); short edges are padded with ``fill``."""
        grid = F.pad(grid, (0, 0, 0, -self.cols % self.x, 0, -self.rows % self.y), value=fill)
        grid = grid.roll((-self.shift_y, -self.shift_x), (1, 2))
        batch, rows, cols, dim = grid.shape
        grid = grid.view(batch, rows // self.y, self.y, cols // self.x, self.x, dim)
        return grid.transpose(2, 3).reshape(-1, self.y * self.x, dim)

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """The inverse of `split`."""
        down, across = -(-self.rows // self.y), -(-self.cols // self.x)
        grid = windows.view(batch, down, across, self.y, self.x, -1).transpose(2, 3)
        grid = grid.reshape(batch, down * self.y, across * self.x, -1)
        return grid.roll((self.shift_y, self.shift_x), (1, 2))[:, : self.rows, : self.cols]

    def may_attend(self, device: torch.device) -> Tensor | None:
        """(windows, 1, n, n) bool: the pairs inside one region of the grid; None if all are.

        A roll brings opposite edges of the grid into one window, and padding adds tokens that
        are not there: neither may be attended to.
        """
        padded = self.rows % self.y or self.cols % self.x
        if not (padded or self.shift_y or self.shift_x):
            return None
        row = torch.arange(self.rows, device=device) < self.shift_y
        col = torch.arange(self.cols, device=device) < self.shift_x
        region = (2 * row[:, None] + col[None, :]).float()
        ids = self.split(region[None, :, :, None], fill=-1.0)
        same: Tensor = ids == ids.transpose(1, 2)
        return same[:, None]


class WindowAttention(nn.Module):
    """Multi-head attention in windows with a learned bias per relative position."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, (2 * window - 1) ** 2))

    def _bias(self, y: int, x: int) -> Tensor:
        """(H, n, n) bias of every pair of positions of a y x x window."""
        device = self.position_bias.device
        rows = torch.arange(y, device=device).repeat_interleave(x)
        cols = torch.arange(x, device=device).repeat(y)
        delta_y = rows[:, None] - rows[None, :] + self.window - 1
        delta_x = cols[:, None] - cols[None, :] + self.window - 1
        return self.position_bias[:, delta_y * (2 * self.window - 1) + delta_x]

    def forward(self, grid: Tensor, windows: _Windows) -> Tensor:
        """(B, r, c, d) to the same shape."""
        tokens = windows.split(grid)
        count, length, dim = tokens.shape
        qkv = self.qkv(tokens).view(count, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self._bias(windows.y, windows.x)[None]
        allowed = windows.may_attend(grid.device)
        if allowed is not None:
            bias = torch.where(allowed, bias, float("-inf")).repeat(grid.shape[0], 1, 1, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = self.out(attended.transpose(1, 2).reshape(count, length, dim))
        return windows.join(out, grid.shape[0])


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, grid: Tensor) -> Tensor:
        """(B, r, c, d) to the same shape."""
        rows, cols = grid.shape[1:3]
        windows = _Windows.of(rows, cols, self.window, shifted=self.shifted)
        grid = grid + self.attention(self.norm_1(grid), windows)
        out: Tensor = grid + self.mlp(self.norm_2(grid))
        return out


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
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window, shifted=layer % 2 == 1) for layer in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
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
            where: (B, r, c) bool, the positions to predict.

        Returns:
            (number of true in ``where``, V), in row-major order of the positions.
        """
        embedded = self.token_embedding(tokens)
        grid = torch.where(known[..., None], embedded, self.mask_embedding)
        for block in self.blocks:
            grid = block(grid)
        logits: Tensor = self.head(self.norm(grid[where]))
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMasks:
    """One draw of what is known and what is to be predicted, both (B, r, c) bool."""

    known: Tensor
    target: Tensor


def draw_training_masks(
    groups: Groups, *, random_share: float, generators: Sequence[torch.Generator]
) -> TrainingMasks:
    """Draw a step of the schedule per sample, or random tokens for a share of the samples.

    A step is drawn with probability proportional to its group's size, so that a sample's mean
    cross entropy over its targets estimates the bits per token of the whole stream.

    Args:
        groups: (r, c) schedule with S groups.
        random_share: share of samples with a random set of known tokens instead, in [0, 1].
        generators: B CPU generators, one a sample; the result is on the CPU.
    """
    group = torch.from_numpy(groups.astype("int64"))
    sizes = torch.bincount(group.flatten(), minlength=num_groups(groups)).double()
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
            known.append(group < step)
            target.append(group == step)
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
