from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
if find_spec("open_clip") is None:  # to import it plainly is what may fail
    pytest.skip("needs open_clip", allow_module_level=True)

from cliphar.errors import BundleError, UsageError  # noqa: E402
from cliphar.models import OpenClipEncoder, open_clip_encoder  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> OpenClipEncoder:
    return open_clip_encoder("ViT-B-32", seed=3)


def test_both_towers_give_unit_vectors_of_one_size(encoder: OpenClipEncoder) -> None:
    with torch.no_grad():
        images = encoder.image(torch.rand(2, 3, encoder.size, encoder.size) * 255)
        texts = encoder.text(torch.zeros(3, encoder.context_length, dtype=torch.long))
    assert images.shape == (2, encoder.embedding_dim)
    assert texts.shape == (3, encoder.embedding_dim)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))


def test_pixels_are_normalised_as_open_clip_does(encoder: OpenClipEncoder) -> None:
    pixels = torch.randint(0, 256, (1, 3, 224, 224)).float()
    mean, deviation = (torch.tensor(encoder.model.visual.preprocess_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = encoder.model.encode_image((pixels / 255 - mean) / deviation, normalize=True)
        torch.testing.assert_close(encoder.image(pixels), expected, atol=1e-5, rtol=0)


def test_the_seed_decides_and_leaves_the_callers_generator_alone(encoder: OpenClipEncoder) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    again = open_clip_encoder("ViT-B-32", seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(again.model.visual.conv1.weight, encoder.model.visual.conv1.weight)


def test_a_name_that_open_clip_lacks() -> None:
    with pytest.raises(UsageError, match=r"near it are .*ViT-B-32"):
        open_clip_encoder("ViT-B-33")


def test_a_folder_that_is_none() -> None:
    with pytest.raises(BundleError, match="cannot make open_clip's 'local-dir:/nowhere'") as caught:
        open_clip_encoder("local-dir:/nowhere")
    assert "\n" not in str(caught.value)


def test_it_imports_in_a_fresh_process() -> None:
    code = "from cliphar.models import import_open_clip; print(len(import_open_clip().list_models()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
