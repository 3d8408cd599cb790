from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import multiprocessing

from percov2.codec import Codec
from percov2.evaluation.codecs import Candidate, Encoded, PercoCandidate
from percov2.evaluation.competitors import FORMATS, FormatCandidate
from percov2.evaluation.distributed import Processes, processes
from percov2.evaluation.features import WholePictures, frechet_distance
from percov2.evaluation.metrics import Suite
from percov2.evaluation.pixel_metrics import GradientEnergy, MsSsim, Psnr
from percov2.evaluation.protocols import find_protocol
from percov2.evaluation.results import COLUMNS
from percov2.evaluation.runner import Runner
from percov2.evaluation.task import Task
from tests.evaluation.pictures import TinyFeatures, make_folder

PICTURES = 5
TIMES = ("encode_seconds", "decode_seconds")


class _Perco(PercoCandidate):
    """A model that counts its files, and gives up before one of them."""

    def __init__(self, codec: Codec, steps: int = 1, give_up_at: int | None = None) -> None:
        super().__init__(codec, steps=steps, guidance=None, store_captions=False)
        self.encoded, self.give_up_at = 0, give_up_at

    def encode(self, image: Image.Image, caption: str, target: int | None) -> Encoded:
        if self.encoded == self.give_up_at:
            raise KeyboardInterrupt
        self.encoded += 1
        return super().encode(image, caption, target)


