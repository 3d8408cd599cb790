from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from percov2.bitstream import BitstreamError, Stream
from tests.fuzz.mutations import MUTATIONS, mutate, repair_checksum
from tests.fuzz.runner import run
from tests.golden.store import golden_codec, read_manifest

STREAMS = read_manifest()


def test_a_thousand_mutated_streams_decode_or_are_refused() -> None:
    report = run(count=1000, seed=0)
    assert report.outcomes.total() == 1000
    # The mutations reach the inside, and every check on the way there.
    for reason in ("decoded", "checksum failed", "payload", "stream was written by model", "wrong"):
        assert any(outcome.startswith(reason) for outcome in report.outcomes), reason


def test_mutations_repeat_with_their_seed() -> None:
    corpus = [stream.path.read_bytes() for stream in STREAMS]
    first, again, other = (
        [mutate(np.random.default_rng(seed), corpus) for _ in range(3)] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_changes_the_stream(
    mutation: Callable[[np.random.Generator, bytes, bytes], bytes],
) -> None:
    data, other = (STREAMS[i].path.read_bytes() for i in (5, 6))
    assert mutation(np.random.default_rng(0), data, other) != data


def test_a_repaired_checksum_holds() -> None:
    data = bytearray(STREAMS[0].path.read_bytes())
    data[-1] ^= 1
    with pytest.raises(BitstreamError, match="checksum"):
        Stream.from_bytes(bytes(data))
    assert data.endswith(Stream.from_bytes(repair_checksum(bytes(data))).payload)


def test_a_stream_of_another_model_is_refused_by_name() -> None:
    one, other = (next(s for s in STREAMS if s.schedule == name) for name in ("qlds", "var"))
    with pytest.raises(BitstreamError, match=f"written by model {other.model_id:#06x}") as refused:
        golden_codec("qlds").decode_tokens(other.path.read_bytes())
    assert f"golden ({one.model_id:#06x})" in str(refused.value)
