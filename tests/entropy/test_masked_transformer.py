from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import (
    ACTIVATION_RANGE,
    HIDDEN_RANGE,
    RESIDUAL_RANGE,
    Block,
    MaskedTransformer,
    TrainingMasks,
    draw_training_masks,
    masked_cross_entropy,
)
from percov2.entropy.schedules import RASTER, make_schedule, num_groups
from percov2.entropy.token_coder import TokenCoder
from tests.tiny_models import randomise

V = 16
SIZES = [(1, 1), (4, 4), (3, 9), (8, 8), (9, 13), (5, 2)]


def make_model(*, num_layers: int = 2, window: int = 4) -> MaskedTransformer:
    """Random everywhere: at initialisation the position bias is zero."""
    torch.manual_seed(0)
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=V, dim=16, num_layers=num_layers, num_heads=2, window=window
    )
    randomise(model, std=0.3)
    model.eval()
    return model


def make_tokens(rows: int, cols: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (batch, rows, cols), generator=generator)


def everywhere(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_unknown_tokens_do_not_matter_and_known_ones_do(size: tuple[int, int]) -> None:
    model, tokens = make_model(), make_tokens(*size, batch=2)
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    known[0, 0, 0] = True
    logits = model(tokens, known, ~known)
    assert logits.shape == (int((~known).sum()), V)
    other = (tokens + 1) % V
    assert torch.equal(model(torch.where(known, tokens, other), known, ~known), logits)
    if (~known[0]).any():
        assert not torch.equal(model(torch.where(known, other, tokens), known, ~known), logits)


@torch.no_grad()
def test_samples_follow_each_other_whatever_their_numbers_of_positions() -> None:
    model, tokens = make_model(), make_tokens(5, 6, batch=2)
    known, where = tokens < 6, tokens > 10
    where[1, :2] = False
    apart = [
        model(tokens[i : i + 1], known[i : i + 1], where[i : i + 1]) for i in range(len(tokens))
    ]
    assert len(apart[0]) != len(apart[1])
    torch.testing.assert_close(model(tokens, known, where), torch.cat(apart))


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix() -> None:
    model, tokens = make_model(), make_tokens(9, 5, batch=3)
    known = tokens < 8
    together = model(tokens, known, everywhere(tokens)).view(3, 9, 5, V)
    for i in range(3):
        alone = model(tokens[i : i + 1], known[i : i + 1], everywhere(tokens[i : i + 1]))
        torch.testing.assert_close(together[i], alone.view(9, 5, V), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_tokens_neither_known_nor_asked_for_take_no_part(size: tuple[int, int]) -> None:
    """The same logits whatever they are, and the same as in a model that never saw them."""
    model, tokens = make_model(), make_tokens(*size, batch=2)
    part = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4))
    known, where = part < 0.3, part > 0.6
    where[:, 0, 0], known[:, 0, 0] = True, False
    logits = model(tokens, known, where)
    hidden = ~known & ~where
    assert torch.equal(model((tokens + hidden) % V, known, where), logits)
    if hidden.any():
        more = model(tokens, known, ~known)[where[~known]]
        assert not torch.equal(more, logits), "asked for, they would be seen as unknown"


@torch.no_grad()
def test_samples_of_which_other_tokens_are_visible_do_not_mix() -> None:
    model, tokens = make_model(num_layers=3), make_tokens(9, 13, batch=3)
    known = torch.zeros(tokens.shape, dtype=torch.bool)
    known[0, :2], known[1] = True, True
    where = ~known
    where[1, 4, 4:], known[1, 4, 4:] = True, False
    where[2] = False
    where[2, 8, 12] = True
    together = model(tokens, known, where).split(where.sum((1, 2)).tolist())
    for i, logits in enumerate(together):
        alone = model(tokens[i : i + 1], known[i : i + 1], where[i : i + 1])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def naive_block(block: Block, grid: Tensor, visible: Tensor, offset: int) -> Tensor:
    """The block on (r, c, d) with dense attention among all visible positions (r, c)."""
    rows, cols, dim = grid.shape
    attention = block.attention
    heads, window = attention.num_heads, attention.window
    y, x = (i.flatten() for i in torch.meshgrid(torch.arange(rows), torch.arange(cols)))
    y, x = y + offset, x + offset
    together = (y[:, None] // window == y // window) & (x[:, None] // window == x // window)
    together &= visible.flatten() | torch.eye(rows * cols, dtype=torch.bool)
    delta = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    qkv = attention.qkv(naive_norm(grid)).clamp(-ACTIVATION_RANGE, ACTIVATION_RANGE)
    q, k, v = qkv.view(-1, 3, heads, dim // heads).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8
    scores = scores + attention.position_bias[:, delta.clamp(0, (2 * window - 1) ** 2 - 1)]
    weights = scores.masked_fill(~together, float("-inf")).softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, v).reshape(rows, cols, dim)
    grid = (grid + attention.out(mixed)).clamp(-RESIDUAL_RANGE, RESIDUAL_RANGE)
    hidden = block.mlp_in(naive_norm(grid)).clamp(0, HIDDEN_RANGE)
    return (grid + block.mlp_out(hidden)).clamp(-RESIDUAL_RANGE, RESIDUAL_RANGE)


def naive_norm(x: Tensor) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed.clamp(-ACTIVATION_RANGE, ACTIVATION_RANGE)


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (8, 12), (9, 13), (6, 3), (1, 7)])
@torch.no_grad()
def test_windowed_attention_equals_dense_masked_attention(size: tuple[int, int]) -> None:
    model, tokens = make_model(num_layers=3), make_tokens(*size)
    known = tokens < 8
    where = ~known & (torch.arange(size[1]) % 3 > 0)
    where[0, 0, 0] = True
    grid = torch.where(known[0, ..., None], model.token_embedding(tokens[0]), model.mask_embedding)
    bins = [torch.arange(n) * 16 // n for n in size]
    grid = grid + model.row_embedding(bins[0])[:, None] + model.col_embedding(bins[1])
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        grid = naive_block(block, grid, (known | where)[0], offset=2 if i % 2 else 0)
    expected = model.head(naive_norm(grid[where[0]]))
    logits = model(tokens, known, where)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (13, 15)])
