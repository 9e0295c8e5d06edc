"""The Dockerfile, read: what hadolint says of it, and what it promises to its users.

The image itself is in `test_image.py`.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import __version__
from proxy.verbs.verb_table import VERBS
from tests.packaging.manifests import (
    DOCKERFILE,
    PROXY,
    ROOT,
    compose,
    instructions,
    unit_arguments,
)

STAGES = instructions(DOCKERFILE.read_text())
NUMERIC_USER = "65532:65532"


def program(name: str) -> Path:
    """Return a program of the packages that the tests are installed with."""
    return Path(sys.executable).parent / name


def lint(name: str, *arguments: str, source: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program(name), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        input=source,
    )


def last(name: str) -> str:
    return next(rest for instruction, rest in reversed(STAGES) if instruction == name)


def final_stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of the two stages that become images."""
    found: dict[str, list[tuple[str, str]]] = {}
    stage = ""
    for instruction, rest in STAGES:
        if instruction == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.setdefault(stage, []).append((instruction, rest))
    return {name: found[name] for name in ("demo", "proxy")}


def test_hadolint_has_nothing_to_say() -> None:
    said = lint("hadolint", str(DOCKERFILE))
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_hadolint_would_have_something_to_say() -> None:
    assert "DL3002" in lint("hadolint", "-", source="FROM a:1\nUSER root\n").stdout


def test_shellcheck_has_nothing_to_say_of_the_script_of_ci() -> None:
    said = lint("shellcheck", str(ROOT / ".ci" / "run"))
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_the_base_is_slim_and_has_a_version() -> None:
    argument = next(rest for instruction, rest in STAGES if instruction == "ARG")
    name, _, tag = argument.partition("=")[2].rpartition(":")
    assert name.endswith("/python")
    assert tag.startswith("3.")
    assert "-slim" in tag


def test_the_version_is_that_of_the_package() -> None:
    assert ("ARG", f"VERSION={__version__}") in STAGES


@pytest.mark.parametrize("stage", ["demo", "proxy"])
def test_an_image_runs_as_a_number(stage: str) -> None:
    users = [rest for instruction, rest in final_stages()[stage] if instruction == "USER"]
    assert users == [NUMERIC_USER]


def test_no_program_is_started_through_a_shell() -> None:
    """A shell would be PID 1 in place of the proxy, and keep SIGTERM to itself."""
    assert json.loads(last("ENTRYPOINT")) == [PROXY]
    assert json.loads(last("CMD")) == ["run"]
    check = last("HEALTHCHECK")
    assert json.loads(check[check.index("CMD") + len("CMD") :])[0] == PROXY
    assert last("STOPSIGNAL") == "SIGTERM"


def test_what_is_built_without_a_target_is_the_proxy() -> None:
    assert last("FROM").endswith(" AS proxy")


def test_nothing_gets_into_the_image_that_is_not_named() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source.removeprefix("./")
        for instruction, rest in STAGES
        if instruction == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == allowed


def commands() -> dict[str, list[str]]:
    """Return every command line of ours that a packaging file holds, by where it stands."""
    check = last("HEALTHCHECK")
    services = compose()["services"]
    return {
        "Dockerfile, CMD": [PROXY, *json.loads(last("CMD"))],
        "Dockerfile, HEALTHCHECK": json.loads(check[check.index("CMD") + len("CMD") :]),
        "docker-compose.yml": services[PROXY]["healthcheck"]["test"][1:],
        "systemd": unit_arguments(),
    }


@pytest.mark.parametrize("place", commands())
def test_every_verb_exists(place: str) -> None:
    command = commands()[place]
    assert command[0].endswith(PROXY)
    assert command[1] in VERBS, shlex.join(command)
