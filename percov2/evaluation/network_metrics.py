"""Metrics of a picture and its original by networks whose weights are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from percov2.evaluation.pixel_metrics import Original
from percov2.evaluation.weights import AbsentError, weights_from
from percov2.messages import first_line


class Lpips:
    """LPIPS (Zhang et al., CVPR 2018), version 0.1, by torchmetrics.

    Args:
        net: backbone, ``alex`` or ``vgg``.
        folder: see `weights_from`.
        device: of the network.

    Raises:
        AbsentError: no weights.
    """

    network, needs = True, "at least 64 pixels a side"

    def __init__(self, net: str, folder: Path | None, device: str) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.name = f"lpips_{net}"
        self.identity = f"{self.name}, torchvision's weights"
        with weights_from(folder, f"LPIPS' {net} network"):
            metric = LearnedPerceptualImagePatchSimilarity(net_type=net)  # type: ignore[arg-type]
        self._net: nn.Module = metric.net.to(device)

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        if min(restored.shape[2:]) < 64:
            return None
        return float(self._net(restored, original.pixels, normalize=True))


class Dists:
    """DISTS (Ding et al., TPAMI 2020) on pictures as they are, not resized, by torchmetrics.

    Raises:
        AbsentError: no weights.
    """

    name, identity, network = "dists", "dists, torchvision's weights", True
    needs = "at least 32 pixels a side"

    def __init__(self, folder: Path | None, device: str) -> None:
        from torchmetrics.functional.image.dists import DISTSNetwork

        with weights_from(folder, "DISTS' VGG network"):
            self._net = DISTSNetwork().to(device).eval()

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        if min(restored.shape[2:]) < 32:
            return None
        return float(self._net(restored, original.pixels))


class _Clip(nn.Module):
    """A CLIP of transformers that answers with tensors, which torchmetrics expects."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Any:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Any:
        answer = self.model.get_text_features(input_ids=tokens, attention_mask=mask)
        return answer.pooler_output


class ClipScore:
    """CLIP score (Hessel et al., EMNLP 2021, without its factor): 100 max(cos, 0).

    Args:
        model: directory or hub id of a CLIP.
        device: of the network.

    Raises:
        AbsentError: the model is not to be had.
    """

    name, network, needs = "clip_score", True, "a caption (--captions)"

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.identity = f"clip_score, {model}"
        with _absent_unless_loaded(f"CLIP {model}"):
            network = CLIPModel.from_pretrained(model)
            self._processor = AutoProcessor.from_pretrained(model)
        self._longest = int(network.config.text_config.max_position_embeddings)
        self._clip = _Clip(network).to(device).eval()

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        from torchmetrics.functional.multimodal import clip_score

        if not original.caption:
            return None
        pixels = (restored[0] * 255).round().to(torch.uint8)
        score = clip_score(pixels, original.caption, lambda: (self._clip, self._process))
        return float(score)

    def _process(self, **inputs: Any) -> Any:
        """Inputs of the network. torchmetrics cuts long captions without keeping their end token,
        which is where CLIP reads them: all would score alike.
        """
        if "text" in inputs:
            inputs |= {"truncation": True, "max_length": self._longest}
        return self._processor(**inputs)


class SegmentationAgreement:
    """mIoU of a segmentation network's answer to the picture, against that to the original.

    The mean is over the classes that occur in either answer, picture by picture.

    Args:
        model: directory or hub id of a network for semantic segmentation.
        device: of the network.

    Raises:
        AbsentError: the model is not to be had.
    """

    name, network, needs = "miou", True, "a picture"

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        self.identity = f"miou, {model}"
        with _absent_unless_loaded(f"segmentation network {model}"):
            network = AutoModelForSemanticSegmentation.from_pretrained(model)
            self._processor = AutoImageProcessor.from_pretrained(model)
        self._network, self._device = network.to(device).eval(), device

    def segment(self, image: Tensor) -> Tensor:
        """Class of every pixel (1, H, W) of a picture (1, 3, H, W) in [0, 1]."""
        pixels = (image[0] * 255).round().to(torch.uint8).cpu()
        inputs = self._processor(images=pixels, return_tensors="pt").to(self._device)
        answer = self._processor.post_process_semantic_segmentation(
            self._network(**inputs), target_sizes=[tuple(image.shape[2:])]
        )
        classes: Tensor = answer[0]
        return classes[None]

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        # By a confusion matrix: `mean_iou` would hold every class's picture, 10 GB at 2K.
        from torchmetrics.functional.classification import multiclass_jaccard_index

        if self.name not in original.derived:
            original.derived[self.name] = self.segment(original.pixels)
        return float(
            multiclass_jaccard_index(
                self.segment(restored),
                original.derived[self.name],
                num_classes=self._network.config.num_labels,
                average="macro",
            )
        )


@contextmanager
def _absent_unless_loaded(what: str) -> Iterator[None]:
    """Name what transformers raises of a model that it cannot load as the reason of absence."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise AbsentError(f"{what} is not to be had ({first_line(error)})") from error
