"""The real program in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import ExifTags, Image

import cliphar
from cliphar.bundle import packaged
from cliphar.media import decode_image
from serving_process import bounded, read_terminal

WORDS = "taking a photo, riding_a_bike, smiling"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Env = dict[str, str]
WINDOWS = sys.platform == "win32"
COMMAND = [sys.executable, "-m", "cliphar"]
tty = pytest.mark.skipif(WINDOWS, reason="no pseudo-terminals")


@pytest.fixture
def cli(clean_env: Env, tmp_path: Path) -> Run:
    """Run the program; whatever happens, it never shows a traceback."""

    def run(*arguments: object, **env: str) -> Done:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=clean_env | {"PYTHONUTF8": "1"} | env,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    return run


def error_lines(done: Done) -> list[str]:
    lines = done.stderr.splitlines()
    assert all(line.startswith("cliphar: ") for line in lines), done.stderr
    return lines


# --- predict


def test_predict_json(cli: Run, photos: list[Path]) -> None:
    done = cli("predict", *photos, "--labels", WORDS, "--json", "-k", 2)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == [str(photo) for photo in photos]
    for row in rows:
        assert list(row) == ["path", "label", "score", "set", "top"]
        assert {entry["label"] for entry in row["top"]} <= {"taking a photo", "riding a bike", "smiling"}
        assert len(row["top"]) == 2
        assert row["score"] == row["top"][0]["score"]
        assert row["label"] in (row["top"][0]["label"], "unknown")
        assert row["set"][0] == row["top"][0]["label"]


def test_labels_may_be_given_one_by_one(cli: Run, photos: list[Path]) -> None:
    done = cli("predict", photos[0], "-l", "taking a photo", "-l", "riding_a bike, smiling", "--json")
    assert {entry["label"] for entry in json.loads(done.stdout)["top"]} == {
        "taking a photo",
        "riding a bike",
        "smiling",
    }


@pytest.mark.skipif(WINDOWS, reason="no such names")
def test_each_answer_is_one_line_whatever_a_files_name_holds(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    name, spelled = "a  b\tc\nd\x1b[31m\u202e.jpg", r"a  b\tc\nd\x1b[31m\u202e.jpg"
    shutil.copy(photos[0], tmp_path / name)
    assert [line.split("\t")[0] for line in cli("predict", name).stdout.splitlines()] == [spelled]
    assert json.loads(cli("predict", name, "--json").stdout)["path"] == name
    (tmp_path / name).write_bytes(b"no photo")
    for command in ("predict", "video"):
        (line,) = error_lines(cli(command, name))
        assert line.startswith(f"cliphar: {spelled} is ")
    (tmp_path / "set" / "x").mkdir(parents=True)
    (tmp_path / name).rename(tmp_path / "set" / "x" / name)
    assert spelled in cli("data", "check", "set").stderr.splitlines()[-1]
    assert "\x1b" not in cli("predict", name, "--labels-file", name).stderr


def test_what_is_no_photo_is_told_where_it_belongs(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "clip.MP4").write_bytes(bytes(100))
    done = cli("predict", "clip.MP4", "https://example.org/a.jpg")
    assert error_lines(done) == [
        "cliphar: clip.MP4 is a video, not a photo; run 'cliphar video' on it",
        "cliphar: https://example.org/a.jpg is an address, not a file; fetch it first, as with curl -O",
    ]


def test_a_folder_tells_of_what_is_not_answered(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "phone"
    folder.mkdir()
    shutil.copy(photos[0], folder)
    (folder / "clip.MP4").write_bytes(bytes(100))
    Image.open(photos[0]).save(folder / "photo.gif")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99))
    (tmp_path / "pillow_heif.py").write_text("raise ImportError")
    done = cli("predict", "phone", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 2)
    assert error_lines(done) == [
        "cliphar: phone holds videos (1); run 'cliphar video' on it",
        "cliphar: phone/IMG_1.HEIC is HEIC; make it a JPEG, or run: pip install 'cliphar[heif]'",
    ]
    for photo in (folder / "photo.gif", folder / "IMG_1.HEIC", folder / photos[0].name):
        photo.unlink()
    done = cli("predict", "phone")
    assert done.returncode == 2
    assert error_lines(done) == [
        "cliphar: phone holds videos (1); run 'cliphar video' on it",
        "cliphar: no images in phone",
    ]


def test_heic(photos: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    wide = Image.open(photos[0]).crop((0, 0, 400, 200))
    wide.info = {"exif": exif.tobytes()}
    wide.save(tmp_path / "a.HEIC")
    assert decode_image(tmp_path / "a.HEIC").size == (200, 400)


def test_predict_in_a_pipe_is_tab_separated(cli: Run, samples: Path, photos: list[Path]) -> None:
    done = cli("predict", samples, "--labels-file", samples / "labels.txt")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(photo) for photo in photos]
    assert all(len(row) == 3 and 0 <= float(row[2]) <= 1 for row in rows)


def test_folders_and_patterns(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    deep = tmp_path / "trip" / "day 2"
    deep.mkdir(parents=True)
    shutil.copy(photos[0], tmp_path / "trip" / "b.JPG")
    shutil.copy(photos[0], deep / "a.jpg")
    (deep / "notes.txt").write_text("no photo")
    done = cli("predict", "trip", "trip/*.JPG", "t*", "trip/**/*[2g]", "--labels", WORDS)
    assert (done.returncode, done.stderr) == (0, "")
    paths = [line.split("\t")[0] for line in done.stdout.splitlines()]
    both = ["trip/b.JPG", "trip/day 2/a.jpg"]
    assert paths == [*both, both[0], *both, both[1]]


def test_a_photo_that_only_a_broken_link_is_left_of_is_reported(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "trip"
    folder.mkdir()
    (folder / "away").symlink_to(photos[0].parent)
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    done = cli("predict", "trip")
    assert done.returncode == 1
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [f"trip/away/{p.name}" for p in photos]
    assert error_lines(done) == ["cliphar: trip/gone.jpg does not exist"]


def test_an_existing_file_is_no_pattern(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    shutil.copy(photos[0], tmp_path / "a[1].jpg")
    done = cli("predict", "a[1].jpg")
    assert (done.returncode, done.stdout.split("\t")[0]) == (0, "a[1].jpg")


def test_what_cannot_be_read_is_reported_and_the_rest_done(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "damaged.jpg").write_bytes(photos[0].read_bytes()[:500])
    (tmp_path / "empty.png").touch()
    bad = ["missing.jpg", "damaged.jpg", "empty.png", "x" * 300 + ".jpg"]
    done = cli("predict", *bad[:2], photos[0], *bad[2:], "--json", "-o", "answers.jsonl")
    assert done.returncode == 1
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == [str(photos[0])]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    lines = error_lines(done)
    assert len(lines) == len(bad)
    assert all(name in line for name, line in zip(bad, lines, strict=True))


def test_nothing_that_can_be_read(cli: Run, tmp_path: Path) -> None:
    for out in ("a.csv", "a.parquet"):
        done = cli("predict", "missing.jpg", "--out", out)
        assert (done.returncode, done.stdout, len(error_lines(done))) == (1, "", 1)
    columns = ["path", "label", "score", "set", "top"]
    assert (tmp_path / "a.csv").read_text().split() == [",".join(columns)]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").column_names == columns


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_name_that_is_not_text(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(photos[0], folder / os.fsdecode(b"caf\xe9.jpg"))
    for options in (["--json"], [], ["--json", "-o", "a.jsonl"], ["-o", "a.csv"], ["-o", "a.parquet"]):
        done = cli("predict", folder, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert "caf\\" in done.stdout
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no photo")
    done = cli("predict", folder)
    assert (done.returncode, len(error_lines(done))) == (1, 1)


def test_letters_the_output_lacks(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    shutil.copy(photos[0], tmp_path / "фото📷.jpg")
    done = cli("predict", "фото📷.jpg", "--json", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["path"] == "фото📷.jpg"
    done = cli("predict", "фото📷.jpg", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"\u0444\u043e\u0442\u043e\ud83d\udcf7.jpg" + "\t")


WRONG = {
    "both ways to give labels": ["predict", "PHOTO", "--labels", "a", "--labels-file", "LABELS"],
    "no labels": ["predict", "PHOTO", "--labels", " , "],
    "the reserved word": ["predict", "PHOTO", "--labels", "a,unknown"],
    "no labels file": ["predict", "PHOTO", "--labels-file", "missing.txt"],
    "a folder as labels file": ["predict", "PHOTO", "--labels-file", "empty"],
    "a suffix": ["predict", "PHOTO", "--out", "a.txt"],
    "a place": ["predict", "PHOTO", "--out", "nowhere/a.csv"],
    "a folder as file": ["predict", "PHOTO", "--out", "folder.csv"],
    "an empty folder": ["predict", "empty"],
    "a pattern": ["predict", "empty/*.jpg"],
    "coverage": ["predict", "PHOTO", "--coverage", "2"],
    "coverage word": ["predict", "PHOTO", "--coverage", "much"],
    "top": ["predict", "PHOTO", "-k", "0"],
    "provider": ["predict", "PHOTO", "--provider", "abacus"],
    "threads": ["predict", "PHOTO", "--threads", "0"],
    "no photos": ["predict"],
    "option": ["predict", "PHOTO", "--nonsense"],
    "an option without its value": ["predict", "PHOTO", "--labels"],
    "command": ["nonsense"],
    "eval without data": ["eval"],
    "a plot's place": ["bench", "--plot", "nowhere/a.png"],
    "a plot's kind": ["bench", "--plot", "a.nonsense"],
    "serve at no address": ["serve", "--host", ""],
    "a page at no address": ["app", "--host", ""],
    "a page's origin without https": ["serve", "--cors", "page.example"],
    "a page's path": ["serve", "--cors", "https://page.example/app"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(cli: Run, photos: list[Path], samples: Path, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    real = {"PHOTO": photos[0], "LABELS": samples / "labels.txt"}
    done = cli(*[real.get(argument, argument) for argument in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(error_lines(done)) == 1
    assert not list(tmp_path.glob("*.csv.*"))


def test_options_from_the_environment(cli: Run, photos: list[Path]) -> None:
    assert cli("predict", photos[0], CLIPHAR_COVERAGE="2").returncode == 2
    assert cli("predict", photos[0], CLIPHAR_PROVIDER="abacus").returncode == 2
    done = cli("predict", photos[0], MODEL_PATH="/nowhere/at/all")
    assert (done.returncode, len(error_lines(done))) == (1, 1)
    assert cli("predict", photos[0], MODEL_PATH="").returncode == 0


@pytest.mark.parametrize("model", ["minni", "/nowhere/at/all", "x" * 300, "clip-b99"])
def test_models_that_are_not_there(cli: Run, photos: list[Path], model: str) -> None:
    done = cli("predict", photos[0], "--model", model)
    assert (done.returncode, done.stdout, len(error_lines(done))) == (1, "", 1)


def test_answers_to_files(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    plain = [json.loads(line) for line in cli("predict", *photos, "--json", "--out", "a.jsonl").stdout.splitlines()]
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == plain

    assert cli("predict", *photos, "--out", "a.csv").returncode == 0
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row["path"] for row in plain]
    assert [row["label"] for row in rows] == [row["label"] for row in plain]
    assert [float(row["score"]) for row in rows] == [row["score"] for row in plain]
    assert [row["set"].split("; ") for row in rows] == [row["set"] for row in plain]
    assert rows[0]["top"].startswith(f"{plain[0]['top'][0]['label']} ")

    kept, link = tmp_path / "home" / "kept.csv", tmp_path / "link.csv"
    kept.parent.mkdir(exist_ok=True)
    link.symlink_to(kept)
    assert cli("predict", *photos, "--out", "link.csv").returncode == 0
    assert kept.read_bytes() == (tmp_path / "a.csv").read_bytes()
    link.unlink()

    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli("predict", *photos, "--out", "a.parquet").returncode == 0
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == plain
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["a.csv", "a.jsonl", "a.parquet"]
    assert (tmp_path / "a.csv").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


@tty
@pytest.mark.parametrize(("columns", "bar"), [(80, 24), (50, 16), (30, 0)])
def test_on_a_terminal_there_are_bars(clean_env: Env, photos: list[Path], columns: int, bar: int) -> None:
    import pty

    outside, inside = pty.openpty()
    command = [*COMMAND, "predict", str(photos[0]), "--labels", WORDS]
    env = clean_env | {"TERM": "xterm-256color", "PYTHONUTF8": "1", "COLUMNS": str(columns)}
    with subprocess.Popen(command, stdout=inside, stderr=subprocess.PIPE, env=env) as process:
        os.close(inside)
        shown = read_terminal(outside)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert ("█" in text) == bool(bar)
    assert "\t" not in text
    assert len(re.findall(rf"  [█░]{{{bar}}} +\d+\.\d%", text)) == 3
    assert "riding a bike" in text
    assert "in set" in text


@tty
@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_cuts_no_figure_of_the_card(clean_env: Env, columns: int) -> None:
    import pty

    outside, inside = pty.openpty()
    command = [*COMMAND, "model", "show", "mini"]
    with subprocess.Popen(command, stdout=inside, env=clean_env | {"COLUMNS": str(columns)}):
        os.close(inside)
        shown = read_terminal(outside)
    assert all(figure in shown for figure in ("0.837", "0.836", "6.873"))


@pytest.mark.skipif(WINDOWS, reason="no head")
def test_a_reader_that_goes_away(clean_env: Env, photos: list[Path], tmp_path: Path) -> None:
    predict = " ".join([f"'{sys.executable}' -m cliphar predict", *(f"'{photo}'" for photo in photos * 30)])
    for options in ("--json", ""):
        command = f"{predict} {options} | head -1"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, env=clean_env, timeout=120, check=False
        )
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr == ""
    command = f"{predict} gone -o '{tmp_path}/a.jsonl' 2>&1 | head -1"
    subprocess.run(["sh", "-c", command], env=clean_env, timeout=120, check=False)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 30 * len(photos)
    for command in ("--version", "--help", "data --help"):  # nobody reads at all
        with subprocess.Popen([*COMMAND, *command.split()], stdout=subprocess.PIPE, env=clean_env) as process:
            assert process.stdout is not None
            process.stdout.close()
        assert process.returncode == 0, command


@pytest.mark.skipif(WINDOWS, reason="no signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_keeps_what_was_answered(
    clean_env: Env, photos: list[Path], tmp_path: Path, stop: signal.Signals
) -> None:
    command = [*COMMAND, "predict", *map(str, photos * 1000), "-o", str(tmp_path / "a.jsonl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + stop, "")
    assert 0 < len((tmp_path / "a.jsonl").read_text().splitlines()) < 1000 * len(photos)


@pytest.mark.parametrize(
    ("moment", "status"),
    [
        ("module, error = 'cliphar.cli._main', KeyboardInterrupt()", 130),
        # as libraries in C do
        ("module, error = 'onnxruntime', ImportError(); error.__cause__ = KeyboardInterrupt()", 130),
        ("module = ''; typer.main.get_command = lambda *_: signal.raise_signal(signal.SIGTERM)", 143),
    ],
)
def test_stopped_while_it_starts(clean_env: Env, photos: list[Path], moment: str, status: int) -> None:
    code = f"""
