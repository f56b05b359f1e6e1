"""`make audit`: check that packages and carried components are pinned, allowed and not known to be vulnerable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from package import policy, sbom
from package.carried import LEFT_OUT, canonical, distributions
from package.product import ROOT, Product
from package.requirements import NotPinned, files, pins
from package.sources import sites, sources, tools

# Packages that venv installs.
OF_VENV = {"pip", "setuptools"}
# Files of installed packages that build/nuitka/build changes.
CHANGED_BY_THE_BUILD = {"nuitka/build/static_src/MainProgram.c"}

SERVICE = "https://api.osv.dev/v1/query"
TIMEOUT_S = 15

CLEAN, WRONG, NOT_CHECKED = 0, 1, 2


class NoAnswer(Exception):
    """The vulnerability service did not answer."""


@dataclass(frozen=True)
class Environment:
    """A directory with installed packages, the requirement files they come from, and the licences they may have."""

    path: Path
    lists: tuple[str, ...]
    licences: set[str]


def environments() -> Iterator[Environment]:
    """The environments of the checkout, and those of the build if there are any."""
    yield Environment(ROOT / ".venv", ("runtime.txt", "dev.txt"), policy.TOOLS)
    yield Environment(ROOT / ".venv-release", ("runtime.txt", "release.txt"), policy.TOOLS)
    yield Environment(ROOT / ".venv-runtime", ("runtime.txt",), policy.CARRIED)
    yield from (Environment(path, ("runtime.txt",), policy.CARRIED) for path in sites())
    yield from (Environment(path, ("lock.txt", "build.txt"), policy.TOOLS) for path in tools())


def main() -> int:
    """The exit status: CLEAN, WRONG or NOT_CHECKED."""
    service = os.environ.get("AUDIT_OSV_URL") or SERVICE
    bill = sbom.bill(Product(Path("/dev/null"), "0", "0", 0, "0"), ROOT / ".venv-runtime", sources())
    wrong = [*unpinned(), *installed(environments()), *licences(bill), *incomplete(bill)]
    if not wrong:
        count = sum(len(distributions(it.path)) for it in environments())
        print(
            f"audit: {count} installed packages are pinned by hash and unchanged, {len(sbom.names(bill))} components "
            "of the executable are in its bill, all licences are allowed"
        )
    status = CLEAN
    try:
        vulnerable = 0
        for line in chain(_of_packages(service), _of_components(bill, service)):
            vulnerable += 1
            wrong.append(line)
        if not vulnerable:
            print(f"audit: {service} knows no vulnerability of them")
    except NoAnswer as error:
        print(f"audit: known vulnerabilities were not checked, or not for all components: {error}", file=sys.stderr)
        status = NOT_CHECKED
    for line in wrong:
        print(f"audit: {line}", file=sys.stderr)
    return WRONG if wrong else status


def unpinned() -> Iterator[str]:
    """Report entries of requirement files without an exact version and hashes."""
    for path in files():
        try:
            pins(path.name)
        except NotPinned as entry:
            yield f"not pinned by hash: {entry}"


def installed(environments: Iterable[Environment]) -> Iterator[str]:
    """Report packages that are in no requirement file, differ from their wheel, or have no allowed licence."""
    for there in environments:
        name, listed = there.path.name, pins(*there.lists)
        found = distributions(there.path)
        if not found:
            yield f"{name}: nothing is installed there"
        for it in found:
            if it.name not in OF_VENV and (it.name, it.version) not in listed:
                yield f"{name}: {it.name} {it.version} is in none of {', '.join(there.lists)}"
            changed = [path for path in it.changed() if path not in CHANGED_BY_THE_BUILD]
            yield from (f"{name}: {it.name}: {path} differs from the wheel" for path in changed)
            licence = policy.UNSAID.get(it.name, it.licence)
            if not policy.allows(licence, there.licences):
                yield f"{name}: {it.name} {it.version}: licence {licence or 'unknown'} is not allowed"


def licences(bill: str) -> Iterator[str]:
    """Report components of the executable with a licence that is not allowed."""
    for it in json.loads(bill)["components"]:
        if not policy.allows(sbom.licence(it), policy.CARRIED):
            yield f"the executable carries {it['name']} {it['version']}: licence {sbom.licence(it)} is not allowed"


def incomplete(bill: str) -> Iterator[str]:
    """Report components that the executable is built from and that are missing in its bill of materials."""
    wanted = {it for it in pins("runtime.txt") if it[0] not in LEFT_OUT} | {
        (canonical(it.name), it.version) for it in sources()
    }
    for name, version in sorted(wanted - sbom.names(bill)):
        yield f"the bill of materials lacks {name} {version}"
    if not {name for name, _ in sbom.names(bill)} >= {"openssl"}:
        yield "the bill of materials lacks the OpenSSL of cryptography"


def _of_packages(service: str) -> Iterator[str]:
    """Report what pip-audit finds in each requirement file. The files may pin different versions of a package."""
    for path in files():
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format=json"]
        command += ["--vulnerability-service=osv", f"--osv-url={service}", f"--timeout={TIMEOUT_S}"]
        command += ["--progress-spinner=off", f"--requirement={path}"]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        try:
            found = json.loads(ended.stdout)["dependencies"]
        except ValueError:
            said = ended.stderr.strip().splitlines() or [f"pip-audit ended with {ended.returncode}"]
            raise NoAnswer(f"{service}: {said[-1][:300]}") from None
        for it in found:
            if "vulns" not in it:
                raise NoAnswer(f"pip-audit left out {it}")
            yield from (f"{path.name}: {it['name']} {it['version']}: {known['id']}" for known in it["vulns"])


def _of_components(bill: str, service: str) -> Iterator[str]:
    """Report vulnerabilities of components that are not Python packages: crates, and Debian's patched sources."""
    for it in json.loads(bill)["components"]:
        if it["purl"].startswith("pkg:cargo/"):
            query: dict[str, Any] = {"package": {"purl": it["purl"]}}
        elif it["purl"].startswith("pkg:deb/"):
            query = {"package": {"name": it["name"], "ecosystem": "Debian:12"}, "version": it["version"]}
        else:
            continue
        for known in _query(query, service).get("vulns", []):
            yield f"bill: {it['name']} {it['version']}: {known['id']}"


def _query(query: dict[str, Any], service: str) -> dict[str, Any]:
    request = urllib.request.Request(service, json.dumps(query).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            said: dict[str, Any] = json.load(answer)
            return said
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise NoAnswer(f"{service}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
