"""The encoder's choice of tokens by similarity, bits and what they decode to."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import percov2
from percov2.components import TokenizerComponents
from percov2.data.transforms import image_to_tensor
from percov2.entropy.schedules import make_schedule
from percov2.entropy.token_choice import Choice
from percov2.token_chooser import ColorFeedback, DecodedColors, TokenChooser, search_tokens

WEIGHT = 0.5


@pytest.fixture(scope="module")
def parts() -> TokenizerComponents:
    """Of the embedded default: random networks have no colours."""
    return percov2.load("tiny").components.tokenizer


@pytest.fixture
def latents(parts: TokenizerComponents, photograph: Image.Image) -> Tensor:
    """Of the photograph and of its mirror image, (2, 16, 8, 12)."""
    picture = image_to_tensor(photograph)[None]
    with torch.no_grad():
        return parts.autoencoder.encode(torch.cat([picture, picture.flip(3)]))


@pytest.fixture(scope="module")
def scene(parts: TokenizerComponents) -> Tensor:
    """Latents of 256x256 pixels of a photograph, (1, 16, 32, 32): room for errors to cancel in."""
    picture = Image.fromarray(skimage.data.coffee()).crop((64, 0, 320, 256))
    with torch.no_grad():
        return parts.autoencoder.encode(image_to_tensor(picture)[None])


@torch.no_grad()
def color_errors(parts: TokenizerComponents, tokens: Tensor, latents: Tensor) -> Tensor:
    """Mean colours of original and decoded prediction, per 16x16 pixels: their difference."""
    prediction = parts.latent_decoder(parts.quantizer.tokens_to_features(tokens))
    original, decoded = parts.autoencoder.decode(latents), parts.autoencoder.decode(prediction)
    return F.avg_pool2d(original - decoded, 16)


@torch.no_grad()
def test_decoded_colors_are_those_of_decoded_grids(parts: TokenizerComponents) -> None:
    colors = DecodedColors.of(parts)
    size = parts.quantizer.codebook_size
    assert colors.of_latents.shape == (parts.autoencoder.latent_channels, 3)
    assert colors.of_codes.shape == (size, 3)
    some = torch.arange(0, size, 8)
    grids = some[:, None, None].expand(-1, 5, 5)
    prediction = parts.latent_decoder(parts.quantizer.tokens_to_features(grids))
    decoded = parts.autoencoder.decode(prediction)[:, :, 32:48, 32:48].mean((2, 3))
    # The autoencoder is nearly linear in colours; only their origin is free.
    found = colors.of_codes[some]
    difference = (decoded - decoded.mean(0)) - (found - found.mean(0))
    assert difference.square().mean() < 0.01 * decoded.var(0).mean()


@torch.no_grad()
def test_feedback_equals_its_definition_place_by_place(
    parts: TokenizerComponents, latents: Tensor
) -> None:
    colors = DecodedColors.of(parts)
    tokens = parts.quantizer.similarity(parts.hyper_encoder(latents)).argmax(-1)
    here = torch.from_numpy(make_schedule("quincunx", *tokens.shape[1:]) == 3).expand_as(tokens)
    scores = torch.zeros(int(here.sum()), parts.quantizer.codebook_size)
    ColorFeedback(parts, colors, latents, weight=WEIGHT).add_to(scores, tokens, here)

    prediction = parts.latent_decoder(parts.quantizer.tokens_to_features(tokens))
    difference = (latents - prediction).unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    error = difference.movedim(1, -1) @ colors.of_latents
    rows, cols = tokens.shape[1:]
    for score, (b, row, col) in zip(scores, here.nonzero().tolist(), strict=True):
        around = [
            error[b, min(max(row + i, 0), rows - 1), min(max(col + j, 0), cols - 1)]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if (i, j) != (0, 0)
        ]
        wanted = colors.of_codes[tokens[b, row, col]] + error[b, row, col] + sum(around) / 8
        penalty = WEIGHT * (wanted - colors.of_codes).square().sum(1)
        constant = WEIGHT * wanted.square().sum()
        torch.testing.assert_close(score, constant - penalty)


@pytest.mark.parametrize("rate_weight", [0.0, 0.02])
def test_a_color_weight_brings_decoded_colors_nearer(
    parts: TokenizerComponents, scene: Tensor, rate_weight: float
) -> None:
    choose = TokenChooser(parts, schedule="quincunx")
    errors = []
    for weight in (0.0, 1.0, 10.0):
        tokens = choose(scene, rate_weight=rate_weight, color_weight=weight, latent_weight=0)
        errors.append(float(color_errors(parts, tokens, scene).square().mean()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_later_tokens_make_up_for_their_neighbours(
    parts: TokenizerComponents, scene: Tensor
) -> None:
    """Errors of larger squares fall by more than those of tokens: they cancel."""
    choose = TokenChooser(parts, schedule="quincunx")
    ratios = []
    for weight in (0.0, 10.0):
        tokens = choose(scene, rate_weight=0, color_weight=weight, latent_weight=0)
        error = color_errors(parts, tokens, scene)
        ratios.append(float(F.avg_pool2d(error, 2).square().mean() / error.square().mean()))
    assert ratios[1] < 0.8 * ratios[0]


def test_without_weights_the_nearest_codes_are_chosen(
    parts: TokenizerComponents, latents: Tensor
) -> None:
    with torch.no_grad():
        nearest = parts.quantizer.similarity(parts.hyper_encoder(latents)).argmax(-1)
    choose = TokenChooser(parts, schedule="quincunx")
    assert torch.equal(choose(latents, rate_weight=0, color_weight=0, latent_weight=0), nearest)
    assert not torch.equal(
        choose(latents, rate_weight=0, color_weight=10, latent_weight=0), nearest
    )


def test_pictures_of_a_batch_do_not_change_each_others_tokens(
    parts: TokenizerComponents, latents: Tensor
) -> None:
    choose = TokenChooser(parts, schedule="quincunx")
    weights = {"rate_weight": 0.02, "color_weight": 5.0, "latent_weight": 0.02}
    together = choose(latents, **weights)
    alone = [choose(one[None], **weights) for one in latents]
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_search_equals_its_definition_place_by_place(
    parts: TokenizerComponents, latents: Tensor
) -> None:
    """A ninth of the places after the other; a candidate's error is that of 3x3 tokens, which keep
    what it decodes to when it is taken."""
    weight, count = 0.05, 4
    similarity = parts.quantizer.similarity(parts.hyper_encoder(latents))
    nearest = similarity.topk(count)
    choice = Choice(codes=nearest.indices, scores=nearest.values)
    found = search_tokens(parts, latents, choice, weight=weight)

    expected = choice.tokens.clone()
    _, rows, cols = expected.shape
    current = parts.latent_decoder(parts.quantizer.tokens_to_features(expected))
    for top, left in itertools.product(range(3), range(3)):
        trials = [current.clone()]
        for k in range(1, count):
            trial = expected.clone()
            trial[:, top::3, left::3] = choice.codes[:, top::3, left::3, k]
            trials.append(parts.latent_decoder(parts.quantizer.tokens_to_features(trial)))
        for b in range(len(expected)):
            for row, col in itertools.product(range(top, rows, 3), range(left, cols, 3)):
                square = (
                    b,
                    slice(None),
                    slice(2 * max(row - 1, 0), 2 * (row + 2)),
                    slice(2 * max(col - 1, 0), 2 * (col + 2)),
                )
                worth = [
                    float(score - weight * (latents[square] - trial[square]).square().sum())
                    for score, trial in zip(choice.scores[b, row, col], trials, strict=True)
                ]
                best = worth.index(max(worth))
                expected[b, row, col] = choice.codes[b, row, col, best]
                current[square] = trials[best][square]
    assert torch.equal(found, expected)
    assert (found != choice.tokens).float().mean() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["quincunx", "uniform"])
def test_a_latent_weight_brings_decoded_latents_nearer(
    parts: TokenizerComponents, scene: Tensor, schedule: str
) -> None:
    choose, errors = TokenChooser(parts, schedule=schedule), []
    for weight in (0.0, 0.01, 0.1):
        tokens = choose(scene, rate_weight=0, color_weight=0, latent_weight=weight)
        decoded = parts.latent_decoder(parts.quantizer.tokens_to_features(tokens))
        errors.append(float((scene - decoded).square().mean()))
    assert errors[0] > 1.02 * errors[1] > 1.02 * errors[2]


@torch.no_grad()
def test_searched_tokens_are_cheaper_and_nearer_at_once(
    parts: TokenizerComponents, scene: Tensor
) -> None:
    choose, found = TokenChooser(parts, schedule="quincunx"), []
    coder = parts.token_coder("quincunx", device=torch.device("cpu"))
    for weight in (0.0, 0.02):
        tokens = choose(scene, rate_weight=0.02, color_weight=2, latent_weight=weight)
        decoded = parts.latent_decoder(parts.quantizer.tokens_to_features(tokens))
        bits = sum(coder.bits_per_group(tokens[0].numpy()))
        found.append((bits, float((scene - decoded).square().mean())))
    assert found[1][0] < found[0][0]
    assert found[1][1] < 0.98 * found[0][1]


@pytest.mark.parametrize("name", ["color_weight", "latent_weight"])
@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_cannot_be_is_refused(
    parts: TokenizerComponents, latents: Tensor, name: str, weight: float
) -> None:
    weights = {"rate_weight": 0.0, "color_weight": 0.0, "latent_weight": 0.0, name: weight}
    with pytest.raises(ValueError, match=rf"{name} is .*at least 0 and finite"):
        TokenChooser(parts, schedule="quincunx")(latents, **weights)


def test_one_group_leaves_nothing_to_make_up(parts: TokenizerComponents, latents: Tensor) -> None:
    choose = TokenChooser(parts, schedule="uniform")
    with pytest.raises(ValueError, match=r"color_weight is 1: .*schedule uniform has one group"):
        choose(latents, rate_weight=0, color_weight=1, latent_weight=0)


@pytest.mark.parametrize(("weight", "value"), [("color_weight", 5.0), ("latent_weight", 0.1)])
def test_the_models_own_weight_holds_when_none_is_named(
    tiny_model: Path, photograph: Image.Image, tmp_path: Path, weight: str, value: float
) -> None:
    codec = percov2.load(str(tiny_model))
    config = replace(codec.config, **{weight: value})
    replace(codec.components, config=config).save(tmp_path)
    weighing = percov2.load(str(tmp_path))
    assert weighing.config.model_id == codec.config.model_id, "the decoder is the same"
    for uniform in (False, True):
        data = weighing.compress(photograph, uniform=uniform)
        named: dict[str, Any] = {weight: value}
        assert data == codec.compress(photograph, uniform=uniform, **named)
        without: dict[str, Any] = {weight: 0.0}
        plain = weighing.compress(photograph, uniform=uniform, **without)
        assert plain == codec.compress(photograph, uniform=uniform) != data
        assert np.array_equal(codec.decode_tokens(data), weighing.encode_tokens(photograph))
