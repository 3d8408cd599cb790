from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation import protocols
from percov2.evaluation.protocols import CROPS, find_protocol, with_captions
from tests.evaluation.pictures import make_folder, make_picture


def test_any_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", 3)
    (folder / "sub").mkdir()
    make_picture(9).save(folder / "sub" / "a.jpg")
    found = find_protocol(str(folder))
    assert (found.name, found.crop, found.data) == ("folder", "full", "mine")
    assert [item.name for item in found.items] == ["a", "b", "c", "sub__a"]
    assert found.read(found.items[1]).tobytes() == make_picture(1).tobytes()
    assert len(find_protocol(str(folder), limit=2).items) == 2
    make_picture(9).save(folder / "b.jpg")
    with pytest.raises(ValueError, match="share the name b: rename one"):
        find_protocol(str(folder))


def test_kodak_must_be_complete(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "kodak", 24)
    for found in (
        find_protocol("kodak", root=tmp_path),
        find_protocol(f"kodak={folder}"),
        find_protocol("kodak", root=tmp_path, crop="squash-512", limit=5),
    ):
        assert found.name == "kodak"
    assert (found.crop, len(found.items)) == ("squash-512", 5)
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"holds 23 pictures, kodak has 24: complete it"):
        find_protocol("kodak", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "--data nowhere is neither a folder nor one of kodak, coco30k"),
        ({"data": "kodak"}, "Give --data-root or PERCOV2_DATA, or say --data kodak=FOLDER"),
        ({"data": "kodak", "root": True}, r"put kodim01.png to .* into .*kodak$"),
        ({"data": "div2k", "root": True}, r"put DIV2K_valid_HR.zip .*, or give --download$"),
        ({"data": "."}, "holds no pictures"),
        ({"data": ".", "crop": "middle"}, "crop 'middle': choose from full, centre-512"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if options.get("root"):
        options = {**options, "root": tmp_path}
    with pytest.raises(ValueError, match=message):
        find_protocol(**options)  # type: ignore[arg-type]


def test_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        find_protocol(str(make_folder(tmp_path / "x", 1)), limit=0)


def _refuse_to_write(path: Path) -> NoReturn:
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_coco30k_writes_its_list_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "coco" / "val2014"
    pictures.mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    content = {
        "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(40)],
        "annotations": [{"id": n, "image_id": n, "caption": f"thing {n}"} for n in range(40)],
    }
    annotations = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    with pytest.raises(ValueError, match=r"put captions_val2014.json into .*annotations"):
        find_protocol("coco30k", root=tmp_path)
    annotations.write_text(json.dumps(content))
    original = protocols.coco30k_list
    monkeypatch.setattr(
        protocols, "coco30k_list", lambda images, *, seed: original(images, seed=seed, count=30)
    )
    first = find_protocol("coco30k", root=tmp_path)
    assert first.crop == "crop-512"
    written = (tmp_path / "coco" / "coco30k-seed-0.txt").read_text().split()
    assert [item.name for item in first.items] == [f"COCO_val2014_{int(n):012d}" for n in written]
    assert first.items[0].caption == f"thing {written[0]}"
    (tmp_path / "coco" / "coco30k-seed-0.txt").rename(tmp_path / "kept")
    with monkeypatch.context() as read_only:
        read_only.setattr(protocols, "atomic_path", _refuse_to_write)
        assert find_protocol("coco30k", root=tmp_path) == first
    (tmp_path / "kept").rename(tmp_path / "coco" / "coco30k-seed-0.txt")
    monkeypatch.setattr(protocols, "coco30k_list", None)  # it is read from now on
    assert find_protocol("coco30k", root=tmp_path) == first


def test_crops_keep_or_squash_the_aspect() -> None:
    wide = np.zeros((600, 1200, 3), np.uint8)
    wide[:, 300:900] = 255  # a white square in the middle
    image = Image.fromarray(wide)
    crop = np.asarray(CROPS["crop-512"](image))
    assert crop.shape == (512, 512, 3)
    assert crop.min() > 240, "the square fills the crop"
    squash = np.asarray(CROPS["squash-512"](image))
    assert squash.shape == (512, 512, 3)
    assert (squash[256] > 128).all(1).sum() == 256, "half of the width"
    centre = CROPS["centre-512"](image)
    assert centre.tobytes() == image.crop((344, 44, 856, 556)).tobytes()
    assert CROPS["full"](image) is image


def test_picture_too_small_for_its_crop_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", 1)
    found = find_protocol(str(folder), crop="centre-512")
    with pytest.raises(ValueError, match=r"a\.png: 64x48 pixels are less than .* crop-512"):
        found.read(found.items[0])


def test_captions_of_yours(tmp_path: Path) -> None:
    found = find_protocol(str(make_folder(tmp_path / "x", 2)))
    file = tmp_path / "captions.json"
    file.write_text('{"a": "one", "b": "", "other": "x"}')
    captioned = with_captions(found, file)
    assert [item.caption for item in captioned.items] == ["one", ""]
    assert captioned.captions != found.captions
    for content, message in (
        ('{"a": "one"}', r"none for 1 of 2 pictures, b first"),
        ('{"a": 1, "b": "x"}', "not a text"),
        ('["a"]', "no JSON object of captions"),
        ("{", "no JSON object of captions"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            with_captions(found, file)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the folder ``served``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (picture,) = make_folder(tmp_path / "pictures", 1).iterdir()
    os.rename(picture, os.fsencode(tmp_path / "pictures") + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"caf.*\.png: its name is not UTF-8: rename it"):
        find_protocol(str(tmp_path / "pictures"))
    os.rename(os.fsencode(tmp_path / "pictures") + b"/caf\xe9.png", tmp_path / "pictures/café.png")
    assert [item.name for item in find_protocol(str(tmp_path / "pictures")).items] == ["café"]


def test_download_checks_what_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    pictures = make_folder(tmp_path / "DIV2K_valid_HR", 2)
    archive = tmp_path / "served" / "DIV2K_valid_HR.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in pictures.iterdir():
            file.write(path, f"DIV2K_valid_HR/{path.name}")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    entry = replace(
        protocols._DATA_SETS["div2k"],
        count=2,
        archive=protocols._Archive(url=f"{server}/{archive.name}", md5=md5),
    )
    monkeypatch.setitem(protocols._DATA_SETS, "div2k", entry)
    root = tmp_path / "data"
    half = root / ".DIV2K_valid_HR.unpacked" / "DIV2K_valid_HR"
    half.mkdir(parents=True)
    (half / "c.png").write_bytes(b"of a run that was killed while it unpacked")
    found = find_protocol("div2k", root=root, download=True)
    assert [item.name for item in found.items] == ["a", "b"]
    assert sorted(path.name for path in root.iterdir()) == [entry.folders[0], archive.name]
    assert find_protocol("div2k", root=root) == found
    wrong = replace(entry, archive=protocols._Archive(url=f"{server}/{archive.name}", md5="0" * 32))
    monkeypatch.setitem(protocols._DATA_SETS, "div2k", wrong)
    with pytest.raises(ValueError, match=r"cannot be fetched .*: put DIV2K_valid_HR.zip"):
        find_protocol("div2k", root=tmp_path / "elsewhere", download=True)
