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
from proxy.session.cancel import CancelResult
from proxy.session.end_reason import ERRORS, OUTCOMES, Outcome
from proxy.session.listener import TOO_MANY_STARTING
from proxy.session.session_log import StartupFailure
from proxy.upstream.phases import ConnectPhase
from proxy.wire.violations import ClientReason


def build_metrics(targets: Iterable[str] = ()) -> Metrics:
    """Return metrics with a series for every reason word, and for these targets."""
    refusals = [kind.value.reason for kind in ErrorKind]
    return Metrics(
        version=__version__,
        session_end_outcomes={**OUTCOMES, OTHER: Outcome.FAILED},
        session_end_errors=ERRORS,
        startup_failure_reasons=[*refusals, *ClientReason, *StartupFailure, TOO_MANY_STARTING],
        cancel_results=list(CancelResult),
        connect_phases=list(ConnectPhase),
        lookup_results=list(LookupResult),
        route_results=list(RouteResult),
        target_names=targets,
        shard_map_words={"verdict": Verdict, "result": ParkResult, "purpose": QUERY_PURPOSES},
    )
