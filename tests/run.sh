#!/usr/bin/env bash
# make run as a newcomer types it: it must print addresses that answer and a curl line that works, and stop when told.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
setsid make run >"$log" 2>&1 &
group=$!
stop() { kill -TERM -- "-$group" 2>/dev/null || true; wait "$group" 2>/dev/null || true; rm -f "$log"; }
trap stop EXIT
for _ in $(seq 600); do
  grep -q '^Try' "$log" && break
  kill -0 "$group" 2>/dev/null || { cat "$log"; echo "make run ended"; exit 1; }
  sleep 1
done
page=$(awk '/^Web page/ {print $3}' "$log")
try=$(sed -n 's/^Try *//p' "$log")
curl -fsS "$page" | grep '<title>' >/dev/null || { cat "$log"; exit 1; }
answer=$(eval "$try")
grep -q '"label"' <<<"$answer" || { echo "$try answered $answer"; exit 1; }
echo "make run works: $try"
