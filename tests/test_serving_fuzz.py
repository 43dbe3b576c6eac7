"""No request, however strange, is answered with a 5xx or otherwise than /openapi.json says."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings


def test_what_the_openapi_document_refers_to_is_in_it(api: str) -> None:
    text = httpx.get(f"{api}/openapi.json").text
    document = json.loads(text)
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(re.findall(r'"\$ref":"([^"]*)"', text)) <= known  # else generators of clients fail
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]  # what the functions of a made client are called
    assert len({*names}) == len(names)
    assert {"predict", "embed", "video", "put_vocabulary", "teach", "v2_infer"} <= {*names}
    tags = {tag["name"] for tag in document["tags"]}
    assert all({*operation["tags"]} <= tags for operation in operations)
    assert {*operations[-1]["responses"]} >= {"200", "4XX", "5XX"}


def test_the_openapi_document_under_schemathesis(api: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from schemathesis.specs.openapi import checks

        schema = schemathesis.openapi.from_url(f"{api}/openapi.json")
    documented = [
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.status_code_conformance,
    ]
    tried = 0
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()  # type: ignore[union-attr]

        @settings(max_examples=15, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def one(case: Any) -> None:
            answer = case.call(headers={"connection": "close"}, timeout=60)
            assert answer.status_code < 500, case.as_curl_command()
            case.validate_response(answer, checks=documented)

        one()
        tried += 1
    assert tried > 15


def test_damaged_photos(api: str, photos: list[Path]) -> None:
    chance = random.Random(7)  # noqa: S311 - nothing secret
    whole = photos[0].read_bytes()
    broken = [whole[: chance.randrange(len(whole))] for _ in range(20)]
    for _ in range(20):
        changed = bytearray(whole)
        for _ in range(20):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        broken.append(bytes(changed))
    broken += [b"", b"\xff\xd8\xff", b"GIF89a", b"RIFF....WEBP", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)]
    files = [("images", (str(i), content)) for i, content in enumerate(broken)]
    response = httpx.post(f"{api}/v1/predict", files=files, timeout=60)
    assert response.status_code == 200
    assert len(response.json()["predictions"]) == len(broken)
    for content in broken[:10]:
        image = {"content-type": "image/jpeg"}
        assert httpx.post(f"{api}/v1/predict", content=content, headers=image).status_code in (200, 422)


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embed", "/predict", "/predict/image", "/v2/models/mini/infer"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "image/png", "text/plain", ""])
def test_bodies_of_the_wrong_kind(api: str, path: str, kind: str) -> None:
    for body in (b"", b"{}", b"[]", b"null", b"--x\r\n", b"\xff" * 50, b'{"images": "' + b"a" * 1000):
        assert 400 <= httpx.post(f"{api}{path}", content=body, headers={"content-type": kind}).status_code < 500
