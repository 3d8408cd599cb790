"""An endless, shuffled, resumable stream of samples, shared out over ranks and workers.

Terms: a *unit* is one loader worker of one rank; an *epoch* is one pass of all units together over
the data. Units go through epochs at their own pace and never wait for each other.

A *position* is a short list of whole numbers that says where a unit reads on. Every sample carries
the position behind it, so that the position of the last *consumed* batch, not of the last
prefetched one, is what a checkpoint holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from percov2.data.faults import FaultError, FilteredError, Guard
from percov2.data.samples import (
    Decoder,
    RawSample,
    Records,
    Sample,
    StreamInfo,
    seeded_rng,
)
from percov2.data.shards import Retry, read_shard

Item = RawSample | FaultError
"""What is read: the bytes of a sample, or what was found instead."""


@dataclass(kw_only=True)
class Progress:
    """What one rank has consumed; lives in the main process.

    Attributes:
        first_epoch: of workers without a position.
        next_worker: the worker whose batch comes next.
        positions: behind the last batch consumed, by worker.
        faults: counts by kind.
        filtered: counts by filter.
    """

    first_epoch: int = 0
    next_worker: int = 0
    positions: dict[int, list[int]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)

    def record(self, info: StreamInfo) -> None:
        """A batch was consumed."""
        self.positions[info["worker"]] = info["position"]
        self.next_worker = (info["worker"] + 1) % info["workers"]
        for counts, new in ((self.faults, info["faults"]), (self.filtered, info["filtered"])):
            for name, count in new.items():
                counts[name] = counts.get(name, 0) + count

    def state(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, for a checkpoint."""
        return asdict(self)

    @property
    def last_epoch(self) -> int:
        """The highest epoch that any worker has reached."""
        return max([self.first_epoch, *(position[0] for position in self.positions.values())])


