"""Write the results of `make test-hosts` to the table of docs/platforms.md, or say when it last passed.

Each test module of tests/hosts leaves ``dist/hosts/<module>.json``: the versions on its machines, the build, the date
and the number of tests. Its row in the table is replaced when all its tests passed. ``--last`` prints one line: the
oldest date in the table and the builds, for `make release`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "dist" / "hosts"
TABLE = ROOT / "docs" / "platforms.md"
# What is listed in each row: the column, and the package whose version it has.
COLUMNS = {
    "Linux": "kernel",
    "nft": "libnftables1",
    "systemd": "systemd",
    "dnsmasq": "dnsmasq-base",
    "haproxy": "haproxy",
}
_ROW = r"^\| {name} \|.*\|$"
_DATED = re.compile(r"\| ([\w.-]+) \| (\d{4}-\d\d-\d\d) \|$", re.MULTILINE)


def row(name: str, result: dict[str, Any]) -> str:
    """The line of a module in the table. The machines of a module have one image, or the first one counts."""
    host = result["hosts"][0]
    versions = [_upstream(host.get(package, "-")) for package in COLUMNS.values()]
    return f"| {' | '.join([name, *versions, str(result['passed']), result['build'], result['date']])} |"


def write(document: Path, results: Path) -> list[str]:
    """Replace the rows of all modules that passed; the names of the others. Raises ValueError for a missing row."""
    text = document.read_text()
    failed = []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text())
        if result["failed"]:
            failed.append(file.stem)
            continue
        text, count = re.subn(_ROW.format(name=re.escape(file.stem)), row(file.stem, result), text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{document}: {count} rows for {file.stem} instead of one")
    document.write_text(text)
    return failed


def last(document: Path) -> str:
    """When all kinds of hosts had passed last, and with which builds."""
    dated = _DATED.findall(document.read_text())
    if not dated:
        return "emulated hosts: never run (make test-hosts)"
    builds = ", ".join(sorted({build for build, _ in dated}))
    return f"emulated hosts: passed, the oldest on {min(date for _, date in dated)}, with {builds} (make test-hosts)"


def _upstream(version: str) -> str:
    """The version without Debian's revision and epoch; a kernel's name without its flavour."""
    return re.sub(r"^\d+:|[-~+].*$", "", version) or "-"


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 1 when a kind of hosts failed."""
    parser = argparse.ArgumentParser(description="The results on emulated hosts.")
    parser.add_argument("--last", action="store_true", help="say when all kinds passed last")
    options = parser.parse_args(arguments)
    if options.last:
        print(last(TABLE))
        return 0
    failed = write(TABLE, RESULTS)
    print(
        f"{TABLE.relative_to(ROOT)}: {', '.join(failed)} failed, the rows of the others are new"
        if failed
        else last(TABLE)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
