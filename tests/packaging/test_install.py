"""`make install` in an empty HOME: a virtual environment, and a link that works from anywhere.

What pip would download comes from the environment of this test, and nothing is compiled, which
`test_wheel.py` is for.
"""

import faulthandler
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from proxy import __version__
from tests.packaging.manifests import ROOT
from tests.packaging.test_wheel import files_of

pytestmark = pytest.mark.slow

INSTALL_SECONDS_MAX = 300
EXTENSION = re.compile(r"\[\[tool\.setuptools\.ext-modules\]\]\n(?:.+\n)+")


def test_make_install_puts_a_command_into_the_home_that_runs_from_there(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # it may take longer than a test; it has a bound
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    page = "docs/lakebase-auth-proxy.1"
    for name in [*files_of("proxy"), "Makefile", "pyproject.toml", "README.md", "LICENSE", page]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    project = (ROOT / "pyproject.toml").read_text()
    (clone / "pyproject.toml").write_text(EXTENSION.sub("", project))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        "HOME": str(home),
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_BUILD_ISOLATION": "0",  # which means true
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
    }
    ran = subprocess.run(
        ["make", "install", f"PYTHON={sys.executable}"],
        cwd=clone,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS_MAX,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    command = home / ".local" / "bin" / "lakebase-auth-proxy"
    assert f"\n{__version__}\ncompiled relay: not built" in ran.stdout
    assert f"{command.parent} is not in PATH" in ran.stdout
    answer = subprocess.check_output(
        [command, "version"], cwd=home, env=environment, text=True, timeout=INSTALL_SECONDS_MAX
    )
    assert answer == f"{__version__}\n"
    assert (home / ".local" / "share" / "man" / "man1" / Path(page).name).exists()


def test_a_relative_prefix_begins_in_the_clone() -> None:
    """The link in `bin` led to a path that was relative to `bin`."""
    command = ["make", "--dry-run", "install", "PREFIX=a/place"]
    said = subprocess.check_output(command, cwd=ROOT, text=True)
    place = f"{ROOT}/a/place"
    assert f'ln -sfn "{place}/share/lakebase-auth-proxy/bin/lakebase-auth-proxy"' in said
    assert f'"{place}/bin/lakebase-auth-proxy"' in said
