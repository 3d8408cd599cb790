from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.zoo import image_models

from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.evaluation.competitors import FormatCandidate
from percov2.evaluation.weights import AbsentError
from percov2.evaluation.zoo import ZooFormat, zoo_format
from tests.evaluation.pictures import make_picture


def _untrained(name: str) -> Any:
    def load(quality: int) -> Any:
        torch.manual_seed(quality)
        model = image_models[name](quality=quality + 1, pretrained=False)
        model.update()
        return model.eval()

    return load


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior"])
def test_file_is_decoded_as_the_model_decodes(name: str) -> None:
    zoo = ZooFormat(name, _untrained(name), qualities=2, device="cpu")
    image = make_picture(0, (90, 50))
    data = zoo.encode(image, 1)
    restored = zoo.decode(data)
    assert restored.size == (90, 50)
    with torch.inference_mode():
        pixels = (image_to_tensor(image)[None] + 1) / 2
        padded = torch.nn.functional.pad(pixels, (0, 128 - 90, 0, 64 - 50), mode="replicate")
        model = zoo.model(1)
        answer = model.compress(padded)
        expected = model.decompress(answer["strings"], answer["shape"])["x_hat"]
    assert restored.tobytes() == tensor_to_image(expected[0, :, :50, :90] * 2 - 1).tobytes()
    strings = sum(len(string) for (string,) in answer["strings"])
    assert len(data) == strings + 9 + 4 * (len(answer["strings"]) - 1)


def test_model_is_matched_to_a_rate() -> None:
    name = "bmshj2018-factorized"
    zoo = ZooFormat(name, _untrained(name), qualities=2, device="cpu")
    codec = FormatCandidate(zoo, anchor="percov2 test", rate="same", family=name)
    image = make_picture(0, (90, 50))
    encoded = codec.encode(image, "", 10**6)
    assert not encoded.at_smallest
    assert codec.decode(encoded.data, image.size).size == image.size
    assert codec.encode(image, "", 8).at_smallest


def test_weights_that_are_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(AbsentError, match="CompressAI's bmshj2018-factorized, quality 1"):
        zoo_format("bmshj2018-factorized", weights=tmp_path, device="cpu")
