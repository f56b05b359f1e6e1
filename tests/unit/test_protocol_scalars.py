"""Single values: what is accepted, in which spelling it comes out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from netloom.errors import BadRequest
from netloom.protocol import scalars as s
from netloom.protocol.firewall import Protocols
from netloom.protocol.reader import load_object
from netloom.protocol.userdata import Directory
from netloom.secret import Secret, dec_hook, enc_hook

ACCEPTED: list[tuple[Any, object, object]] = [
    (s.IPv4, "10.10.1.1", "10.10.1.1"),
    (s.IPv4, "255.255.255.255", "255.255.255.255"),
    (s.UnicastIPv4, "203.0.113.20", "203.0.113.20"),
    (s.UnicastIPv4, "169.254.7.1", "169.254.7.1"),
    (s.UnicastIPv4, "240.0.0.1", "240.0.0.1"),
    (s.IPv6, "2001:DB8::0:1", "2001:db8::1"),
    (s.IPv6, "::FFFF:c000:201", "::ffff:192.0.2.1"),
    (s.IPv4Prefix, "203.0.113.20/24", "203.0.113.0/24"),
    (s.IPv4Prefix, "0.0.0.0/0", "0.0.0.0/0"),
    (s.IPv6Prefix, "2001:db8::1/64", "2001:db8::/64"),
    (s.Prefix, "10.1.2.3/8", "10.0.0.0/8"),
    (s.Prefix, "::/0", "::/0"),
    (s.Netmask, "255.255.255.128", "255.255.255.128"),
    (s.Mac, "02:01:00:CC:00:03", "02:01:00:cc:00:03"),
    (s.Mac, "2:0:0:0:0:1", "02:00:00:00:00:01"),
    (s.Mac, "02.00.00.00.00.0A", "02:00:00:00:00:0a"),
    (s.IPv4Prefix, " 10.1.1.0/24", "10.1.1.0/24"),
    (s.IPv4Prefix, "10.0.0.0/08", "10.0.0.0/8"),
    (s.IPv4Prefix, "10.0.0.0/+8", "10.0.0.0/8"),
    (s.IPv4Prefix, "10.0.0.0/-0", "0.0.0.0/0"),
    (s.IPv4Prefix, "10.0.0.0/8/", "10.0.0.0/8"),
    (s.IPv6Prefix, "2001:db8::1/064", "2001:db8::/64"),
    (s.PortRange, "0-65535", (0, 65535)),
    (s.IcmpNumber, -2, -2),
    (s.IcmpNumber, 1000, 1000),
    (s.Order, -1, -1),
    (s.Vlan, "vxlan://1000", "vx1000"),
    (s.ActionName, "Dump Config", "Dump-Config"),
    (s.ActionName, "_x", "_x"),
    (s.ParamName, "Größe in GB", "Größe in GB"),
    (s.ParamName, "a\x85b", "a\x85b"),
    (s.ParamValue, "a\nb", "a\nb"),
    (s.ParamValue, "\x85 \u2028 \u202e 名 \U0001f600", "\x85 \u2028 \u202e 名 \U0001f600"),
    (s.ResolverList, "null,192.0.2.53", ("192.0.2.53",)),
    (s.Title, "a\nb\u2028c", "a b c"),
    (s.Loose, 70000, "70000"),
    (s.Loose, None, ""),
    (s.Mac, "02-01-00-cc-00-03", "02:01:00:cc:00:03"),
    (s.HostName, "web-1", "web-1"),
    (s.HostName, "a" * 63, "a" * 63),
    (s.Domain, "cs2cloud.internal.", "cs2cloud.internal"),
    (s.Id, "204", "204"),
    (s.Id, 204, "204"),
    (s.Id, "9999999999", "9999999999"),
    (s.Port, 0, 0),
    (s.Port, "22", 22),
    (s.Port, 65535, 65535),
    (s.Port, 22.0, 22),
    (s.PortRange, "22", (22, 22)),
    (s.PortRange, 22, (22, 22)),
    (s.PortRange, "8080-8090", (8080, 8090)),
    (s.PortRange, "8080:8090", (8080, 8090)),
    (s.PortRange, "80-80", (80, 80)),
    (s.IcmpNumber, -1, -1),
    (s.IcmpNumber, "255", 255),
    (s.Flag, True, 1),
    (s.Flag, "FALSE", 0),
    (s.Vlan, "1204", "1204"),
    (s.Vlan, 1204, "1204"),
    (s.Vlan, "vlan://1204", "1204"),
    (s.Vlan, "vlan://untagged", "untagged"),
    (s.Vlan, "Untagged", "untagged"),
    (s.Vlan, "16777215", "16777215"),
    (s.Vlan, "1412-i2412", "1412-i2412"),
    (s.Vlan, "pvlan://1412-P1412", "1412-p1412"),
    (s.LinkName, "enp129s0f0", "enp129s0f0"),
    (s.Host, "[2001:db8::1]", "2001:db8::1"),
    (s.Host, "kvm_07.example.org", "kvm_07.example.org"),
    (s.HostList, " 192.0.2.11 , 192.0.2.12,,192.0.2.11", ("192.0.2.11", "192.0.2.12")),
    (s.IPv4List, "198.51.100.53, 198.51.100.54", ("198.51.100.53", "198.51.100.54")),
    (s.IPv4PrefixList, "10.30.0.0/24,10.31.0.9/25", ("10.30.0.0/24", "10.31.0.0/25")),
    (s.UserName, "cloud-admin", "cloud-admin"),
    (s.ItemName, "public-keys/0/openssh-key", "public-keys/0/openssh-key"),
    (s.ParamValue, True, "true"),
    (s.ParamValue, None, ""),
    (Protocols, 47, ("47",)),
    (Protocols, "6", ("tcp",)),
    (Protocols, "0006", ("tcp",)),
    (Protocols, "٤٧", ("47",)),
    (Protocols, 0, ("all",)),
    (Protocols, " GRE ", ("47",)),
    (Protocols, "tcp,udp", ("tcp", "udp")),
    (Protocols, "icmp,all", ("all",)),
    (Protocols, "t", ()),
    (Protocols, " ", ()),
    (Protocols, "p,u", ()),
    (Directory, "meta-data", "metadata"),
]


def rows(kind: Any, *values: object) -> list[tuple[Any, object]]:
    return [(kind, value) for value in values]


REFUSED: list[tuple[Any, object]] = [
    *rows(s.IPv4, "10.1.1.01", " 10.1.1.1", "10.1.1.1\n", "10.1.1", "256.1.1.1", "१0.1.1.1", 1, True, []),
    *rows(s.UnicastIPv4, "0.0.0.0", "127.0.0.2", "224.0.0.5", "239.1.2.3", "255.255.255.255", "10.1.1", 1),
    *rows(s.IPv6, "fe80::1%eth0", ":::", "1.2.3.4", "2001:db8::1/64", "g::"),
    *rows(s.IPv4Prefix, "10.1.1.0", "10.1.1.0/33", "10.1.1.0/-1", "10.1.1.0/255.255.255.0", "::/0"),
    *rows(s.IPv4Prefix, "10.1.1.0 /24", "10.1.1.0//24", "10.1.1.0/٢٤", "10.1.1.0/"),
    *rows(s.Netmask, "255.0.255.0", "24"),
    *rows(
        s.Mac,
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "0:0:0:0:0:0",
        "02:01:00:cc:00",
        "02:01:00:cc:00:100",
        2,
    ),
    *rows(s.HostName, "-a", "a-", "a.b", "a_b", "a" * 64, "web\n6.6.6.6 www.bank.example", "wéb"),
    *rows(s.Domain, "a..b", "x" * 254, "example.com\naddress=/#/6.6.6.6", "a b", "."),
    *rows(s.Id, "0204", "12345678901", "-1", "1.0", "", "٢", True, 1.5, "../x", 10**30),
    *rows(s.ServicePort, 0, 65536),
    *rows(s.Port, -1, 65536, 99999, "0x16", "022", " 22", True, 22.5, float("inf"), "1" * 50),
    *rows(s.PortRange, "90-80", "1-65536", "80-", "80-90-100", "80 - 90", "080"),
    *rows(s.IcmpNumber, 1 << 31, "x"),
    *rows(s.Flag, "yes", 1, 0, "1"),
    *rows(
        s.Vlan,
        "pvlan://101",
        "vxlan://untagged",
        "vlan://vxlan://5",
        "0",
        "16777216",
        "01204",
        "-1",
        "vlan:1204",
        "eth1",
        "1412-x3",
        "5000-i5001",
        "1 2",
    ),
    *rows(s.LinkName, "-eth1", "eth1/..", "e" * 16, "eth 1", ".", "..", "eth1\n", 1),
    *rows(s.Host, "-oProxyCommand=x", "10.0.0.256", "a b", "192.0.2.1:22", "host;id", "é.example"),
    *rows(s.UserName, "-l", "a b", "", "root\n", "../x"),
    *rows(s.ItemName, "../x", "/etc/passwd", "a//b", "a/../b", ".", "a\\b", "x" * 256, "a\nb"),
    *rows(s.ActionName, "../x", "a/b", ".x", "x..y", "a\tb", "x" * 201),
    *rows(s.ParamValue, "a\x1bb", "x" * 4097, {}, []),
    *rows(s.OptionValue, "a\nb", "x" * 4097),
    *rows(s.ParamName, "", "  ", "a\nb", "x" * 256),
    *rows(s.Vlan, "lswitch://7", "vs://7", "vxlan://0", "vxlan://16777216", "vxlan://untagged", "vlan://vlan://7"),
    (s.Text, "x" * 1025),
    (s.Text, "a\x00b"),
    (s.Document, "a\x00b"),
    (s.Password, "two\nlines"),
    (s.Password, "x" * 4097),
    (s.Content, 5),
    *rows(Protocols, "256", "tcp;udp", "tls", True, None, []),
    (Directory, "../etc"),
]


@pytest.mark.parametrize(("kind", "value", "wanted"), ACCEPTED)
def test_accepted_in_one_spelling(kind: Any, value: object, wanted: object) -> None:
    parsed = kind.parse(value)
    assert parsed == wanted
    assert isinstance(parsed, kind)


@pytest.mark.parametrize(("kind", "value"), REFUSED)
def test_refused_with_a_short_sentence(kind: Any, value: object) -> None:
    with pytest.raises(ValueError, match=r"\S") as refused:
        kind.parse(value)
    assert len(str(refused.value)) < 140
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "kind",
    [
        *(s.IPv4, s.IPv6, s.IPv4Prefix, s.IPv6Prefix, s.Prefix, s.Netmask, s.Mac, s.HostName, s.Domain, s.Id, s.Port),
        *(s.PortRange, s.Flag, s.Vlan, s.LinkName, s.Host, s.HostList, s.IPv4List, s.UserName, s.ItemName, s.Text),
        *(s.Word, s.ActionName, s.ParamValue, s.ParamName, s.GuestType, s.Direction),
    ],
)
def test_a_megabyte_is_refused_and_not_quoted(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"\S") as refused:
        kind.parse("9" * (1 << 20))
    assert len(str(refused.value)) < 200


def test_user_data_of_some_megabytes_is_honest() -> None:
    text = "#!/bin/sh\n" * 400_000
    assert s.Content.parse(text).reveal() == text


def test_prefix_knows_its_addresses() -> None:
    assert "10.10.1.255" in s.IPv4Prefix("10.10.1.0/24")
    assert "10.10.2.0" not in s.IPv4Prefix("10.10.1.0/24")


def test_range_knows_its_ends() -> None:
    ports = s.PortRange.parse("8080-8090")
    assert (ports.first, ports.last) == (8080, 8090)
    port = s.PortRange.parse("22")
    assert (port.first, port.last) == (22, 22)


def test_a_secret_prints_as_stars_wherever_it_goes() -> None:
    secret = Secret("hunter2")
    shown = f"{secret} {secret!r} {secret:>5} {[secret]} { ({'password': secret}) }"
    assert "hunter2" not in shown
    assert secret == Secret("hunter2") != Secret("hunter3")
    assert dec_hook(Secret, enc_hook(secret)) == secret
    assert s.Password.parse("hunter2") == secret


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1',
        b"[1]",
        b'"text"',
        b"null",
        b'{"a": 1} {"b": 2}',
        b'{"a": 1, "a": 2}',
        b'{"x": {"a": 1, "a": 2}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\x00"}',
        b"\x00",
        b'{"a": "\\ud83d"}',
        b'{"\\udc00": 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_not_one_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        load_object(text, root="payload file")
    assert str(refused.value).startswith("payload file")
    assert len(str(refused.value)) < 200
