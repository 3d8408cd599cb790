from __future__ import annotations

import multiprocessing
from datetime import timedelta
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from percov2.analysis import vector_quantizer
from percov2.analysis.vector_quantizer import VectorQuantizer

CHANNELS, DIM = 6, 4
Array = NDArray[np.float64]


def make_quantizer(
    *, codebook_size: int = 8, decay: float = 0.9, revival_threshold: float = 0.0
) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer: VectorQuantizer = VectorQuantizer(
        feature_channels=CHANNELS,
        codebook_size=codebook_size,
        code_dim=DIM,
        decay=decay,
        revival_threshold=revival_threshold,
    )
    return quantizer


def make_features(seed: int, *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, 5, 7, generator=generator)


@torch.no_grad()
def unit_vectors(quantizer: VectorQuantizer, features: Tensor) -> Array:
    """(N, d) in the order of the flattened tokens."""
    projected = quantizer.project_in(features).double().movedim(1, -1).reshape(-1, DIM).numpy()
    norms: Array = np.linalg.norm(projected, axis=1, keepdims=True)
    return np.asarray(projected / norms)


def buffers(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in quantizer.named_buffers()}


@pytest.mark.parametrize("training", [False, True])
def test_similarity_is_what_tokens_are_chosen_by(training: bool) -> None:
    quantizer, features = make_quantizer().train(training), make_features(1)
    codebook = quantizer.codebook.clone()
    similarity = quantizer.similarity(features)
    assert torch.equal(quantizer.codebook, codebook), "only `forward` moves it"
    assert not similarity.requires_grad
    expected = unit_vectors(quantizer, features) @ codebook.double().numpy().T
    np.testing.assert_allclose(similarity.flatten(0, 2).numpy(), expected, atol=1e-6)
    assert torch.equal(similarity.argmax(-1), quantizer(features).tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer.similarity(features).dtype == torch.float32


@torch.no_grad()
def test_tokens_are_the_most_similar_codes() -> None:
    quantizer, features = make_quantizer().eval(), make_features(1)
    result = quantizer(features)
    similarity = unit_vectors(quantizer, features) @ quantizer.codebook.double().numpy().T
    assert result.tokens.shape == (2, 5, 7)
    assert result.tokens.dtype == torch.int64
    np.testing.assert_array_equal(result.tokens.flatten().numpy(), similarity.argmax(1))
    loss = 1 - similarity.max(1).mean()
    assert result.commitment_loss.item() == pytest.approx(loss, abs=1e-6)
    assert len(np.unique(result.tokens)) > 4


@torch.no_grad()
def test_tokens_alone_give_the_same_features() -> None:
    quantizer, features = make_quantizer().eval(), make_features(1)
    result = quantizer(features)
    assert result.features.shape == features.shape
    torch.testing.assert_close(quantizer.tokens_to_features(result.tokens), result.features)


def test_features_get_the_gradient_as_if_nothing_were_quantised() -> None:
    quantizer = make_quantizer().eval()
    weight = make_features(2)
    quantised, plain = (make_features(1).requires_grad_() for _ in range(2))
    (quantizer(quantised).features * weight).sum().backward()
    continuous = quantizer.project_out(F.normalize(quantizer.project_in(plain), dim=1))
    (continuous * weight).sum().backward()
    assert quantised.grad is not None
    assert quantised.grad.abs().sum() > 1
    torch.testing.assert_close(quantised.grad, plain.grad)


def test_features_that_are_not_finite_leave_the_codebook_alone() -> None:
    quantizer, features = make_quantizer().train(), make_features(1)
    quantizer(features)
    before = buffers(quantizer)
    features[0, 0, 0, 0] = torch.nan
    quantizer(features)
    for name, buffer in buffers(quantizer).items():
        assert torch.equal(buffer, before[name]), name
    quantizer(make_features(2))
    assert not torch.equal(quantizer.codebook, before["codebook"])


def test_tokens_that_were_chosen_otherwise_are_taken_instead_of_the_nearest() -> None:
    quantizer = make_quantizer(decay=0.8).train()
    features = make_features(1).requires_grad_()
    vectors, codebook = unit_vectors(quantizer, features), quantizer.codebook.double().numpy()
    tokens = torch.from_numpy((vectors @ codebook.T).argsort(1)[:, -2]).view(2, 5, 7)
    expected = quantizer.tokens_to_features(tokens)
    result = quantizer(features, tokens)
    assert torch.equal(result.tokens, tokens)
    torch.testing.assert_close(result.features, expected)
    taken = (vectors * codebook[tokens.flatten()]).sum(1)
    assert result.commitment_loss.item() == pytest.approx(1 - taken.mean(), abs=1e-6)
    result.features.sum().backward()
    assert features.grad is not None
    assert features.grad.count_nonzero() > 0
    one_hot = np.eye(8)[tokens.flatten()]
    sums = 0.8 * codebook + 0.2 * one_hot.T @ vectors
    np.testing.assert_allclose(quantizer.ema_sums.numpy(), sums, atol=1e-5)


def test_commitment_loss_pulls_vectors_to_their_codes() -> None:
    quantizer = make_quantizer().eval()
    features = make_features(1).requires_grad_()
    before = quantizer(features).commitment_loss
    before.backward()
    assert features.grad is not None
    assert features.grad.count_nonzero() > 0
    assert not quantizer.codebook.requires_grad
    with torch.no_grad():
        assert quantizer(features - 2 * features.grad).commitment_loss < before


def test_ema_update_equals_the_reference() -> None:
    quantizer = make_quantizer(decay=0.8).train()
    codebook = quantizer.codebook.double().numpy()
    counts, sums = np.ones(8), codebook.copy()
    for step in range(4):
        features = make_features(step)
        vectors = unit_vectors(quantizer, features)
        tokens = (vectors @ codebook.T).argmax(1)
        np.testing.assert_array_equal(quantizer(features).tokens.flatten().numpy(), tokens)
        one_hot = np.eye(8)[tokens]
        counts = 0.8 * counts + 0.2 * one_hot.sum(0)
        sums = 0.8 * sums + 0.2 * one_hot.T @ vectors
        codebook = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        np.testing.assert_allclose(quantizer.ema_counts.numpy(), counts, rtol=1e-5)
        np.testing.assert_allclose(quantizer.ema_sums.numpy(), sums, atol=1e-5)
        np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, atol=1e-5)
    assert quantizer.updates.item() == 4


