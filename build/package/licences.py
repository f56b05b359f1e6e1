"""THIRD-PARTY-LICENSES: the licences of all that the executable carries, from the files of those who wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from package import sbom
from package.carried import Distribution, canonical, carried
from package.sources import Source

RULE = "=" * 100


def third_party(environment: Path, sources: list[Source], bill: str) -> str:
    """The document. Raises SystemExit when one comes without a text."""
    distributions = carried(environment)
    mute = [it.name for it in distributions if not it.texts] + [it.name for it in sources if not it.texts]
    if mute:
        raise SystemExit(f"release: no licence text of {', '.join(mute)} was found")
    covered = {it.name for it in distributions} | {canonical(it.name) for it in sources}
    inside = [it for it in json.loads(bill)["components"] if canonical(it["name"]) not in covered]
    lines = [
        "The executable netloom is licensed under the Apache License, version 2.0 (LICENSE). It carries what is",
        "listed here, each under its own licence; the texts that come with each stand below.",
        "",
        *(f"  {it.name} {it.version}: {it.licence}" for it in distributions),
        *(f"  {it.name} {it.version}: {it.licence}" for it in sources),
        "",
        "Inside the compiled parts of those, as their own bills of materials say; their licence texts do not come with",
        "the wheels:",
        "",
        *(f"  {it['name']} {it['version']}: {sbom.licence(it)}" for it in inside),
    ]
    entries: list[Distribution | Source] = [*distributions, *sources]
    for entry in entries:
        for name, text in entry.texts.items():
            lines += ["", RULE, f"{entry.name} {entry.version}: {name}", RULE, "", text.replace("\r\n", "\n").rstrip()]
    return "\n".join(lines).rstrip() + "\n"
