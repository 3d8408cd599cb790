"""Where the networks of metrics find their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from percov2.evaluation.weights import weights_from


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_stands_for_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    (tmp_path / "net.pth").write_bytes(b"weights")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", refused)
    before = torch.hub.get_dir()
    with weights_from(tmp_path, "a network"):
        place = Path(torch.hub.get_dir()) / "checkpoints"
        assert (place / "net.pth").read_bytes() == b"weights"
        assert place.is_symlink() == links
    assert torch.hub.get_dir() == before
    assert (tmp_path / "net.pth").exists()
