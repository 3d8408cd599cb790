"""Takes over the weights of a model directory into parts that a configuration has built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from safetensors import safe_open
from torch import Size

from percov2.components import load_component
from percov2.training.checkpointing import shapes_of


def take_over(module: ModelMixin, directory: Path, name: str) -> None:
    """Give a part the weights and buffers of its counterpart in a model directory.

    Args:
        module: the part.
        directory: of the model.
        name: of the part and of its folder.

    Raises:
        ValueError: no such folder, weights that are damaged or incomplete, or a configuration
            that differs; names the field.
    """
    source = load_component(type(module), directory, name)
    difference = _difference(module, dict(source.config))
    if difference is not None:
        raise ValueError(f"{name}.{difference} in {directory}: set the same, or choose another")
    module.load_state_dict(source.state_dict())


def take_over_if_equal(module: ModelMixin, directory: Path, name: str) -> str | None:
    """`take_over`, unless the counterpart has another architecture.

    Returns:
        What differs, if nothing was taken over.

    Raises:
        ValueError: no such folder, or weights that are damaged.
    """
    folder = directory / name
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        difference = _difference(module, config) or _other_weights(module, folder)
        if difference is not None:
            return f"{name}.{difference} in {directory}"
    take_over(module, directory, name)
    return None


def _difference(module: ModelMixin, other: dict[str, Any]) -> str | None:
    """The first field of a part's configuration that another one has not, or has otherwise."""
    for field, value in module.config.items():
        if not field.startswith("_") and other.get(field) != value:
            return f"{field} is {value!r}, but {other.get(field)!r}"
    return None


def _other_weights(module: ModelMixin, folder: Path) -> str | None:
    """The first weight by name of which a part and its counterpart have not the same shape."""
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                found[key] = tuple(Size(file.get_slice(key).get_shape()))
    own = shapes_of(module.state_dict())
    for key in sorted(own.keys() | found.keys()):
        if own.get(key) != found.get(key):
            return f"{key} is {own.get(key)}, but {found.get(key)}"
    return None
