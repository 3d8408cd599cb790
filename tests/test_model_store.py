"""Where models are found, and what the index alone tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from percov2 import model_store
from percov2.bitstream import BitstreamError
from percov2.entropy.schedules import SCHEDULES, make_schedule
from percov2.model_store import (
    INDEX_NAME,
    ModelSummary,
    find_preset,
    preset_names,
    resolve_model,
    resolve_stream_model,
)
from tests.tiny_codec import save_tiny


def summary(*, latents_per_token: int = 2, schedule: str = "quincunx") -> ModelSummary:
    return ModelSummary(
        name="test",
        model_id=7,
        schedule=schedule,
        latents_per_token=latents_per_token,
    )


def write_index(directory: Path, **changes: Any) -> None:
    index = {"name": "m", "model_id": 1, "schedule": "var", "latents_per_token": 2, **changes}
    directory.mkdir(parents=True)
    (directory / INDEX_NAME).write_text(json.dumps(index))


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two presets, and a folder that is none."""
    folder = tmp_path / "presets"
    write_index(folder / "small", name="small", model_id=0x12)
    write_index(folder / "large", name="large", model_id=0xABCD)
    (folder / "leftover").mkdir()
    monkeypatch.setattr(model_store, "PRESETS_DIRECTORY", folder)
    return folder


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# -- names ---------------------------------------------------------------------------------------


def test_presets_are_found_by_name_and_by_id(presets: Path) -> None:
    assert preset_names() == ["large", "small"]
    assert resolve_model("small") == presets / "small"
    found = find_preset(0xABCD)
    assert found is not None
    assert found.name == "large"
    assert find_preset(3) is None
    assert resolve_stream_model(0x12) == "small"


def test_stream_of_no_preset_says_what_to_do(presets: Path) -> None:
    with pytest.raises(
        BitstreamError, match=r"0xbeef.*large \(0xabcd\), small \(0x0012\).*--model"
    ):
        resolve_stream_model(0xBEEF)


def test_every_shipped_preset_has_its_own_name_and_id() -> None:
    shipped = [ModelSummary.read(model_store.PRESETS_DIRECTORY / name) for name in preset_names()]
    assert [preset.name for preset in shipped] == preset_names()
    assert len({preset.model_id for preset in shipped}) == len(shipped)


def test_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name"), "a directory precedes the hub"


@pytest.mark.parametrize("name", ["tinny", "a/b/c", "/no/such", "./nothing", "../nothing"])
def test_unknown_name(presets: Path, name: str) -> None:
    with pytest.raises(ValueError, match="neither a preset") as refused:
        resolve_model(name)
    message = str(refused.value)
    assert repr(name) in message
    assert "large, small" in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline_cache")
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no body/model", "nobody/"])
def test_hub_model_out_of_reach(name: str) -> None:
    with pytest.raises(ValueError, match=r"hub|[Rr]epo") as refused:
        resolve_model(name)
    message = str(refused.value)
    assert name in message
    assert "\n" not in message


def test_hub_model_in_the_cache_needs_no_network(offline_cache: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_cache / "models--owner--name"
    write_index(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert resolve_model("owner/name") == repository / "snapshots" / revision


def test_a_revision_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are of the index's commit, whatever is pushed meanwhile."""
    write_index(tmp_path / "0a1b2c")
    asked = []

    def index(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((repository, revision))
        return str(tmp_path / "0a1b2c" / name)

    def snapshot(repository: str, *, revision: str, ignore_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(tmp_path / revision)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", index)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("owner/name@refs/pr/2") == tmp_path / "0a1b2c"
    assert resolve_model("owner/name") == tmp_path / "0a1b2c"
    assert asked == [
        ("owner/name", "refs/pr/2"),
        ("owner/name", "0a1b2c"),
        ("owner/name", None),
        ("owner/name", "0a1b2c"),
    ]


def test_what_a_transfer_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise httpx2.ReadError("connection reset\nby peer")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"cannot fetch model 'owner/name' .*reset") as refused:
        resolve_model("owner/name")
    assert "\n" not in str(refused.value)


# -- the index -----------------------------------------------------------------------------------


def test_summary_of_a_saved_model(tmp_path: Path) -> None:
    components = save_tiny(tmp_path, reduction=4, schedule="var", name="four")
    assert ModelSummary.read(tmp_path) == ModelSummary(
        name="four",
        model_id=components.config.model_id,
        schedule="var",
        latents_per_token=4,
    )


def test_directory_without_index(presets: Path) -> None:
    with pytest.raises(ValueError, match=f"leftover has no {INDEX_NAME}.*large, small"):
        ModelSummary.read(presets / "leftover")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"_class_name": "FluxPipeline"}', "\ufeff{"]
)
def test_index_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is not a percov2 model index") as refused:
        ModelSummary.read(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"schedule": "zigzag"}, {"latents_per_token": 3}])
def test_index_of_a_later_version(tmp_path: Path, change: dict[str, Any]) -> None:
    write_index(tmp_path / "m", **change)
    with pytest.raises(ValueError, match="this version of percov2 does not know"):
        ModelSummary.read(tmp_path / "m")


# -- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents_per_token", "multiple", "grid"),
    [(1, 16, (8, 14)), (2, 16, (4, 7)), (4, 32, (2, 4)), (8, 64, (1, 2))],
)
def test_grid_of_a_100_by_50_picture(
    latents_per_token: int, multiple: int, grid: tuple[int, int]
) -> None:
    model = summary(latents_per_token=latents_per_token)
    assert model.multiple == multiple
    assert model.token_grid(100, 50) == grid


@given(
    latents_per_token=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(16, 4096),
    height=st.integers(16, 4096),
)
def test_grid_covers_the_picture_with_less_than_one_multiple_to_spare(
    latents_per_token: int, width: int, height: int
) -> None:
    model = summary(latents_per_token=latents_per_token)
    rows, cols = model.token_grid(width, height)
    token = 8 * latents_per_token
    assert 0 <= cols * token - width < model.multiple
    assert 0 <= rows * token - height < model.multiple
    assert cols * token % 16 == rows * token % 16 == 0, "whole patches of the flow transformer"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_the_schedule_s_groups(schedule: str) -> None:
    groups = make_schedule(schedule, 4, 7)
    assert summary(schedule=schedule).steps_total(100, 50) == len(set(groups.flatten().tolist()))


# -- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["percov2.model_store", "percov2.inspection"])
def test_import_brings_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "diffusers", "lightning", "huggingface_hub")
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "[]"
