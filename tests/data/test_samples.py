"""Captions, filters, faults of single samples, batches."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from typing import Any

import pytest
import torch

from percov2.data import samples
from percov2.data.faults import FaultError, FilteredError, Guard, StreamError
from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.samples import CaptionMix, PictureDecoder, collate, make_captions, seeded_rng
from percov2.data.transforms import CropTransform
from tests.data.shard_factory import jpeg, sample


def decode(raw: dict[str, Any], *, rng: random.Random | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "crop": CropTransform(size=16, max_zoom=1.2),
        "captions": make_captions(None),
        "filters": NO_FILTERS,
    }
    return PictureDecoder(**{**options, **changes})(raw, rng)


def fault_of(raw: dict[str, Any], **changes: Any) -> FaultError:
    with pytest.raises(FaultError) as caught:
        decode(raw, **changes)
    assert "\n" not in caught.value.reason
    return caught.value


def with_json(**fields: Any) -> dict[str, Any]:
    return sample(0, json=json.dumps(fields).encode())


def test_a_good_sample() -> None:
    found = decode(sample(7))
    assert (found["key"], found["caption"]) == ("000000007", "picture 7")
    assert (found["image"].shape, found["image"].dtype) == ((3, 16, 16), torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("missing_image", {"jpg": None}),
        ("corrupt_image", {"jpg": b"no picture"}),
        ("corrupt_image", {"jpg": jpeg(0)[:300]}),
        ("corrupt_image", {"jpg": jpeg(0)[:-50]}),
        ("corrupt_image", {"jpg": b""}),
        ("missing_caption", {"txt": None}),
        ("undecodable_text", {"txt": b"caf\xe9 \xff"}),
    ],
)
def test_faults_are_told_apart(kind: str, changes: dict[str, Any]) -> None:
    assert fault_of(sample(0, **changes)).kind == kind


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff{}"])
def test_broken_json_is_a_fault_where_it_is_asked_for(data: bytes) -> None:
    raw = sample(0, json=data)
    assert decode(raw)["caption"] == "picture 0"
    assert fault_of(raw, filters=Filters(max_nsfw=0.5)).kind == "undecodable_text"


def test_half_a_character_in_json_is_a_fault() -> None:
    raw = sample(0, json=b'{"long": "a boat \\ud83d"}')
    assert fault_of(raw, captions=make_captions({"json.long": 1.0})).kind == "undecodable_text"


def test_random_sources_take_any_name() -> None:
    assert seeded_rng("a", 1).random() == random.Random("a/1").random()
    broken = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert seeded_rng(broken, 1).random() != seeded_rng(broken, 2).random()


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_PIXELS", 24 * 20 - 1)
    # Cut off behind its header: decoding would be another fault.
    fault = fault_of(sample(0, jpg=jpeg(0)[:-50]))
    assert fault.kind == "oversized_image"
    assert "24x20" in fault.reason


def test_filters_on_size_come_before_decoding() -> None:
    raw = sample(0, jpg=jpeg(0, (60, 20))[:-50])
    for filters in (Filters(min_size=21), Filters(max_aspect=2.9)):
        with pytest.raises(FilteredError):
            decode(raw, filters=filters)
    whole = sample(0, jpg=jpeg(0, (60, 20)))
    assert decode(whole, filters=Filters(min_size=20, max_aspect=3.0))["key"] == "000000000"


@pytest.mark.parametrize(
    ("filters", "fields", "passes"),
    [
        (Filters(max_watermark=0.5), {"pwatermark": 0.5}, True),
        (Filters(max_watermark=0.5), {"pwatermark": 0.51}, False),
        (Filters(max_watermark=0.5), {}, True),
        (Filters(max_watermark=0.5), {"pwatermark": None}, True),
        (Filters(max_nsfw=0.2), {"punsafe": 0.3}, False),
        (Filters(max_nsfw=0.2), {"NSFW": "UNLIKELY"}, True),
        (Filters(max_nsfw=0.2), {"NSFW": "UNSURE"}, False),
        (Filters(max_nsfw=0.2), {"NSFW": "0.1"}, True),
        (Filters(max_nsfw=0.2), {"punsafe": 0.1, "NSFW": "NSFW"}, True),
        (Filters(max_nsfw=0.2), {}, True),
        (Filters(min_caption=9, max_caption=9), {}, True),
        (Filters(min_caption=10), {}, False),
        (Filters(max_caption=8), {}, False),
    ],
)
def test_filters(filters: Filters, fields: dict[str, Any], passes: bool) -> None:
    if passes:
        assert decode(with_json(**fields), filters=filters)["caption"] == "picture 0"
    else:
        with pytest.raises(FilteredError):
            decode(with_json(**fields), filters=filters)


def test_a_score_that_is_no_number_is_a_fault() -> None:
    fault = fault_of(with_json(NSFW="maybe"), filters=Filters(max_nsfw=0.5))
    assert (fault.kind, fault.reason) == ("undecodable_text", "NSFW is 'maybe', not a number")


def test_bounds_that_nothing_keeps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_aspect is 0\.5"):
        Filters(max_aspect=0.5)
    with pytest.raises(ValueError, match="max_caption is 4"):
        Filters(min_caption=5, max_caption=4)


def draw(raw: dict[str, Any], seed: int, **weights: float) -> str:
    mix = CaptionMix(weights={name.replace("__", "."): value for name, value in weights.items()})
    return mix.draw(raw, samples.read_metadata(raw), random.Random(seed))[0]


def test_captions_are_drawn_in_their_shares() -> None:
    raw = with_json(blip=["a dog", "a cat"])
    found = Counter(draw(raw, seed, txt=2, json__blip=1, empty=1) for seed in range(4000))
    shares = {text: found[text] / 4000 for text in ("picture 0", "a dog", "a cat", "")}
    expected = {"picture 0": 0.5, "a dog": 0.125, "a cat": 0.125, "": 0.25}
    assert shares == pytest.approx(expected, abs=0.03)


def test_a_missing_source_leaves_its_share_to_the_others() -> None:
    raw = with_json(blip=None)
    found = Counter(draw(raw, seed, txt=1, json__blip=6, empty=1) for seed in range(1000))
    assert found.keys() == {"picture 0", ""}
    assert found[""] / 1000 == pytest.approx(0.5, abs=0.06)


def test_a_sample_without_any_written_caption_is_a_fault_unless_none_is_wanted() -> None:
    raw = sample(0, txt=None)
    with pytest.raises(FaultError, match="missing_caption"):
        draw(raw, 0, txt=1, empty=9)
    assert draw(raw, 0, empty=1) == ""
    assert draw(raw, 0, empty=1, txt=0) == ""


def test_an_empty_caption_passes_but_min_caption_refuses_it() -> None:
    raw = sample(0, txt=b" \n")
    assert decode(raw)["caption"] == ""
    with pytest.raises(FilteredError, match="min_caption"):
        decode(raw, filters=Filters(min_caption=1))
    none_wanted = make_captions({"empty": 1.0})
    assert decode(raw, filters=Filters(min_caption=1), captions=none_wanted)["caption"] == ""


def test_validation_takes_the_heaviest_written_source() -> None:
    raw = with_json(blip=["a dog", "a cat"])
    mix = make_captions({"empty": 9.0, "txt": 1.0, "json.blip": 2.0})
    assert decode(raw, captions=mix)["caption"] == "a dog"
    assert decode(sample(0), captions=mix)["caption"] == "picture 0"


@pytest.mark.parametrize("weights", [{}, {"txt": -1.0, "empty": 2.0}, {"txt": 0.0}])
def test_useless_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        CaptionMix(weights=weights)


def test_text_that_is_no_text_is_a_fault() -> None:
    with pytest.raises(FaultError, match=r"json\.blip holds 5"):
        draw(with_json(blip=5), 0, json__blip=1)


def test_seeded_rng_depends_on_all_its_parts() -> None:
    parts = [(0, "crop", 1, "a"), (1, "crop", 1, "a"), (0, "crop", 2, "a"), (0, "crop", 1, "b")]
    assert len({seeded_rng(*one).random() for one in parts}) == 4
    assert seeded_rng(*parts[0]).random() == seeded_rng(*parts[0]).random()
    # The same on every machine and in every version: runs are repeated years later.
    assert seeded_rng(0, "a").random() == 0.9327985644569078


def test_batches_sum_counts_and_keep_the_last_position() -> None:
    def one(position: int, **faults: int) -> dict[str, Any]:
        stream = {"worker": 1, "workers": 2, "position": [0, position], "filtered": {}}
        return {**decode(sample(position)), "stream": {**stream, "faults": faults}}

    batch = collate([one(3, missing_shard=1), one(4), one(6, missing_shard=1, corrupt_image=2)])
    assert batch["key"] == ["000000003", "000000004", "000000006"]
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["stream"] == {
        "worker": 1,
        "workers": 2,
        "position": [0, 6],
        "faults": {"missing_shard": 2, "corrupt_image": 2},
        "filtered": {},
    }


def test_a_guard_counts_in_a_row_only() -> None:
    guard = Guard(max_faults=2, max_empty_epochs=0)
    fault = FaultError("corrupt_image", "reason")
    for _ in range(3):
        guard.fault(fault, "a.tar")
        guard.fault(fault, "a.tar")
        guard.good()
    guard.fault(fault, "a.tar")
    guard.filtered("min_size", "a.tar")
    guard.fault(fault, "a.tar")
    guard.fault(fault, "a.tar")
    with pytest.raises(StreamError, match=r"3 faults in a row.*b\.tar: corrupt_image, reason"):
        guard.fault(fault, "b.tar")


def test_an_error_from_a_worker_becomes_its_last_line() -> None:
    text = "Caught StreamError in DataLoader worker process 0.\nOriginal Traceback:\n  File ...\n"
    message = "101 faults in a row in a.tar: x, y"
    error = StreamError(f"{text}percov2.data.faults.StreamError: {message}")
    assert str(error) == str(StreamError(message)) == message
    assert str(pickle.loads(pickle.dumps(error))) == message