def test_evaluation_leaves_every_buffer_alone() -> None:
    quantizer = make_quantizer(revival_threshold=0.5).eval()
    before = buffers(quantizer)
    quantizer(make_features(1))
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_dead_codes_are_revived_with_fresh_averages() -> None:
    quantizer = make_quantizer(revival_threshold=0.2).train()
    # 70 alike vectors: one code takes them all, the other seven fall below 0.2 * 70 / 8.
    features = torch.ones(1, CHANNELS, 10, 7) + 0.01 * torch.rand(1, CHANNELS, 10, 7)
    vectors = unit_vectors(quantizer, features)
    tokens = quantizer(features).tokens
    (living,) = tokens.unique().tolist()
    dead = [code for code in range(8) if code != living]
    assert quantizer.ema_counts[living].item() == pytest.approx(0.9 * 1 + 0.1 * 70)
    assert quantizer.ema_counts[dead].tolist() == [70 / 8] * 7
    distance = np.abs(quantizer.codebook[dead].numpy()[:, None] - vectors).max(-1)
    assert (distance.min(1) < 1e-6).all()
    assert len(set(distance.argmin(1).tolist())) > 1
    torch.testing.assert_close(quantizer.ema_sums[dead], quantizer.codebook[dead] * 70 / 8)
    # Those that the next batch leaves without a vector outlive it.
    revived = quantizer.codebook.clone()
    taken = quantizer(-features).tokens.unique().tolist()
    idle = [code for code in dead if code not in taken]
    assert len(idle) >= 6
    torch.testing.assert_close(quantizer.codebook[idle], revived[idle], atol=1e-6, rtol=0)


def test_revival_brings_the_whole_codebook_into_use() -> None:
    used = {}
    for threshold in (0.0, 0.3):
        quantizer = make_quantizer(codebook_size=64, revival_threshold=threshold).train()
        generator = torch.Generator().manual_seed(5)
        for _ in range(30):
            # Clustered: most random initial codes are far from every vector.
            features = torch.randn(4, CHANNELS, 8, 8, generator=generator) * 0.3 + 1
            tokens = quantizer(features).tokens
        used[threshold] = len(tokens.unique())
    assert used[0.0] < 32
    assert used[0.3] > 56


def test_codes_have_unit_norm() -> None:
    quantizer = make_quantizer(revival_threshold=0.3).train()
    for step in range(3):
        norms = quantizer.codebook.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(8), atol=1e-6, rtol=0)
        quantizer(make_features(step))


def test_similarity_is_float32_under_autocast() -> None:
    quantizer, features = make_quantizer().train(), make_features(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        codebook = quantizer.codebook.clone()
        projected = quantizer.project_in(features)
        result = quantizer(features)
    assert projected.dtype == result.features.dtype == torch.bfloat16
    assert result.commitment_loss.dtype == torch.float32
    similarity = torch.einsum("bdrc,vd->bvrc", F.normalize(projected.float(), dim=1), codebook)
    assert torch.equal(result.tokens, similarity.argmax(1))
    loss = (1 - similarity.amax(1)).mean()
    torch.testing.assert_close(result.commitment_loss, loss, atol=1e-6, rtol=0)
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("decay", "threshold"), [(0.0, 0.1), (1.0, 0.1), (0.9, 1.0), (0.9, -0.1)])
def test_settings_out_of_range_are_refused(decay: float, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        make_quantizer(decay=decay, revival_threshold=threshold)


@torch.no_grad()
def test_saved_quantizer_gives_equal_results(tmp_path: Path) -> None:
    quantizer = make_quantizer(revival_threshold=0.3).train()
    quantizer(make_features(0))
    quantizer.eval().save_pretrained(tmp_path)
    loaded = VectorQuantizer.from_pretrained(tmp_path)
    result, expected = loaded(make_features(1)), quantizer(make_features(1))
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.features, expected.features)
    assert loaded.updates.item() == 1


