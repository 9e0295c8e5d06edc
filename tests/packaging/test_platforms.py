"""The examples for other platforms: true to each platform's schema, and to the proxy's settings.

The schemas come with the platforms' SDKs. They know every key, and which are missing; what a
platform does with them, only the platform can show.
"""

import json
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.resources import files
from typing import Any, Final

import botocore.session
import botocore.validate
import pytest
import yaml
from azure.mgmt.appcontainers import models

from proxy import __version__
from proxy.addresses import is_loopback
from proxy.config import Settings, load_settings
from tests.packaging.manifests import PROXY, ROOT, Object
from tests.packaging.test_release import actionlint, linted

PLATFORMS: Final = ROOT / "deploy" / "platforms"
WORKFLOW: Final = PLATFORMS / "github-actions.yml"
# What a schema says of the keys of an object; None: any keys, or no object.
Fields = Callable[[Any], Mapping[str, Any] | None]


def loaded(name: str) -> Object:
    text = (PLATFORMS / name).read_text()
    found: Object = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    return found


def unknown_keys(given: object, schema: object, fields: Fields, path: str = "") -> Iterator[str]:
    """Yield where an object has a key that its schema does not know."""
    if isinstance(given, list):
        for item in given:
            yield from unknown_keys(item, schema, fields, f"{path}[]")
    known = fields(schema)
    if not isinstance(given, dict) or known is None:
        return
    for key, value in given.items():
        if key in known:
            yield from unknown_keys(value, known[key], fields, f"{path}.{key}")
        else:
            yield f"{path}.{key}"


def cloud_run() -> tuple[object, Fields]:
    """Return the schema of a service on Cloud Run."""
    documents = files("googleapiclient") / "discovery_cache" / "documents"
    schemas = json.loads((documents / "run.v1.json").read_text())["schemas"]

    def fields(schema: Any) -> Mapping[str, Any] | None:
        schema = schema.get("items", schema)
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        properties: Mapping[str, Any] | None = schema.get("properties")
        return properties

    return schemas["Service"], fields


def azure() -> tuple[object, Fields]:
    """Return the schema of an Azure Container App."""

    def model_in(hint: Any) -> Any:
        """Return the model that a field has, or has a list of."""
        hint = getattr(hint, "__forward_arg__", hint)
        if isinstance(hint, str):  # "_models.Container"
            return getattr(models, hint.rpartition(".")[2], None)
        if isinstance(hint, type):
            return hint if issubclass(hint, MutableMapping) else None
        found = map(model_in, typing.get_args(hint))
        return next((model for model in found if model is not None), None)

    def fields(schema: Any) -> Mapping[str, Any] | None:
        model = model_in(schema)
        if model is None or not issubclass(model, MutableMapping):
            return None  # an enumeration
        model({})  # which is when it learns the names of its fields
        hints: dict[str, Any] = {}
        for base in reversed(model.__mro__):
            hints |= getattr(base, "__annotations__", {})
        named = model._attr_to_rest_field.items()
        return {field._rest_name: hints.get(name) for name, field in named}

    return models.ContainerApp, fields


SCHEMAS: Final = {"cloud-run.yaml": cloud_run, "container-app.yaml": azure}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_one_of_the_platform(name: str) -> None:
    assert list(unknown_keys(loaded(name), *SCHEMAS[name]())) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_key_that_is_misspelled_is_seen(name: str) -> None:
    text = (PLATFORMS / name).read_text().replace("failureThreshold", "failureTreshold")
    assert any("Treshold" in one for one in unknown_keys(yaml.safe_load(text), *SCHEMAS[name]()))


def test_the_task_is_valid_in_the_api_of_ecs() -> None:
    service = botocore.session.get_session().get_service_model("ecs")
    shape = service.operation_model("RegisterTaskDefinition").input_shape
    task = loaded("ecs-task.json")
    validate = botocore.validate.ParamValidator().validate
    assert validate(task, shape).generate_report() == ""
    task["containerDefinitions"][0]["healthChek"] = {}
    assert "healthChek" in validate(task, shape).generate_report()


