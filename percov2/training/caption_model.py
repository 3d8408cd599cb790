"""Trains the caption model that `percov2.entropy.caption_coder` codes with.

``python -m percov2.training.caption_model --captions FILE --output FILE`` reads captions, one a
line, and writes the model file. Every `HELD_OUT`-th line, the first included, is left out, so that
figures on those lines are honest. Another part, for tuning, is left out of the network's training
and decides how n-grams and network are mixed.

The same captions give the same file, with the same version of torch on the same kind of processor.
The package ships one such file as part of its format; another file is another format.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.entropy.caption_network import (
    FEATURE_BITS,
    GATE_BITS,
    LOGIT_BITS,
    STATE_BITS,
    TABLE_BITS,
    RecurrentModel,
)
from percov2.entropy.caption_ngrams import DISCOUNT_UNIT, NgramModel
from percov2.entropy.caption_text import cut, first_lower
from percov2.entropy.caption_words import (
    END,
    FIRST_WORD,
    LETTERS,
    MIX_UNIT,
    RARE,
    SPELLING_CONTEXT,
    Kind,
    group,
    pack_pieces,
)

HELD_OUT = 20
WORD_ORDER = 4
EPOCHS = 9

Tables = dict[str, NDArray[Any]]

_WIDTH = 64  # of the embedding
_HIDDEN = 128
_BATCH = 64  # captions
_DROPOUT = 0.2
_PEAK_RATE = 0.005
_FREQUENT = 384  # words that take part in every sampled softmax
_SAMPLED = 256
_LONGEST_PIECE = 64
# Before a caption is seen: automatic captioners write lower case and no full stop, people vary.
# Order: lower case, capital, each without a stop; the same with a stop.
_STYLE_PRIOR = (0.5, 0.2, 0.1, 0.2)


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one a line; empty lines are left out."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def held_out(captions: Sequence[str]) -> list[str]:
    """The captions that no part of the model is trained on."""
    return list(captions[::HELD_OUT])


def split(captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """The captions to train on and those to tune with."""
    training, tuning = [], []
    for index, caption in enumerate(captions):
        if index % (2 * HELD_OUT) == HELD_OUT // 2:
            tuning.append(caption)
        elif index % HELD_OUT:
            training.append(caption)
    return training, tuning


def style_and_pieces(caption: str) -> tuple[int, list[str]]:
    """The style's number and the pieces, as the coder takes a caption apart."""
    body = " " + caption
    style = int(first_lower(body) != body)
    if len(caption) > 1 and caption.endswith("."):
        style |= 2
        body = body[:-1]
    return style, cut(first_lower(body))


class Vocabulary:
    """The pieces seen at least twice, by falling count, and those seen once.

    Raises:
        ValueError: The captions hold too few different words.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        counts = Counter(piece for pieces in captions for piece in pieces)
        pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
        pieces = [piece for piece in pieces if len(piece.encode("utf-8")) <= _LONGEST_PIECE]
        self.words = [piece for piece in pieces if counts[piece] > 1]
        self.listed = [piece for piece in pieces if counts[piece] == 1]
        self.size = FIRST_WORD + len(self.words)
        if len(self.listed) < 2 or self.size <= 3:
            raise ValueError(f"only {len(counts)} different words: give more captions")
        self._token_of = {word: FIRST_WORD + index for index, word in enumerate(self.words)}

    def tokens(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of a caption, with its end."""
        return [self._token_of.get(piece, RARE) for piece in pieces] + [END]


def count_ngrams(sequences: Sequence[Sequence[int]], *, order: int, vocabulary: int) -> Tables:
    """Kneser-Ney's counts for `percov2.entropy.caption_ngrams.NgramModel`.

    What follows a context of the highest order that was seen once is left out: it says little
    and would be half of the file.

    Args:
        sequences: Tokens, each with its `END`; one more `END` is put before the first.
        order: Highest order.
        vocabulary: Number of tokens.
    """
    bits = (vocabulary - 1).bit_length()
    grams: list[Counter[int]] = [Counter() for _ in range(order + 1)]
    for sequence in sequences:
        padded = [END, *sequence]
        for size in range(2, order + 1):
            # Shorter n-grams than the highest order count in full only at the beginning.
            last = len(padded) - size + 1 if size == order else 1
            for start in range(min(last, len(padded) - size + 1)):
                code = 0
                for token in padded[start : start + size]:
                    code = code << bits | token
                grams[size][code] += 1
    for size in range(order - 1, 0, -1):
        mask = (1 << bits * size) - 1
        grams[size].update(code & mask for code in grams[size + 1])
    tables: Tables = {}
    discounts = []
    codes = [np.array(sorted(level), np.int64) for level in grams]
    for size in range(1, order + 1):
        counts = np.array([grams[size][code] for code in codes[size].tolist()])
        discounts.append(_discounts(counts))
        if size == order:
            _, context = np.unique(codes[size] >> bits, return_inverse=True)
            kept = np.bincount(context, counts)[context] > 1
            codes[size], counts = codes[size][kept], counts[kept]
        tables[f"tokens.{size}"] = (codes[size] & ((1 << bits) - 1)).astype(np.uint16)
        tables[f"counts.{size}"] = np.minimum(counts, 0xFFFF).astype(np.uint16)
    for size in range(1, order):
        parents = np.searchsorted(codes[size], codes[size + 1] >> bits)
        children = np.bincount(parents, minlength=len(codes[size]))
        tables[f"children.{size}"] = children.astype(np.uint16)
    return tables | {"discounts": np.array(discounts, np.uint16)}


