"""The built-in custom actions on a host: describe a scope, compare it with its desired state, and repair it.

An action that is not built in is a hook of the operator (hooks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from netloom import names
from netloom.agent.actions.hooks import Hook, Hooks
from netloom.agent.host import room
from netloom.agent.host.apply import apply
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.kernel import kept, links
from netloom.agent.kernel.nft import NftError
from netloom.agent.processes.failures import ServiceFailure
from netloom.agent.scopes.interfaces import Host, ScopeServices
from netloom.commands.actions import as_sections, check_known, page_of, printable_ascii, success_json, truncated
from netloom.commands.pbr import limited_to_table, unknown_scope
from netloom.errors import HostRefused
from netloom.plan.have import Have
from netloom.plan.plan import plan
from netloom.plan.steps import LoadRuleset
from netloom.protocol.custom import CustomAction
from netloom.render import describe
from netloom.render.active import active
from netloom.render.helpers import not_offered
from netloom.render.nft import FAMILY, TABLE, counters
from netloom.render.ruleset import Ruleset
from netloom.render.services import services
from netloom.render.want import Want
from netloom.state import Scope
from netloom.wire import Call


class ActionContext(msgspec.Struct, frozen=True, kw_only=True):
    """A scope, and what an action may need to inspect or repair it. The caller holds the lock of the scope.

    ``scope`` is its state, None without one; ``want`` the desired state of the host; ``known`` the ruleset that was
    loaded last; ``missing_helpers`` the registered conntrack helpers that the host lacks, and ``want`` leaves out;
    ``converge`` applies ``want`` to the host; ``failed`` returns the services that then do not do what the state says;
    ``standby`` describes the group of the scope.
    """

    scope: Scope | None
    want: Want
    known: Ruleset | None
    missing_helpers: tuple[str, ...] = ()
    services: ScopeServices
    converge: Callable[[], HostChanges]
    failed: Callable[[], tuple[ServiceFailure, ...]]
    standby: Callable[[], list[str]] = list


class Actions:
    """Runs custom actions. Its methods block, so they are called in worker threads."""

    def __init__(self, host: Host, hooks: Path) -> None:
        self._host = host
        self._hooks = Hooks(hooks)

    def run(self, call: Call, request: CustomAction, context: ActionContext) -> tuple[str | Hook, HostChanges]:
        """Run a built-in action: its output, and what it changed on the host.

        For any other action return the hook; the caller runs it after it has released the scope's lock.
        Raises BadRequest for an unknown action, and HostRefused when there is no state of the scope or a step fails.
        """
        action = str(request.action)
        check_known(action, self._hooks.names())
        scope = context.scope
        if scope is None:
            raise unknown_scope(action, call.scope_id)
        match action:
            case "check":
                found = [*self._deviations(scope, context), *_limited(scope, context)]
                return success_json(
                    truncated(found) if found else "nothing to do: all is as it should be"
                ), HostChanges()
            case "counters":
                counted = _counters(scope, context.want)
                return success_json(page_of(counted, request.params, none="no public address stands")), HostChanges()
            case "dump-config":
                return self._dump(scope, context), HostChanges()
            case "leases":
                return success_json(
                    page_of(describe.leases(scope), request.params, none="no NIC is known")
                ), HostChanges()
            case "list-firewall-rules":
                return success_json(
                    page_of(describe.firewall(scope), request.params, none="no such line")
                ), HostChanges()
            case "pbr-list-routes":
                routes = describe.pbr_routes(limited_to_table(scope, request.params))
                return success_json(page_of(routes, request.params, none="no route")), HostChanges()
            case "pbr-list-rules":
                rules = describe.pbr_rules(limited_to_table(scope, request.params))
                return success_json(page_of(rules, request.params, none="no rule")), HostChanges()
            case "pbr-list-tables":
                return success_json(page_of(describe.pbr_tables(scope), request.params, none="no table")), HostChanges()
            case "reboot-device":
                done = self._reboot(scope, context)
                did = f"{call.scope_id}: links down and up, ruleset and services anew, {done.count} steps"
                return success_json(did), done
            case "show":
                described = [*describe.summary(scope), *self._status(scope, context)]
                return success_json(printable_ascii("\n".join(described))), HostChanges()
        hook = Hook(
            call_id=call.call_id,
            path=self._hooks.path(action),
            action=action,
            scope_id=call.scope_id,
            namespace=names.namespace(call.scope_id),
            payload=call.payload,
        )
        return hook, HostChanges()

    # ----------------------------------------------------------------------------------------------------- inspecting

    def _observe(self, scope: Scope, context: ActionContext) -> Have:
        return self._host.look(scope.scope_id, context.want, context.known)

    def _deviations(self, scope: Scope, context: ActionContext) -> list[str]:
        """The steps that a repair would do now, a line for each."""
        have = self._observe(scope, context)
        found = [str(step) for step in plan(have, self._host.placed(scope.scope_id, context.want))]
        wanted = {it.name for it in services(scope)} if context.want.namespace else set()
        running = context.services.running(scope.scope_id).keys()
        failed = {it.name: it for it in context.failed()}
        found += [f"failed: {it}" for it in failed.values()]  # guard: check-says-why-a-service-fails
        found += [f"start {name}" for name in sorted(wanted - running - failed.keys())]
        found += [f"stop {name}" for name in sorted(running - wanted)]
        if have.exists and context.want.namespace:
            unserved = context.services.unserved(scope, context.want.namespace)
            found += [
                f"serve DHCP, metadata and passwords of network {it}" for it in unserved if f"guest-{it}" not in failed
            ]
        found += [
            f"balance rule {it}, once {at} is free" for it, at in context.services.waiting(scope.scope_id).items()
        ]
        found += [f"not in force: {command}: {it}" for command, it in _left_out(scope)]
        found += [
            f"not in force: {it}" for it in not_offered(context.missing_helpers)
        ]  # guard: a-missing-helper-is-named
        found += self._blocked(context.want)
        return [printable_ascii(it) for it in found]

    def _blocked(self, want: Want) -> list[str]:
        """What keeps frames from passing the host's own firewall, on the bridges that the scope's ports are in."""
        try:
            return self._host.blocked(want.ports)
        except HostRefused as error:
            return [f"the host's firewall: {error}"]

    def _status(self, scope: Scope, context: ActionContext) -> list[str]:
        running = context.services.running(scope.scope_id)
        crashes = context.services.crashes(scope.scope_id)
        guest, guest_crashes = context.services.guest_process()
        deviations = self._deviations(scope, context)
        described = [f"{name} (pid {pid}{_restarts(crashes.get(name, 0))})" for name, pid in sorted(running.items())]
        return [
            f"namespace {context.want.namespace}"
            if context.want.namespace
            else "shut down: nothing of it runs on this host",
            f"services: {', '.join(described) or 'none'}",
            f"guest process of this host: pid {guest}{_restarts(guest_crashes)}",
            f"{len(deviations)} things are not as they should be: see check"
            if deviations
            else "all is as it should be",
            *map(printable_ascii, context.standby()),
            *map(printable_ascii, self._blocked(context.want)),
            *_limited(scope, context),
        ]

    def _dump(self, scope: Scope, context: ActionContext) -> str:
        have, want = self._observe(scope, context), self._host.placed(scope.scope_id, context.want)
        sections = [
            ("== summary", [*describe.summary(scope), *self._status(scope, context)]),
            ("== check: what a repair would do", self._deviations(scope, context)),
            ("== wanted: addresses", [f"{it.cidr} on {it.link}" for it in want.addresses]),
            ("== wanted: ports", [f"{it.link} {it.mac} - {it.host_link} in {it.segment.bridge}" for it in want.ports]),
            ("== found: links", _links(have)),
            ("== found: addresses", [f"{it.cidr} on {it.link}" for it in have.addresses]),
            ("== found: routes", list(map(str, have.routes))),
            ("== found: rules", list(map(str, have.rules))),
            ("== found: links of the host", _host_links(have)),
            ("== leases", describe.leases(scope)),
            ("== firewall and translations", describe.firewall(scope)),
            (
                "== policy routing",
                [*describe.pbr_tables(scope), *describe.pbr_routes(scope), *describe.pbr_rules(scope)],
            ),
            ("== state, without secrets", describe.state(scope)),
            ("== found: nftables", _table(have.namespace) if have.exists else []),
        ]
        return as_sections([(title, [printable_ascii(it) for it in lines]) for title, lines in sections])

    # ----------------------------------------------------------------------------------------------------- repairing

    def _reboot(self, scope: Scope, context: ActionContext) -> HostChanges:
        """Set up the scope again from its state: repair it, links down and up, load the ruleset, restart the services.

        Allowed connections stay open, because conntrack keeps their translations while the links are down. A link that
        goes down loses its routes; the second repair adds them again. Raises HostRefused, also when a service fails.
        """
        want = context.want
        if not want.namespace:
            raise HostRefused(
                f"{scope.scope_id} is shut down: nothing of it runs on this host", hint="start a VM in the network"
            )
        first = context.converge()
        ours = sorted(it.link for it in want.ports)
        try:
            links.change(want.namespace, map(links.set_down, ours))
            links.change(want.namespace, map(links.set_up, ours))
            if want.ruleset is not None:
                apply([LoadRuleset(want.namespace, want.ruleset)])
                self._host.renewed(scope.scope_id)
            context.services.renew(scope.scope_id)
        except HostRefused:
            context.converge()  # add the lost routes again, whatever has failed
            raise
        done = context.converge()  # guard: a-reboot-puts-back-what-links-lost
        if failed := context.failed():
            raise failed[0].error
        macs = {port.link: port.mac for port in want.ports}
        announcements = tuple(Announcement(want.namespace, it.link, it.ip, macs[it.link]) for it in want.announce)
        return HostChanges(first.steps + done.steps, announcements, first.services + done.services)


def _limited(scope: Scope, context: ActionContext) -> list[str]:
    """What has used up its share, what has too many privileges, and what the host soon lacks.

    A repair would not change any of these.
    """
    if not context.want.namespace:
        return []
    limited = context.services.limited(scope, context.want.namespace)
    privileged = context.services.privileged(scope.scope_id)
    connections = room.connections(context.want.namespace)
    return [printable_ascii(it) for it in (*limited, *privileged, *connections, *room.scarce())]


def _restarts(times: int) -> str:
    return f", died or hung {times} times since the agent started" if times else ""


def _links(have: Have) -> list[str]:
    return [
        f"{it.name} {it.mac} {'up' if it.up else 'down'}{f', other end {it.host_link}' if it.host_link else ''}"
        for _, it in sorted(have.links.items())
    ]


def _host_links(have: Have) -> list[str]:
    return [
        f"{it.name} ({it.kind or 'device'}) {'up' if it.up else 'down'}"
        f"{f', in {it.master}' if it.master else ''}{f', ports {chr(32).join(it.ports)}' if it.ports else ''}"
        f"{f', alias {it.alias}' if it.alias else ''}"
        for _, it in sorted(have.host_links.items())
    ]


def _table(namespace: str) -> list[str]:
    try:
        with kept.nft(namespace) as nft:
            return nft.list_text(f"list table {FAMILY} {TABLE}").expandtabs(2).splitlines()
    except NftError as error:
        return [str(error)]


def _left_out(scope: Scope) -> list[tuple[str, str]]:
    """The command and network, and the reason, of each part of a list that is not in force."""
    return [(command, reason) for command, reasons in sorted(scope.left_out.items()) for reason in reasons]


def _counters(scope: Scope, want: Want) -> list[str]:
    """The counters of the scope's nftables table: a line for each public address and each IPv6 prefix.

    They count since the address was added on this host, or since the whole table was loaded again.
    Raises HostRefused when the table cannot be read, or lacks a counter.
    """
    if want.ruleset is None or not want.ruleset.counters:
        return []
    with kept.nft(want.namespace) as nft:
        found = nft.list_json(f"list counters table {FAMILY} {TABLE}")["nftables"]
    counted = {it["counter"]["name"]: it["counter"] for it in found if "counter" in it}
    missing = [it for it in want.ruleset.counters if it not in counted]
    if missing:
        raise HostRefused(f"{want.namespace} has no counter {', '.join(missing[:5])}", hint="reboot-device repairs it")
    return [
        f"{what}: in {_in_words(counted[arrived])}; out {_in_words(counted[left])}"
        for what, (arrived, left) in counters(active(scope)).items()
    ]


def _in_words(counter: dict[str, object]) -> str:
    return f"{counter['packets']} packets, {counter['bytes']} bytes"
