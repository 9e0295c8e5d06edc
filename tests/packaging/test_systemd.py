"""The systemd unit: taken by systemd, hardened, and true to the proxy's own settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config import load_settings
from tests.packaging.manifests import UNIT, unit_arguments, unit_settings
from tests.support.tools import need

# What a unit depends on without naming it; without these files systemd reads the machine's own, and
# reports what is wrong with the units of other packages.
TARGETS = ("sysinit.target", "basic.target", "shutdown.target", "network-online.target")

# `systemd-analyze security` goes from 0 to 100 (10.0); below 2.0 it calls a service OK.
EXPOSURE_MAX = 15


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return the unit with a program that exists on this machine."""
    need("the systemd unit", "systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(unit_arguments()[0], sys.executable))
    for name in (*TARGETS, "system.slice"):
        (tmp_path / name).write_text(f"[Unit]\nDescription={name}\n")
    return copy


def analyze(unit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask systemd about a unit. It sees no other units than those in the same directory."""
    program = shutil.which("systemd-analyze")
    assert program is not None
    return subprocess.run(
        [program, "--no-pager", *arguments, str(unit)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": str(unit.parent)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_systemd_takes_the_unit(unit: Path) -> None:
    verified = analyze(unit, "verify")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_systemd_sees_a_setting_that_does_not_exist(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in analyze(unit, "verify").stderr


def test_the_unit_is_hardened(unit: Path) -> None:
    judged = analyze(unit, "security", "--offline=true", f"--threshold={EXPOSURE_MAX}")
    assert judged.returncode == 0, judged.stdout


def test_the_secret_is_a_credential_and_not_in_the_environment() -> None:
    settings = unit_settings()
    name = settings["LoadCredential"][0].partition(":")[0]
    variable, _, value = settings["Environment"][0].partition("=")
    assert value == f"%d/{name}"
    loaded = load_settings([], {variable: "/run/credentials/secret"})
    assert loaded.workspace.client_secret_file == "/run/credentials/secret"


def test_a_drain_fits_into_the_time_to_stop() -> None:
    shutdown = load_settings([], {}).shutdown
    assert shutdown.drain_seconds < float(unit_settings()["TimeoutStopSec"][0])


def test_the_service_may_open_all_the_files_that_its_connections_need() -> None:
    listen = load_settings([], {}).listen
    assert 2 * listen.max_connections < int(unit_settings()["LimitNOFILE"][0])


def test_the_unit_runs_the_verb_and_waits_until_it_serves() -> None:
    assert unit_arguments()[1:3] == ["run", "--config"]
    assert unit_settings()["Type"] == ["notify"]
    assert unit_settings()["RestartPreventExitStatus"] == ["2"]
