"""The stream: every sample once an epoch, exact resume, faults counted, nothing hangs."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.data.faults import FaultError, StreamError
from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.samples import PictureDecoder, RawSample, Sample, make_captions
from percov2.data.shards import Retry, expand_shards
from percov2.data.stream import FileStream, Progress, SampleStream, ShardStream
from percov2.data.transforms import CropTransform
from tests.data.shard_factory import sample, write_shard, write_shards


def shard_stream(shards: list[str], **changes: Any) -> ShardStream:
    filters = changes.pop("filters", NO_FILTERS)
    options: dict[str, Any] = {
        "shards": shards,
        "shuffle_block": 4,
        "retry": Retry(attempts=1),
        "decoder": PictureDecoder(
            crop=CropTransform(size=16, max_zoom=1.2),
            captions=make_captions(None),
            filters=filters,
        ),
        "progress": Progress(),
        "seed": 0,
        "rank": 0,
        "world_size": 1,
        "max_consecutive_faults": 5,
    }
    return ShardStream(**{**options, **changes})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards of 7, 1, 0, 6 and 5 samples."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), 7, 1, 0, 6, 5)
    return expand_shards(str(folder / "*.tar"))


def keys_of_epoch(stream: SampleStream, epoch: int, unit: int, units: int) -> list[int]:
    items = stream.read(stream.start_of(epoch), unit, units)
    return [int(item["__key__"]) for item, _ in items if not isinstance(item, FaultError)]


@pytest.mark.parametrize("units", [1, 3, 5, 6, 20])
def test_all_units_together_see_every_sample_once_an_epoch(shards: list[str], units: int) -> None:
    stream = shard_stream(shards)
    for epoch in range(2):
        seen = [keys_of_epoch(stream, epoch, unit, units) for unit in range(units)]
        assert sorted(key for keys in seen for key in keys) == list(range(19))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 30), units=st.integers(1, 40), epoch=st.integers(0, 50))
def test_so_do_the_units_of_files(count: int, units: int, epoch: int) -> None:
    stream = file_stream([sample(0, jpg=None, json=None)] * count)
    order: list[int] = []
    stream.records = Indices(count)
    for unit in range(units):
        order += keys_of_epoch(stream, epoch, unit, units)
    assert sorted(order) == list(range(count))


class Indices:
    """Records that hold nothing but their number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> RawSample:
        return {"__key__": str(index), "__url__": "memory"}


def file_stream(records: Any) -> FileStream:
    options = vars(shard_stream(["x"]))
    names = ("decoder", "progress", "seed", "rank", "world_size", "max_consecutive_faults")
    return FileStream(records=records, name="memory", **{name: options[name] for name in names})


def test_epochs_and_seeds_have_orders_of_their_own(shards: list[str]) -> None:
    stream = shard_stream(shards)
    orders = [keys_of_epoch(stream, epoch, 0, 1) for epoch in range(4)]
    orders.append(keys_of_epoch(shard_stream(shards, seed=1), 0, 0, 1))
    assert len({tuple(order) for order in orders}) == 5
    assert orders[0] == keys_of_epoch(shard_stream(shards), 0, 0, 1)


