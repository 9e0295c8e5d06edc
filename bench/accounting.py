"""What the kernel has booked to a process: CPU time, resident memory, open files.

All of it is the process's own account, so that the load of others on the machine, which changes
how long something takes, changes little here.
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
class CPU:
    """CPU seconds of a process up to now, or between two moments."""

    user: float
    system: float
    total: float

    def __add__(self, other: "CPU") -> "CPU":
        """Return what both have spent."""
        return CPU(self.user + other.user, self.system + other.system, self.total + other.total)

    def __sub__(self, earlier: "CPU") -> "CPU":
        """Return what was spent since `earlier`.

        The total comes from a clock in nanoseconds, its parts from counters of 10 ms: they give
        the total's proportions.
        """
        total = self.total - earlier.total
        user, system = self.user - earlier.user, self.system - earlier.system
        share = user / (user + system) if user + system else 0.0
        return CPU(total * share, total * (1 - share), total)


def cpu(pid: int) -> CPU:
    """Return what the process has spent, all its threads included."""
    # The second field is the program's name in parentheses and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = (int(ticks) / _TICKS_PER_SECOND for ticks in fields[11:13])
    # What clock_getcpuclockid(3) returns for a process; Python does not offer that call.
    return CPU(user, system, time.clock_gettime((~pid << 3) | _PROCESS_CLOCK))


def others_seconds() -> float:
    """Return the CPU seconds of this machine that went to neither us nor a child that has ended.

    The difference of two readings, while no child runs, says how much a run was disturbed.
    """
    # user, nice, system, idle, iowait, irq, softirq, steal: what a hypervisor took counts too.
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_SECOND
    return busy - sum(os.times()[:4])


def resident_bytes(pid: int) -> int:
    """Return the process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def open_files(pid: int) -> int:
    """Return how many descriptors the process holds."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def open_sockets(pid: int) -> int:
    """Return how many of its descriptors are sockets; one may be closed while they are counted."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def descendants(pid: int) -> tuple[int, ...]:
    """Return the processes that this one has started, and theirs."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = list(parents.get(pid, ()))
    for one in found:
        found += parents.get(one, ())
    return tuple(found)
