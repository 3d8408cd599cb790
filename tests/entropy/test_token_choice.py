"""Which tokens the encoder chooses when bits are weighed against similarity."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import make_schedule
from percov2.entropy.token_choice import choose_tokens
from percov2.entropy.token_coder import TokenCoder

CODES, ROWS, COLS = 12, 7, 9


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MaskedTransformer(
            codebook_size=CODES, dim=16, num_layers=2, num_heads=2, window=4
        ).eval()
        torch.nn.init.normal_(model.head.weight, std=0.5)
        return model


def similarity(batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, ROWS, COLS, CODES, generator=generator) * 2 - 1


def one_by_one(values: Tensor, model: MaskedTransformer, schedule: str, weight: float) -> Tensor:
    """The definition, token by token."""
    groups = torch.from_numpy(make_schedule(schedule, ROWS, COLS).astype("int64"))[None]
    tokens = torch.zeros(1, ROWS, COLS, dtype=torch.int64)
    for k in range(int(groups.max()) + 1):
        with torch.no_grad():
            shares = model(tokens, groups < k, groups == k).double().softmax(-1)
        for place, share in zip((groups[0] == k).nonzero().tolist(), shares, strict=True):
            worth = [float(v) for v in values[0, place[0], place[1]]]
            scores = [v + weight * math.log2(p) for v, p in zip(worth, share.tolist(), strict=True)]
            tokens[0, place[0], place[1]] = scores.index(max(scores))
    return tokens


def bits(tokens: Tensor, model: MaskedTransformer, schedule: str) -> float:
    coder = TokenCoder(IntegerTransformer(model), schedule=schedule, codebook_size=CODES)
    return sum(coder.bits_per_group(tokens[0].numpy()))


@pytest.mark.parametrize("schedule", ["quincunx", "checkerboard", "qlds", "var"])
def test_choice_equals_its_definition_token_by_token(
    model: MaskedTransformer, schedule: str
) -> None:
    values = similarity()
    chosen = choose_tokens(values, model, schedule=schedule, rate_weight=0.2).tokens
    assert torch.equal(chosen, one_by_one(values, model, schedule, 0.2))
    assert not torch.equal(chosen, values.argmax(-1))


@pytest.mark.parametrize("schedule", ["quincunx", "uniform"])
def test_without_weight_the_nearest_codes_are_chosen(
    model: MaskedTransformer, schedule: str
) -> None:
    values = similarity(2)
    chosen = choose_tokens(values, model, schedule=schedule, rate_weight=0).tokens
    assert torch.equal(chosen, values.argmax(-1))


def test_a_lower_precision_around_it_changes_no_choice(model: MaskedTransformer) -> None:
    values = similarity()
    expected = choose_tokens(values, model, schedule="quincunx", rate_weight=0.2).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = choose_tokens(values, model, schedule="quincunx", rate_weight=0.2).tokens
    assert torch.equal(chosen, expected)


def test_larger_weights_cost_fewer_bits_and_more_similarity(model: MaskedTransformer) -> None:
    values, points = similarity(), []
    for weight in (0.0, 0.1, 0.4, 1.6):
        chosen = choose_tokens(values, model, schedule="quincunx", rate_weight=weight).tokens
        kept = float(values.gather(-1, chosen[..., None]).sum())
        points.append((bits(chosen, model, "quincunx"), kept))
    assert all(
        later[0] < earlier[0] and later[1] < earlier[1]
        for earlier, later in itertools.pairwise(points)
    )


def test_pictures_of_a_batch_do_not_change_each_others_tokens(model: MaskedTransformer) -> None:
    both = torch.cat([similarity(seed=1), similarity(seed=2)])
    together = choose_tokens(both, model, schedule="quincunx", rate_weight=0.2).tokens
    alone = [choose_tokens(one[None], model, schedule="quincunx", rate_weight=0.2) for one in both]
    assert torch.equal(together, torch.cat([choice.tokens for choice in alone]))


class Against:
    """Feedback that forbids some codes."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes

    def add_to(self, scores: Tensor, tokens: Tensor, here: Tensor) -> None:
        scores[:, self.codes] -= 100


@pytest.mark.parametrize("weight", [0.0, 0.2])
@pytest.mark.parametrize("forbidden", [[], [0, 3, 7]])
def test_candidates_are_the_chosen_code_and_the_best_others(
    model: MaskedTransformer, weight: float, forbidden: list[int]
) -> None:
    values, count = similarity(2), 4
    feedback = Against(forbidden) if forbidden else None
    choose = partial(
        choose_tokens, values, model, schedule="quincunx", rate_weight=weight, feedback=feedback
    )
    choice = choose(candidates=count)
    assert choice.codes.shape == choice.scores.shape == (2, ROWS, COLS, count)
    assert torch.equal(choice.tokens, choose().tokens), "their number changes no choice"
    assert not torch.isin(choice.tokens, torch.tensor(forbidden)).any()
    groups = torch.from_numpy(make_schedule("quincunx", ROWS, COLS).astype("int64")).expand(
        2, -1, -1
    )
    expected = values.clone()
    for k in range(int(groups.max()) + 1):
        with torch.no_grad():
            logits = model(choice.tokens, groups < k, groups == k)
        expected[groups == k] += weight * logits.log_softmax(-1) / math.log(2)
    torch.testing.assert_close(choice.scores, expected.gather(-1, choice.codes))
    for scores, codes in zip(expected.flatten(0, 2), choice.codes.flatten(0, 2), strict=True):
        ranking = [c for c in scores.argsort(descending=True).tolist() if c != codes[0]]
        assert codes[1:].tolist() == ranking[: count - 1]


def test_a_weight_without_rates_is_refused(model: MaskedTransformer) -> None:
    with pytest.raises(ValueError, match=r"rate_weight is 0\.3: without the masked model"):
        choose_tokens(similarity(), model, schedule="uniform", rate_weight=0.3)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_an_impossible_weight_is_refused(model: MaskedTransformer, weight: float) -> None:
    with pytest.raises(ValueError, match=r"rate_weight is .*at least 0 and finite"):
        choose_tokens(similarity(), model, schedule="quincunx", rate_weight=weight)