STEPS = 3


def features_of_rank(rank: int, step: int, *, collapsed: bool) -> Tensor:
    """Different data per rank; collapsed: rank 0's tokens are all the same code."""
    if collapsed and rank == 0:
        return torch.ones(2, CHANNELS, 5, 7)
    return make_features(100 * rank + step)


def train_on_rank(rank: int, directory: str) -> None:
    """One of two gloo processes: train, then write every buffer."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for collapsed in (False, True):
        quantizer = make_quantizer(revival_threshold=0.5 if collapsed else 0.0).train()
        for step in range(STEPS):
            quantizer(features_of_rank(rank, step, collapsed=collapsed))
        arrays = {name: buffer.numpy() for name, buffer in quantizer.named_buffers()}
        np.savez(f"{directory}/{rank}-{collapsed}.npz", **arrays)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the buffers of both ranks, after healthy and after collapsed training."""
    directory = tmp_path_factory.mktemp("gloo")
    # A fork of this process would inherit its threads' locks; the server imports torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["percov2.analysis.vector_quantizer"])
    processes: list[BaseProcess] = [
        context.Process(target=train_on_rank, args=(rank, str(directory))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return directory


@pytest.mark.parametrize("collapsed", [False, True])
def test_two_processes_end_with_the_same_codebook(two_processes: Path, *, collapsed: bool) -> None:
    first, second = (np.load(two_processes / f"{rank}-{collapsed}.npz") for rank in range(2))
    assert set(first) == {"codebook", "ema_counts", "ema_sums", "updates"}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert first["updates"] == STEPS


def test_two_processes_equal_one_with_both_batches(two_processes: Path) -> None:
    quantizer = make_quantizer(revival_threshold=0.0).train()
    for step in range(STEPS):
        both = [features_of_rank(rank, step, collapsed=False) for rank in range(2)]
        quantizer(torch.cat(both))
    pair = np.load(two_processes / "0-False.npz")
    for name, buffer in quantizer.named_buffers():
        np.testing.assert_allclose(pair[name], buffer.numpy(), atol=1e-5, err_msg=name)


class _Group:
    """A process group of two, of which the other process sends what it is told to.

    Args:
        monkeypatch: takes it back.
        counts: of the other process's tokens.
        vectors: that the other process offers to dead codes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counts: Tensor, vectors: Tensor) -> None:
        self.counts, self.vectors, self.calls = counts, vectors, 0
        monkeypatch.setattr(vector_quantizer, "_distributed", lambda: True)
        monkeypatch.setattr(vector_quantizer, "_gather", self._gather)
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)

    def _all_reduce(self, tensor: Tensor) -> None:
        self.calls += 1
        if tensor.ndim == 1:
            tensor += self.counts

    def _gather(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([vectors, self.vectors])


def test_a_process_without_finite_vectors_leaves_no_other_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer = make_quantizer()
    group = _Group(monkeypatch, torch.zeros(8), torch.randn(8, DIM))
    quantizer._update(torch.full((70, DIM), torch.nan), torch.zeros(70, dtype=torch.int64))
    assert group.calls == 2


def test_codes_are_revived_at_the_mean_count_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer = make_quantizer(decay=0.5, revival_threshold=0.1)
    quantizer.ema_counts.zero_()
    used = torch.zeros(8)
    used[1] = 90.0
    other = F.normalize(torch.randn(8, DIM, generator=torch.Generator().manual_seed(2)), dim=1)
    _Group(monkeypatch, used, other)
    mine = F.normalize(torch.randn(70, DIM, generator=torch.Generator().manual_seed(1)), dim=1)
    quantizer._update(mine, torch.zeros(70, dtype=torch.int64))
    assert quantizer.ema_counts[2:].tolist() == [(70 + 90) / 8] * 6
    revived = quantizer.codebook[2:]
    known = torch.cat([mine, other])
    assert ((revived[:, None] - known).abs().amax(-1).amin(1) < 1e-6).all()


def test_revived_codes_are_drawn_anew_from_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process's vectors are among them, and no step revives the same places."""
    generator = torch.Generator().manual_seed(1)
    mine, other = (F.normalize(torch.randn(70, DIM, generator=generator), dim=1) for _ in range(2))
    found = []
    for step in range(4):
        quantizer = make_quantizer(revival_threshold=0.5)
        _Group(monkeypatch, torch.zeros(8), other[:8])
        quantizer.ema_counts.zero_()
        quantizer.updates.fill_(step)
        quantizer._revive(mine, torch.tensor(1.0))
        found.append(quantizer.codebook.clone())
    for first, second in pairwise(found):
        assert not torch.equal(first, second)
    shared = torch.cat(found)[:, None] - other[:8]
    assert (shared.abs().amax(-1) < 1e-6).any()
