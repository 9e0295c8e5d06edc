"""A checkout in a folder that only its owner may enter, such as a home folder or `mktemp -d`.

It is a copy of the package and of every distribution that the demo needs, with the modes that
`umask 077` leaves. It belongs to an ordinary user; root works in it as well, while the user that
root's servers run as may not enter.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

from tests.support.proxy_process import ROOT
from tests.support.tools import lack, need

ACCOUNT: Final = "daemon"  # every Unix has it; `nobody` is what root's servers run as
_DISTRIBUTION_PATH: Final = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class ClosedCheckout:
    """Where it is, and how to work in it as one of its users."""

    folder: Path
    user: tuple[str, ...]  # a program and its arguments go after it
    python: str

    @property
    def temporary(self) -> Path:
        """The empty directory that the user may write to."""
        return self.folder / "tmp"


@pytest.fixture(scope="session")
def closed_folder() -> Iterator[Path]:
    """Return the folder itself. It is not below pytest's, where an ordinary user may not go."""
    with tempfile.TemporaryDirectory(prefix="lap-closed-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        shutil.copytree(ROOT / "proxy", folder / "proxy")
        needed: dict[str, Distribution] = {}
        _add_requirements(distribution("lakebase-auth-proxy"), {"demo"}, needed)
        for installed in needed.values():
            _copy(installed, folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
            if os.geteuid() == 0:
                os.chown(path, *_ids())
        yield folder


@pytest.fixture(params=["root", "ordinary user"])
def closed_checkout(request: pytest.FixtureRequest, closed_folder: Path) -> ClosedCheckout:
    """Return the checkout for root, and once more for an ordinary user."""
    what = f"a closed folder, as {request.param}"
    if request.param == "root":
        need(what, root=True)
    if request.param == "root" or os.geteuid() != 0:
        return ClosedCheckout(closed_folder, (), sys.executable)
    need(what, "setpriv")
    user, group = _ids()
    as_user = ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups")
    python = _python_for(as_user)
    lack(what, [] if python else ["a Python of this version that it may run is missing"])
    return ClosedCheckout(closed_folder, as_user, python)


def _ids() -> tuple[int, int]:
    account = pwd.getpwnam(ACCOUNT)
    return account.pw_uid, account.pw_gid


def _python_for(as_user: tuple[str, ...]) -> str:
    """Return this Python, or the distribution's where this one is in a closed folder itself."""
    ours = str(Path(sys.executable).resolve())
    theirs = shutil.which("python{}.{}".format(*sys.version_info), path=_DISTRIBUTION_PATH)
    for python in filter(None, (ours, theirs)):
        command = [*as_user, python, "-c", ""]
        if subprocess.run(command, stderr=subprocess.DEVNULL, cwd="/", check=False).returncode == 0:
            return python
    return ""


def _add_requirements(of: Distribution, extras: set[str], found: dict[str, Distribution]) -> None:
    """Add what a distribution requires, directly or not, to those found."""
    for requirement in map(Requirement, of.requires or ()):
        marker, name = requirement.marker, requirement.name
        wanted = marker is None or any(marker.evaluate({"extra": one}) for one in {"", *extras})
        if wanted and name not in found:
            found[name] = distribution(name)
            _add_requirements(found[name], requirement.extras, found)


def _copy(installed: Distribution, folder: Path) -> None:
    """Copy its files. Programs, which are outside of site-packages, are left out."""
    for file in installed.files or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and source.exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / file)
