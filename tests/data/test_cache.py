"""Latents and text embeddings in shards: what goes in comes out, and a run can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from torch import Tensor

from percov2.components import load_autoencoder
from percov2.data import cache as cache_module
from percov2.data import module
from percov2.data.cache import CacheSettings, Summary, cache, main
from percov2.data.cached import CachedDataModule, CachedDecoder, pack
from percov2.data.faults import FaultError
from percov2.data.laion import LaionDataModule
from percov2.data.samples import RawSample
from percov2.data.shards import Retry, read_shard
from percov2.model_store import PRESETS_DIRECTORY
from percov2.synthesis.text_conditioner import TextConditioner
from tests.data.shard_factory import sample, write_shard, write_shards

TINY = PRESETS_DIRECTORY / "tiny"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards `00000` and `00001` with 3 and 2 good samples and one faulty one each."""
    folder = write_shards(tmp_path / "shards", 3)
    write_shard(folder / "00001.tar", [sample(3), sample(9, jpg=b""), sample(4)])
    return folder


def run(shards: Path, output: Path, **changes: Any) -> Summary:
    options: dict[str, Any] = {
        "model": "tiny",
        "data": str(shards / "*.tar"),
        "output": output,
        "crop": 32,
        "crops": 0,
        "shard_size": 2,
        "batch_size": 2,
        "num_workers": 2,
    }
    return cache(CacheSettings(**{**options, **changes}))


def read(output: Path, val_samples: int, *, text: bool = True) -> dict[str, Any]:
    """All samples of a cache by key, through the DataModule."""
    data = CachedDataModule(
        train_shards=str(output / "00000-*.tar"),
        val_shards=str(output / "0000[1-9]-*.tar"),
        batch_size=1,
        val_samples=val_samples,
        empty_text=output / "empty.safetensors" if text else None,
        num_workers=0,
    )
    batches: list[Any] = [*islice(data.train_dataloader(), 3), *data.val_dataloader()]
    return {batch["key"][0]: data.on_before_batch_transfer(batch, 0) for batch in batches}


@torch.no_grad()
def test_what_is_cached_is_what_a_stage_would_compute(shards: Path, tmp_path: Path) -> None:
    summary = run(shards, tmp_path / "cache", images=True)
    assert (summary.samples, summary.parts) == (5, 4)
    assert summary.faults == {"corrupt_image": 1}
    batches = read(tmp_path / "cache", 2)
    assert sorted(batches) == [f"{number:09}" for number in range(5)]
    autoencoder = load_autoencoder(TINY)
    text = TextConditioner.from_pretrained(TINY, use_t5=False, dtype=torch.float32).eval()
    empty = text([""])
    original = LaionDataModule(
        train_shards=str(shards / "00001.tar"),
        val_shards=str(shards / "00000.tar"),
        crop=32,
        max_zoom=1.0,
        batch_size=3,
        val_samples=3,
    )
    (expected,) = original.val_dataloader()
    for row, key in enumerate(expected["key"]):
        batch = batches[key]
        assert batch.keys() == {
            *("latents", "caption", "key", "image", "text_embeddings", "text_pooled"),
            *("empty_embeddings", "empty_pooled"),
        }
        assert torch.equal(batch["image"][0], expected["image"][row])
        assert batch["caption"] == [expected["caption"][row]]
        condition = text(batch["caption"])
        close(batch["latents"], autoencoder.encode(batch["image"]), torch.float32)
        close(batch["text_embeddings"], condition.embeddings, torch.float16)
        close(batch["text_pooled"], condition.pooled, torch.float16)
        close(batch["empty_embeddings"], empty.embeddings[0], torch.float16)
        close(batch["empty_pooled"], empty.pooled[0], torch.float16)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-3, atol=2e-3)


def test_random_crops_have_names_of_their_own(shards: Path, tmp_path: Path) -> None:
    summary = run(shards, tmp_path / "cache", crops=2, max_zoom=1.5, text_model="none")
    assert (summary.samples, summary.faults) == (10, {"corrupt_image": 1})
    data = CachedDataModule(
        train_shards=str(tmp_path / "cache" / "00000-*.tar"),
        val_shards=str(tmp_path / "cache" / "00001-*.tar"),
        batch_size=6,
        val_samples=9,
        num_workers=0,
    )
    batch: Any = next(iter(data.train_dataloader()))
    assert sorted(batch["key"]) == [f"{n:09}#{crop}" for n in range(3) for crop in range(2)]
    assert {"image", "text_embeddings"}.isdisjoint(batch)
    by_key = dict(zip(batch["key"], batch["latents"], strict=True))
    assert not torch.equal(by_key["000000000#0"], by_key["000000000#1"])
    assert not (tmp_path / "cache" / "empty.safetensors").exists()


def test_an_interrupted_run_goes_on_and_ends_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shards, tmp_path / "whole", text_model="none", crops=1)

    class PowerCut(BaseException):
        pass

    calls = 0

    def cut(*args: Any, **options: Any) -> dict[str, bytes]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second part of the second shard
            raise PowerCut
        return pack(*args, **options)

    monkeypatch.setattr(cache_module, "pack", cut)
    with pytest.raises(PowerCut):
        run(shards, tmp_path / "cut", text_model="none", crops=1)
    monkeypatch.undo()
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {"00000-0000.tar", "00000-0001.tar", "00001-0000.tar", "cache.json"}
    summary = run(shards, tmp_path / "cut", text_model="none", crops=1)
    assert (summary.samples, summary.parts, summary.skipped) == (1, 1, 2)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    again = run(shards, tmp_path / "cut", text_model="none", crops=1)
    assert (again.samples, again.skipped) == (0, 2)


