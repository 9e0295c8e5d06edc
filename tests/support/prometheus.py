"""What Prometheus makes of a proxy: its samples over time, and the alert rules by promtool.

For: two scrapes of a running proxy, and hours in which what happened between them goes on. Not for:
numbers that a test invents: each series is one that a proxy has exposed.
"""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

ROOT: Final = Path(__file__).parents[2]
ALERTS: Final = ROOT / "deploy" / "prometheus" / "alerts.yaml"
SCRAPE_SECONDS: Final = 30.0

_FIRING: Final = 'group by (alertname, reason) (ALERTS{alertstate="firing"%s})'
# Gauges that move with the clock while no token is minted; the first one while it is not 0.
_CLOCKS: Final = {
    "lakebase_proxy_workspace_api_failing_seconds": 1,
    "lakebase_proxy_token_age_seconds": 1,
    "lakebase_proxy_token_expires_in_seconds": -1,
}
_FAILING, *_ = _CLOCKS
_MINTED: Final = "lakebase_proxy_tokens_minted_total"


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one scrape by their series, and which of them only grow."""

    values: Mapping[str, float]
    growing: frozenset[str]

    @classmethod
    def of(cls, exposition: str, instance: str = "a") -> "Scrape":
        """Read the text format; `instance` is the label that Prometheus adds."""
        values, growing = {}, set()
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                labels = {**sample.labels, "instance": instance}
                shown = ",".join(f"{name}={json.dumps(text)}" for name, text in labels.items())
                series = f"{sample.name}{{{shown}}}"
                values[series] = sample.value
                if family.type in ("counter", "histogram"):
                    growing.add(series)
        return cls(values, frozenset(growing))

    def minted(self) -> float:
        """Return how many tokens were minted."""
        return sum(value for name, value in self.values.items() if name.startswith(_MINTED))


@dataclass
class Timeline:
    """What is scraped of one proxy, every SCRAPE_SECONDS, from `begins_at_minute` on."""

    begins_at_minute: float = 0
    frames: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """The minutes until its end."""
        return self.begins_at_minute + len(self.frames) * SCRAPE_SECONDS / 60

    def add(self, minutes: float, before: Scrape, after: Scrape, per_seconds: float = 60) -> None:
        """Add minutes in which counters grow, each `per_seconds`, by what they grew in between.

        Gauges stay as they were at the second scrape, except for those that move with the clock.
        """
        last = self.frames[-1] if self.frames else before.values
        is_minting = after.minted() > before.minted()
        for number in range(round(minutes * 60 / SCRAPE_SECONDS)):
            frame = {}
            for series, value in after.values.items():
                if series in after.growing:
                    grown = value - before.values.get(series, 0)
                    frame[series] = last.get(series, 0) + grown * SCRAPE_SECONDS / per_seconds
                else:
                    rate = _rate(series, value, is_minting=is_minting)
                    frame[series] = value + rate * number * SCRAPE_SECONDS
            self.frames.append(frame)
            last = frame

    def series(self) -> Iterator[dict[str, str]]:
        """Yield the series as promtool reads them; those of a proxy that has ended are stale."""
        missing = "_ " * round(self.begins_at_minute * 60 / SCRAPE_SECONDS)
        for name in {name: None for frame in self.frames for name in frame}:
            values = (str(frame.get(name, "_")) for frame in self.frames)
            yield {"series": name, "values": f"{missing}{' '.join(values)} stale"}


def _rate(series: str, value: float, *, is_minting: bool) -> int:
    name = re.split("{", series)[0]
    moves = value != 0 if name == _FAILING else not is_minting
    return _CLOCKS.get(name, 0) if moves else 0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that fires, with its reason if it has one."""

    name: str
    reason: str = ""

    @property
    def labels(self) -> str:
        """The labels of its sample."""
        reason = f', reason="{self.reason}"' if self.reason else ""
        return f'{{alertname="{self.name}"{reason}}}'


@dataclass
class Expectations:
    """What has to fire when; `assert_met` asks promtool."""

    timelines: Sequence[Timeline]
    _asked: list[dict[str, object]] = field(default_factory=list)

    def exactly(self, at_minute: float, *alerts: Alert) -> None:
        """Expect that these alerts fire at that time and no other."""
        self._ask(at_minute, "", alerts)

    def fires(self, at_minute: float, alert: Alert) -> None:
        """Expect that this alert fires at that time."""
        chosen = f', alertname="{alert.name}", reason="{alert.reason}"'
        self._ask(at_minute, chosen, [alert])

    def _ask(self, at_minute: float, chosen: str, alerts: Sequence[Alert]) -> None:
        samples = [{"labels": alert.labels, "value": 1} for alert in alerts]
        time = f"{round(at_minute * 60)}s"
        asked: dict[str, object] = {
            "expr": _FIRING % chosen,
            "eval_time": time,
            "exp_samples": samples,
        }
        self._asked.append(asked)

    def assert_met(self, directory: Path) -> None:
        """Run promtool, with its file in this directory."""
        step = f"{SCRAPE_SECONDS:.0f}s"
        series = [each for timeline in self.timelines for each in timeline.series()]
        test = {"interval": step, "input_series": series, "promql_expr_test": self._asked}
        whole = {"rule_files": [str(ALERTS)], "evaluation_interval": step, "tests": [test]}
        file = directory / "alerts.json"  # which is YAML too
        file.write_text(json.dumps(whole))
        command = ["promtool", "test", "rules", str(file)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
