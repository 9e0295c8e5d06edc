"""The documents as a site: it builds without a warning, and each link of its pages leads somewhere.

`mkdocs --strict` judges the links of the sources; here are those of the pages, as a browser has
them: anchors that a heading of another spelling would get, and what is loaded. Nothing asks the
network, so that links to other servers are not followed. Not for: links as a forge shows them
(`test_documents.py`).
"""

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("https://", "http://", "mailto:", "data:", "javascript:")
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.paragraphs: list[str] = []
        self._inside: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self._inside.append(tag)
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag in ("img", "script") and "src" in given:
            self.loaded.add(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.add(given["href"])

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "p":
            self.paragraphs.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site") / "site"
    # Without its own set-up, which belongs to who runs the tests.
    built = subprocess.run(
        ["make", "--old-file=.venv/.installed", "site", f"SITE={directory}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}


def test_every_link_and_anchor_of_every_page_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in page.links | page.loaded:
            name, _, part = unquote(link).partition("#")
            meant = (file.parent / name.partition("?")[0]).resolve() if name else file
            if link.startswith(ELSEWHERE) or file.name == "404.html":
                continue
            if not meant.exists() or (meant in pages and part and part not in pages[meant].anchors):
                broken.append((file.name, link))
    assert broken == []


def test_a_page_loads_nothing_from_other_servers(pages: dict[Path, Page]) -> None:
    loaded = {source for page in pages.values() for source in page.loaded}
    assert [source for source in loaded if source.startswith(("http", "//"))] == []


def test_lists_tables_and_code_are_shown_as_such(pages: dict[Path, Page]) -> None:
    """What one renderer takes for a list and the other for a paragraph shows its marks."""
    marks = re.compile(r"^(?:[-*] |\d\. |\||```)", re.MULTILINE)
    shown = {
        (file.name, text[:60])
        for file, page in pages.items()
        for text in page.paragraphs
        if marks.search(text)
    }
    assert shown == set()


def test_every_document_is_a_page(site: Path) -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    names = {path.relative_to(ROOT).with_suffix(".html") for path in documents}
    missing = [str(name) for name in names if not (site / name).is_file()]
    assert [name for name in missing if name != "README.html"] == []
