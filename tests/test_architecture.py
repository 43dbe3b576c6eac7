"""The shape of the source: rooms that import only those above them, small files, names that say what they are."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import cliphar
from cliphar.errors import UsageError

ROOT = Path(cliphar.__file__).resolve().parent
# each room imports only those before it; errors and _version are free for all
ROOMS = (
    "bundle",
    "labels",
    "media",
    "runtime",
    "recognizer",
    "timeline",
    "data",
    "models",
    "evaluation",
    "export",
    "bench",
    "training",
    "client",
    "serving",
    "ui",
    "cli",
)
FREE = {"errors", "_version"}
FILES = sorted(ROOT.rglob("*.py"))
PUBLIC = [f for f in FILES if f.name == "__init__.py" or not f.name.startswith("_")]
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def is_module(name: str) -> bool:
    top, *parts = name.split(".")
    place = ROOT.joinpath(*parts)
    return top == "cliphar" and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def imports(file: Path) -> list[tuple[int, str]]:
    """Every imported module with its line, those inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(file)}:{node.lineno} is a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # from cliphar.cli import _main
                found.append((node.lineno, inner if is_module(inner) else node.module or ""))
    return found


def own_imports(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    return [(line, tuple(name.split(".")[1:])) for line, name in imports(file) if name.split(".")[0] == "cliphar"]


def all_of(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def test_every_folder_is_a_room() -> None:
    folders = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    assert {f.stem for f in ROOT.glob("*.py")} == {"__init__", "__main__", *FREE}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_above_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *FREE}
    wrong = [
        f"{short(file)}:{line} imports {'.'.join(parts)}"
        for file in sorted((ROOT / room).rglob("*.py"))
        for line, parts in own_imports(file)
        if parts and parts[0] not in allowed
    ]
    assert not wrong


def test_what_is_free_for_all_imports_nothing_of_ours() -> None:
    for name in FREE:
        assert own_imports(ROOT / f"{name}.py") == []


def test_no_cycles_among_modules() -> None:
    modules = {"cliphar." + short(f).removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}
    del modules["cliphar.__init__"]
    graph = {
        name: {
            target
            for _, parts in own_imports(file)
            if (target := ".".join(("cliphar", *parts))) in modules and target != name
        }
        for name, file in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert any(graph.values())


def test_no_file_is_long() -> None:
    lengths = {short(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("file", PUBLIC, ids=short)
def test_a_public_module_says_what_is_public(file: Path) -> None:
    names = all_of(TREES[file])
    assert names is not None, "no __all__"
    assert len(set(names)) == len(names)
    assert ast.get_docstring(TREES[file]), "no docstring"


@pytest.mark.parametrize("file", FILES, ids=short)
def test_public_names_exist_and_are_documented(file: Path) -> None:
    names = all_of(TREES[file]) or []
    body = TREES[file].body
    defined = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    undocumented = [name for name in names if name in defined and not ast.get_docstring(defined[name])]
    assert not undocumented
    known = set(defined) | {"__version__"}
    for node in ast.walk(TREES[file]):
        match node:
            case ast.Import() | ast.ImportFrom():
                known |= {alias.asname or alias.name for alias in node.names}
            case ast.Name(id=name, ctx=ast.Store()):
                known.add(name)
    assert set(names) <= known


@pytest.mark.parametrize("file", FILES, ids=short)
def test_nothing_is_unpickled(file: Path) -> None:
    names = {name.split(".")[0] for _, name in imports(file)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(TREES[file]):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", False) is True for k in keywords)
                assert safe, f"{short(file)}:{node.lineno}: torch.load without weights_only=True"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=value)):
                assert value is False, f"{short(file)}:{node.lineno}"


@pytest.mark.parametrize("room", ["bundle", "labels", "media", "runtime", "recognizer", "data", "evaluation", "cli"])
def test_serving_rooms_never_name_torch_at_the_top(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for node in TREES[file].body:
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & {"torch", "onnx", "scipy"}, short(file)
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"torch", "onnx", "scipy"}, short(file)


def test_importing_cliphar_costs_nothing(run_python: Callable[[str], str]) -> None:
    code = "import sys, cliphar; print(cliphar.__version__, *{m.partition('.')[0] for m in sys.modules})"
    version, *modules = run_python(code).split()
    assert version == cliphar.__version__
    assert not set(modules) & {"numpy", "onnxruntime", "torch", "PIL", "pydantic", "tokenizers", "scipy"}


def test_predicting_needs_no_training_library(run_python: Callable[[str], str], photos: list[Path]) -> None:
    code = (
        "import sys, cliphar\n"
        f"cliphar.load('mini').predict({str(photos[0])!r}, ['cooking', 'sleeping'])\n"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    modules = set(run_python(code).split())
    assert "onnxruntime" in modules
    assert not modules & {"torch", "onnx", "scipy", "typer", "rich", "pyarrow"}


def test_the_package_has_only_its_public_names() -> None:
    assert cliphar.UsageError is UsageError
    for name in cliphar.__all__:
        assert getattr(cliphar, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cliphar.nonsense
