"""cloud-init's CloudStack data source (Debian's package), after dhclient, in a VM: it finds and reads all there is."""

from __future__ import annotations

import json
from pathlib import Path

from guestbed import guest_process, network, nic, run, segment
from netloom.secret import Secret

PAYLOAD = Path(__file__).parents[1] / "payloads" / "035-isolated-save-vm-data-first-start.json"

# What the package does at boot, less the setting up of the machine: Debian's python3 is the one that has it.
READ = """
import json
from cloudinit import helpers
from cloudinit.sources.DataSourceCloudStack import DataSourceCloudStack
source = DataSourceCloudStack({}, None, helpers.Paths({"cloud_dir": "/run/cloud", "run_dir": "/run/cloud-init"}))
assert source._get_data()
print(json.dumps([source.vr_addr, source.get_instance_id(), source.metadata, source.userdata_raw.decode(),
                  source.get_public_ssh_keys(), source.get_config_obj()]))
"""


def test_cloud_init_reads_what_cloudstack_saved(tmp_path: Path) -> None:
    data = json.loads(PAYLOAD.read_text())["payload"]["vm_data"]
    items = {(it["dir"], it["file"]): it["content"] for it in data}
    metadata = {file: text for (place, file), text in items.items() if place == "metadata"}
    user_data, password = items["userdata", "user_data"], items["password", "vm_password"]
    web = nic(
        45, metadata=metadata, user_data=Secret(user_data), password=Secret(password), password_id="1", hostname="web-1"
    )
    script = tmp_path / "script"
    script.write_text(
        "#!/bin/sh\n"
        '[ -n "$new_ip_address" ] && ip addr replace $new_ip_address/24 dev eth0\n'
        '[ -n "$new_routers" ] && ip route replace default via $new_routers\n'
        "exit 0\n"
    )
    script.chmod(0o755)
    read = tmp_path / "read.py"
    read.write_text(READ)
    inside = (
        "mount -t tmpfs none /var/lib && mount -t tmpfs none /run && mkdir -p /var/lib/dhcp && "
        ": > /run/resolv && mount --bind /run/resolv /etc/resolv.conf && "
        f"dhclient -1 -q -lf /var/lib/dhcp/dhclient.eth0.leases -pf /run/pid -sf {script} eth0 && "
        f"/usr/bin/python3 {read}"
    )
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]  # the client ends with it
    with guest_process() as process, segment() as on:
        agent = process.connect()
        assert agent.serve(network(web), on.sockets()).error == ""
        said = run("ip", "netns", "exec", on.vm(web), *apart, "sh", "-c", inside, timeout_s=90)
        server, instance, got, got_user_data, keys, config = json.loads(said.stdout)
        assert agent.taken().password_id == "1"
    assert server == "10.1.1.1"
    assert instance == metadata["instance-id"]
    assert got == {name: text for name, text in metadata.items() if text}
    assert got_user_data == user_data
    assert keys == [metadata["public-keys"]]
    assert config["password"] == password
