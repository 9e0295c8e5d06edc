"""What the packaging files say, as values: for the tests beside this file.

Invariant: nothing is changed on the way, so that a test judges what a person would deploy.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DOCKERFILE: Final = ROOT / "Dockerfile"
COMPOSE: Final = ROOT / "docker-compose.yml"
UNIT: Final = ROOT / "deploy" / "systemd" / "lakebase-auth-proxy.service"
PROXY: Final = "lakebase-auth-proxy"

Object = dict[str, Any]


def documents(file: Path) -> list[Object]:
    """Return the objects of a manifest."""
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def pods(file: Path) -> Iterator[Object]:
    """Yield the pod specification of each workload in a manifest."""
    for document in documents(file):
        if document["kind"] in ("Deployment", "Job"):
            yield document["spec"]["template"]["spec"]


def sidecar(pod: Object) -> Object:
    """Return the proxy's container, wherever it stands in its pod."""
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    return next(container for container in containers if container["name"] == PROXY)


def environment_of(container: Object) -> dict[str, str]:
    """Return a container's variables; a value that is no text is the manifest's error."""
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in values.values()), values
    return values


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
