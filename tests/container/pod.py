"""Containers of a Kubernetes file, as the Docker engine takes them.

pod.py run FILE KIND NAME CONTAINER [VOLUME=PATH ...]   the arguments of docker run, one a line; image and user included
pod.py templates FILE                                   what there is a schema of: Kubernetes' own, and others' pods
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
# what KServe's runtime says beside what a pod does
KSERVE = {"annotations", "protocolVersions", "supportedModelFormats"}


def resources(file: str) -> list[Tree]:
    """What a file of several documents holds."""
    return [one for one in yaml.safe_load_all(Path(file).read_text(encoding="utf-8")) if one]


def pods(resource: Tree) -> Iterator[Tree]:
    """The pod specs somewhere in a resource: what has containers."""
    if isinstance(resource, dict):
        if "containers" in resource:
            yield resource
        else:
            for value in resource.values():
                yield from pods(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from pods(value)


def docker(pod: Tree, container: Tree, places: dict[str, str]) -> Iterator[str]:
    """Arguments that hold the container to the same bounds; ``places`` has a folder for each volume."""
    bounds = pod.get("securityContext", {}) | container.get("securityContext", {})
    user, group = bounds["runAsUser"], bounds.get("runAsGroup", bounds.get("fsGroup", 0))
    yield f"--user={user}:{group}"
    if "fsGroup" in bounds:
        yield f"--group-add={bounds['fsGroup']}"
    if bounds["readOnlyRootFilesystem"]:
        yield "--read-only"
    yield from (f"--cap-drop={name}" for name in bounds["capabilities"]["drop"])
    if not bounds["allowPrivilegeEscalation"]:
        yield "--security-opt=no-new-privileges"
    limits = container["resources"]["limits"]
    yield f"--cpus={limits['cpu']}"
    yield f"--memory={limits['memory'].removesuffix('i').lower()}"
    for variable in container.get("env", []):
        if "value" in variable:
            yield f"--env={variable['name']}={variable['value']}"
    for port in container.get("ports", []):
        yield f"--publish=127.0.0.1::{port['containerPort']}"
    for mount in container.get("volumeMounts", []):
        mode = ":ro" if mount.get("readOnly") else ""
        yield f"--volume={places[mount['name']]}:{mount['mountPath']}{mode}"
    command = container.get("command", [])
    if command:
        yield f"--entrypoint={command[0]}"
    yield container["image"]
    yield from command[1:]
    yield from container.get("args", [])


def main() -> None:
    """See above."""
    if sys.argv[1] == "templates":
        given = resources(sys.argv[2])
        own = [one for one in given if ".k8s.io/" in one["apiVersion"]]
        print(yaml.safe_dump_all(own, explicit_start=True))
        found = [pod for one in given if one not in own for pod in pods(one)]
        for i, pod in enumerate(found):
            spec = {key: value for key, value in pod.items() if key not in KSERVE}
            named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{i}"}, "spec": spec}
            print(yaml.safe_dump(named, explicit_start=True))
        return
    file, kind, name, wanted, *places = sys.argv[2:]
    (resource,) = (one for one in resources(file) if (one["kind"], one["metadata"]["name"]) == (kind, name))
    (pod,) = pods(resource)
    (container,) = (one for one in pod.get("initContainers", []) + pod["containers"] if one["name"] == wanted)
    print(*docker(pod, container, dict(place.split("=", 1) for place in places)), sep="\n")


if __name__ == "__main__":
    main()
