"""What can be wrong with a sample or a shard: survived, counted by kind, fatal only in a row."""

from __future__ import annotations

FAULT_KINDS = (
    "missing_shard",
    "damaged_shard",
    "missing_image",
    "corrupt_image",
    "oversized_image",
    "missing_caption",
    "undecodable_text",
    "corrupt_latents",
)
"""Kinds of faults: a shard that cannot be opened, one that ends early or is no tar; a sample
without picture, with a picture that cannot be decoded or is too large to be decoded safely,
without a caption, with text that is not UTF-8 or JSON, with damaged cached latents."""

MAX_FILTERED_IN_A_ROW = 10_000
"""Intact samples that the filters may refuse in a row before that is taken for a mistake."""


class FaultError(Exception):
    """A sample or a shard that cannot be used.

    Args:
        kind: one of `FAULT_KINDS`.
        reason: one line for people.
        where: shard or file, if it is known where the fault is found.
        passing: whether the source may be whole another time.
    """

    def __init__(self, kind: str, reason: str, *, where: str = "", passing: bool = False) -> None:
        assert kind in FAULT_KINDS, kind
        super().__init__(kind, reason)
        self.kind, self.reason, self.where, self.passing = kind, reason, where, passing


class FilteredError(Exception):
    """An intact sample that a filter refuses; ``name`` is the filter's field."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class StreamError(ValueError):
    """The data stream cannot go on; one line that names the shard.

    A loader process hands its exception over as text with a traceback. Only the last line of that
    is for the user, so that is what this class keeps.
    """

    def __init__(self, message: str) -> None:
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class Guard:
    """Ends a stream that finds nothing to use: too many faults or refusals in a row.

    Args:
        max_faults: faults in a row that are survived.
        max_empty_epochs: passes without one good sample that are survived.
    """

    def __init__(self, *, max_faults: int, max_empty_epochs: int) -> None:
        self.max_faults, self.max_empty_epochs = max_faults, max_empty_epochs
        self._faults = self._filtered = self._empty_epochs = 0

    def good(self) -> None:
        """A sample was delivered."""
        self._faults = self._filtered = self._empty_epochs = 0

    def fault(self, fault: FaultError, where: str) -> None:
        """A fault was met.

        Raises:
            StreamError: it is one too many.
        """
        self._faults += 1
        if self._faults > self.max_faults:
            raise StreamError(
                f"{self._faults} faults in a row in the data stream, the last in {where}: "
                f"{fault.kind}, {fault.reason}: mend or remove the shard, or raise "
                f"max_consecutive_faults ({self.max_faults})"
            )

    def filtered(self, name: str, where: str) -> None:
        """A filter refused an intact sample.

        Raises:
            StreamError: it is one too many.
        """
        self._faults = 0
        self._filtered += 1
        if self._filtered > MAX_FILTERED_IN_A_ROW:
            raise StreamError(
                f"filters refused {self._filtered} samples in a row, the last in {where} by "
                f"{name}: loosen that filter"
            )

    def epoch_ended(self, where: str) -> None:
        """A pass over the data is over.

        Raises:
            StreamError: too many passes had not one good sample.
        """
        self._empty_epochs += 1
        if self._empty_epochs > self.max_empty_epochs:
            raise StreamError(
                f"no usable sample in {self._empty_epochs} passes over {where} "
                f"({self._faults} faults, {self._filtered} refused by filters since the last good "
                "one): check the shards and loosen the filters"
            )
