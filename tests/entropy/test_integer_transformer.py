"""The integer transformer computes what docs/bitstream.md says, on every path through torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from percov2.cli import main
from percov2.entropy import integer_transformer, self_test
from percov2.entropy.integer_transformer import IntegerTransformer
from percov2.entropy.masked_transformer import MaskedTransformer
from percov2.entropy.range_coder import TOTAL, Frequencies
from percov2.entropy.schedules import Groups, make_schedule, num_groups
from tests.entropy import reference_transformer
from tests.entropy.reference_transformer import (
    ACTIVATION_MAX,
    HIDDEN_MAX,
    LOGIT_MAX,
    RESIDUAL_MAX,
    ReferenceTransformer,
    exp_table,
    normalise,
    shift_right,
)
from tests.tiny_models import randomise

V = 24
CASES = (
    ("quincunx", 1, 1),
    ("checkerboard", 1, 5),
    ("qlds", 13, 21),
    ("quincunx", 13, 21),
    ("var", 7, 4),
    ("checkerboard", 32, 48),
)


@cache
def make_model(*, seed: int = 0, std: float = 0.3, window: int = 4) -> MaskedTransformer:
    torch.manual_seed(seed)
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=V, dim=16, num_layers=3, num_heads=2, window=window
    )
    randomise(model, std=std)
    model.eval()
    return model


def make_tokens(rows: int, cols: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (batch, rows, cols), generator=generator)


def reference_of(model: IntegerTransformer) -> ReferenceTransformer:
    return ReferenceTransformer(model.integers(), num_heads=model.num_heads, window=model.window)


def predict(model: IntegerTransformer, tokens: Tensor, groups: Groups, k: int) -> Frequencies:
    return np.concatenate(list(model.predict(tokens, groups, k)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def float32_rounded() -> Iterator[None]:
    """What Lightning recommends for training; it matters on CPUs with products of bfloat16."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("schedule", "rows", "cols"), CASES)
def test_frequencies_are_those_of_the_reference_in_every_setting(
    schedule: str, rows: int, cols: int
) -> None:
    groups = make_schedule(schedule, rows, cols)
    tokens = make_tokens(rows, cols, batch=8 if rows * cols < 300 else 2)
    single = IntegerTransformer(make_model(), dtype=torch.float32)
    double = IntegerTransformer(make_model(), dtype=torch.float64)
    reference = reference_of(single)
    for k in range(num_groups(groups)):
        expected = reference.frequencies(tokens[0].numpy(), groups, k)
        settings = {
            "1 thread": (single, threads(1)),
            "2 threads": (single, threads(2)),
            "float64": (double, threads(1)),
            "float64, 2 threads": (double, threads(2)),
            "deterministic": (single, deterministic()),
            "no oneDNN": (single, torch.backends.mkldnn.flags(enabled=False)),
            "oneDNN": (single, torch.backends.mkldnn.flags(enabled=True)),
            "autocast": (single, torch.autocast("cpu", torch.bfloat16)),
            "float32 rounded": (single, float32_rounded()),
        }
        for name, (model, setting) in settings.items():
            with setting:
                found = predict(model, tokens[:1], groups, k)
            np.testing.assert_array_equal(found, expected, err_msg=f"{name}, group {k}")
        # A batch: sample by sample, each as if it were alone.
        together = predict(single, tokens, groups, k)
        np.testing.assert_array_equal(together[: len(expected)], expected)
        last = predict(double, tokens[-1:], groups, k)
        np.testing.assert_array_equal(together[-len(expected) :], last)
        assert together.shape == (len(tokens) * len(expected), V)


