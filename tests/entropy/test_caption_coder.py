from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from percov2.bitstream import BitstreamError
from percov2.entropy.caption_coder import MAX_CAPTION_BYTES, MODEL_FILE, CaptionCoder
from percov2.entropy.caption_ngrams import DISCOUNT_UNIT, ONE, NgramModel
from percov2.entropy.caption_text import cut, first_lower, first_upper
from percov2.entropy.caption_words import (
    CONTEXT_TOKENS,
    END,
    Predictor,
    WordModel,
    pack_pieces,
    unpack_pieces,
)
from percov2.entropy.range_coder import TOTAL, RangeDecoder, RangeEncoder

# The model file and the coding are part of the format: these values may change only together with
# the version of the format, and the old file then stays for old streams.
MODEL_SHA256 = "01495720048e066529310fa6522c95d111f4b6ef01b94974dbf24ca9b818c36c"
GOLDEN = {
    "a red bicycle leaning against a brick wall": "1825bddaed",
    "A man in a blue shirt is standing on a ladder.": "e7eb7a3858",
    "Two dogs play with a Frisbee, one of them jumps": "b3fcbccae002",
    "a Kookaburra on a gum tree": "0059ca14ead98661fe04dff30709",
    "Grüße \U0001f415": "49a9e6c9a6ae99727fce5b95c2e2706d2a",
    "  \n\x00": "003a1b77efd8d324e0",
}

repeatable = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def coder() -> CaptionCoder:
    return CaptionCoder.shipped()


def coded(coder: CaptionCoder, text: str) -> bytes:
    encoder = RangeEncoder()
    coder.encode(text, encoder)
    return encoder.finish()


def decoded(coder: CaptionCoder, data: bytes) -> str:
    return coder.decode(RangeDecoder(data))


def test_the_model_file_is_that_of_the_format() -> None:
    data = MODEL_FILE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == MODEL_SHA256
    assert len(data) < 3_000_000


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_captions(coder: CaptionCoder, text: str) -> None:
    assert coded(coder, text).hex() == GOLDEN[text]
    assert decoded(coder, bytes.fromhex(GOLDEN[text])) == text


@repeatable
@given(st.text(min_size=1, max_size=60), st.text(max_size=3))
@example(".", "")
@example("..", ".")
@example(" ", " ")
@example("\n", "\0")
@example("A", "Dog")
@example("a dog", " \u2063\U0001f600\U0001f3fd")
@example("Étang ÉTÉ ß", "İ ŉ ǆ")
def test_any_text_round_trips(coder: CaptionCoder, text: str, tail: str) -> None:
    text = f"{text} a Red DOG's zyx-{tail}"
    assert decoded(coder, coded(coder, text)) == text


@repeatable
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.text(min_size=1, max_size=12),
    st.lists(st.integers(0, 9), max_size=4),
)
def test_neighbours_in_the_payload_are_left_alone(
    coder: CaptionCoder, before: list[int], text: str, after: list[int]
) -> None:
    encoder = RangeEncoder()
    encoder.encode_uniform(np.array(before, np.int32), 10)
    coder.encode(text, encoder)
    encoder.encode_uniform(np.array(after, np.int32), 10)
    decoder = RangeDecoder(encoder.finish())
    assert decoder.decode_uniform(len(before), 10).tolist() == before
    assert coder.decode(decoder) == text
    assert decoder.decode_uniform(len(after), 10).tolist() == after


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.binary(max_size=80))
@example(b"")
@example(b"\0" * 5000)
@example(b"\xff" * 5000)
def test_garbage_decodes_or_is_refused(coder: CaptionCoder, data: bytes) -> None:
    try:
        text = decoded(coder, data)
    except BitstreamError:
        return
    assert 0 < len(text.encode("utf-8")) <= MAX_CAPTION_BYTES


def written(coder: CaptionCoder, *symbols: tuple[int, np.ndarray]) -> bytes:
    encoder = RangeEncoder()
    for symbol, frequencies in symbols:
        encoder.encode(np.array([symbol], np.int32), frequencies[None])
    return encoder.finish()


def test_a_caption_without_a_piece_is_refused(coder: CaptionCoder) -> None:
    model = coder._model
    data = written(coder, (0, model.styles), (END, Predictor(model).frequencies()))
    with pytest.raises(BitstreamError, match="no space before its first word"):
        decoded(coder, data)


def test_a_caption_without_an_end_is_refused(coder: CaptionCoder) -> None:
    predictor, symbols = Predictor(coder._model), [(0, coder._model.styles)]
    token = coder._model.token_of[" a"]
    for _ in range(1100):
        symbols.append((token, predictor.frequencies()))
        predictor.push(token)
    with pytest.raises(BitstreamError, match="it has no end"):
        decoded(coder, written(coder, *symbols))


@pytest.mark.parametrize("text", ["x" * (MAX_CAPTION_BYTES + 1), "\u20ac" * 1366])
def test_too_long_is_refused(coder: CaptionCoder, text: str) -> None:
    with pytest.raises(ValueError, match="shorten it to at most 4096"):
        coder.bits(text)


