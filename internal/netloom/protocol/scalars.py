"""The types of single values in payloads: ids, addresses, ports, names, keywords. Each type checks its values.

Every class has ``parse``. It takes a decoded JSON value (CloudStack sends most scalars as strings, other clients send
numbers) and returns a value of the class, or raises ValueError with a sentence about the value. Addresses, prefixes
and MAC addresses get one spelling, so that equal values are equal texts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from functools import lru_cache
from typing import ClassVar, Generic, Literal, Self, TypeVar, cast, get_args

from netloom.errors import one_line
from netloom.names import ID, UNTAGGED, VLAN_TAG_MAX, VXLAN
from netloom.secret import Secret

_LiteralT = TypeVar("_LiteralT", bound=str)

VNI_MAX = (1 << 24) - 1  # RFC 7348: 24 bits
SECRET_CHARACTERS_MAX = 4096  # the width of CloudStack's detail columns
CONTENT_CHARACTERS_MAX = 16 << 20  # CloudStack's own limit is 1 MB of user data before its decoding
QUOTE_CHARACTERS_MAX = 48

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}\Z")
_MASK_OCTET = r"(?:0|128|192|224|240|248|252|254|255)"
_NETMASK = re.compile(
    rf"(?:255\.(?:255\.(?:255\.{_MASK_OCTET}|{_MASK_OCTET}\.0)|{_MASK_OCTET}\.0\.0)|{_MASK_OCTET}\.0\.0\.0)\Z"
)
_IPV6 = re.compile(r"[0-9a-fA-F:.]{2,45}\Z")
# The spellings that Java's Integer.parseInt takes, by which CloudStack checks a length: 24, 024, +24, -0.
_PREFIX_LENGTH = re.compile(r"(?:\+?[0-9]{1,9}|-0+)\Z")
_MAC = re.compile(r"[0-9a-fA-F]{1,2}(?:[:.-][0-9a-fA-F]{1,2}){5}\Z")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")
_HOST_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\Z")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\Z")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_RANGE = re.compile(r"(0|[1-9][0-9]{0,9})(?:[-:](0|[1-9][0-9]{0,9}))?\Z")  # guard: a-range-has-a-dash-or-a-colon
_PRIVATE_VLAN = re.compile(r"([0-9]{1,8})-([ipc])?([0-9]{1,8})\Z", re.IGNORECASE)
_SCHEME = re.compile(r"(vlan|pvlan|vxlan)://", re.IGNORECASE)
_API_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # CloudStack's API refuses these, and the tab
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.@\\$-]{0,63}\Z")
_LINK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}\Z")


def quoted(value: object) -> str:
    """``value`` for an error message: one line of at most 60 characters; with its size if it is longer."""
    if isinstance(value, str):
        shown = value if len(value) <= QUOTE_CHARACTERS_MAX else f"{value[: QUOTE_CHARACTERS_MAX - 18]}..."
        shown = one_line(f"'{shown}'", QUOTE_CHARACTERS_MAX)
        return shown if len(value) <= QUOTE_CHARACTERS_MAX else f"{shown} ({len(value)})"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int | float):
        return one_line(repr(value) if abs(value) < 10**20 else "a huge number", QUOTE_CHARACTERS_MAX)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def string(value: object, *, limit: int, secret: bool = False) -> str:
    """``value`` if it is text of at most ``limit`` characters. Raises ValueError, which does not quote a secret."""
    if not isinstance(value, str):
        raise ValueError(f"{'the value' if secret else quoted(value)} is not text")
    if len(value) > limit:
        shown = f"the value ({len(value)} characters)" if secret else quoted(value)
        raise ValueError(f"{shown} is too long (at most {limit} characters)")
    return value


def _text(value: object) -> str:
    """A string or an integer as text. Raises ValueError for any other value and for huge integers."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 10**20:
            return str(value)
        raise ValueError("a huge number is not text")
    raise ValueError(f"{quoted(value)} is not text")


class Text(str):
    """One line of text without control characters, at most 1,024 characters."""

    LIMIT: ClassVar[int] = 1024

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value)
        if len(text) > cls.LIMIT:
            raise ValueError(f"{quoted(text)} is too long (at most {cls.LIMIT} characters)")
        if _CONTROL.search(text):
            raise ValueError(f"{quoted(text)} contains a control character")
        return cls(text)


class Document(str):
    """Text that other code parses later: any characters except NUL, at most 64 Ki."""

    @classmethod
    def parse(cls, value: object) -> Self:
        text = string(value, limit=1 << 16)
        if "\0" in text:
            raise ValueError(f"{quoted(text)} contains a NUL character")
        return cls(text)


