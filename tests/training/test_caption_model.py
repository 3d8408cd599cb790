from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.entropy.caption_coder import CaptionCoder
from percov2.entropy.caption_network import RecurrentModel
from percov2.entropy.caption_ngrams import ONE, NgramModel
from percov2.entropy.range_coder import RangeDecoder, RangeEncoder
from percov2.training import caption_model
from percov2.training.caption_model import Vocabulary, count_ngrams, held_out, split


def some_captions(count: int) -> list[str]:
    source = random.Random(0)
    captions = []
    for index in range(count):
        who, what = source.choice(["dog", "cat", "man"]), source.choice(["runs", "sits", "sleeps"])
        captions.append(f"A {who} {what} by the {source.choice(['sea', 'road'])} {index}")
    return captions


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("captions")
    captions = directory / "captions.txt"
    captions.write_text("\n".join(some_captions(400)) + "\n", encoding="utf-8")
    for name in ("first", "second"):
        arguments = ["--captions", str(captions), "--output", str(directory / name)]
        caption_model.main([*arguments, "--epochs", "2"])
    return directory / "first"


def test_the_same_captions_give_the_same_file(model_file: Path) -> None:
    assert model_file.read_bytes() == model_file.with_name("second").read_bytes()


@pytest.mark.parametrize("text", ["A man sits by the sea 7", "un été\n\U0001f600 Dog.", "\0"])
def test_a_trained_model_codes_any_text(model_file: Path, text: str) -> None:
    coder = CaptionCoder.load(model_file)
    encoder = RangeEncoder()
    coder.encode(text, encoder)
    assert coder.decode(RangeDecoder(encoder.finish())) == text


def test_a_trained_model_is_better_than_chance(model_file: Path) -> None:
    coder = CaptionCoder.load(model_file)
    # Three choices of 3, 3, 2; the rest is fixed, but for the number at the end.
    assert coder.bits("A cat runs by the road 7") < 40
    assert coder.bits("sea the by dog A dog runs") > 45


def test_held_out_captions_are_not_looked_at() -> None:
    captions = [f"a dog number{index}" for index in range(200)]
    training, tuning = split(captions)
    assert not set(held_out(captions)) & {*training, *tuning}
    assert len(held_out(captions)) + len(training) + len(tuning) == len(captions)
    assert len(held_out(captions)) == 10
    assert len(tuning) == 5


def test_too_few_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="only 3 captions: give more"):
        caption_model.train(["a dog", "a cat", "a man"])
    with pytest.raises(ValueError, match="only 2 different words: give more captions"):
        Vocabulary([[" a", " dog"]] * 3)


def test_counts_by_hand() -> None:
    # 0 2 3 0 and 0 2 2 3 0: what each lower count counts is the different tokens before.
    tables = count_ngrams([[2, 3, 0], [2, 2, 3, 0], [2, 3, 0]], order=3, vocabulary=4)
    assert tables["tokens.1"].tolist() == [0, 2, 3]
    assert tables["counts.1"].tolist() == [1, 2, 1]
    assert tables["children.1"].tolist() == [1, 2, 1]
    assert tables["tokens.2"].tolist() == [2, 2, 3, 0]
    assert tables["counts.2"].tolist() == [3, 1, 2, 1]  # after 0 nothing stands: counted in full
    # 2 3 was followed by 0 three times, 0 2 by 2 once and 3 twice; after 2 2 came 3 once: left out.
    assert tables["tokens.3"].tolist() == [2, 3, 0]
    assert tables["counts.3"].tolist() == [1, 2, 3]
    assert tables["children.2"].tolist() == [2, 0, 1, 0]


def test_distributions_of_counts_sum_to_one() -> None:
    source = random.Random(1)
    sequences = [[source.randint(1, 20) for _ in range(9)] + [0] for _ in range(200)]
    model = NgramModel(count_ngrams(sequences, order=4, vocabulary=21), vocabulary=21)
    for sequence in sequences[:20]:
        weights, bucket = model.distribution(sequence[:5])
        assert weights.sum() == pytest.approx(ONE, abs=1000)
        assert weights.min() > 0
        assert 0 <= bucket < model.buckets


def test_the_integer_network_follows_the_float_one() -> None:
    torch.manual_seed(3)
    network = caption_model._Network(50)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    rounded = RecurrentModel(caption_model.round_network(weights))
    tokens = [0, 7, 1, 49, 30, 2, 2, 11]
    with torch.no_grad():
        states, _ = network.gru(network.embedding[torch.tensor([tokens])])
        logits = network.projection(states) @ network.embedding.T + network.bias
        expected = torch.softmax(logits[0, -1], 0).numpy()
    state = rounded.start()
    for token in tokens:
        state = rounded.step(state, token)
    found = rounded.distribution(state) / ONE
    assert np.abs(np.log(found / expected)).max() < 0.05
    assert np.log(expected).std() > 0.2