def test_unpaired_surrogate_is_refused(coder: CaptionCoder) -> None:
    with pytest.raises(ValueError, match=r"unpaired surrogate U\+D83D at character 2"):
        coder.encode("ab\ud83d", RangeEncoder())


def test_the_empty_caption_is_refused(coder: CaptionCoder) -> None:
    with pytest.raises(ValueError, match="caption is empty"):
        coder.encode("", RangeEncoder())


def random_text(letters: str, size: int) -> str:
    source = random.Random(0)
    text = "".join(source.choice(letters) for _ in range(size))
    return text.encode("utf-8")[:size].decode("utf-8", errors="ignore")


@pytest.mark.parametrize(
    "letters",
    [
        "".join(map(chr, range(128))),
        "".join(map(chr, range(33, 127))),
        "".join(map(chr, range(0x1F600, 0x1F640))),
        "x",
        "\u20ac",
        "a ",
        ".,",
    ],
    ids=["ascii", "signs", "emoji", "x", "euro", "words", "stops"],
)
def test_long_texts_cost_at_most_a_seventh_more_than_their_bytes(
    coder: CaptionCoder, letters: str
) -> None:
    text = random_text(letters, MAX_CAPTION_BYTES)
    data = coded(coder, text)
    assert len(data) <= 1.15 * len(text.encode("utf-8"))
    assert decoded(coder, data) == text


def test_bits_are_what_is_written(coder: CaptionCoder) -> None:
    for text in GOLDEN:
        ideal = coder.bits(text)
        assert ideal / 8 - 1 < len(coded(coder, text)) < ideal / 8 + 2


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("A man in a red shirt is riding a bike", 8),
        ("a man in a red shirt is riding a bike", 9),  # the case of the first letter
        ("A man in a red shirt is riding a bike.", 9),  # the full stop
        ("A man in a Red shirt is riding a bike", 11),  # a capital within
        ("A man in a red shirt is riding a bkie", 15),  # an unknown word
    ],
)
def test_style_and_surprises_are_cheap(coder: CaptionCoder, text: str, most: int) -> None:
    assert len(coded(coder, text)) <= most
    assert decoded(coder, coded(coder, text)) == text


def test_rows_are_frequencies(coder: CaptionCoder) -> None:
    predictor = Predictor(coder._model)
    for token in [2, 1, 5, 4000, *[3] * CONTEXT_TOKENS]:
        row = predictor.frequencies()
        assert row.dtype == np.int64
        assert row.min() >= 1
        assert row.sum() == TOTAL
        predictor.push(token)
    assert row is coder._model.plain


def test_the_model_knows_grammar(coder: CaptionCoder) -> None:
    model: WordModel = coder._model
    predictor = Predictor(model)
    for word in (" two", " dogs"):
        predictor.push(model.token_of[word])
    row = predictor.frequencies()
    assert row[model.token_of[" are"]] > 20 * row[model.token_of[" is"]]


@given(st.text())
def test_cut_pieces_join(text: str) -> None:
    assert "".join(cut(text)) == text


def test_words_take_their_space_along() -> None:
    assert cut(" a dog's T-shirt, 12x  été!") == [
        " a", " dog's", " T-shirt", ",", " 12", "x", " ", " été", "!",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("upper", "lower"),
    [(" Ab", " ab"), ("Ab", "ab"), ("  Ab", "  Ab"), (" É", " É"), (" ", " "), ("", "")],
)
def test_only_ascii_changes_case(upper: str, lower: str) -> None:
    assert first_lower(upper) == lower
    assert first_upper(lower) == upper


def test_pieces_are_stored(coder: CaptionCoder) -> None:
    pieces = [" a", "\n", " é" * 80, "."]
    assert unpack_pieces(pack_pieces(pieces)) == pieces


def test_kneser_ney_by_hand() -> None:
    # Three tokens; 1 was seen after two others, 2 after one. After 1 came 1 once and 2 three times.
    tables = {
        "discounts": np.array([[0, 0, 0], [128, 192, 256]], np.uint16),
        "tokens.1": np.array([1, 2], np.uint16),
        "counts.1": np.array([2, 1], np.uint16),
        "children.1": np.array([2, 0], np.uint16),
        "tokens.2": np.array([1, 2], np.uint16),
        "counts.2": np.array([1, 3], np.uint16),
    }
    assert DISCOUNT_UNIT == 256
    model = NgramModel(tables, vocabulary=3)
    plain, known = np.array([0, 2 / 3, 1 / 3]), np.array([0, 0.5 / 4, 2 / 4])
    assert model.distribution([2])[0] / ONE == pytest.approx(plain, abs=1e-6)
    weights, bucket = model.distribution([2, 1])
    assert weights / ONE == pytest.approx(known + 1.5 / 4 * plain, abs=1e-6)
    assert bucket > model.distribution([2])[1]
