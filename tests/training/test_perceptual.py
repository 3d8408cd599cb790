"""LPIPS as a loss: torchmetrics' value, a gradient, no weights in checkpoints."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from percov2.training.perceptual import PerceptualLoss


@pytest.mark.usefixtures("random_backbone")
def test_value_is_torchmetrics_and_the_gradient_reaches_the_picture() -> None:
    picture, reference = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    picture.requires_grad_()
    loss = PerceptualLoss("squeeze")(picture, reference)
    expected = learned_perceptual_image_patch_similarity(
        picture.detach(), reference, net_type="squeeze"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() > 0
    loss.backward()
    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0


@pytest.mark.usefixtures("random_backbone")
def test_no_weight_of_the_network_is_trained() -> None:
    assert not any(p.requires_grad for p in PerceptualLoss("squeeze").net.parameters())


def test_weights_that_cannot_be_had_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match="TORCH_HOME") as error:
        PerceptualLoss("squeeze")
    assert "\n" not in str(error.value)
