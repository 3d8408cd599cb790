"""Data sets by the names of the field, and how their pictures are brought to size.

| name | pictures | default crop |
| --- | --- | --- |
| kodak | 24 | full |
| coco30k | 30,000 of val2014, seed 0 of `percov2.data.coco` | crop-512 |
| clic2020 | 428, the test set: professional and mobile | full |
| div2k | 100, the validation set | full |

Crops: ``full`` takes the picture as it is; ``centre-512`` cuts 512x512 pixels from its middle;
``crop-512`` resizes the short side to 512 (Lanczos), then cuts the middle, which keeps the aspect;
``squash-512`` resizes both sides to 512 (bicubic), as PerCo's evaluation does, which does not.
"""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from percov2.data.coco import (
    CocoImage,
    coco30k_list,
    read_annotations,
    read_list,
    select_images,
)
from percov2.files import atomic_path, list_images
from percov2.images import read_image

SIDE = 512
COCO_SEED = 0


def _full(image: Image.Image) -> Image.Image:
    return image


def _centre(image: Image.Image) -> Image.Image:
    if min(image.size) < SIDE:
        raise ValueError(
            f"{image.width}x{image.height} pixels are less than the {SIDE}x{SIDE} of crop "
            "centre-512: take --crop crop-512"
        )
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


def _crop(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)


