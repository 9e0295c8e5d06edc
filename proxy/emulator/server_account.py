"""The account that PostgreSQL runs as: it refuses root, and must be able to read the wheel.

For: root in a container or in CI, whose wheel lies where no other account may enter. Not for:
starting the server (`cluster`).
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Final

# Wheel directories by server version. Lakebase runs 16 and 17; the wheel has no 17.
INSTALLATIONS: Final = {16: "pginstall", 18: "pginstall18"}

_VERSION_SECONDS_MAX: Final = 30.0  # it prints a line


def server_user() -> pwd.struct_passwd | None:
    """Return the user to run the server as, None for the current one. Postgres refuses root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def is_runnable_by(program: Path, account: pwd.struct_passwd) -> bool:
    """Return whether a user may run a program and read its libraries: not in root's home."""
    try:
        run = subprocess.run(
            [program, "--version"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_VERSION_SECONDS_MAX,
            check=False,
            cwd="/",
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
        )
    except (PermissionError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def copy_installation(binaries: Path, directory: Path) -> Path:
    """Copy the wheel's directory with these binaries; return the copies.

    A wheel has every library that a system may lack, in its package or in PACKAGE.libs beside it,
    and refers to them by relative paths, so the copy has the same layout. It takes about 25 MB.
    """
    installation = binaries.parent
    package = installation.parent
    others = set(INSTALLATIONS.values()) - {installation.name}
    unneeded = shutil.ignore_patterns(*others, "include", "*.a", "*.py", "*.pyc")
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.is_dir():
            shutil.copytree(part, directory / part.name, ignore=unneeded)
    return directory / binaries.relative_to(package.parent)


def change_owner(directory: Path, account: pwd.struct_passwd) -> None:
    """Make a user the owner of a directory: of its contents first, while we own the directory."""
    for path in (*directory.rglob("*"), directory):
        os.chown(path, account.pw_uid, account.pw_gid)