class Pattern(str):
    """Text that matches the pattern of its class. JSON numbers are accepted as text where ``NUMBERS`` is True."""

    PATTERN: ClassVar[re.Pattern[str]]
    WHAT: ClassVar[str]
    NUMBERS: ClassVar[bool] = False

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value) if cls.NUMBERS else value
        if not isinstance(text, str) or not cls.PATTERN.match(text):
            raise ValueError(f"{quoted(value)} is not {cls.WHAT}")
        return cls(text)


class Word(Pattern):
    """A word of the protocol, for example a state: letters, digits, dots, dashes, underscores. Becomes lower case."""

    PATTERN = _WORD
    WHAT = "a word of the protocol"
    NUMBERS = True

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(super().parse(value).lower())


class ActionName(Pattern):
    """The name of a custom action: letters, digits, blanks, dots, dashes, underscores (CloudStack's addCustomAction).

    It becomes a part of a file name, so blanks become dashes, and it contains no slash and no ``..``.
    """

    PATTERN = re.compile(r"(?!.*\.\.)[A-Za-z0-9 _-][A-Za-z0-9 ._-]{0,199}\Z")
    WHAT = "the name of an action"

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(super().parse(value).replace(" ", "-"))


class Id(Pattern):
    """A CloudStack id: decimal, no leading zero, at most ten digits. Names on the host contain it."""

    PATTERN = ID
    WHAT = "an id (a decimal number of at most 10 digits)"
    NUMBERS = True


class Flag(int):
    """True or false: the JSON value, or the string ``"true"`` or ``"false"`` in any case, which CloudStack sends."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, bool):  # guard: a-flag-may-be-a-json-bool
            return cls(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return cls(value.lower() == "true")
        raise ValueError(f"{quoted(value)} is not true or false")


class Number(int):
    """A whole number, as a JSON number or as decimal text, from LOW to HIGH of its class."""

    LOW: ClassVar[int] = 0
    HIGH: ClassVar[int] = (1 << 63) - 1
    WHAT: ClassVar[str] = "a number"

    @classmethod
    def parse(cls, value: object) -> Self:
        number: int | None = None
        if isinstance(value, str):
            number = int(value) if _INTEGER.match(value) else None
        elif isinstance(value, float):
            number = int(value) if value.is_integer() and abs(value) < 1 << 53 else None
        elif isinstance(value, int) and not isinstance(value, bool):  # guard: a-number-may-be-a-json-number
            number = value
        if number is None or not cls.LOW <= number <= cls.HIGH:
            raise ValueError(f"{quoted(value)} is not {cls.WHAT} ({cls.LOW} to {cls.HIGH})")
        return cls(number)


class Port(Number):
    """A port that a rule matches, 0 to 65535: CloudStack accepts 0, and Terraform's users write 0-65535 for any."""

    HIGH = 65535  # guard: a-port-is-at-most-65535
    WHAT = "a port"


class ServicePort(Number):
    """A port that a program listens on, 1 to 65535."""

    LOW = 1
    HIGH = 65535
    WHAT = "a port that a program can listen on"


class IcmpNumber(Number):
    """An ICMP type or code. -1 means any. CloudStack does not check the range of a firewall rule's numbers."""

    LOW = -(1 << 31)
    HIGH = (1 << 31) - 1
    WHAT = "an ICMP type or code"


class Order(Number):
    """A number that orders the items of a list. An update in CloudStack's API may store 0 and negative numbers."""

    LOW = -(1 << 31)
    HIGH = (1 << 31) - 1


class PortRange(tuple[int, int]):
    """The first and the last port of a range; a single port is a range of one.

    CloudStack sends ``22`` or ``8080-8090``; its documentation shows ``8080:8090``.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value)
        match = _RANGE.match(text)
        if match is None:
            raise ValueError(f"{quoted(value)} is not a port or a range of ports (22, 8080-8090)")
        first, last = Port.parse(int(match[1])), Port.parse(int(match[2] or match[1]))
        if first > last:
            raise ValueError(f"{quoted(value)} is a range of ports that ends before it begins")
        return cls((int(first), int(last)))

    @property
    def first(self) -> int:
        return self[0]

    @property
    def last(self) -> int:
        return self[1]


class IPv4(Pattern):
    """An IPv4 address: four decimal octets without leading zeros."""

    PATTERN = _IPV4
    WHAT = "an IPv4 address"


class UnicastIPv4(IPv4):
    """A unicast IPv4 address. 0.0.0.0/8, loopback, multicast and broadcast are refused."""

    @classmethod
    def parse(cls, value: object) -> Self:
        address = IPv4.parse(value)
        first = int(address.partition(".")[0])
        if first in (0, 127) or 224 <= first <= 239 or address == "255.255.255.255":
            raise ValueError(f"{quoted(value)} is not the address of a machine")
        return cls(address)


class IPv6(str):
    """An IPv6 address without a zone, in the spelling of RFC 5952."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, str) and _IPV6.match(value):
            with contextlib.suppress(ValueError):
                address = ipaddress.IPv6Address(value)
                # RFC 5952 section 5 writes a mapped address with a dotted quad; Python does so from 3.13 on.
                mapped = address.ipv4_mapped
                return cls(f"::ffff:{mapped}" if mapped is not None else address.compressed)
        raise ValueError(f"{quoted(value)} is not an IPv6 address")