def _squash(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


CROPS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "full": _full,
    "centre-512": _centre,
    "crop-512": _crop,
    "squash-512": _squash,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A picture of a data set.

    Attributes:
        name: unique in its data set; pairs originals, streams and reconstructions.
        path: of the original.
        caption: the data set's, None if it has none.
    """

    name: str
    path: Path
    caption: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What is measured on.

    Attributes:
        name: see the table above; ``folder`` for any other.
        crop: one of `CROPS`.
        data: name of the folder with the pictures.
        items: in the order in which they are measured.
        captions: where they come from: ``nobody``, the data set, or the checksum of a file.
    """

    name: str
    crop: str
    data: str
    items: tuple[Item, ...]
    captions: str = "nobody"

    def read(self, item: Item) -> Image.Image:
        """A picture in RGB, brought to size.

        Raises:
            ValueError: no picture, damaged, or too small.
        """
        image, _ = read_image(item.path)
        try:
            return CROPS[self.crop](image)
        except ValueError as error:
            raise ValueError(f"{item.path}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Archive:
    """A file of the net whose MD5 is known."""

    url: str
    md5: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _DataSet:
    """Where a data set lies below the folder of data sets.

    Attributes:
        folders: the names that it goes by; the first is the one to make.
        count: of pictures, None for one that is a choice from more.
        crop: default.
        source: where people get it.
        archive: where we get it.
    """

    folders: tuple[str, ...]
    count: int | None
    crop: str
    source: str
    archive: _Archive | None = None


_DATA_SETS = {
    "kodak": _DataSet(
        folders=("kodak", "Kodak"),
        count=24,
        crop="full",
        source="kodim01.png to kodim24.png from https://r0k.us/graphics/kodak/",
    ),
    "coco30k": _DataSet(
        folders=("coco/val2014", "val2014"),
        count=None,
        crop="crop-512",
        source="val2014.zip from https://cocodataset.org, and beside val2014 the folder "
        "annotations with captions_val2014.json",
        archive=_Archive(
            url="http://images.cocodataset.org/zips/val2014.zip",
            md5="a3d79f5ed8d289b7a7554ce06a5782b3",
        ),
    ),
    "clic2020": _DataSet(
        folders=("clic2020", "CLIC2020"),
        count=428,
        crop="full",
        source="the 250 professional and 178 mobile pictures of the CLIC 2020 test set from "
        "https://compression.cc",
    ),
    "div2k": _DataSet(
        folders=("DIV2K_valid_HR", "div2k"),
        count=100,
        crop="full",
        source="DIV2K_valid_HR.zip from https://data.vision.ee.ethz.ch/cvl/DIV2K",
        archive=_Archive(
            url="http://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
            md5="9fcdda83005c5e5997799b69f955ff88",
        ),
    ),
}
PROTOCOLS = tuple(_DATA_SETS)


def find_protocol(
    data: str,
    *,
    root: Path | None = None,
    crop: str | None = None,
    limit: int | None = None,
    download: bool = False,
) -> Protocol:
    """A data set by name, or any folder with pictures.

    Args:
        data: a folder, a name of `PROTOCOLS`, or ``NAME=FOLDER``.
        root: folder with the data sets.
        crop: one of `CROPS`; None is the data set's own, ``full`` for a folder.
        limit: take so many pictures only, the first ones.
        download: fetch a data set that is not there, if its checksum is known.

    Raises:
        ValueError: no such data set, incomplete, or without pictures; says what to put where.
    """
    name, _, place = data.partition("=")
    if name in _DATA_SETS:
        folder = Path(place) if place else _locate(name, root, download=download)
        crop = _DATA_SETS[name].crop if crop is None else crop
    else:
        name, folder = "folder", Path(data)
        if not folder.is_dir():
            raise ValueError(f"--data {data} is neither a folder nor one of {', '.join(PROTOCOLS)}")
    if crop is not None and crop not in CROPS:
        raise ValueError(f"crop {crop!r}: choose from {', '.join(CROPS)}")
    items = _coco_items(folder) if name == "coco30k" else _folder_items(folder)
    wanted = _DATA_SETS[name].count if name in _DATA_SETS else None
    if wanted is not None and len(items) != wanted:
        raise ValueError(
            f"{folder} holds {len(items)} pictures, {name} has {wanted}: complete it, or name the "
            "folder itself with --data"
        )
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is {limit}: it must be at least 1")
        items = items[:limit]
    return Protocol(
        name=name,
        crop=crop or "full",
        data=folder.resolve().name,
        items=tuple(items),
        captions="the data set" if name == "coco30k" else "nobody",
    )


def with_captions(protocol: Protocol, file: Path) -> Protocol:
    """The protocol with captions of yours.

    Args:
        protocol: gives the pictures.
        file: JSON, name of the picture to caption.

    Raises:
        ValueError: no such file, or a picture has none.
    """
    try:
        content = file.read_bytes()
        captions = json.loads(content)
        valid = all(isinstance(caption, str) for caption in captions.values())
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: no JSON object of captions: {error}") from error
    if not valid:
        raise ValueError(f"{file}: a caption is not a text")
    missing = [item.name for item in protocol.items if item.name not in captions]
    if missing:
        raise ValueError(
            f"--captions has none for {len(missing)} of {len(protocol.items)} pictures, "
            f"{missing[0]} first: give every picture one, '' for none"
        )
    items = tuple(replace(item, caption=captions[item.name]) for item in protocol.items)
    return replace(protocol, items=items, captions=f"{zlib.crc32(content):08x}")


def _locate(name: str, root: Path | None, *, download: bool) -> Path:
    entry = _DATA_SETS[name]
    if root is None:
        raise ValueError(
            f"--data {name}: where are the data sets? Give --data-root or PERCOV2_DATA, or say "
            f"--data {name}=FOLDER"
        )
    for folder in entry.folders:
        if (root / folder).is_dir():
            return root / folder
    target = root / entry.folders[0]
    if not download or entry.archive is None:
        fetch = ", or give --download" if entry.archive is not None else ""
        raise ValueError(f"--data {name}: put {entry.source} into {target}{fetch}")
    try:
        _fetch(entry.archive, target)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--data {name}: cannot be fetched ({error}): put {entry.source} into {target}"
        ) from error
    return target


def _fetch(archive: _Archive, target: Path) -> None:
    """Make a folder of an archive, which holds one of that name; whole or not at all."""
    from torchvision.datasets.utils import download_and_extract_archive

    unpacked = target.with_name(f".{target.name}.unpacked")
    if unpacked.exists():
        shutil.rmtree(unpacked)
    download_and_extract_archive(
        archive.url, str(target.parent), extract_root=str(unpacked), md5=archive.md5
    )
    (unpacked / target.name).rename(target)
    shutil.rmtree(unpacked)


def _folder_items(folder: Path) -> list[Item]:
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"{folder} holds no pictures")
    items: dict[str, Item] = {}
    for path in paths:
        # Streams and reconstructions lie in one folder each.
        name = "__".join(path.relative_to(folder).with_suffix("").parts)
        if not name.isascii() and name != name.encode(errors="replace").decode():
            raise ValueError(f"{path}: its name is not UTF-8: rename it")
        if name in items:
            raise ValueError(f"{items[name].path} and {path} share the name {name}: rename one")
        items[name] = Item(name=name, path=path)
    return list(items.values())


def _coco_items(folder: Path) -> list[Item]:
    places = (folder.parent / "annotations", folder.parent)
    found = [place / "captions_val2014.json" for place in places]
    annotations = next((path for path in found if path.is_file()), None)
    if annotations is None:
        raise ValueError(f"--data coco30k: put captions_val2014.json into {places[0]}")
    images = read_annotations(annotations)
    written = folder.parent / f"coco30k-seed-{COCO_SEED}.txt"
    if written.is_file():
        ids: Sequence[int] = read_list(written)
    else:
        ids = coco30k_list(images, seed=COCO_SEED)
        _keep_list(ids, written)
    return [_coco_item(image, folder) for image in select_images(images, ids)]


def _keep_list(ids: Sequence[int], path: Path) -> None:
    """Write the numbers down; not where that is forbidden, since they are the same each time."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{number}\n" for number in ids), encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _coco_item(image: CocoImage, folder: Path) -> Item:
    return Item(
        name=Path(image.file_name).stem,
        path=folder / image.file_name,
        caption=image.captions[0] if image.captions else None,
    )
