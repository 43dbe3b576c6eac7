from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cliphar.bundle import Bundle, BundleInfo, TextSpec, packaged, write_bundle
from cliphar.data import _cache
from cliphar.errors import BundleError, UsageError
from cliphar.media import decode_image, to_square
from cliphar.recognizer import Recognizer
from cliphar.runtime import OnnxRuntime, _onnx, available_providers, cpu_quota, load_runtime
from conftest import FakeRuntime

TEXTS = ["riding a bike", "cooking", "a person who is reading a very old newspaper on a bench in the park", "x"]
# int8 activations are scaled by what is in the batch, so a neighbour may move an embedding a little
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def runtime(mini: Recognizer) -> OnnxRuntime:
    assert isinstance(mini.runtime, OnnxRuntime)
    return mini.runtime


@pytest.fixture
def noise(runtime: OnnxRuntime) -> NDArray[np.uint8]:
    side = runtime.bundle.info.image.size
    return np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)


# --- cores


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> int:
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return 8


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000\n", 8),
        ("150000 100000\n", 2),
        ("200000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9900000 100000\n", 8),
        ("", 8),
        ("150000", 8),
        ("words words", 8),
        ("150000 0", 8),
        ("-1 100000", 8),
        ("nan 100000", 8),
        ("inf 100000", 8),
        ("1 2 3", 8),
    ],
)
def test_quota_of_cgroup_v2(tmp_path: Path, many_cores: int, content: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [("150000\n", "100000\n", 2), ("-1\n", "100000\n", 8), ("", "", 8), ("x", "y", 8), ("50000", "100000", 1)],
)
def test_quota_of_cgroup_v1(tmp_path: Path, many_cores: int, quota: str, period: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text(period)
    assert cpu_quota(tmp_path) == expected


def test_quota_where_the_files_are_missing_or_broken(tmp_path: Path, many_cores: int) -> None:
    assert cpu_quota(tmp_path / "missing") == many_cores
    (tmp_path / "cpu.max").write_bytes(b"\xff\xfe\x00")
    assert cpu_quota(tmp_path) == many_cores
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_bytes(b"\xff\xfe\x00")
    assert cpu_quota(tmp_path) == many_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_the_affinity_mask_bounds_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    (tmp_path / "cpu.max").write_text("400000 100000")
    assert cpu_quota(tmp_path) == 1


def test_threads_default_to_the_quota(runtime: OnnxRuntime) -> None:
    assert runtime.threads == cpu_quota()
    assert OnnxRuntime(runtime.bundle, provider="cpu", threads=1).threads == 1


def test_so_do_those_that_decode_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "cpu_quota", lambda: 1)
    got = _cache._ahead(iter("ab"), lambda _: threading.get_ident())  # type: ignore[arg-type, return-value]
    assert len({at for _, at in got}) == 1


# --- images


