"""The same model behind other servers: plain FastAPI with PyTorch for each request, LitServe, and BentoML.

Each takes a multipart form whose ``images`` is one JPEG, and answers as JSON with the five best of mini's own labels.
LitServe and BentoML run the very same recogniser as cliphar does, in their own batches of up to 16.

    python peers.py plain|litserve PORT          bentoml serve peers:Bento --port PORT
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, UploadFile

from cliphar import load


def plain(port: int) -> None:
    """One PyTorch forward for each request, as a first service is often written; a thread for each, by FastAPI."""
    import torch
    import uvicorn
    from PIL import Image

    from cliphar.media import to_square
    from cliphar.models import ImageTower

    recognizer = load("mini")
    info = recognizer.bundle.info
    # mini's architecture: what the weights are does not change how long it takes
    tower = ImageTower("lite1", info.embedding_dim).eval()
    vectors = torch.from_numpy(recognizer.embed_labels(recognizer.labels))
    app = FastAPI()

    @app.post("/predict")
    def predict(images: UploadFile) -> dict[str, Any]:
        image = Image.open(io.BytesIO(images.file.read())).convert("RGB")
        pixels = torch.from_numpy(to_square(image, info.image.size, info.image.max_aspect).copy())
        with torch.inference_mode():
            cosines = tower(pixels.permute(2, 0, 1)[None].float()) @ vectors.T
            scores, order = (cosines * info.known.logit_scale).softmax(1)[0].topk(5)
        top = zip(order.tolist(), scores.tolist(), strict=True)
        return {"top": [{"label": recognizer.labels[i], "score": score} for i, score in top]}

    uvicorn.run(app, port=port, log_level="warning")


def litserve(port: int) -> None:
    """LitServe with its dynamic batching."""
    server = ls.LitServer(Lit(max_batch_size=16, batch_timeout=0.005), accelerator="cpu", timeout=60)
    server.run(port=port, num_api_servers=1, log_level="warning", generate_client_file=False)


try:
    import bentoml
    import litserve as ls
except ImportError:
    pass
else:

    class Lit(ls.LitAPI):  # type: ignore[misc]
        """What LitServe asks for; at the top, for its workers are spawned."""

        def setup(self, device: str) -> None:  # noqa: ARG002
            self.recognizer = load("mini")

        def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the annotation
            return self.recognizer.prepare(request["images"].file.read())

        def batch(self, inputs: list[Any]) -> Any:
            return np.stack(inputs)

        def predict(self, squares: Any) -> Any:
            return self.recognizer.score(self.recognizer.runtime.encode_images(squares))

        def unbatch(self, output: Any) -> Any:
            return list(output)

        def encode_response(self, output: Any) -> dict[str, Any]:
            answer: dict[str, Any] = output.to_dict()
            return answer

    @bentoml.service(traffic={"timeout": 60, "max_concurrency": 1000}, workers=1)
    class Bento:
        """BentoML with its adaptive batching."""

        def __init__(self) -> None:
            self.recognizer = load("mini")

        @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=60_000, route="/predict")  # type: ignore[untyped-decorator]
        def predict(self, images: list[Path]) -> list[dict[str, Any]]:
            return [answer.to_dict() for answer in self.recognizer.predict([str(path) for path in images])]


if __name__ == "__main__":
    {"plain": plain, "litserve": litserve}[sys.argv[1]](int(sys.argv[2]))
