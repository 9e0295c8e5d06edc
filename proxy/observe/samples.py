"""The numbers of an exposition as values, so that a process can add other processes' to its own.

For: taking them out of a registry, and showing them with others'. Not for: which metrics there are
(`metrics`), or what else several processes are to one proxy (`totals`).

Invariant: what is shown has this process's families alone, so that no other one can add a name or
a text to them.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Sample(NamedTuple):
    """One number of an exposition; `labels` are pairs in the order in which they are shown."""

    family: str
    kind: str
    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def samples_of(registry: CollectorRegistry) -> Iterator[Sample]:
    """Yield what a registry shows now."""
    for family in registry.collect():
        for one in family.samples:
            yield Sample(family.name, family.type, one.name, tuple(one.labels.items()), one.value)


class AddedSamples(Collector):
    """A registry's families with other processes' samples added, for a registry to collect."""

    def __init__(self, registry: CollectorRegistry, others: Iterable[Sample]) -> None:
        self._registry = registry
        self._others: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for family, _kind, name, labels, value in others:
            of_family = self._others.setdefault(family, {})
            of_family[name, labels] = of_family.get((name, labels), 0.0) + value

    def collect(self) -> Iterable[Metric]:
        """Yield each family; a series that only others have is shown as well."""
        for family in self._registry.collect():
            others = self._others.get(family.name, {})
            own = {(one.name, tuple(one.labels.items())): one.value for one in family.samples}
            total = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in {**others, **own}.items():
                number = value + (others.get((name, labels), 0.0) if (name, labels) in own else 0.0)
                total.add_sample(name, dict(labels), number)
            yield total
