"""The open inference protocol, asked by the client that others use for it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cliphar.recognizer import Recognizer
from serving_process import problem

triton = pytest.importorskip("tritonclient.http")


@pytest.fixture
def client(api: str) -> Iterator[Any]:
    with triton.InferenceServerClient(api.removeprefix("http://")) as one:
        yield one


def tensor(name: str, values: list[bytes], *, binary: bool = True) -> Any:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, object), binary_data=binary)
    return made


def test_what_the_server_says_of_itself(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mini")
    assert client.is_model_ready("mini", "1")
    assert not client.is_model_ready("maxi")
    assert client.get_server_metadata()["name"] == "cliphar"
    metadata = client.get_model_metadata("mini")
    assert [one["name"] for one in metadata["inputs"]] == ["images", "labels"]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_it_answers_as_the_recogniser_does(client: Any, mini: Recognizer, photos: list[Path], binary: bool) -> None:
    labels = ["taking a photo", "sleeping", "caf\u00e9 visit"]
    contents = [photo.read_bytes() for photo in photos]
    images = contents if binary else [base64.b64encode(content) for content in contents]
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("label", "score", "labels", "scores", "embeddings")
    ]
    asked = [
        tensor("images", images, binary=binary),
        tensor("labels", [label.encode() for label in labels], binary=binary),
    ]
    answer = client.infer("mini", asked, outputs=outputs, request_id="7")
    expected = mini.predict(contents, labels)
    texts = [value.decode() if isinstance(value, bytes) else value for value in answer.as_numpy("label")]
    assert texts == [one.label for one in expected]
    np.testing.assert_allclose(answer.as_numpy("score"), [one.score for one in expected], atol=1e-5)
    scores = answer.as_numpy("scores")
    assert scores.shape == (len(photos), 3)
    np.testing.assert_allclose(scores[0], [dict(expected[0].top)[label] for label in labels], atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("embeddings"), np.array([*mini.embed_images(contents)], "f"), atol=1e-5)
    assert answer.get_response()["id"] == "7"


def test_pixels(client: Any, mini: Recognizer) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (2, 48, 64, 3), np.uint8)
    images = triton.InferInput("images", list(pixels.shape), "UINT8")
    images.set_data_from_numpy(pixels)
    answer = client.infer("mini", [images], outputs=[triton.InferRequestedOutput("embeddings")])
    np.testing.assert_allclose(
        answer.as_numpy("embeddings"), np.array([*mini.embed_images(list(pixels))], "f"), atol=1e-5
    )


def test_refusals_are_what_its_clients_expect(client: Any, api: str) -> None:
    for asked, why in (
        ([tensor("images", [b"no photo"])], "not an image"),
        ([tensor("pictures", [b"x"])], "the inputs are images"),
        ([tensor("images", [b"x"]), tensor("label", [b"x"])], "the inputs are images"),
        ([tensor("images", [b"x"]), tensor("images", [b"y"])], "the inputs are images"),
    ):
        with pytest.raises(Exception, match=why):
            client.infer("mini", asked)
    with pytest.raises(Exception, match="classification is not offered here; take the outputs labels and scores"):
        client.infer("mini", [tensor("images", [b"x"])], outputs=[triton.InferRequestedOutput("scores", class_count=2)])
    shared = triton.InferInput("images", [1], "BYTES")
    shared.set_shared_memory("here", 9)
    with pytest.raises(Exception, match="shared_memory_region is not offered here"):
        client.infer("mini", [shared])
    with pytest.raises(Exception, match="no such model"):
        client.infer("maxi", [tensor("images", [b"x"])])


BAD = {
    "no JSON": (b"{", {}),
    "a list": (b"[]", {}),
    "a header longer than the body": (b"{}", {"Inference-Header-Content-Length": "99"}),
    "negative shape": (b'{"inputs":[{"name":"images","shape":[-1],"datatype":"BYTES","data":["eA=="]}]}', {}),
    "another shape": (b'{"inputs":[{"name":"images","shape":[2],"datatype":"BYTES","data":["eA=="]}]}', {}),
    "numbers": (b'{"inputs":[{"name":"images","shape":[1],"datatype":"BYTES","data":[1]}]}', {}),
    "no data": (b'{"inputs":[{"name":"images","shape":[1],"datatype":"UINT8"}]}', {}),
    "pixels cut short": (b'{"inputs":[{"name":"images","shape":[1,9,9,3],"datatype":"UINT8","data":[1]}]}', {}),
    "pixels 0..1": (b'{"inputs":[{"name":"images","shape":[1,1,1,3],"datatype":"UINT8","data":[0.5,0,1]}]}', {}),
    "pixels over 255": (b'{"inputs":[{"name":"images","shape":[1,1,1,3],"datatype":"UINT8","data":[256,0,1]}]}', {}),
    "more bytes than sent": (
        b'{"inputs":[{"name":"images","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":9}}]}',
        {},
    ),
    "more bytes than named": (
        b'{"inputs":[{"name":"images","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}'
        b"\1\0\0\0a, and more",
        {"Inference-Header-Content-Length": "97"},
    ),
    "inputs of another kind": (b'{"inputs":[3]}', {}),
    "no inputs": (b'{"inputs":null}', {}),
    "inputs in a list": (b'{"inputs":[[1]]}', {}),
    "half of a surrogate": (
        b'{"inputs":[{"name":"\\ud800","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":9}}]}',
        {},
    ),
}


@pytest.mark.parametrize(("body", "headers"), BAD.values(), ids=BAD.keys())
def test_damaged_requests(api: str, body: bytes, headers: dict[str, str]) -> None:
    assert problem(httpx.post(f"{api}/v2/models/mini/infer", content=body, headers=headers), 400)