class SampleStream(IterableDataset[Sample], ABC):
    """The stream of one rank; a `DataLoader` runs it in one or several workers.

    Every draw depends on (seed, epoch, sample) or (seed, epoch, unit), never on a process.

    Args:
        decoder: bytes to sample.
        progress: where to begin, read whenever an iteration begins.
        seed: of order, crops and captions.
        rank: of this process.
        world_size: number of ranks.
        max_consecutive_faults: see `Guard`.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        progress: Progress,
        seed: int,
        rank: int,
        world_size: int,
        max_consecutive_faults: int,
    ) -> None:
        super().__init__()
        self.decoder, self.progress, self.seed = decoder, progress, seed
        self.rank, self.world_size = rank, world_size
        self.max_consecutive_faults = max_consecutive_faults

    @abstractmethod
    def start_of(self, epoch: int) -> list[int]:
        """Position before the first sample of an epoch; its first number is the epoch."""

    @abstractmethod
    def read(self, start: list[int], unit: int, units: int) -> Iterator[tuple[Item, list[int]]]:
        """What is left of an epoch for one unit of several, each item with the position behind."""

    @abstractmethod
    def describe(self) -> str:
        """What is read, in a few words, for errors."""

    def __iter__(self) -> Iterator[Sample]:
        """Samples without end.

        Raises:
            StreamError: see `Guard`.
        """
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A loader asks its workers in turn, beginning with 0; after a resume it is another's turn.
        return self._samples((number + self.progress.next_worker) % workers, workers)

    def _samples(self, worker: int, workers: int) -> Iterator[Sample]:
        unit, units = self.rank * workers + worker, self.world_size * workers
        first = self.start_of(self.progress.first_epoch)
        position = self.progress.positions.get(worker, first)
        # One unit may get nothing out of many epochs if there are fewer samples than units.
        guard = Guard(max_faults=self.max_consecutive_faults, max_empty_epochs=units)
        faults: Counter[str] = Counter()
        filtered: Counter[str] = Counter()
        while True:
            epoch = position[0]
            for item, behind in self.read(position, unit, units):
                try:
                    sample = self._decode(item, epoch)
                except FaultError as fault:
                    faults[fault.kind] += 1
                    guard.fault(fault, fault.where or _place(item))
                except FilteredError as refusal:
                    filtered[refusal.name] += 1
                    guard.filtered(refusal.name, _place(item))
                else:
                    guard.good()
                    sample["stream"] = StreamInfo(
                        worker=worker,
                        workers=workers,
                        position=behind,
                        faults=dict(faults),
                        filtered=dict(filtered),
                    )
                    yield sample
                    faults.clear()
                    filtered.clear()
            position = self.start_of(epoch + 1)
            guard.epoch_ended(self.describe())

    def _decode(self, item: Item, epoch: int) -> Sample:
        if isinstance(item, FaultError):
            raise item
        return self.decoder(item, seeded_rng(self.seed, "sample", epoch, item["__key__"]))


def _place(item: Item) -> str:
    assert not isinstance(item, FaultError), "a fault of a whole shard names it"
    return f"{item['__url__']} (sample {item['__key__']})"


class ShardStream(SampleStream):
    """Samples of shards, shuffled in two ways: the shards, and blocks of samples read from them.

    Shards are dealt out to the units, anew in every epoch. If there are fewer shards than units,
    every unit reads all shards and takes every n-th sample, so that none is left without data.

    A position is [epoch, shard and sample at which the block begins, number of the block, samples
    of it that are done]: to resume, one block is read again.

    Args:
        shards: paths and URLs.
        shuffle_block: samples per block; a worker holds as many files in memory.
        retry: for sources that fail.
        **options: of `SampleStream`.
    """

    def __init__(
        self, *, shards: Sequence[str], shuffle_block: int, retry: Retry, **options: Any
    ) -> None:
        super().__init__(**options)
        self.shards, self.shuffle_block, self.retry = list(shards), shuffle_block, retry

    def start_of(self, epoch: int) -> list[int]:
        """See `SampleStream.start_of`."""
        return [epoch, 0, 0, 0, 0]

    def describe(self) -> str:
        """See `SampleStream.describe`."""
        return f"{len(self.shards)} shards ({self.shards[0]}, ...)"

    def read(self, start: list[int], unit: int, units: int) -> Iterator[tuple[Item, list[int]]]:
        """See `SampleStream.read`."""
        epoch, shard, sample, block, done = start
        for raws, faults, (next_shard, next_sample) in self._blocks(
            epoch, (shard, sample), unit, units
        ):
            if not done:  # otherwise they were counted before the resume
                yield from ((fault, [epoch, shard, sample, block, 0]) for fault in faults)
            seeded_rng(self.seed, "block", epoch, unit, block).shuffle(raws)
            behind_block = [epoch, next_shard, next_sample, block + 1, 0]
            raws.reverse()  # to give each up as soon as it is passed on
            del raws[max(0, len(raws) - done) :]
            while raws:
                done += 1
                raw = raws.pop()
                yield raw, [epoch, shard, sample, block, done] if raws else behind_block
            shard, sample, block, done = next_shard, next_sample, block + 1, 0

    def _blocks(
        self, epoch: int, start: tuple[int, int], unit: int, units: int
    ) -> Iterator[tuple[list[RawSample], list[FaultError], tuple[int, int]]]:
        """Samples, faults and the place (shard, sample) behind them, block by block."""
        order = list(enumerate(self._order(epoch)))
        # The n-th sample of the p-th shard belongs to unit n + p + epoch; without p and epoch the
        # last units would starve where shards are shorter than the number of units.
        by_sample = len(order) < units
        mine = order if by_sample else order[unit::units]
        raws: list[RawSample] = []
        faults: list[FaultError] = []
        for index in range(start[0], len(mine)):
            place, shard = mine[index]
            first = start[1] if index == start[0] else 0
            try:
                for number, raw in read_shard(shard, start=first, retry=self.retry):
                    if by_sample and (number + place + epoch) % units != unit:
                        continue
                    raws.append(raw)
                    if len(raws) == self.shuffle_block:
                        yield raws, faults, (index, number + 1)
                        raws, faults = [], []
            except FaultError as fault:
                if not by_sample or (place + epoch) % units == unit:  # one of them counts it
                    faults.append(fault)
        if raws or faults:
            yield raws, faults, (len(mine), 0)

    def _order(self, epoch: int) -> list[str]:
        order = list(self.shards)
        seeded_rng(self.seed, "shards", epoch).shuffle(order)
        return order


class FileStream(SampleStream):
    """Samples that can be read one by one, for instance the files of a folder.

    A position is [epoch, samples of this unit that are done].

    Args:
        records: the samples.
        name: what they are, for errors.
        **options: of `SampleStream`.
    """

    def __init__(self, *, records: Records, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.records, self.name = records, name

    def start_of(self, epoch: int) -> list[int]:
        """See `SampleStream.start_of`."""
        return [epoch, 0]

    def describe(self) -> str:
        """See `SampleStream.describe`."""
        return f"{len(self.records)} files of {self.name}"

    def read(self, start: list[int], unit: int, units: int) -> Iterator[tuple[Item, list[int]]]:
        """See `SampleStream.read`."""
        epoch, done = start
        order = list(range(len(self.records)))
        seeded_rng(self.seed, "files", epoch).shuffle(order)
        # Begins elsewhere in every epoch, or units beyond the number of files would starve.
        mine = order[(unit - epoch) % units :: units]
        for number in range(done, len(mine)):
            yield read_record(self.records, mine[number], self.name), [epoch, number + 1]


def read_record(records: Records, index: int, name: str) -> Item:
    """One record, or the fault that stands in for it."""
    try:
        return records[index]
    except OSError as error:
        where = error.filename or f"{name}, number {index}"
        return FaultError("missing_image", str(error.strerror or error), where=str(where))
