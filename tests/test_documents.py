"""The documents for people: links lead somewhere, and every verb, key and reason in them exists.

Not for: whether the prose is good, the examples of languages (`e2e/test_languages.py`), or what the
demo prints (`test_demo.py`).
"""

import re
from pathlib import Path

import pytest
from starlette.routing import Route

from proxy.config import load_settings, settings_keys
from proxy.errors import ErrorKind
from proxy.observe.admin import admin_app
from proxy.verbs.verb_table import VERBS
from tests.support.admin_address import ScriptedAdminState

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[det]*/**/*.md"))]
FILES = [
    *(path for path in ROOT.glob("deploy/**/*") if path.suffix in (".yaml", ".yml", ".json")),
    *(path for path in ROOT.glob("examples/**/*") if path.is_file()),
    ROOT / "docker-compose.yml",
]
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
# Drawn for who works on the code: docs/protocol-cases.md links to it.
STATES = ROOT / "docs" / "protocol-states.md"
KINDS = {kind.value.reason: kind.value for kind in ErrorKind}
# A row of a table that begins with reasons; an SQLSTATE may follow.
REASON_ROW = re.compile(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|(?: ([0-9A-Z]{5}) \|)?", re.MULTILINE)

documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def anchor(heading: str) -> str:
    """Return the name that a forge gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {anchor(heading) for heading in headings}


def links(document: Path) -> list[str]:
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


@documents
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        name, _, part = link.partition("#")
        meant = document.parent / name if name else document
        assert meant.exists(), link
        assert not part or part in anchors(meant), link


@documents
def test_every_verb_in_a_command_exists(document: Path) -> None:
    command = r"(?:^|[$] |-- |CONTAINER )lakebase-auth-proxy ([a-z]+)\b"
    used = set(re.findall(command, _code(document), re.MULTILINE))
    assert used <= VERBS.keys()


@documents
def test_every_key_that_is_named_exists(document: Path) -> None:
    """`section.key`, as people write a key in prose, when the section is one of ours."""
    keys = {key.dotted for key in settings_keys()}
    sections = "|".join({key.section for key in settings_keys()})
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)\b", document.read_text()))
    assert named - {"config.example"} <= keys


@documents
def test_every_variable_that_is_named_exists(document: Path) -> None:
    known = {key.variable for key in settings_keys()} | {"LAKEBASE_PROXY_CONFIG"}
    named = set(re.findall(r"\bLAKEBASE_PROXY_[A-Z_]*[A-Z]\b", document.read_text()))
    assert named <= known


@pytest.mark.parametrize(
    "document", [README, TROUBLESHOOTING], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_reason_exists_and_has_the_sqlstate_that_is_said(document: Path) -> None:
    rows = REASON_ROW.findall(document.read_text())
    assert rows
    for words, sqlstate in rows:
        for reason in re.findall(r"`([a-z_]+)`", words):
            assert reason in KINDS
            alike = {kind.value.sqlstate for kind in ErrorKind if kind.value.reason == reason}
            assert sqlstate in {"", *alike}


@documents
def test_every_psql_works_where_the_guides_pgsslmode_is_set(document: Path) -> None:
    """The Lakebase guide exports PGSSLMODE=require, which a listener without TLS refuses."""
    blocks = re.findall(r"```(?:console|sh)\n(.*?)```", document.read_text(), re.DOTALL)
    commands = [one for block in blocks for one in block.replace("\\\n", " ").splitlines()]
    clients = [one for one in commands if re.search(r"(^|\$ | )psql .*\blocalhost\b", one)]
    assert [one for one in clients if "sslmode=disable" not in one.lower()] == []


def test_every_environment_of_an_application_says_that_the_proxy_has_no_tls() -> None:
    texts = {path: path.read_text() for path in [*DOCUMENTS, *FILES]}
    name, value = r"\bPGHOST\b", r"(?:=|[\":,\s]|value)+localhost\b"
    environments = [path for path, text in texts.items() if re.search(name + value, text)]
    assert len(environments) > 5
    assert [path for path in environments if "PGSSLMODE" not in texts[path]] == []


def test_no_url_has_a_bare_at_sign_in_the_name_of_its_database() -> None:
    """SQLAlchemy and tokio-postgres take what follows it for the host."""
    url = r"(?:postgres|postgresql)(?:\+\w+)?://[^\s\"'`/]*/[^\s\"'`?]*@"
    assert re.search(url, "postgresql://app@localhost:5432/app@42")
    assert not re.search(url, "postgresql://app@localhost:5432/app%4042")
    sources = [*DOCUMENTS, *FILES, *ROOT.glob("proxy/**/*.py"), *ROOT.glob("*.toml")]
    assert [path for path in sources if re.search(url, path.read_text())] == []
    # As in a table: what follows the host.
    assert [path for path in DOCUMENTS if re.search(r"`/\w+@", path.read_text())] == []


def test_defaults_that_differ_from_another_programs_are_those_of_the_settings() -> None:
    defaults = {key.dotted: str(key.default).removesuffix(".0") for key in settings_keys()}
    row = re.compile(r"^\| .* \| `(?:--)?(\w+\.\w+)` \| ([\w-]+)(?:, not |; )", re.MULTILINE)
    told = row.findall((ROOT / "docs" / "migrating.md").read_text())
    assert len(told) > 8
    assert [one for one in told if defaults[one[0]] != one[1]] == []


def test_the_error_that_is_shown_is_one_of_ours() -> None:
    shown = r"FATAL:  (.*)\nDETAIL:  reason=(\w+)\nHINT:  (.*)\n"
    ((message, reason, hint),) = re.findall(shown, TROUBLESHOOTING.read_text())
    assert (KINDS[reason].message, KINDS[reason].hint) == (message, hint)


def test_every_reason_is_explained() -> None:
    explained = set(re.findall(r"`([a-z_]+)`", TROUBLESHOOTING.read_text()))
    assert set(KINDS) <= explained


def test_the_five_most_frequent_causes_name_reasons_that_exist() -> None:
    section = TROUBLESHOOTING.read_text().partition("## The five most")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    for row in rows:
        reasons = re.findall(r"`([a-z_]+)`", row.split("|")[2])
        assert reasons
        assert set(reasons) <= KINDS.keys()


@pytest.mark.parametrize("document", ["README.md", "docs/migrating.md"])
def test_the_configuration_of_a_document_is_taken(document: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    file = tmp_path / "proxy.toml"
    file.write_text(block)
    load_settings(["--config", str(file)], {})


def test_the_tree_of_the_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tree = set(re.findall(r"\w+", text.partition("## The tree")[2].partition("\n## ")[0]))
    sources = [path for path in (ROOT / "proxy").rglob("*") if path.suffix in (".py", ".pyx")]
    assert {path.stem for path in sources} - {"__init__"} - tree == set()
    assert len(text.splitlines()) < 300, "it is read at one sitting"


def test_the_operations_name_every_path_of_the_admin_address() -> None:
    shown = OPERATIONS.read_text()
    for route in admin_app(ScriptedAdminState(), quit_allowed=True).routes:
        assert isinstance(route, Route)
        named = re.search(rf"[` 0]{route.path}[`>]", shown)
        assert named or route.path.startswith("/page."), route.path


def test_the_readme_is_read_at_one_sitting_and_leads_to_every_document() -> None:
    assert len(README.read_text().splitlines()) <= 200
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(ROOT.glob("docs/*.md")) - {STATES} <= linked


def test_what_was_built_for_operating_it_is_named() -> None:
    named = {(OPERATIONS.parent / link.partition("#")[0]).resolve() for link in links(OPERATIONS)}
    assert {*ROOT.glob("deploy/grafana/*"), *ROOT.glob("deploy/prometheus/*")} <= named


def test_a_container_that_is_stopped_has_the_time_to_drain() -> None:
    # Docker kills after ten seconds.
    shown = (ROOT / "docs" / "docker.md").read_text()
    shutdown = load_settings([], {}).shutdown
    given = re.findall(r"--stop-timeout (\d+)", shown)
    assert len(given) == shown.count("lakebase-auth-proxy:0.1.0\n")
    for seconds in given:
        assert int(seconds) > shutdown.accept_seconds + shutdown.drain_seconds


def test_the_proxy_takes_the_environment_of_a_container_with_a_published_port() -> None:
    shown = (ROOT / "docs" / "docker.md").read_text().partition("## Publish the port")[2]
    command = shown.partition("```console")[2].partition("```")[0]
    assert "-p 127.0.0.1:5432:5432" in command
    listen = load_settings([], dict(re.findall(r"-e (\w+)=(\S+)", command))).listen
    assert (listen.host, listen.allow_remote) == ("0.0.0.0", True)


def _code(document: Path) -> str:
    """Return what stands in blocks of code or between back-ticks."""
    text = document.read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *(span + "\n" for span in spans)])
