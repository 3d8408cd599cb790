"""The encoder's choice of tokens: similarity, bits, and what they decode to.

Similarity of vectors tells little of colour: a pale sky may turn white at nearly no loss, the more
easily where white costs fewer bits. The encoder therefore looks at what its tokens decode to, group
after group, and lets later tokens make up for the errors of earlier ones and of their neighbours,
as error diffusion does in halftoning (Floyd and Steinberg 1976, "An adaptive algorithm for spatial
greyscale"). At last it decodes, place by place, the few codes that come first there, and takes the
one whose latents are nearest to the picture's, all else considered: analysis by synthesis, as in
speech coders (Atal and Remde 1982, "A new model of LPC excitation for producing natural-sounding
speech at low bit rates"). A decoder neither knows nor needs to.
Shape legend: B batch, C latent channels, h and w latent rows and columns, f the reduction,
r = h / f and c = w / f token rows and columns, V codebook size, n tokens of a group, K candidates a
place. Colours are RGB in the pictures' range [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from percov2.components import TokenizerComponents
from percov2.entropy.token_choice import Choice, check_choice_weights, choose_tokens

_GRID = 5
"""Side of the grids of one code, or one latent, whose middle tells what it decodes to."""
_CODES_AT_ONCE = 128
CANDIDATES = 3
"""Codes of a place that are decoded before one is taken; a decoding of the latents each."""
_STRIDE = 3
"""Places at this distance are tried at once, and the side of their squares in tokens."""


@dataclass(frozen=True, kw_only=True)
class DecodedColors:
    """What a tokenizer's codes decode to, without a painter.

    Attributes:
        of_latents: (C, 3), change of the mean colour of a patch per unit of a latent channel.
        of_codes: (V, 3), mean colour that a code decodes to among its like; from an arbitrary
            origin, the same for all.
    """

    of_latents: Tensor
    of_codes: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, parts: TokenizerComponents) -> DecodedColors:
        """Measured by decoding grids that are constant."""
        device, size = parts.quantizer.codebook.device, parts.quantizer.codebook_size
        with torch.autocast(device.type, enabled=False):
            of_latents = _color_of_latents(parts)
            means = []
            for codes in torch.split(torch.arange(size, device=device), _CODES_AT_ONCE):
                grids = codes[:, None, None].expand(-1, _GRID, _GRID)
                means.append(_middle(_decoded(parts, grids)))
            return cls(of_latents=of_latents, of_codes=torch.cat(means) @ of_latents)


def _decoded(parts: TokenizerComponents, tokens: Tensor) -> Tensor:
    """Tokens (B, r, c) to the latents (B, C, h, w) that they decode to, without a painter."""
    latents: Tensor = parts.latent_decoder(parts.quantizer.tokens_to_features(tokens))
    return latents.float()


def _color_of_latents(parts: TokenizerComponents) -> Tensor:
    """(C, 3), by differences around latents of 0."""
    weight = next(parts.autoencoder.parameters())
    unit = torch.eye(parts.autoencoder.latent_channels, device=weight.device, dtype=weight.dtype)
    half = unit[:, :, None, None].expand(-1, -1, _GRID, _GRID) / 2
    return _middle(parts.autoencoder.decode(half)) - _middle(parts.autoencoder.decode(-half))


def _middle(values: Tensor) -> Tensor:
    """Means (B, K) over the middle of _GRID x _GRID squares of values (B, K, rows, columns)."""
    return _square_means(values.float(), _GRID)[:, :, _GRID // 2, _GRID // 2]


def _square_means(values: Tensor, rows: int) -> Tensor:
    """Means over the squares of a grid that has so many rows of them."""
    return F.avg_pool2d(values, values.shape[2] // rows)


class ColorFeedback:
    """Errors of the colours that tokens decode to, as a term of their choice.

    Args:
        parts: whose quantiser and latent decoder tell what tokens decode to.
        colors: of the same tokenizer.
        latents: (B, C, h, w), of the pictures.
        weight: similarity that a squared error of 1, summed over RGB, is worth.
    """

    def __init__(
        self,
        parts: TokenizerComponents,
        colors: DecodedColors,
        latents: Tensor,
        *,
        weight: float,
    ) -> None:
        self._parts, self._colors, self._latents = parts, colors, latents.float()
        self._weight = weight

    def add_to(self, scores: Tensor, tokens: Tensor, here: Tensor) -> None:
        """Take the weighted errors off the scores, up to a constant per place.

        Args:
            scores: (n, V), of every code at the places of a group; changed in place.
            tokens: (B, r, c), those chosen so far and, elsewhere, those to be replaced.
            here: (B, r, c), bool, the n places.
        """
        codes = self._colors.of_codes
        error = _square_means(self._latents - _decoded(self._parts, tokens), tokens.shape[1])
        error = torch.einsum("bkrc,kd->bdrc", error, self._colors.of_latents)
        around = F.avg_pool2d(F.pad(error, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        # Its own error and the mean of its eight neighbours'.
        error = error + (9 * around - error) / 8
        wanted = codes[tokens[here]] + error.movedim(1, -1)[here]
        scores.addmm_(wanted, codes.T, alpha=2 * self._weight)
        scores.sub_(self._weight * codes.square().sum(1))


@torch.no_grad()
def search_tokens(
    parts: TokenizerComponents, latents: Tensor, choice: Choice, *, weight: float
) -> Tensor:
    """The candidates of largest score - weight x squared error of what they decode to.

    The error is that of the latents of a token and of its eight neighbours, summed: the latent
    decoder sees them together. Every place is visited once, a ninth of them at a time, whose
    squares of 3x3 tokens do not overlap. What the tokens taken decode to is put together of these
    squares, each as its candidate's decoding has it, instead of decoded once more: a token changes
    its neighbours, and little beyond.

    Args:
        parts: whose quantiser and latent decoder tell what tokens decode to.
        latents: (B, C, h, w), of the pictures.
        choice: the tokens so far and what else is tried.
        weight: similarity that a squared error of 1 is worth.

    Returns:
        (B, r, c) int64 tokens in [0, V).
    """
    tokens = choice.tokens.clone()
    codes, scores = (of_places.movedim(-1, 0) for of_places in (choice.codes, choice.scores))
    decoded = _decoded(parts, tokens)
    for top in range(min(_STRIDE, tokens.shape[1])):
        for left in range(min(_STRIDE, tokens.shape[2])):
            places = (..., slice(top, None, _STRIDE), slice(left, None, _STRIDE))
            trials = [decoded]
            for code in codes[1:]:
                trial = tokens.clone()
                trial[places] = code[places]
                trials.append(_decoded(parts, trial))
            errors = torch.stack([_square_errors(latents, trial, tokens) for trial in trials])
            best = (scores - weight * errors)[places].argmax(0)
            tokens[places] = codes[places].gather(0, best[None])[0]
            taken = torch.zeros_like(tokens)
            taken[places] = best
            decoded = _put_together(trials, taken)
    return tokens


def _square_errors(latents: Tensor, decoded: Tensor, tokens: Tensor) -> Tensor:
    """(B, r, c), squared errors of decoded latents in the squares around tokens (B, r, c)."""
    errors = (latents - decoded).square().sum(1, keepdim=True)
    of_tokens = F.avg_pool2d(errors, errors.shape[2] // tokens.shape[1], divisor_override=1)
    return F.avg_pool2d(of_tokens, _STRIDE, stride=1, padding=1, divisor_override=1)[:, 0]


def _put_together(trials: list[Tensor], taken: Tensor) -> Tensor:
    """Latents of which every square is that of the trial taken at its middle.

    Args:
        trials: latents (B, C, h, w) each; the first also stands where no square is.
        taken: (B, r, c), numbers of trials at places at distances of _STRIDE, 0 elsewhere.
    """
    squares = F.max_pool2d(taken[:, None].float(), _STRIDE, stride=1, padding=1)
    squares = F.interpolate(squares, trials[0].shape[2:], mode="nearest")
    found = trials[0]
    for number, trial in enumerate(trials[1:], 1):
        found = torch.where(squares == number, trial, found)
    return found


class TokenChooser:
    """Latents to tokens, as the encoder of a model chooses them.

    What codes decode to is measured at the first choice that asks for it, and kept until `forget`.

    Args:
        parts: of the model.
        schedule: that the tokens will be coded in.
    """

    def __init__(self, parts: TokenizerComponents, *, schedule: str) -> None:
        self._parts, self._schedule = parts, schedule
        self._colors: DecodedColors | None = None

    def forget(self) -> None:
        """Measure anew what codes decode to, at the next choice: of a tokenizer that learns."""
        self._colors = None

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        features: Tensor | None = None,
        *,
        rate_weight: float,
        color_weight: float,
        latent_weight: float,
    ) -> Tensor:
        """Latents (B, C, h, w) to tokens (B, r, c), int64 in [0, V).

        Args:
            latents: of pictures.
            features: the hyper-encoder's of these latents, where they are known already.
            rate_weight: similarity that a bit is worth, at least 0.
            color_weight: see `ColorFeedback`, at least 0.
            latent_weight: see `search_tokens`, at least 0. With all weights 0 the nearest codes are
                taken.

        Raises:
            ValueError: see `check_choice_weights`.
        """
        parts, feedback = self._parts, None
        check_choice_weights(
            rate_weight=rate_weight,
            color_weight=color_weight,
            latent_weight=latent_weight,
            schedule=self._schedule,
        )
        if features is None:
            features = parts.hyper_encoder(latents)
        similarity = parts.quantizer.similarity(features)
        if color_weight:
            if self._colors is None or self._colors.of_codes.device != latents.device:
                self._colors = DecodedColors.of(parts)
            feedback = ColorFeedback(parts, self._colors, latents, weight=color_weight)
        choice = choose_tokens(
            similarity,
            parts.masked_transformer,
            schedule=self._schedule,
            rate_weight=rate_weight,
            feedback=feedback,
            candidates=min(CANDIDATES, similarity.shape[-1]) if latent_weight else 1,
        )
        if not latent_weight:
            return choice.tokens
        # The encoder computes in full precision: training must choose as it does.
        with torch.autocast(latents.device.type, enabled=False):
            return search_tokens(parts, latents.float(), choice, weight=latent_weight)
