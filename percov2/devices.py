"""Devices of torch, checked before anything is moved there."""

from __future__ import annotations

import torch

from percov2.messages import first_line


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises:
        ValueError: names it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!s} cannot be used ({first_line(error)}): choose cpu, or another one"
        ) from error