@torch.no_grad()
def test_a_token_reaches_its_windows_and_no_opposite_edge(size: tuple[int, int]) -> None:
    model, tokens = make_model(), make_tokens(*size)
    known = everywhere(tokens)
    before = model(tokens, known, known).view(*size, V)
    tokens[0, 0, 0] = (tokens[0, 0, 0] + 1) % V
    changed = (model(tokens, known, known).view(*size, V) != before).any(-1)
    expected = torch.zeros(size, dtype=torch.bool)
    # Rows 0 to 3 share a window with it, then rows 2 to 5 share a shifted one with those.
    expected[:6, :6] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_the_place_in_the_grid_matters() -> None:
    model = make_model()
    tokens = torch.zeros(1, 16, 16, dtype=torch.int64)
    logits = model(tokens, ~everywhere(tokens), everywhere(tokens)).view(16, 16, V)
    assert not torch.allclose(logits[4, 4], logits[8, 4])
    assert not torch.allclose(logits[4, 4], logits[4, 8])


@torch.no_grad()
def test_extreme_weights_stay_in_range() -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.mul_(1e4)
    tokens = make_tokens(8, 8)
    assert model(tokens, tokens < 8, tokens >= 8).isfinite().all()


@torch.no_grad()
def test_saved_model_gives_equal_logits(tmp_path: Path) -> None:
    model, tokens = make_model(), make_tokens(5, 6)
    model.save_pretrained(tmp_path)
    known = tokens < 8
    loaded = MaskedTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens, known, ~known), model(tokens, known, ~known))


def draw(name: str, batch: int, *, random_share: float, min_targets: int = 1) -> TrainingMasks:
    return draw_training_masks(
        make_schedule(name, 6, 8),
        random_share=random_share,
        generators=[torch.Generator().manual_seed(3 + sample) for sample in range(batch)],
        min_targets=min_targets,
    )


@pytest.mark.parametrize("name", ["checkerboard", "quincunx", "qlds", "var", "uniform"])
@pytest.mark.parametrize("random_share", [0.0, 0.5, 1.0])
def test_known_and_target_are_disjoint_and_never_empty(name: str, random_share: float) -> None:
    masks = draw(name, 64, random_share=random_share)
    assert masks.known.shape == masks.target.shape == (64, 6, 8)
    assert masks.known.dtype == masks.target.dtype == torch.bool
    assert not (masks.known & masks.target).any()
    assert masks.target.any((1, 2)).all()


@pytest.mark.parametrize("name", ["checkerboard", "quincunx", "qlds", "var"])
def test_scheduled_masks_are_steps_of_the_schedule(name: str) -> None:
    groups = torch.from_numpy(make_schedule(name, 6, 8).astype(np.int64))
    masks = draw(name, 4000, random_share=0.0)
    sizes = torch.bincount(groups.flatten())
    drawn = torch.zeros(len(sizes))
    for known, target in zip(masks.known, masks.target, strict=True):
        step = int(groups[target][0])
        assert torch.equal(target, groups == step)
        assert torch.equal(known, groups < step)
        drawn[step] += 1
    torch.testing.assert_close(drawn / 4000, sizes / sizes.sum(), atol=0.03, rtol=0)


def test_single_tokens_are_drawn_in_runs() -> None:
    """Raster order: five tokens behind the known ones, or what is left of them."""
    masks = draw(RASTER, 200, random_share=0.0, min_targets=5)
    lengths = set()
    for known, target in zip(masks.known.flatten(1), masks.target.flatten(1), strict=True):
        first, run = int(known.sum()), int(target.sum())
        assert known[:first].all()
        assert target[first : first + run].all()
        assert run == min(5, 48 - first)
        lengths.add(run)
    assert lengths == {1, 2, 3, 4, 5}


