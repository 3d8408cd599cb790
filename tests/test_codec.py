"""The codec end to end on a tiny random model of the real classes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import percov2
from percov2.bitstream import COMMON_SIZES, BitstreamError, Stream
from percov2.codec import Codec
from percov2.data.transforms import image_to_tensor
from percov2.entropy.range_coder import RangeDecoder
from percov2.entropy.token_coder import TokenCoder
from percov2.rate_control import RATE_WEIGHTS
from percov2.synthesis.grain import add_grain
from percov2.synthesis.sharpening import sharpen
from tests.tiny_codec import save_tiny


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return percov2.load(str(tiny_model))


def _odd_sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(5)
    sizes = [(int(w), int(h)) for w, h in rng.integers(16, 90, (36, 2))]
    return [(16, 16), (17, 16), (16, 129), (131, 17), *sizes]


def test_forty_sizes_round_trip_exactly_in_size_and_tokens(codec: Codec) -> None:
    rng = np.random.default_rng(1)
    for width, height in _odd_sizes():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        data = codec.compress(image)
        assert np.array_equal(codec.decode_tokens(data), codec.encode_tokens(image))
        assert codec.decompress(data, steps=1).size == (width, height)


def test_encoding_twice_gives_the_same_bytes(codec: Codec, photograph: Image.Image) -> None:
    assert codec.compress(photograph, caption="x") == codec.compress(photograph, caption="x")


def test_a_rate_weight_makes_smaller_files_that_decode_to_the_tokens_chosen(
    codec: Codec, photograph: Image.Image
) -> None:
    sizes = []
    for weight in (0.0, 0.02, 0.1):
        data = codec.compress(photograph, rate_weight=weight)
        tokens = codec.encode_tokens(photograph, rate_weight=weight)
        assert np.array_equal(codec.decode_tokens(data), tokens)
        sizes.append(len(data))
    assert sizes[0] > sizes[1] > sizes[2]
    assert codec.compress(photograph) == codec.compress(photograph, rate_weight=0)


def test_the_models_own_rate_weight_holds_when_none_is_named(
    codec: Codec, photograph: Image.Image, tmp_path: Path
) -> None:
    config = replace(codec.config, rate_weight=0.05)
    replace(codec.components, config=config).save(tmp_path)
    weighing = percov2.load(str(tmp_path))
    assert weighing.config.model_id == codec.config.model_id, "the decoder is the same"
    assert weighing.compress(photograph) == codec.compress(photograph, rate_weight=0.05)
    assert weighing.compress(photograph, rate_weight=0) == codec.compress(photograph)
    assert weighing.compress(photograph, uniform=True) == codec.compress(photograph, uniform=True)


def test_rate_weights_that_cannot_be_are_refused(codec: Codec, photograph: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"rate_weight is -0\.1: it must be at least 0"):
        codec.compress(photograph, rate_weight=-0.1)
    with pytest.raises(ValueError, match=r"rate_weight is 0\.1: without the masked model"):
        codec.compress(photograph, rate_weight=0.1, uniform=True)
    with pytest.raises(ValueError, match=r"rate_weight is 0\.1: without the masked model"):
        replace(codec.config, schedule="uniform", rate_weight=0.1)


def test_decoding_twice_gives_the_same_picture(codec: Codec, photograph: Image.Image) -> None:
    data = codec.compress(photograph)
    first, second = (np.asarray(codec.decompress(data, steps=2)) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_seed_changes_the_picture_but_not_the_tokens(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph)
    pictures = [np.asarray(codec.decompress(data, steps=2, seed=seed)) for seed in (1, 2, 1)]
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_different_pictures_give_different_tokens(
    codec: Codec, photograph: Image.Image, noise_image: Image.Image
) -> None:
    tokens = codec.encode_tokens(photograph)
    assert len(np.unique(tokens)) > 3
    flipped = codec.encode_tokens(photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert not np.array_equal(tokens, flipped)


def test_bytes_decode_in_a_fresh_process_to_the_tokens_that_were_encoded(
    codec: Codec, tiny_model: Path, photograph: Image.Image, tmp_path: Path
) -> None:
    data = codec.compress(photograph, caption="a woman")
    (tmp_path / "a.pcv2").write_bytes(data)
    program = (
        "import sys, percov2, numpy, pathlib\n"
        "model, stream, out = sys.argv[1:]\n"
        "codec = percov2.load(model)\n"
        "numpy.save(out, codec.decode_tokens(pathlib.Path(stream).read_bytes()))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, tiny_model, tmp_path / "a.pcv2", tmp_path / "t.npy"],
        check=True,
    )
    assert np.array_equal(np.load(tmp_path / "t.npy"), codec.encode_tokens(photograph))


def test_streams_are_written_and_read_alike_under_autocast(
    codec: Codec, photograph: Image.Image
) -> None:
    outside, tokens = codec.compress(photograph), codec.encode_tokens(photograph)
    with torch.autocast("cpu", torch.bfloat16):
        inside, rounded = codec.compress(photograph), codec.encode_tokens(photograph)
        assert np.array_equal(codec.decode_tokens(outside), tokens)
        assert codec.decompress(outside).size == photograph.size
    assert np.array_equal(codec.decode_tokens(inside), rounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_torch_change_nothing(
    codec: Codec, photograph: Image.Image, dtype: torch.dtype
) -> None:
    data = codec.compress(photograph)
    picture = np.asarray(codec.decompress(data, grain=0.1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert codec.compress(photograph) == data
        assert np.array_equal(np.asarray(codec.decompress(data, grain=0.1)), picture)
    finally:
        torch.set_default_dtype(before)


def test_models_are_loaded_by_several_threads_at_once(
    codec: Codec, tiny_model: Path, photograph: Image.Image
) -> None:
    data = codec.compress(photograph)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(percov2.load, [str(tiny_model)] * 8))
    assert all(other.compress(photograph) == data for other in loaded)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_the_seed_may_be_numpys(codec: Codec, photograph: Image.Image) -> None:
    data = codec.compress(photograph)
    picture = np.asarray(codec.decompress(data, seed=3))
    assert np.array_equal(np.asarray(codec.decompress(data, seed=np.int64(3))), picture)


@pytest.mark.parametrize("steps", [1, 2])
def test_hybrid_mode_sends_the_first_groups_and_invents_the_rest(
    codec: Codec, tiny_model: Path, photograph: Image.Image, steps: int
) -> None:
    full, part = codec.compress(photograph), codec.compress(photograph, schedule_steps=steps)
    assert len(part) < len(full)
    tokens, sent = codec.encode_tokens(photograph), codec.decode_tokens(part)
    known = sent >= 0
    assert 0 < known.sum() < tokens.size
    assert np.array_equal(sent[known], tokens[known])
    assert codec.decompress(part, steps=1).size == photograph.size
    described = percov2.info(part, model=str(tiny_model))
    total = codec.summary.steps_total(*photograph.size)
    assert total > 2
    assert (described["steps_sent"], described["steps_total"]) == (steps, total)


def test_the_caption_is_stored_and_changes_the_picture_under_guidance(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph, caption="a red door — ☃")
    assert percov2.info(data)["caption"] == "a red door — ☃"
    with_caption = np.asarray(codec.decompress(data, steps=1, guidance=5.0, seed=0))
    without = np.asarray(codec.decompress(codec.compress(photograph), steps=1, seed=0))
    assert not np.array_equal(with_caption, without)


def test_guidance_of_zero_ignores_the_caption(codec: Codec, photograph: Image.Image) -> None:
    pictures = [
        codec.decompress(codec.compress(photograph, caption=caption), guidance=0.0, seed=0)
        for caption in ("a red door", "")
    ]
    assert np.array_equal(*map(np.asarray, pictures))


def test_guidance_of_one_equals_the_plain_conditional_velocity(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph, caption="a")
    plain = np.asarray(codec.decompress(data, steps=2, guidance=1.0)).astype(int)
    # v_u + g (v_c - v_u) is continuous in g: close to 1 the picture is nearly the same.
    near = np.asarray(codec.decompress(data, steps=2, guidance=1.0001)).astype(int)
    assert np.abs(plain - near).max() <= 1


def test_pictures_are_sharpened_as_told_or_as_the_model_says(
    codec: Codec, photograph: Image.Image, tmp_path: Path
) -> None:
    data = codec.compress(photograph)
    plain = codec.decompress(data, steps=1)
    sharpened = sharpen(image_to_tensor(plain)[None], 0.5)[0]
    told = codec.decompress(data, steps=1, sharpness=0.5)
    # Of the plain picture, which was rounded, as far from black and white as nothing was clamped.
    levels = torch.from_numpy(np.asarray(plain).astype(np.float32)).movedim(-1, 0)
    whole = F.max_pool2d((levels - 127.5).abs(), 5, stride=1, padding=2) < 127
    off = (image_to_tensor(told) - sharpened.clamp(-1, 1)).abs()
    assert whole.float().mean() > 0.5
    assert off[whole].max() < 1.6 / 127.5
    assert np.abs(np.asarray(told).astype(int) - np.asarray(plain)).max() > 5
    config = replace(codec.config, sharpness=0.5)
    replace(codec.components, config=config).save(tmp_path)
    sharpening = percov2.load(str(tmp_path))
    assert sharpening.compress(photograph) == data, "the stream does not depend on it"
    assert np.array_equal(sharpening.decompress(data, steps=1), told)
    assert np.array_equal(sharpening.decompress(data, steps=1, sharpness=0.0), plain)


def test_pictures_get_grain_as_told_or_as_the_model_says(
    codec: Codec, photograph: Image.Image, tmp_path: Path
) -> None:
    data = codec.compress(photograph)
    plain = codec.decompress(data, steps=1, seed=5)
    told = codec.decompress(data, steps=1, seed=5, grain=0.5)
    levels = torch.from_numpy(np.asarray(plain).astype(np.float32)).movedim(-1, 0)
    expected = add_grain(image_to_tensor(plain)[None], 0.5, seed=5)[0]
    whole = (levels > 0) & (levels < 255)
    off = (image_to_tensor(told) - expected.clamp(-1, 1)).abs()
    assert whole.float().mean() > 0.5
    # Both are rounded.
    assert off[whole].max() < 1.6 / 127.5
    assert np.abs(np.asarray(told).astype(int) - np.asarray(plain)).mean() > 1
    assert np.array_equal(told, codec.decompress(data, steps=1, seed=5, grain=0.5))
    config = replace(codec.config, grain=0.5)
    replace(codec.components, config=config).save(tmp_path)
    grained = percov2.load(str(tmp_path))
    assert grained.compress(photograph) == data, "the stream does not depend on it"
    assert np.array_equal(grained.decompress(data, steps=1, seed=5), told)
    assert np.array_equal(grained.decompress(data, steps=1, seed=5, grain=0.0), plain)


@pytest.mark.parametrize("in_step", [False, True])
def test_without_a_caption_guidance_costs_nothing(
    codec: Codec, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch, in_step: bool
) -> None:
    data = codec.compress(photograph, caption="")
    calls = []
    forward = codec.components.transformer.forward

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(codec.components.transformer, "forward", counted)
    monkeypatch.setattr(codec, "_in_step", in_step)
    guided = codec.decompress(data, steps=3, guidance=3.0)
    assert len(calls) == (6 if in_step else 3)
    plain = np.asarray(codec.decompress(data, steps=3, guidance=1.0))
    # Both velocities are equal, so that their difference is rounding.
    assert np.abs(np.asarray(guided).astype(int) - plain).max() <= 1


@pytest.mark.parametrize(
    ("guidance", "encoded"), [(0.0, [""]), (1.0, ["a red door"]), (2.0, ["", "a red door"])]
)
def test_captions_that_guidance_leaves_out_are_not_encoded(
    codec: Codec, photograph: Image.Image, guidance: float, encoded: list[str]
) -> None:
    data = codec.compress(photograph, caption="a red door")
    seen: list[list[str]] = []
    encoder = codec.components.text_conditioner
    hook = encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with hook:
        codec.decompress(data, steps=1, guidance=guidance)
    assert seen == [encoded]


def test_info_counts_every_byte(codec: Codec, tiny_model: Path, photograph: Image.Image) -> None:
    data = codec.compress(photograph, caption="abc")
    described = percov2.info(data, model=str(tiny_model))
    sizes = described["bytes"]
    assert sizes["header"] + sizes["caption"] + sizes["tokens"] == sizes["total"] == len(data)
    assert min(sizes.values()) > 0
    assert described["entropy"] == "model"
    assert described["bpp"] == 8 * len(data) / (96 * 64)
    assert described["model"] == codec.config.name
    assert "generated" in described["note"]


def test_inputs_of_every_kind_give_the_same_bytes(
    codec: Codec, photograph: Image.Image, tmp_path: Path
) -> None:
    photograph.save(tmp_path / "p.png")
    variants = (photograph, np.asarray(photograph), tmp_path / "p.png", str(tmp_path / "p.png"))
    assert len({codec.compress(variant) for variant in variants}) == 1


def test_grey_and_transparent_pictures_are_accepted_and_the_change_is_told(
    codec: Codec, photograph: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    assert codec.decompress(codec.compress(photograph.convert("L")), steps=1).mode == "RGB"
    transparent = photograph.copy()
    transparent.putalpha(128)
    codec.compress(transparent)
    assert "alpha composited on white" in caplog.text


@pytest.mark.parametrize("size", [(15, 20), (20, 15), (4097, 16)])
def test_sizes_beyond_the_format_are_refused(codec: Codec, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        codec.compress(Image.new("RGB", size))


@pytest.mark.parametrize("steps", [0, -1, 4, 100])
def test_schedule_steps_out_of_range_are_refused(
    codec: Codec, photograph: Image.Image, steps: int
) -> None:
    with pytest.raises(ValueError, match="choose 1 to 3"):
        codec.compress(photograph, schedule_steps=steps)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 10**12},
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_decoding_options_out_of_range_are_refused(
    codec: Codec, noise_image: Image.Image, options: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="it must be"):
        codec.decompress(codec.compress(noise_image), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((32, 32, 3)),
        np.zeros((32, 32, 1), np.uint8),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros(32, np.uint8),
    ],
    ids=str,
)
def test_arrays_of_another_kind_are_refused(codec: Codec, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        codec.compress(array)


def test_a_stream_of_another_model_is_refused_by_its_id(
    codec: Codec, tmp_path: Path, photograph: Image.Image
) -> None:
    save_tiny(tmp_path, seed=1)
    other = percov2.load(str(tmp_path))
    assert other.config.model_id != codec.config.model_id
    with pytest.raises(BitstreamError, match=f"{codec.config.model_id:#06x}"):
        other.decompress(codec.compress(photograph))


def test_more_steps_than_the_schedule_has_are_refused(
    codec: Codec, noise_image: Image.Image
) -> None:
    stream = Stream.from_bytes(codec.compress(noise_image))
    fields = {name: getattr(stream, name) for name in stream.__dataclass_fields__}
    forged = Stream(**{**fields, "steps_sent": 60}).to_bytes()
    with pytest.raises(BitstreamError, match="60 schedule steps"):
        codec.decompress(forged)


def test_every_truncation_and_every_flipped_bit_is_refused(
    codec: Codec, noise_image: Image.Image
) -> None:
    data = codec.compress(noise_image, caption="caption")
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            codec.decode_tokens(data[:length])
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            codec.decode_tokens(bytes(damaged))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    payload=st.binary(max_size=40),
    has_caption=st.booleans(),
    uniform=st.booleans(),
    steps=st.none() | st.integers(1, 63),
)
def test_forged_payloads_decode_or_raise_bitstream_error(
    codec: Codec, payload: bytes, has_caption: bool, uniform: bool, steps: int | None
) -> None:
    data = Stream(
        model_id=codec.config.model_id,
        width=40,
        height=24,
        steps_sent=steps,
        has_caption=has_caption,
        uniform=uniform,
        payload=payload,
    ).to_bytes()
    try:
        decoded = codec.decode_tokens(data)
    except BitstreamError:
        return
    assert decoded.min() >= -1
    assert decoded.max() < 32


# -- sizes ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.sampled_from([(512, 512), (256, 256), (48, 32), (500, 375), (16, 300)]),
    caption=st.just("") | st.text(max_size=40) | st.just("a dog on a beach"),
    seed=st.integers(0, 1000),
    likely=st.booleans(),
    uniform=st.booleans(),
    share=st.floats(0, 1),
)
def test_a_file_is_its_information_and_a_few_bytes(
    codec: Codec,
    size: tuple[int, int],
    caption: str,
    seed: int,
    likely: bool,
    uniform: bool,
    share: float,
) -> None:
    grid = codec.summary.token_grid(*size)
    tokens = np.random.default_rng(seed).integers(0, 32, grid)
    if likely:
        tokens = codec._coders[False].fill(np.full(grid, -1), seed=seed)
    coder = codec._coders[uniform]
    total = coder.steps_total(*grid)
    steps = 1 + round(share * (total - 1))
    data = codec._write(tokens, size, caption, steps=steps, uniform=uniform)
    sent = coder.groups(*grid) < steps
    np.testing.assert_array_equal(codec.decode_tokens(data), np.where(sent, tokens, -1))
    bits = sum(coder.bits_per_group(tokens)[:steps])
    if caption:
        bits += codec._captions.bits(caption)
        assert percov2.info(data)["caption"] == caption
    spelled = 0 if size in COMMON_SIZES else 3
    assert len(data) <= bits / 8 + 7 + (steps < total) + spelled + 1.1


def test_a_square_picture_pays_seven_bytes_of_header(codec: Codec, photograph: Image.Image) -> None:
    data = codec.compress(photograph.resize((512, 512)), caption="a woman")
    assert percov2.info(data)["bytes"]["header"] == 7


# -- portable mode -------------------------------------------------------------------------------


def test_portable_mode_stores_the_same_tokens_in_a_flat_code(
    codec: Codec, photograph: Image.Image
) -> None:
    picture = photograph.resize((256, 192))
    modelled = codec.compress(picture, caption="a b")
    portable = codec.compress(picture, caption="a b", uniform=True)
    tokens = codec.decode_tokens(portable)
    assert np.array_equal(tokens, codec.decode_tokens(modelled))
    described = percov2.info(portable)
    assert described["entropy"] == "uniform"
    assert described["caption"] == "a b"
    assert abs(described["bytes"]["tokens"] - tokens.size * 5 / 8) <= 2
    pictures = [np.asarray(codec.decompress(d, steps=1, seed=3)) for d in (modelled, portable)]
    assert np.array_equal(*pictures)


def test_portable_tokens_decode_with_the_codebook_alone(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph, uniform=True)
    stream = Stream.from_bytes(data)
    coder = TokenCoder(None, schedule="quincunx", codebook_size=32)
    grid = codec.summary.token_grid(*photograph.size)
    tokens = coder.read(RangeDecoder(stream.payload), *grid, steps=coder.steps_total(*grid))
    assert np.array_equal(tokens, codec.encode_tokens(photograph))


def test_the_entropy_of_a_stream_is_that_of_its_header(
    codec: Codec, photograph: Image.Image
) -> None:
    stream = Stream.from_bytes(codec.compress(photograph, uniform=True))
    fields = {name: getattr(stream, name) for name in stream.__dataclass_fields__}
    swapped = Stream(**{**fields, "uniform": False}).to_bytes()
    try:
        tokens = codec.decode_tokens(swapped)
    except BitstreamError:
        return
    assert not np.array_equal(tokens, codec.encode_tokens(photograph))


# -- cutting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True])
def test_truncating_equals_compressing_fewer_groups_and_decodes_no_pixel(
    codec: Codec, photograph: Image.Image, uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = photograph.resize((160, 128))
    total = codec.summary.steps_total(160, 128)
    full = codec.compress(picture, caption="a b", uniform=uniform)
    expected = [
        codec.compress(picture, caption="a b", schedule_steps=steps, uniform=uniform)
        for steps in range(1, total + 1)
    ]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(codec, "_paint", refuse)
    monkeypatch.setattr(codec, "encode_tokens", refuse)
    shorter = [codec.truncate(full, schedule_steps=steps) for steps in range(1, total + 1)]
    assert shorter == expected
    assert shorter[-1] == full
    assert codec.truncate(shorter[2], schedule_steps=2) == shorter[1]


def test_truncating_what_is_not_there_is_refused(codec: Codec, photograph: Image.Image) -> None:
    two = codec.compress(photograph, schedule_steps=2)
    for steps in (0, 3):
        with pytest.raises(ValueError, match=f"steps is {steps}: the stream has 2 groups"):
            codec.truncate(two, schedule_steps=steps)
    with pytest.raises(BitstreamError, match="checksum"):
        codec.truncate(two[:-1], schedule_steps=1)


def read_cut(codec: Codec, data: bytes) -> tuple[str, np.ndarray]:
    return codec._read_cut(codec._parse(data, verify=False))


@pytest.mark.parametrize("caption", ["", "a dog runs along the beach"])
@pytest.mark.parametrize("uniform", [False, True])
def test_of_a_cut_file_the_groups_that_are_there_are_the_original_s(
    codec: Codec, photograph: Image.Image, caption: str, uniform: bool
) -> None:
    picture = photograph.resize((256, 256))
    data = codec.compress(picture, caption=caption, uniform=uniform)
    tokens, groups = codec.decode_tokens(data), codec._coders[False].groups(16, 16)
    shares, refused = [], 0
    for length in range(7, len(data), 5):
        try:
            text, found = read_cut(codec, data[:length])
        except BitstreamError as error:
            assert "truncated stream" in str(error)  # noqa: PT017
            refused += 1
            continue
        whole = len(np.unique(groups[found >= 0]))
        assert text == caption
        assert np.array_equal(found, np.where(groups < whole, tokens, -1))
        shares.append(whole)
    assert shares == sorted(shares)
    assert shares[0] == 1
    assert shares[-1] >= codec.summary.steps_total(256, 256) - 1
    assert 0 < refused < 12


def test_a_cut_file_becomes_a_picture_only_if_that_is_asked_for(
    codec: Codec, photograph: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    data = codec.compress(photograph.resize((256, 256)), caption="a b")
    cut = data[: len(data) * 2 // 3]
    with pytest.raises(BitstreamError, match="checksum failed"):
        codec.decompress(cut, steps=1)
    with pytest.raises(BitstreamError, match="checksum failed"):
        codec.decode_tokens(cut)
    assert caplog.text == ""
    pictures = [np.asarray(codec.decompress(cut, steps=1, allow_truncated=True)) for _ in range(2)]
    assert np.array_equal(*pictures)
    assert pictures[0].shape == (256, 256, 3)
    assert "groups are whole, the rest is invented; unverified" in caplog.text
    total = codec.summary.steps_total(256, 256)
    assert 1 <= codec.steps_whole(cut) < total
    assert f"{codec.steps_whole(cut)} of {total} groups are whole" in caplog.text
    assert codec.steps_whole(data) == total


def test_a_damaged_file_is_not_called_a_cut_one(
    codec: Codec, photograph: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytearray(codec.compress(photograph.resize((256, 256)), caption=""))
    data[len(data) // 2] ^= 0x55
    codec.decompress(bytes(data), steps=1, allow_truncated=True)
    (message,) = caplog.messages
    assert message.startswith("damaged stream: nothing is missing, but its checksum fails")


def test_allowing_cuts_changes_nothing_for_a_whole_file(
    codec: Codec, photograph: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    data = codec.compress(photograph, schedule_steps=2)
    strict, lenient = (
        np.asarray(codec.decompress(data, steps=1, allow_truncated=allow))
        for allow in (False, True)
    )
    assert np.array_equal(strict, lenient)
    assert caplog.text == ""


def test_a_file_cut_within_caption_or_first_group_says_so(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph.resize((256, 256)), caption="zyx QWV jkl 0815 (Œuvre)")
    header = percov2.info(data)["bytes"]["header"]
    for kept in (0, 1, 5):
        with pytest.raises(BitstreamError, match="the cut is within its caption"):
            codec.decompress(data[: header + kept], allow_truncated=True)
    bare = codec.compress(photograph.resize((256, 256)))
    with pytest.raises(BitstreamError, match="do not hold the first group"):
        codec.decompress(bare[: header + 1], allow_truncated=True)
    with pytest.raises(BitstreamError, match="truncated stream"):
        codec.decompress(bare[: header - 1], allow_truncated=True)


# -- a largest size ------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True])
def test_what_fits_is_sent_with_the_least_left_out(
    codec: Codec, photograph: Image.Image, caplog: pytest.LogCaptureFixture, uniform: bool
) -> None:
    picture, caption = photograph.resize((160, 128)), "a dog runs along the beach"
    total = codec.summary.steps_total(160, 128)
    weights = [0.0] if uniform else [0.0, *RATE_WEIGHTS]
    attempts = [
        (total, caption, 0.0),
        *((steps, "", weight) for steps in range(total, 0, -1) for weight in weights),
    ]
    files = {
        (steps, text, weight): codec.compress(
            picture,
            caption=text,
            schedule_steps=steps,
            rate_weight=None if uniform else weight,
            uniform=uniform,
        )
        for steps, text, weight in attempts
    }
    largest, smallest = len(files[attempts[0]]), min(map(len, files.values()))

    def fitted(most: int) -> bytes:
        caplog.clear()
        return codec.compress(picture, caption=caption, max_bytes=most, uniform=uniform)

    assert fitted(largest) == files[attempts[0]]
    assert caplog.text == ""
    seen = set()
    for most in range(smallest, largest, 3):
        steps, text, weight = next(key for key in attempts if len(files[key]) <= most)
        assert fitted(most) == files[steps, text, weight]
        told = f"{steps} of {total} groups, no caption"
        told += f", rate weight {weight:g}" if weight else ""
        assert caplog.messages == [f"to fit {most} bytes: {told}"]
        seen.add((steps, weight))
    assert {steps for steps, _ in seen} == {*range(1, total + 1)}
    assert (len({weight for _, weight in seen}) > 1) != uniform


def test_a_size_that_nothing_fits_in_is_refused(codec: Codec, photograph: Image.Image) -> None:
    smallest = min(
        len(codec.compress(photograph, caption="", schedule_steps=1, rate_weight=weight))
        for weight in (0, *RATE_WEIGHTS)
    )
    message = f"nothing fits in {smallest - 1} bytes: the first group alone takes {smallest}"
    with pytest.raises(ValueError, match=message):
        codec.compress(photograph, caption="a b", max_bytes=smallest - 1)


def test_a_largest_size_may_be_given_with_steps(codec: Codec, photograph: Image.Image) -> None:
    two = codec.compress(photograph, schedule_steps=2)
    assert codec.compress(photograph, schedule_steps=2, max_bytes=10**6) == two
    cheaper = codec.compress(photograph, caption="", schedule_steps=2, rate_weight=0.01)
    assert len(cheaper) < len(two)
    assert codec.compress(photograph, schedule_steps=2, max_bytes=len(cheaper)) == cheaper


# -- machines ------------------------------------------------------------------------------------


def test_one_and_two_threads_write_and_read_the_same(codec: Codec) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (32, 48))
    before, written, read = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            data = codec._write(tokens, (768, 512), "", steps=7, uniform=False)
            written.append(data)
            read.append(codec.decode_tokens(written[0]))
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]
    assert np.array_equal(read[0], tokens)
    assert np.array_equal(read[1], tokens)


def test_saved_and_reloaded_codec_decodes_the_same(
    codec: Codec, tmp_path: Path, photograph: Image.Image
) -> None:
    codec.save_pretrained(tmp_path / "copy")
    again = percov2.load(str(tmp_path / "copy"))
    data = codec.compress(photograph)
    assert again.compress(photograph) == data
    assert np.array_equal(
        np.asarray(again.decompress(data, steps=2)), np.asarray(codec.decompress(data, steps=2))
    )


def test_card_and_notice_go_along_with_a_saved_model(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    for name in ("README.md", "NOTICE"):
        (source / name).write_text(f"the {name} of the model\n")
    percov2.load(str(source)).save_pretrained(tmp_path / "copy")
    for name in ("README.md", "NOTICE"):
        assert (tmp_path / "copy" / name).read_text() == f"the {name} of the model\n"


def test_a_model_is_stored_as_precisely_as_it_was(
    codec: Codec, tiny_model: Path, tmp_path: Path
) -> None:
    def size(directory: Path) -> int:
        return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))

    codec.save_pretrained(tmp_path / "half", half=True)
    half = percov2.load(str(tmp_path / "half"))
    half.save_pretrained(tmp_path / "again")
    half.save_pretrained(tmp_path / "float", half=False)
    codec.save_pretrained(tmp_path / "as_it_was")
    assert size(tmp_path / "again") == size(tmp_path / "half") < 0.6 * size(tmp_path / "float")
    assert size(tmp_path / "as_it_was") == size(tiny_model)
    ids = {percov2.load(str(tmp_path / n)).config.model_id for n in ("half", "again", "float")}
    assert len(ids) == 1


class _Hub:
    """Stands in for `HfApi`: writes down what is asked of it."""

    def __init__(self, token: str | None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        made.append(self)

    def file_exists(self, repo_id: str, name: str) -> bool:
        return False

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", options))

    def upload_folder(self, *, folder_path: str, **options: Any) -> str:
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}
        self.calls.append(("upload", {**options, "names": names}))
        return "https://somewhere/commit"


made: list[_Hub] = []


def test_a_pushed_model_replaces_all_parts_of_another(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    made.clear()
    assert codec.push_to_hub("owner/name", private=True) == "https://somewhere/commit"
    (_, created), (_, uploaded) = made[0].calls
    assert created == {"private": True, "exist_ok": True}
    assert {"model_index.json", "README.md", "quantizer"} <= uploaded["names"]
    patterns = uploaded["delete_patterns"]
    for folder in ("text_encoder_3", "tokenizer_3", "vae", "autoencoder", "transformer"):
        name = f"{folder}/model-00001-of-00002.safetensors"
        assert any(fnmatch(name, one) for one in patterns), folder
    assert not any(fnmatch("README.md", one) for one in patterns)


def test_no_repository_is_made_for_a_model_that_cannot_be_written(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such licence")

    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    monkeypatch.setattr("percov2.codec.write_model_card", refuse)
    made.clear()
    with pytest.raises(ValueError, match="no such licence"):
        codec.push_to_hub("owner/name")
    assert made[0].calls == []


def test_unknown_device_and_dtype_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="int8"):
        percov2.load(str(tiny_model), dtype="int8")
    with pytest.raises(ValueError, match="nonsense"):
        percov2.load(str(tiny_model), device="nonsense")


def test_offloading_changes_nothing_in_the_picture(
    codec: Codec, tiny_model: Path, photograph: Image.Image
) -> None:
    data = codec.compress(photograph)
    offloading = percov2.load(str(tiny_model), offload=True)
    assert np.array_equal(
        np.asarray(offloading.decompress(data, steps=1)),
        np.asarray(codec.decompress(data, steps=1)),
    )


def test_a_picture_larger_than_a_tile_is_painted_in_tiles(
    codec: Codec, photograph: Image.Image
) -> None:
    assert codec.config.tiling.size * 8 < 200
    large = photograph.resize((200, 168))
    assert codec.decompress(codec.compress(large), steps=1).size == (200, 168)