class IPv4Prefix(str):
    """An IPv4 network with prefix length. Host bits are cleared: ``10.1.1.7/24`` becomes ``10.1.1.0/24``."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, str) and len(value) <= QUOTE_CHARACTERS_MAX:
            address, length = _address_and_length(value)
            if 0 <= length <= 32 and _IPV4.match(address):
                return cls(ipaddress.IPv4Network(f"{address}/{length}", strict=False))
        raise ValueError(f"{quoted(value)} is not an IPv4 network with prefix length")

    def __contains__(self, address: object) -> bool:
        return isinstance(address, str) and ipaddress.IPv4Address(address) in ipaddress.IPv4Network(str(self))


class IPv6Prefix(str):
    """An IPv6 network with prefix length. Host bits are cleared."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, str) and len(value) <= 64:
            address, length = _address_and_length(value)
            if 0 <= length <= 128 and _IPV6.match(address):
                with contextlib.suppress(ValueError):
                    return cls(ipaddress.IPv6Network(f"{address}/{length}", strict=False).compressed)
        raise ValueError(f"{quoted(value)} is not an IPv6 network with prefix length")


def _address_and_length(text: str) -> tuple[str, int]:
    """The parts of an address with prefix length, in the spellings that CloudStack's NetUtils takes; -1: no length.

    The egress rules of CloudStack's API keep blanks around a prefix. A slash at the end is ignored by Java's split.
    """
    address, _, length = text.strip(" ").removesuffix("/").partition("/")
    return address, int(length) if _PREFIX_LENGTH.match(length) and length.isascii() else -1


class IPv6Interface(str):
    """An IPv6 address or network with prefix length. Host bits are kept."""

    @classmethod
    def parse(cls, value: object) -> Self:
        IPv6Prefix.parse(value)
        address, length = _address_and_length(str(value))
        return cls(ipaddress.IPv6Interface(f"{address}/{length}").compressed)


class Prefix(str):
    """An IPv4 or IPv6 network with prefix length. Host bits are cleared."""

    @classmethod
    def parse(cls, value: object) -> Self:
        for kind in (IPv4Prefix, IPv6Prefix):
            with contextlib.suppress(ValueError):
                return cls(str(kind.parse(value)))
        raise ValueError(f"{quoted(value)} is not a network with prefix length")


class Netmask(Pattern):
    """An IPv4 netmask in dotted form: ones, then zeros."""

    PATTERN = _NETMASK
    WHAT = "a netmask"

    @property
    def length(self) -> int:
        return int(ipaddress.IPv4Address(str(self))).bit_count()


class Mac(Pattern):
    """A unicast MAC address in the spellings that CloudStack's NetUtils takes. Becomes lower case with colons."""

    PATTERN = _MAC
    WHAT = "the MAC address of a machine"

    @classmethod
    def parse(cls, value: object) -> Self:
        octets = [int(octet, 16) for octet in re.split("[:.-]", super().parse(value))]
        # The lowest bit of the first octet is 1 in group addresses (IEEE 802).
        if octets[0] & 1 or not any(octets):
            raise ValueError(f"{quoted(value)} is not {cls.WHAT}")
        return cls(":".join(f"{octet:02x}" for octet in octets))


class HostName(Pattern):
    """The name of a VM without a domain: one label of RFC 1123, as CloudStack's NetUtils requires."""

    PATTERN = _LABEL  # guard: a-host-name-is-a-label
    WHAT = "a host name"
    NUMBERS = True


