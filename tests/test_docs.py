"""The documentation site: built strictly, complete, and without a request to the network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest

import percov2
from percov2.bitstream import MAX_SIDE, MIN_SIDE
from percov2.model_store import preset_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """`docs/generate.py`, which MkDocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_module(generate: ModuleType) -> None:
    pages = generate.reference_pages()
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {"percov2", "percov2.codec", "percov2.training.callbacks.weight_ema"} <= set(shown)
    files = {path for path in (ROOT / "percov2").rglob("*.py") if path.name[:2] != "__"}
    assert len(shown) == len(files) + 1  # and `percov2` itself


def test_links_and_lists_are_adapted(generate: ModuleType) -> None:
    text = "[a](../launchers/README.md)\n\n1. x:\n   - y\n\n```\n  - z\n```\n"
    assert generate.adapt(text) == ("[a](launchers.md)\n\n1. x:\n    - y\n\n```\n  - z\n```\n")


def test_the_data_path_is_that_of_the_architecture(generate: ModuleType) -> None:
    picture = generate.data_path()
    assert "HyperEncoder" in picture
    assert picture in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    concepts = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert picture in generate.adapt(concepts)


def test_the_model_cards_are_those_of_the_presets(generate: ModuleType) -> None:
    page = generate.model_cards_page()
    for name in preset_names():
        assert f"## Model card: {name}\n" in page
    assert len(re.findall(r"^# ", page, re.MULTILINE)) == 1


def test_limits_in_the_text_are_those_of_the_format() -> None:
    for page in ("quickstart", "faq"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert re.search(rf"\b{MIN_SIDE}(x16)? to {MAX_SIDE}(x4096)?\b", text)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr

    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    command_line = unescape(pages["cli.html"])
    for name in ("compress", "decompress", "truncate", "info", "doctor", "evaluate"):
        assert f"percov2 {name}" in command_line
    assert "--schedule-steps K" in command_line
    assert "python -m percov2.training.memory" in command_line
    reference = unescape((tmp_path / "reference" / "codec.html").read_text(encoding="utf-8"))
    assert str(percov2.Codec.truncate.__doc__).splitlines()[0] in reference

    # What a reader's browser would ask for by itself, links apart.
    requests = (
        r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+stylesheet[^>]+https?://"
    )
    for path in tmp_path.rglob("*.html"):
        assert re.findall(requests, path.read_text(encoding="utf-8")) == [], path.name
