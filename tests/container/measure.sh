#!/usr/bin/env bash
# The table of docs/docker.md, for a quiet machine: measure.sh [CYCLES] prints it in Markdown.
set -euo pipefail
cd "$(dirname "$0")/../.."
id=cliphar-measure-$$
export CLIPHAR_IMAGE=$id COMPOSE_PROJECT_NAME=$id CLIPHAR_PORT=18200 CLIPHAR_APP_PORT=18201 CLIPHAR_WHEELS=${PIP_FIND_LINKS:-docker/wheels}
tree=$(mktemp -d)
clean() {
  docker compose down -v >/dev/null 2>&1 || true
  docker image rm -f "$id:api" "$id:app" "$id:train" "$id:openvino" "$id:changed" >/dev/null 2>&1 || true
  rm -rf "$tree"
}
trap clean EXIT
seconds() { # of a command, to a tenth
  local begun=$EPOCHREALTIME
  "$@" >"$tree/log" 2>&1 || { tail -20 "$tree/log" >&2; exit 1; }
  awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'
}
size() { docker image inspect -f '{{.Size}}' "$1" | awk '{ printf "%d", $1 / 1e6 }'; }
build() { docker build -q -f docker/Dockerfile.inference "$@" .; }
changed() { docker build -q -f "$tree/docker/Dockerfile.inference" --target api -t "$id:changed" "$tree"; }

echo '| image | MB | built with nothing cached but downloads, s |'
echo '|---|---|---|'
echo "| base | $(size python:3.11-slim-bookworm) | |"
t=$(seconds build --no-cache --target api -t "$id:api"); echo "| \`api\` | $(size "$id:api") | $t |"
t=$(seconds build --no-cache-filter dependencies-app --target app -t "$id:app"); echo "| \`app\` | $(size "$id:app") | $t more |"
t=$(seconds build --no-cache-filter dependencies-api --target api --build-arg VARIANT=openvino -t "$id:openvino"); echo "| \`api\`, OpenVINO | $(size "$id:openvino") | $t more |"
t=$(seconds docker compose --profile train build --no-cache train); echo "| \`train\`, CPU | $(size "$id:train") | $t |"
echo
echo '| what | s |'
echo '|---|---|'
cp -r .dockerignore pyproject.toml constraints.txt README.md LICENSE docker src "$tree"
seconds changed >/dev/null
echo "# changed" >>"$tree/src/cliphar/errors.py"
t=$(seconds changed); echo "| \`api\` built again after a change of code | $t |"
t=$(seconds docker compose up -d --wait api); echo "| \`docker compose up api\`, from nothing to healthy | $t |"
docker compose down >/dev/null 2>&1
t=$(seconds docker compose up -d --wait); echo "| \`docker compose up\`, from nothing to both healthy | $t |"
docker compose down >/dev/null 2>&1
if (($# > 0)); then
  echo
  bash tests/container/cycles.sh "$id:api" "$1"
fi
