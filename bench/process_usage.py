"""What a process has used, as the kernel accounts for it: CPU time, resident memory, open files.

These numbers belong to the process alone. The load of other programs on the machine changes how
long something takes, but changes these little.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED of the kernel's posix-timers.h: all threads, in nanoseconds


@dataclass(frozen=True, slots=True)
class CPUTime:
    """CPU seconds of a process since its start, or between two moments."""

    user: float
    system: float
    total: float

    def __add__(self, other: "CPUTime") -> "CPUTime":
        """Return the sum for two processes."""
        return CPUTime(self.user + other.user, self.system + other.system, self.total + other.total)

    def __sub__(self, earlier: "CPUTime") -> "CPUTime":
        """Return what was used since `earlier`.

        The total comes from a clock in nanoseconds. User and system come from counters of 10 ms, so
        only their proportion is used, to split the total.
        """
        total = self.total - earlier.total
        user, system = self.user - earlier.user, self.system - earlier.system
        share = user / (user + system) if user + system else 0.0
        return CPUTime(total * share, total * (1 - share), total)


def cpu_time(pid: int) -> CPUTime:
    """Return what the process has used, all its threads included."""
    # The second field is the program's name in parentheses and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = (int(ticks) / _TICKS_PER_SECOND for ticks in fields[11:13])
    # What clock_getcpuclockid(3) returns for a process; Python does not offer that call.
    return CPUTime(user, system, time.clock_gettime((~pid << 3) | _PROCESS_CLOCK))


def other_programs_cpu_seconds() -> float:
    """Return the CPU seconds of this machine that neither we nor our ended children used.

    The difference of two calls, at moments when no child runs, shows how much a run was disturbed.
    """
    # user, nice, system, idle, iowait, irq, softirq, steal: what a hypervisor took counts, too.
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_SECOND
    return busy - sum(os.times()[:4])


def resident_bytes(pid: int) -> int:
    """Return the process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def open_files(pid: int) -> int:
    """Return how many file descriptors the process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def open_sockets(pid: int) -> int:
    """Return how many of its descriptors are sockets; one may be closed while they are counted."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def descendants(pid: int) -> tuple[int, ...]:
    """Return the process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, ()))
    for one in found:
        found += children.get(one, ())
    return tuple(found)