def _discounts(counts: NDArray[np.int64]) -> list[int]:
    """Chen and Goodman's three discounts; between 0.1 and 0.95 of the count they belong to."""
    one, two, three, four = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    share = one / max(one + 2 * two, 1)
    pairs = ((1, one, two), (2, two, three), (3, three, four))
    ideal = [count - (count + 1) * share * above / max(own, 1) for count, own, above in pairs]
    return [
        round(DISCOUNT_UNIT * min(max(value, 0.1), 0.95 * count))
        for count, value in enumerate(ideal, 1)
    ]


class _Network(nn.Module):
    """The float form of `percov2.entropy.caption_network.RecurrentModel`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, _WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.gru = nn.GRU(_WIDTH, _HIDDEN, batch_first=True)
        self.projection = nn.Linear(_HIDDEN, _WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (B, T, `_WIDTH`) that predict what follows tokens (B, T)."""
        inputs = F.dropout(self.embedding[tokens], _DROPOUT)
        states, _ = self.gru(inputs)
        features: Tensor = self.projection(F.dropout(states, _DROPOUT))
        return features

    def sampled_loss(self, features: Tensor, targets: Tensor, random: torch.Generator) -> Tensor:
        """Mean nats of targets (N,) with a sampled softmax.

        The frequent words are all in the sum; a sample of the others stands for the rest.
        """
        vocabulary = len(self.bias)
        frequent = min(_FREQUENT, vocabulary - 1)
        sampled = torch.randint(vocabulary - frequent, (_SAMPLED,), generator=random) + frequent
        rivals = torch.cat([torch.arange(frequent), sampled])
        logits = features @ self.embedding[rivals].T + self.bias[rivals]
        own = (features * self.embedding[targets]).sum(1) + self.bias[targets]
        correction = torch.zeros(len(rivals))
        correction[frequent:] = math.log((vocabulary - frequent) / _SAMPLED)
        logits = (logits + correction).masked_fill(rivals[None] == targets[:, None], -1e9)
        return (torch.logaddexp(torch.logsumexp(logits, 1), own) - own).mean()


def _batches(sequences: Sequence[list[int]], random: torch.Generator) -> Iterator[Tensor]:
    """Targets (B, T), padded with -1; captions of like length together, in random order."""
    order = torch.randperm(len(sequences), generator=random).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), 20 * _BATCH):
        pool = sorted(order[start : start + 20 * _BATCH], key=lambda index: len(sequences[index]))
        batches += [pool[first : first + _BATCH] for first in range(0, len(pool), _BATCH)]
    for number in torch.randperm(len(batches), generator=random).tolist():
        chosen = [torch.tensor(sequences[index]) for index in batches[number]]
        yield nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1)


def train_network(sequences: Sequence[list[int]], *, vocabulary: int, epochs: int) -> Tables:
    """Train the recurrent network and round its weights.

    Returns:
        Tables of `percov2.entropy.caption_network.RecurrentModel`.
    """
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Network(vocabulary)
        optimiser = torch.optim.Adam(network.parameters(), _PEAK_RATE)
        steps = epochs * math.ceil(len(sequences) / _BATCH)
        step = 0
        for epoch in range(epochs):
            nats = []
            for targets in _batches(sequences, random):
                warm, left = min(1, (step + 1) / 100), max(0.02, 1 - step / steps)
                optimiser.param_groups[0]["lr"] = _PEAK_RATE * warm * left
                inputs = F.pad(targets[:, :-1].clamp(min=0), (1, 0), value=END)
                known = targets >= 0
                loss = network.sampled_loss(network(inputs)[known], targets[known], random)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                step += 1
                nats.append(loss.item())
            mean = sum(nats) / len(nats) / math.log(2)
            print(f"epoch {epoch + 1} of {epochs}: {mean:.3f} bits a token", flush=True)
    return round_network({key: value.numpy() for key, value in network.state_dict().items()})


def round_network(weights: Tables) -> Tables:
    """Integer tables of a network's float weights, and the tables of its functions."""
    columns = np.abs(weights["embedding"]).max(0) / 127
    incoming, places_in = _round(weights["gru.weight_ih_l0"] * columns)
    recurrent, places_state = _round(weights["gru.weight_hh_l0"])
    projection, places_out = _round(weights["projection.weight"] * columns[:, None])

    def fixed(values: NDArray[Any], places: int) -> NDArray[np.int32]:
        scaled: NDArray[np.int32] = np.rint(values * 2.0**places).astype(np.int32)
        return scaled

    span = 8 << TABLE_BITS
    arguments = (np.arange(-span, span) + 0.5) / (1 << TABLE_BITS)
    return {
        "embedding": np.rint(weights["embedding"] / columns).astype(np.int8),
        "input": incoming,
        "input_bias": fixed(weights["gru.bias_ih_l0"], GATE_BITS),
        "recurrent": recurrent,
        "recurrent_bias": fixed(weights["gru.bias_hh_l0"], GATE_BITS),
        "projection": projection,
        "projection_bias": fixed(weights["projection.bias"] * columns, FEATURE_BITS),
        "output_bias": fixed(weights["bias"], LOGIT_BITS),
        "places": np.array([places_in, places_state, places_out], np.uint8),
        "sigmoid": fixed(1 / (1 + np.exp(-arguments)), STATE_BITS),
        "exponential": fixed(np.exp(-np.arange(16 << LOGIT_BITS) / (1 << LOGIT_BITS)), 24),
    }


