"""The open inference protocol, spoken by the real tritonclient."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from cliphar.recognizer import Recognizer

triton = pytest.importorskip("tritonclient.http")


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_encoded_photos(api: str, mini: Recognizer, photos: list[Path], binary: bool) -> None:
    client = triton.InferenceServerClient(api.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mini")
    assert client.get_model_metadata("mini")["inputs"][0]["name"] == "images"
    contents = [photo.read_bytes() for photo in photos]
    given = triton.InferInput("images", [len(contents)], "BYTES")
    if binary:
        given.set_data_from_numpy(np.array(contents, object), binary_data=True)
    else:
        import base64

        texts = np.array([base64.b64encode(content) for content in contents], object)
        given.set_data_from_numpy(texts, binary_data=False)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "score", "embeddings")]
    answer = client.infer("mini", [given], outputs=wanted, parameters={"labels": "taking a photo, sleeping"})
    expected = mini.predict(photos, ["taking a photo", "sleeping"])
    labels = [text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("label")]
    assert labels == [one.label for one in expected]
    np.testing.assert_allclose(answer.as_numpy("score"), [one.score for one in expected], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(answer.as_numpy("embeddings"), axis=1), 1, rtol=1e-5)
    client.close()


def test_pixels(api: str, mini: Recognizer, photos: list[Path]) -> None:
    client = triton.InferenceServerClient(api.removeprefix("http://"))
    squares = np.stack([mini.prepare(photo) for photo in photos])
    given = triton.InferInput("images", list(squares.shape), "UINT8")
    given.set_data_from_numpy(squares)
    answer = client.infer("mini", [given])
    np.testing.assert_allclose(answer.as_numpy("embeddings"), mini.runtime.encode_images(squares), atol=1e-5)
    with pytest.raises(triton.InferenceServerException):
        client.get_model_metadata("maxi")
    client.close()


BODIES = {
    "no inputs": {"inputs": []},
    "another input": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["aaaa"]}]},
    "another type": {"inputs": [{"name": "images", "shape": [1], "datatype": "FP32", "data": [1]}]},
    "too few": {"inputs": [{"name": "images", "shape": [2], "datatype": "BYTES", "data": ["aaaa"]}]},
    "not pixels": {"inputs": [{"name": "images", "shape": [1, 192, 192, 3], "datatype": "UINT8", "data": ["a"]}]},
    "no photo": {"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": ["aaaa"]}]},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_refusals(api: str, body: dict[str, object]) -> None:
    response = httpx.post(f"{api}/v2/models/mini/infer", json=body)
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