@contextmanager
def fpmath_mode(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv(name, "bf16")
        yield


@pytest.mark.parametrize(
    "setting", ["medium", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"]
)
def test_float64_carries_where_float32_may_be_rounded(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """On most machines the frequencies would not tell: what multiplies is looked at."""
    carriers = []
    linear = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        carriers.append((x.dtype, weight.dtype, bias.dtype))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    groups, tokens = make_schedule("quincunx", 6, 9), make_tokens(6, 9)
    model = IntegerTransformer(make_model())
    expected = predict(model, tokens, groups, 2)
    assert {dtype for kinds in carriers for dtype in kinds} == {torch.float32}
    carriers.clear()
    lowered = float32_rounded() if setting == "medium" else fpmath_mode(monkeypatch, setting)
    with lowered:
        np.testing.assert_array_equal(predict(model, tokens, groups, 2), expected)
    assert {dtype for kinds in carriers for dtype in kinds} == {torch.float64}


def test_whoever_asks_keeps_autocast() -> None:
    groups, tokens = make_schedule("quincunx", 6, 9), make_tokens(6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in IntegerTransformer(make_model()).predict(tokens, groups, 2):
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("std", [1e-3, 0.05, 1.0, 3.0])
def test_frequencies_are_those_of_the_reference_for_weights_of_any_size(std: float) -> None:
    groups = make_schedule("quincunx", 6, 9)
    tokens = make_tokens(6, 9)
    model = IntegerTransformer(make_model(seed=3, std=std, window=3))
    for k in range(num_groups(groups)):
        expected = reference_of(model).frequencies(tokens[0].numpy(), groups, k)
        np.testing.assert_array_equal(predict(model, tokens, groups, k), expected)


def test_what_goes_beyond_the_ranges_is_clamped_as_in_the_reference() -> None:
    """Weights far larger than trained ones: the exactness of every sum rests on the clamps."""
    torch.manual_seed(7)
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=V, dim=16, num_layers=2, num_heads=2, window=4
    )
    randomise(model, std=1.0)
    with torch.no_grad():
        for weight in (model.token_embedding.weight, model.row_embedding.weight):
            weight.mul_(100)  # of unit 2^-9, clamped at 64
        model.head.weight.mul_(40)
        for block in model.blocks:
            block.mlp_out.weight.mul_(25)
            block.mlp_in.weight.mul_(5)
            block.attention.qkv.weight.mul_(5)
            block.attention.out.weight.mul_(20)
    integers = IntegerTransformer(model.eval())
    reference = reference_of(integers)
    assert np.abs(reference.integers["tokens"]).max() == RESIDUAL_MAX
    seen: dict[str, int] = {}
    project = reference_transformer.project

    def watched(part: str, *arguments: Any) -> Any:
        found = project(part, *arguments)
        seen[part] = max(seen.get(part, 0), int(np.abs(found).max()))
        return found

    groups, tokens = make_schedule("quincunx", 6, 9), make_tokens(6, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_transformer, "project", watched)
        expected = [
            reference.frequencies(tokens[0].numpy(), groups, k) for k in range(num_groups(groups))
        ]
    # The test is of use only where the clamps are.
    assert seen["head"] > LOGIT_MAX
    assert seen["blocks.0.mlp_in"] > HIDDEN_MAX
    assert seen["blocks.0.qkv"] > ACTIVATION_MAX
    assert seen["blocks.0.mlp_out"] > RESIDUAL_MAX
    for k, frequencies in enumerate(expected):
        np.testing.assert_array_equal(predict(integers, tokens, groups, k), frequencies)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, tokens = make_schedule("checkerboard", 9, 13), make_tokens(9, 13, batch=2)
    model = IntegerTransformer(make_model())
    expected = predict(model, tokens, groups, 1)
    monkeypatch.setattr(integer_transformer, "_ATTENTION_ELEMENTS", 1)
    monkeypatch.setattr(integer_transformer, "_HEAD_ELEMENTS", 5 * V)
    parts = list(model.predict(tokens, groups, 1))
    assert [len(part) for part in parts[:2]] == [5, 5]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_frequencies_are_positive_and_complete() -> None:
    groups, tokens = make_schedule("quincunx", 8, 8), make_tokens(8, 8)
    model = IntegerTransformer(make_model(std=1.0))
    for k in range(num_groups(groups)):
        frequencies = predict(model, tokens, groups, k)
        assert frequencies.dtype == np.int64
        assert frequencies.min() >= 1
        assert (frequencies.sum(1) == TOTAL).all()


def test_later_groups_are_not_looked_at() -> None:
    groups, tokens = make_schedule("quincunx", 8, 8), make_tokens(8, 8)
    model = IntegerTransformer(make_model())
    expected = predict(model, tokens, groups, 2)
    later = torch.from_numpy(groups >= 2)
    tokens[0, later] = (tokens[0, later] + 7) % V
    np.testing.assert_array_equal(predict(model, tokens, groups, 2), expected)
    earlier = torch.from_numpy(groups < 2)
    tokens[0, earlier] = (tokens[0, earlier] + 7) % V
    assert not np.array_equal(predict(model, tokens, groups, 2), expected)


@pytest.mark.parametrize(("schedule", "rows", "cols"), CASES[1:5])
@torch.no_grad()
def test_the_float_model_predicts_nearly_the_same(schedule: str, rows: int, cols: int) -> None:
    """Mean divergence, in nats: what a token costs more under the rounded probabilities."""
    groups, tokens = make_schedule(schedule, rows, cols), make_tokens(rows, cols)
    model = make_model()
    exact, divergences = IntegerTransformer(model), []
    for k in range(num_groups(groups)):
        known, where = (torch.from_numpy(mask)[None] for mask in (groups < k, groups == k))
        log_p = model(tokens, known, where).double().log_softmax(-1)
        log_q = torch.from_numpy(predict(exact, tokens, groups, k) / TOTAL).log()
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    divergence = torch.cat(divergences)
    assert divergence.min() > -1e-9
    assert divergence.mean() < 1e-3, divergence.mean()


def worst_case_model(*, factor: float) -> MaskedTransformer:
    """One row of each projection whose magnitudes sum to ``factor`` times what is exact.

    Weights of unit 1 / 2^(bits_out - bits_in) are the coarsest: activations of up to 511 may meet
    rows whose integers sum to less than 2^24 / 511.
    """
    torch.manual_seed(5)
    model: MaskedTransformer = MaskedTransformer(
        codebook_size=V, dim=16, num_layers=1, num_heads=2, window=4
    )
    randomise(model, std=0.3)
    model.eval()
    block = model.blocks[0]
    coarsest = {block.attention.qkv: 0, block.attention.out: 3, block.mlp_out: 4, model.head: 1}
    with torch.no_grad():
        for linear, bits in coarsest.items():
            sign = torch.where(torch.arange(linear.in_features) % 3 == 0, -1.0, 1.0)
            share = (2**24 / 511 - 2) * factor / linear.in_features
            linear.weight[0] = sign * share / 2**bits
            linear.bias[0] = 0
    return model


def test_rows_at_the_bound_of_exactness_are_exact() -> None:
    model = IntegerTransformer(worst_case_model(factor=0.999))
    integers = model.integers()
    sums = 511 * np.abs(integers["head.weight"]).sum(1) + np.abs(integers["head.bias"])
    assert 0.99 * 2**24 < sums[0] < 2**24
    assert integers["head.shift"][0] == 0
    groups, tokens = make_schedule("quincunx", 6, 6), make_tokens(6, 6)
    for k in range(num_groups(groups)):
        expected = reference_of(model).frequencies(tokens[0].numpy(), groups, k)
        np.testing.assert_array_equal(predict(model, tokens, groups, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_beyond_the_bound_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"weights of .*, row 0, are too large") as refused:
        IntegerTransformer(worst_case_model(factor=1.01), dtype=dtype)
    assert "\n" not in str(refused.value)


def test_every_row_is_within_the_bound_of_exactness() -> None:
    for std in (0.01, 0.3, 2.0):
        integers = IntegerTransformer(make_model(std=std)).integers()
        for name, weight in integers.items():
            if name.endswith(".weight"):
                bias = integers[name.replace("weight", "bias")]
                assert (511 * np.abs(weight).sum(1) + np.abs(bias)).max() < 2**24, name
                assert integers[name.replace("weight", "shift")].min() >= 0, name


def test_too_many_channels_a_head_are_refused() -> None:
    model = MaskedTransformer(codebook_size=4, dim=65, num_layers=1, num_heads=1, window=2)
    with pytest.raises(ValueError, match="65 channels a head"):
        IntegerTransformer(model)


def test_the_carrier_does_not_change_the_integers() -> None:
    single = IntegerTransformer(make_model(), dtype=torch.float32)
    double = IntegerTransformer(make_model(), dtype=torch.float64)
    assert single.digest() == double.digest()
    assert all(values.dtype == np.int64 for values in single.integers().values())
    assert single.digest() != IntegerTransformer(make_model(seed=1)).digest()
    assert len(IntegerTransformer(make_model(window=3)).digest()) == 32


def test_integers_are_the_weights_rounded() -> None:
    model = make_model()
    integers = IntegerTransformer(model).integers()
    np.testing.assert_array_equal(
        integers["tokens"], np.rint(model.token_embedding.weight.detach().double().numpy() * 2**9)
    )
    qkv = model.blocks[0].attention.qkv
    unit = 2.0 ** -integers["blocks.0.qkv.shift"]  # activations in and out have the same unit
    weight = integers["blocks.0.qkv.weight"] * unit[:, None]
    assert np.abs(weight - qkv.weight.detach().numpy()).max() <= unit.max() / 2
    bias = integers["blocks.0.qkv.bias"] * unit * 2**-6
    assert np.abs(bias - qkv.bias.detach().numpy()).max() <= unit.max() * 2**-7


@pytest.mark.parametrize("bits", [12, 20])
def test_exp_tables_are_those_of_the_reference(bits: int) -> None:
    table = np.array(integer_transformer._exp_table(bits))
    np.testing.assert_array_equal(table, exp_table(bits))
    np.testing.assert_allclose(table, 2.0**bits * np.exp(-np.arange(len(table)) / 128), atol=0.5001)
    assert (table[-2:] == [1, 0]).all()


def test_square_roots_are_those_of_integers() -> None:
    rng = np.random.default_rng(0)
    roots = np.concatenate([np.arange(100), rng.integers(0, 2**30, 200), [2**30 - 1]])
    near = np.concatenate([roots**2 + step for step in (-1, 0, 1)]).clip(0)
    found = integer_transformer._isqrt(torch.from_numpy(near)).numpy()
    assert ((found**2 <= near) & (near < (found + 1) ** 2)).all()


def test_normalisation_is_that_of_the_reference_at_its_extremes() -> None:
    rng = np.random.default_rng(0)
    rows = [np.zeros(16), np.eye(16)[3], np.full(16, -(2**15)), np.eye(16)[0] * 2**15]
    x = np.stack([*rows, *rng.integers(-(2**15), 2**15, (40, 16))]).astype(np.int64)
    found = integer_transformer._normalise(torch.from_numpy(x).float())
    np.testing.assert_array_equal(found.numpy(), normalise(x))


def test_the_reference_rounds_halves_to_even() -> None:
    values = np.array([-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(shift_right(values, 2), np.rint(values / 4).astype(int))
    np.testing.assert_array_equal(shift_right(values, 0), values)


# -- percov2 doctor ------------------------------------------------------------------------------


def test_the_self_test_s_constant_is_the_reference_s_hash() -> None:
    tokens = self_test.sample_tokens()
    groups = make_schedule("quincunx", *tokens.shape)
    reference = reference_of(IntegerTransformer(self_test.sample_model()))
    digest = hashlib.sha256()
    for k in range(num_groups(groups)):
        digest.update(reference.frequencies(tokens, groups, k).astype("<i8").tobytes())
    assert digest.hexdigest() == self_test.EXPECTED


def test_doctor_reports_an_exact_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "cpu: probabilities are exact" in capsys.readouterr().out


def test_doctor_does_not_mind_a_default_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert main(["doctor"]) == 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_float64_the_cpu_computes() -> None:
    model = IntegerTransformer(make_model(), device="mps")
    assert model.device.type == "cpu"
    groups, tokens = make_schedule("quincunx", 6, 9), make_tokens(6, 9)
    expected = predict(IntegerTransformer(make_model()), tokens, groups, 1)
    np.testing.assert_array_equal(predict(model, tokens, groups, 1), expected)


def test_doctor_reports_a_machine_that_differs_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "EXPECTED", "0" * 64)
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("percov2: probabilities computed on cpu differ")


def test_doctor_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
