#!/usr/bin/env bash
# Start the API, wait until it is healthy, ask it, stop it, N times, and see that the second to last leave nothing: cycles.sh IMAGE N
set -euo pipefail
image=$1 cycles=$2
name=cliphar-cycles-$$
trap 'docker rm -f -v "$name" >/dev/null 2>&1; docker volume rm -f "$name" >/dev/null 2>&1' EXIT
photo=$(dirname "$0")/../../src/cliphar/assets/samples/cat.jpg
# what the engine keeps, and the processes and mounts that a container should take with it
left() {
  docker ps -aq --filter "name=^$name\$" | wc -l
  pgrep -fc "containerd-shim.*$last" || true
  grep -c "$last" /proc/mounts || true
  docker run --rm -v "$name:/models" --entrypoint find "$image" /models -type f | wc -l
}
started=$SECONDS
for cycle in $(seq "$cycles"); do
  last=$(docker run -d --name "$name" --read-only --tmpfs /tmp -v "$name:/models" -p 127.0.0.1::8000 "$image")
  for _ in $(seq 900); do
    [[ $(docker inspect -f '{{.State.Health.Status}}' "$name") == healthy ]] && break
    sleep 0.2
  done
  curl -fsS -F images=@"$photo" "http://$(docker port "$name" 8000 | head -1)/v1/predict" >/dev/null || { docker logs "$name"; echo "cycle $cycle: no answer"; exit 1; }
  docker stop -t 30 "$name" >/dev/null
  read -r code volumes < <(docker inspect -f '{{.State.ExitCode}} {{len .Mounts}}' "$name")
  [[ $volumes == 1 ]] || { echo "cycle $cycle: $volumes volumes, of which one is named"; exit 1; }
  [[ $code == 0 || $code == 143 ]] || { docker logs "$name"; echo "cycle $cycle: stopped with $code"; exit 1; }
  docker rm "$name" >/dev/null
  # the first start keeps which runtime is the fastest, for the others
  if ((cycle == 1)); then before=$(left); fi
done
after=$(left)
[[ $before == "$after" ]] || { echo "left behind (containers, shims, mounts, files): $(echo $before) before, $(echo $after) after"; exit 1; }
echo "$cycles times started, asked and stopped in $((SECONDS - started)) s, and nothing is left behind"
