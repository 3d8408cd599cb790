from __future__ import annotations

import pytest

from percov2.evaluation.distributed import Processes, processes


def test_shares_are_everything_once() -> None:
    things = list("abcdefg")
    shares = [Processes(rank=rank, count=3).share(things) for rank in range(3)]
    assert sorted(thing for share in shares for thing in share) == things
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes() as alone:
        assert alone == Processes()
        alone.wait()
        assert alone.gather("x") == ["x"]
        assert alone.is_first


def test_device_is_that_of_the_process() -> None:
    assert Processes(rank=5, local_rank=1, count=8).device("cuda") == "cuda:1"
    assert Processes(rank=5, local_rank=1, count=8).device("cpu") == "cpu"
    assert Processes().device("cuda") == "cuda"


@pytest.mark.parametrize(("rank", "count"), [("2", "2"), ("x", "2")])
def test_variables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, rank: str, count: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ValueError, match="RANK"), processes():
        pass
