"""Make the documentation site: collect the pages, build them with zensical, and check every link of the result.

Pages of the site are the files of ``docs/`` and the few documents that have their place elsewhere (``ELSEWHERE``).
The site needs no network: it loads no script, style sheet or font from another server, and opens from a directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

# Documents outside docs/, with the path of their page.
ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "internal/netloom/render/README.md": "packet-path.md",
}
# The site has a front page of its own.
INSTEAD = {"README.md": "index.md"}
# The theme loads this script from another server. It is replaced by worker.js.
SHIM = re.compile(r'<script src="https://[^"]*/iframe-worker/shim"[^>]*></script>')
COLOURS = re.compile("\x1b\\[[0-9;]*m")
FENCE = re.compile(r"^\s*(```|~~~)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


class SiteError(Exception):
    """The site cannot be made. Each line of the message is one fault."""


def pages(root: Path) -> dict[Path, str]:
    """Every document that becomes a page, with the path of the page."""
    found = {path: str(path.relative_to(root / "docs")) for path in sorted((root / "docs").rglob("*.md"))}
    return found | {root / name: page for name, page in ELSEWHERE.items()}


def images(root: Path) -> dict[Path, str]:
    """Every image of a page, with its path on the site."""
    return {path: str(path.relative_to(root / "docs")) for path in sorted((root / "docs").rglob("*.svg"))}


def collect(root: Path, target: Path) -> None:
    """Copy documents and images to ``target``, with the links changed to links between pages. Raises SiteError."""
    faults: list[str] = []
    known, shown = pages(root), images(root)
    targets = known | shown | {root / name: page for name, page in INSTEAD.items()}
    for source, image in shown.items():
        (target / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / image)
    for source, page in known.items():
        written = target / page
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(_rewritten(root, source, targets, faults))
    if faults:
        raise SiteError("\n".join(faults))


def _rewritten(root: Path, source: Path, targets: dict[Path, str], faults: list[str]) -> str:
    """The text of ``source`` with links between pages. Links to anything else are reported in ``faults``."""
    here = Path(targets[source]).parent
    lines = []
    fenced = False
    for number, line in enumerate(source.read_text().splitlines(), 1):

        def as_page(found: re.Match[str], number: int = number) -> str:
            leads_to = Path(os.path.normpath(source.parent / found[1]))
            if leads_to not in targets:
                faults.append(f"{source.relative_to(root)}:{number}: {found[1]} is not a page of the site")
                return found[0]
            return f"]({os.path.relpath(targets[leads_to], here)}{found[2] or ''})"

        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else LINK.sub(as_page, line))
    return "\n".join(lines) + "\n"


def missing_from_navigation(config: Path, known: set[str]) -> list[str]:
    """The pages that are missing in the navigation."""

    def listed(entry: object) -> set[str]:
        match entry:
            case str():
                return {entry}
            case list():
                return {page for it in entry for page in listed(it)}
            case dict():
                return {page for it in entry.values() for page in listed(it)}
        return set()

    return sorted(known - listed(tomllib.loads(config.read_text())["project"]["nav"]))


class _Page(HTMLParser):
    """A page of the site: its anchors, the targets of its links, and the files that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.add(given.get("href", ""))
        elif given.get("src"):
            self.loads.add(given["src"])


def faults_of(site: Path) -> list[str]:
    """Broken links of the site, and files that it loads from another server."""
    read = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    faults = []
    for path, page in read.items():
        where = path.relative_to(site)
        for link in sorted(page.links | page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    faults.append(f"{where} loads {link} from another server")
                continue
            leads_to = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if leads_to.is_dir():
                leads_to /= "index.html"
            if not leads_to.exists():
                faults.append(f"{where}: {link} does not exist")
            elif parts.fragment and leads_to in read and unquote(parts.fragment) not in read[leads_to].anchors:
                faults.append(f"{where}: {link}: that page has no such anchor")
    return faults


def make_site(root: Path, target: Path) -> None:
    """Build the site of ``root`` in ``target``, which is replaced. Raises SiteError."""
    with tempfile.TemporaryDirectory(prefix="netloom-docs-") as directory:
        work = Path(directory)
        collect(root, work / "pages")
        shutil.copy(HERE / "style.css", work / "pages")
        shutil.copy(HERE / "zensical.toml", work)
        if absent := missing_from_navigation(work / "zensical.toml", set(pages(root).values())):
            raise SiteError(
                "\n".join(f"{page} is missing in the navigation of build/pages/zensical.toml" for page in absent)
            )
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        built = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if built.returncode:
            raise SiteError(COLOURS.sub("", built.stdout + built.stderr).partition("\nTraceback ")[0])
        site = work / "site"
        shutil.copy(HERE / "worker.js", site / "assets" / "javascripts")
        for path in site.rglob("*.html"):
            script = f"{os.path.relpath(site, path.parent)}/assets/javascripts/worker.js"
            path.write_text(SHIM.sub(f'<script src="{script}"></script>', path.read_text()))
        (site / "404.html").unlink()  # its links only work in the root of a server
        if faults := faults_of(site):
            raise SiteError("\n".join(faults))
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(site, target)


def main(target: str) -> int:
    """The exit status: 0 with the site in ``target``, 1 with the faults on stderr."""
    try:
        make_site(ROOT, Path(target).resolve())
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"docs: {target}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
