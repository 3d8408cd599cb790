"""The text conditioner against diffusers, and its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from percov2.synthesis.text_conditioner import (
    TextCondition,
    TextConditioner,
    tiny_text_conditioner,
    train_clip_tokenizer,
)
from tests.tiny_models import (
    CAPTIONS,
    JOINT_DIM,
    MAX_LENGTH,
    POOLED_DIM,
    tiny_clip_tokenizer,
    tiny_sd3_pipeline,
)

T5_LENGTH = 12
# Different lengths, one longer than CLIP and T5 read, none at all, and text they never saw.
MIXED = ["A dog runs.", "", "sand and water " * 40, "日本の犬 🏄 naïve café"]


@pytest.fixture(scope="module")
def sd3_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original SD3 directory: a pipeline with all three encoders, no text_conditioner.json."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("sd3")
    tiny_sd3_pipeline(with_t5=True).save_pretrained(directory)
    return directory


@pytest.fixture
def tiny() -> TextConditioner:
    torch.manual_seed(0)
    return tiny_text_conditioner(tokenizer=tiny_clip_tokenizer(), hidden_size=16, layers=2, heads=2)


def load_sd3(directory: Path, *, use_t5: bool) -> TextConditioner:
    return TextConditioner.from_sd3(
        directory, use_t5=use_t5, joint_dim=JOINT_DIM, t5_length=T5_LENGTH
    )


def conditioner_of(pipeline: Any, *, use_t5: bool) -> TextConditioner:
    count = 3 if use_t5 else 2
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    return TextConditioner(
        tokenizers=tokenizers[:count],
        text_encoders=encoders[:count],
        joint_dim=JOINT_DIM,
        t5_length=T5_LENGTH,
    )


def assert_equal(left: TextCondition, right: TextCondition, *, atol: float = 0.0) -> None:
    torch.testing.assert_close(left.embeddings, right.embeddings, atol=atol, rtol=0)
    torch.testing.assert_close(left.pooled, right.pooled, atol=atol, rtol=0)


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("use_t5", [True, False])
def test_equals_the_diffusers_pipeline(use_t5: bool) -> None:
    torch.manual_seed(0)
    pipeline = tiny_sd3_pipeline(with_t5=use_t5)
    with torch.no_grad():
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompt=MIXED,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_LENGTH,
        )
        condition = conditioner_of(pipeline, use_t5=use_t5)(MIXED)
    assert condition.embeddings.shape == (len(MIXED), MAX_LENGTH + T5_LENGTH, JOINT_DIM)
    assert condition.pooled.shape == (len(MIXED), POOLED_DIM)
    expected_condition = TextCondition(embeddings=expected, pooled=expected_pooled)
    assert_equal(condition, expected_condition, atol=1e-6)
    assert bool(condition.embeddings[:, MAX_LENGTH:].any()) == use_t5


def test_loads_an_sd3_directory(sd3_directory: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_directory)
    expected = conditioner_of(pipeline, use_t5=True)(MIXED)
    assert_equal(load_sd3(sd3_directory, use_t5=True)(MIXED), expected)
    without = load_sd3(sd3_directory, use_t5=False)
    assert not without.has_t5
    assert without.pooled_dim == POOLED_DIM
    torch.testing.assert_close(without(MIXED).pooled, expected.pooled, atol=0, rtol=0)


@pytest.mark.parametrize("use_t5", [True, False])
def test_survives_saving(sd3_directory: Path, tmp_path: Path, use_t5: bool) -> None:
    conditioner = load_sd3(sd3_directory, use_t5=use_t5)
    conditioner.save_pretrained(tmp_path)
    loaded = TextConditioner.from_pretrained(tmp_path, use_t5=use_t5)
    assert_equal(loaded(MIXED), conditioner(MIXED))
    assert not list(tmp_path.rglob("*.bin"))
    assert len(list(tmp_path.rglob("model.safetensors"))) == len(conditioner.text_encoders)


def test_loads_in_another_dtype(tiny: TextConditioner, tmp_path: Path) -> None:
    tiny.to(torch.bfloat16).save_pretrained(tmp_path)
    stored = TextConditioner.from_pretrained(tmp_path, use_t5=False)
    asked = TextConditioner.from_pretrained(tmp_path, use_t5=False, dtype=torch.float32)
    assert stored(["a dog"]).embeddings.dtype == torch.bfloat16
    assert asked(["a dog"]).embeddings.dtype == torch.float32


def test_batch_equals_single_captions(sd3_directory: Path) -> None:
    conditioner = load_sd3(sd3_directory, use_t5=True)
    batch = conditioner(MIXED)
    for row, caption in enumerate(MIXED):
        single = conditioner([caption])
        in_batch = TextCondition(
            embeddings=batch.embeddings[row : row + 1], pooled=batch.pooled[row : row + 1]
        )
        assert_equal(in_batch, single, atol=1e-5)


def test_text_beyond_the_limit_is_ignored_and_text_within_matters(tiny: TextConditioner) -> None:
    long = "dog " * MAX_LENGTH
    assert_equal(tiny([long]), tiny([long + "and a cat"]))
    assert not torch.equal(tiny(["a dog"]).pooled, tiny(["a cat"]).pooled)


def test_pools_at_the_first_end_token(tiny: TextConditioner) -> None:
    encoder: Any = tiny.text_encoders[0]
    ids = tiny.tokenizers[0](["a dog", "two children play"], padding="max_length").input_ids
    end = tiny.tokenizers[0].eos_token_id
    states = encoder(torch.tensor(ids)).last_hidden_state
    expected = torch.stack([state[row.index(end)] for state, row in zip(states, ids, strict=True)])
    pooled = tiny(["a dog", "two children play"]).pooled[:, : encoder.config.projection_dim]
    torch.testing.assert_close(pooled, encoder.text_projection(expected))


def test_without_t5_tokens_nothing_is_appended(tiny: TextConditioner) -> None:
    condition = tiny(["a dog"])
    assert condition.embeddings.shape == (1, MAX_LENGTH, 32)
    assert condition.pooled.shape == (1, 32)


def test_joint_dim_pads_with_zeros() -> None:
    conditioner = tiny_text_conditioner(
        tokenizer=tiny_clip_tokenizer(), hidden_size=16, layers=1, heads=2, joint_dim=40
    )
    embeddings = conditioner(["a dog"]).embeddings
    assert embeddings.shape[-1] == 40
    assert embeddings[..., :32].all()
    assert not embeddings[..., 32:].any()


def test_gradient_reaches_every_weight(tiny: TextConditioner) -> None:
    condition = tiny(list(CAPTIONS))
    (condition.embeddings.square().mean() + condition.pooled.square().mean()).backward()
    without = [
        name
        for name, parameter in tiny.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # Softmax does not see a shift of all keys.
    assert all(name.endswith("k_proj.bias") for name in without)


def drop_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights["text_model.final_layer_norm.bias"]


def add_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["text_model.extra.weight"] = torch.zeros(1)


def resize_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["text_projection.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_weight, r"missing \['text_model.final_layer_norm.bias'\]"),
        (add_weight, r"unexpected \['text_model.extra.weight'\]"),
        (resize_weight, r"mismatched \['text_projection.weight'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tiny: TextConditioner,
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    tiny.save_pretrained(tmp_path)
    edit_weights(tmp_path / "text_encoder_2" / "model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        TextConditioner.from_pretrained(tmp_path, use_t5=False)


def test_old_position_buffers_are_accepted(tiny: TextConditioner, tmp_path: Path) -> None:
    def add_positions(weights: dict[str, torch.Tensor]) -> None:
        weights["text_model.embeddings.position_ids"] = torch.arange(MAX_LENGTH)[None]

    tiny.save_pretrained(tmp_path)
    edit_weights(tmp_path / "text_encoder" / "model.safetensors", add_positions)
    loaded = TextConditioner.from_pretrained(tmp_path, use_t5=False)
    assert_equal(loaded(MIXED), tiny(MIXED))


def test_missing_parts_are_named(tiny: TextConditioner, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no text_encoder_3 \(T5\); pass use_t5=False"):
        TextConditioner.from_pretrained(tmp_path, use_t5=True)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="vocabulary file is missing"):
        TextConditioner.from_pretrained(tmp_path, use_t5=False)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load text_encoder of"):
        TextConditioner.from_pretrained(tmp_path, use_t5=False)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="cannot load text_encoder of"):
        TextConditioner.from_pretrained(tmp_path, use_t5=False)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"joint_dim": 32}', '{"joint_dim": 32, "t5_length": "0"}']
)
def test_malformed_config_is_refused(tiny: TextConditioner, tmp_path: Path, text: str) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / "text_conditioner.json").write_text(text)
    with pytest.raises(ValueError, match=r"text_conditioner\.json"):
        TextConditioner.from_pretrained(tmp_path, use_t5=False)


def test_original_directory_needs_from_sd3(sd3_directory: Path) -> None:
    with pytest.raises(ValueError, match="from_sd3"):
        TextConditioner.from_pretrained(sd3_directory, use_t5=False)


def test_parts_that_do_not_fit_are_refused(tiny: TextConditioner) -> None:
    encoders, tokenizers = list(tiny.text_encoders), tiny.tokenizers
    short = train_clip_tokenizer(CAPTIONS, vocab_size=560, max_length=8)
    long = train_clip_tokenizer(CAPTIONS, vocab_size=560, max_length=99)
    small = train_clip_tokenizer(CAPTIONS, vocab_size=540, max_length=MAX_LENGTH)
    cases: list[tuple[list[PreTrainedTokenizerBase], int, int, str]] = [
        (tokenizers[:1], 32, 0, "1 tokenizers and 2 encoders"),
        ([tokenizers[0], short], 32, 0, "one model_max_length"),
        ([long, long], 32, 0, "16 positions"),
        ([small, small], 32, 0, "540 tokens"),
        (tokenizers, 31, 0, "joint_dim=31"),
        (tokenizers, 32, -1, "t5_length"),
    ]
    for given_tokenizers, joint_dim, t5_length, message in cases:
        with pytest.raises(ValueError, match=message):
            TextConditioner(
                tokenizers=given_tokenizers,
                text_encoders=encoders,
                joint_dim=joint_dim,
                t5_length=t5_length,
            )


@pytest.mark.parametrize(("joint_dim", "t5_length"), [(JOINT_DIM, 0), (JOINT_DIM + 1, 4)])
def test_t5_that_does_not_fit_is_refused(joint_dim: int, t5_length: int) -> None:
    pipeline = tiny_sd3_pipeline(with_t5=True)
    with pytest.raises(ValueError, match="T5"):
        TextConditioner(
            tokenizers=[pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3],
            text_encoders=[
                pipeline.text_encoder,
                pipeline.text_encoder_2,
                pipeline.text_encoder_3,
            ],
            joint_dim=joint_dim,
            t5_length=t5_length,
        )


@pytest.mark.parametrize("captions", ["a dog", []])
def test_captions_must_be_a_filled_list(tiny: TextConditioner, captions: list[str]) -> None:
    with pytest.raises(ValueError, match="captions must"):
        tiny(captions)


def test_tokenizer_training_is_deterministic_and_fills_the_vocabulary() -> None:
    first = train_clip_tokenizer(CAPTIONS, vocab_size=560, max_length=MAX_LENGTH)
    second = train_clip_tokenizer(CAPTIONS, vocab_size=560, max_length=MAX_LENGTH)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 560
    assert first.eos_token_id == first.pad_token_id == 559
    assert len(first("a dog runs").input_ids) < len(first("xq zvj wkxz").input_ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20))
def test_no_text_is_unknown(text: str) -> None:
    # An unknown token would be the end token, at which CLIP pools.
    tokenizer = tiny_clip_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = tiny_clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    options = {"padding": "max_length", "truncation": True}
    assert loaded(MIXED, **options).input_ids == tokenizer(MIXED, **options).input_ids
    assert loaded.model_max_length == MAX_LENGTH
    assert loaded("A DOG").input_ids == tokenizer("a dog").input_ids


def test_original_tokenizer_files_are_read(sd3_directory: Path, tmp_path: Path) -> None:
    # SD3's repository holds vocab.json and merges.txt, and pads one tokenizer with "!".
    directory = shutil.copytree(sd3_directory, tmp_path / "sd3")
    folder = directory / "tokenizer_2"
    model = json.loads((folder / "tokenizer.json").read_text())
    vocab = model["model"]["vocab"]
    merges = [" ".join(pair) for pair in model["model"]["merges"]]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    config = {"model_max_length": MAX_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_sd3(directory, use_t5=False).tokenizers[1]
    reference = tiny_clip_tokenizer()
    ids = tokenizer(["a dog"], padding="max_length").input_ids[0]
    expected = reference("a dog").input_ids
    assert ids == expected + [vocab["!"]] * (MAX_LENGTH - len(expected))


@pytest.mark.parametrize(("vocab_size", "max_length"), [(513, 16), (600, 1)])
def test_tokenizer_options_are_checked(vocab_size: int, max_length: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        train_clip_tokenizer(CAPTIONS, vocab_size=vocab_size, max_length=max_length)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads=3 must divide"):
        tiny_text_conditioner(tokenizer=tiny_clip_tokenizer(), hidden_size=16, layers=1, heads=3)
