"""Filters: which intact samples are good enough to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from percov2.data.faults import FaultError, FilteredError

# The answers of LAION-400M's and LAION-2B's classifier, as the probabilities that LAION-5B gives.
_NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "LIKELY": 1.0, "NSFW": 1.0}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Bounds that a sample must keep; a sample without the JSON field that is asked for passes.

    Attributes:
        min_size: shortest side in pixels, at least.
        max_aspect: longest side over shortest side, at most (at least 1).
        min_caption: characters of the caption, at least. Samples that are to be trained without
            caption (`empty` in the caption mix) are exempt.
        max_caption: characters of the caption, at most.
        max_watermark: `pwatermark` of the JSON (0 to 1), at most.
        max_nsfw: `punsafe` of the JSON (0 to 1), at most; without it `NSFW`, a number or one of
            UNLIKELY (0), UNSURE (0.5), LIKELY and NSFW (1).

    Raises:
        ValueError: bounds that nothing can keep.
    """

    min_size: int = 1
    max_aspect: float | None = None
    min_caption: int = 0
    max_caption: int | None = None
    max_watermark: float | None = None
    max_nsfw: float | None = None

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"filter max_aspect is {self.max_aspect}: it must be at least 1")
        if self.max_caption is not None and self.max_caption < max(self.min_caption, 1):
            raise ValueError(
                f"filter max_caption is {self.max_caption}: it must be at least 1 and at least "
                f"min_caption, {self.min_caption}"
            )

    @property
    def needs_metadata(self) -> bool:
        """Whether the JSON is asked for anything."""
        return self.max_watermark is not None or self.max_nsfw is not None

    def check_size(self, width: int, height: int) -> None:
        """Refuse a picture of this size in pixels.

        Raises:
            FilteredError: it breaks a bound.
        """
        short, long = sorted((width, height))
        if short < self.min_size:
            raise FilteredError("min_size")
        if self.max_aspect is not None and long > self.max_aspect * short:
            raise FilteredError("max_aspect")

    def check_caption(self, caption: str) -> None:
        """Refuse a caption by its length.

        Raises:
            FilteredError: it breaks a bound.
        """
        if len(caption) < self.min_caption:
            raise FilteredError("min_caption")
        if self.max_caption is not None and len(caption) > self.max_caption:
            raise FilteredError("max_caption")

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Refuse by the JSON of a sample.

        Raises:
            FilteredError: it breaks a bound.
            FaultError: a field is neither a number nor a known word.
        """
        if self.max_watermark is not None:
            watermark = _number(metadata, "pwatermark")
            if watermark is not None and watermark > self.max_watermark:
                raise FilteredError("max_watermark")
        if self.max_nsfw is not None:
            unsafe = _number(metadata, "punsafe")
            if unsafe is None:
                unsafe = _number(metadata, "NSFW")
            if unsafe is not None and unsafe > self.max_nsfw:
                raise FilteredError("max_nsfw")


NO_FILTERS = Filters()
"""Lets everything pass."""


def _number(metadata: Mapping[str, Any], field: str) -> float | None:
    value = metadata.get(field)
    if value is None:
        return None
    try:
        return _NSFW_WORDS[value] if value in _NSFW_WORDS else float(value)
    except (TypeError, ValueError) as error:
        raise FaultError("undecodable_text", f"{field} is {value!r}, not a number") from error
