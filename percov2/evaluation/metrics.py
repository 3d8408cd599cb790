"""Metrics by name, of a picture and of a set of pictures.

| name | of | computed by |
| --- | --- | --- |
| psnr | pair | torchmetrics, all three channels together, dB |
| ms_ssim | pair | torchmetrics, RGB, at least 176 pixels a side |
| gradient_energy | pair | `gradient_energy`: 1 is the original's amount of detail |
| gradient_magnitude | pair | `gradient_magnitude`: the same, not squared |
| lpips_alex, lpips_vgg | pair | torchmetrics |
| dists | pair | torchmetrics |
| clip_score | picture and caption | torchmetrics with a CLIP of transformers |
| miou | pair | torchmetrics on a segmentation network's two answers |
| fid | set | torchmetrics, Inception features of whole pictures |
| kid | set | torchmetrics, the same features |
| patch_fid | set | FID of 256-pixel patches on the two grids of HiFiC |
| patch_fid_64 | set | the same with 64-pixel patches, for sets like Kodak |
| efficientnet_frechet | set | Fréchet distance of EfficientNet-Lite1's features of 128-pixel \
patches at every multiple of 64 pixels: not an FID, and comparable only with itself |

What cannot be measured is absent with its reason, and is never replaced by something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from percov2.evaluation import features
from percov2.evaluation.features import Extractor, Patches, SetMetric, WholePictures
from percov2.evaluation.network_metrics import ClipScore, Dists, Lpips, SegmentationAgreement
from percov2.evaluation.pixel_metrics import (
    GradientEnergy,
    GradientMagnitude,
    MsSsim,
    PairMetric,
    Psnr,
)
from percov2.evaluation.weights import AbsentError

PAIR_METRICS = (
    "psnr",
    "ms_ssim",
    "gradient_energy",
    "gradient_magnitude",
    "lpips_alex",
    "lpips_vgg",
    "dists",
    "clip_score",
    "miou",
)
SET_METRICS = ("fid", "kid", "patch_fid", "patch_fid_64", "efficientnet_frechet")
DEFAULT_METRICS = tuple(name for name in PAIR_METRICS + SET_METRICS if name != "patch_fid_64")

CLIP_MODEL = "openai/clip-vit-large-patch14"
SEGMENTATION_MODEL = "nvidia/segformer-b5-finetuned-ade-640-640"

_FEATURES_OF = {
    "fid": "inception",
    "kid": "inception",
    "patch_fid": "inception_patch_256",
    "patch_fid_64": "inception_patch_64",
    "efficientnet_frechet": "efficientnet_patch_128",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricOptions:
    """Where networks come from.

    Attributes:
        device: of the networks.
        weights: see `weights_from`.
        clip_model: see `ClipScore`.
        segmentation_model: see `SegmentationAgreement`.
    """

    device: str = "cpu"
    weights: Path | None = None
    clip_model: str = CLIP_MODEL
    segmentation_model: str = SEGMENTATION_MODEL


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The metrics of a run.

    Attributes:
        pairs: by name.
        extractors: by name of the feature set.
        sets: metric of two sets of features, by name.
        absent: why a metric that was asked for is not there, by name.
    """

    pairs: dict[str, PairMetric]
    extractors: dict[str, Extractor]
    sets: dict[str, SetMetric]
    absent: dict[str, str]

    def identities(self) -> dict[str, str]:
        """What may not change while a run is resumed."""
        pairs = {name: metric.identity for name, metric in self.pairs.items()}
        return pairs | {name: extract.identity for name, extract in self.extractors.items()}

    def features_of(self, name: str) -> str:
        """The feature set of a set metric."""
        return _FEATURES_OF[name]


def make_suite(names: Sequence[str], options: MetricOptions, *, captions: bool) -> Suite:
    """Load what the named metrics need; what is not to be had becomes absent.

    Args:
        names: of `PAIR_METRICS` and `SET_METRICS`.
        options: see `MetricOptions`.
        captions: whether there are any; without them no CLIP is loaded.

    Raises:
        ValueError: a name that is none of a metric.
    """
    unknown = [name for name in names if name not in PAIR_METRICS + SET_METRICS]
    if unknown:
        raise ValueError(
            f"metric {unknown[0]!r}: choose from {', '.join(PAIR_METRICS + SET_METRICS)}"
        )
    suite = Suite(pairs={}, extractors={}, sets={}, absent={})
    networks: dict[str, nn.Module | AbsentError] = {}
    for name in names:
        try:
            if name in PAIR_METRICS:
                suite.pairs[name] = _make_pair(name, options, captions=captions)
            else:
                wanted = _FEATURES_OF[name]
                if wanted not in suite.extractors:
                    suite.extractors[wanted] = _make_extractor(wanted, options, networks)
                kernel = name == "kid"
                suite.sets[name] = (
                    partial(features.kernel_distance, paired=True)
                    if kernel
                    else features.frechet_distance
                )
        except AbsentError as error:
            suite.absent[name] = str(error)
    return suite


def _make_pair(name: str, options: MetricOptions, *, captions: bool) -> PairMetric:
    if name in ("lpips_alex", "lpips_vgg"):
        return Lpips(name.removeprefix("lpips_"), options.weights, options.device)
    if name == "dists":
        return Dists(options.weights, options.device)
    if name == "clip_score":
        if not captions:
            raise AbsentError("there are no captions: give --captions")
        return ClipScore(options.clip_model, options.device)
    if name == "miou":
        return SegmentationAgreement(options.segmentation_model, options.device)
    plain: dict[str, PairMetric] = {
        "psnr": Psnr(),
        "ms_ssim": MsSsim(),
        "gradient_energy": GradientEnergy(),
        "gradient_magnitude": GradientMagnitude(),
    }
    return plain[name]


def _make_extractor(
    name: str, options: MetricOptions, networks: dict[str, nn.Module | AbsentError]
) -> Extractor:
    """An extractor; networks are loaded, and looked for in vain, once."""
    family = name.partition("_")[0]
    if family not in networks:
        try:
            networks[family] = (
                features.inception(options.weights, options.device)
                if family == "inception"
                else features.PooledEfficientNet(1).to(options.device)
            )
        except AbsentError as error:
            networks[family] = error
    network = networks[family]
    if isinstance(network, AbsentError):
        raise network
    if name == "inception":
        return WholePictures(network, "torch-fidelity's Inception, 2048")
    if isinstance(network, features.PooledEfficientNet):
        return features.efficientnet_patches(network)
    patch = int(name.rpartition("_")[2])
    grids = features.half_shifted_grids(patch)
    return Patches(network, "torch-fidelity's Inception, 2048", patch=patch, grids=grids)
