"""cloud-init (Debian's package) in a VM: its CloudStack data source reads all data, and cloud-init applies it."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from guestbed import guest_process, network, nic, run, segment
from kernel.agent_host import agent_host, done, wait_until
from kernel.isolated_network import FILE, PASSWORD, WEB, live_with_vm
from netloom.secret import Secret

PAYLOAD = Path(__file__).parents[1] / "payloads" / "035-isolated-save-vm-data-first-start.json"

# The data source as cloud-init calls it at boot, without the changes to the machine. Debian's python3 has the package.
READ = """
import json
from cloudinit import helpers
from cloudinit.sources.DataSourceCloudStack import DataSourceCloudStack
source = DataSourceCloudStack({}, None, helpers.Paths({"cloud_dir": "/run/cloud", "run_dir": "/run/cloud-init"}))
assert source._get_data()
print(json.dumps([source.vr_addr, source.get_instance_id(), source.metadata, source.userdata_raw.decode(),
                  source.get_public_ssh_keys(), source.get_config_obj()]))
"""


def test_cloud_init_reads_the_data_that_cloudstack_saved(tmp_path: Path) -> None:
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
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]  # the DHCP client ends with the process
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


# A simulated machine: an overlay of the root directory that keeps changes in memory, without the devices of the host.
MACHINE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay none -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
cd /mnt/root
mount -t proc none proc
mount -t tmpfs -o mode=755 none run
mount -t tmpfs -o mode=755 none dev
for it in null zero full random urandom; do : > dev/$it; mount --bind /dev/$it dev/$it; done
rm -rf var/lib/cloud var/log/cloud-init* etc/ssh/ssh_host_* etc/cloud/cloud.cfg.d
mkdir -p etc/cloud/cloud.cfg.d root/.ssh
cat > etc/cloud/cloud.cfg.d/90-test.cfg <<END
datasource_list: [ CloudStack ]
network: {config: disabled}
ssh_genkeytypes: [ed25519]
cloud_init_modules: [write-files, set_hostname, users-groups, ssh]
cloud_config_modules: [set-passwords, runcmd]
cloud_final_modules: [scripts-user]
END
rm -f etc/resolv.conf
cat > run/dhcp <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
ip route replace default via "$router"
{ echo "search $domain"; for it in $dns; do echo "nameserver $it"; done } > /etc/resolv.conf
END
chmod 755 run/dhcp
exec chroot . sh -ec '
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
busybox udhcpc -i eth0 -f -q -n -t 8 -T 1 -s /run/dhcp >&2
cloud-init init --local >&2
cloud-init init >&2
cloud-init modules --mode=config >&2
cloud-init modules --mode=final >&2
cloud-init query -f "{{instance_id}}"; echo
hostname
cat /root/ran-as-a-script
cat ~debian/.ssh/authorized_keys
grep ^debian: /etc/shadow
grep PasswordAuthentication /etc/ssh/sshd_config /etc/ssh/sshd_config.d/* | tail -1
'
"""
SCRIPT = '#!/bin/sh\n# caf\u00e9\necho "ran on $(hostname)" > /root/ran-as-a-script\n\n'


def test_cloud_init_applies_user_data_keys_and_password() -> None:
    """cloud-init runs the user data, installs the keys, and sets and acknowledges the password. The agent erases it."""
    with agent_host() as host:
        host.start()
        live_with_vm(host)
        done(host.call("091", "save-userdata", userdata=SCRIPT))
        done(host.call("092", "save-sshkey"))
        assert PASSWORD in host.path(FILE).read_text()
        apart = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        said = host.run(*apart, "sh", "-c", MACHINE, namespace=WEB, timeout_s=120)
        instance, name, ran, *keys, shadow, login = filter(None, said.splitlines())
        wait_until(lambda: PASSWORD not in host.path(FILE).read_text())
        assert PASSWORD not in host.log()
    data = {it["file"]: it["content"] for it in json.loads(PAYLOAD.read_text())["payload"]["vm_data"]}
    assert (instance, name, ran) == (data["instance-id"], "web-1", "ran on web-1")
    (reset,) = PAYLOAD.parent.glob("092-*.json")
    assert set(keys) == set(
        json.loads(reset.read_text())["payload"]["sshkey"].splitlines()
    )  # cloud-init does not keep the order
    kept = shadow.split(":")[1]
    assert _crypt(PASSWORD, kept) == kept
    assert _crypt("another", kept) != kept
    assert login.endswith("PasswordAuthentication yes")


def _crypt(password: str, setting: str) -> str:
    libcrypt = ctypes.CDLL("libcrypt.so.1", use_errno=True)
    libcrypt.crypt.restype = ctypes.c_char_p
    hashed: bytes = libcrypt.crypt(password.encode(), setting.encode())
    return hashed.decode()