def test_the_workflow_is_valid() -> None:
    code, said = linted("check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW)
    assert code == 0, said
    assert actionlint(WORKFLOW.read_text()) == []


def containers() -> dict[str, Object]:
    """Return the proxy's container of each example, as the platform spells it."""
    return {
        "ecs-task.json": loaded("ecs-task.json")["containerDefinitions"][0],
        "cloud-run.yaml": loaded("cloud-run.yaml")["spec"]["template"]["spec"]["containers"][1],
        "container-app.yaml": loaded("container-app.yaml")["properties"]["template"]["containers"][
            1
        ],
        "github-actions.yml": loaded("github-actions.yml")["jobs"]["service"]["services"][
            "lakebase"
        ],
    }


def settings_of(container: Object) -> Settings:
    """Return what the proxy runs with there; a secret has an example's value."""
    given: Any = container.get("environment", container.get("env"))
    if isinstance(given, list):
        entries = [*given, *container.get("secrets", [])]
        given = {one["name"]: one.get("value", "example") for one in entries}
    return load_settings([], given, upstream_required=True)


@pytest.mark.parametrize("name", containers())
def test_the_proxy_takes_its_environment(name: str) -> None:
    container = containers()[name]
    settings = settings_of(container)
    assert container.get("name", PROXY) == PROXY
    assert container["image"] == f"{PROXY}:{__version__}"
    assert settings.upstream.endpoint
    assert all(map(is_loopback, settings.listen.hosts)) is (name != "github-actions.yml")


def test_a_drain_fits_into_what_the_platform_gives() -> None:
    given = {
        "ecs-task.json": loaded("ecs-task.json")["containerDefinitions"][0]["stopTimeout"],
        "cloud-run.yaml": 10,
        "container-app.yaml": loaded("container-app.yaml")["properties"]["template"][
            "terminationGracePeriodSeconds"
        ],
    }
    for name, seconds in given.items():
        shutdown = settings_of(containers()[name]).shutdown
        assert shutdown.accept_seconds + shutdown.drain_seconds < seconds


@pytest.mark.parametrize("name", ["cloud-run.yaml", "container-app.yaml"])
def test_probes_reach_the_admin_address(name: str) -> None:
    container = containers()[name]
    settings = settings_of(container)
    probes = container.get("probes", [container.get("startupProbe")])
    assert settings.admin.host == "0.0.0.0"
    assert {probe["httpGet"]["port"] for probe in probes} == {settings.admin.port}


def test_the_app_of_databricks_takes_its_environment() -> None:
    """With what the platform sets: https://docs.databricks.com, "Databricks Apps environment"."""
    app = loaded("databricks-app.yaml")
    assert app["command"][:3] == [PROXY, "exec", "--"]
    assert app["env"] == [{"name": "LAKEBASE_ENDPOINT", "valueFrom": "postgres"}]
    settings = load_settings(
        [],
        {
            "LAKEBASE_ENDPOINT": "projects/p/branches/b/endpoints/primary",
            "DATABRICKS_HOST": "https://workspace.example.com",
            "DATABRICKS_CLIENT_ID": "example",
            "DATABRICKS_CLIENT_SECRET": "example",
            "PGHOST": "ep-example.database.example.com",
            "PGPORT": "5432",
            "PGDATABASE": "databricks_postgres",
            "PGUSER": "example",
            "PGSSLMODE": "require",
        },
        upstream_required=True,
    )
    assert settings.upstream.endpoint == "projects/p/branches/b/endpoints/primary"


def test_each_example_is_in_the_table() -> None:
    table = (PLATFORMS / "README.md").read_text()
    names = {path.name for path in PLATFORMS.iterdir()} - {"README.md"}
    assert all(f"[{name}]({name})" in table for name in names)