def test_targets_of_several_steps_are_whole_groups() -> None:
    groups = torch.from_numpy(make_schedule("quincunx", 6, 8).astype(np.int64))
    masks = draw("quincunx", 100, random_share=0.0, min_targets=4)
    for known, target in zip(masks.known, masks.target, strict=True):
        asked = groups[target].unique()
        assert torch.equal(target, torch.isin(groups, asked))
        assert torch.equal(known, groups < asked[0])
        smaller = torch.isin(groups, asked[:-1]).sum()
        assert target.sum() >= min(4, int((~known).sum()))
        assert smaller < 4


def test_random_masks_hide_any_share_and_predict_all_that_is_hidden() -> None:
    masks = draw("qlds", 500, random_share=1.0)
    assert torch.equal(masks.target, ~masks.known)
    share = masks.known.float().mean((1, 2))
    assert share.quantile(0.1) < 0.15
    assert share.quantile(0.9) > 0.85
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)


def test_draws_repeat_with_the_generator() -> None:
    first, again = (draw("var", 20, random_share=0.5) for _ in range(2))
    assert torch.equal(first.known, again.known)
    assert torch.equal(first.target, again.target)


def test_a_sample_s_masks_do_not_depend_on_the_rest_of_the_batch() -> None:
    whole, part = (draw("quincunx", batch, random_share=0.5) for batch in (20, 7))
    assert torch.equal(whole.known[:7], part.known)
    assert torch.equal(whole.target[:7], part.target)


def masks_of_steps(groups: Tensor, steps: list[int]) -> TrainingMasks:
    step = torch.tensor(steps)[:, None, None]
    return TrainingMasks(known=groups < step, target=groups == step)


@pytest.mark.parametrize("name", ["checkerboard", "quincunx", "qlds", "var"])
@torch.no_grad()
def test_expected_cross_entropy_is_the_bits_per_token_of_the_stream(name: str) -> None:
    model, tokens = make_model(), make_tokens(6, 7)
    array = make_schedule(name, 6, 7)
    groups = torch.from_numpy(array.astype(np.int64))
    coder = TokenCoder(IntegerTransformer(model), schedule=name, codebook_size=V)
    bits = coder.bits_per_group(tokens[0].numpy())
    assert max(bits) > 0
    expected = 0.0
    for step in range(num_groups(array)):
        loss = masked_cross_entropy(model, tokens, masks_of_steps(groups, [step])).item()
        probability = (array == step).mean()
        expected += probability * loss
    assert expected == pytest.approx(sum(bits) / array.size, rel=5e-3)


@torch.no_grad()
def test_samples_weigh_the_same_whatever_their_number_of_targets() -> None:
    """Steps are drawn by size already: pooling the targets would count large groups twice."""
    model, tokens = make_model(), make_tokens(6, 7, batch=3)
    groups = torch.from_numpy(make_schedule("quincunx", 6, 7).astype(np.int64))
    steps = [0, 2, 1]
    together = masked_cross_entropy(model, tokens, masks_of_steps(groups, steps))
    apart = [
        masked_cross_entropy(model, tokens[i : i + 1], masks_of_steps(groups, [step]))
        for i, step in enumerate(steps)
    ]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_equal_logits_cost_log2_of_the_codebook() -> None:
    model, tokens = make_model(), make_tokens(6, 8, batch=4)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    loss = masked_cross_entropy(model, tokens, draw("var", 4, random_share=0.5))
    assert loss.item() == pytest.approx(4)


def test_every_parameter_learns_and_the_loss_falls() -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(codebook_size=V, dim=16, num_layers=2, num_heads=2, window=4)
    tokens = make_tokens(6, 8, batch=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = masked_cross_entropy(model, tokens, draw("quincunx", 8, random_share=0.2))
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.count_nonzero() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_initial_logits_follow_the_codebook() -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(codebook_size=32, dim=64, num_layers=1, num_heads=2, window=4)
    codebook = torch.nn.functional.normalize(torch.randn(32, 8), dim=1)
    codebook[1] = codebook[0]
    model.init_from_codebook(codebook, seed=0)
    embedding = model.token_embedding.weight
    assert torch.equal(embedding[0], embedding[1])
    similarity = (
        torch.nn.functional.normalize(embedding, dim=1)
        @ torch.nn.functional.normalize(embedding, dim=1).T
    )
    # A random projection to 64 channels keeps cosines up to about 1 / sqrt(64).
    assert (similarity - codebook @ codebook.T).abs().max() < 0.6
    assert (
        torch.corrcoef(torch.stack([similarity.flatten(), (codebook @ codebook.T).flatten()]))[0, 1]
        > 0.8
    )
    tokens, known = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool)
    logits = model(tokens, known, ~known)
    assert torch.equal(logits[:, 0] - model.head.bias[0], logits[:, 1] - model.head.bias[1])
