"""The files for Grafana and Prometheus, against what a proxy that has served really exports.

A panel over a metric that was renamed stays empty, and an alert over it never rings: neither is
noticed by anybody but a test. Rules are also run by promtool (Debian: `prometheus`) where it is.
"""

import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from proxy.emulator.lakebase import Lakebase
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.serving import serving
from tests.support.admin_address import ask
from tests.support.catalogue import Stores
from tests.support.client import plain_client
from tests.support.operator import Operator
from tests.support.running import proxy_settings
from tests.support.sharding import shard_by_psycopg, sharded

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "lakebase-auth-proxy.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
METRICS_LIST = ROOT / "docs" / "metrics.md"
ALERT_CASES = ROOT / "tests" / "observe" / "alerts_test.yaml"

PROMTOOL = shutil.which("promtool")
with_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="NOT TESTED: the rules by promtool; install Prometheus for it"
)

# Labels that Prometheus itself adds to what it scrapes.
OF_THE_SCRAPE = {"instance", "job"}
# Their values are names of the configuration, not words of the program.
OPEN_LABELS = {"target", "workspace", "version", "le", "map", "shard"}

Exported = Mapping[str, Mapping[str, set[str]]]
"""Sample names, to their labels, to the values of these."""


@pytest_asyncio.fixture
async def exported(lakebase: Lakebase, stores: Stores) -> AsyncIterator[Exported]:
    """Return what is scraped from two proxies, one with a static map and one with a catalogue's."""
    operator = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await operator.install()
    async with AsyncExitStack() as stack:
        catalogued = await stack.enter_async_context(
            serving(stores.settings(stores.roles.session, admin={"enabled": True}))
        )
        assert catalogued.admin is not None
        of_catalogue = (await ask(catalogued.admin.port, "/metrics")).body.decode()
        routing = sharded(lakebase, require_key=False)
        routing["upstream"] = {"pool": "session"}
        settings = proxy_settings(lakebase, admin={"enabled": True}, **routing)
        proxy = await stack.enter_async_context(serving(settings))
        assert proxy.admin is not None
        await shard_by_psycopg(proxy, dbname="app@7")
        async with plain_client(proxy) as client:
            await client.start_up()
            of_static = (await ask(proxy.admin.port, "/metrics")).body.decode()
            yield names_and_labels(of_static, of_catalogue)


def names_and_labels(*expositions: str) -> Exported:
    found: dict[str, dict[str, set[str]]] = {}
    for exposition in expositions:
        for sample in samples(exposition):
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def samples(exposition: str) -> Iterator[Any]:
    for family in text_string_to_metric_families(exposition):
        yield from family.samples


def wrong_in(expression: str, exported: Exported, legend: str = "") -> list[str]:
    """Return what an expression of PromQL uses and the proxy does not export.

    Not a parser: it knows the names, matchers and groupings that our two files have.
    """
    wrong = []
    available = set(OF_THE_SCRAPE)
    for name, _, matchers in re.findall(r"\b(lakebase_proxy_\w+)(\{([^}]*)\})?", expression):
        if name not in exported:
            wrong.append(f"no metric {name}")
            continue
        available |= exported[name].keys()
        for label, _, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            if label in OF_THE_SCRAPE:
                continue
            values = exported[name].get(label)
            if values is None:
                wrong.append(f"{name} has no label {label}")
            elif label not in OPEN_LABELS:
                wrong += [
                    f"{label} is never {word}"
                    for word in value.split("|")
                    if not any(re.fullmatch(word, known) for known in values)
                ]
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    used = {label.strip() for group in grouped for label in group.split(",")}
    used |= set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", legend))
    return wrong + [f"no label {label}" for label in sorted(used - available)]


def panels() -> list[dict[str, Any]]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


async def test_every_panel_and_alert_uses_what_is_exported(exported: Exported) -> None:
    wrong = {expr: wrong_in(expr, exported, legend) for expr, legend in queries()}
    for rule in rules():
        wrong[rule["expr"]] = wrong_in(rule["expr"], exported, str(rule["annotations"]))
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    for variable in variables:
        query = variable["query"]
        if isinstance(query, dict):
            wrong[query["query"]] = wrong_in(query["query"], exported)
    assert {expr: found for expr, found in wrong.items() if found} == {}
    assert len(wrong) > 30, "the test has lost its subject"


async def test_every_metric_is_on_the_dashboard(exported: Exported) -> None:
    shown = " ".join(expr for expr, _ in queries())
    # Of a histogram its buckets are shown; these are of the library or of no use in a graph.
    unshown = {
        name for name in exported if name not in shown and not name.endswith(("_sum", "_count"))
    }
    assert unshown == {
        "lakebase_proxy_process_virtual_memory_bytes",
        "lakebase_proxy_process_start_time_seconds",
    }


@pytest.mark.parametrize(
    ("expression", "legend", "wrong"),
    [
        ("rate(lakebase_proxy_x_total[5m])", "{{a}}", []),
        ("rate(lakebase_proxy_y_total[5m])", "", ["no metric lakebase_proxy_y_total"]),
        ('lakebase_proxy_x_total{b="1"}', "", ["lakebase_proxy_x_total has no label b"]),
        ('lakebase_proxy_x_total{a=~"one|two"}', "", ["a is never two"]),
        ("sum by (a, c) (lakebase_proxy_x_total)", "", ["no label c"]),
        ("lakebase_proxy_x_total", "{{ $labels.c }} {{instance}}", ["no label c"]),
        ('lakebase_proxy_x_total{instance=~"$i"} / on (job) lakebase_proxy_x_total', "", []),
    ],
)
def test_the_check_detects_an_unknown_metric_and_label(
    expression: str, legend: str, wrong: list[str]
) -> None:
    assert wrong_in(expression, {"lakebase_proxy_x_total": {"a": {"one"}}}, legend) == wrong


def test_the_dashboard_has_what_grafana_needs() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "lakebase-auth-proxy"
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["title"]
        assert panel["description"].endswith(".")
        # The person who imports it chooses the data source.
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])


def test_no_two_panels_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert len(rule["annotations"]["runbook"]) > 60


@with_promtool
def test_promtool_accepts_the_rules() -> None:
    assert PROMTOOL is not None
    ran = subprocess.run(
        [PROMTOOL, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@with_promtool
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    assert PROMTOOL is not None
    ran = subprocess.run(
        [PROMTOOL, "test", "rules", str(ALERT_CASES)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@with_promtool
def test_every_panel_is_a_query_that_prometheus_understands(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    # As rules, because of those promtool checks the language.
    asked = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, (expr, _) in enumerate(queries())
    ]
    written = tmp_path / "panels.yaml"
    written.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    ran = subprocess.run(
        [PROMTOOL, "check", "rules", str(written)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(asked)} rules found" in ran.stdout


async def test_the_list_of_metrics_in_the_documents_is_that_of_the_program(
    exported: Exported,
) -> None:
    row = re.compile(r"^\| `(lakebase_proxy_\w+)` \|([^|]*)\|", re.MULTILINE)
    described = dict(row.findall(METRICS_LIST.read_text()))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    assert described.keys() == families
    labels: dict[str, set[str]] = {name: set() for name in families}
    for sample, of_sample in exported.items():
        labels[re.sub("_(bucket|sum|count)$", "", sample)] |= of_sample.keys() - {"le"}
    written = {name: set(re.findall(r"`(\w+)`", text)) for name, text in described.items()}
    assert written == labels
