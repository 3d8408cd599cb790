"""Trains a stage: ``python -m percov2.fit --config configs/tiny/stage1.yaml [--key value ...]``.

A LightningCLI whose configuration is OmegaConf; later ``--config`` files and command-line fields
override earlier ones. The resolved configuration is written into the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Values that several fields of a configuration refer to as ``${vars.NAME}``.

    Attributes:
        run: folder of the run: curves, checkpoints, exported model.
        data: folder of the data sets.
        autoencoder: directory with an autoencoder (stage 1).
        tokenizer: stage 1 directory (stage 2).
        name: of the model (stage 2).
        schedule: of the token groups.
        reduction: latents per token along an axis (stage 1).
        codebook_size: V (stage 1).
        feature_channels: M (stage 1).
        tokenizer_steps: steps before the tokenizer is frozen (stage 1).
    """

    run: str
    data: str
    autoencoder: str | None = None
    tokenizer: str | None = None
    name: str | None = None
    schedule: str | None = None
    reduction: int | None = None
    codebook_size: int | None = None
    feature_channels: int | None = None
    tokenizer_steps: int | None = None


class FitCLI(LightningCLI):
    """LightningCLI with the few options that are percov2's."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--ckpt_path``: resume a run from one of its checkpoints."""
        parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_class_arguments(Variables, "vars", instantiate=False)


def main(args: list[str] | None = None) -> L.Trainer:
    """Train as the command line says; returns the trainer (for tests and notebooks)."""
    cli = FitCLI(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=args,
        parser_kwargs={"parser_mode": "omegaconf+"},
        save_config_kwargs={"overwrite": True},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    return cli.trainer


if __name__ == "__main__":
    main()
