"""What all DataModules share: loaders, counts of faults, exact resume in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from percov2.data.faults import FaultError, FilteredError
from percov2.data.processes import gather_objects
from percov2.data.samples import Batch, Decoder, RawSample, Records, Sample, collate
from percov2.data.shards import Retry, expand_shards, read_shard, scheme_of
from percov2.data.stream import (
    FileStream,
    Item,
    Progress,
    SampleStream,
    ShardStream,
    read_record,
)


class ValidationSet(Dataset[Sample]):
    """Samples that were found good, decoded anew each time.

    Args:
        records: bytes of samples.
        numbers: of those that take part.
        decoder: bytes to sample; draws nothing here.
    """

    def __init__(self, records: Records, numbers: Sequence[int], decoder: Decoder) -> None:
        self.records, self.numbers, self.decoder = records, numbers, decoder

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        """A sample."""
        return self.decoder(self.records[self.numbers[index]], None)


def choose_good(
    items: Iterable[Item], decoder: Decoder, count: int | None
) -> Iterator[tuple[int, RawSample]]:
    """The first ``count`` good samples (None: all), with their numbers among the items.

    Raises:
        ValueError: there is none.
    """
    problems: Counter[str] = Counter()
    found = 0
    for number, item in enumerate(items):
        try:
            if isinstance(item, FaultError):
                raise item
            decoder(item, None)
        except FaultError as fault:
            problems[fault.kind] += 1
        except FilteredError as refusal:
            problems[refusal.name] += 1
        else:
            yield number, item
            found += 1
            if found == count:
                break
    if problems:
        rank_zero_warn(f"left out of validation: {dict(problems)}")
    if not found:
        raise ValueError(
            f"no good sample for validation ({dict(problems) or 'the source is empty'}): "
            "check its path and the filters"
        )


class StreamDataModule(L.LightningDataModule, ABC):
    """Training from an endless `SampleStream`, validation on a fixed set.

    The position of every worker behind the last batch that was trained on is part of a checkpoint
    (Lightning calls `state_dict` on all ranks). A resumed run goes on with the very next sample if
    ranks, workers, data and seed are the same; otherwise it says so and begins a new epoch.

    Args:
        batch_size: per process.
        num_workers: loader processes; 0 loads in the training process.
        seed: of order, crops and captions.
        max_consecutive_faults: more unusable samples or shards in a row are an error.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, *, batch_size: int, num_workers: int, seed: int, max_consecutive_faults: int
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or max_consecutive_faults < 0:
            raise ValueError(
                f"batch_size {batch_size} must be at least 1, num_workers {num_workers} and "
                f"max_consecutive_faults {max_consecutive_faults} not negative"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.max_consecutive_faults = max_consecutive_faults
        self.progress = Progress()

    @abstractmethod
    def make_stream(self, *, rank: int, world_size: int) -> SampleStream:
        """The training stream of one rank."""

    @abstractmethod
    def make_validation_set(self) -> ValidationSet:
        """The validation samples; the same on every rank, Lightning's sampler shares them out."""

    @abstractmethod
    def data_names(self) -> list[str]:
        """Names of shards or files without their folders: tells whether a resume has the same."""

    @property
    def faults(self) -> Mapping[str, int]:
        """Faults met by this rank's training stream so far, by kind (`FAULT_KINDS`)."""
        return self.progress.faults

    @property
    def filtered(self) -> Mapping[str, int]:
        """Samples refused by filters on this rank so far, by the filter's field."""
        return self.progress.filtered

    def _stream_options(self, rank: int, world_size: int) -> dict[str, Any]:
        return {
            "progress": self.progress,
            "seed": self.seed,
            "rank": rank,
            "world_size": world_size,
            "max_consecutive_faults": self.max_consecutive_faults,
        }

    def _rank_and_world_size(self) -> tuple[int, int]:
        share = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if share is None else (share["rank"], share["num_replicas"])

    def train_dataloader(self) -> DataLoader[Sample]:
        """Full batches without end, from where `progress` stands.

        Raises:
            ValueError: the trainer would never stop.
        """
        trainer = self.trainer
        # A limit that is not whole is a share of what never ends.
        endless = trainer is not None and not isinstance(trainer.limit_train_batches, int)
        if trainer is not None and endless and trainer.max_steps == -1:
            raise ValueError("the training stream never ends: set trainer.max_steps")
        rank, world_size = self._rank_and_world_size()
        # Workers must not persist: they would not see the progress when an iteration begins.
        return DataLoader(
            self.make_stream(rank=rank, world_size=world_size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation samples in order, decoded in the training process."""
        return DataLoader(
            self.make_validation_set(), batch_size=self.batch_size, collate_fn=collate
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note how far the stream was consumed: Lightning calls this as it takes a batch to train.

        Prefetched batches have not come here, neither the loader's nor the one that Lightning
        itself fetches ahead.
        """
        if "stream" in batch:
            self.progress.record(batch.pop("stream"))
        return batch

    def _identity(self) -> dict[str, int | str]:
        """What must be the same for a position to mean the same."""
        return {
            "ranks": self._rank_and_world_size()[1],
            "workers": max(1, self.num_workers),
            "seed": self.seed,
            "data": sha256(
                "\n".join(self.data_names()).encode("utf-8", "surrogatepass")
            ).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where every rank stands. A collective call: every rank must make it."""
        return {"identity": self._identity(), "ranks": gather_objects(self.progress.state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        With other ranks, workers, seed or data a warning says what changed, a new epoch begins and
        counts start at zero.
        """
        saved, present = state_dict["identity"], self._identity()
        changed = [
            f"{name} ({saved.get(name)} before, now {value})"
            for name, value in present.items()
            if saved.get(name) != value
        ]
        states = [Progress(**state) for state in state_dict["ranks"]]
        if changed:
            epoch = 1 + max(state.last_epoch for state in states)
            rank_zero_warn(
                f"the data stream cannot go on in the middle of its epoch, for this changed: "
                f"{', '.join(changed)}; it begins epoch {epoch}"
            )
            self.progress = Progress(first_epoch=epoch)
        else:
            self.progress = states[0 if self.trainer is None else self.trainer.global_rank]


class ShardDataModule(StreamDataModule):
    """A `StreamDataModule` on WebDataset shards.

    Args:
        train_shards: see `expand_shards`.
        val_shards: see `expand_shards`; never those of training.
        decoder: bytes to sample.
        val_samples: number of validation samples, the first good ones of the shards.
        shuffle_block: see `ShardStream`.
        retry: for sources that fail.
        **options: of `StreamDataModule`.

    Raises:
        ValueError: no shard matches, one is both of training and of validation, or a number out
            of range.
    """

    def __init__(
        self,
        *,
        train_shards: str | list[str],
        val_shards: str | list[str],
        decoder: Decoder,
        val_samples: int,
        shuffle_block: int,
        retry: Retry,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if shuffle_block < 1 or val_samples < 1:
            raise ValueError(
                f"shuffle_block {shuffle_block} and val_samples {val_samples} must be at least 1"
            )
        self.train_shards = expand_shards(train_shards)
        self.val_shards = expand_shards(val_shards)
        shared = set(map(_resolved, self.train_shards)) & set(map(_resolved, self.val_shards))
        if shared:
            raise ValueError(
                f"{sorted(shared)} are in training and in validation: change a pattern"
            )
        self.decoder, self.val_samples = decoder, val_samples
        self.shuffle_block, self.retry = shuffle_block, retry

    def make_stream(self, *, rank: int, world_size: int) -> ShardStream:
        """See `StreamDataModule.make_stream`."""
        return ShardStream(
            shards=self.train_shards,
            shuffle_block=self.shuffle_block,
            retry=self.retry,
            decoder=self.decoder,
            **self._stream_options(rank, world_size),
        )

    def make_validation_set(self) -> ValidationSet:
        """See `StreamDataModule.make_validation_set`; their files are held in memory."""
        items = chain.from_iterable(read_items(shard, self.retry) for shard in self.val_shards)
        records = [raw for _, raw in choose_good(items, self.decoder, self.val_samples)]
        return ValidationSet(records, range(len(records)), self.decoder)

    def data_names(self) -> list[str]:
        """See `StreamDataModule.data_names`."""
        return [shard.rpartition("/")[2] for shard in self.train_shards]

    def _identity(self) -> dict[str, int | str]:
        return {**super()._identity(), "shuffle_block": self.shuffle_block}


def read_items(shard: str, retry: Retry) -> Iterator[Item]:
    """The samples of a shard in order and, at the end, the fault that cut it short."""
    try:
        for _, raw in read_shard(shard, start=0, retry=retry):
            yield raw
    except FaultError as fault:
        yield fault


def _resolved(shard: str) -> str:
    return shard if scheme_of(shard) else str(Path(shard).resolve())


class FileDataModule(StreamDataModule):
    """A `StreamDataModule` on samples that can be read one by one.

    Args:
        train_records: samples of training.
        val_records: samples of validation.
        source: what the samples of training are, for errors.
        decoder: bytes to sample.
        val_samples: number of validation samples, the first good ones; None takes all good ones.
        **options: of `StreamDataModule`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        train_records: Records,
        val_records: Records,
        source: str,
        decoder: Decoder,
        val_samples: int | None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if val_samples is not None and val_samples < 1:
            raise ValueError(f"val_samples is {val_samples}: it must be at least 1")
        self.train_records, self.val_records = train_records, val_records
        self.source, self.decoder, self.val_samples = source, decoder, val_samples

    def make_stream(self, *, rank: int, world_size: int) -> FileStream:
        """See `StreamDataModule.make_stream`."""
        return FileStream(
            records=self.train_records,
            name=self.source,
            decoder=self.decoder,
            **self._stream_options(rank, world_size),
        )

    def make_validation_set(self) -> ValidationSet:
        """See `StreamDataModule.make_validation_set`."""
        records = self.val_records
        items = (read_record(records, number, self.source) for number in range(len(records)))
        numbers = [number for number, _ in choose_good(items, self.decoder, self.val_samples)]
        return ValidationSet(records, numbers, self.decoder)