def test_image_embeddings_are_unit_float32(runtime: OnnxRuntime, noise: NDArray[np.uint8]) -> None:
    embeddings = runtime.encode_images(noise)
    assert embeddings.shape == (len(noise), runtime.bundle.info.embedding_dim)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_any_batch_gives_the_same_embeddings(runtime: OnnxRuntime, noise: NDArray[np.uint8], batch: int) -> None:
    whole = runtime.encode_images(noise)
    parts = [runtime.encode_images(noise[at : at + batch]) for at in range(0, len(noise), batch)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_number_of_threads_does_not_change_the_embeddings(
    runtime: OnnxRuntime, noise: NDArray[np.uint8], count: int
) -> None:
    images = np.concatenate([noise, noise[:, ::-1], noise[:, :, ::-1]])[:count]
    alone, shared = (OnnxRuntime(runtime.bundle, threads=threads).encode_images(images) for threads in (1, 3))
    np.testing.assert_allclose(shared, alone, atol=1e-6)


def test_different_photos_have_different_embeddings(mini: Recognizer, photos: list[Path]) -> None:
    squares, spec = [mini.prepare(photo) for photo in photos], mini.bundle.info.image
    for photo, square in zip(photos, squares, strict=True):  # cropped as the model was trained
        image = decode_image(photo, min_side=spec.size)
        np.testing.assert_array_equal(square, to_square(image, spec.size, spec.max_aspect))
    embeddings = mini.runtime.encode_images(np.stack(squares))
    cosines = embeddings @ embeddings.T
    assert cosines[~np.eye(len(photos), dtype=bool)].max() < 0.999


def test_batches_are_full_to_the_last(fake: Recognizer, fake_runtime: FakeRuntime) -> None:
    assert len(list(fake.stream([np.zeros((9, 9, 3), np.uint8)] * 18))) == 18
    assert fake_runtime.batches == [4, 4, 4, 4, 2]


def test_wrong_images_are_refused(runtime: OnnxRuntime, noise: NDArray[np.uint8]) -> None:
    for wrong in (
        noise.astype(np.float32),
        noise[0],
        noise[:, :-1],
        noise[:, :, :-1],
        noise[..., :1],
        noise.transpose(0, 3, 1, 2),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[N,\d+,\d+,3\], got"):
            runtime.encode_images(wrong)  # type: ignore[arg-type]


def test_several_threads_may_share_a_runtime(runtime: OnnxRuntime, noise: NDArray[np.uint8]) -> None:
    alone = runtime.encode_images(noise[:1])
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: runtime.encode_images(noise[:1]), range(8)):
            np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("threads", [1, 3])
def test_lanes_give_the_same_embeddings(runtime: OnnxRuntime, noise: NDArray[np.uint8], threads: int) -> None:
    one = OnnxRuntime(runtime.bundle, provider="cpu", threads=threads)
    assert one.lanes == threads
    with ThreadPoolExecutor(threads) as pool:
        for lane in pool.map(lambda _: one.encode_lane(noise), range(6)):
            np.testing.assert_allclose(lane, runtime.encode_images(noise), atol=TOLERANCE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_answers_batches_too() -> None:
    """It has none of the threads that its parent had made."""
    code = (
        "import os, signal, cliphar, numpy as np\n"
        "recognizer, photos = cliphar.load(threads=2), [np.zeros((9, 9, 3), np.uint8)] * 4\n"
        "recognizer.predict(photos)\n"
        "child = os.fork()\n"
        "signal.alarm(60)\n"
        "recognizer.predict(photos)\n"
        "os._exit(1 if child and os.waitpid(child, 0)[1] else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- text


def test_text_embeddings_are_unit_float32_and_repeatable(runtime: OnnxRuntime) -> None:
    embeddings = runtime.encode_text(TEXTS)
    assert embeddings.shape == (len(TEXTS), runtime.bundle.info.embedding_dim)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-4)
    np.testing.assert_array_equal(runtime.encode_text(TEXTS), embeddings)


def test_text_embeddings_do_not_depend_on_their_neighbours(runtime: OnnxRuntime) -> None:
    together = runtime.encode_text(TEXTS)
    alone = np.concatenate([runtime.encode_text([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    assert ((together * alone).sum(1) > 0.99).all()


def test_long_text_is_cut(runtime: OnnxRuntime) -> None:
    length = runtime.bundle.info.text.context_length
    long, longer = (" ".join(["running"] * (length * times)) for times in (2, 20))
    np.testing.assert_array_equal(runtime.encode_text([long]), runtime.encode_text([longer]))


def test_words_of_another_language_are_warned_of(runtime: OnnxRuntime, caplog: pytest.LogCaptureFixture) -> None:
    runtime.encode_text(["a person riding", "", "自転車に乗る", "a photo of 自転車"])
    assert [record.message for record in caplog.records] == [
        "the model knows no word of '自転車に乗る': its answer means nothing; say it in English"
    ]


@pytest.mark.parametrize(
    "text", ["", " ", "🚴‍♀️", "自転車に乗る", "naïve café", "\x00\x07", "a" * 10_000, "[PAD] [CLS]"]
)
def test_any_text_has_a_direction(runtime: OnnxRuntime, text: str) -> None:
    embedding = runtime.encode_text([text])
    assert np.isfinite(embedding).all()
    np.testing.assert_allclose(np.linalg.norm(embedding), 1, atol=1e-4)


# --- bundles and providers that do not run


def test_the_cpu_is_always_there(runtime: OnnxRuntime) -> None:
    assert available_providers()[-1] == "cpu"
    assert (runtime.provider, runtime.name) == ("cpu", "onnx-cpu")


def test_a_provider_that_is_not_present(runtime: OnnxRuntime) -> None:
    for provider in ("abacus", "CPU", "", "tensorrt"):
        if provider in available_providers():
            continue
        with pytest.raises(UsageError, match="is not in this ONNX Runtime"):
            OnnxRuntime(runtime.bundle, provider=provider)


def test_fewer_threads_than_one(runtime: OnnxRuntime) -> None:
    for threads in (0, -1):
        with pytest.raises(UsageError, match="give 1 or more"):
            load_runtime(runtime.bundle, threads=threads)


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="needs a machine without a GPU of NVIDIA's")
@pytest.mark.parametrize("provider", [None, "cuda"])
def test_a_build_for_gpus_says_that_none_is_seen_and_takes_the_cpu(
    runtime: OnnxRuntime, provider: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: build)
    _onnx._without_nvidia.cache_clear()
    assert [OnnxRuntime(runtime.bundle, provider=provider).name for _ in range(2)] == ["onnx-cpu"] * 2
    assert [record.message for record in caplog.records] == [
        "no GPU is seen, so the CPU is used; 'cliphar doctor' says more"
    ]


@pytest.mark.parametrize("provider", [None, "cuda"])
def test_a_gpu_that_is_seen_and_does_not_start_is_said(
    runtime: OnnxRuntime, provider: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: build)
    monkeypatch.setattr(_onnx, "_without_nvidia", lambda: False)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):  # this ONNX Runtime does not have it
        assert OnnxRuntime(runtime.bundle, provider=provider).name == "onnx-cpu"
    assert [record.message for record in caplog.records] == [
        "cuda did not start, so cpu is used; 'cliphar doctor' says more"
    ]


@pytest.mark.skipif(
    "cuda" not in available_providers() or not any(Path("/dev").glob("nvidia[0-9]*")),
    reason="needs a GPU and 'pip install onnxruntime-gpu[cuda,cudnn]'",
)
def test_cuda_answers_as_the_cpu_does(runtime: OnnxRuntime, noise: NDArray[np.uint8]) -> None:
    cuda = OnnxRuntime(runtime.bundle)
    assert cuda.name == "onnx-cuda"
    cpu = OnnxRuntime(runtime.bundle, provider="cpu")
    assert np.allclose(cuda.encode_images(noise), cpu.encode_images(noise), atol=5e-3)  # TF32 rounds to 10 bits


@pytest.mark.filterwarnings("ignore:Specified provider")  # this ONNX Runtime has none of them
def test_tensorrt_is_taken_if_named_and_keeps_its_engines_by_the_weights(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    build = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: build)
    monkeypatch.setattr(_onnx, "_without_nvidia", lambda: False)
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path))
    asked: list[list[tuple[str, dict[str, str]]]] = []
    plain = onnxruntime.InferenceSession

    def session(path: str, options: object, providers: list[tuple[str, dict[str, str]]]) -> object:
        asked.append(providers)
        return plain(path, options, providers=providers)

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    OnnxRuntime(runtime.bundle)
    OnnxRuntime(runtime.bundle, provider="tensorrt")
    assert [name for name, _ in asked[0]] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert [name for name, _ in asked[1]] == build
    kept = Path(asked[1][0][1]["trt_engine_cache_path"])
    assert kept == tmp_path / "tensorrt" / runtime.bundle.info.files["image.onnx"].sha256[:16]
    assert kept.is_dir()


MakeInfo = Callable[..., BundleInfo]


def _broken(tmp_path: Path, info: BundleInfo, **replaced: bytes) -> Bundle:
    """A bundle of the embedded model's files, whole by its digests, with some files that hold something else."""
    mini = packaged("mini")
    names = {"image": "image.onnx", "text": "text.onnx", "tokenizer": "tokenizer.json"}
    files: dict[str, Path | bytes] = {name: mini / name for name in names.values()}
    files |= {names[key]: content for key, content in replaced.items()}
    return write_bundle(tmp_path / "broken", info, files)


@pytest.mark.parametrize("content", [b"", b"not a graph\nat all", b"\x00" * 64])
def test_an_image_graph_that_is_none(tmp_path: Path, make_info: MakeInfo, content: bytes) -> None:
    bundle = _broken(tmp_path, make_info(), image=content)
    with pytest.raises(BundleError, match=r"image\.onnx of bundle 'tiny' does not run here") as caught:
        OnnxRuntime(bundle)
    assert "\n" not in str(caught.value)


def test_an_image_graph_of_other_sizes_than_the_bundles(tmp_path: Path, make_info: MakeInfo) -> None:
    bundle = _broken(tmp_path, make_info(), image=_graph("photos", 24))
    with pytest.raises(BundleError, match=r"image\.onnx of bundle 'tiny' does not run here: .*images") as caught:
        OnnxRuntime(bundle).encode_images(np.zeros((1, 16, 16, 3), np.uint8))
    assert "\n" not in str(caught.value)


def test_a_text_graph_that_takes_something_else(tmp_path: Path, make_info: MakeInfo) -> None:
    runtime = OnnxRuntime(_broken(tmp_path, make_info(), text=_graph("photos", 16)))
    with pytest.raises(BundleError, match=r"text\.onnx of bundle 'tiny' does not run here: .*images"):
        runtime.encode_text(["cooking"])


def test_a_text_graph_that_is_none(tmp_path: Path, make_info: MakeInfo) -> None:
    runtime = OnnxRuntime(_broken(tmp_path, make_info(), text=b"not a graph"))
    with pytest.raises(BundleError, match=r"text\.onnx of bundle 'tiny' does not run here"):
        runtime.encode_text(["cooking"])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_a_tokenizer_that_is_none(tmp_path: Path, make_info: MakeInfo, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json of bundle 'tiny'") as caught:
        OnnxRuntime(_broken(tmp_path, make_info(), tokenizer=content))
    assert "\n" not in str(caught.value)


def test_a_bundle_without_graphs(tiny: Bundle) -> None:
    with pytest.raises(BundleError, match=r"has no image\.onnx"):
        OnnxRuntime(tiny)
    with pytest.raises(BundleError, match=r"has no image\.onnx"):
        load_runtime(tiny)


# --- a graph that takes one photo at a time


def _graph(batch: int | str, side: int) -> bytes:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Add", ["mean", "little"], ["some"]),
        helper.make_node("LpNormalization", ["some"], ["embeddings"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "mean colour",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, side, side, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.array([1e-3], np.float32), "little")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize("batch", [1, "photos"])
def test_a_graph_of_one_photo_is_run_photo_by_photo(tmp_path: Path, make_info: MakeInfo, batch: int | str) -> None:
    runtime = OnnxRuntime(_broken(tmp_path, make_info(), image=_graph(batch, 16)))
    images = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    means = images.mean((1, 2)) + 1e-3
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(runtime.encode_images(images), expected, atol=1e-5)
    np.testing.assert_allclose(runtime.encode_images(images[:1]), expected[:1], atol=1e-5)


def test_the_context_length_is_the_bundles(tmp_path: Path, make_info: MakeInfo, runtime: OnnxRuntime) -> None:
    text = TextSpec(templates=("{}",), context_length=4)
    short = OnnxRuntime(_broken(tmp_path, make_info(text=text)))
    words = ["running and jumping", "running and jumping over a fence with a dog"]
    assert short.bundle.info.text.context_length < runtime.bundle.info.text.context_length
    cut = short.encode_text(words)
    np.testing.assert_allclose(cut[0], cut[1], atol=TOLERANCE)
    whole = runtime.encode_text(words)
    assert float(whole[0] @ whole[1]) < 0.999


def test_nobody_is_told_of_what_runs_here(clean_env: dict[str, str], photos: list[Path], tmp_path: Path) -> None:
    """The telemetry of ONNX Runtime and of OpenVINO keeps a number for the user in the home."""
    (tmp_path / "user").mkdir()
    left_out = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    env = {k: v for k, v in clean_env.items() if k not in left_out} | {"HOME": str(tmp_path / "user")}
    subprocess.run([sys.executable, "-m", "cliphar", "predict", str(photos[0])], env=env, timeout=120, check=True)
    if find_spec("openvino"):
        code = "from cliphar.runtime import import_openvino; import_openvino().convert_model"
        subprocess.run([sys.executable, "-c", code], env=env, timeout=120, check=True)
    assert not list((tmp_path / "user").rglob("*"))


def test_a_moved_bundle_still_runs(tmp_path: Path) -> None:
    from cliphar.recognizer import load

    moved = tmp_path / "a folder with spaces é"
    shutil.copytree(packaged("mini"), moved)
    side = (recognizer := load(moved)).bundle.info.image.size
    assert recognizer.predict(np.zeros((side, side, 3), np.uint8)).top


def test_a_model_that_takes_the_place_of_a_loaded_one_is_not_mixed_with_it(tmp_path: Path, make_info: MakeInfo) -> None:
    runtime = OnnxRuntime(_broken(tmp_path, make_info(), image=_graph("photos", 16)), threads=2)
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    alone = [runtime.encode_images(image[None])[0] for image in images]
    shutil.rmtree(runtime.bundle.path)
    _broken(tmp_path, make_info(), image=b"another", text=_graph("photos", 16))
    np.testing.assert_allclose(runtime.encode_images(images), alone, atol=1e-6)
    with pytest.raises(BundleError, match=r"text\.onnx is no longer what was loaded"):
        runtime.encode_text(["cooking"])
