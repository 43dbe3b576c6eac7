from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

from cliphar.bundle import Bundle, find_bundle, list_models, packaged, read_bundle, write_bundle  # noqa: E402
from cliphar.errors import BundleError, DataError, UsageError  # noqa: E402
from cliphar.export import TARGETS, Added, export_bundle, float_graph, read_proof, write_layout  # noqa: E402
from cliphar.export._quantize import quantize, tapped_session  # noqa: E402
from cliphar.export._smooth import smooth_inputs  # noqa: E402
from cliphar.recognizer import load  # noqa: E402
from cliphar.runtime import OnnxRuntime, choose_runtime, load_runtime  # noqa: E402

PRECISE = ["onnx-fp32", "onnx-fp16", "onnx-w8"]
QUANTISED = ["onnx-int8"]
TORCH = ["torch-export", "torchscript"]
OPENVINO = ["openvino", "openvino-bf16", "openvino-int8"] if find_spec("openvino") else []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = os.environ.get("CLIPHAR_HOME")
    folder = tmp_path_factory.mktemp("home")
    os.environ["CLIPHAR_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["CLIPHAR_HOME"]
    else:
        os.environ["CLIPHAR_HOME"] = before


@pytest.fixture(autouse=True, scope="module")
def few_crops() -> Iterator[None]:
    """What is proved here does not hang on how many crops prove it; the time it takes does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cliphar.export._photos._CROPS", 16)
        patch.setattr("cliphar.runtime._choose._ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def exported(home: Path) -> tuple[Bundle, list[Added]]:
    return export_bundle(find_bundle(packaged("mini")), [*PRECISE, *QUANTISED, *TORCH, *OPENVINO])


@pytest.fixture
def images(exported: tuple[Bundle, list[Added]], photos: list[Path]) -> NDArray[np.uint8]:
    recognizer = load(packaged("mini"), runtime="onnx")
    return np.stack([recognizer.prepare(photo) for photo in photos])


def test_every_target_is_proved_and_added(exported: tuple[Bundle, list[Added]]) -> None:
    bundle, outcomes = exported
    assert [outcome.failed for outcome in outcomes] == [None] * len(outcomes)
    assert set(bundle.runtimes) == {"onnx", *(outcome.target for outcome in outcomes)}
    for outcome in outcomes:
        kept = read_bundle(bundle.path).info.files[bundle.runtimes[outcome.target]].parity
        assert kept == outcome.parity
        assert kept is not None
        assert kept["cosine_mean"] > 0.998
        assert kept["images_per_s"] > 0


def test_the_package_is_left_alone_and_the_store_takes_its_place(
    exported: tuple[Bundle, list[Added]], home: Path
) -> None:
    assert exported[0].path == home / "mini"
    assert list(find_bundle(packaged("mini")).runtimes) == ["onnx", "onnx-int8"]
    assert find_bundle("mini").path == home / "mini"


def test_each_runtime_answers_as_the_reference(exported: tuple[Bundle, list[Added]], images: NDArray[np.uint8]) -> None:
    bundle, _ = exported
    reference = OnnxRuntime(bundle).encode_images(images)
    for name in bundle.runtimes:
        runtime = load_runtime(bundle, name)
        answers = runtime.encode_images(images)
        assert answers.dtype == np.float32
        assert ((answers * reference).sum(1) > 0.995).all(), name
        np.testing.assert_allclose(runtime.encode_images(images[:1]), answers[:1], atol=2e-3)
        assert runtime.encode_text(["cooking"]).shape == (1, bundle.info.embedding_dim)
        with pytest.raises(ValueError, match="expected uint8"):
            runtime.encode_images(images[0])


def test_smaller_is_smaller(exported: tuple[Bundle, list[Added]]) -> None:
    files = exported[0].info.files
    assert files["image.int8.onnx"].bytes < files["image.fp16.onnx"].bytes < files["image.fp32.onnx"].bytes


def test_an_8_bit_graph_borrows_the_weights_that_the_bundle_has_in_8_bits(exported: tuple[Bundle, list[Added]]) -> None:
    bundle, _ = exported
    graph = onnx.load(bundle.file("image.int8.onnx"), load_external_data=False).graph
    lent = [tensor for tensor in graph.initializer if tensor.external_data]
    assert {tensor.external_data[0].value for tensor in lent} == {"image.onnx"}
    assert bundle.info.files["image.int8.onnx"].bytes < bundle.info.files["image.onnx"].bytes / 32


# --- choosing


def test_the_fastest_is_measured_once_and_remembered(
    exported: tuple[Bundle, list[Added]], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, _ = exported
    with caplog.at_level(logging.INFO, "cliphar.runtime"):
        choice = choose_runtime(bundle)
    assert set(choice.images_per_s) == set(bundle.runtimes) - set(TORCH)  # torch is for those who ask for it
    assert choice.images_per_s[choice.name] == max(choice.images_per_s.values())
    assert f"runtime {choice.name} is the fastest here" in caplog.text
    memory = home / "runtimes.json"
    before = memory.stat().st_mtime_ns
    assert choose_runtime(bundle) == choice
    assert memory.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "written",
    [
        "{nonsense",
        "[]",
        {"name": "gone"},
        {"name": [1]},
        {"images_per_s": None},
        {"images_per_s": {"onnx": "fast"}},
        {"failed": 1},
    ],
)
def test_a_memory_that_is_damaged_or_of_another_version_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | dict[str, object]
) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path))
    mini, memory = find_bundle(packaged("mini")), tmp_path / "runtimes.json"
    choice = choose_runtime(mini)
    ((key, kept),) = json.loads(memory.read_text()).items()
    memory.write_text(written if isinstance(written, str) else json.dumps({key: kept | written}))
    assert set(choose_runtime(mini).images_per_s) == set(choice.images_per_s)
    assert set(json.loads(memory.read_text())[key]["images_per_s"]) == set(choice.images_per_s)


def only_onnx(bundle: Bundle) -> Bundle:
    files = {name: file for name, file in bundle.info.files.items() if file.runtime is None}
    return Bundle(bundle.path, bundle.info.model_copy(update={"files": files}))


def test_one_runtime_is_not_measured() -> None:
    choice = choose_runtime(only_onnx(find_bundle(packaged("mini"))))
    assert (choice.name, choice.images_per_s) == ("onnx", {})


def test_a_runtime_that_does_not_answer_here_as_it_was_proved_is_not_chosen(tmp_path: Path, home: Path) -> None:
    found = find_bundle(packaged("mini"))
    files = dict(found.info.files)
    proved = files["image.int8.onnx"]
    assert proved.parity is not None
    files["image.int8.onnx"] = proved.model_copy(update={"parity": proved.parity | {"cosine_min": 0.9999999}})
    os.environ["CLIPHAR_HOME"] = str(tmp_path)  # measured anew
    try:
        choice = choose_runtime(Bundle(found.path, found.info.model_copy(update={"files": files})))
    finally:
        os.environ["CLIPHAR_HOME"] = str(home)
    assert choice.name == "onnx"
    assert "its answers are unlike the reference's here: mean cosine" in choice.failed["onnx-int8"]


def test_with_nothing_said_mini_runs_the_faster_of_its_two(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPHAR_RUNTIME")
    mini = find_bundle(packaged("mini"))
    choice = choose_runtime(mini)
    assert set(choice.images_per_s) | set(choice.failed) == {"onnx", "onnx-int8"}
    runtime = load(mini.path).runtime
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.file == mini.runtimes[choice.name]


def test_a_runtime_by_name_and_by_variable(
    exported: tuple[Bundle, list[Added]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = exported
    with pytest.raises(
        UsageError, match=r"has no runtime 'abacus' \(it has onnx, .*, or add one with 'cliphar export'"
    ):
        load(bundle.path, runtime="abacus")
    monkeypatch.setenv("CLIPHAR_RUNTIME", "onnx-fp16")
    runtime = load(bundle.path).runtime
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.file == "image.fp16.onnx"


def test_a_copy_of_another_mini_does_not_stand_in_for_the_packages_own(home: Path, tmp_path: Path) -> None:
    old = find_bundle(packaged("mini"))
    files: dict[str, Path | bytes] = {name: old.path / name for name in old.info.files} | {"image.onnx": b"older"}
    write_bundle(tmp_path / "mini", old.info, files)
    os.environ["CLIPHAR_HOME"] = str(tmp_path)
    try:
        assert next(model.path for model in list_models() if model.name == "mini") == packaged("mini")
    finally:
        os.environ["CLIPHAR_HOME"] = str(home)


# --- C++


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_guides_program_runs_the_model(exported: tuple[Bundle, list[Added]], tmp_path: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (tmp_path / "main.cpp").write_text(guide.split("```cpp\n")[1].split("```")[0])
    torch = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    if not (torch / "include").is_dir():
        pytest.skip("this torch has no headers")
    paths = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
    paths += [f"-Wl,-rpath,{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-w", str(tmp_path / "main.cpp"), *paths, "-o", str(tmp_path / "main")]
    subprocess.run(command, timeout=600, check=True)
    model = exported[0].file(exported[0].runtimes["torchscript"])
    done = subprocess.run([tmp_path / "main", model], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[1, 512] 1\n"


def test_a_graph_that_torch_has_no_form_for() -> None:
    from cliphar.export._torch_graph import TorchGraph

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Det", ["x"], ["y"])], "no such", [x], [y])
    with pytest.raises(BundleError, match="without a torch form here: Det"):
        TorchGraph(onnx.helper.make_model(graph))


def test_a_torch_program_that_is_none(exported: tuple[Bundle, list[Added]], tmp_path: Path) -> None:
    bundle = exported[0]
    for name in TORCH:
        (tmp_path / bundle.runtimes[name]).write_bytes(b"none")
        with pytest.raises(BundleError, match=r"cannot be read by torch .*; run 'cliphar export' here") as caught:
            load_runtime(Bundle(tmp_path, bundle.info), name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*TORCH[:1], *OPENVINO[:1]])
def test_a_program_of_other_sizes_than_the_bundles(exported: tuple[Bundle, list[Added]], name: str) -> None:
    info = exported[0].info
    other = info.model_copy(update={"image": info.image.model_copy(update={"size": 64})})
    with pytest.raises(BundleError, match=r"of bundle 'mini' does not run here: ") as caught:
        load_runtime(Bundle(exported[0].path, other), name).encode_images(np.zeros((1, 64, 64, 3), np.uint8))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not OPENVINO, reason="needs openvino")
def test_a_model_that_another_thread_lets_go_takes_no_signal_along(
    exported: tuple[Bundle, list[Added]], run_python: Callable[[str], str]
) -> None:
    said = run_python(f"""
import signal, threading
from cliphar.bundle import find_bundle
from cliphar.runtime import load_runtime
signal.signal(signal.SIGTERM, lambda *_: print("told"))
held = [load_runtime(find_bundle({str(exported[0].path)!r}), "openvino")]
other = threading.Thread(target=held.clear)
other.start()
other.join()
signal.raise_signal(signal.SIGTERM)
""")
    assert said == "told\n"


# --- what is refused


def test_what_answers_otherwise_is_refused_and_the_bundle_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    from cliphar.export import _targets

    def turned(material: _targets.Material) -> dict[str, bytes]:
        model = onnx.ModelProto()
        model.CopyFrom(material.model)
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weights.raw_data = (-np.frombuffer(weights.raw_data, np.float32)).tobytes()
        return {"image.fp32.onnx": model.SerializeToString()}

    monkeypatch.setitem(_targets.TARGETS, "onnx-fp32", _targets.Target("fp32", turned))
    bundle, outcomes = export_bundle(find_bundle(packaged("mini")), ["onnx-fp32"], out=tmp_path / "out")
    assert outcomes[0].failed is not None
    assert "onnx-fp32 is refused: mean cosine" in outcomes[0].failed
    assert outcomes[0].parity["cosine_mean"] < 0.99
    assert list(bundle.runtimes) == ["onnx", "onnx-int8"]
    assert not (tmp_path / "out").exists()


def test_another_place_keeps_what_was_exported_to_it_and_no_other_model_is_lost(tmp_path: Path) -> None:
    mini = find_bundle(packaged("mini"))
    export_bundle(mini, ["onnx-fp32"], out=tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    both, _ = export_bundle(mini, ["onnx-w8"], out=tmp_path / "link")
    assert list(both.runtimes) == list(read_bundle(tmp_path / "out").runtimes)
    assert {"onnx-fp32", "onnx-w8"} < set(both.runtimes)
    assert (tmp_path / "link").is_symlink()
    files: dict[str, Path | bytes] = {name: mini.file(name) for name in mini.info.files} | {"image.onnx": b"another"}
    write_bundle(tmp_path / "other", mini.info.model_copy(update={"name": "other"}), files)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    for place, why in (("other", "holds another model, 'other'"), ("photos", "is not a whole bundle")):
        with pytest.raises(UsageError, match=f"{why}; choose another place"):
            export_bundle(mini, ["onnx-fp32"], out=tmp_path / place)
    assert (tmp_path / "other" / "image.onnx").read_bytes() == b"another"


def test_a_bundle_is_not_replaced_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(packaged("mini"), tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    bundle = read_bundle(".")
    with pytest.raises(UsageError, match=r"^\. cannot be replaced from inside"):
        export_bundle(bundle, ["onnx-w8"])
    with pytest.raises(BundleError, match="cannot be replaced from inside"):
        write_bundle(".", bundle.info, {file: bundle.file(file) for file in bundle.info.files}, overwrite=True)


def test_of_many_photos_no_more_are_held_than_prove(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliphar.export._photos._CALIBRATION", 4)
    monkeypatch.setattr("cliphar.export._photos._VERIFICATION", 12)
    (tmp_path / "sit").mkdir()
    for number in range(40):  # a fifth cannot be read, and others take their places
        content = photos[0].read_bytes() if number % 5 else b""
        (tmp_path / "sit" / f"{number}.jpg").write_bytes(content + bytes(2**20))
    bundle = find_bundle("mini")
    tracemalloc.start()
    said: list[str] = []
    proof = read_proof(bundle, tmp_path, said.append)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(proof.calibration), len(proof.verification), proof.photos) == (4, 12, 16)
    assert most < 20 * 2**20
    assert said
    assert all(re.match(r"left out .*/sit/\d*[05]\.jpg: the image ", line) for line in said)


def test_of_two_exports_at_once_neither_loses_what_the_other_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliphar.export import _targets

    mini = find_bundle(packaged("mini"))
    first, _ = export_bundle(mini, ["onnx-fp32"], out=tmp_path / "out")
    build = _targets.TARGETS["onnx-w8"].build

    def meanwhile(material: _targets.Material) -> dict[str, bytes]:
        export_bundle(read_bundle(tmp_path / "out"), ["onnx-fp16"])
        return build(material)

    monkeypatch.setitem(_targets.TARGETS, "onnx-w8", _targets.Target("w8", meanwhile))
    bundle, _ = export_bundle(first, ["onnx-w8"])
    assert {"onnx-fp32", "onnx-fp16", "onnx-w8"} < set(bundle.runtimes)
    assert read_bundle(tmp_path / "out").info == bundle.info


def test_a_bundle_that_is_trained_anew_meanwhile_is_not_mixed_with_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliphar.export import _targets

    mini = find_bundle(packaged("mini"))
    files: dict[str, Path | bytes] = {name: mini.file(name) for name in mini.info.files}
    bundle = write_bundle(tmp_path / "mine", mini.info, files)

    def meanwhile(material: _targets.Material) -> dict[str, bytes]:
        write_bundle(tmp_path / "mine", mini.info, files | {"text.onnx": b"another"}, overwrite=True)
        return {"image.w8.onnx": material.model.SerializeToString()}

    monkeypatch.setitem(_targets.TARGETS, "onnx-w8", _targets.Target("w8", meanwhile))
    with pytest.raises(UsageError, match="holds another model, 'mini'; choose another place, or export that one"):
        export_bundle(bundle, ["onnx-w8"])
    assert "onnx-w8" not in read_bundle(tmp_path / "mine").runtimes


def test_an_engines_own_error_is_one_line_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cliphar.export import _targets

    def fails(_: _targets.Material) -> dict[str, bytes]:
        raise RuntimeError("Protobuf\nserialization failed")

    monkeypatch.setitem(_targets.TARGETS, "onnx-fp16", _targets.Target("fp16", fails))
    bundle, (failed, added) = export_bundle(
        find_bundle(packaged("mini")), ["onnx-fp16", "onnx-fp32"], out=tmp_path / "out"
    )
    assert str(failed.failed).startswith("onnx-fp16 cannot be made: Protobuf serialization failed")
    assert added.failed is None
    assert "onnx-fp32" in bundle.runtimes


def test_a_terminal_that_is_closed_leaves_no_temporary_files(clean_env: dict[str, str], tmp_path: Path) -> None:
    ours, its = os.openpty()
    terminal = os.ttyname(its)  # the first that a session opens is its own
    work = tmp_path / "work"
    work.mkdir()
    export = (
        f"exec {sys.executable} -m cliphar export mini --to onnx-int8 --out {tmp_path}/out <{terminal} >{terminal} 2>&1"
    )
    env = clean_env | {"TMPDIR": str(work)}
    with subprocess.Popen(["sh", "-c", export], env=env, start_new_session=True):
        shown = b""
        while b"making it" not in shown:
            shown += os.read(ours, 65536)
        assert list(work.iterdir())
        os.close(its)
        os.close(ours)
    assert not list(work.iterdir())
    assert not (tmp_path / "out").exists()


def test_unknown_targets_and_too_few_photos(tmp_path: Path, samples: Path) -> None:
    mini = find_bundle(packaged("mini"))
    with pytest.raises(UsageError, match="cannot export to 'abacus'; choose among onnx-fp32"):
        export_bundle(mini, ["abacus"])
    with pytest.raises(UsageError, match="no bfloat16 arithmetic on CPUs; choose openvino-bf16"):
        export_bundle(mini, ["onnx-bf16"])
    with pytest.raises(DataError, match="holds 3 readable photos; give at least 16"):
        export_bundle(mini, ["onnx-fp32"], photos=samples, out=tmp_path / "out")
    assert {"onnx-int8", "openvino-int8"} <= set(TARGETS)


def test_tensorrt_says_what_it_needs_or_is_proved(tmp_path: Path) -> None:
    bundle, (outcome,) = export_bundle(find_bundle(packaged("mini")), ["tensorrt"], out=tmp_path / "out")
    if "tensorrt" in bundle.runtimes:
        assert outcome.parity["cosine_mean"] > 0.999
    else:
        assert outcome.failed is not None
        assert "TensorRT" in outcome.failed
        pytest.skip("needs a GPU with TensorRT: " + outcome.failed)


def test_in_half_precision_lengths_are_taken_in_float32() -> None:
    from cliphar.export._targets import _half

    nodes = _half(float_graph(find_bundle(packaged("mini")))).graph.node
    maker = {name: node for node in nodes for name in node.output}
    lengths = [node for node in nodes if node.op_type in ("ReduceL2", "LpNormalization")]
    assert lengths
    for node in lengths:
        cast = maker[node.input[0]]
        assert cast.op_type == "Cast"
        assert cast.attribute[0].i == onnx.TensorProto.FLOAT


def test_tensorrt_is_given_what_it_takes(images: NDArray[np.uint8]) -> None:
    import onnxruntime

    from cliphar.export._quantize import quantize
    from cliphar.export._targets import _half
    from cliphar.export._tensorrt import float_first

    model = float_graph(find_bundle(packaged("mini")))
    for graph in (_half(model), quantize(model, images, symmetric=True)):
        given = float_first(graph)
        onnx.checker.check_model(given, full_check=True)
        assert {node.op_type for node in given.graph.node if "images" in node.input} == {"Cast"}  # of uint8, no other
        constants = {tensor.name: tensor for tensor in given.graph.initializer}
        zeros = [constants[n.input[2]] for n in given.graph.node if "uantizeLinear" in n.op_type and len(n.input) > 2]
        assert all(zero.data_type == onnx.TensorProto.INT8 for zero in zeros)
        assert not any(onnx.numpy_helper.to_array(zero).any() for zero in zeros)
        answers = [
            onnxruntime.InferenceSession(g.SerializeToString()).run(None, {"images": images}) for g in (graph, given)
        ]
        np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-6)


# --- model servers


def test_tritons_repository(tmp_path: Path) -> None:
    write_layout(find_bundle(packaged("mini")), "triton", tmp_path / "repository")
    folder = tmp_path / "repository" / "mini"
    assert (folder / "1" / "model.onnx").read_bytes() == (packaged("mini") / "image.onnx").read_bytes()
    config = (folder / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "max_batch_size: 64" in config
    assert "dims: [ 240, 240, 3 ]" in config
    assert config.count("[") == config.count("]")
    with pytest.raises(UsageError, match="exists; give another place"):
        write_layout(find_bundle(packaged("mini")), "triton", tmp_path / "repository")


def test_a_graph_goes_with_the_file_it_borrows_weights_from(tmp_path: Path) -> None:
    write_layout(find_bundle(packaged("mini")), "triton", tmp_path / "repository", runtime="onnx-int8")
    version = tmp_path / "repository" / "mini" / "1"
    assert {file.name for file in version.iterdir()} == {"model.onnx", "image.onnx"}


@pytest.mark.skipif(not OPENVINO, reason="needs openvino")
def test_kserves_storage(exported: tuple[Bundle, list[Added]], tmp_path: Path) -> None:
    import yaml

    write_layout(exported[0], "kserve", tmp_path / "storage", runtime="openvino-int8")
    version = tmp_path / "storage" / "models" / "mini" / "1"
    assert {file.name for file in version.iterdir()} == {"model.xml", "model.bin"}
    config = (version.parent / "config.pbtxt").read_text()
    assert "dims: [ -1, 240, 240, 3 ]" in config  # any batch,
    assert "max_batch_size" not in config  # with which the backend takes that very one
    assert "KIND_CPU" in config
    service = yaml.safe_load((tmp_path / "storage" / "inference-service.yaml").read_text())
    assert service["spec"]["predictor"]["model"]["protocolVersion"] == "v2"
    assert service["spec"]["predictor"]["model"]["runtimeVersion"] == "25.03-py3"
    with pytest.raises(UsageError, match="is not one that Triton serves"):
        write_layout(exported[0], "kserve", tmp_path / "other", runtime="abacus")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "service"), [("My_model.v2.", "my-model-v2"), ("24-hours", "model-24-hours"), ("on", "on")]
)
def test_a_kserve_service_has_a_name_that_is_taken(name: str, service: str, tmp_path: Path) -> None:
    import yaml

    mini = find_bundle("mini")
    write_layout(Bundle(mini.path, mini.info.model_copy(update={"name": name})), "kserve", tmp_path / "storage")
    written = yaml.safe_load((tmp_path / "storage" / "inference-service.yaml").read_text())
    assert written["metadata"]["name"] == service
    assert written["spec"]["predictor"]["model"]["storageUri"] == f"pvc://models/{name}/models"


# --- parts


def test_the_float_graph_of_a_dynamically_quantised_one(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from cliphar.export._float import _undo_dynamic

    random = np.random.default_rng(0)
    weights = random.normal(size=(16, 8)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one matrix",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 8])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8)
    model = onnx.load(tmp_path / "dynamic.onnx")
    assert "DynamicQuantizeLinear" in [node.op_type for node in model.graph.node]
    _undo_dynamic(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    x = random.normal(size=(4, 16)).astype(np.float32)
    answer = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(answer, x @ weights, atol=0.1)


def test_sensitive_layers_are_ranked_and_kept_in_float(images: NDArray[np.uint8]) -> None:
    from cliphar.export._quantize import quantize_within, sensitivity

    model = float_graph(find_bundle(packaged("mini")))
    ranked = sensitivity(model, images[:1])
    assert len(ranked) == len(set(ranked)) > 60
    tries: list[int] = []

    def judge(quantised: Any) -> str | None:
        tries.append(sum(node.op_type == "QuantizeLinear" for node in quantised.graph.node))
        return None if len(tries) == 3 else "not good enough"

    _, kept = quantize_within(model, images[:1], judge)
    assert kept == ranked[:2]
    assert tries[0] > tries[2]


def test_a_large_channel_does_not_round_the_others_away() -> None:
    random = np.random.default_rng(0)
    size = np.ones(12, np.float32)
    size[5] = 300
    weights = random.normal(size=(12, 8)) / size[:, None]
    parts = {"shape": np.array([-1, 12]), "size": size / 255, "weights": weights, "turned": -weights.T}
    nodes = [
        onnx.helper.make_node("Cast", ["images"], ["pixels"], "cast", to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Reshape", ["pixels", "shape"], ["flat"], "flat"),
        onnx.helper.make_node("Mul", ["flat", "size"], ["x"], "scaled"),
        onnx.helper.make_node("MatMul", ["x", "weights"], ["product"], "product"),
        onnx.helper.make_node("Gemm", ["x", "turned"], ["other"], "other", transB=1),
        onnx.helper.make_node("Concat", ["product", "other"], ["both"], "both", axis=1),
        onnx.helper.make_node("Softmax", ["both"], ["embeddings"], "attention"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "two products",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 2, 2, 3])],
        [onnx.helper.make_tensor_value_info("embeddings", onnx.TensorProto.FLOAT, ["n", 16])],
        [onnx.numpy_helper.from_array(v.astype(v.dtype if n == "shape" else "f"), n) for n, v in parts.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    images = random.integers(0, 256, (64, 2, 2, 3), np.uint8)
    smooth = smooth_inputs(model, images)

    def answer(model: Any) -> Any:
        return tapped_session(model, []).run(None, {"images": images})[0]

    exact = answer(model)
    np.testing.assert_allclose(answer(smooth), exact, atol=1e-5)
    lost, less = (np.abs(answer(quantize(one, images)) - exact).mean() for one in (model, smooth))
    assert less < 0.2 * lost


# --- the command


def test_the_command(tmp_path: Path, clean_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "export", "mini", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        [*command, "--to", "onnx-w8"], capture_output=True, text=True, env=clean_env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["target"], row["added"]) == ("onnx-w8", True)
    assert row["cosine_mean"] > 0.999
    assert "onnx-w8" in read_bundle(tmp_path / "out").runtimes
    wrong = subprocess.run(
        [*command, "--to", "abacus"], capture_output=True, text=True, env=clean_env, timeout=120, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    command[command.index("--out") + 1] = str(tmp_path / "repository")
    layout = subprocess.run([*command, "--to", "triton"], capture_output=True, text=True, env=clean_env, check=False)
    told = {"target": "triton", "added": True, "path": str(tmp_path / "repository")}
    assert json.loads(layout.stdout) == told, layout.stderr


def test_a_trained_bundle_has_a_model_in_plain_torch_to_be_compared_with() -> None:
    from cliphar.bench._worker import EAGER, _PyTorch

    mini = find_bundle(packaged("mini"))
    origin = mini.info.provenance.model_copy(update={"recipe": {"method": "gda"}})
    trained = Bundle(mini.path, mini.info.model_copy(update={"provenance": origin}))
    assert _PyTorch(trained, EAGER, 1).encode_images(np.zeros((2, 240, 240, 3), np.uint8)).shape == (2, 512)


def test_photos_of_other_labels_say_that_accuracy_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "photos" / "juggling").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (40, 30), (i, 100, 50)).save(tmp_path / "photos" / "juggling" / f"{i}.png")
    said: list[str] = []
    mini = find_bundle(packaged("mini"))
    export_bundle(mini, ["onnx-fp32"], photos=tmp_path / "photos", out=tmp_path / "out", say=said.append)
    assert "accuracy is not compared" in said[0]
