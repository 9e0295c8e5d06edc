"""Child processes end with the run, also if the run is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.child_processes import child, run
from bench.errors import BenchError

SECONDS_MAX = 30
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def wait_for_end(pid: int) -> None:
    """Wait until no such process runs; a zombie does not."""
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
    pytest.fail(f"process {pid} still runs")


def test_a_child_ends_with_its_block(tmp_path: Path) -> None:
    with child(SLEEPER, tmp_path / "log") as started:
        assert started.process.poll() is None
    assert started.process.poll() is not None


def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{ignores}; time.sleep(600)"]
    with child(command, tmp_path / "log", stop_seconds_max=0.2) as started:
        started.wait_until(lambda: started.tail() == "1\n")
    assert started.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_child_ends_when_the_run_itself_is_killed(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from bench.child_processes import child
with child({SLEEPER!r}, Path({str(tmp_path / "log")!r})) as started:
    # setpriv has executed the child's own program: the death signal is set.
    started.wait_until(lambda: b"time.sleep" in Path(f"/proc/{{started.pid}}/cmdline").read_bytes()
        and b"setpriv" not in Path(f"/proc/{{started.pid}}/cmdline").read_bytes())
    print(started.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as benchmark:
        assert benchmark.stdout is not None
        pid = int(benchmark.stdout.readline())
        benchmark.kill()
    wait_for_end(pid)


def test_the_error_of_a_failed_program_has_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such day"):
        run(
            [sys.executable, "-c", "raise SystemExit('no such day')"],
            tmp_path / "log",
            seconds_max=SECONDS_MAX,
        )


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"took over 0\.2 s"):
        run(SLEEPER, tmp_path / "log", seconds_max=0.2)


def test_a_child_does_not_inherit_libpq_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    command = [sys.executable, "-c", "import os; print(os.environ.get('PGHOST'))"]
    assert run(command, tmp_path / "log", seconds_max=SECONDS_MAX) == "None\n"
    assert os.environ["PGHOST"] == "elsewhere"
