"""JSON text to a checked payload, in two steps: ``load_object`` parses the text, ``convert`` checks the object.

Each step raises BadRequest with the path of the field. The JSON syntax is strict: NaN, duplicate keys and lone
surrogates are refused. The fields are tolerant: null, the empty string and an absent field mean the same, older names
of fields are accepted, and unknown fields are ignored.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from netloom.errors import BadRequest
from netloom.protocol.scalars import quoted

T = TypeVar("T")

# The values of these keys are the operator's or the VM's own data: an empty string there is kept.
_OPAQUE = frozenset({"action-params", "action_params", "options"})

_DIGITS_MAX = 40  # of a number

# CloudStack writes these characters as escapes: its JSON library makes texts that HTML can contain.
_HTML_SAFE = {it.encode(): f"\\u{ord(it):04x}".encode() for it in "<>&='"}
_ONLY_DIGITS = bytes(ord("0") if chr(it).isdigit() else ord(" ") for it in range(128)) + b" " * 128

# A list of rules comes as a whole with each change, and most of its items are those of the list before.
_ITEMS_KEPT, _ITEM_BYTES_KEPT = 20_000, 512
_ITEM = "(item)"  # in an error, until the place of the item in its list is known
_LIST_LONG = 64

# A restore has about 25 objects and lists for each VM: enough for 20,000 VMs.
_STRUCTURES_MAX = 500_000
# A string that does not end matches to the end of the text: a search that starts again at each quote inside it would
# take quadratic time.
_STRING_OR_OPENINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{\[]+', re.DOTALL)  # guard: an-open-string-is-read-once

_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_AT = " - at `$"
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def load_object(data: bytes, *, root: str) -> dict[str, Any]:
    """Parses ``data``: the JSON object without the fields that are null or empty.

    Raises BadRequest when ``data`` is not exactly one JSON object in UTF-8, or has more objects and lists than a
    network can have. ``root`` names ``data`` in the message.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{root}: not UTF-8 (byte {error.start})") from error
    _check_size(data, root)
    try:
        value = _usual(data)
        if value is None:
            value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_no_constant)
        if not isinstance(value, dict):
            raise BadRequest(f"{root}: {quoted(value)}, where an object is expected")  # guard: a-payload-is-an-object
        if _HALF_SURROGATE.search(data):
            _refuse_half_characters(value, root)
        if _may_have_empty(data):
            _remove_empty(value)
        return value
    except json.JSONDecodeError as error:
        raise BadRequest(f"{root}: not JSON: {error.msg} (character {error.pos} of {len(text)})") from error
    except RecursionError as error:
        raise BadRequest(f"{root}: nested too deeply") from error
    except ValueError as error:
        raise BadRequest(f"{root}: not JSON: {error}") from error


