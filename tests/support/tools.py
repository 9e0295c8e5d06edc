"""Programs that are not Python's, which some tests need and not every machine has.

A test that lacks one is skipped and says what was not tested. Where `.ci/run` has installed them
all it sets ALL_TOOLS, and then a missing one is a failure: CI skips nothing.
"""

import os
import shutil
from typing import Final

import pytest

ALL_TOOLS: Final = "ALL_TOOLS"


def need(what: str, *programs: str, root: bool = False) -> None:
    """Skip the test that asks unless all programs are there; `what` is then not tested.

    `root` also asks for being root, without which no container can be made here.
    """
    missing = [f"{program} is missing" for program in programs if shutil.which(program) is None]
    if root and os.geteuid() != 0:
        missing.append("it takes root")
    lack(what, missing)


def lack(what: str, missing: list[str]) -> None:
    """Skip, or fail where everything was installed, when anything is missing."""
    if not missing:
        return
    sentence = f"NOT TESTED: {what}: {', '.join(missing)}"
    if os.environ.get(ALL_TOOLS):
        pytest.fail(f"{sentence}, but {ALL_TOOLS} is set")
    pytest.skip(sentence)
