"""Policy routing by custom actions: texts in, typed routes and rules out; nothing that could be run."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.commands.pbr import ACTIONS, EACH_MAX, limited_to_table
from netloom.errors import BadRequest, HostRefused, NetloomError
from netloom.state import Pbr, PbrRoute, PbrRule, PbrTable, Scope
from unit.payload_player import call, implement

WORDS = ("default", "via", "dev", "src", "203.0.113.1", "pub-101", "to", "from", "iif", ";", "-x")


def implemented_scope() -> Scope:
    scope = implement().scope
    for address, vlan, cidr in (
        ("203.0.113.20", "101", "203.0.113.0/24"),
        ("198.51.100.20", "102", "198.51.100.0/24"),
    ):
        scope = call(
            scope,
            "assign-ip",
            public_ip=address,
            public_vlan=vlan,
            public_gateway=f"{address.rpartition('.')[0]}.1",
            public_cidr=cidr,
            source_nat="true" if vlan == "101" else "false",
        ).scope
    assert scope is not None
    return scope


def act(scope: Scope | None, action: str, **params: Any) -> tuple[Scope, str]:
    """The scope afterwards, and the message that the caller reads. ``table_id`` stands for ``table-id``."""
    told = {name.replace("_", "-"): value for name, value in params.items()}
    done = call(scope, "custom-action", action=f"pbr-{action}", action_params=told)
    said = json.loads(done.output)
    assert (said["status"], said["printmessage"]) == ("success", "true")
    assert done.scope is not None
    return done.scope, said["message"]


def smoke() -> Scope:
    return act(implemented_scope(), "create-table", table_id="100", table_name="smoke")[0]


def refused(scope: Scope | None, action: str, **params: Any) -> BadRequest:
    with pytest.raises(BadRequest) as it:
        act(scope, action, **params)
    return it.value


# --------------------------------------------------------------------------------------------------- what is understood


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("blackhole 192.0.2.0/24", PbrRoute(table=100, destination="192.0.2.0/24", kind="blackhole")),
        ("unreachable default", PbrRoute(table=100, destination="0.0.0.0/0", kind="unreachable")),
        ("prohibit 192.0.2.7", PbrRoute(table=100, destination="192.0.2.7/32", kind="prohibit")),
        (
            "default via 198.51.100.1 dev pub-102",
            PbrRoute(table=100, destination="0.0.0.0/0", via="198.51.100.1", link="pub-102"),
        ),
        # The link follows from the neighbour's address.
        (
            "0.0.0.0/0 via 198.51.100.1",
            PbrRoute(table=100, destination="0.0.0.0/0", via="198.51.100.1", link="pub-102"),
        ),
        (
            "  unicast 192.0.2.0/24   src 203.0.113.20 via 203.0.113.9 ",
            PbrRoute(table=100, destination="192.0.2.0/24", via="203.0.113.9", link="pub-101", source="203.0.113.20"),
        ),
        ("192.0.2.0/24 dev gst-204", PbrRoute(table=100, destination="192.0.2.0/24", link="gst-204")),
    ],
)
def test_a_route_is_read_in_the_words_of_ip_route(text: str, route: PbrRoute) -> None:
    scope, message = act(smoke(), "add-route", table="smoke", route=text)
    assert scope.pbr.routes == (route,)
    assert message == f"{route} in table smoke"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("to 192.0.2.0/24", PbrRule(priority=10000, table=100, destination="192.0.2.0/24")),
        ("from 10.10.1.45", PbrRule(priority=10000, table=100, source="10.10.1.45/32")),
        ("from all", PbrRule(priority=10000, table=100)),
        (
            "iif gst-204 from 10.10.1.0/24 to default pref 12345",
            PbrRule(priority=12345, table=100, source="10.10.1.0/24", iif="gst-204"),
        ),
    ],
)
def test_a_rule_is_read_in_the_words_of_ip_rule(text: str, rule: PbrRule) -> None:
    scope, message = act(smoke(), "add-rule", table="smoke", rule=text)
    assert scope.pbr.rules == (rule,)
    assert message == f"{rule.priority}: {rule.selector} lookup smoke"


# The remedy of each names what would be understood, or what there is.
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "route is missing"),
        ("blackhole", "destination is missing"),
        ("default", "does not say where it leads"),
        ("default via", "via lacks its value"),
        ("default via 192.0.2.1 dev eth0", "'eth0' is not a link of net-204 (links here: gst-204, pub-101, pub-102)"),
        ("default via 192.0.2.1", "through which link 192.0.2.1 is reached"),
        ("default via 203.0.113.20", "via 203.0.113.20 is the device itself"),
        ("default via 10.10.1.255", "no neighbour has that address"),
        ("default via 224.0.0.1 dev pub-101", "no neighbour has that address"),
        ("default dev pub-101 src 192.0.2.9", "src 192.0.2.9 is not the device's"),
        ("default via 203.0.113.1 via 203.0.113.1", "via is given twice"),
        ("blackhole 192.0.2.0/24 dev pub-101", "blackhole does not take dev"),
        ("192.0.2.1/24 via 203.0.113.1", "is an address within 192.0.2.0/24, not a network"),
        ("default via 203.0.113.1 table 20001", "'table' is not understood"),
        ("default via 203.0.113.1 proto kernel", "'proto' is not understood"),
        ("nat 192.0.2.0/24", "'nat' is not an IPv4"),
        ("2001:db8::/32 via fe80::1", "is not an IPv4 network"),
    ],
)
def test_a_route_that_is_not_understood_is_refused_with_what_would_be(text: str, said: str) -> None:
    assert said in str(refused(smoke(), "add-route", table="smoke", route=text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "rule is missing"),
        ("priority 10005", "no selector is given"),
        ("fwmark 1", "'fwmark' is not understood"),
        ("from 10.10.1.0/24 lookup 254", "'lookup' is not understood"),
        ("from 10.10.1.0/24 priority 20001", "is not a priority of these rules (10000 to 19999)"),
        ("from 10.10.1.0/24 priority 1", "is not a priority of these rules (10000 to 19999)"),
        ("iif pub-101", "'pub-101' is not a guest link of net-204"),
        ("to", "to lacks its value"),
        ("not from 10.10.1.0/24", "'not' is not understood"),
    ],
)
def test_a_rule_that_is_not_understood_is_refused_with_what_would_be(text: str, said: str) -> None:
    assert said in str(refused(smoke(), "add-rule", table="smoke", rule=text))


@pytest.mark.parametrize(
    "number", ["0", "253", "254", "255", "20000", "20001", "-1", "1e3", "0x64", "100 ", "99999999999"]
)
def test_tables_of_the_kernel_and_of_the_ways_out_are_refused(number: str) -> None:
    if number == "100 ":
        assert act(implemented_scope(), "create-table", table_id=number, table_name="a")[0].pbr.tables[0].number == 100
    else:
        refused(implemented_scope(), "create-table", table_id=number, table_name="a")


@pytest.mark.parametrize(
    "name", ["main", "default", "local", "all", "-batch", "a b", "a/b", "../a", "1a", "x" * 33, "ä"]
)
def test_names_that_are_taken_or_none_are_refused(name: str) -> None:
    refused(implemented_scope(), "create-table", table_id="100", table_name=name)


@pytest.mark.mutation("a-next-hop-is-an-address", instead="str")
@pytest.mark.parametrize(
    "text",
    [
        "default via 203.0.113.1; id > /tmp/canary",
        "default via $(id)",
        "default via `id`",
        "-batch /tmp/x",
        "default | id",
        "blackhole 192.0.2.0/24 && id",
        "blackhole 192.0.2.0/24\nroute add default via 203.0.113.1",
        "blackhole 192.0.2.0/24\0",
        "\u2028blackhole",
    ],
)
@pytest.mark.parametrize(
    ("action", "param"),
    [("add-route", "route"), ("delete-route", "route"), ("add-rule", "rule"), ("delete-rule", "rule")],
)
def test_defect_13_no_text_of_a_caller_gets_further_than_the_reader(action: str, param: str, text: str) -> None:
    refused(smoke(), action, table="smoke", **{param: text})


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_defect_13_whatever_the_text_only_checked_values_are_kept(text: str) -> None:
    for action, param in (("add-route", "route"), ("add-rule", "rule")):
        scope = smoke()
        with contextlib.suppress(NetloomError):
            scope, _ = act(scope, action, table="smoke", **{param: text})
        for word in " ".join([*map(str, scope.pbr.routes), *(it.selector for it in scope.pbr.rules)]).split():
            assert word.replace(".", "").replace("/", "").replace("-", "").isalnum()


# ------------------------------------------------------------------------------------------------- twice, and otherwise


def test_a_table_is_named_by_number_or_name() -> None:
    scope, message = act(implemented_scope(), "create-table", table_id="100", table_name="smoke")
    assert message == "table 100 smoke"
    for params in ({"table_id": "100"}, {"id": 100}, {"table": "smoke"}, {"table": "100"}, {"table_name": "smoke"}):
        assert act(scope, "create-table", **params) == (scope, "table 100 smoke")
        assert act(scope, "add-route", route="blackhole 192.0.2.0/24", **params)[0].pbr.routes[0].table == 100
    assert "known as 100 smoke" in str(refused(scope, "create-table", table_id="101", table_name="smoke"))
    assert "known as 100 smoke" in str(refused(scope, "create-table", table_id="100", table_name="other"))
    assert "have different values" in str(refused(scope, "create-table", table_id="100", id="101"))
    assert "no table is named" in str(refused(scope, "create-table"))
    # Without a number the first free one from 100 on, without a name one made from the number.
    assert act(scope, "create-table", table="other")[0].pbr.tables[-1] == PbrTable(number=101, name="other")
    assert act(scope, "create-table", table_id="7")[0].pbr.tables[0] == PbrTable(number=7, name="table-7")
    assert "there is no table 102 (pbr-create-table makes one; known: 100 smoke)" in str(
        refused(scope, "add-route", table_id="102", route="blackhole 192.0.2.0/24")
    )


def test_what_is_added_twice_is_there_once_and_nothing_is_replaced_silently() -> None:
    once, said = act(smoke(), "add-route", table="smoke", route="blackhole 192.0.2.0/24")
    assert act(once, "add-route", table="smoke", route="blackhole 192.0.2.0/24") == (once, said)
    assert "table smoke already has: blackhole 192.0.2.0/24" in str(
        refused(once, "add-route", table="smoke", route="192.0.2.0/24 via 203.0.113.1")
    )
    ruled, said = act(once, "add-rule", table="smoke", rule="to 192.0.2.0/24")
    assert act(ruled, "add-rule", table="smoke", rule="to 192.0.2.0/24 priority 10000") == (ruled, said)
    assert "there is already 10000: to 192.0.2.0/24 lookup smoke" in str(
        refused(ruled, "add-rule", table="smoke", rule="to 192.0.2.0/24 priority 10001")
    )
    assert "there is already 10000" in str(refused(ruled, "add-rule", table="smoke", rule="from all priority 10000"))
    assert ruled.revision == smoke().revision + 2


def test_rules_are_tried_in_the_order_in_which_they_were_added() -> None:
    scope = smoke()
    for rule in ("to 192.0.2.0/24", "from 10.10.1.4 priority 15000", "from 10.10.1.5", "from all priority 12000"):
        scope, _ = act(scope, "add-rule", table="smoke", rule=rule)
    assert [(it.priority, it.selector) for it in scope.pbr.rules] == [
        (10000, "to 192.0.2.0/24"),
        (12000, "from all"),
        (15000, "from 10.10.1.4/32"),
        (15001, "from 10.10.1.5/32"),
    ]
    full, _ = act(scope, "add-rule", table="smoke", rule="from 10.10.1.6 priority 19999")
    assert "a rule already has the last priority" in str(
        refused(full, "add-rule", table="smoke", rule="from 10.10.1.7")
    )


def test_what_never_was_is_deleted_with_success_even_where_nothing_is_known() -> None:
    scope = smoke()
    for action, params, message in (
        ("delete-table", {"table": "other"}, "no table other"),
        (
            "delete-route",
            {"table": "smoke", "route": "blackhole 192.0.2.0/24"},
            "no blackhole 192.0.2.0/24 in table smoke",
        ),
        ("delete-route", {"table_id": "7", "route": "default"}, "no default in table 7"),
        ("delete-rule", {"table": "smoke", "rule": "to 192.0.2.0/24"}, "no to 192.0.2.0/24 lookup smoke"),
    ):
        assert act(scope, action, **params) == (scope, message)
        told = {name.replace("_", "-"): value for name, value in params.items()}
        nowhere = call(None, "custom-action", action=f"pbr-{action}", action_params=told)
        assert nowhere.scope is None
        assert json.loads(nowhere.output)["status"] == "success"
    for action in ("create-table", "add-route", "add-rule"):
        with pytest.raises(HostRefused, match="nothing is known of net-204"):
            act(None, action, table="smoke", route="default", rule="from all")


def test_a_route_is_deleted_when_all_that_is_said_of_it_is_so() -> None:
    scope, _ = act(smoke(), "add-route", table="smoke", route="default via 203.0.113.1")
    for other in ("default via 203.0.113.9", "default dev pub-102", "blackhole default", "0.0.0.0/1"):
        assert act(scope, "delete-route", table="smoke", route=other)[0] == scope
    for same in ("default", "default dev pub-101", "unicast 0.0.0.0/0 via 203.0.113.1 dev pub-101"):
        assert act(scope, "delete-route", table="smoke", route=same)[0].pbr.routes == ()


def test_a_table_goes_with_its_routes_and_rules() -> None:
    scope, _ = act(smoke(), "create-table", table="other")
    for table in ("smoke", "other"):
        scope, _ = act(scope, "add-route", table=table, route="blackhole 192.0.2.0/24")
        scope, _ = act(scope, "add-rule", table=table, rule="to 192.0.2.0/24")
    without, message = act(scope, "delete-table", table_name="smoke")
    assert message == "no table smoke"
    assert without.pbr == Pbr(
        tables=(PbrTable(number=101, name="other"),),
        routes=(PbrRoute(table=101, destination="192.0.2.0/24", kind="blackhole"),),
        rules=(PbrRule(priority=10001, table=101, destination="192.0.2.0/24"),),
    )


def test_a_list_is_of_the_table_that_is_named() -> None:
    scope, _ = act(smoke(), "create-table", table="other")
    for table in ("smoke", "other"):
        scope, _ = act(scope, "add-route", table=table, route="blackhole 192.0.2.0/24")
        scope, _ = act(scope, "add-rule", table=table, rule=f"to 192.0.2.{len(table)}")
    for params, tables in (({}, [100, 101]), ({"table": "other"}, [101]), ({"id": "100"}, [100]), ({"table": "x"}, [])):
        shown = limited_to_table(scope, params).pbr
        assert [it.table for it in shown.routes] == [it.table for it in shown.rules] == tables
        assert shown.tables == scope.pbr.tables
    with pytest.raises(BadRequest, match="is not the name of a table"):
        limited_to_table(scope, {"table": "a b"})


def test_there_is_an_end_to_how_many() -> None:
    scope = smoke()
    for at in range(EACH_MAX):
        scope, _ = act(scope, "add-rule", table="smoke", rule=f"to 192.0.2.{at}")
    assert f"more than {EACH_MAX} rules" in str(refused(scope, "add-rule", table="smoke", rule="from all"))


def test_the_actions_that_change_something_are_six() -> None:
    assert {name: it.kind for name, it in ACTIONS.items()} == {
        f"pbr-{verb}-{what}": kind
        for what in ("table", "route", "rule")
        for verb, kind in (("create" if what == "table" else "add", "builds"), ("delete", "removes"))
    }
