"""MS-COCO: pictures and captions, and the seeded list of the 30,000 pictures of FID protocols.

``python -m percov2.data.coco --annotations captions_val2014.json --output list.txt`` writes the
list, one image id a line in the order drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.module import FileDataModule
from percov2.data.samples import RawSample, picture_decoder
from percov2.files import atomic_path

COCO_30K = 30_000


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoImage:
    """One entry of an annotations file.

    Attributes:
        image_id: the same in all releases: pictures of val2014 are found again in train2017.
        file_name: inside the folder of the release.
        captions: by ascending annotation id.
    """

    image_id: int
    file_name: str
    captions: tuple[str, ...]


def read_annotations(path: Path) -> list[CocoImage]:
    """Pictures of a `captions_*.json`, sorted by id.

    Raises:
        ValueError: no such file, or not one with captions.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {int(image["id"]): [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda entry: int(entry["id"])):
            captions[int(annotation["image_id"])].append(str(annotation["caption"]).strip())
        images = [
            CocoImage(
                image_id=int(image["id"]),
                file_name=str(image["file_name"]),
                captions=tuple(captions[int(image["id"])]),
            )
            for image in content["images"]
        ]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no COCO captions ({type(error).__name__} {error}): give a "
            "captions_*.json of the annotations archive"
        ) from error
    return sorted(images, key=lambda image: image.image_id)


def coco30k_list(images: Sequence[CocoImage], *, seed: int, count: int = COCO_30K) -> list[int]:
    """Ids of ``count`` different pictures with captions, drawn without replacement.

    The usual FID-30k takes them from val2014 (40,504 pictures). The order is that of the draw, so
    that a shorter list of the same seed is a beginning of a longer one.

    Raises:
        ValueError: fewer pictures than asked for.
    """
    ids = [image.image_id for image in images if image.captions]
    if not 1 <= count <= len(ids):
        raise ValueError(
            f"cannot draw {count} of {len(ids)} pictures with captions: lower --count, or give "
            "captions_val2014.json"
        )
    random.Random(seed).shuffle(ids)
    return ids[:count]


def read_list(path: Path) -> list[int]:
    """Image ids of a list that this module wrote.

    Raises:
        ValueError: no such file, or a line that is no number.
    """
    try:
        return [int(line) for line in path.read_text(encoding="utf-8").split()]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: must hold one image id a line ({error})") from error


def select_images(images: Sequence[CocoImage], ids: Sequence[int]) -> list[CocoImage]:
    """The pictures with these ids, in the order of the ids.

    Raises:
        ValueError: an id that no picture has.
    """
    by_id = {image.image_id: image for image in images}
    unknown = [number for number in ids if number not in by_id]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(ids)} listed pictures are not in the annotations, "
            f"{unknown[0]} first: use the annotations that the list was drawn from"
        )
    return [by_id[number] for number in ids]


class CocoRecords:
    """Pictures of COCO as raw samples.

    A record's key is the file's name without suffix, ``txt`` its first caption, and its JSON holds
    all of them as ``captions``.

    Raises:
        ValueError: no such folder, or no picture.
    """

    def __init__(self, images: Sequence[CocoImage], folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder; give the one with COCO's pictures")
        if not images:
            raise ValueError(f"no picture is annotated for {folder}: give another annotations file")
        self.images, self.folder = list(images), folder

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> RawSample:
        """Bytes of one picture and its captions."""
        image = self.images[index]
        path = self.folder / image.file_name
        record: dict[str, str | bytes] = {
            "__key__": Path(image.file_name).with_suffix("").as_posix(),
            "__url__": str(path),
            path.suffix[1:].lower(): path.read_bytes(),
            "json": json.dumps({"captions": image.captions}).encode(),
        }
        if image.captions:
            record["txt"] = image.captions[0].encode("utf-8", "surrogatepass")
        return record


class CocoDataModule(FileDataModule):
    """Training and validation batches from COCO's pictures and captions.

    Works with the folders and annotations of 2014 and of 2017.

    Args:
        train_annotations: a `captions_*.json`.
        train_folder: its pictures, for instance `train2017`.
        val_annotations: a `captions_*.json`.
        val_folder: its pictures, for instance `val2017`.
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        color_jitter: likewise; 0, the default, leaves colours as they are.
        batch_size: per process.
        val_samples: number of validation images, the first good ones by id (or of ``val_list``).
        val_list: file with the ids to validate on, see `coco30k_list`; None takes all.
        caption: ``first`` of a picture, or a ``random`` one, drawn anew in every epoch; validation
            always takes the first.
        num_workers: loader processes.
        seed: of order, crops and captions.
        filters: which samples are refused; in validation too.
        max_consecutive_faults: more unusable pictures in a row are an error.

    Raises:
        ValueError: a file or folder that does not fit, or a picture in both sets.
    """

    def __init__(
        self,
        *,
        train_annotations: Path,
        train_folder: Path,
        val_annotations: Path,
        val_folder: Path,
        crop: int,
        max_zoom: float,
        batch_size: int,
        val_samples: int,
        val_list: Path | None = None,
        caption: Literal["first", "random"] = "random",
        num_workers: int = 1,
        seed: int = 0,
        color_jitter: float = 0.0,
        filters: Filters = NO_FILTERS,
        max_consecutive_faults: int = 100,
    ) -> None:
        train, val = read_annotations(train_annotations), read_annotations(val_annotations)
        if val_list is not None:
            val = select_images(val, read_list(val_list))
        _refuse_shared(train, val)
        source = {"first": "txt", "random": "json.captions"}[caption]
        super().__init__(
            train_records=CocoRecords(train, train_folder),
            val_records=CocoRecords(val, val_folder),
            source=str(train_folder),
            decoder=picture_decoder(
                crop=crop,
                max_zoom=max_zoom,
                color_jitter=color_jitter,
                captions={source: 1.0},
                filters=filters,
            ),
            batch_size=batch_size,
            val_samples=val_samples,
            num_workers=num_workers,
            seed=seed,
            max_consecutive_faults=max_consecutive_faults,
        )
        self._names = [image.file_name for image in train]

    def data_names(self) -> list[str]:
        """See `StreamDataModule.data_names`."""
        return self._names


def _refuse_shared(train: Sequence[CocoImage], val: Sequence[CocoImage]) -> None:
    trained = {image.image_id for image in train}
    shared = [image.image_id for image in val if image.image_id in trained]
    if shared:
        raise ValueError(
            f"{len(shared)} pictures are in training and in validation, id {shared[0]} first: use "
            "the two sets of one year (train2017 holds most of val2014)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Write a list; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m percov2.data.coco", description=__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="captions_val2014.json")
    parser.add_argument("--output", type=Path, required=True, help="text file to write")
    parser.add_argument("--count", type=int, default=COCO_30K, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        ids = coco30k_list(read_annotations(args.annotations), seed=args.seed, count=args.count)
        with atomic_path(args.output) as temporary:
            temporary.write_text("".join(f"{number}\n" for number in ids), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"percov2.data.coco: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(ids)} of the pictures in {args.annotations}, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
