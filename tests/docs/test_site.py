"""`make docs`: every document is a page, every link has a target, and nothing is loaded from another server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pages.make_site import SiteError, collect, faults_of, missing_from_navigation, pages
from repo.files import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs") / "site"
    made = subprocess.run([ROOT / "build/pages/build", target], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return target


def test_every_document_is_a_page(site: Path) -> None:
    made = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")}
    assert made == set(pages(ROOT).values())


def test_the_search_works_without_a_server(site: Path) -> None:
    assert "Mutation marks" in (site / "search.js").read_text()
    assert 'src="./assets/javascripts/worker.js"' in (site / "index.html").read_text()
    assert (site / "assets/javascripts/worker.js").is_file()


def test_a_link_to_a_file_outside_the_site_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("ARCHITECTURE.md", "CHANGELOG.md", "internal/netloom/render/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Title\n")
    page = tmp_path / "docs" / "index.md"
    page.write_text("# Start\n\n[map](../ARCHITECTURE.md#title)\n")
    collect(tmp_path, tmp_path / "out")
    assert "[map](architecture.md#title)" in (tmp_path / "out" / "index.md").read_text()
    page.write_text("# Start\n\n[code](../Makefile)\n")
    with pytest.raises(SiteError, match=r"docs/index.md:3: ../Makefile is not a page of the site"):
        collect(tmp_path, tmp_path / "out")


def test_a_page_missing_from_the_navigation_is_named(tmp_path: Path) -> None:
    config = tmp_path / "zensical.toml"
    config.write_text('[project]\nnav = [{ "A" = ["a.md", { "B" = "b.md" }] }]\n')
    assert missing_from_navigation(config, {"a.md", "b.md", "c.md"}) == ["c.md"]


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ('<a href="b.html">b</a>', "a.html: b.html does not exist"),
        ('<a href="#x">x</a>', "a.html: #x: that page has no such anchor"),
        (
            '<script src="https://cdn.example/x.js"></script>',
            "a.html loads https://cdn.example/x.js from another server",
        ),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "a.html loads //cdn.example/x.css from another server"),
        ('<img src="x.png">', "a.html: x.png does not exist"),
    ],
)
def test_faults_of_the_built_site_are_named(tmp_path: Path, written: str, fault: str) -> None:
    page = tmp_path / "a.html"
    page.write_text('<h1 id="top">A</h1><a href="#top">up</a><a href="https://example.org/">out</a>')
    assert faults_of(tmp_path) == []
    page.write_text(written)
    assert faults_of(tmp_path) == [fault]
