"""What is left out of a stream, and in which order, so that it fits in a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

RATE_WEIGHTS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
"""Of the choice of tokens, with which a file is made to fit. With the last `tiny` blurs (21.3 dB on
Kodak), but with a group less it paints another picture (17.8 dB; docs/entropy.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a stream is made of.

    Attributes:
        steps: groups of tokens.
        caption: "" is none.
        rate_weight: with which the tokens are chosen.
    """

    steps: int
    caption: str
    rate_weight: float

    def describe(self, total: int) -> str:
        """For the user; ``total`` is the number of groups that there are."""
        caption = "with caption" if self.caption else "no caption"
        weight = f", rate weight {self.rate_weight:g}" if self.rate_weight else ""
        return f"{self.steps} of {total} groups, {caption}{weight}"


def first_that_fits(
    write: Callable[[Content], bytes], wanted: Content, max_bytes: int, *, cheaper: bool
) -> tuple[bytes, Content]:
    """The first stream of at most ``max_bytes``, and what it is made of.

    Tried are what is wanted; without caption; cheaper tokens; a group less, again from the wanted
    to the cheapest tokens, and so on. Cheaper tokens come before fewer groups, since a group that
    is not sent is invented: it costs far more fidelity for its bytes.

    Args:
        write: content to the bytes of a file.
        wanted: the first attempt.
        max_bytes: of the file.
        cheaper: whether there are cheaper tokens.

    Raises:
        ValueError: not even one group fits.
    """
    bare = replace(wanted, caption="")
    weights = [w for w in RATE_WEIGHTS if w > wanted.rate_weight] if cheaper else []
    attempts = [wanted] + [
        replace(bare, steps=kept, rate_weight=weight)
        for kept in range(wanted.steps, 0, -1)
        for weight in (wanted.rate_weight, *weights)
    ]
    smallest = None
    for content in dict.fromkeys(attempts):
        data = write(content)
        if len(data) <= max_bytes:
            return data, content
        smallest = len(data) if smallest is None else min(smallest, len(data))
    raise ValueError(
        f"nothing fits in {max_bytes} bytes: the first group alone takes {smallest}; allow "
        "more bytes, or use a model of a lower rate"
    )
