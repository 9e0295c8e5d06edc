"""The environment of a command beside a proxy of its own: where it leads, and what it has not."""

import pytest
from psycopg.conninfo import conninfo_to_dict

from proxy.config import Settings
from proxy.verbs.child_environment import child_environment, client_options

SECRET = "not-a-real-secret"
PLACE = {"host": "127.0.0.1", "port": 6000, "options": ""}
ENDPOINT = "projects/p/branches/b/endpoints/e"


def settings(**upstream: object) -> Settings:
    return Settings.model_validate({"upstream": {"endpoint": ENDPOINT, **upstream}})


def environment(environ: dict[str, str], **upstream: object) -> dict[str, str]:
    return child_environment(environ, settings(**upstream), **PLACE)  # type: ignore[arg-type]


def test_the_command_gets_its_proxys_address_and_keeps_what_is_its_own() -> None:
    assert environment({"PATH": "/bin", "PGHOST": "far.example.com", "PGAPPNAME": "a"}) == {
        "PATH": "/bin",
        "PGAPPNAME": "a",
        "PGHOST": "127.0.0.1",
        "PGPORT": "6000",
        "PGUSER": "app",
        "PGDATABASE": "databricks_postgres",
        "PGSSLMODE": "disable",
        "DATABASE_URL": "postgresql://app@127.0.0.1:6000/databricks_postgres?sslmode=disable",
    }


@pytest.mark.parametrize(
    "variable",
    [
        *("DATABRICKS_CLIENT_SECRET", "DATABRICKS_TOKEN", "DATABRICKS_HOST", "DATABRICKS_NEW"),
        *("LAKEBASE_PROXY_WORKSPACE__CLIENT_SECRET", "LAKEBASE_PROXY_CONFIG"),
        *("ARM_CLIENT_SECRET", "GOOGLE_CREDENTIALS", "PGPASSWORD"),
        *("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "SYSTEM_ACCESSTOKEN"),
        # libpq would go elsewhere, or refuse a server without TLS or a password.
        *("PGSERVICE", "PGHOSTADDR", "PGSSLROOTCERT", "PGCHANNELBINDING", "PGREQUIREAUTH"),
        "PGSSLNEGOTIATION",
    ],
)
def test_the_command_does_not_get(variable: str) -> None:
    assert SECRET not in environment({variable: SECRET}).values()


def test_a_token_in_a_variable_of_another_name_is_taken_out() -> None:
    environ = {"DATABRICKS_OIDC_TOKEN_ENV": "CI_JWT", "CI_JWT": SECRET, "OTHER_JWT": SECRET}
    named = {"upstream": {"endpoint": ENDPOINT}, "workspace": {"oidc_token_env": "OTHER_JWT"}}
    got = child_environment(environ, Settings.model_validate(named), **PLACE)  # type: ignore[arg-type]
    assert SECRET not in got.values()


@pytest.mark.parametrize(
    ("host", "options"),
    [("127.0.0.1", ""), ("::1", "-c a=b"), ("/tmp/a b", "-c lakebase.shard_key=a\\ &b@c")],
)
def test_the_url_says_the_same_as_the_variables(host: str, options: str) -> None:
    named = settings(user="a group@example.com", database="shop/1")
    got = child_environment({}, named, host=host, port=6000, options=options)
    told = {key: str(value) for key, value in conninfo_to_dict(got["DATABASE_URL"]).items()}
    assert told.pop("options", "") == options == got.get("PGOPTIONS", "")
    assert told == {
        "host": got["PGHOST"],
        "port": got["PGPORT"],
        "user": got["PGUSER"],
        "dbname": got["PGDATABASE"],
        "sslmode": got["PGSSLMODE"],
    }
    assert (got["PGUSER"], got["PGDATABASE"]) == ("a group@example.com", "shop/1")


def test_the_clients_user_is_the_environments_where_it_decides_the_role() -> None:
    assert environment({"PGUSER": "ada"}, user="*")["PGUSER"] == "ada"


def test_a_shard_key_comes_after_the_options_of_the_environment() -> None:
    environ = {"PGOPTIONS": "-c work_mem=1MB"}
    assert client_options(environ, None) == "-c work_mem=1MB"
    assert client_options(environ, "a b") == "-c work_mem=1MB -c lakebase.shard_key=a\\ b"
