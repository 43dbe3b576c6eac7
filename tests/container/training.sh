# From photos to a served model, in containers; read by run.sh.
# shellcheck shell=bash
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
  docker run --rm --entrypoint find "$id:train" /opt/cliphar \( -name tests -o -path "*/torch/test" \) -type d >"$work/out" || fail "looking for tests"
  [[ ! -s $work/out ]] || fail "the training image holds $(head -1 "$work/out")"
  DOCKER_CONFIG=$proxied docker compose --profile train up -d --wait mlflow >"$work/up" 2>&1 || { docker compose --profile train logs mlflow | tail; fail "mlflow"; }
  DOCKER_CONFIG=$proxied train train train recipes/few-shot.yaml data.source=data/har15 name=shots output=runs/shots "track=[mlflow]" >"$work/out" 2>&1 || { cat "$work/out"; fail "training"; }
  [[ $(stat -c %u "$work/runs/shots/bundle.json") == 12345 ]] || fail "what training wrote belongs to $(stat -c %u "$work/runs/shots")"
  curl -fsS 'http://127.0.0.1:15000/api/2.0/mlflow/registered-models/search?max_results=5' | grep '"shots"' >/dev/null || fail "MLflow does not know the run"
  ok "a training as uid 12345 is recorded by MLflow, and its files belong to that user"
  train --name "$id" -d train train recipes/full.yaml data.source=data/har15 name=long output=runs/long train.epochs=50 "track=[]" >"$work/out" 2>&1 || { cat "$work/out"; fail "starting a long training"; }
  await sh -c "docker logs $id 2>&1 | grep -q 'step '" || { docker logs "$id"; fail "a long training takes no step"; }
  docker exec "$id" sh -c 'grep -q jemalloc /proc/[0-9]*/maps' || fail "a training runs without jemalloc"
  docker stop "$id" >/dev/null 2>&1
  [[ -f $work/runs/long.checkpoint ]] || fail "a training that is stopped leaves no checkpoint"
  train train train recipes/full.yaml data.source=data/har15 name=long output=runs/long train.epochs=50 "track=[]" --resume >"$work/out" 2>&1 &
  await grep -q 'resumed after step' "$work/out" || { cat "$work/out"; fail "a training does not resume"; }
  docker ps -q --filter "label=com.docker.compose.project=$id" --filter "label=com.docker.compose.service=train" | xargs -r docker rm -f >/dev/null
  wait $! || true
  train -e WANDB_MODE=offline --name "$id" -d train torchrun --nproc-per-node 2 -m cliphar train recipes/full.yaml data.source=data/har15 output=runs/two train.epochs=50 "track=[wandb]" >"$work/out" 2>&1 || { cat "$work/out"; fail "starting torchrun"; }
  await sh -c "docker logs $id 2>&1 | grep -q 'step '" || { docker logs "$id"; fail "torchrun takes no step"; }
  docker exec "$id" sh -c 'grep -l jemalloc /proc/[0-9]*/maps | wc -l' >"$work/out" && (($(cat "$work/out") >= 3)) || fail "a process of torchrun runs without jemalloc"
  docker stop "$id" >/dev/null 2>&1
  [[ -f $work/runs/two.checkpoint && -d $work/runs/wandb ]] || fail "torchrun leaves no checkpoint, or W&B nothing"
  ok "a training that was stopped goes on from its checkpoint; torchrun's processes train and stop alike"
  train --entrypoint python train -c 'import torch; print(torch.compile(lambda x: x.sin().sum())(torch.ones(9)))' >"$work/out" 2>&1 || { tail -3 "$work/out"; fail "torch.compile"; }
  train train doctor >"$work/doctor" 2>&1 || true
  grep -q 'ok .*what a service is taught is kept in /models/' "$work/doctor" || fail "doctor in the training image: $(cat "$work/doctor")"
  ok "torch.compile finds its compiler and may load what it makes"
  train train export runs/shots --to onnx-fp32 >"$work/out" 2>&1 || { cat "$work/out"; fail "export"; }
  docker run -d --name "$id" -e MODEL_PATH=/runs/shots -v "$work/runs:/runs:ro" -p 127.0.0.1:18000:8000 "$image" >/dev/null
  await curl -fsS http://127.0.0.1:18000/readyz || { docker logs "$id"; fail "the trained bundle is not ready"; }
  curl -fsS http://127.0.0.1:18000/v1/models | grep '"cycling"' >/dev/null || { docker logs "$id"; fail "serving the trained bundle"; }
  docker rm -f "$id" >/dev/null
  place() { docker compose run --rm -T -v "$work/runs:/runs:ro" --entrypoint cp api -rT /runs/shots /models/shots >"$work/out" 2>&1 || { cat "$work/out"; fail "a bundle for the volume"; }; }
  place
  MODEL_PATH=shots docker compose up -d --wait api >"$work/up" 2>&1 || { docker compose logs api; fail "a bundle of the volume"; }
  sed -i 's/"name": "shots"/"name": "later"/' "$work/runs/shots/bundle.json"
  place
  docker compose kill -s HUP api 2>/dev/null
  await sh -c 'curl -fsS http://127.0.0.1:18000/v1/models | grep "\"later\""' || { docker compose logs api; fail "SIGHUP does not change the model"; }
  ok "the bundle that was trained and exported is served by the api image, from the volume too, where it is replaced"
  train train export runs/shots --to openvino >"$work/out" 2>&1 || { cat "$work/out"; fail "export to OpenVINO"; }
  run -v "$work/runs:/models:ro" "$image" doctor >"$work/doctor" || fail "doctor: $(cat "$work/doctor")"
  grep -A1 'nothing here runs its openvino' "$work/doctor" | grep 'VARIANT=openvino' >/dev/null || fail "doctor says nothing of OpenVINO: $(cat "$work/doctor")"
  grep -A1 'models are stored in /models: not writable by uid 12345' "$work/doctor" | grep 'docker run -v cliphar_models' >/dev/null || fail "doctor says nothing of /models: $(cat "$work/doctor")"
  docker build -q -f docker/Dockerfile.inference --build-arg VARIANT=openvino --target api -t "$id:openvino" . >/dev/null 2>"$work/err" || { tail "$work/err"; fail "the OpenVINO image"; }
  run -v "$work/runs:/models:ro" -e MODEL_PATH=shots -e CLIPHAR_RUNTIME=openvino "$id:openvino" predict portrait.jpg --json >"$work/out" || fail "OpenVINO"
  grep '"label"' "$work/out" >/dev/null || fail "OpenVINO answers $(cat "$work/out")"
  ok "doctor names the image that runs an exported bundle, and that image does: VARIANT=openvino"
  docker compose --profile train down -v >/dev/null 2>&1

  # PostgreSQL from Debian stands in for the upstream image, with as much of its entry point as is used
  cat >"$work/entry" <<'SH'
