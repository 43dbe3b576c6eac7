"""Fill a virtual environment with what an image needs, and nothing else.

environment.py PYTHON TARGET VARIANT installs; environment.py --list TARGET prints what it would; environment.py --trim
PYTHON leaves out what training does not need.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
LICENCE = re.compile(r"(?i)licen[cs]e|copying|copyright|notice|third.?party")

# Every function returns the same table of functions that return nothing: to x265's caller an interface that cannot
# allocate, to SVT-AV1's an error. ffmpeg says of both that the encoder does not open.
HOLLOW = """
static void *nothing(void) { return 0; }
static void *(*table[64])(void) = { [0 ... 63] = nothing };
"""


def requirements(project: dict, wanted: dict, target: str, variant: str) -> list[str]:
    """The plain dependencies, the target's extras with the extras they name, and the variant's own."""
    found, extras = list(project["dependencies"]), list(wanted["targets"][target])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"cliphar\[(.+)\]", line)
            extras.extend(own[1].split(",")) if own else found.append(line)
    changes = wanted["variants"][variant]
    if "instead" in changes:
        found = [line for line in found if not line.startswith("onnxruntime")] + changes["instead"]
    return found + changes.get("add", [])


def hollow(library: Path) -> None:
    """Replace a library by one of its name without its contents, for those linked with it."""

    def names(kind: str, *files: Path) -> set[str]:
        nm = ["nm", "--dynamic", "--just-symbols", "--without-symbol-versions", kind, *map(str, files)]
        return set(subprocess.run(nm, check=True, capture_output=True, text=True).stdout.split())

    asked = names("--defined-only", library) & names("--undefined-only", *library.parent.glob("*.so*"))
    code = HOLLOW + "".join(f"void *{name}(void) {{ return table; }}\n" for name in sorted(asked))
    build = ["gcc", "-shared", "-nostdlib", "-Os", "-s", f"-Wl,-soname,{library.name}", "-o", library, "-x", "c", "-"]
    subprocess.run(build, input=code, text=True, check=True)


def packages(python: str) -> Path:
    """Where an environment keeps its packages."""
    ask = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())


def leave_out(place: Path, patterns: list[str]) -> None:
    """Remove the files that the patterns name, and those in folders; licences stay, as they ask for it."""
    for pattern in patterns:
        for path in sorted(place.glob(pattern)):
            for inner in [*sorted(path.rglob("*"), reverse=True), path]:
                if inner.is_dir() and not inner.is_symlink():
                    if not any(inner.iterdir()):
                        inner.rmdir()
                elif not LICENCE.match(inner.name):
                    inner.unlink(missing_ok=True)


def main() -> None:
    """Install, then leave out what is not needed, strip and compile."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = tomllib.loads((HERE / "environment.toml").read_text())
    if sys.argv[1] == "--list":
        print(*requirements(project, wanted, sys.argv[2], "cpu"), sep="\n")
        return
    if sys.argv[1] == "--trim":
        leave_out(packages(sys.argv[2]), wanted["omit"]["train"])
        return
    python, target, variant = sys.argv[1:]
    if variant not in wanted["variants"]:
        raise SystemExit(f"no VARIANT={variant}: it is one of {', '.join(wanted['variants'])}")
    pip = [str(Path(sys.executable).with_name("pip")), "--python", python]
    options = ["--quiet", "--no-compile", "--only-binary", ":all:", "--constraint", "constraints.txt"]
    options += [f"--no-binary={name}" for name in wanted["variants"][variant].get("source", ())]
    subprocess.run([*pip, "install", *options, *requirements(project, wanted, target, variant)], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *wanted["omit"]["packages"]], check=True)
    place = packages(python)
    leave_out(place, wanted["omit"]["files"])
    for pattern in wanted["omit"]["hollow"]:
        for library in place.glob(pattern):
            hollow(library)
    # debug symbols; *.libs, auditwheel's, do not load stripped; tensorrt_libs has none
    symbols = [str(path) for path in place.rglob("*.so*") if "libs/" not in str(path) and path.is_file()]
    subprocess.run(["strip", "--strip-unneeded", *symbols], check=True)
    # checked by nothing: valid however the layer is copied; the root is read-only
    left = ["-x", wanted["omit"]["bytecode"]]
    compile_all = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", *left, str(place)]
    subprocess.run([python, *compile_all], check=True)


if __name__ == "__main__":
    main()
