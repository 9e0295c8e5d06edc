"""The source distribution, and the wheel that is built from it without a compiler.

The wheel with the compiled relay is in `test_release.py`.
"""

import faulthandler
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.packaging.manifests import ROOT

pytestmark = pytest.mark.slow

BUILD_SECONDS_MAX: Final = 300
# What the source distribution has: these folders, and these files beside the documents.
FOLDERS: Final = (
    "proxy",
    "tests",
    "bench",
    "docs",
    "deploy",
    "examples",
    "release",
    "requirements",
)
FILES: Final = (
    *("pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile", "config.example.toml"),
    *("Dockerfile", ".dockerignore", "docker-compose.yml", ".gitignore", ".ci/run", "mkdocs.yml"),
    *(".github/workflows/ci.yml", ".github/workflows/release.yml"),
)
# What tools leave in a folder, and what was compiled in this clone.
LEFT_OVER: Final = {"__pycache__", ".so", ".c"}
# Suffixes of what the wheel has of `proxy`, beside what is compiled.
IN_THE_WHEEL: Final = {".py", ".pyi", ".css", ".html", ".js", ".sql"}


def built(step: str, source: Path, into: Path, **environment: str) -> Path:
    """Run a step of the build as pip does, by what is installed here; return what it made."""
    faulthandler.cancel_dump_traceback_later()  # it may take longer than a test; it has a bound
    code = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    ran = subprocess.run(
        [sys.executable, "-c", code, step, str(into)],
        cwd=source,
        env=os.environ | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS_MAX,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (file,) = into.iterdir()
    return file


def files_of(folder: str) -> Iterator[str]:
    """Yield the names of the files that belong to a folder of this clone."""
    for path in sorted((ROOT / folder).rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and LEFT_OVER.isdisjoint((*parts, path.suffix)):
            yield "/".join(parts)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked source distribution, made from a copy without what was compiled."""
    copy, into, unpacked = (tmp_path_factory.mktemp(name) for name in ("copy", "sdist", "unpacked"))
    names = [name for folder in FOLDERS for name in files_of(folder)]
    names += [*FILES, *(path.name for path in ROOT.glob("*.md"))]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    archive = built("build_sdist", copy, into)
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(unpacked)], check=True)
    (source,) = unpacked.iterdir()
    assert [name for name in names if not (source / name).is_file()] == []
    return source


def wheel_of(sdist: Path, directory: Path, **environment: str) -> set[str]:
    """Build a wheel; return the names of its files."""
    source, into = directory / "source", directory / "wheel"
    subprocess.run(["cp", "-r", str(sdist), str(source)], check=True)
    into.mkdir()
    with zipfile.ZipFile(built("build_wheel", source, into, **environment)) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def pure() -> set[str]:
    """Return the names of the files in a wheel for which nothing was compiled."""
    return {name for name in files_of("proxy") if Path(name).suffix in IN_THE_WHEEL}


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/cc"])
def test_without_a_compiler_a_wheel_is_pure_python(
    sdist: Path, tmp_path: Path, compiler: str
) -> None:
    assert wheel_of(sdist, tmp_path, CC=compiler) == pure()
