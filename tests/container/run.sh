#!/usr/bin/env bash
# Build the image with a real engine and use it as people do. Ends with 'N passed, 0 failed'.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then eval "$(../shared/tools/docker-up)"; fi

image=cliphar:0.1.0
work=$(mktemp -d)
passed=0
ok() { passed=$((passed + 1)); echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; echo "$passed passed, 1 failed"; exit 1; }
trap 'docker compose down -v --remove-orphans >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
chmod 755 "$work"
samples=$PWD/src/cliphar/assets/samples
run() { docker run --rm --read-only --tmpfs /tmp --network none --memory 512m --cpus 1 -u 12345:12345 -v "$samples:/work:ro" "$@"; }

docker build --progress=plain -f docker/Dockerfile.inference -t "$image" . >"$work/cold.log" 2>&1 || { tail -30 "$work/cold.log"; fail "cold build"; }
ok "the image builds"

cp -r . "$work/tree" && rm -rf "$work/tree/runs" "$work/tree/.venv"
echo "# changed" >>"$work/tree/src/cliphar/errors.py"
started=$SECONDS
docker build --progress=plain -f "$work/tree/docker/Dockerfile.inference" -t cliphar:changed "$work/tree" >"$work/warm.log" 2>&1 || fail "warm build"
layer=$(grep -oE '^#[0-9]+ \[dependencies .*needs.txt' "$work/warm.log" | head -1 | cut -d' ' -f1)
grep -qE "^$layer CACHED" "$work/warm.log" || fail "a change of code installed the dependencies again"
ok "a change of code keeps the dependency layer; warm build $((SECONDS - started)) s"
docker image rm -f cliphar:changed >/dev/null

size=$(($(docker image inspect -f '{{.Size}}' "$image") / 1000000))
((size <= 450)) || fail "the image has $size MB"
ok "the image has $size MB"

run "$image" predict . --labels-file labels.txt --json >"$work/out.jsonl" || fail "predict"
[ "$(wc -l <"$work/out.jsonl")" = 3 ] && grep -q '"label": "smiling for a portrait"' "$work/out.jsonl" || fail "answers: $(cat "$work/out.jsonl")"
ok "photos are recognised as uid 12345, read-only, without a network, in 512 MB and one CPU"

run "$image" doctor >"$work/doctor" || fail "doctor: $(cat "$work/doctor")"
grep -q 'CPU: 1 of' "$work/doctor" || fail "threads do not follow the quota: $(cat "$work/doctor")"
ok "threads follow the CPU quota"

mkdir "$work/bad" && head -c 900 "$samples/cat.jpg" >"$work/bad/cut.jpg" && cp "$samples/portrait.jpg" "$work/bad/" && chmod -R a+rX "$work/bad"
code=0; docker run --rm -v "$work/bad:/work:ro" "$image" predict . >"$work/out" 2>"$work/err" || code=$?
[ "$code" = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q portrait "$work/out" || fail "a damaged photo: $code $(cat "$work/err")"
ok "a damaged photo is one line and status 1; the other is done"

cp -r src/cliphar/assets/mini "$work/mine" && chmod -R a+rX "$work/mine"
run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" model verify /bundle >/dev/null || fail "a mounted bundle"
run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" predict portrait.jpg >/dev/null || fail "MODEL_PATH"
ok "a mounted bundle is verified and used"
printf 'x' | dd of="$work/mine/text.onnx" bs=1 seek=5000 conv=notrunc status=none
code=0; run -e MODEL_PATH=/bundle -v "$work/mine:/bundle:ro" "$image" predict portrait.jpg 2>"$work/err" || code=$?
[ "$code" = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q altered "$work/err" || fail "an altered bundle: $(cat "$work/err")"
ok "an altered bundle is refused in one line"

docker run --rm --entrypoint sh "$image" -c 'command -v gcc || command -v cc || /opt/cliphar/bin/python -c "import torch" ||
  /opt/cliphar/bin/python -c "import pip"' >/dev/null 2>&1 && fail "a compiler, torch or pip is in the image"
ok "no compiler, torch or pip in the image"

docker compose config -q || fail "compose file"
docker compose up --no-log-prefix >"$work/up" 2>&1 || fail "compose up: $(tail -5 "$work/up")"
grep -q photographer.jpg "$work/up" || fail "compose up printed $(tail -5 "$work/up")"
ok "docker compose up recognises the samples"
docker compose run --rm predict predict photographer.jpg --labels "taking a photo, sleeping" >"$work/one" 2>/dev/null || fail "compose run"
grep -q photographer.jpg "$work/one" || fail "compose run printed $(cat "$work/one")"
ok "docker compose run takes any command"

echo "$passed passed, 0 failed"
