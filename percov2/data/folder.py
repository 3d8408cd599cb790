"""A folder of pictures, captions in `.txt` files beside them if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from percov2.data.filters import NO_FILTERS, Filters
from percov2.data.module import FileDataModule
from percov2.data.samples import RawSample, picture_decoder
from percov2.files import list_images


class FolderRecords:
    """Pictures of a folder, sorted by path, as raw samples.

    A record's key is the path without suffix; its caption is "" where there is no `.txt`.

    Raises:
        ValueError: no folder, or no picture in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = list_images(folder)
        if not self.paths:
            raise ValueError(f"{folder} holds no picture")

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> RawSample:
        """Bytes of one picture and of its caption."""
        path = self.paths[index]
        text = path.with_suffix(".txt")
        return {
            "__key__": path.relative_to(self.folder).with_suffix("").as_posix(),
            "__url__": str(path),
            path.suffix[1:].lower(): path.read_bytes(),
            "txt": text.read_bytes() if text.is_file() else b"",
        }


class FolderDataModule(FileDataModule):
    """Training and validation batches from two folders.

    Args:
        train_folder: searched recursively.
        val_folder: searched recursively.
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        color_jitter: likewise; 0, the default, leaves colours as they are.
        batch_size: per process.
        val_samples: number of validation images, the first good ones by path; None takes all.
        num_workers: loader processes.
        seed: of order, crops and captions.
        captions: weights of caption sources, see `CaptionMix`; None is ``{txt: 1}``.
        filters: which samples are refused; in validation too.
        max_consecutive_faults: more unusable pictures in a row are an error.

    Raises:
        ValueError: a folder without pictures, or a picture that both folders hold.
    """

    def __init__(
        self,
        *,
        train_folder: Path,
        val_folder: Path,
        crop: int,
        max_zoom: float,
        batch_size: int,
        val_samples: int | None = None,
        num_workers: int = 1,
        seed: int = 0,
        captions: dict[str, float] | None = None,
        color_jitter: float = 0.0,
        filters: Filters = NO_FILTERS,
        max_consecutive_faults: int = 100,
    ) -> None:
        train, val = FolderRecords(train_folder), FolderRecords(val_folder)
        super().__init__(
            train_records=train,
            val_records=val,
            source=str(train_folder),
            decoder=picture_decoder(
                crop=crop,
                max_zoom=max_zoom,
                color_jitter=color_jitter,
                captions=captions,
                filters=filters,
            ),
            batch_size=batch_size,
            val_samples=val_samples,
            num_workers=num_workers,
            seed=seed,
            max_consecutive_faults=max_consecutive_faults,
        )
        refuse_shared(train.paths, val.paths)
        self._names = [path.relative_to(train_folder).as_posix() for path in train.paths]

    def data_names(self) -> list[str]:
        """See `StreamDataModule.data_names`."""
        return self._names


def refuse_shared(train: Sequence[Path], val: Sequence[Path]) -> None:
    """Refuse pictures that are in both lists.

    Raises:
        ValueError: there are some.
    """
    trained = {path.resolve() for path in train}
    shared = [path for path in val if path.resolve() in trained]
    if shared:
        raise ValueError(
            f"{len(shared)} pictures are in training and in validation, {shared[0]} first: "
            "move them out of one of the folders"
        )