def test_other_settings_are_refused_for_the_same_folder(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "cache", text_model="none")
    with pytest.raises(ValueError, match="made with another crop, seed: choose an empty folder"):
        run(shards, tmp_path / "cache", text_model="none", crop=40, seed=3)


@pytest.mark.parametrize("interrupted", [False, True])
def test_other_data_of_the_same_names_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    output = tmp_path / "cache"
    if interrupted:
        monkeypatch.setattr(cache_module, "pack", lambda *_, **__: exit(1))
        with pytest.raises(SystemExit):
            run(shards, output, text_model="none")
        monkeypatch.undo()
    else:
        run(shards, output, text_model="none")
    other = tmp_path / "other"
    other.mkdir()
    # The same key, as img2dataset numbers every data set.
    write_shard(other / "00000.tar", [sample(7) | {"__key__": f"{0:09}"}])
    with pytest.raises(ValueError, match=r"other data .* called 00000, too: choose an empty"):
        run(other, output, text_model="none")
    write_shard(other / "00002.tar", [sample(7)])
    (other / "00000.tar").unlink()
    more = run(other, output, text_model="none")
    assert (more.samples, more.skipped) == (1, 0), "further shards are added"


def test_a_shard_whose_source_breaks_off_is_tried_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "cache", tmp_path / "whole"
    run(shards, whole, text_model="none")

    def broken(shard: str, *, start: int, retry: Retry) -> Iterator[tuple[int, RawSample]]:
        yield from islice(read_shard(shard, start=start, retry=retry), 1)
        raise FaultError("damaged_shard", "cut", where=shard, passing=True)

    monkeypatch.setattr(module, "read_shard", broken)
    summary = run(shards, output, text_model="none")
    assert len(summary.missing) == 2
    monkeypatch.undo()
    again = run(shards, output, text_model="none")
    assert (again.samples, again.missing) == (5, [])
    for path in whole.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_cache_of_another_version_is_refused(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "cache", text_model="none")
    manifest = tmp_path / "cache" / "cache.json"
    content = json.loads(manifest.read_text())
    del content["beginnings"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cache\.json is not of this version"):
        run(shards, tmp_path / "cache", text_model="none")


def test_the_program_tells_what_was_missing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model=tiny", "--crop=32", "--text_model=none", f"--output={tmp_path / 'cache'}"]
    assert main([*args, f"--data={shards}/{{00000..00002}}.tar"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["samples"], summary["missing"]) == (5, [f"{shards}/00002.tar"])
    assert main([*args, f"--data={shards}/9.tar"]) == 2
    assert "no shard matches" in capsys.readouterr().err


def test_a_folder_is_cached_too(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"some.name.{number}.jpg").write_bytes(sample(number)["jpg"])
    summary = run(folder, tmp_path / "cache", data=str(folder), text_model="none")
    assert summary.samples == 3
    keys = [
        CachedDecoder()(raw, None)["key"]
        for raw in wds.WebDataset(
            [str(tmp_path / "cache" / f"pictures-000{part}.tar") for part in range(2)],
            shardshuffle=False,
        )
    ]
    assert keys == [f"some.name.{number}" for number in range(3)]


def packed(**tensors: Tensor) -> dict[str, Any]:
    described = {"key": "k", "caption": "c"}
    return {"__key__": "x", "__url__": "u", **pack(described, tensors, with_image=False)}


def test_padding_is_not_stored_but_comes_back() -> None:
    embeddings = torch.zeros(30, 40)
    embeddings[:7, :5] = torch.rand(7, 5) + 1
    embeddings[3] = 0
    raw = packed(latents=torch.rand(4, 2, 2), text_embeddings=embeddings, text_pooled=torch.ones(3))
    assert len(raw["safetensors"]) < 700
    decoded = CachedDecoder()(raw, None)
    assert torch.equal(decoded["text_embeddings"], embeddings.half())
    nothing = packed(
        latents=torch.rand(4, 2, 2), text_embeddings=torch.zeros(3, 4), text_pooled=torch.ones(3)
    )
    assert torch.equal(CachedDecoder()(nothing, None)["text_embeddings"], torch.zeros(3, 4).half())


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="latents of k do not fit into float16"):
        packed(latents=torch.full((1, 1, 1), 1e6))


def test_damaged_latents_are_a_fault() -> None:
    raw = packed(latents=torch.rand(4, 2, 2))
    for damage in (
        {"safetensors": raw["safetensors"][:-3]},
        {"safetensors": b"x"},
        {"json": b"{}"},
    ):
        with pytest.raises(FaultError, match="corrupt_latents"):
            CachedDecoder()({**raw, **damage}, None)
    del raw["safetensors"]
    with pytest.raises(FaultError, match="corrupt_latents"):
        CachedDecoder()(raw, None)


def test_empty_embeddings_that_are_not_there_are_refused(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "cache", text_model="none")
    with pytest.raises(ValueError, match=r"empty_text .*empty\.safetensors cannot be read"):
        read(tmp_path / "cache", 2)


def test_a_model_without_text_encoders_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / "autoencoder").symlink_to(TINY / "autoencoder")
    with pytest.raises(ValueError, match="holds no text encoders: name a stage 2"):
        run(shards, tmp_path / "cache", model=str(tmp_path / "stage0"))


@pytest.mark.parametrize("name", ["crops", "batch_size", "num_workers", "shard_size"])
def test_numbers_out_of_range_are_refused(shards: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} -1"):
        run(shards, tmp_path / "cache", **{name: -1})
