"""Whether the compiled relay was built, and what operators see if it was not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import native
from proxy.native import AVAILABLE, MODULES, WHY_MISSING, Acceleration, acceleration
from tests.support.compiled import need_compiled

SOURCES = sorted(Path(native.__file__).parent.glob("*.p[yx][xd]"))
# What the floor stands on.
BELOW = ("proxy.native", "proxy.errors", "proxy.wire")


def test_the_compiled_relay_was_built() -> None:
    need_compiled("the compiled relay")
    assert AVAILABLE
    assert WHY_MISSING == ""


@pytest.mark.parametrize("missing", MODULES)
def test_one_module_that_is_missing_is_named_and_nothing_fails(missing: str) -> None:
    need_compiled(f"proxy.native without {missing}")
    code = (
        f"import sys; sys.modules['proxy.native.{missing}'] = None; "
        "from proxy import native; print(native.AVAILABLE, native.WHY_MISSING); "
        "from proxy import cli; cli.main(['version', '--build'])"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout.startswith("False ")
    assert f"proxy.native.{missing}" in ran.stdout
    assert "a C compiler" in ran.stdout.splitlines()[-1], "what to do about it"


@pytest.mark.parametrize(
    ("wanted", "built", "expected"),
    [
        ([True, True], True, Acceleration.USED),
        ([], True, Acceleration.USED),
        ([True, False], True, Acceleration.PARTLY),
        ([False], True, Acceleration.OFF),
        ([True], False, Acceleration.NOT_BUILT),
        ([False], False, Acceleration.NOT_BUILT),
    ],
)
def test_operators_are_told_what_new_sessions_get(
    wanted: list[bool], built: bool, expected: Acceleration
) -> None:
    assert acceleration(wanted, built=built) is expected


def proxy_imports(source: str) -> set[str]:
    """Return the modules of ours that a Cython file imports or cimports, wherever it stands."""
    return set(re.findall(r"^\s*(?:from|c?import)\s+(proxy[\w.]*)", source, re.MULTILINE))


def test_the_compiled_modules_import_from_floors_below_only() -> None:
    """import-linter does not read Cython."""
    assert SOURCES, "the rule has lost its subject"
    upward = {
        path.name: above
        for path in SOURCES
        if (above := {m for m in proxy_imports(path.read_text()) if not m.startswith(BELOW)})
    }
    assert upward == {}


def test_an_import_of_cython_is_seen() -> None:
    source = (
        "from proxy.session cimport x\nif a:\n    import proxy.server.app\ncimport proxy.wire\n"
    )
    assert proxy_imports(source) == {"proxy.session", "proxy.server.app", "proxy.wire"}
