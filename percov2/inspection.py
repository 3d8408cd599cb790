"""What a stream says about itself, without decoding it. Imports no torch."""

from __future__ import annotations

from typing import Any

from percov2.bitstream import BitstreamError, Stream
from percov2.entropy.caption_coder import CaptionCoder
from percov2.entropy.range_coder import RangeDecoder
from percov2.model_store import ModelSummary, find_preset, resolve_summary

GENERATED_NOTE = (
    "Detail is generated: texture, text and faces may differ from the original photograph."
)


def png_metadata(description: dict[str, Any]) -> dict[str, str]:
    """Text chunks of a reconstruction's PNG, from what `info` returns."""
    metadata = {
        "Comment": GENERATED_NOTE,
        "percov2:model": description["model"],
        "percov2:bytes": str(description["bytes"]["total"]),
        "percov2:bpp": f"{description['bpp']:.6f}",
    }
    if not description.get("verified", True):
        metadata["percov2:unverified"] = (
            f"the stream was cut or damaged: {description['steps_whole']} of its "
            f"{description['steps_sent']} token groups could be read"
        )
    if description["caption"]:
        # PNG ends a text at NUL.
        metadata["Description"] = description["caption"].replace("\0", "\\0")
    return metadata


def info(data: bytes, *, model: str | None = None) -> dict[str, Any]:
    """Describe a `.pcv2` stream.

    Args:
        data: the file's bytes.
        model: the model that wrote it, if it is no preset: directory or hub id.

    Returns:
        See `describe`.

    Raises:
        BitstreamError: not a valid stream.
        ValueError: a model that cannot be found.
    """
    stream = Stream.from_bytes(data)
    summary = find_preset(stream.model_id) if model is None else resolve_summary(model)
    return describe(data, summary)


def describe(data: bytes, summary: ModelSummary | None, *, verify: bool = True) -> dict[str, Any]:
    """Describe a stream of a model whose index is at hand.

    Args:
        data: the file's bytes.
        summary: of the model that wrote it; None, or that of another model, if unknown.
        verify: False describes a cut stream.

    Returns:
        ``width`` and ``height`` in pixels; ``model``, its name, or its id in hexadecimal if
        unknown; ``caption``; ``bpp``, bits of the whole file per pixel; ``bytes`` with
        ``header``, ``caption``, ``tokens`` and ``total``: caption and tokens share one payload,
        of which the caption's part is its code length to the nearest byte; ``steps_sent`` and
        ``steps_total``, None if only the unknown model could tell; ``entropy``, ``model`` or
        ``uniform``; ``note``, a reminder that detail is generated.

    Raises:
        BitstreamError: not a valid stream.
    """
    stream = Stream.from_bytes(data, verify=verify)
    known = summary is not None and summary.model_id == stream.model_id
    caption, caption_bytes = "", 0
    if stream.has_caption:
        coder = CaptionCoder.shipped()
        caption = coder.decode(RangeDecoder(stream.payload))
        caption_bytes = min(round(coder.bits(caption) / 8), len(stream.payload))
    total = None
    if summary is not None and known:
        total = summary.steps_total(stream.width, stream.height)
        if stream.steps_sent is not None and stream.steps_sent > total:
            raise BitstreamError(
                f"inconsistent stream: it claims {stream.steps_sent} of {total} token groups"
            )
    return {
        "width": stream.width,
        "height": stream.height,
        "model": summary.name if summary is not None and known else f"{stream.model_id:#06x}",
        "caption": caption,
        "bpp": 8 * len(data) / (stream.width * stream.height),
        "bytes": {
            "header": stream.header_bytes,
            "caption": caption_bytes,
            "tokens": len(stream.payload) - caption_bytes,
            "total": len(data),
        },
        "steps_sent": total if stream.steps_sent is None else stream.steps_sent,
        "steps_total": total,
        "entropy": "uniform" if stream.uniform else "model",
        "note": GENERATED_NOTE,
    }
