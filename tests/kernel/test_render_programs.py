"""dnsmasq and haproxy accept the rendered configuration files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from netloom.render import dnsmasq, haproxy
from unit.balanced_scope import NETWORK, RULE, balanced_scope


@pytest.mark.parametrize("algorithm", ["roundrobin", "leastconn", "source"])
def test_haproxy_accepts_the_rendered_configuration(tmp_path: Path, algorithm: str) -> None:
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program, "haproxy is not installed: `make packages`"
    wanted = haproxy.service(
        balanced_scope(replace(RULE, algorithm=algorithm), replace(RULE, rule_id=1, public_port=1, backends=()))
    )
    assert wanted is not None
    file = tmp_path / "haproxy.cfg"
    file.write_text(wanted.config["haproxy.cfg"])
    checked = subprocess.run([program, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert "WARNING" not in checked.stdout + checked.stderr


def test_dnsmasq_accepts_the_rendered_configuration(tmp_path: Path) -> None:
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program, "dnsmasq is not installed: `make packages`"
    file = tmp_path / "dnsmasq.conf"
    file.write_text(dnsmasq.service("net-204", NETWORK).config["dnsmasq.conf"])
    checked = subprocess.run([program, "--test", f"--conf-file={file}"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
