"""The extension archive for CloudStack: its manifest matches the program, and its launcher never changes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from netloom.commands.actions import BUILT_IN
from netloom.commands.table import TABLE
from netloom.protocol import pbr
from package import archive
from package.product import Product
from repo.files import ROOT

PRODUCT = Product(Path("netloom"), "0.1.0", "0.1.0-1f2e3d4c5b6a", 1_700_000_000, "1")


def manifest() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(archive.manifest(PRODUCT, "https://example.invalid/netloom"))
    return read


def actions() -> dict[str, dict[str, Any]]:
    return {it["name"]: it for it in manifest()["spec"]["customActions"]}


def test_custom_actions_match_the_program() -> None:
    assert list(actions()) == sorted(BUILT_IN)


def test_cloudstack_accepts_the_names_and_values() -> None:
    """The rules of addCustomAction in CloudStack 4.23. Its importer fails without a list of parameters."""
    for name, it in actions().items():
        assert re.fullmatch("[a-zA-Z0-9 _-]+", name)
        assert (it["resourcetype"], it["enabled"], it["allowedroletypes"]) == ("Network", True, ["Admin"])
        assert it["timeout"] == 60
        assert it["description"].endswith(".")
        for parameter in it["parameters"]:
            assert parameter.keys() == {"name", "type", "validationformat", "required"}
            assert (parameter["type"], parameter["validationformat"]) == ("STRING", "NONE")
            assert isinstance(parameter["required"], bool)


def test_policy_routing_actions_declare_the_parameters_they_read() -> None:
    """CloudStack passes only declared parameters. The parsers raise if a required one is missing."""
    values = {"table": "office", "table-id": "100", "table-name": "office", "filter": "", "skip": "0"}
    texts = {"route": "default via 192.0.2.1", "rule": "from 10.10.1.0/24"}
    given = {
        name: {parameter["name"]: (values | texts)[parameter["name"]] for parameter in it["parameters"]}
        for name, it in actions().items()
    }
    for name in ("pbr-create-table", "pbr-delete-table"):
        assert (pbr.parse_table(given[name]).number, pbr.parse_table(given[name]).name) == (100, "office")
    for name in ("pbr-add-route", "pbr-delete-route"):
        assert (pbr.parse_table(given[name]).name, pbr.parse_route(given[name]).via) == ("office", "192.0.2.1")
    for name in ("pbr-add-rule", "pbr-delete-rule"):
        assert (pbr.parse_table(given[name]).name, pbr.parse_rule(given[name]).source) == ("office", "10.10.1.0/24")
    lists = {name for name in BUILT_IN if "list" in name} | {"counters", "leases"}
    assert {name for name, told in given.items() if told.keys() == {"filter", "skip"}} == lists


def test_the_manifest_names_the_executable_and_the_url_of_the_archive() -> None:
    read = manifest()
    assert (read["apiVersion"], read["metadata"]["name"]) == ("cloudstack.apache.org/v1", "netloom")
    assert read["metadata"]["version"] == "0.1.0"
    assert read["source"]["url"] == "https://example.invalid/netloom/"
    assert read["source"]["refs"] == "netloom-0.1.0-1f2e3d4c5b6a-extension"
    spec = read["spec"]
    assert (spec["type"], spec["entrypoint"]["path"], spec["enabled"]) == ("NetworkOrchestrator", "netloom", True)
    assert "custom-action" in TABLE and "CustomAction" in spec["details"]["network.services"].split(",")
    assert "network.isolation.method" not in spec["details"]


def test_the_launcher_is_the_same_in_every_release() -> None:
    """CloudStack compares it between its servers. A difference would stop every network during a rolling upgrade."""
    launcher = (ROOT / "build/package/netloom.sh").read_bytes()
    assert hashlib.sha256(launcher).hexdigest() == "7464747d5edbea14379f699aa69af0ff0ce8d1cd64401434c76532245ad47af5"
