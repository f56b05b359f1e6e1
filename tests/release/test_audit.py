"""`make audit` reports every deviation, and never claims a check that it could not make."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from package import audit, policy, requirements, sbom
from repo.files import ROOT

BILL = """
from pathlib import Path
from package import sbom
from package.product import Product
from package.sources import sources
product = Product(Path("/dev/null"), "0.1.0", "0.1.0-ff00", 1_700_000_000, "1")
print(sbom.bill(product, Path(".venv-runtime"), sources()), end="")
"""


def test_this_checkout_passes_the_audit() -> None:
    assert [*audit.unpinned(), *audit.installed(audit.environments())] == []


def install(root: Path, name: str, version: str, licence: str = "MIT") -> Path:
    """Install a distribution of one module in .venv-runtime. Returns the module's path."""
    site = root / ".venv-runtime/lib/python3.11/site-packages"
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    module = site / f"{name}.py"
    module.write_text("x = 1\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\nLicense-Expression: {licence}\n")
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},6\n{info.name}/RECORD,,\n")
    return module


def found_in(root: Path) -> list[str]:
    return list(audit.installed([audit.Environment(root / ".venv-runtime", ("runtime.txt",), policy.CARRIED)]))


def test_a_missing_environment_is_reported(tmp_path: Path) -> None:
    assert found_in(tmp_path) == [".venv-runtime: nothing is installed there"]


def test_an_unlisted_package_is_reported(tmp_path: Path) -> None:
    version = dict(requirements.pins("runtime.txt"))["h11"]
    install(tmp_path, "h11", version)
    assert found_in(tmp_path) == []
    install(tmp_path, "stowaway", "1.0")
    assert found_in(tmp_path) == [".venv-runtime: stowaway 1.0 is in none of runtime.txt"]


def test_a_version_other_than_the_pinned_one_is_reported(tmp_path: Path) -> None:
    install(tmp_path, "h11", "0.0.1")
    assert found_in(tmp_path) == [".venv-runtime: h11 0.0.1 is in none of runtime.txt"]


@pytest.mark.parametrize("deed", [lambda it: it.write_text("x = 2\n"), Path.unlink], ids=["changed", "removed"])
def test_a_changed_or_removed_file_is_reported(tmp_path: Path, deed: Any) -> None:
    deed(install(tmp_path, "h11", dict(requirements.pins("runtime.txt"))["h11"]))
    assert found_in(tmp_path) == [".venv-runtime: h11: h11.py differs from the wheel"]


@pytest.mark.parametrize("licence", ["AGPL-3.0-only", ""])
def test_a_licence_not_on_the_list_is_reported(tmp_path: Path, licence: str) -> None:
    version = dict(requirements.pins("runtime.txt"))["h11"]
    install(tmp_path, "h11", version, licence)
    told = licence or "unknown"
    assert found_in(tmp_path) == [f".venv-runtime: h11 {version}: licence {told} is not allowed"]


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("MIT", True),
        ("GPL-2.0-only", False),
        ("EPL-2.0 OR GPL-2.0-or-later", True),
        ("GPL-2.0-or-later OR EPL-2.0", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT OR GPL-2.0-only AND AGPL-3.0-only", True),
        ("GPL-2.0-only AND MIT OR AGPL-3.0-only", False),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("(MIT OR Apache-2.0) AND GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-only WITH GCC-exception-3.1", False),
        ("Apache Software License", True),
        ("MIT GPL-2.0-only", False),
        ("(MIT", False),
        ("", False),
    ],
)
def test_licence_expressions_are_evaluated(expression: str, verdict: bool) -> None:
    assert policy.allows(expression, policy.CARRIED) is verdict


def test_an_entry_without_a_hash_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "DIRECTORY", tmp_path)
    (tmp_path / "a.txt").write_text(f"one==1.0 \\\n    --hash=sha256:{'0' * 64}\n    # via two\n")
    (tmp_path / "b.txt").write_text("two==1.0\n")
    (tmp_path / "c.txt").write_text(f"three>=1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    assert list(audit.unpinned()) == [
        "not pinned by hash: b.txt: two==1.0",
        f"not pinned by hash: c.txt: three>=1.0 --hash=sha256:{'0' * 64}",
    ]


@pytest.fixture(scope="module")
def bill() -> str:
    """The bill of materials, made by the tool in its own environment."""
    return ran("-c", BILL).stdout


