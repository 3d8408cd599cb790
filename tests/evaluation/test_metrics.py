from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image as reference
import torchvision
from PIL import ImageFilter
from torchmetrics.functional.image.dists import deep_image_structure_and_texture_similarity
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from percov2.evaluation.metrics import MetricOptions, make_suite
from percov2.evaluation.network_metrics import ClipScore, Dists, Lpips, SegmentationAgreement
from percov2.evaluation.pixel_metrics import (
    GradientEnergy,
    GradientMagnitude,
    MsSsim,
    Original,
    PairMetric,
    Psnr,
    gradient_magnitude,
)
from percov2.evaluation.weights import weights_from
from tests.evaluation.pictures import make_picture, pixels_of
from tests.tiny_models import randomise, tiny_clip_tokenizer


def _pair(size: tuple[int, int]) -> tuple[Original, torch.Tensor]:
    image = make_picture(0, size)
    blurred = image.filter(ImageFilter.GaussianBlur(1.5))
    return Original(pixels=pixels_of(image), caption="a dog on a beach"), pixels_of(blurred)


def test_psnr_and_ms_ssim_are_those_of_torchmetrics() -> None:
    original, restored = _pair((200, 176))
    psnr = reference.peak_signal_noise_ratio(restored, original.pixels, data_range=1.0)
    ms_ssim = reference.multiscale_structural_similarity_index_measure(
        restored, original.pixels, data_range=1.0
    )
    assert Psnr()(original, restored) == pytest.approx(float(psnr))
    assert MsSsim()(original, restored) == pytest.approx(float(ms_ssim), abs=1e-5)
    assert float(ms_ssim) < 0.999
    assert Psnr()(original, original.pixels) is None, "infinite"
    for side in (160, 161, 175):
        small, restored = _pair((side, 200))
        assert MsSsim()(small, restored) is None


@pytest.mark.parametrize("metric", [GradientEnergy(), GradientMagnitude()], ids=lambda m: m.name)
def test_gradient_metrics_tell_blur_from_noise(metric: PairMetric) -> None:
    original, blurred = _pair((64, 48))
    noisy = (original.pixels + 0.1 * torch.randn(original.pixels.shape)).clamp(0, 1)
    assert metric(original, original.pixels) == 1
    blur, noise = metric(original, blurred), metric(original, noisy)
    assert blur is not None
    assert noise is not None
    assert blur < 0.8 < 1.5 < noise
    flat = Original(pixels=torch.full((1, 3, 8, 8), 0.5), caption=None)
    assert metric(flat, noisy) is None


def test_gradient_energy_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(1, 3, 2, 2)
    original = Original(pixels=image, caption=None)
    # Down: 0 and -1, mean square 1/2; across: 1 and 0, mean square 1/2.
    assert GradientEnergy()(original, image / 2) == pytest.approx(0.25)


