"""That the codec hands its settings on: what they do is tested where it is done."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import percov2
from percov2 import codec as module
from percov2.analysis.captioner import GivenCaptioner
from percov2.codec import Codec
from percov2.rate_control import RATE_WEIGHTS, Content, first_that_fits
from tests.tiny_codec import tiny_components


@pytest.fixture
def codec() -> Codec:
    return Codec(tiny_components(from_prediction=True))


def test_the_seed_is_derived_from_the_file(
    codec: Codec, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    draw = module.seeded_noise

    def noise(shape: Any, *, seed: int) -> Tensor:
        seeds.append(seed)
        return draw(shape, seed=seed)

    monkeypatch.setattr(module, "seeded_noise", noise)
    files = [codec.compress(photograph, caption=caption) for caption in ("", "a b")]
    for data in files:
        codec.decompress(data, steps=1)
    assert seeds == [zlib.crc32(data) for data in files]
    assert len(set(seeds)) == 2


def test_defaults_are_the_models(codec: Codec, photograph: Image.Image) -> None:
    data = codec.compress(photograph, caption="a red door")
    config = codec.config
    assert (config.default_steps, config.default_guidance) == (2, 2.0)
    plain = codec.decompress(data)
    assert np.array_equal(plain, codec.decompress(data, steps=2, guidance=2.0))
    for other in ({"steps": 1}, {"guidance": 1.0}):
        assert not np.array_equal(plain, codec.decompress(data, **other))


def test_missing_groups_of_a_portable_stream_are_invented_by_the_masked_model(
    codec: Codec, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted: list[Any] = []
    paint = codec._paint

    def keep(tokens: Any, caption: str, **options: Any) -> Tensor:
        painted.append(tokens)
        return paint(tokens, caption, **options)

    monkeypatch.setattr(codec, "_paint", keep)
    data = codec.compress(photograph.resize((256, 256)), uniform=True)
    cut = data[: len(data) // 2]
    codec.decompress(cut, steps=1, seed=3, allow_truncated=True)
    _, tokens = codec._read_cut(codec._parse(cut, verify=False))
    assert (tokens < 0).any()
    assert np.array_equal(painted[0], codec._coders[False].fill(tokens, seed=3))


def test_sampling_starts_at_the_models_temperature(photograph: Image.Image) -> None:
    components = tiny_components(from_prediction=True)
    pictures = []
    for temperature in (1.0, 0.5):
        flow = replace(components.config.flow, temperature=temperature)
        config = replace(components.config, flow=flow)
        codec = Codec(replace(components, config=config))
        data = codec.compress(photograph)
        pictures.append(np.asarray(codec.decompress(data, steps=1, seed=1)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.5


def test_pictures_are_padded_and_cropped_at_the_right_and_below(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 51, 3), dtype=np.uint8)
    autoencoder = codec.components.tokenizer.autoencoder
    seen: list[Tensor] = []
    encode = autoencoder.encode

    def keep(image: Tensor) -> Tensor:
        seen.append(image)
        return encode(image)

    monkeypatch.setattr(autoencoder, "encode", keep)
    data = codec.compress(pixels, caption="")
    (padded,) = seen
    assert padded.shape[2] > 37
    assert padded.shape[3] > 51
    image = torch.from_numpy(pixels).movedim(-1, 0) / 127.5 - 1
    assert torch.allclose(padded[0, :, :37, :51], image, atol=1e-6)
    last = padded[0, :, 36:37, :].expand_as(padded[0, :, 36:, :])
    assert torch.equal(padded[0, :, 36:, :], last)
    assert torch.equal(padded[0, :, :, 50:], padded[0, :, :, 50:51].expand_as(padded[0, :, :, 50:]))
    monkeypatch.setattr(autoencoder, "decode", lambda latents: padded)
    restored = codec.decompress(data, steps=1, sharpness=0.0, grain=0.0)
    assert np.array_equal(np.asarray(restored), pixels)


def test_an_empty_caption_is_none_whatever_the_captioner_says(photograph: Image.Image) -> None:
    codec = Codec(tiny_components(), captioner=GivenCaptioner("a red door"))
    captions = [
        codec._read(codec._parse(codec.compress(photograph, caption=caption)))[0]
        for caption in (None, "", "a cat")
    ]
    assert captions == ["a red door", "", "a cat"]


def test_only_cheaper_tokens_are_tried_for_a_size() -> None:
    tried: list[Content] = []

    def write(content: Content) -> bytes:
        tried.append(content)
        return bytes(100)

    wanted = Content(steps=3, caption="a cat", rate_weight=0.03)
    with pytest.raises(ValueError, match="nothing fits in 10 bytes"):
        first_that_fits(write, wanted, 10, cheaper=True)
    weights = [0.03, *(w for w in RATE_WEIGHTS if w > 0.03)]
    assert tried == [
        wanted,
        *(Content(steps=k, caption="", rate_weight=w) for k in (3, 2, 1) for w in weights),
    ]


def test_networks_are_loaded_in_the_dtype_that_is_asked_for(tiny_model: Path) -> None:
    parts = percov2.load(str(tiny_model), dtype="bfloat16").components
    assert {p.dtype for p in parts.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in parts.text_conditioner.parameters()} == {torch.bfloat16}
    for part in parts.tokenizer.modules().values():
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_offloaded_networks_visit_the_device_one_after_the_other(
    photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = tiny_components()
    moves: list[tuple[str, str]] = []
    for name in ("text_conditioner", "transformer"):

        def to(device: Any, name: str = name) -> None:
            moves.append((name, str(device)))

        monkeypatch.setattr(getattr(components, name), "to", to)
    codec = Codec(components, offload=True)
    data = codec.compress(photograph, caption="a cat")
    assert moves == []
    # Another name of the CPU, so that coming and going differ.
    codec.device = torch.device("cpu", 0)
    codec.decompress(data, steps=1)
    names = ("text_conditioner", "transformer")
    assert moves == [(name, place) for name in names for place in ("cpu:0", "cpu")]
