"""What the packaging files say, as values: for the tests beside this file.

Invariant: nothing is changed on the way, so that a test judges what a person would deploy.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.tools import need

ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = ROOT / "deploy" / "kubernetes"
SIDECAR: Final = KUBERNETES / "sidecar"
CHART: Final = "chart"
# What a person applies: the kustomizations, and the chart with one container.
APPLIED: Final = (CHART, *sorted(path.name for path in (KUBERNETES / "examples").iterdir()))
CHART_VALUES: Final = """\
podMonitor: true
containers:
  - name: application
    image: application:1.0
    env: [{name: PGHOST, value: localhost}]
"""
DOCKERFILE: Final = ROOT / "Dockerfile"
COMPOSE: Final = ROOT / "docker-compose.yml"
UNIT: Final = ROOT / "deploy" / "systemd" / "lakebase-auth-proxy.service"
PROXY: Final = "lakebase-auth-proxy"

Object = dict[str, Any]


def tool(*command: str | Path, given: str = "") -> str:
    """Return what a program prints; skip the test where it is missing."""
    need("the Kubernetes manifests", str(command[0]))
    return subprocess.check_output(command, input=given, text=True, timeout=60)


@cache
def _rendered(name: str) -> str:
    if name == CHART:
        options = ("--namespace", "here", "--values", "-")
        return tool("helm", "template", "application", SIDECAR, *options, given=CHART_VALUES)
    return tool("kubectl", "kustomize", KUBERNETES / "examples" / name)


def parsed(text: str) -> list[Object]:
    """Return the objects of a manifest."""
    return [document for document in yaml.safe_load_all(text) if document]


def documents(name: str) -> list[Object]:
    """Return the objects that a person applies."""
    return parsed(_rendered(name))


def pod_of(objects: list[Object]) -> Object:
    """Return the pod of the one workload among objects."""
    (pod,) = (
        one["spec"]["template"]["spec"] for one in objects if one["kind"] in ("Deployment", "Job")
    )
    return dict(pod)


def config_files(objects: list[Object]) -> dict[str, str]:
    """Return the files of the one ConfigMap among objects."""
    (files,) = (one["data"] for one in objects if one["kind"] == "ConfigMap")
    return dict(files)


def sidecar(pod: Object) -> Object:
    """Return the proxy's container, wherever it stands in its pod."""
    containers = [*pod.get("initContainers", []), *pod.get("containers", [])]
    return next(container for container in containers if container["name"] == PROXY)


def environment_of(container: Object) -> dict[str, str]:
    """Return a container's variables; a value that is no text is the manifest's error."""
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in values.values()), values
    return values


def as_bytes(container: Object) -> bytes:
    """Return a value as JSON, which is the same for equal values."""
    return json.dumps(container, sort_keys=True).encode()


def compose() -> Object:
    """Return the compose file."""
    loaded: Object = yaml.safe_load(COMPOSE.read_text())
    return loaded


def own_variables(environment: Mapping[str, str | None]) -> dict[str, str]:
    """Return the variables that the proxy reads; those that a person fills in get an example."""
    return {name: value or "example" for name, value in environment.items()}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and what follows each, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    split = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(words[0].upper(), words[1].strip()) for words in split]


def unit_settings() -> dict[str, list[str]]:
    """Return the settings of the systemd unit; some may be given several times."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def unit_arguments() -> list[str]:
    """Return the unit's command line."""
    return shlex.split(unit_settings()["ExecStart"][0])


def is_executable(file: Path) -> bool:
    """Return whether a file may be run."""
    return os.access(file, os.X_OK)
