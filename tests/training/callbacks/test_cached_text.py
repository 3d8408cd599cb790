"""Samples of a stage that has no text encoders: its batches hold what they said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.data.samples import Batch
from percov2.training import FlowStage
from percov2.training.callbacks import RateDistortionSamples
from percov2.training.callbacks.monitoring import parts_of
from percov2.training.callbacks.rate_distortion import CachedText
from tests.training.callbacks.watched_runs import Pictures
from tests.training.test_stages import flow_stage

CAPTIONS = ["two red boats", "a dog", ""]


def _watched(stage: FlowStage, batch: Batch) -> RateDistortionSamples:
    watcher = RateDistortionSamples(images=3, scatter_images=3, steps=(1, 2))
    watcher.begin(stage)
    watcher.observe(stage, batch)
    return watcher


@torch.no_grad()
def test_samples_are_the_same_without_text_encoders(tmp_path: Path) -> None:
    whole, from_cache = (
        flow_stage(
            tmp_path,
            train_tokenizer=False,
            from_prediction=False,
            train_text_encoders=False,
            cached_text=cached,
        ).eval()
        for cached in (False, True)
    )
    assert parts_of(whole).keys() - parts_of(from_cache).keys() == {"text_conditioner"}
    images = torch.stack([sample["image"] for sample in Pictures(3, first=0).samples])
    batch = Batch(image=images, caption=CAPTIONS, key=["0", "1", "2"])
    expected = _watched(whole, batch)

    assert whole.text_conditioner is not None
    text, empty = whole.text_conditioner(CAPTIONS), whole.text_conditioner([""])
    batch["text_embeddings"], batch["text_pooled"] = text.embeddings, text.pooled
    with pytest.raises(ValueError, match="text of an empty caption: set data"):
        _watched(from_cache, batch)
    batch["empty_embeddings"], batch["empty_pooled"] = empty.embeddings[0], empty.pooled[0]
    found = _watched(from_cache, batch)
    assert torch.equal(found._points[:, 0], expected._points[:, 0])
    for row, expected_row in zip(found._rows, expected._rows, strict=True):
        for (picture, _), (expected_picture, _) in zip(row, expected_row, strict=True):
            # Text of three captions at once and of two differs by float32 rounding.
            difference = np.asarray(picture, int) - np.asarray(expected_picture, int)
            assert np.abs(difference).max() <= 1

    cached = CachedText(batch)
    cached.row = 1
    said = cached(["", CAPTIONS[1]])
    assert torch.equal(said.embeddings, torch.stack([empty.embeddings[0], text.embeddings[1]]))
    assert torch.equal(said.pooled, torch.stack([empty.pooled[0], text.pooled[1]]))