class _Part(Processes):
    """A process whose peers have ended: works on its pictures, reports on all codecs."""

    def share(self, things: Sequence[Any]) -> list[Any]:
        return list(things) if isinstance(things[0], str) else list(things[self.rank :: self.count])

    def wait(self) -> None:
        pass

    def gather(self, thing: Any) -> list[Any]:
        return [thing]


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    """A real codec, tiny and random."""
    return Codec.from_pretrained(str(tiny_model))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures."""
    return make_folder(tmp_path / "pictures", PICTURES)


def _suite(*, more: bool = False) -> Suite:
    pairs: dict[str, Any] = {"psnr": Psnr(), "gradient_energy": GradientEnergy()}
    if more:
        pairs["ms_ssim"] = MsSsim()
    return Suite(
        pairs=pairs,
        extractors={"inception": WholePictures(TinyFeatures(), "tiny")},
        sets={"fid": frechet_distance},
        absent={"dists": "no weights"},
    )


def _webp() -> FormatCandidate:
    return FormatCandidate(FORMATS["webp"](), anchor="percov2 test", rate="same", family="webp")


def _task(folder: Path, output: Path, candidates: Sequence[Candidate], **options: Any) -> Task:
    settings: dict[str, Any] = {
        "protocol": find_protocol(str(folder)),
        "suite": _suite(),
        "reference": output / "reference",
        "absent_codecs": {},
        "processes": Processes(),
        "device": "cpu",
        **options,
    }
    return Task(candidates=candidates, output=output, **settings)


def _without_times(results: dict[str, Any]) -> list[dict[str, Any]]:
    codecs = json.loads(json.dumps(results["codecs"]))
    for entry in codecs:
        for name in TIMES:
            entry["summary"].pop(name, None)
    return list(codecs)


def _table(output: Path) -> list[dict[str, str]]:
    with (output / "images.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_from_real_files(codec: Codec, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    one, two = _Perco(codec), _Perco(codec, steps=2)
    results = Runner(_task(folder, output, [one, two, _webp()])).run()
    assert results == json.loads((output / "results.json").read_text())
    assert results["schema"] == 2
    checksum = results["protocol"].pop("checksum")
    assert results["protocol"] == {
        "name": "folder",
        "crop": "full",
        "data": "pictures",
        "images": PICTURES,
    }
    assert len(checksum) == 8
    slugs = ["percov2-test-1", "percov2-test-2", "webp-test-same"]
    assert [entry["slug"] for entry in results["codecs"]] == slugs
    rows = _table(output)
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["slug"], row["image"]) for row in rows] == [
        (slug, name) for slug in slugs for name in "abcde"
    ]
    for row in rows:
        (stream,) = (output / "streams" / row["slug"]).glob(f"{row['image']}.*")
        data = stream.read_bytes()
        assert int(row["bytes"]) == len(data)
        assert float(row["bpp"]) == pytest.approx(8 * len(data) / (64 * 48))
        restored = Image.open(output / "pictures" / row["slug"] / f"{row['image']}.png")
        original = Image.open(output / "pictures" / "original" / f"{row['image']}.png")
        assert original.tobytes() == Image.open(folder / f"{row['image']}.png").tobytes()
        if row["slug"].startswith("percov2"):
            steps = int(row["slug"][-1])
            assert restored.tobytes() == codec.decompress(data, steps=steps).tobytes()
            parts = ("header_bytes", "caption_bytes", "token_bytes")
            assert sum(int(row[part]) for part in parts) == len(data)
            assert float(row["token_saving_against_uniform"]) < 1
        else:
            assert row["token_bytes"] == "", "absent is empty"
        assert row["dists"] == row["ms_ssim"] == ""
        assert float(row["psnr"]) > 0
    assert one.encoded == PICTURES
    assert two.encoded == 0, "settings of one model share its files"
    entry = results["codecs"][0]
    assert entry["summary"]["bytes"]["mean"] == pytest.approx(
        sum(int(row["bytes"]) for row in rows[:PICTURES]) / PICTURES
    )
    assert entry["set_metrics"]["fid"] > 0
    assert entry["absent"] == {"dists": "no weights"}
    assert entry["failures"] == []
    assert results["timing"]["overhead"] > 1
    assert results["timing"]["pictures"] == 3 * PICTURES


def test_killed_run_goes_on_where_it_was(codec: Codec, folder: Path, tmp_path: Path) -> None:
    undisturbed = Runner(_task(folder, tmp_path / "whole", [_Perco(codec), _webp()])).run()
    output = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        Runner(_task(folder, output, [_Perco(codec, give_up_at=3), _webp()])).run()
    assert not (output / "results.json").exists()
    (journal,) = (output / "records" / "webp-test-same").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-9])  # killed while it wrote
    again = _Perco(codec)
    resumed = Runner(_task(folder, output, [again, _webp()])).run()
    assert again.encoded == 2
    assert resumed["timing"]["pictures"] == 2 + 3
    assert _without_times(resumed) == _without_times(undisturbed)
    idle = _Perco(codec)
    finished = Runner(_task(folder, output, [idle, _webp()])).run()
    assert idle.encoded == 0
    assert finished["timing"]["overhead"] is None
    assert finished["codecs"] == resumed["codecs"]


def test_more_metrics_and_codecs_are_added(codec: Codec, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    Runner(_task(folder, output, [_Perco(codec)])).run()
    again = _Perco(codec)
    results = Runner(_task(folder, output, [again], suite=_suite(more=True))).run()
    assert again.encoded == 0
    assert "5 of 5 pictures have none" in results["codecs"][0]["absent"]["ms_ssim"]
    both = Runner(_task(folder, output, [_webp()])).run()
    assert [entry["slug"] for entry in both["codecs"]] == ["percov2-test-1", "webp-test-same"]
    assert both["codecs"][0]["summary"] == results["codecs"][0]["summary"]


def test_reasons_for_absence_are_true(codec: Codec, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    Runner(_task(folder, output, [_Perco(codec)])).run()
    more = _suite(more=True)
    # What an earlier command has measured, and this one could not.
    del more.pairs["gradient_energy"]
    more.absent["gradient_energy"] = "no weights"
    candidates = [_Perco(codec, steps=2)]
    first, second = Runner(_task(folder, output, candidates, suite=more)).run()["codecs"]
    assert first["absent"]["ms_ssim"] == (
        "5 of 5 pictures were not measured: repeat the command that names this codec"
    )
    assert "have none: needs" in second["absent"]["ms_ssim"]
    assert "gradient_energy" in first["summary"]
    assert "gradient_energy" not in first["absent"]
    assert second["absent"]["gradient_energy"] == "no weights"
    assert "dists" in first["absent"]


def test_two_shares_make_the_same_result(codec: Codec, folder: Path, tmp_path: Path) -> None:
    whole = Runner(_task(folder, tmp_path / "whole", [_Perco(codec), _webp()])).run()
    output = tmp_path / "shared"
    for rank in (1, 0):
        part = _Part(rank=rank, count=2)
        parted: list[Candidate] = [_Perco(codec), _webp()]
        results = Runner(_task(folder, output, parted, processes=part)).run()
    assert _without_times(results) == _without_times(whole)


def _work(rank: int, port: int, model: str, folder: Path, output: Path) -> None:
    """A process of the run below."""
    import os

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    candidates: list[Candidate] = [_Perco(Codec.from_pretrained(model)), _webp()]
    with processes() as peers:
        Runner(_task(folder, output, candidates, processes=peers)).run()


@pytest.mark.slow
def test_two_processes_make_the_same_result(
    codec: Codec, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    import socket

    whole = Runner(_task(folder, tmp_path / "whole", [_Perco(codec), _webp()])).run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(tiny_model), folder, tmp_path / "two")
    multiprocessing.spawn(_work, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert len(list((tmp_path / "two" / "records" / "percov2-test-1").glob("*.jsonl"))) == 2
    for one, two in zip(_without_times(whole), _without_times(results), strict=True):
        assert one.pop("set_metrics") == pytest.approx(two.pop("set_metrics"), rel=1e-6)
        summaries = one.pop("summary"), two.pop("summary")
        assert summaries[0].keys() == summaries[1].keys()
        for name, values in summaries[0].items():
            assert values == pytest.approx(summaries[1][name], rel=1e-6), name
        assert one == two


def test_failures_are_counted_and_tried_again(codec: Codec, folder: Path, tmp_path: Path) -> None:
    good = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(good[:200])
    output = tmp_path / "output"
    results = Runner(_task(folder, output, [_Perco(codec), _webp()])).run()
    for entry in results["codecs"]:
        assert entry["images"] == PICTURES - 1
        (failure,) = entry["failures"]
        assert failure["image"] == "c"
        assert "c.png" in failure["error"]
    assert len(_table(output)) == 2 * (PICTURES - 1)
    (folder / "c.png").write_bytes(good)
    results = Runner(_task(folder, output, [_Perco(codec), _webp()])).run()
    assert [entry["failures"] for entry in results["codecs"]] == [[], []]
    assert results["timing"]["pictures"] == 2


def test_competitor_without_a_file_to_match_fails(folder: Path, tmp_path: Path) -> None:
    results = Runner(_task(folder, tmp_path / "output", [_webp()])).run()
    (entry,) = results["codecs"]
    assert entry["images"] == 0
    assert entry["summary"] == {}
    assert "percov2 test has no file of this picture" in entry["failures"][0]["error"]
    assert "fid" in entry["absent"]


def test_a_finetuned_painter_is_not_taken_for_the_one_before(
    codec: Codec, tiny_model: Path
) -> None:
    """Its model id is the same, since it reads the same streams."""
    same, finetuned = (Codec.from_pretrained(str(tiny_model)) for _ in range(2))
    with torch.no_grad():
        next(finetuned.components.transformer.parameters()).add_(1e-3)
    weighing = Codec(replace(codec.components, config=replace(codec.config, rate_weight=0.01)))
    codecs = (codec, same, finetuned, weighing)
    assert {each.config.model_id for each in codecs} == {codec.config.model_id}
    identities = [_Perco(each).info.identity for each in codecs]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_other_settings_need_another_output(codec: Codec, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    Runner(_task(folder, output, [_Perco(codec)])).run()
    cropped = find_protocol(str(folder), crop="squash-512")
    with pytest.raises(ValueError, match=r"protocol crop 'full', now it is 'squash-512': .*output"):
        Runner(_task(folder, output, [_Perco(codec)], protocol=cropped))
    suite = _suite()
    suite.extractors["inception"] = WholePictures(TinyFeatures(), "another")
    with pytest.raises(ValueError, match=r"metrics inception 'tiny', now it is 'another'"):
        Runner(_task(folder, output, [_Perco(codec)], suite=suite))
    (output / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json is not of percov2 evaluate"):
        Runner(_task(folder, output, [_Perco(codec)]))


def test_reference_is_shared_but_not_with_other_pictures(
    codec: Codec, folder: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    first = Runner(_task(folder, tmp_path / "1", [_Perco(codec)], reference=shared)).run()
    asked: list[int] = []

    class _Counting(WholePictures):
        def __call__(self, image: torch.Tensor) -> Any:
            asked.append(1)
            return super().__call__(image)

    suite = _suite()
    suite.extractors["inception"] = _Counting(TinyFeatures(), "tiny")
    options: dict[str, Any] = {"reference": shared, "suite": suite}
    second = Runner(_task(folder, tmp_path / "2", [_Perco(codec)], **options)).run()
    assert len(asked) == PICTURES, "the originals were not looked at again"
    assert _without_times(first) == _without_times(second)
    shutil.copy(folder / "a.png", folder / "b.png")
    with pytest.raises(ValueError, match="features of another picture named b"):
        Runner(_task(folder, tmp_path / "3", [_Perco(codec)], reference=shared)).run()


def test_a_finished_run_is_not_reported_for_other_pictures(
    codec: Codec, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    model = _Perco(codec)
    first = Runner(_task(folder, output, [model])).run()
    same = shutil.copytree(folder, tmp_path / "same", copy_function=shutil.copyfile)
    again = Runner(_task(same, output, [model])).run()
    assert model.encoded == PICTURES
    assert again["codecs"] == first["codecs"]
    assert again["protocol"]["checksum"] == first["protocol"]["checksum"]
    shutil.copyfile(folder / "a.png", same / "b.png")
    # Another folder of the features: the run itself knows its pictures.
    task = _task(same, output, [model], reference=tmp_path / "reference")
    with pytest.raises(ValueError, match=r"b\.png is not the picture that .*another --output"):
        Runner(task).run()
    other = Runner(_task(same, tmp_path / "other", [model])).run()
    assert other["protocol"]["checksum"] != first["protocol"]["checksum"]


def test_a_picture_that_cannot_be_read_any_more_has_no_figures(
    codec: Codec, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    Runner(_task(folder, output, [_Perco(codec), _webp()])).run()
    (folder / "c.png").write_bytes(b"no picture any more")
    results = Runner(_task(folder, output, [_Perco(codec), _webp()])).run()
    for entry in results["codecs"]:
        assert entry["images"] == PICTURES - 1
        assert [failure["image"] for failure in entry["failures"]] == ["c"]
