"""THIRD-PARTY-LICENSES: the licence texts of everything that the executable carries, from the authors' own files."""

from __future__ import annotations

import json
from pathlib import Path

from package import sbom
from package.carried import Distribution, canonical, carried
from package.sources import Source

RULE = "=" * 100


def third_party(environment: Path, sources: list[Source], bill: str) -> str:
    """The text of the document. Raises SystemExit when a component has no licence text."""
    distributions = carried(environment)
    without_text = [it.name for it in distributions if not it.texts] + [it.name for it in sources if not it.texts]
    if without_text:
        raise SystemExit(f"release: no licence text of {', '.join(without_text)} was found")
    covered = {it.name for it in distributions} | {canonical(it.name) for it in sources}
    inside = [it for it in json.loads(bill)["components"] if canonical(it["name"]) not in covered]
    lines = [
        "The executable netloom is licensed under the Apache License, version 2.0 (LICENSE). It contains the",
        "components listed here, each under its own licence. Their licence texts follow below.",
        "",
        *(f"  {it.name} {it.version}: {it.licence}" for it in distributions),
        *(f"  {it.name} {it.version}: {it.licence}" for it in sources),
        "",
        "The compiled parts of these contain the following, according to their own bills of materials. The wheels do",
        "not include their licence texts:",
        "",
        *(f"  {it['name']} {it['version']}: {sbom.licence(it)}" for it in inside),
    ]
    entries: list[Distribution | Source] = [*distributions, *sources]
    for entry in entries:
        for name, text in entry.texts.items():
            lines += ["", RULE, f"{entry.name} {entry.version}: {name}", RULE, "", text.replace("\r\n", "\n").rstrip()]
    return "\n".join(lines).rstrip() + "\n"
