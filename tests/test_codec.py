"""The codec end to end on a tiny random model of the real classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import percov2
from percov2.bitstream import BitstreamError, Stream
from percov2.codec import Codec
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


@pytest.mark.parametrize("steps", [1, 2])
def test_hybrid_mode_sends_the_first_groups_and_invents_the_rest(
    codec: Codec, photograph: Image.Image, steps: int
) -> None:
    full, part = codec.compress(photograph), codec.compress(photograph, schedule_steps=steps)
    assert len(part) < len(full)
    tokens, sent = codec.encode_tokens(photograph), codec.decode_tokens(part)
    known = sent >= 0
    assert 0 < known.sum() < tokens.size
    assert np.array_equal(sent[known], tokens[known])
    assert codec.decompress(part, steps=1).size == photograph.size
    described = percov2.info(part, model=str(codec.summary.directory))
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


def test_guidance_of_one_equals_the_plain_conditional_velocity(
    codec: Codec, photograph: Image.Image
) -> None:
    data = codec.compress(photograph, caption="a")
    plain = np.asarray(codec.decompress(data, steps=2, guidance=1.0)).astype(int)
    # v_u + g (v_c - v_u) is continuous in g: close to 1 the picture is nearly the same.
    near = np.asarray(codec.decompress(data, steps=2, guidance=1.0001)).astype(int)
    assert np.abs(plain - near).max() <= 1


def test_info_counts_every_byte(codec: Codec, photograph: Image.Image) -> None:
    data = codec.compress(photograph, caption="abc")
    described = percov2.info(data, model=str(codec.summary.directory))
    sizes = described["bytes"]
    assert sizes["header"] + sizes["caption"] + sizes["tokens"] == sizes["total"] == len(data)
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
@given(tokens=st.binary(max_size=40), caption=st.text(max_size=20), steps=st.integers(1, 63))
def test_forged_payloads_decode_or_raise_bitstream_error(
    codec: Codec, tokens: bytes, caption: str, steps: int
) -> None:
    from percov2.entropy.caption_coder import encode_caption

    mode, coded = encode_caption(caption)
    data = Stream(
        model_id=codec.config.model_id,
        width=40,
        height=24,
        steps_sent=steps,
        caption_mode=mode,
        caption=coded,
        tokens=tokens,
    ).to_bytes()
    try:
        decoded = codec.decode_tokens(data)
    except BitstreamError:
        return
    assert decoded.min() >= -1
    assert decoded.max() < 32


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