class Domain(str):
    """A DNS name: labels of RFC 1123, at most 253 characters. A final dot is removed."""

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value)
        bare = text.removesuffix(".")
        if (
            len(bare) > 253
            or not all(_LABEL.match(label) for label in bare.split("."))  # guard: a-domain-is-made-of-labels
        ):
            raise ValueError(f"{quoted(value)} is not a domain name")
        return cls(bare)


class LinkName(Pattern):
    """The name of a NIC of the host: at most 15 characters, no slash, no dash or dot at the start."""

    PATTERN = _LINK
    WHAT = "the name of a network interface"


class Vlan(str):
    """The value of a broadcast URI: a tag, ``untagged``, a private VLAN ``1412-i2412``, or empty.

    A VXLAN id looks like a tag, so ``number`` may be up to 16777215, and the caller checks the range. The schemes
    ``vlan://`` and ``pvlan://`` are removed; ``vxlan://1000`` becomes ``vx1000``. Other schemes are refused.
    ``says_vlan``: whether the value had the scheme ``vlan://``, so that its number is not that of a VXLAN.
    """

    says_vlan = False

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value)
        scheme = _SCHEME.match(text)
        bare = text[scheme.end() :] if scheme else text
        if scheme and scheme[1].lower() == "vxlan":
            if vni := _tag(bare, VNI_MAX):
                return cls(f"{VXLAN}{vni}")
            raise ValueError(f"{quoted(value)} is not a VXLAN (vxlan://1 to vxlan://{VNI_MAX})")
        if "://" in bare:
            raise ValueError(f"{quoted(value)} has a scheme that is not known (vlan://, pvlan://, vxlan://)")
        if bare.lower() == UNTAGGED:  # guard: a-vlan-may-be-untagged
            return cls(UNTAGGED)
        if private := _PRIVATE_VLAN.match(bare):
            outer, inner = _tag(private[1], VLAN_TAG_MAX), _tag(private[3], VLAN_TAG_MAX)
            if outer and inner:
                return cls(f"{outer}-{(private[2] or 'i').lower()}{inner}")
        elif not (scheme and scheme[1].lower() == "pvlan") and (tag := _tag(bare, VNI_MAX)):
            value = cls(tag)
            value.says_vlan = bool(scheme)
            return value
        raise ValueError(f"{quoted(value)} is not a VLAN (a tag, untagged, 1412-i2412)")

    @property
    def private(self) -> bool:
        return "-" in self

    @property
    def number(self) -> int:
        """The tag or VXLAN id; 0 for untagged and empty, the primary tag of a private VLAN."""
        head = self.partition("-")[0].removeprefix(VXLAN)
        return int(head) if head.isdigit() else 0

    @property
    def is_vxlan(self) -> bool:
        """Whether the value names a VXLAN by its scheme."""
        return self.startswith(VXLAN)


def _tag(text: str, highest: int) -> int:
    return int(text) if _INTEGER.match(text) and 1 <= int(text) <= highest else 0


class IPv4List(tuple[IPv4, ...]):
    """Comma-separated IPv4 addresses (or a JSON list of them): resolvers, the gateways of a shared network."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(IPv4.parse(item) for item in _items(value))


class ResolverList(IPv4List):
    """Comma-separated resolvers. For a missing first one, CloudStack sends the text ``null``; it is left out."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(IPv4.parse(item) for item in _items(value) if item != "null")


class IPv6List(tuple[IPv6, ...]):
    """Comma-separated IPv6 addresses."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(IPv6.parse(item) for item in _items(value))


class IPv4PrefixList(tuple[IPv4Prefix, ...]):
    """Comma-separated IPv4 networks: the ranges of a shared network."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(IPv4Prefix.parse(item) for item in _items(value))


class IPv6PrefixList(tuple[IPv6Prefix, ...]):
    """Comma-separated IPv6 networks."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(IPv6Prefix.parse(item) for item in _items(value))


def _items(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    text = string(value, limit=4096)
    return [item.strip(" ") for item in text.split(",") if item.strip(" ")]


class Password(Secret):
    """A password of a VM: one line, at most 4,096 characters."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        text = string(value, limit=SECRET_CHARACTERS_MAX, secret=True)
        if "\0" in text or "\n" in text or "\r" in text:
            raise ValueError("the value is not one line")
        return cls(text)