#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -U "$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-host=scram-sha-256 >/dev/null
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE $POSTGRES_DB;" | postgres --single -D "$PGDATA" postgres >/dev/null
fi
exec postgres -c listen_addresses='*'
SH
  printf '%s\n' 'FROM python:3.11-slim-bookworm' \
    'RUN groupadd -g 999 postgres && useradd -u 999 -g 999 postgres && apt-get update && apt-get install -y --no-install-recommends postgresql-15' \
    'RUN install -d -o 999 -g 999 -m 700 /var/lib/postgresql/data' 'ENV PATH=$PATH:/usr/lib/postgresql/15/bin PGDATA=/var/lib/postgresql/data' \
    'COPY --chmod=755 entry /entry' 'ENTRYPOINT ["/entry"]' >"$work/Dockerfile.postgres"
  if docker build -q -f "$work/Dockerfile.postgres" -t "$id:postgres" "$work" >/dev/null 2>"$work/err"; then
    export POSTGRES_IMAGE=$id:postgres POSTGRES_PASSWORD_FILE=$work/postgres COMPOSE_FILE=compose.yaml:compose.postgres.yaml
    echo "$key" >"$POSTGRES_PASSWORD_FILE"
    docker compose --profile train up -d --wait mlflow >"$work/up" 2>&1 || { docker compose --profile train logs mlflow postgres | tail -20; fail "MLflow with PostgreSQL"; }
    train train train recipes/few-shot.yaml data.source=data/har15 name=shots output=runs/shots "track=[mlflow]" >"$work/out" 2>&1 || { cat "$work/out"; fail "training"; }
    curl -fsS 'http://127.0.0.1:15000/api/2.0/mlflow/registered-models/search?max_results=5' | grep '"shots"' >/dev/null || fail "MLflow does not know the run"
    [[ $(docker compose exec -T postgres psql -U mlflow -Atc 'select count(*) from runs') -ge 1 ]] || fail "the run is not in PostgreSQL"
    docker inspect $(docker compose --profile train ps -q) | grep -F "$key" >/dev/null && fail "the password is in a container's configuration"
    ok "MLflow keeps the run in PostgreSQL, whose password is in a file"
    docker compose --profile train down -v >/dev/null 2>&1
    unset COMPOSE_FILE
  else
    echo "skipped: PostgreSQL needs Debian's package: $(tail -1 "$work/err")"
  fi
else
  echo "skipped: the path from training to serving needs photos at $photos"
fi

