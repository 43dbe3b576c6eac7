"""What the recogniser asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Runtime"]


class Runtime(Protocol):
    """Runs a bundle's encoders. Safe to call from several threads. One that is made a subclass has a single lane."""

    name: str
    lanes: int = 1
    """On how many threads encode_lane gets most done; 1 where encode_images uses all there is."""

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB [N,S,S,3] with S the bundle's image size -> float32 [N,D], unit length; any N >= 1."""
        ...

    def encode_lane(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same, on the calling thread alone: later for one photo, more a second where all lanes have some."""
        return self.encode_images(images)

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N sentences -> float32 [N,D], unit length."""
        ...
