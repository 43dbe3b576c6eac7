# What Compose makes of the images; read by run.sh.
# shellcheck shell=bash
everything=(--profile train --profile monitoring)
docker compose "${everything[@]}" config -q || fail "compose.yaml"
for more in compose.gpu.yaml compose.postgres.yaml; do
  docker compose -f compose.yaml -f "$more" "${everything[@]}" config -q || fail "$more"
done
while read -r name; do
  grep -q "^#$name=" .env.example || fail ".env.example lacks $name"
done < <(grep -ohE '\$\{[A-Z_]+|^ +[A-Z_]+:$' compose*.yaml | tr -d ' ${:' | sort -u)
sed 's/^#\([A-Z]\)/\1/' .env.example >"$work/env"
docker compose --env-file "$work/env" "${everything[@]}" config >"$work/config" || fail ".env.example without its # is no settings"
if grep -n '#' "$work/config"; then fail "a comment of .env.example is taken for a value"; fi
# what Compose sets itself, or a port and a grace of its own go with
mapfile -t flags < <(docker run --rm "$image" serve --help | grep -oE 'CLIPHAR_[A-Z_]+' | grep -vE '_(HOST|PORT|STATE|DRAIN_S|PROVIDER)$')
((${#flags[@]})) || fail "'cliphar serve --help' names no variable"
env "${flags[@]/%/=given}" docker compose config api >"$work/config"
for name in "${flags[@]}"; do
  grep -qE "^ +$name: .*(given|/run/secrets)" "$work/config" || fail "Compose keeps $name from the API"
done
ok "every Compose file is valid, .env.example names every setting, and those of 'cliphar serve' reach the API"

api=http://127.0.0.1:18000
started=$SECONDS
docker compose up -d --wait >"$work/up" 2>&1 || { docker compose logs; fail "compose up: $(tail -5 "$work/up")"; }
ok "docker compose up: both services are healthy after $((SECONDS - started)) s"
curl -fsS -F images=@"$samples/cat.jpg" $api/v1/predict | grep '"label"' >/dev/null || fail "the API"
curl -fsS http://127.0.0.1:18501/ | grep '<title>' >/dev/null || fail "the page"
ok "the API and the page answer on loopback"

# the limits: what the kernel was told, and what comes of asking for more
inside() { docker compose exec -T api "$@"; }
[[ $(docker inspect -f '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}' \
  "$(docker compose ps -q api)") == "2147483648 2000000000 256 [ALL] [no-new-privileges:true]" ]] || fail "the API's limits are not those of compose.yaml"
inside python3 -c '
import os, signal, time
started = []
try:
    while len(started) < 400:
        child = os.fork()
        if not child: time.sleep(600)
        started.append(child)
except BlockingIOError: pass
for child in started:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
assert 100 < len(started) < 256, len(started)' >"$work/out" 2>&1 || fail "pids: $(cat "$work/out")"
await curl -fsS $api/readyz || fail "the API does not bear a fork bomb"
code=0
inside python3 -c 'b"x" * 3_000_000_000' >"$work/out" 2>&1 || code=$?
[[ $code == 137 ]] || fail "3 GB of memory: status $code, $(cat "$work/out")"
await curl -fsS $api/readyz || fail "the API does not bear a process that takes all memory"
inside touch /opt/cliphar/x 2>"$work/err" && fail "the root can be written"
grep -q 'Read-only file system' "$work/err" || fail "the root: $(cat "$work/err")"
[[ $(inside awk '/CapEff|NoNewPrivs/ {print $2}' /proc/1/status | xargs) == "0000000000000000 1" ]] || fail "the API has capabilities"
ok "memory, processes, capabilities and the root are bounded, and the API lives through it"

# a second project beside the first: another user, keys from files, a proxy in Docker's settings that leads nowhere, as
# to a neighbour it should not lead, and its page in a browser
proxied=$work/docker
mkdir "$proxied" && cp -r "${DOCKER_CONFIG:-$HOME/.docker}/." "$proxied" 2>/dev/null || true
python3 - "$proxied/config.json" <<'PY'
import json, sys
from pathlib import Path
file = Path(sys.argv[1])
settings = json.loads(file.read_text()) if file.exists() else {}
none = "http://127.0.0.1:9"
settings["proxies"] = {"default": {"httpProxy": none, "httpsProxy": none}}
file.write_text(json.dumps(settings))
PY
other() { # a subshell: its settings must not reach the first project
  (export CLIPHAR_PORT=18100 CLIPHAR_APP_PORT=18601 CLIPHAR_USER=${CLIPHAR_USER:-54321:54321} CLIPHAR_API_KEYS=$work/keys CLIPHAR_API_KEY_FILE=$work/key DOCKER_CONFIG=$proxied
    docker compose -p "$id-other" "$@")
}
key=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo "$key" >"$work/key"
echo "page $(printf %s "$key" | sha256sum | cut -d' ' -f1)" >"$work/keys"
other up -d --wait >"$work/up" 2>&1 || { other logs; fail "a second project: $(tail -5 "$work/up")"; }
[[ $(curl -s -o /dev/null -w '%{http_code}' -F images=@"$samples/cat.jpg" http://127.0.0.1:18100/v1/predict) == 401 ]] || fail "no key is asked for"
curl -fsS -X PUT -H "Authorization: Bearer $key" -H 'Content-Type: application/json' -d '["cooking", "sleeping"]' \
  http://127.0.0.1:18100/v1/labels/home >/dev/null || fail "the key, or writing the volume as uid 54321"
if curl -fsS $api/v1/labels | grep '"home"' >/dev/null; then fail "two projects share a volume"; fi
other exec -T app sh -c 'test -n "$http_proxy" && exec python3 -c "
from cliphar.client import Client
print(Client(\"http://api:8000\", api_key=open(\"/run/secrets/api_key\").read(), retry_s=1).model()[\"name\"])"' >"$work/out" 2>&1 || fail "the page's way to the API: $(tail -1 "$work/out")"
docker inspect "$(other ps -q app)" | grep -F "$key" >/dev/null && fail "the key is in the container's configuration"
ok "two projects run side by side; keys come from files that only the service reads"
browser=
for python in "${VENV:-.venv}/bin/python" python3; do
  if [[ -x /usr/bin/chromium ]] && "$python" -c 'import playwright' 2>/dev/null; then browser=$python; break; fi
done
if [[ $browser ]]; then
  "$browser" tests/container/browser.py http://127.0.0.1:18601 "$samples"/*.jpg >"$work/out" 2>&1 || { cat "$work/out"; other logs app; fail "the page in a browser"; }
  ok "the page in a browser: $(cat "$work/out")"
else
  echo "skipped: the page in a browser needs chromium and playwright"
fi
kill_inside "$(other ps -q api)" serve
await sh -c "[ \$(docker inspect -f '{{.RestartCount}}' $(other ps -q api)) -ge 1 ]" || fail "the API was killed and not started again"
await curl -fsS http://127.0.0.1:18100/readyz || fail "the API does not come back"
curl -fsS -H "Authorization: Bearer $key" http://127.0.0.1:18100/v1/labels | grep '"home"' >/dev/null || fail "a restart loses a vocabulary"
ok "the model's process is killed: the container is started again and knows what it was taught"
docker run --rm -u 0 -v "$id-other_models:/models" --entrypoint chown "$image" -R 54322:54322 /models || fail "giving the volume to another user"
CLIPHAR_USER=54322:54322 other up -d --wait api >"$work/up" 2>&1 || fail "another user: $(tail -5 "$work/up")"
curl -fsS -X PUT -H "Authorization: Bearer $key" -H 'Content-Type: application/json' -d '["cooking"]' http://127.0.0.1:18100/v1/labels/home >/dev/null || fail "writing the volume as its new user"
ok "the models volume is given to another user"
other down -v >/dev/null 2>&1
curl -fsS $api/readyz >/dev/null || fail "the end of one project is felt by the other"
docker compose stop -t 30 api >/dev/null 2>&1
code=$(docker inspect -f '{{.State.ExitCode}}' "$(docker compose ps -q -a api)")
[[ $code == 0 || $code == 143 ]] || fail "the API stopped with $code"
ok "the API stops when told"
docker compose down -v >/dev/null 2>&1

# Prometheus from Debian stands in for the upstream image, which no registry gives here; Grafana cannot be had
if printf '%s\n' 'FROM python:3.11-slim-bookworm' \
  'RUN apt-get update && apt-get install -y --no-install-recommends prometheus && install -d -o 65534 /prometheus' \
  'ENTRYPOINT ["prometheus"]' | docker build -q -t "$id:prometheus" - >/dev/null 2>"$work/err"; then
  export PROMETHEUS_IMAGE=$id:prometheus PROMETHEUS_PORT=18090
  promtool() { docker run --rm --network none -v "$PWD/docker/monitoring/prometheus.yaml:/etc/prometheus/prometheus.yml:ro" -v "$PWD/docker/monitoring/rules.yaml:/etc/prometheus/rules.yaml:ro" \
    -v "$PWD/tests/container/alerts.yaml:/alerts.yaml:ro" --entrypoint promtool "$PROMETHEUS_IMAGE" "$@" >"$work/out" 2>&1 || fail "promtool $*: $(cat "$work/out")"; }
  promtool check config /etc/prometheus/prometheus.yml
  promtool test rules /alerts.yaml
  docker compose --profile monitoring up -d --wait api prometheus >"$work/up" 2>&1 || { docker compose logs prometheus; fail "Prometheus: $(tail -5 "$work/up")"; }
  python3 tests/container/monitoring.py http://127.0.0.1:18090 $api >"$work/out" 2>&1 || fail "monitoring: $(tail -3 "$work/out")"
  ok "Prometheus scrapes the API and answers what Grafana will ask: $(cat "$work/out"), each fires when it should"
  docker compose --profile monitoring down -v >/dev/null 2>&1
else
  echo "skipped: monitoring needs Debian's prometheus: $(tail -1 "$work/err")"
fi

# docker compose watch, on a tree that is ours to change
watched() { (cd "$work/tree" && CLIPHAR_IMAGE=$id-watch docker compose -p "$id-watch" "$@"); }
cp compose.yaml "$work/tree" && cp -r recipes "$work/tree"
chmod -R go= "$work/tree/src" "$work/tree/docker/healthcheck.py"  # as under umask 077
(cd "$work/tree" && CLIPHAR_IMAGE=$id-watch exec docker compose -p "$id-watch" watch api >"$work/watch" 2>&1) &
watcher=$!
await grep -q 'Watch enabled' "$work/watch" && await curl -fsS $api/readyz || { cat "$work/watch"; fail "docker compose watch starts nothing"; }
echo "# watched" >>"$work/tree/src/cliphar/errors.py"
await watched exec -T api sh -c 'grep -q watched /opt/cliphar/lib/python3*/site-packages/cliphar/errors.py' || { cat "$work/watch"; fail "a change of code does not reach the container"; }
await curl -fsS $api/readyz || fail "no API after a change of code"
kill "$watcher" && wait "$watcher" 2>/dev/null || true
watched down -v >/dev/null 2>&1
ok "docker compose watch: a change of code is in the container that answers"

docker run -d --name "$id" --read-only --tmpfs /tmp -u 12345 -e CLIPHAR_APP_PORT=9501 -p 127.0.0.1:18500:9501 "$id:app" up --port 9000 >/dev/null
await sh -c "[ \$(docker inspect -f '{{.State.Health.Status}}' $id) = healthy ]" || { docker logs "$id"; fail "the page and the API in one container"; }
curl -fsS http://127.0.0.1:18500/ | grep '<title>' >/dev/null || fail "the page at another port"
kill_inside "$id" serve
await sh -c "[ \$(docker inspect -f '{{.State.Running}}' $id) = false ]" || fail "the container outlives its API"
[[ $(docker inspect -f '{{.State.ExitCode}}' "$id") == 1 ]] || fail "the container ended with $(docker inspect -f '{{.State.ExitCode}}' "$id")"
docker rm -f -v "$id" >/dev/null
ok "page and API in one container, as any user and at other ports: if one dies, the container does"

bash tests/container/cycles.sh "$image" 5 >"$work/out" 2>&1 || fail "start and stop: $(tail -3 "$work/out")"
ok "$(tail -1 "$work/out")"