def ran(*words: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    python = ROOT / ".venv-release/bin/python"
    ended = subprocess.run(
        [python, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": "build:internal"} | environment,
    )
    assert ended.returncode == status, ended.stderr
    return ended


def test_the_bill_of_materials_is_complete(bill: str) -> None:
    assert list(audit.incomplete(bill)) == []
    assert list(audit.licences(bill)) == []
    read = json.loads(bill)
    assert (read["bomFormat"], read["metadata"]["component"]["version"]) == ("CycloneDX", "0.1.0-ff00")
    references = {it["bom-ref"] for it in read["components"]} | {"netloom"}
    assert len(references) == len(read["components"]) + 1
    assert {it["ref"] for it in read["dependencies"]} <= references
    depends = {it["ref"]: set(it["dependsOn"]) for it in read["dependencies"]}
    assert set().union(*depends.values()) | {"netloom"} == references, "each is needed by something"
    (cryptography,) = (it["bom-ref"] for it in read["components"] if it["name"] == "cryptography")
    assert any("openssl" in it for it in depends[cryptography])
    # Components bundled in others without a list of their own, and libraries that the compiler links in.
    for inner, outer in (("libffi==3.4", "cffi"), ("zlib-crc32==2022", "nuitka"), ("glibc==2.28", "ziglang")):
        assert any(inner in on for it, on in depends.items() if it.startswith(f"{outer}=="))
    assert not {name for name, _ in sbom.names(bill)} & {"pip", "setuptools", "pycparser", "cyclonedx-bom", "pytest"}


def test_a_component_missing_from_the_bill_is_reported(bill: str) -> None:
    read = json.loads(bill)
    read["components"] = [it for it in read["components"] if it["name"] not in ("asyncssh", "openssl")]
    version = dict(requirements.pins("runtime.txt"))["asyncssh"]
    assert list(audit.incomplete(json.dumps(read))) == [
        f"the bill of materials lacks asyncssh {version}",
        "the bill of materials lacks the OpenSSL of cryptography",
    ]


@contextmanager
def service(*vulnerable: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A vulnerability service on loopback that reports these packages. Yields its URL and the list of its requests."""
    asked: list[dict[str, Any]] = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(question)
            package = question["package"]
            name = package.get("name") or package["purl"].partition("@")[0]
            known = {"id": "TEST-2026-1", "affected": [{"package": {"name": name, "ecosystem": "PyPI"}}]}
            said = json.dumps({"vulns": [known]} if name in vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audited(url: str, status: int) -> subprocess.CompletedProcess[str]:
    return ran("-m", "package.audit", status=status, AUDIT_OSV_URL=url, NO_PROXY="127.0.0.1")


def test_every_component_is_looked_up(bill: str) -> None:
    with service() as (url, asked):
        ended = audited(url, 0)
    assert f"{url} knows no vulnerability of them" in ended.stdout
    found = {(it["package"].get("ecosystem", ""), it["package"].get("name") or it["package"]["purl"]) for it in asked}
    listed = requirements.pins(*(path.name for path in requirements.files()))
    carried = json.loads(bill)["components"]
    assert found == (
        {("PyPI", name) for name, _ in listed}
        | {("Debian:12", name) for name in ("libffi", "python3.11", "zlib")}
        | {("", it["purl"]) for it in carried if it["purl"].startswith("pkg:cargo/")}
    )


def test_a_known_vulnerability_is_named_and_fails_the_audit() -> None:
    with service("asyncssh", "pkg:cargo/pyo3") as (url, _):
        ended = audited(url, 1)
    found = [line.rpartition(" ")[0] for line in ended.stderr.splitlines() if line.endswith("TEST-2026-1")]
    assert [line.rpartition(" ")[0] for line in found] == ["audit: runtime.txt: asyncssh", "audit: bill: pyo3"]
    assert found[0].endswith(f" {dict(requirements.pins('runtime.txt'))['asyncssh']}:")
    assert "knows no vulnerability" not in ended.stdout


def test_an_unreachable_service_fails_the_audit_in_one_line() -> None:
    with service() as (url, _):
        pass
    ended = audited(url, 2)
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"audit: known vulnerabilities were not checked, or not for all components: {url}")
    assert "knows no vulnerability" not in ended.stdout
    assert "pinned by hash and unchanged" in ended.stdout
