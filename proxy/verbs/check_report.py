"""The steps of a check: their outcome, and their lines for people."""

from dataclasses import dataclass
from typing import Final

# What a step begins with, and where its outcome begins.
_BEGUN_WIDTH: Final = 34


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one step at one target. `reason`, `sqlstate` and `fix` are empty if `ok`.

    `note` has lines on what may be missing, and is no failure.
    """

    name: str
    target: str
    ok: bool
    seconds: float
    text: str
    reason: str = ""
    sqlstate: str = ""
    fix: str = ""
    note: str = ""


class Report:
    """Collects the steps of a check."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def begin(self, name: str, target: str, seconds_max: float) -> None:
        """Record that a step begins, which takes `seconds_max` at most."""

    def end(self, step: Step) -> None:
        """Record the outcome of the step that began last."""
        self.steps.append(step)


class PrintedReport(Report):
    """Prints a step's line when it begins, and the rest of it when it ends."""

    def __init__(self, *, names_targets: bool) -> None:
        super().__init__()
        self._names_targets = names_targets

    def begin(self, name: str, target: str, seconds_max: float) -> None:
        """Print the step's name and bound."""
        if self._names_targets and (not self.steps or self.steps[-1].target != target):
            print(f"target {target}")
        print(f"{name:<15} (at most {seconds_max:g} s) ".ljust(_BEGUN_WIDTH), end="", flush=True)

    def end(self, step: Step) -> None:
        """Print the outcome."""
        super().end(step)
        print(as_outcome(step), flush=True)


def as_outcome(step: Step) -> str:
    """Return a step's outcome for people: the rest of its line, and below it its fix or note."""
    mark = "ok  " if step.ok else "FAIL"
    line = f"{mark} {step.seconds * 1000:7.0f} ms  {step.text}"
    if step.ok:
        note = step.note.replace("\n", "\n      ")
        return f"{line}\n      note: {note}" if note else line
    line = f"{line}\n      SQLSTATE {step.sqlstate}, reason={step.reason}"
    return f"{line}\n      fix: {step.fix}" if step.fix else line
