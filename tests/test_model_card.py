"""The card of a model: complete, readable by the hub's own parser, never in the way of yours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from percov2.inspection import GENERATED_NOTE
from percov2.model_card import CARD_NAME, NOTICE_NAME, carry_texts, write_model_card
from percov2.model_store import PRESETS_DIRECTORY, ModelSummary


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a card is made from: the index and the quantiser's configuration of `tiny`."""
    preset, folder = PRESETS_DIRECTORY / "tiny", tmp_path / "model"
    (folder / "quantizer").mkdir(parents=True)
    for name in ("model_index.json", "quantizer/config.json"):
        shutil.copyfile(preset / name, folder / name)
    return folder


def test_the_hub_reads_the_front_matter(directory: Path) -> None:
    card = ModelCard.load(write_model_card(directory, model="me/tiny", licence="cc-by-4.0"))
    assert card.data.library_name == "percov2"
    assert card.data.license == "cc-by-4.0"
    assert {"percov2", "image-compression"} <= set(card.data.tags)


def test_a_card_says_what_a_user_needs(directory: Path) -> None:
    text = write_model_card(directory, model="me/tiny").read_text(encoding="utf-8")
    summary = ModelSummary.read(directory)
    # 1,024 codes are 10 bits per 16x16 pixels.
    for fact in (f"{summary.model_id:#06x}", "`quincunx`", "0.0391 bpp", "10 bits", "16x16"):
        assert fact in text
    assert "# tiny\n" in text
    assert "--model me/tiny" in text
    assert "percov2.load('me/tiny')" in text
    assert GENERATED_NOTE in text


def test_weights_without_a_named_licence_say_so(directory: Path) -> None:
    path = write_model_card(directory, model="me/tiny")
    assert ModelCard.load(path).data.license == "unknown"
    assert "No licence has been named" in path.read_text(encoding="utf-8")


def test_a_notice_decides_the_licence_and_is_quoted(directory: Path) -> None:
    (directory / NOTICE_NAME).write_text("vae: the autoencoder, rounded.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"licence is 'mit', but .*NOTICE"):
        write_model_card(directory, model="me/sd3", licence="mit")
    card = ModelCard.load(write_model_card(directory, model="me/sd3"))
    assert card.data.license == "other"
    assert card.data.license_name == "stabilityai-ai-community"
    assert "Powered by Stability AI" in card.text
    assert "vae: the autoencoder, rounded." in card.text


def test_a_card_that_is_there_stays(directory: Path) -> None:
    (directory / CARD_NAME).write_text("mine", encoding="utf-8")
    assert write_model_card(directory, model="me/tiny").read_text(encoding="utf-8") == "mine"


def test_texts_go_along_and_replace_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
        (folder / CARD_NAME).write_text(folder.name, encoding="utf-8")
    (source / NOTICE_NAME).write_text("notice", encoding="utf-8")
    carry_texts(source, target)
    assert (target / NOTICE_NAME).read_text(encoding="utf-8") == "notice"
    assert (target / CARD_NAME).read_text(encoding="utf-8") == "target"


def test_an_incomplete_directory_is_refused(directory: Path) -> None:
    (directory / "quantizer" / "config.json").unlink()
    with pytest.raises(ValueError, match="no complete model directory"):
        write_model_card(directory, model="me/tiny")
    assert not (directory / CARD_NAME).exists()
