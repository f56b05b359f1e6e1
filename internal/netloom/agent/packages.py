"""The programs of other projects that a host needs, and the packages that have them."""

from __future__ import annotations

import shutil
from pathlib import Path

from netloom.agent.environment import PATH

OS_RELEASE = "/etc/os-release"

Family = str  # of distributions: "debian", "rhel", "suse", or "" for any other

_PACKAGES: dict[str, dict[Family, str]] = {
    "nft": {"debian": "nftables", "rhel": "nftables", "suse": "nftables"},
    "dnsmasq": {"debian": "dnsmasq-base", "rhel": "dnsmasq", "suse": "dnsmasq"},
    "haproxy": {"debian": "haproxy", "rhel": "haproxy", "suse": "haproxy"},
}
_INSTALL = {"debian": "apt-get install", "rhel": "dnf install", "suse": "zypper install"}


def family(path: str = "") -> Family:
    """The family whose package names this distribution uses (os-release(5), ID and ID_LIKE)."""
    try:
        lines = Path(path or OS_RELEASE).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    ids = " ".join(fields.get(key, "").strip("\"'") for key in ("ID", "ID_LIKE")).split()
    known = {"debian": "debian", "ubuntu": "debian", "rhel": "rhel", "fedora": "rhel", "centos": "rhel", "suse": "suse"}
    return next((known[it] for it in ids if it in known), "")


def is_installed(program: str) -> bool:
    """Whether the program is in the agent's search path."""
    return shutil.which(program, path=PATH) is not None


def install(*programs: str, of: Family | None = None) -> str:
    """The command that installs the packages of these programs on this distribution, or on the family ``of``."""
    known = family() if of is None else of
    return " ".join([_INSTALL.get(known, "install"), *(_PACKAGES.get(it, {}).get(known, it) for it in programs)])


def install_missing(program: str) -> str:
    """The command that installs ``program``, and dnsmasq and haproxy if they are missing, too."""
    others = [it for it in ("dnsmasq", "haproxy") if it != program and not is_installed(it)]
    return install(program, *others)