def _usual(data: bytes) -> Any:
    """The value of a text in the usual spelling; None: unknown, ask the strict parser.

    msgspec parses six times as fast as that, and keeps the last one of two fields with the same name. So its value
    counts only if it gives the same text again: the text then has no field that the value has not.
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    text = msgspec.json.encode(value)
    if text != data:
        for character, escape in _HTML_SAFE.items():
            text = text.replace(character, escape)
        if text != data:  # guard: a-key-that-is-twice-is-seen
            return None
    if b"0" * (_DIGITS_MAX + 1) in data.translate(_ONLY_DIGITS):  # guard: a-long-number-is-seen
        return None
    return value


def _check_size(data: bytes, root: str) -> None:
    """Raise BadRequest for more objects and lists than a network can have; each takes time and memory to convert."""
    if data.count(b"{") + data.count(b"[") <= _STRUCTURES_MAX:
        return
    found = 0
    for match in _STRING_OR_OPENINGS.finditer(data):  # match by match, so that other threads go on
        if not data.startswith(b'"', match.start()):  # braces in user data are text
            found += match.end() - match.start()
            if found > _STRUCTURES_MAX:  # guard: a-payload-has-bounded-structures
                raise BadRequest(f"{root}: more than {_STRUCTURES_MAX} objects and lists")


def dump(value: dict[str, Any]) -> bytes:
    """The compact JSON text, in UTF-8, of an object from :func:`load_object`.

    Raises BadRequest for a number that became infinite when it was parsed.
    """
    try:
        text = msgspec.json.encode(value)
        if b"null" in text:  # guard: an-infinite-number-is-refused
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        return text
    except (ValueError, RecursionError) as error:
        raise BadRequest("payload: a number that is out of range") from error


def convert(value: dict[str, Any], shape: type[T], *, root: str) -> T:
    """Converts an object from :func:`load_object` to ``shape``.

    ``shape.ALIASES`` maps older names of fields to current ones; when both are present, the current name wins.
    Raises BadRequest with the path of the field, which begins with ``root``.
    """
    aliases: dict[str, str] = getattr(shape, "ALIASES", {})
    if not aliases.keys().isdisjoint(value):
        value = {aliases.get(key, key): it for key, it in value.items() if aliases.get(key, key) not in value} | {
            key: it for key, it in value.items() if key not in aliases
        }
    try:
        return msgspec.convert(value, shape, dec_hook=_parse)
    except msgspec.ValidationError as error:
        raise BadRequest(_sentence(str(error), root)) from error


class Items(Generic[T]):
    """The valid items of a list, and the errors of the others, each with the path of the field."""

    def __init__(self, items: Iterable[T] = (), invalid: Iterable[str] = ()) -> None:
        self.items = tuple(items)
        self.invalid = tuple(invalid)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.items, self.invalid))


def convert_items(
    value: object,
    shape: type[T],
    *,
    root: str,
    wider: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] = lambda item: (),
    remember: bool = False,
) -> tuple[list[T], list[str]]:
    """Convert the items of a list one by one: the items that are valid, and the errors of the others.

    ``wider`` gives objects to take instead of an item that is not valid, the best first; without one it is left out.
    ``remember``: a valid item is converted once, and each later one with the same text is the same object.
    Raises BadRequest if ``value`` is not a list of objects.
    """
    if not isinstance(value, list) or not all(isinstance(it, dict) for it in value):
        raise BadRequest(f"{root}: expected a list of objects")
    items: list[T] = []
    errors: list[str] = []
    known: Any = shape
    for at, item in enumerate(value):
        try:
            if remember and (packed := _packed(item)):
                items.append(_known_item(known, packed))
            else:
                items.append(convert(item, shape, root=_ITEM))
        except BadRequest as error:  # guard: an-unreadable-rule-keeps-no-other-out
            errors.append(f"{root}[{at}]{error.message.removeprefix(_ITEM)}")
            for instead in wider(item):
                with contextlib.suppress(BadRequest):
                    items.append(convert(instead, shape, root=root))
                    break
    return items, errors


def _packed(item: dict[str, Any]) -> bytes:
    """The item in MessagePack, which has each value that JSON text can have; empty if it is not to be kept."""
    try:
        packed = msgspec.msgpack.encode(item)
    except (OverflowError, RecursionError):  # a number of more than 64 bits
        return b""
    return packed if len(packed) <= _ITEM_BYTES_KEPT else b""


@lru_cache(maxsize=_ITEMS_KEPT)
def _known_item(shape: Any, packed: bytes) -> Any:
    return convert(msgspec.msgpack.decode(packed), shape, root=_ITEM)


def _parse(shape: Any, value: object) -> object:
    return shape.parse(value)


def _sentence(message: str, root: str) -> str:
    what, at, path = message.rpartition(_AT)
    if not at:
        what, path = message, ""
    where = root + path.rstrip("`")
    if missing := _MISSING.fullmatch(what):
        return f"{where}.{missing[1]} is missing"
    return f"{where}: {what.replace('`', '')}".replace("Expected array", "expected a list").replace(
        "Expected object", "expected an object"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} appears twice")
            seen.add(key)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS_MAX:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _refuse_half_characters(value: object, path: str) -> None:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise BadRequest(f"{path}: the value contains half of a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_half_characters(key, path)
            _refuse_half_characters(item, f"{path}.{key if len(key) < 40 else '...'}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_half_characters(item, f"{path}[{index}]")


def _may_have_empty(text: bytes) -> bool:
    return b"null" in text or b'""' in text


def _remove_empty(value: dict[str, Any]) -> None:
    """Remove the fields that are null or empty, here and in the objects inside."""
    values = value.values()
    if None in values or "" in values:
        for key in [key for key, item in value.items() if item is None or item == ""]:
            del value[key]
    for key, item in value.items():
        if isinstance(item, dict):
            if key not in _OPAQUE:
                _remove_empty(item)
        elif isinstance(item, list) and item and key not in _OPAQUE:
            _remove_empty_in_list(item)


def _remove_empty_in_list(items: list[Any]) -> None:
    if len(items) > _LIST_LONG and not _may_have_empty(msgspec.json.encode(items)):
        return
    for item in items:
        if isinstance(item, dict):
            _remove_empty(item)
        elif isinstance(item, list):
            _remove_empty_in_list(item)
