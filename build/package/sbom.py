"""The bill of materials (CycloneDX): the packages that cyclonedx-py finds, and everything else in the executable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from package.carried import LEFT_OUT, Distribution, canonical, carried
from package.product import Product
from package.sources import Source

Component = dict[str, Any]

# Licences that are missing in the bills of wheels. OpenSSL has this one since 3.0.
UNSAID = {"openssl": "Apache-2.0"}


def bill(product: Product, environment: Path, sources: list[Source]) -> str:
    """The bill as JSON, validated by the schema of the standard. The same product gives the same text."""
    document = _installed(environment, product.epoch)
    components: list[Component] = [it for it in document["components"] if canonical(it["name"]) not in LEFT_OUT]
    own = _own(product)
    parts = {it["bom-ref"]: _inside(it["bom-ref"], distribution) for it, distribution in _both(components, environment)}
    components += [_source(it) for it in sources]
    known = {it["bom-ref"] for it in components}
    tree = [
        {"ref": entry["ref"], "dependsOn": [it for it in entry.get("dependsOn", []) if it in known]}
        for entry in document.get("dependencies", [])
        if entry["ref"] in known
    ]
    for entry in tree:
        entry["dependsOn"] += [it["bom-ref"] for it in parts.get(entry["ref"], [])]
        entry["dependsOn"] += [it.ref for it in sources if entry["ref"].startswith(f"{it.within}==")]
    tree += [
        {"ref": it.ref, "dependsOn": [inner.ref for inner in sources if inner.within == it.name]} for it in sources
    ]
    tree.append({"ref": own["bom-ref"], "dependsOn": sorted(known)})
    components += [it for inside in parts.values() for it in inside]
    document["metadata"]["component"] = own
    document["components"] = sorted(components, key=lambda it: (it["name"], it["bom-ref"]))
    document["dependencies"] = sorted(
        [{"ref": it["ref"], "dependsOn": sorted(it["dependsOn"])} for it in tree], key=lambda it: str(it["ref"])
    )
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    _check(text)
    return text


def names(text: str) -> set[tuple[str, str]]:
    """Name and version of all components of a bill."""
    return {(canonical(it["name"]), it["version"]) for it in json.loads(text)["components"]}


def licence(component: Component) -> str:
    """The licence of a component: the expression, identifier or name in its bill."""
    (entry,) = component["licenses"]
    return str(entry.get("expression") or entry["license"].get("id") or entry["license"]["name"])


def _installed(environment: Path, epoch: int) -> dict[str, Any]:
    said = subprocess.run(
        [
            sys.executable,
            "-m",
            "cyclonedx_py",
            "environment",
            "--output-reproducible",
            "--sv",
            "1.6",
            "--of",
            "JSON",
            environment,
        ],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"SOURCE_DATE_EPOCH": str(epoch)},
    ).stdout
    document: dict[str, Any] = json.loads(said)
    return document


def _both(components: list[Component], environment: Path) -> list[tuple[Component, Distribution]]:
    distributions = {it.name: it for it in carried(environment)}
    seen = {canonical(it["name"]): it for it in components}
    if seen.keys() != distributions.keys():
        raise SystemExit(f"release: cyclonedx-py lists {sorted(seen)}, installed are {sorted(distributions)}")
    return [(seen[name], distributions[name]) for name in sorted(seen)]


def _own(product: Product) -> Component:
    return {
        "bom-ref": "netloom",
        "type": "application",
        "name": "netloom",
        "version": product.build,
        "purl": f"pkg:generic/netloom@{product.build}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "hashes": [{"alg": "SHA-256", "content": product.sha256}],
    }


def _inside(parent: str, distribution: Distribution) -> list[Component]:
    """The components of a wheel according to its own bills, without its build tools."""
    found = []
    for document in distribution.bills:
        for it in document.get("components", []):
            if it.get("scope") != "excluded":
                kept = {key: it[key] for key in ("type", "name", "version", "licenses", "hashes") if key in it}
                kept["purl"] = it["purl"].partition("?")[0]
                if "licenses" not in kept:
                    kept["licenses"] = [{"expression": UNSAID[it["name"]]}]
                found.append(kept | {"bom-ref": f"{parent}/{it['name']}@{it['version']}", "scope": "required"})
    return found


def _source(source: Source) -> Component:
    found: Component = {
        "bom-ref": source.ref,
        "type": "library",
        "name": source.name,
        "version": source.version,
        "purl": source.purl,
        "licenses": [{"expression": source.licence}],
        "scope": "required",
    }
    return found | ({"hashes": [{"alg": "SHA-256", "content": source.sha256}]} if source.sha256 else {})


def _check(text: str) -> None:
    from cyclonedx.schema import SchemaVersion  # here, because the tests read bills without it
    from cyclonedx.validation.json import JsonStrictValidator

    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise SystemExit(f"release: the bill of materials does not follow its schema: {wrong}")
