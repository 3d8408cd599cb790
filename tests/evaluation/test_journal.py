from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from percov2.evaluation.journal import Journal, has_features


def test_what_several_processes_wrote_is_read_together(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    first.append("a", {"bytes": 1, "error": "bad"}, {"tiny": rows})
    second.append("b", {"bytes": 2}, {"tiny": rows + 10})
    second.append("a", {"psnr": 3.0, "error": None})
    first.append("c", {}, {"tiny": rows[:1] + 20})
    reader = Journal(tmp_path)
    records = reader.read()
    assert {name: record.get("bytes") for name, record in records.items()} == {
        "a": 1,
        "b": 2,
        "c": None,
    }
    assert records["a"]["psnr"] == 3.0
    assert records["a"]["error"] is None, "what was written last counts"
    for name, expected in {"a": rows, "b": rows + 10, "c": rows[:1] + 20}.items():
        assert has_features(records[name], "tiny")
        np.testing.assert_array_equal(reader.rows(records[name], "tiny"), expected)
    assert not has_features(records["a"], "other")


def test_line_that_a_killed_process_left_is_not_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("a", {"bytes": 1})
    journal.append("b", {"bytes": 2})
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert list(Journal(tmp_path).read()) == ["a"]


def test_damage_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("a", {}, {"tiny": np.ones((2, 3), np.float32)})
    (features,) = tmp_path.glob("*.f32")
    features.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"lacks features of a: delete"):
        journal.rows(journal.read()["a"], "tiny")
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"other\.jsonl holds a line that is no record"):
        journal.read()
