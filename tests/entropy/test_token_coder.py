from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from percov2.bitstream import BitstreamError
from percov2.entropy.masked_transformer import MaskedTransformer
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
    model = None if schedule == "uniform" else make_model(codebook_size)
    return TokenCoder(model, schedule=schedule, codebook_size=codebook_size)


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
        decoded = coder.decode(data, rows, cols, steps=steps)
        sent = coder.groups(rows, cols) < steps
        np.testing.assert_array_equal(decoded, np.where(sent, tokens, -1))
        assert len(data) <= ideal[steps - 1] / 8 + 2


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
    np.testing.assert_array_equal(coder.decode(data, 9, 11, steps=1), tokens)


@pytest.mark.parametrize("codebook_size", [3, 64])
def test_no_grid_is_impossible_to_encode(codebook_size: int) -> None:
    """While the end is shortened, some candidates are not valid streams at all."""
    coder = make_coder("uniform", codebook_size)
    for seed in range(300):
        tokens = random_tokens(1, 1 + seed % 30, codebook_size, seed=seed)
        data = coder.encode(tokens, steps=1)
        np.testing.assert_array_equal(coder.decode(data, *tokens.shape, steps=1), tokens)


@pytest.mark.parametrize("codebook_size", [3, 100])
def test_no_shorter_end_decodes_to_the_same(codebook_size: int) -> None:
    coder, tokens = make_coder("uniform", codebook_size), random_tokens(3, 5, codebook_size)
    data = coder.encode(tokens, steps=1)
    head = data[:-2]
    for last in range(256):
        try:
            decoded = coder.decode(head + bytes([last]), 3, 5, steps=1)
        except BitstreamError:
            continue
        assert not np.array_equal(decoded, tokens), last


def test_a_stream_of_the_first_code_alone_is_empty() -> None:
    coder, tokens = make_coder("uniform", 64), np.zeros((4, 4), np.int64)
    assert coder.encode(tokens, steps=1) == b""
    np.testing.assert_array_equal(coder.decode(b"", 4, 4, steps=1), tokens)


def test_a_model_and_uniform_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="every other schedule needs one"):
        TokenCoder(None, schedule="qlds", codebook_size=64)
    with pytest.raises(ValueError, match="'uniform' codes without a masked model"):
        TokenCoder(make_model(64), schedule="uniform", codebook_size=64)


@pytest.mark.parametrize(("value", "span"), [(-1, r"\[-1, 63\]"), (64, r"\[0, 64\]")])
def test_tokens_out_of_range_are_refused(value: int, span: str) -> None:
    tokens = np.array([[0, 63], [value, 5]])
    with pytest.raises(ValueError, match=f"tokens lie in {span}: the codebook has 64 codes"):
        make_coder("checkerboard", 64).encode(tokens, steps=1)


@pytest.mark.parametrize("steps", [-1, 0, 3])
def test_wrong_steps_are_refused(steps: int) -> None:
    coder = make_coder("checkerboard", 64)
    with pytest.raises(ValueError, match=f"steps is {steps}: .* choose 1 to 2"):
        coder.encode(random_tokens(4, 4, 64), steps=steps)
    with pytest.raises(BitstreamError, match=f"stream has {steps} schedule steps"):
        coder.decode(b"\0" * 8, 4, 4, steps=steps)


def test_a_model_in_training_mode_is_refused() -> None:
    coder, tokens = make_coder("checkerboard", 2), random_tokens(3, 3, 2)
    data = coder.encode(tokens, steps=1)
    make_model(2).train()
    try:
        with pytest.raises(ValueError, match="in training mode"):
            coder.encode(tokens, steps=1)
        with pytest.raises(ValueError, match="in training mode"):
            coder.decode(data, 3, 3, steps=1)
    finally:
        make_model(2).eval()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([("uniform", 100), ("var", 64), ("checkerboard", 512)]),
    st.binary(max_size=40) | st.integers(0, 20).map(lambda n: b"\xff" * n),
)
def test_any_bytes_decode_or_are_refused(case: tuple[str, int], data: bytes) -> None:
    schedule, codebook_size = case
    coder = make_coder(schedule, codebook_size)
    try:
        tokens = coder.decode(data, 3, 5, steps=coder.steps_total(3, 5))
    except BitstreamError as error:
        tokens, message = np.zeros(1, np.int64), str(error)
        event("refused")
    else:
        message = ""
    assert "\n" not in message
    assert 0 <= tokens.min() <= tokens.max() < codebook_size


def test_impossible_bytes_are_refused() -> None:
    with pytest.raises(BitstreamError, match="corrupt or of another model"):
        make_coder("uniform", 100).decode(b"\xff" * 40, 3, 7, steps=1)


@pytest.mark.parametrize("schedule", MODELLED)
def test_fill_keeps_what_was_sent_and_repeats_with_the_seed(schedule: str) -> None:
    coder = make_coder(schedule, 64)
    tokens = random_tokens(7, 6, 64)
    steps = coder.steps_total(7, 6) // 2
    received = coder.decode(coder.encode(tokens, steps=steps), 7, 6, steps=steps)
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
    coder = TokenCoder(model, schedule="checkerboard", codebook_size=4)
    drawn = np.bincount(coder.fill(np.full((40, 50), -1), seed=3).ravel(), minlength=4)
    np.testing.assert_allclose(drawn / 2000, shares.numpy(), atol=0.04)
    assert drawn[1] <= 1


FRESH_PROCESS = """
import sys
import numpy as np
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.token_coder import TokenCoder

model = MaskedTransformer.from_pretrained(sys.argv[1])
for schedule in sys.argv[2:]:
    coder = TokenCoder(model, schedule=schedule, codebook_size=64)
    with open(f"{sys.argv[1]}/{schedule}.tokens", "rb") as file:
        data = file.read()
    decoded = coder.decode(data, 11, 13, steps=coder.steps_total(11, 13))
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
