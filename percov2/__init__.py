"""percov2: an open implementation of PerCoV2, a perceptual image codec for ultra-low bit-rates.

```python
import percov2

codec = percov2.load("tiny")
data = codec.compress("photo.jpg", caption="a red door")
image = codec.decompress(data)
```

Importing the package is cheap; torch is imported when a model is loaded.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from percov2.bitstream import BitstreamError
from percov2.inspection import info

if TYPE_CHECKING:
    from percov2.codec import Codec

__version__ = version("percov2")
__all__ = ["BitstreamError", "Codec", "__version__", "info", "load"]


def load(model: str = "tiny", **options: Any) -> Codec:
    """Load a codec: a preset, a model directory or a hub id.

    Options are those of `percov2.codec.Codec.from_pretrained`: ``device``, ``dtype``,
    ``offload``, ``captioner``.

    Raises:
        ValueError: no such model, or incomplete files.
    """
    from percov2.codec import Codec

    return Codec.from_pretrained(model, **options)


def __getattr__(name: str) -> Any:
    """`percov2.Codec`, imported when first used: it brings torch."""
    if name == "Codec":
        from percov2.codec import Codec

        return Codec
    raise AttributeError(f"module 'percov2' has no attribute {name!r}")
