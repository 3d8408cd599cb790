"""Stage 0 of the embedded default: the light autoencoder. SD3 brings its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from percov2.analysis.autoencoder import PatchAutoencoder
from percov2.components import save_autoencoder
from percov2.data.samples import Batch
from percov2.training.optimization import Optimization, Phase, build_optimizer


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Mean PSNR in dB of images (B, 3, H, W) in [-1, 1], clamped."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return -10 * torch.log10(error).mean()


class AutoencoderStage(L.LightningModule):
    """Fits the principal components, then learns the residual of `PatchAutoencoder`.

    Args:
        autoencoder: to be trained.
        optimization: of the residual networks.
        component_batches: training batches whose patches give the principal components.
    """

    def __init__(
        self,
        *,
        autoencoder: PatchAutoencoder,
        optimization: Optimization,
        component_batches: int = 20,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.optimization = optimization
        self.component_batches = component_batches

    def setup(self, stage: str) -> None:
        """Convolutions are up to twice as fast with channels last, on CPU and GPU.

        Before the strategy wraps the module: DDP's buckets then have the gradients' layout.
        """
        self.to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        """Fit the linear part, once: a resumed run has it in its checkpoint."""
        if self.global_step:
            return
        batches = iter(self.trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        images = [next(batches)["image"] for _ in range(self.component_batches)]
        self.autoencoder.fit_principal_components([image.to(self.device) for image in images])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Squared error of the reconstruction."""
        image = batch["image"]
        reconstruction = self.autoencoder.decode(self.autoencoder.encode(image))
        loss = F.mse_loss(reconstruction, image)
        self.log("train/mse", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """PSNR of the reconstruction."""
        image = batch["image"]
        decoded = self.autoencoder.decode(self.autoencoder.encode(image))
        self.log(
            "val/psnr", psnr(decoded, image), batch_size=len(image), sync_dist=True, prog_bar=True
        )

    def configure_optimizers(self) -> Any:
        """AdamW over the residual networks."""
        last = int(self.trainer.estimated_stepping_batches)
        return build_optimizer(
            Phase(
                optimization=self.optimization,
                parameters=self.autoencoder.parameters(),
                first=0,
                last=last,
            ),
            strategy=self.trainer.strategy,
        )

    def export(self, directory: Path) -> None:
        """Write the `autoencoder` folder."""
        save_autoencoder(self.autoencoder, directory)
