"""The fast parser gives what the strict one gives, and a rule that is known is not converted again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.commands import decode
from netloom.errors import BadRequest
from netloom.protocol import scalars
from netloom.protocol.firewall import ApplyFwRules
from netloom.protocol.reader import dump, load_object

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**45), 10**45), st.floats(allow_nan=False), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)


def loaded(text: bytes) -> object:
    try:
        return load_object(text, root="payload")
    except BadRequest as error:
        return error.message.partition("(")[0]  # the place in the text differs


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_the_usual_spelling_has_the_value_of_any_other(value: dict[str, Any]) -> None:
    usual = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    unusual = json.dumps(value, indent=1).encode()
    assert repr(loaded(usual)) == repr(loaded(unusual))


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_what_is_dumped_is_loaded_again(value: dict[str, Any]) -> None:
    given_value = loaded(json.dumps(value).encode())
    if isinstance(given_value, dict):
        assert repr(loaded(dump(given_value))) == repr(given_value)


@pytest.mark.mutation("a-key-that-is-twice-is-seen")
@pytest.mark.parametrize("text", [b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'{"a":"x=\\u003d","a":"x"}'])
def test_a_key_that_is_twice_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest, match="appears twice"):
        load_object(text, root="payload")


@pytest.mark.mutation("a-long-number-is-seen")
def test_a_number_of_41_digits_is_refused() -> None:
    assert load_object(b'{"a":%s}' % (b"9" * 40), root="payload") == {"a": int("9" * 40)}
    with pytest.raises(BadRequest, match="41 digits"):
        load_object(b'{"a":%s}' % (b"9" * 41), root="payload")


@pytest.mark.mutation("an-infinite-number-is-refused")
def test_an_infinite_number_is_not_sent_as_nothing() -> None:
    with pytest.raises(BadRequest, match="out of range"):
        dump(load_object(b'{"a":1e999}', root="payload"))


def test_texts_as_cloudstack_escapes_them() -> None:
    assert load_object(b'{"a":"\\u003cb\\u003e\\u0026\\u0027\\u003d","c":[{"d":""},null]}', root="payload") == {
        "a": "<b>&'=",
        "c": [{}, None],
    }


def rules(*ports: object) -> bytes:
    listed = [
        {"id": at, "type": "ingress", "protocol": "tcp", "portStart": port, "portEnd": port, "publicIp": "203.0.113.20"}
        for at, port in enumerate(ports)
    ]
    payload = {"network_id": "204", "fw_rules": {"default_egress_allow": False, "rules": listed}}
    return json.dumps(payload).encode()


def test_a_rule_that_is_known_is_not_converted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = decode("apply-fw-rules", rules(22, 80, 443))
    converted: list[object] = []
    parse = scalars.Port.parse

    def counted(value: object) -> scalars.Port:
        converted.append(value)
        return parse(value)

    monkeypatch.setattr(scalars.Port, "parse", counted)
    after = decode("apply-fw-rules", rules(22, 80, 8443))
    assert set(converted) <= {8443}
    assert isinstance(before, ApplyFwRules)
    assert isinstance(after, ApplyFwRules)
    assert [a is b for a, b in zip(before.fw_rules.items, after.fw_rules.items, strict=True)] == [True, True, False]


@pytest.mark.parametrize("port", [1e999, 10**30, 22.5, "x", -1])
def test_a_port_that_is_none_opens_no_other(port: object) -> None:
    with pytest.raises(BadRequest, match=r"payload\.fw_rules\.rules\[1\]\.portStart|out of range"):
        decode("apply-fw-rules", rules(22, port).replace(b"Infinity", b"1e999"))
