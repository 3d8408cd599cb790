from __future__ import annotations

import math
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from percov2.bitstream import BitstreamError
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.range_coder import RangeDecoder, RangeEncoder
from percov2.entropy.schedules import SCHEDULES
from percov2.entropy.token_coder import TokenCoder, Tokens
from tests.tiny_models import randomise

MODELLED = tuple(name for name in SCHEDULES if name != "uniform")


@cache
def make_model(codebook_size: int) -> MaskedTransformer:
    """A random model with opinions: its probabilities are far from equal."""
    torch.manual_seed(0)
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=codebook_size, dim=16, num_layers=2, num_heads=2, window=4
    )
    randomise(model, std=0.4)
    model.eval()
    return model


def make_coder(schedule: str, codebook_size: int) -> TokenCoder:
    model = None if schedule == "uniform" else IntegerTransformer(make_model(codebook_size))
    return TokenCoder(model, schedule=schedule, codebook_size=codebook_size)


def decode(coder: TokenCoder, data: bytes, rows: int, cols: int, *, steps: int) -> Tokens:
    return coder.read(RangeDecoder(data), rows, cols, steps=steps)


def random_tokens(rows: int, cols: int, codebook_size: int, *, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, codebook_size, (rows, cols))


def likely_tokens(coder: TokenCoder, rows: int, cols: int) -> Tokens:
    """Tokens as the model itself draws them."""
    return coder.fill(np.full((rows, cols), -1), seed=0)


@pytest.mark.parametrize("codebook_size", [2, 64, 512])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 3)])
def test_round_trip_of_every_number_of_steps(
    schedule: str, codebook_size: int, rows: int, cols: int
) -> None:
    coder = make_coder(schedule, codebook_size)
    tokens = random_tokens(rows, cols, codebook_size)
    ideal = np.cumsum(coder.bits_per_group(tokens))
    assert len(ideal) == coder.steps_total(rows, cols)
    for steps in range(1, len(ideal) + 1):
        data = coder.encode(tokens, steps=steps)
        decoded = decode(coder, data, rows, cols, steps=steps)
        sent = coder.groups(rows, cols) < steps
        np.testing.assert_array_equal(decoded, np.where(sent, tokens, -1))
        assert len(data) <= ideal[steps - 1] / 8 + 1.1


@pytest.mark.parametrize("schedule", MODELLED)
def test_bytes_follow_the_models_probabilities(schedule: str) -> None:
    coder = make_coder(schedule, 64)
    tokens = likely_tokens(coder, 16, 16)
    size = len(coder.encode(tokens, steps=coder.steps_total(16, 16)))
    assert abs(8 * size - sum(coder.bits_per_group(tokens))) < 12
    assert size < 0.9 * 16 * 16 * 6 / 8


@pytest.mark.parametrize("codebook_size", [2, 3, 100, 8192])
def test_uniform_needs_no_model_and_costs_log2_of_the_codebook(codebook_size: int) -> None:
    coder = make_coder("uniform", codebook_size)
    tokens = random_tokens(9, 11, codebook_size)
    assert coder.bits_per_group(tokens) == [pytest.approx(99 * math.log2(codebook_size))]
    data = coder.encode(tokens, steps=1)
    assert abs(len(data) - 99 * math.log2(codebook_size) / 8) <= 1
    np.testing.assert_array_equal(decode(coder, data, 9, 11, steps=1), tokens)


