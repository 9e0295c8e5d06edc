"""The metrics with all their labels: a series for each reason before it happens.

For: the closed sets of labels, which `observe` does not know. Not for: counting
(`observe.metrics`).
"""

from collections.abc import Iterable

from proxy import __version__
from proxy.catalogue.admission import Verdict
from proxy.catalogue.catalogue_reader import QUERY_PURPOSES
from proxy.catalogue.parking import ParkResult
from proxy.errors import ErrorKind
from proxy.observe.metrics import Metrics
from proxy.observe.target_stats import OTHER
from proxy.routing.router import LookupResult, RouteResult
from proxy.server.snapshot import ConfigSnapshot
from proxy.session.cancel import CancelResult
from proxy.session.end_reason import ERRORS, OUTCOMES, Outcome
from proxy.session.session_log import StartupFailure
from proxy.upstream.phases import ConnectPhase, RecordTargetPhase
from proxy.wire.violations import ClientReason


def build_metrics(targets: Iterable[str] = ()) -> Metrics:
    """Return metrics with a series for every reason word, and for these targets."""
    refusals = [kind.value.reason for kind in ErrorKind]
    return Metrics(
        version=__version__,
        session_end_outcomes={**OUTCOMES, OTHER: Outcome.FAILED},
        session_end_errors=ERRORS,
        startup_failure_reasons=[*refusals, *ClientReason, *StartupFailure],
        cancel_results=list(CancelResult),
        connect_phases=list(ConnectPhase),
        lookup_results=list(LookupResult),
        route_results=list(RouteResult),
        target_names=targets,
        shard_map_words={"verdict": Verdict, "result": ParkResult, "purpose": QUERY_PURPOSES},
    )


def configure_metrics(metrics: Metrics, snapshot: ConfigSnapshot) -> None:
    """Count by the targets and the shard map of this configuration from now on."""
    shard_map = snapshot.router.shard_map
    mappings = 0 if shard_map is None else len(shard_map)
    names = snapshot.settings.target_names()
    metrics.configure(
        names,
        snapshot.settings.routing.shard_map,
        mappings,
        in_catalogue=bool(snapshot.settings.catalogue_map),
    )
    metrics.set_acceleration(snapshot.acceleration)


def phase_recorder(metrics: Metrics) -> RecordTargetPhase:
    """Return what records the phases of connects, and the connects that succeeded."""

    def record(target: str, phase: ConnectPhase | None, seconds: float) -> None:
        if phase is None:
            metrics.targets.connected(target, seconds)
        else:
            metrics.connect_phase_took(phase, seconds, target)

    return record