def test_gradient_magnitude_by_hand() -> None:
    image = torch.tensor([[0.0, 3.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).expand(1, 3, 3, 3)
    # Lengths (4, 3), (-3, 0), (-4, -4), (0, 0): 5, 3, the root of 32, 0.
    assert gradient_magnitude(image) == pytest.approx((8 + 32**0.5) / 4)
    original = Original(pixels=image, caption=None)
    assert GradientMagnitude()(original, image / 2) == pytest.approx(0.5)


def _backbone(folder: Path, name: str, file: str) -> None:
    """Random weights under the hub's file name; the classifier takes no space."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    state = {
        key: torch.zeros(1).expand(value.shape) if key.startswith("classifier") else value
        for key, value in model.state_dict().items()
    }
    torch.save(state, folder / file)


@pytest.mark.parametrize(
    ("net", "backbone", "file"),
    [
        ("alex", "alexnet", "alexnet-owt-7be5be79.pth"),
        pytest.param("vgg", "vgg16", "vgg16-397923af.pth", marks=pytest.mark.slow),
    ],
)
def test_lpips_is_that_of_torchmetrics(tmp_path: Path, net: str, backbone: str, file: str) -> None:
    _backbone(tmp_path, backbone, file)
    original, restored = _pair((80, 64))
    hub = torch.hub.get_dir()
    metric = Lpips(net, tmp_path, "cpu")
    assert torch.hub.get_dir() == hub, "the hub's folder is as it was"
    with weights_from(tmp_path, "the reference"):
        expected = reference.learned_perceptual_image_patch_similarity(
            restored,
            original.pixels,
            net_type=net,  # type: ignore[arg-type]
            normalize=True,
        )
    assert metric(original, restored) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 0
    small, restored = _pair((80, 63))
    assert metric(small, restored) is None


@pytest.mark.slow
def test_dists_is_that_of_torchmetrics(tmp_path: Path) -> None:
    _backbone(tmp_path, "vgg16", "vgg16-397923af.pth")
    original, restored = _pair((80, 64))
    metric = Dists(tmp_path, "cpu")
    with weights_from(tmp_path, "the reference"):
        expected = deep_image_structure_and_texture_similarity(restored, original.pixels)
    assert metric(original, restored) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 0


def test_clip_score_is_the_models_own_cosine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    layers = {"num_hidden_layers": 2, "projection_dim": 8}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **size, **layers}
    vision = {"image_size": 32, "patch_size": 8, **size, **layers}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[key] = getattr(tokenizer, key)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).eval()
    randomise(model, std=0.2)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    metric = ClipScore(str(tmp_path), "cpu")
    scores = []
    for seed in range(4):
        image = make_picture(seed)
        original = Original(pixels=pixels_of(image), caption="a dog on a beach")
        inputs = processor(text=[original.caption], images=image, return_tensors="pt", padding=True)
        with torch.no_grad():
            answer = model(**inputs)
            found = metric(original, original.pixels)
        cosine = answer.logits_per_image / model.logit_scale.exp()
        assert found == pytest.approx(max(100 * float(cosine), 0), abs=1e-3)
        scores.append(found)
    assert any(score for score in scores), "a test of clamped scores shows nothing"
    # Longer than the network reads: what it reads still matters.
    long = []
    for first in ("a dog", "the red barn"):
        original.caption = first + " on a beach" * 20
        with torch.no_grad():
            long.append(metric(original, original.pixels))
    assert long[0] != long[1]
    original.caption = None
    assert metric(original, original.pixels) is None


def test_segmentation_agreement_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 8],
        num_attention_heads=[1, 1],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=6,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    randomise(model, std=0.5)
    model.save_pretrained(tmp_path)
    processor = SegformerImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    metric = SegmentationAgreement(str(tmp_path), "cpu")
    images = [make_picture(3), make_picture(3).filter(ImageFilter.GaussianBlur(4))]
    answers = []
    with torch.no_grad():
        for image in images:
            logits = model(**processor(images=image, return_tensors="pt")).logits
            large = torch.nn.functional.interpolate(
                logits, size=(48, 64), mode="bilinear", align_corners=False
            )
            answers.append(large.argmax(1))
        found = metric(Original(pixels=pixels_of(images[0]), caption=None), pixels_of(images[1]))
    ious = []
    for number in range(6):
        first, second = (answer == number for answer in answers)
        if (first | second).any():
            ious.append(float((first & second).sum() / (first | second).sum()))
    assert len(ious) > 1
    assert found == pytest.approx(sum(ious) / len(ious), abs=1e-5)
    assert found != 1


def test_suite_says_what_is_absent_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    options = MetricOptions(
        weights=tmp_path, clip_model=str(tmp_path), segmentation_model=str(tmp_path)
    )
    names = ["psnr", "lpips_alex", "clip_score", "miou"]
    suite = make_suite(names, options, captions=False)
    assert list(suite.pairs) == ["psnr"]
    assert suite.absent.keys() == set(names) - {"psnr"}
    assert "LPIPS' alex network" in suite.absent["lpips_alex"]
    assert "--captions" in suite.absent["clip_score"]
    assert str(tmp_path) in suite.absent["miou"]
    assert str(tmp_path) in make_suite(["clip_score"], options, captions=True).absent["clip_score"]
    with pytest.raises(ValueError, match=r"metric 'fidd': choose from psnr, "):
        make_suite(["fidd"], options, captions=False)


def test_a_network_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from percov2.evaluation import features
    from tests.evaluation.pictures import TinyFeatures

    asked: list[str] = []

    def inception(folder: Path | None, device: str) -> torch.nn.Module:
        asked.append(device)
        return TinyFeatures()

    monkeypatch.setattr(features, "inception", inception)
    suite = make_suite(["fid", "kid", "patch_fid", "patch_fid_64"], MetricOptions(), captions=False)
    assert asked == ["cpu"]
    assert len(suite.sets) == 4
    assert list(suite.extractors) == ["inception", "inception_patch_256", "inception_patch_64"]
    image = torch.zeros(1, 3, 512, 768, dtype=torch.uint8)
    counts = [len(extract(image)) for extract in suite.extractors.values()]  # type: ignore[arg-type]
    assert counts == [1, 6 + 2, 96 + 77]


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")