def _round(weights: NDArray[Any]) -> tuple[NDArray[np.int16], int]:
    """16-bit integers and their binary places."""
    places = int(np.floor(np.log2(32767 / np.abs(weights).max())))
    return np.rint(weights * 2.0**places).astype(np.int16), places


def mixing_shares(
    ngrams: NgramModel, network: RecurrentModel, sequences: Sequence[Sequence[int]]
) -> NDArray[np.uint16]:
    """Share of the n-grams for each kind of context, by expectation maximisation."""
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(ngrams.buckets)]
    for sequence in sequences:
        context, state = [END], network.step(network.start(), END)
        for token in sequence:
            counted, bucket = ngrams.distribution(context)
            learnt = network.distribution(state)
            pairs[bucket].append((int(counted[token]), int(learnt[token])))
            context.append(token)
            state = network.step(state, token)
    shares = []
    for found in pairs:
        # Five imaginary tokens that both predict alike keep a kind that is seldom seen near half.
        counted, learnt = np.array([*found, *[(1, 1)] * 5], np.float64).T
        share = 0.5
        for _ in range(50):
            share = float(np.mean(share * counted / (share * counted + (1 - share) * learnt)))
        shares.append(round(MIX_UNIT * min(max(share, 0.02), 0.98)))
    return np.array(shares, np.uint16)


def _kinds(vocabulary: Vocabulary, captions: Iterable[Sequence[str]]) -> NDArray[np.int64]:
    """How often each `Kind` is needed in captions that were not trained on, smoothed."""
    words, listed = set(vocabulary.words), set(vocabulary.listed)
    counts = np.ones(len(Kind), np.int64)
    for piece in (piece for pieces in captions for piece in pieces if piece not in words):
        if piece in listed:
            counts[Kind.LISTED] += 1
        elif first_lower(piece) in words:
            counts[Kind.CAPITALISED] += 1
        else:
            counts[Kind.SPELLED] += 1
    return counts


def train(captions: Sequence[str], *, epochs: int = EPOCHS) -> Tables:
    """Train on captions, but for the held-out ones.

    Returns:
        The tables of the model file.

    Raises:
        ValueError: There are too few captions.
    """
    training, tuning = split(captions)
    if not tuning:
        raise ValueError(f"only {len(captions)} captions: give more")
    styles = np.bincount([style_and_pieces(text)[0] for text in [*training, *tuning]], minlength=4)
    first = [style_and_pieces(caption)[1] for caption in training]
    second = [style_and_pieces(caption)[1] for caption in tuning]
    vocabulary = Vocabulary([*first, *second])
    sequences = [vocabulary.tokens(pieces) for pieces in first]
    unseen = [vocabulary.tokens(pieces) for pieces in second]

    def ngrams(chosen: Sequence[list[int]]) -> Tables:
        return count_ngrams(chosen, order=WORD_ORDER, vocabulary=vocabulary.size)

    network = train_network(sequences, vocabulary=vocabulary.size, epochs=epochs)
    partial = NgramModel(ngrams(sequences), vocabulary=vocabulary.size)
    shares = mixing_shares(partial, RecurrentModel(network), unseen)
    spellings = [
        [byte + 1 for byte in piece.encode("utf-8")] + [END]
        for piece in [*vocabulary.words, *vocabulary.listed]
    ]
    spelling = count_ngrams(spellings, order=SPELLING_CONTEXT + 1, vocabulary=LETTERS)
    prior = np.array(_STYLE_PRIOR)
    tables: Tables = {
        "words": pack_pieces(vocabulary.words),
        "listed": pack_pieces(vocabulary.listed),
        "styles": np.rint(1000 * (styles / styles.sum() + prior)).astype(np.uint16),
        "kinds": _kinds(Vocabulary(first), second).astype(np.uint16),
        "shares": shares,
    }
    parts = {"ngrams": ngrams([*sequences, *unseen]), "network": network, "spelling": spelling}
    for name, part in parts.items():
        tables |= {f"{name}/{key}": table for key, table in part.items()}
        assert group(tables, name).keys() == part.keys()
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the caption model.")
    parser.add_argument("--captions", type=Path, required=True, help="text, one caption a line")
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # several threads may sum in another order
    tables = train(read_captions(options.captions), epochs=options.epochs)
    options.output.write_bytes(save(tables))


if __name__ == "__main__":
    main()
