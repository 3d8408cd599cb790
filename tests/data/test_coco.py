"""COCO's annotations, batches, and the seeded list of pictures."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from percov2.data.coco import (
    CocoDataModule,
    coco30k_list,
    main,
    read_annotations,
    read_list,
    select_images,
)
from tests.data.shard_factory import jpeg


def write_set(root: Path, name: str, ids: range, prefix: str = "") -> dict[str, Path]:
    """Pictures in ``root/name`` with two captions each, except the last, which has none."""
    (root / name).mkdir(parents=True)
    images, annotations = [], []
    for number in ids:
        file_name = f"{prefix}{number:012}.jpg"
        (root / name / file_name).write_bytes(jpeg(number))
        images.append({"id": number, "file_name": file_name, "width": 24, "height": 20})
        if number != ids[-1]:
            for which in (1, 0):  # out of order, as in the real files
                caption = f" caption {which} of {number}\n"
                entry = {"id": 10 * number + which, "image_id": number, "caption": caption}
                annotations.append(entry)
    path = root / f"captions_{name}.json"
    path.write_text(json.dumps({"images": images[::-1], "annotations": annotations}))
    return {"folder": root / name, "annotations": path}


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Any]:
    train = write_set(tmp_path, "train2017", range(1, 8))
    val = write_set(tmp_path, "val2017", range(50, 55))
    return {
        "train_folder": train["folder"],
        "train_annotations": train["annotations"],
        "val_folder": val["folder"],
        "val_annotations": val["annotations"],
    }


def module(coco: dict[str, Any], **changes: Any) -> CocoDataModule:
    options: dict[str, Any] = {
        "crop": 16,
        "max_zoom": 1.2,
        "batch_size": 3,
        "val_samples": 3,
        "num_workers": 0,
    }
    return CocoDataModule(**{**options, **coco, **changes})


def test_validation_takes_the_first_pictures_by_id_and_their_first_captions(
    coco: dict[str, Any],
) -> None:
    (batch,) = module(coco).val_dataloader()
    assert batch["key"] == [f"{number:012}" for number in (50, 51, 52)]
    assert batch["caption"] == [f"caption 0 of {number}" for number in (50, 51, 52)]


def test_training_draws_captions_anew_and_counts_pictures_without(coco: dict[str, Any]) -> None:
    data = module(coco)
    captions: list[str] = []
    for batch in islice(data.train_dataloader(), 20):
        captions += data.on_before_batch_transfer(batch, 0)["caption"]  # type: ignore[arg-type]
    assert set(captions) == {f"caption {which} of {n}" for which in (0, 1) for n in range(1, 7)}
    assert data.faults.keys() == {"missing_caption"}


def test_the_first_caption_can_be_asked_for(coco: dict[str, Any]) -> None:
    batches: list[Any] = list(islice(module(coco, caption="first").train_dataloader(), 8))
    assert {caption[:9] for batch in batches for caption in batch["caption"]} == {"caption 0"}


def test_the_layout_of_2014(coco: dict[str, Any], tmp_path: Path) -> None:
    old = write_set(tmp_path, "val2014", range(70, 74), prefix="COCO_val2014_")
    data = module(coco, val_folder=old["folder"], val_annotations=old["annotations"])
    (batch,) = data.val_dataloader()
    assert batch["key"][0] == "COCO_val2014_000000000070"


def test_the_same_picture_in_both_sets_is_refused(coco: dict[str, Any], tmp_path: Path) -> None:
    old = write_set(tmp_path, "val2014", range(6, 12), prefix="COCO_val2014_")
    with pytest.raises(ValueError, match="2 pictures are in training and in validation, id 6"):
        module(coco, val_folder=old["folder"], val_annotations=old["annotations"])


def test_a_list_selects_and_orders_the_validation(coco: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("53\n50\n")
    (batch,) = module(coco, val_list=tmp_path / "list.txt").val_dataloader()
    assert batch["key"] == [f"{number:012}" for number in (53, 50)]
    (tmp_path / "list.txt").write_text("53\n7\n")
    with pytest.raises(ValueError, match="1 of 2 listed pictures are not in the annotations, 7"):
        module(coco, val_list=tmp_path / "list.txt")


def test_lists_are_seeded_beginnings_of_each_other(coco: dict[str, Any]) -> None:
    images = read_annotations(coco["train_annotations"])
    lists = [coco30k_list(images, seed=seed, count=6) for seed in range(5)]
    assert all(sorted(one) == [1, 2, 3, 4, 5, 6] for one in lists)
    assert len(set(map(tuple, lists))) > 1
    assert coco30k_list(images, seed=3, count=4) == lists[3][:4]
    assert [image.image_id for image in select_images(images, lists[0])] == lists[0]


@pytest.mark.parametrize("count", [0, 7])
def test_more_than_there_are_is_refused(coco: dict[str, Any], count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {count} of 6"):
        coco30k_list(read_annotations(coco["train_annotations"]), seed=0, count=count)


def test_the_program_writes_the_list(
    coco: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "list.txt"
    args = ["--annotations", str(coco["train_annotations"]), "--output", str(output)]
    assert main([*args, "--count", "5", "--seed", "2"]) == 0
    images = read_annotations(coco["train_annotations"])
    assert read_list(output) == coco30k_list(images, seed=2, count=5)
    # The same for ever: lists are quoted in publications.
    assert read_list(output) == [3, 4, 2, 5, 6]
    before = output.read_bytes()
    assert main(args) == 2
    assert output.read_bytes() == before
    assert "cannot draw 30000 of 6 pictures" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}', '{"images": [{"id": 1}]}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "instances_val2017.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no COCO captions") as caught:
        read_annotations(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_annotations(tmp_path / "none.json")


def test_a_folder_that_is_none_is_refused(coco: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: is not a folder"):
        module(coco, train_folder=tmp_path / "nowhere")


def test_a_list_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(ValueError, match="one image id a line"):
        read_list(tmp_path / "list.txt")