import signal, sys, typer.main
{moment}
class Stop:
    def find_spec(name, *_):
        if name == module: raise error
sys.meta_path.insert(0, Stop)
from cliphar.cli import main
main()
"""
    command = [sys.executable, "-c", code, "predict", str(photos[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_second_ctrl_c(run_python: Callable[[str], str], tmp_path: Path) -> None:
    run_python(f"""
import contextlib, pathlib, signal
from cliphar.cli._output import Writer
write = Writer.write
Writer.write = lambda self: signal.raise_signal(signal.SIGINT) or write(self)
with contextlib.suppress(KeyboardInterrupt), Writer(pathlib.Path("{tmp_path}/a.csv")): pass
""")
    assert (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("shut", [1, 2])
def test_a_closed_output(clean_env: Env, photos: list[Path], tmp_path: Path, shut: int) -> None:
    command = f"'{sys.executable}' -m cliphar predict '{photos[0]}' gone -o '{tmp_path}/a.jsonl' {shut}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=clean_env, timeout=120, check=False)
    assert (done.returncode, (done.stdout + done.stderr).count(b"\n")) == (1, 1)
    assert (tmp_path / "a.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(clean_env: Env, photos: list[Path]) -> None:
    command = [*COMMAND, "predict", str(photos[0])]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=clean_env, timeout=120, check=False
        )
    assert done.returncode == 1
    assert len(error_lines(done)) == 1
    assert "No space left" in done.stderr


# --- data


def test_where_nothing_has_a_label_none_is_the_commonest(cli: Run, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("file,caption\n" + "".join(f"{photo},somebody\n" for photo in photos))
    done = cli("data", "check", "set.csv")
    assert done.returncode == 0
    assert done.stdout.endswith("3 photos have no label\n")


# --- eval

REPORT = {"n", "top1", "top5", "macro_f1", "ece", "coverage", "set_size", "images_per_s"}


@pytest.fixture
def labelled(photos: list[Path], tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for label, photo in zip(("taking_a_photo", "riding__a_bike", "smiling"), photos, strict=False):
        (root / label).mkdir(parents=True)
        shutil.copy(photo, root / label)
    return root


def test_eval(cli: Run, labelled: Path) -> None:
    done = cli("eval", "--data", labelled, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) >= REPORT
    assert report["n"] == 3
    assert report["top5"] == 1  # of three labels, the right one is always among five
    assert report["images_per_s"] > 0
    done = cli("eval", "--data", labelled, "--labels", f"{WORDS}, cooking")
    assert done.returncode == 0
    assert {line.partition(" ")[0] for line in done.stdout.splitlines()} >= REPORT


def test_eval_with_a_stray_folder(cli: Run, labelled: Path) -> None:
    done = cli("eval", "--data", labelled, "--labels", "smiling, riding a bike")
    assert (done.returncode, done.stdout) == (2, "")
    assert "taking a photo" in error_lines(done)[0]


def test_eval_of_one_label_is_no_measurement(cli: Run, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (labelled / "smiling").rename(tmp_path / "one" / "smiling")
    done = cli("eval", "--data", tmp_path / "one")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'smiling' is the only label" in error_lines(done)[0]
    assert cli("eval", "--data", tmp_path / "one", "--labels", "smiling, cooking", "--json").returncode == 0


def test_eval_with_a_damaged_photo(cli: Run, labelled: Path) -> None:
    (labelled / "smiling" / "damaged.jpg").write_bytes(b"\xff\xd8\xff no photo")
    done = cli("eval", "--data", labelled, "--json")
    assert (done.returncode, len(error_lines(done))) == (1, 1)
    assert json.loads(done.stdout)["n"] == 3
    for photo in labelled.rglob("*.jpg"):
        photo.write_bytes(b"no photo")
    done = cli("eval", "--data", labelled, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "none of the 4 photos" in error_lines(done)[-1]


@tty
def test_eval_shows_on_a_terminal_how_far_it_is(labelled: Path, clean_env: Env) -> None:
    import pty

    for i in range(50):
        (labelled / "smiling" / f"{i}.jpg").symlink_to(next(labelled.glob("smiling/*.jpg")))
    outside, inside = pty.openpty()
    command = [*COMMAND, "eval", "--data", str(labelled)]
    env = clean_env | {"TERM": "xterm-256color", "PYTHONUTF8": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inside, env=env) as process:
        os.close(inside)
        assert "53/53" in read_terminal(outside)
        assert process.communicate(timeout=120)[0].startswith(b"n             53")


def test_eval_of_no_data(cli: Run, tmp_path: Path) -> None:
    for data in ("missing", "."):
        done = cli("eval", "--data", data)
        assert (done.returncode, done.stdout, len(error_lines(done))) == (1, "", 1)


# --- model


def test_model_list(cli: Run) -> None:
    done = cli("model", "list")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["mini", "ready"])


def test_model_show(cli: Run) -> None:
    card = cli("model", "show")
    assert card.returncode == 0
    assert card.stdout.startswith("# mini\n")
    info = json.loads(cli("model", "show", "mini", "--json").stdout)
    assert info == json.loads((packaged("mini") / "bundle.json").read_text(encoding="utf-8"))
    assert cli("model", "show", "minni").returncode == 1


def test_model_verify(cli: Run, tmp_path: Path) -> None:
    done = cli("model", "verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "all as they should be" in done.stdout
    copy = tmp_path / "copy"
    shutil.copytree(packaged("mini"), copy)
    raw = bytearray((copy / "image.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "image.onnx").write_bytes(raw)
    done = cli("model", "verify", copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert "image.onnx" in error_lines(done)[0]
    assert "altered" in error_lines(done)[0]


def test_model_pull_that_fails(cli: Run, tmp_path: Path) -> None:
    for arguments in (["nonsense"], ["clip-b16", "--from", tmp_path / "missing.whl"]):
        done = cli("model", "pull", *arguments)
        assert (done.returncode, done.stdout, len(error_lines(done))) == (1, "", 1)


# --- doctor and the rest


def test_doctor(cli: Run) -> None:
    done = cli("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"cliphar {cliphar.__version__}" in done.stdout
    assert "model mini: complete and unaltered" in done.stdout
    assert "BAD" not in done.stdout


def test_doctor_finds_what_is_wrong(cli: Run, tmp_path: Path) -> None:
    done = cli("doctor", MODEL_PATH="/nowhere/at/all")
    assert done.returncode == 1
    assert "BAD  MODEL_PATH=/nowhere/at/all" in done.stdout
    copy = tmp_path / "home" / "altered"
    shutil.copytree(packaged("mini"), copy)
    (copy / "head.safetensors").write_bytes(b"x" * (copy / "head.safetensors").stat().st_size)
    done = cli("doctor")
    assert done.returncode == 1
    assert "BAD  model altered" in done.stdout


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ('RuntimeError("can\'t start new thread")', "no more threads may be started; raise 'ulimit -u'"),
        ("PermissionError(13, 'denied', 'x')", "[Errno 13] denied: 'x'; let this user read it, or write there\n"),
    ],
)
def test_what_this_user_may_not_is_told_in_a_line(run_python: Callable[[str], str], error: str, told: str) -> None:
    photo = packaged("samples") / "cat.jpg"
    code = f"""
