"""What a stream says about itself, without decoding it. Imports no torch."""

from __future__ import annotations

from typing import Any

from percov2.bitstream import Stream
from percov2.entropy.caption_coder import decode_caption
from percov2.model_store import find_preset, resolve_summary

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
        ``width`` and ``height`` in pixels; ``model``, its name, or its id in hexadecimal if
        unknown; ``caption``; ``bpp``, bits of the whole file per pixel; ``bytes`` with
        ``header``, ``caption``, ``tokens`` and ``total``; ``steps_sent``; ``steps_total``,
        None if the model is unknown; ``note``, a reminder that detail is generated.

    Raises:
        BitstreamError: not a valid stream.
        ValueError: a model that cannot be found.
    """
    stream = Stream.from_bytes(data)
    summary = find_preset(stream.model_id) if model is None else resolve_summary(model)
    known = summary is not None and summary.model_id == stream.model_id
    return {
        "width": stream.width,
        "height": stream.height,
        "model": summary.name if summary is not None and known else f"{stream.model_id:#06x}",
        "caption": decode_caption(stream.caption_mode, stream.caption),
        "bpp": 8 * len(data) / (stream.width * stream.height),
        "bytes": {
            "header": stream.header_bytes,
            "caption": len(stream.caption),
            "tokens": len(stream.tokens),
            "total": len(data),
        },
        "steps_sent": stream.steps_sent,
        "steps_total": (
            summary.steps_total(stream.width, stream.height)
            if summary is not None and known
            else None
        ),
        "note": GENERATED_NOTE,
    }
