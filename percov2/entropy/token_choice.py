"""Rate-distortion optimised choice of tokens: a code that is nearly as near and much cheaper.

The nearest code is not the best one for a file: under the masked model one code may cost 3 bits
and another, of almost the same similarity, 12. The encoder therefore weighs bits against
similarity, as video encoders do in their decisions ("Rate-distortion optimization for video
compression", Sullivan and Wiegand 1998). A decoder neither knows nor needs to.
Shape legend: B batch, r and c token rows and columns, V codebook size, K candidates a place,
n places of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.schedules import make_schedule, num_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Codes for every place, the chosen one first, then those of next largest score.

    Attributes:
        codes: (B, r, c, K) int64 in [0, V), no two alike at a place.
        scores: (B, r, c, K), similarity - rate_weight x bits of each.
    """

    codes: Tensor
    scores: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, r, c), those chosen."""
        return self.codes[..., 0]


class Feedback(Protocol):
    """What else tells for or against a code, once earlier groups are chosen."""

    def add_to(self, scores: Tensor, tokens: Tensor, here: Tensor) -> None:
        """Change the scores (n, V) of the places ``here`` (B, r, c) in place."""


def check_choice_weights(
    *,
    rate_weight: float,
    color_weight: float = 0.0,
    latent_weight: float = 0.0,
    schedule: str,
) -> None:
    """Refuse weights that cannot be; those that are left out are not weighed.

    Raises:
        ValueError: negative, infinite or not a number; or not 0 for the schedule ``uniform``, in
            which all codes cost the same and no token follows another.
    """
    weights = {
        "rate_weight": rate_weight,
        "color_weight": color_weight,
        "latent_weight": latent_weight,
    }
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}: it must be at least 0 and finite")
    if rate_weight and schedule == "uniform":
        raise ValueError(
            f"rate_weight is {rate_weight}: without the masked model every code costs the same, "
            "leave it out"
        )
    if color_weight and schedule == "uniform":
        raise ValueError(
            f"color_weight is {color_weight}: later tokens make up for earlier ones, and the "
            "schedule uniform has one group only; leave it out"
        )


@torch.no_grad()
def choose_tokens(
    similarity: Tensor,
    model: MaskedTransformer,
    *,
    schedule: str,
    rate_weight: float,
    feedback: Feedback | None = None,
    candidates: int = 1,
) -> Choice:
    """The codes of largest similarity - rate_weight x bits + feedback, group after group.

    Greedy: what a choice does to the bits of later groups is not looked at. The bits are those of
    the float model; the integers that code cost nearly the same.

    Args:
        similarity: (B, r, c, V), of every code with the vector at its place, in [-1, 1].
        model: gives the bits.
        schedule: that the tokens will be coded in.
        rate_weight: similarity that a bit is worth, at least 0.
        feedback: asked before the choice of each group; without it and with a rate weight of 0
            the nearest codes are taken.
        candidates: K, 1 to V.

    Returns:
        The tokens, and with them what else was to be considered.

    Raises:
        ValueError: see `check_choice_weights`.
    """
    check_choice_weights(rate_weight=rate_weight, schedule=schedule)
    if not rate_weight and feedback is None:
        nearest = similarity.topk(candidates)
        return Choice(codes=nearest.indices, scores=nearest.values)
    tokens = similarity.argmax(-1)
    codes = tokens.new_empty(*tokens.shape, candidates)
    ranked = similarity.new_empty(codes.shape)
    order = make_schedule(schedule, *tokens.shape[1:])
    groups = torch.from_numpy(order.astype("int64")).to(tokens.device).expand_as(tokens)
    # The encoder computes in full precision: training must choose as it does.
    with torch.autocast(tokens.device.type, enabled=False):
        for k in range(num_groups(order)):
            here = groups == k
            scores = similarity[here]
            if rate_weight:
                logits = model(tokens, groups < k, here).float()
                # In place: with 8,192 codes a group of a large picture takes a gigabyte.
                scores.add_(logits.log_softmax(-1), alpha=rate_weight / math.log(2))
            judged = scores
            if feedback is not None:
                judged = scores.clone()
                feedback.add_to(judged, tokens, here)
            tokens[here] = judged.argmax(-1)
            codes[here], ranked[here] = _ranked(scores, tokens[here], candidates)
    return Choice(codes=codes, scores=ranked)


def _ranked(scores: Tensor, chosen: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Codes and scores (n, K) of a group: those chosen (n,), then those of largest score (n, V)."""
    first = scores.gather(1, chosen[:, None])
    # In place, as above: the scores are not needed any more.
    best = scores.scatter_(1, chosen[:, None], math.inf).topk(candidates)
    return best.indices, torch.cat([first, best.values[:, 1:]], 1)
