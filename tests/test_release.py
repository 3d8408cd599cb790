"""What a release is made of: the wheel's content, the tag, the workflow.

`.ci/check-wheel` itself, which needs a package index, runs before each release.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import percov2

ROOT = Path(__file__).parents[1]


def test_a_tag_of_another_version_is_refused() -> None:
    command = [str(ROOT / ".ci" / "check-wheel"), "v999.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"v999.0.0 does not fit version {percov2.__version__}" in done.stderr


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    loaded: dict[Any, Any] = yaml.safe_load(text)
    return loaded


def test_a_tag_starts_the_workflow(workflow: dict[Any, Any]) -> None:
    # YAML 1.1 reads the key `on` as a truth value.
    assert workflow[True] == {"push": {"tags": ["v*"]}}


def test_nothing_is_published_that_was_not_tried(workflow: dict[Any, Any]) -> None:
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert '.ci/check-wheel "$GITHUB_REF_NAME"' in [step.get("run") for step in build["steps"]]
    assert publish["needs"] == "build"
    assert not any("run" in step for step in publish["steps"])


def test_only_the_publishing_job_may_identify_itself(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in workflow["jobs"]["build"]
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.slow
def test_the_wheel_holds_all_files_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "percov2", source / "percov2", ignore=ignored)
    package = {
        path.relative_to(source).as_posix()
        for path in (source / "percov2").rglob("*")
        if path.is_file()
    }
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("percov2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == package