class Content(Secret):
    """Data that a VM can fetch: user data, a metadata item, SSH keys. At most 16 Mi characters, served byte for byte.

    NUL is allowed: CloudStack's client decodes gzipped user data as if it were text.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(string(value, limit=CONTENT_CHARACTERS_MAX, secret=True))  # guard: user-data-keeps-every-byte


class ItemName(str):
    """A file name inside a VM's metadata: a relative path without ``..``, empty segments or control characters.

    Tenants choose some of these names (the parameters of their user data), so names such as ``../x`` can occur.
    """

    @classmethod
    def parse(cls, value: object) -> Self:
        text = Text.parse(value)
        if not is_item_name(text):
            raise ValueError(f"{quoted(value)} is not the name of a metadata item")
        return cls(text)


@lru_cache(maxsize=1024)  # most VMs have the same names
def is_item_name(text: str) -> bool:
    """Whether ``text`` is a valid name: at most 255 characters, and a path below the VM's own directory."""
    return (
        0 < len(text) <= 255
        and "\\" not in text
        and not _CONTROL.search(text)
        and all(segment not in ("", ".", "..") for segment in text.split("/"))  # guard: a-metadata-name-stays-below
    )


class OptionValue(str):
    """The value of a DHCP option: one line of text; numbers and booleans are written out."""

    @classmethod
    def parse(cls, value: object) -> Self:
        text = ParamValue.parse(value)
        if _CONTROL.search(text):
            raise ValueError(f"{quoted(value)} is not one line of at most 4096 characters")
        return cls(text)


class ParamValue(str):
    """The value of a custom action's parameter: text; numbers and booleans are written out.

    Lines may end in LF, CR or both, and there may be any character from U+0080 on: CloudStack's API refuses the other
    control characters of ASCII only.
    """

    @classmethod
    def parse(cls, value: object) -> Self:
        if value is None:
            return cls("")
        text = str(value).lower() if isinstance(value, bool) else _text(value)
        if len(text) > 4096 or _API_CONTROL.search(text):
            raise ValueError(f"{quoted(value)} is not text of at most 4096 characters without control characters")
        return cls(text)


class Title(str):
    """A name that a person chose, for people to read: any text becomes one line of at most 255 characters."""

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(_CONTROL.sub(" ", _text(value)[:255]))


class Loose(str):
    """A value of a command that deletes something. Nothing is refused: what was never stored is not there."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, bool) or not isinstance(value, str | int):
            return cls("")
        return cls(value[:255] if isinstance(value, str) else value if abs(value) < 10**20 else "")


class Choice(str, Generic[_LiteralT]):
    """One of the words of a Literal type, which is the parameter of the class. Accepts any case, becomes lower case."""

    WORDS: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        (base,) = cls.__orig_bases__  # type: ignore[attr-defined]  # types.get_original_bases is new in Python 3.12
        cls.WORDS = get_args(get_args(base)[0])

    @property
    def word(self) -> _LiteralT:
        """The word as a value of the Literal type."""
        return cast(_LiteralT, str(self))

    @classmethod
    def parse(cls, value: object) -> Self:
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if text.lower() not in cls.WORDS:
            raise ValueError(f"{quoted(value)} is none of {', '.join(cls.WORDS)}")
        return cls(text.lower())


class Direction(Choice[Literal["ingress", "egress"]]):
    """The direction of the traffic that a rule matches."""


class GuestType(Choice[Literal["isolated", "shared", "l2"]]):
    """CloudStack's types of guest networks."""


class ParamName(Pattern):
    """The name of a custom action's parameter: one line of at most 255 characters. CloudStack accepts any text."""

    PATTERN = re.compile(r"(?=.*\S)[^\x00-\x1f\x7f]{1,255}\Z")
    WHAT = "the name of a parameter"


class Host(str):
    """The address or name of a host: IPv4, IPv6 (brackets are removed), or a name.

    Names may contain underscores, which /etc/hosts allows. The last label of a name is not all digits (RFC 1123,
    section 2.1), so a mistyped address is not a name. No value starts with a dash.
    """

    @classmethod
    def parse(cls, value: object) -> Self:
        text = _text(value)
        bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
        if _IPV4.match(bare):
            return cls(bare)
        if ":" in bare:
            with contextlib.suppress(ValueError):
                return cls(str(IPv6.parse(bare)))
        name = bare.removesuffix(".")
        labels = name.split(".")
        if len(name) <= 253 and all(map(_HOST_LABEL.match, labels)) and not labels[-1].isdigit():
            return cls(name)
        raise ValueError(f"{quoted(value)} is neither an address nor the name of a host")


class HostList(tuple[Host, ...]):
    """Comma-separated hosts, with or without blanks. The order stays; duplicates are removed."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        return cls(dict.fromkeys(Host.parse(item) for item in _items(value)))


class UserName(Pattern):
    """A login name: no dash at the start, no blank, no slash."""

    PATTERN = _USER
    WHAT = "a user name"