def test_without_a_model_any_schedule_sends_its_groups_in_order() -> None:
    """Portable mode: cut streams and hybrid mode work as with the model."""
    coder, tokens = TokenCoder(None, schedule="quincunx", codebook_size=64), random_tokens(9, 7, 64)
    groups = coder.groups(9, 7)
    for steps in (1, 3, coder.steps_total(9, 7)):
        data = coder.encode(tokens, steps=steps)
        assert len(data) == pytest.approx((groups < steps).sum() * 6 / 8, abs=1.1)
        decoded = decode(coder, data, 9, 7, steps=steps)
        np.testing.assert_array_equal(decoded, np.where(groups < steps, tokens, -1))
    filled = coder.fill(decode(coder, coder.encode(tokens, steps=1), 9, 7, steps=1), seed=0)
    np.testing.assert_array_equal(filled[groups == 0], tokens[groups == 0])
    assert 0 <= filled.min() <= filled.max() < 64
    assert coder.bits_per_group(tokens) == [6 * n for n in np.bincount(groups.ravel())]


def test_the_model_of_a_schedule_without_order_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule 'uniform' with a masked model"):
        TokenCoder(IntegerTransformer(make_model(64)), schedule="uniform", codebook_size=64)


def test_tokens_follow_other_symbols_in_one_payload() -> None:
    coder, tokens = make_coder("quincunx", 64), random_tokens(6, 7, 64)
    before = np.array([3, 1, 4], np.int32)
    encoder = RangeEncoder()
    encoder.encode_uniform(before, 256)
    coder.write(encoder, tokens, steps=coder.steps_total(6, 7))
    decoder = RangeDecoder(encoder.finish())
    assert decoder.decode_uniform(3, 256).tolist() == before.tolist()
    read = coder.read(decoder, 6, 7, steps=coder.steps_total(6, 7))
    np.testing.assert_array_equal(read, tokens)


@pytest.mark.parametrize("schedule", MODELLED)
def test_of_a_cut_payload_the_whole_groups_are_read(schedule: str) -> None:
    coder, tokens = make_coder(schedule, 64), random_tokens(9, 11, 64)
    groups, steps = coder.groups(9, 11), coder.steps_total(9, 11)
    data = coder.encode(tokens, steps=steps)
    ends = np.cumsum(coder.bits_per_group(tokens)) / 8
    for length in range(0, len(data), 7):
        decoders = (RangeDecoder(data[:length]), RangeDecoder(data[:length], fill=0xFF))
        read = coder.read_cut(decoders, 9, 11, steps=steps)
        known = read >= 0
        whole = len(np.unique(groups[known]))
        np.testing.assert_array_equal(known, groups < whole)
        np.testing.assert_array_equal(read[known], tokens[known])
        # Four bytes may be lost where the cut lies just above or below a border.
        assert (ends <= length - 4).sum() <= whole <= (ends <= length + 1).sum()


def test_a_header_that_announces_far_more_than_there_is_fails_at_once() -> None:
    for coder in (make_coder("quincunx", 64), make_coder("uniform", 64)):
        steps, begin = coder.steps_total(256, 256), time.process_time()
        with pytest.raises(BitstreamError, match="corrupt"):
            decode(coder, b"short", 256, 256, steps=steps)
        assert time.process_time() - begin < 1


@pytest.mark.parametrize(("value", "span"), [(-1, r"\[-1, 63\]"), (64, r"\[63, 64\]")])
def test_tokens_out_of_range_are_refused(value: int, span: str) -> None:
    coder = make_coder("checkerboard", 64)
    with pytest.raises(ValueError, match=f"tokens lie in {span}: the codebook has 64 codes"):
        coder.encode(np.array([[63, 0], [0, value]]), steps=1)
    # What is not sent may be unknown.
    assert coder.encode(np.array([[63, value], [value, 63]]), steps=1)


