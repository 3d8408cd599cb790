"""Trains a stage: ``python -m percov2.fit --config configs/tiny/stage1.yaml [--key value ...]``.

A LightningCLI whose configuration is OmegaConf; later ``--config`` files and command-line fields
override earlier ones. The resolved configuration is written into the run's folder.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from percov2.training.callbacks.export import CONFIG, ExportModel, NothingTrainedError
from percov2.training.callbacks.last_checkpoint import LastCheckpoint
from percov2.training.callbacks.stop_on_signal import StoppedBySignal
from percov2.training.checkpointing import AtomicCheckpointIO, resolve_checkpoint
from percov2.training.config_errors import explain
from percov2.training.convert import convert
from percov2.training.resume import check_checkpoint
from percov2.training.strategy import ZeroStrategy


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Values that several fields of a configuration refer to as ``${vars.NAME}``.

    Attributes:
        run: folder of the run: curves, checkpoints, exported model.
        data: folder of the data sets.
        autoencoder: directory with an autoencoder (stage 1).
        tokenizer: stage 1 directory (stage 2, and stage 1 that retrains a masked transformer).
        start: model directory that is trained on from (stage 2).
        discriminator: checkpoint whose discriminator goes on (stage 2 with an adversary).
        name: of the model (stage 2).
        schedule: of the token groups.
        reduction: latents per token along an axis (stage 1).
        codebook_size: V (stage 1).
        feature_channels: M (stage 1).
        rate: name of the rate, part of folder names.
        lpips_weight: of the perceptual term (stage 2).
        tokenizer_steps: steps before the tokenizer is frozen (stage 1).
    """

    run: str
    data: str
    autoencoder: str | None = None
    tokenizer: str | None = None
    start: str | None = None
    discriminator: str | None = None
    name: str | None = None
    schedule: str | None = None
    reduction: int | None = None
    codebook_size: int | None = None
    feature_channels: int | None = None
    tokenizer_steps: int | None = None
    rate: str | None = None
    lpips_weight: float | None = None


class FitParser(LightningArgumentParser):
    """Reports what is wrong with a configuration in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2, or raise where jsonargparse tries one type after another."""
        if not self.exit_on_error:
            super().error(message, ex)
        names = [action.dest for action in self._actions if isinstance(action.dest, str)]
        self.exit(2, f"percov2.fit: error: {explain(message, names)}\n")


class FitCLI(LightningCLI):
    """LightningCLI with the few options that are percov2's.

    Args:
        args: command line; None for that of the process.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=args,
            parser_class=FitParser,
            # Abbreviations would let a slip of the pen set another field.
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--ckpt_path``: resume a run; ``auto`` takes its newest checkpoint, if it has one."""
        parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_class_arguments(Variables, "vars", instantiate=False)

    def exports(self) -> list[Path]:
        """The model directories that training ends with."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [one.directory for one in callbacks if isinstance(one, ExportModel)]

    def checkpoint(self) -> Path | None:
        """What ``--ckpt_path`` means; ``auto`` looks where this run's callbacks write.

        Raises:
            ValueError: there is no such path, or nothing that writes one.
        """
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = (LastCheckpoint, ModelCheckpoint)
        folders = [one.dirpath for one in callbacks if isinstance(one, kinds)]
        return resolve_checkpoint(
            self.config.ckpt_path, [Path(folder) for folder in folders if folder is not None]
        )

    def write_config(self, directory: Path) -> None:
        """The resolved configuration as ``training.yaml``, beside the weights it led to."""
        config = self.parser.dump(self.config, skip_unset=False, format="yaml")
        (directory / CONFIG).write_text(config, encoding="utf-8")

    def export_checkpoint(self, checkpoint: Path, directory: Path) -> None:
        """Write the model that a checkpoint of this configuration leads to.

        Raises:
            ValueError: see `convert`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.write_config(Path(folder))
            config = Path(folder, CONFIG)
            which = convert(config=config, checkpoint=checkpoint, output=directory)
        print(f"wrote {directory} ({which} weights of {checkpoint})")


def check_writable(run: Path) -> None:
    """Make a run's folder, and refuse one that cannot hold files before a step is trained.

    Raises:
        ValueError: names the folder.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"vars.run is {run}, where nothing can be written ({error.strerror}): choose another "
            "folder, get write permission or free space"
        ) from error


def main(args: list[str] | None = None) -> L.Trainer:
    """Train as the command line says; returns the trainer (for tests and notebooks).

    A run that was killed between its last checkpoint and its export is exported from the former.

    Raises:
        NothingTrainedError: the run had ended and its model is there.
        ValueError: a field, a file or a checkpoint is wrong; says which.
        SystemExit: the configuration cannot be parsed (code 2, the reason on stderr).
        StoppedBySignal: a signal ended the run (code 85); it can be resumed.
    """
    cli = FitCLI(args)
    run = Path(cli.config.vars.run)
    check_writable(run)
    checkpoint = cli.checkpoint()
    if not isinstance(cli.trainer.strategy, ZeroStrategy):
        cli.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if checkpoint is not None:
        check_checkpoint(checkpoint, cli.model, cli.trainer)
    missing = [directory for directory in cli.exports() if not (directory / CONFIG).exists()]
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    except NothingTrainedError:
        if not missing:
            raise
        if cli.trainer.is_global_zero:
            assert checkpoint is not None
            for directory in missing:
                cli.export_checkpoint(checkpoint, directory)
    except (
        SIGTERMException
    ) as error:  # of Lightning's own handler: its exit code is that of success
        raise StoppedBySignal from error
    if cli.trainer.is_global_zero:
        for directory in cli.exports():
            cli.write_config(directory)
    # Schedulers end what is left of a job some time after its first process has ended.
    cli.trainer.strategy.barrier("export")
    return cli.trainer


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"percov2.fit: error: {explain(str(error), [])}", file=sys.stderr)
        sys.exit(2)