import contextlib, io, os, sys, threading
def start(thread): raise {error}
threading.Thread.start = start
sys.argv = ["cliphar", "predict", {str(photo)!r}]
sys.stderr = told = io.StringIO()
out = os.dup(1)
from cliphar.cli import main
try: main()
except SystemExit as end: print(end.code, told.getvalue().count("\\n"), told.getvalue(), file=open(out, "w"))
"""
    assert run_python(code).startswith(f"1 1 cliphar: {told}")


def test_version(cli: Run) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"cliphar {cliphar.__version__}\n")


def test_every_command_has_help(cli: Run) -> None:
    commands = ["", "predict", "eval", "train", "doctor", "model"]
    commands += [f"model {name}" for name in ("list", "show", "verify", "pull")]
    with ThreadPoolExecutor(2) as pool:
        for command, done in zip(commands, pool.map(lambda c: cli(*c.split(), "--help"), commands), strict=True):
            assert (done.returncode, done.stderr) == (0, ""), command
            assert "Usage:" in done.stdout, command


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["--version"]])
def test_help_is_quick(run_python: Callable[[str], str], arguments: list[str]) -> None:
    code = (
        "import sys, contextlib, io\n"
        f"sys.argv = ['cliphar', *{arguments!r}]\n"
        "from cliphar.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    modules = set(run_python(code).split())
    assert "typer" in modules
    assert not modules & {"numpy", "onnxruntime", "torch", "PIL", "tokenizers", "scipy", "pyarrow"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_ends_when_its_terminal_is_closed(clean_env: Env, workers: str) -> None:
    ours, its = os.openpty()
    terminal = os.ttyname(its)  # the first that a session opens is its own
    serve = f"exec {sys.executable} -m cliphar serve --port 0 --workers {workers} <{terminal} >{terminal} 2>&1"
    with (
        subprocess.Popen(["sh", "-c", serve], env=clean_env, start_new_session=True, text=True) as process,
        bounded(process),
    ):
        shown = b""
        while shown.count(b'"ready"') < int(workers):
            shown += os.read(ours, 65536)
        os.close(its)
        os.close(ours)
        assert process.wait() not in (-signal.SIGKILL, -signal.SIGHUP)