@pytest.mark.parametrize("steps", [-1, 0, 3])
def test_wrong_steps_are_refused(steps: int) -> None:
    coder = make_coder("checkerboard", 64)
    with pytest.raises(ValueError, match=f"steps is {steps}: .* choose 1 to 2"):
        coder.encode(random_tokens(4, 4, 64), steps=steps)
    with pytest.raises(BitstreamError, match=f"stream has {steps} schedule steps"):
        decode(coder, b"\0" * 8, 4, 4, steps=steps)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([("uniform", 100), ("var", 64), ("checkerboard", 512)]),
    st.binary(max_size=40) | st.integers(0, 20).map(lambda n: b"\xff" * n),
)
def test_any_bytes_decode_or_are_refused(case: tuple[str, int], data: bytes) -> None:
    schedule, codebook_size = case
    coder = make_coder(schedule, codebook_size)
    try:
        tokens = decode(coder, data, 3, 5, steps=coder.steps_total(3, 5))
    except BitstreamError as error:
        tokens, message = np.zeros(1, np.int64), str(error)
        event("refused")
    else:
        message = ""
    assert "\n" not in message
    assert 0 <= tokens.min() <= tokens.max() < codebook_size


def test_impossible_bytes_are_refused() -> None:
    with pytest.raises(BitstreamError, match="corrupt or of another model"):
        decode(make_coder("uniform", 100), b"\xff" * 40, 3, 7, steps=1)


@pytest.mark.parametrize("schedule", MODELLED)
def test_fill_keeps_what_was_sent_and_repeats_with_the_seed(schedule: str) -> None:
    coder = make_coder(schedule, 64)
    tokens = random_tokens(7, 6, 64)
    steps = coder.steps_total(7, 6) // 2
    received = decode(coder, coder.encode(tokens, steps=steps), 7, 6, steps=steps)
    before = received.copy()
    filled = coder.fill(received, seed=1)
    np.testing.assert_array_equal(received, before)
    sent = received >= 0
    assert 0 < sent.sum() < sent.size
    np.testing.assert_array_equal(filled[sent], tokens[sent])
    assert 0 <= filled.min() <= filled.max() < 64
    np.testing.assert_array_equal(coder.fill(received, seed=1), filled)
    assert not np.array_equal(coder.fill(received, seed=2), filled)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fill_leaves_a_complete_grid_alone(schedule: str) -> None:
    tokens = random_tokens(4, 5, 64)
    np.testing.assert_array_equal(make_coder(schedule, 64).fill(tokens, seed=0), tokens)


def test_fill_draws_with_the_models_probabilities() -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(codebook_size=4, dim=8, num_layers=1, num_heads=1, window=4).eval()
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(shares.clamp_min(1e-9).log())
    exact = IntegerTransformer(model)
    coder = TokenCoder(exact, schedule="checkerboard", codebook_size=4)
    drawn = np.bincount(coder.fill(np.full((40, 50), -1), seed=3).ravel(), minlength=4)
    np.testing.assert_allclose(drawn / 2000, shares.numpy(), atol=0.04)
    assert drawn[1] <= 1


FRESH_PROCESS = """
import sys
import numpy as np
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.range_coder import RangeDecoder
from percov2.entropy.token_coder import TokenCoder

model = IntegerTransformer(MaskedTransformer.from_pretrained(sys.argv[1]))
for schedule in sys.argv[2:]:
    coder = TokenCoder(model, schedule=schedule, codebook_size=64)
    with open(f"{sys.argv[1]}/{schedule}.tokens", "rb") as file:
        data = file.read()
    decoded = coder.read(RangeDecoder(data), 11, 13, steps=coder.steps_total(11, 13))
    np.save(f"{sys.argv[1]}/{schedule}.npy", decoded)
"""


def test_a_fresh_process_decodes_the_same_tokens(tmp_path: Path) -> None:
    make_model(64).save_pretrained(tmp_path)
    tokens = {}
    for schedule in MODELLED:
        coder = make_coder(schedule, 64)
        tokens[schedule] = likely_tokens(coder, 11, 13)
        data = coder.encode(tokens[schedule], steps=coder.steps_total(11, 13))
        (tmp_path / f"{schedule}.tokens").write_bytes(data)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, str(tmp_path), *MODELLED],
        check=True,
        timeout=120,
    )
    for schedule in MODELLED:
        np.testing.assert_array_equal(np.load(tmp_path / f"{schedule}.npy"), tokens[schedule])
