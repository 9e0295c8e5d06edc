"""docker-compose.yml: true to the Compose Specification and to the proxy's own settings."""

import compose_spec
import pytest

from proxy import __version__
from proxy.addresses import is_loopback
from proxy.config import load_settings
from tests.packaging.manifests import COMPOSE, Object, compose, own_variables

PROXIES = ("lakebase-auth-proxy", "demo")


def seconds(duration: str) -> float:
    return compose_spec.parse_duration(duration)


def service(name: str) -> Object:
    found: Object = compose()["services"][name]
    return found


def test_the_file_is_valid_in_the_specification() -> None:
    compose_spec.PyCompose.from_yaml(COMPOSE.read_text()).validate()


def test_a_key_that_is_misspelled_is_seen() -> None:
    text = COMPOSE.read_text().replace("network_mode", "network_mod", 1)
    with pytest.raises(ValueError, match="network_mod"):
        compose_spec.PyCompose.from_yaml(text)


def test_the_proxy_takes_its_environment() -> None:
    given = own_variables(service("lakebase-auth-proxy")["environment"])
    endpoint = {"ENDPOINT_NAME": "projects/p/branches/b/endpoints/primary"}
    settings = load_settings([], {**given, **endpoint}, upstream_required=True)
    assert all(map(is_loopback, settings.listen.hosts))
    stop = seconds(service("lakebase-auth-proxy")["stop_grace_period"])
    assert settings.shutdown.accept_seconds + settings.shutdown.drain_seconds < stop


def test_what_a_person_must_set_is_passed_on_and_not_demanded() -> None:
    """A `${NAME:?}` anywhere in the file would stop the demo as well, which needs no account."""
    environment = service("lakebase-auth-proxy")["environment"]
    passed_on = {name for name, value in environment.items() if value is None}
    assert passed_on == {
        "DATABRICKS_HOST",
        "DATABRICKS_CLIENT_ID",
        "DATABRICKS_CLIENT_SECRET",
        "ENDPOINT_NAME",
    }
    assert "${" not in COMPOSE.read_text()


@pytest.mark.parametrize(
    ("client", "proxy"), [("application", "lakebase-auth-proxy"), ("demo-psql", "demo")]
)
def test_a_client_shares_the_network_of_a_proxy_that_is_ready(client: str, proxy: str) -> None:
    assert service(client)["network_mode"] == f"service:{proxy}"
    assert service(client)["depends_on"] == {proxy: {"condition": "service_healthy"}}
    assert service(client)["environment"]["PGHOST"] == "localhost"


@pytest.mark.parametrize("name", PROXIES)
def test_the_proxy_is_locked_up_and_publishes_no_port(name: str) -> None:
    assert service(name)["read_only"] is True
    assert service(name)["cap_drop"] == ["ALL"]
    assert "ports" not in service(name)
    assert service(name)["image"].startswith(f"lakebase-auth-proxy:{__version__}")


def test_the_demo_and_its_client_are_started_only_when_named() -> None:
    profiles = {name: s.get("profiles") for name, s in compose()["services"].items()}
    assert profiles == {
        "lakebase-auth-proxy": None,
        "application": None,
        "demo": ["demo"],
        "demo-psql": ["demo"],
    }