def test_shuffling_is_within_blocks(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 12)
    order = keys_of_epoch(shard_stream([str(folder / "00000.tar")]), 0, 0, 1)
    blocks = [order[start : start + 4] for start in (0, 4, 8)]
    assert [sorted(block) for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert any(block != sorted(block) for block in blocks)


@settings(max_examples=20, deadline=None)
@given(
    units=st.sampled_from([1, 2, 3, 7]),
    unit=st.integers(0, 6),
    epoch=st.integers(0, 3),
    taken=st.integers(0, 40),
    block=st.sampled_from([1, 3, 4, 100]),
)
def test_every_position_leads_to_the_rest(
    shards: list[str], units: int, unit: int, epoch: int, taken: int, block: int
) -> None:
    def run(position: list[int]) -> Iterator[tuple[str, list[int]]]:
        stream = shard_stream(shards, shuffle_block=block)
        while True:
            for item, behind in stream.read(position, unit % units, units):
                assert not isinstance(item, FaultError)
                yield item["__key__"], behind
            position = stream.start_of(position[0] + 1)

    whole = list(islice(run([epoch, 0, 0, 0, 0]), taken + 20))
    resumed = list(islice(run(whole[taken][1]), 19))
    assert resumed == whole[taken + 1 :]


def test_a_sample_is_the_same_in_whatever_process_it_is_read(shards: list[str]) -> None:
    """Its crop depends on seed, epoch and key alone."""

    def first_epoch(rank: int, world_size: int) -> dict[str, Any]:
        stream = shard_stream(shards, rank=rank, world_size=world_size)
        found: dict[str, Any] = {}
        for one in stream:
            if one["stream"]["position"][0] > 0 or one["key"] in found:
                return found
            found[one["key"]] = one["image"]
        raise AssertionError

    alone = first_epoch(0, 1)
    assert len(alone) == 19
    for rank in range(2):
        for key, image in first_epoch(rank, 2).items():
            assert image.equal(alone[key]), key


def test_a_stream_can_be_sent_to_a_spawned_worker(shards: list[str]) -> None:
    stream = pickle.loads(pickle.dumps(shard_stream(shards)))
    keys = [one["key"] for one in islice(stream, 10)]
    assert keys == [one["key"] for one in islice(shard_stream(shards), 10)]


def test_one_shard_feeds_eight_units_and_none_waits_for_ever(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 3)
    taken: Counter[str] = Counter()
    for unit in range(8):
        stream = shard_stream([str(folder / "00000.tar")], rank=unit, world_size=8)
        taken.update(one["key"] for one in islice(stream, 3))
    assert sum(taken.values()) == 24
    assert taken.keys() == {"000000000", "000000001", "000000002"}


def consume(stream: SampleStream, count: int) -> list[Sample]:
    """As the DataModule does: all that is taken is recorded."""
    found = list(islice(stream, count))
    for one in found:
        stream.progress.record(one["stream"])
    return found


@pytest.fixture
def damaged(tmp_path: Path) -> list[str]:
    """Ten samples in three shards and, beside them, one fault of each kind."""
    good = [sample(number) for number in range(12)]
    faulty = [
        sample(20, jpg=b"no picture"),
        sample(21, txt=None),
        sample(22, txt=b"\xff"),
        sample(23, jpg=None),
    ]
    write_shard(tmp_path / "0.tar", [*good[:3], *faulty[:2], good[3]])
    write_shard(tmp_path / "1.tar", [good[4], *faulty[2:], *good[5:8]])
    cut = write_shard(tmp_path / "2.tar", good[8:])
    cut.write_bytes(cut.read_bytes()[: -cut.stat().st_size // 3])
    return [str(tmp_path / f"{number}.tar") for number in range(4)]


EXPECTED_FAULTS = {
    "corrupt_image": 1,
    "missing_caption": 1,
    "undecodable_text": 1,
    "missing_image": 1,
    "damaged_shard": 1,
    "missing_shard": 1,
}


@pytest.mark.parametrize("units", [1, 2, 6])
def test_faults_are_survived_and_counted_once_an_epoch(damaged: list[str], units: int) -> None:
    counts: Counter[str] = Counter()
    keys: list[int] = []
    for unit in range(units):
        stream = shard_stream(
            damaged, rank=unit, world_size=units, progress=Progress(first_epoch=3)
        )
        for one in stream:
            # What was met on the way to a sample of the next epoch may belong to this one.
            if one["stream"]["position"][0] > 4:
                break
            keys.append(int(one["key"]))
            counts.update(one["stream"]["faults"])
    assert all(count in (1, 2, 3) for count in counts.values())
    assert counts.keys() == EXPECTED_FAULTS.keys()
    assert set(range(8)) < set(keys) < set(range(12))
    assert all(count >= 2 for count in Counter(keys).values())


def test_two_whole_epochs_count_every_fault_twice(damaged: list[str]) -> None:
    stream = shard_stream(damaged)
    per_epoch = len(keys_of_epoch(stream, 0, 0, 1)) - 4
    consume(stream, 2 * per_epoch + 1)
    # The sample beyond the two epochs may bring faults of the third with it.
    for kind, count in EXPECTED_FAULTS.items():
        assert stream.progress.faults[kind] in (2 * count, 2 * count + 1), kind


@pytest.mark.parametrize("taken", range(0, 18, 3))
def test_no_fault_is_counted_twice_or_lost_by_a_resume(damaged: list[str], taken: int) -> None:
    whole = shard_stream(damaged)
    consume(whole, 20)
    interrupted = shard_stream(damaged)
    consume(interrupted, taken)
    # Whatever was read ahead of the samples taken is not counted yet.
    resumed = shard_stream(damaged, progress=Progress(**interrupted.progress.state()))
    consume(resumed, 20 - taken)
    assert resumed.progress == whole.progress


def test_filtered_samples_are_counted_apart(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample(0), sample(1, txt=b"x"), sample(2, jpg=b"")])
    stream = shard_stream([str(tmp_path / "0.tar")], filters=Filters(min_caption=2))
    assert {one["key"] for one in consume(stream, 3)} == {"000000000"}
    assert stream.progress.faults.keys() == {"corrupt_image"}
    assert stream.progress.filtered.keys() == {"min_caption"}


def test_too_many_faults_in_a_row_name_the_shard_and_the_reason(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "bad.tar", [sample(n, jpg=b"") for n in range(9)])
    stream = shard_stream([str(shard)], max_consecutive_faults=5)
    with pytest.raises(StreamError, match=r"^6 faults in a row.*bad\.tar.*corrupt_image, cannot"):
        next(iter(stream))


def test_missing_shards_in_a_row_are_an_error_too(tmp_path: Path) -> None:
    shards = [str(tmp_path / f"{number}.tar") for number in range(3)]
    with pytest.raises(StreamError, match=r"6 faults in a row.*\d\.tar: missing_shard.*No such"):
        next(iter(shard_stream(shards)))


def test_filters_that_refuse_all_are_an_error(shards: list[str]) -> None:
    stream = shard_stream(shards, filters=Filters(min_size=999))
    with pytest.raises(StreamError, match="no usable sample in 2 passes over 5 shards"):
        next(iter(stream))


def test_shards_without_samples_are_an_error_not_a_hang(shards: list[str]) -> None:
    with pytest.raises(StreamError, match="no usable sample"):
        next(iter(shard_stream([shards[2]], world_size=4)))


def test_a_block_is_given_up_as_it_is_passed_on(shards: list[str]) -> None:
    """Memory holds a block, never a shard."""
    stream = shard_stream([shards[0]], shuffle_block=3)
    blocks = stream._blocks(0, (0, 0), 0, 1)
    assert [len(raws) for raws, _, _ in blocks] == [3, 3, 1]
    reader = stream.read([0, 0, 0, 0, 0], 0, 1)
    held = [len(reader.gi_frame.f_locals["raws"]) for _ in reader]  # type: ignore[attr-defined]
    assert held == [2, 1, 0, 2, 1, 0, 0]


def test_every_epoch_orders_its_shards_and_every_block_its_samples(tmp_path: Path) -> None:
    """Shards of one sample each show the shards' order, one shard of many that of its blocks."""
    singles = write_shards(tmp_path / "singles", *[1] * 30)
    stream = shard_stream(expand_shards(str(singles / "*.tar")))
    orders = [keys_of_epoch(stream, epoch, 0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    whole = write_shards(tmp_path / "whole", 60)
    stream = shard_stream(expand_shards(str(whole / "*.tar")), shuffle_block=20)
    keys = keys_of_epoch(stream, 0, 0, 1)
    blocks = [[key - first for key in keys[first : first + 20]] for first in (0, 20, 40)]
    assert all(sorted(block) == list(range(20)) for block in blocks)
    assert blocks[0] != blocks[1] != blocks[2]
