"""``netloom move``, ``drain`` and the other commands about where scopes are, on all hosts of a registration."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from netloom.cli import table
from netloom.cli.login import Remote, read_file, remote_only
from netloom.cli.progress import MovesDisplay
from netloom.cli.rows import echo_json, print_rows
from netloom.errors import BadRequest, HostRefused, NetloomError, one_line
from netloom.secret import Secret

if TYPE_CHECKING:
    from netloom.extension.moves.balance import Planned
    from netloom.extension.moves.inventory import Inventory
    from netloom.extension.moves.move import Moved, Mover
    from netloom.placementwire import HeldScope

T = TypeVar("T")

# Help texts are arguments of Typer, because the one file is compiled without docstrings.
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")]
Host = Annotated[str, typer.Argument(metavar="HOST", help="A host, written as in --hosts.")]
ArchivePassword = Annotated[
    str,
    typer.Option(
        "--archive-password-file", metavar="FILE", help="The password of the archive: the first line of this file."
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the program."""
    app.command("move", help="Move a network, or a VPC with its tiers, to another host.")(_move)
    app.command("drain", help="Move everything away from a host, and place nothing new on it.")(_drain)
    app.command("undrain", help="Let a host take networks again, after a drain or its return.")(_undrain)
    app.command("rebalance", help="Even the load of the hosts with the fewest moves.")(_rebalance)
    app.command("where", help="Show which host serves what, and what is wrong with it.")(_where)
    app.command("evacuate", help="Let the other hosts serve the networks of a dead host.")(_evacuate)
    app.command("export", help="Write the states of networks into an archive, as a backup.")(_export)
    app.command("import", help="Put networks of an archive back that no host has.")(_import)


# ------------------------------------------------------------------------------------------------------------ commands


@remote_only
def _move(
    remote: Remote,
    scope: Annotated[str, typer.Argument(metavar="SCOPE", help="net-<id> or vpc-<id>.")],
    to: Annotated[str, typer.Option("--to", metavar="HOST", help="Where it goes.")],
    force: Annotated[bool, typer.Option("--force", help="Move it to a drained host, too.")] = False,
    as_json: Json = False,
) -> None:
    hosts = remote.names()
    _check_scopes([scope])
    _check_host(to, hosts)

    async def work(mover: Mover) -> Moved:
        return await mover.move(scope, to, await _inventory(mover), force=force)

    display = MovesDisplay(1)
    moved = _run(remote, hosts, work, display)
    display.end()
    if as_json:
        print_rows([_row(moved)], as_json=True)
    elif moved.error is not None:
        raise moved.error
    else:
        typer.echo(_told(moved))


@remote_only
def _drain(remote: Remote, host: Host, dry_run: DryRun = False, as_json: Json = False) -> None:
    from netloom.extension.moves.drain import plan_drain, run_plan, set_drained  # asyncssh: twenty bare start-ups

    hosts = remote.names()
    _check_host(host, hosts)

    async def planned(mover: Mover) -> tuple[list[Planned], Inventory]:
        if not dry_run:
            await set_drained(mover.agents, host, True)
        inventory = await _inventory(mover)
        return plan_drain(host, inventory), inventory

    async def work(mover: Mover) -> list[Moved]:
        plan, inventory = await planned(mover)
        moved: list[Moved] = []
        for again in range(3):  # a call of CloudStack that began before the drain may have built one more
            if again:
                inventory = await _inventory(mover)
                plan = [it for it in plan_drain(host, inventory) if it.scope_id not in {had.scope_id for had in moved}]
            if not plan:
                break
            moved += await _carry_out(mover, plan, inventory, run_plan, f"{host} is drained from now on. ")
        return moved

    if dry_run:
        plan, inventory = _run(remote, hosts, planned)
        _print_plan(plan, inventory, as_json)
        return
    moved = _run(remote, hosts, work)
    _print_moves(moved, as_json, f"{host} is drained: it had nothing.")


@remote_only
def _rebalance(remote: Remote, dry_run: DryRun = False, as_json: Json = False) -> None:
    from netloom.extension.moves.drain import plan_rebalance, run_plan  # asyncssh: twenty bare start-ups

    async def work(mover: Mover) -> tuple[list[Planned], Inventory, list[Moved]]:
        inventory = await _inventory(mover)
        plan = plan_rebalance(inventory)
        if dry_run or not plan:
            return plan, inventory, []
        return plan, inventory, await _carry_out(mover, plan, inventory, run_plan, "")

    plan, inventory, moved = _run(remote, remote.names(), work)
    if dry_run:
        _print_plan(plan, inventory, as_json)
    else:
        _print_moves(moved, as_json, "The hosts are even: nothing to move.")
    _complain(inventory.failures.values())


@remote_only
def _undrain(remote: Remote, host: Host, as_json: Json = False) -> None:
    from netloom.extension.moves.drain import undrain  # asyncssh: twenty bare start-ups

    hosts = remote.names()
    _check_host(host, hosts)

    async def work(mover: Mover) -> list[str]:
        return await undrain(mover, host, await _inventory(mover))

    lines = _run(remote, hosts, work)
    if as_json:
        echo_json({"host": host, "did": lines})
    else:
        typer.echo("\n".join(map(one_line, lines)))


@remote_only
def _where(
    remote: Remote,
    scopes: Annotated[
        list[str] | None, typer.Argument(metavar="[SCOPE]...", help="net-<id> or vpc-<id>. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    from netloom.extension.moves.where import places, remarks  # asyncssh: twenty bare start-ups

    wanted = _check_scopes(scopes or [])
    inventory = _run(remote, remote.names(), _inventory)
    rows = [
        {
            "scope": it.scope_id,
            "host": it.host,
            "epoch": it.held.epoch,
            "gate": _gate(it.held),
            "networks": it.held.networks,
            "nics": it.held.nics,
            "addresses": it.held.public_ips,
            "standby": it.held.standby,
            "witness": it.held.witness,
            "term": it.held.term if it.held.group else None,
            "behind": it.held.behind,
            "took_over": it.held.took_over,
            "why": it.held.why,
        }
        for it in places(inventory, wanted)
    ]
    wrong = [it for scope_id in wanted or inventory.scope_ids() for it in remarks(scope_id, inventory)]
    missing = [it for it in wanted if not inventory.told_of(it)]
    wrong += [f"no host that answers has {it}" for it in missing]
    if as_json:
        echo_json({"scopes": rows, "hosts": _hosts(inventory), "wrong": wrong})
    else:
        if rows:
            print_rows([{**it, "status": 0} for it in rows], as_json=False)
        elif not wanted:
            typer.echo("No host that answers has a network.")
        notes = [*wrong, *_host_notes(inventory)]
        if notes:
            typer.echo("\n" * bool(rows) + "\n".join(map(one_line, notes)))
    if inventory.failures or wrong:
        raise typer.Exit(3 if wrong else 2)


@remote_only
def _evacuate(
    remote: Remote,
    host: Annotated[str, typer.Argument(metavar="HOST", help="The dead host, written as in --hosts.")],
    fenced: Annotated[
        bool, typer.Option("--fenced", help="The host is powered off, for sure: end its groups, and ask nobody.")
    ] = False,
    state: Annotated[
        str, typer.Option("--state", metavar="FILE", help="Use the states in this archive of netloom export.")
    ] = "",
    archive_password_file: ArchivePassword = "",
    owner: Annotated[
        str,
        typer.Option("--owner", metavar="NAME", help="The owner of the networks, if hosts have those of several."),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    from netloom.extension.moves import evacuate  # asyncssh: twenty bare start-ups
    from netloom.extension.moves.archive import read_archive

    hosts = remote.names()
    _check_host(host, hosts)
    others = [it for it in hosts if it != host]
    if not others:
        raise BadRequest(f"--hosts names no other host than {host}")
    archived = read_archive(state, _archive_password(archive_password_file)) if state else []
    login = remote.login()

    async def work(mover: Mover) -> tuple[evacuate.Evacuation, Inventory, list[Moved], dict[str, NetloomError]]:
        await evacuate.refuse_if_it_answers(host, login)
        inventory = await _inventory(mover)
        plan = evacuate.plan_evacuation(host, inventory, archived, owner)
        if dry_run:
            return plan, inventory, [], {}
        display = MovesDisplay(len(plan.copies) + len(plan.partners))
        mover.on_step = display.step
        moved = await evacuate.place_copies(mover, plan, inventory, fenced=fenced, done=_shown(display))
        display.end()
        errors: dict[str, NetloomError] = {}
        if not any(it.error for it in moved):
            errors = await evacuate.set_evacuated(mover, plan, list(inventory.views))
        return plan, inventory, moved, errors

    plan, inventory, moved, errors = _run(remote, others, work, login=login)
    if dry_run:
        rows = [
            {"scope": it.scope_id, "to": plan.targets[it.scope_id], "from": it.host or "the archive", "status": 0}
            for it in plan.copies
        ]
        rows += [
            {"scope": it.scope_id, "to": it.host, "from": it.host, "status": 0}
            for it in plan.partners
            if fenced or not it.served
        ]
        _print_rows_or(rows, as_json, "No host that answers has a copy of a network of this host.")
        return
    recorded = [] if any(it.error for it in moved) else [it for it in inventory.views if it not in errors]
    if as_json:
        echo_json(
            {
                "host": host,
                "moved": [_row(it) for it in moved],
                "may_take_the_others": recorded,
                "without_a_copy": list(plan.unknown),
                "errors": [str(it) for it in [*inventory.failures.values(), *errors.values()]],
            }
        )
    else:
        for line in _evacuated(host, plan.unknown, moved, recorded):
            typer.echo(one_line(line))
        kept = [] if fenced else [it.scope_id for it in plan.partners if it.served]
        if kept:
            typer.echo(one_line(f"Still in a group with {host}: {', '.join(kept)}. --fenced ends that."))
    _complain([*inventory.failures.values(), *errors.values()], as_json=as_json)
    failed = [it.error for it in moved if it.error]
    if failed:
        raise HostRefused(
            f"{host} was not evacuated: {len(failed)} of its networks were not placed",
            hint="power it off for sure, then add --fenced" if not fenced else "repeat the command",
        )


@remote_only
def _export(
    remote: Remote,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The archive. An older one is replaced.")],
    scopes: Annotated[
        list[str] | None, typer.Argument(metavar="[SCOPE]...", help="net-<id> or vpc-<id>. Default: all.")
    ] = None,
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Leave out the passwords and the user data of VMs.")
    ] = False,
    archive_password_file: ArchivePassword = "",
    as_json: Json = False,
) -> None:
    from netloom.extension.moves.archive import write_archive  # asyncssh: twenty bare start-ups
    from netloom.extension.moves.backup import read_states

    if without_secrets == bool(archive_password_file):
        raise BadRequest(
            "the states contain passwords and user data of VMs",
            hint="encrypt them by --archive-password-file FILE, or say --without-secrets",
        )
    wanted = _check_scopes(scopes or [])
    password = _archive_password(archive_password_file)

    async def work(mover: Mover) -> Any:
        return await read_states(mover, await _inventory(mover), wanted)

    found, errors = _run(remote, remote.names(), work)
    if errors:
        _complain(errors, as_json=True)
        raise HostRefused(f"{file} was not written", hint="an archive is complete: leave out what is not there")
    write_archive(file, found, password)
    if as_json:
        echo_json({"file": file, "scopes": [it.scope_id for it in found], "secrets": not without_secrets})
    else:
        how = "without passwords and user data" if without_secrets else "encrypted"
        typer.echo(one_line(f"{_count(len(found))} of {_listed(sorted({it.host for it in found}))} in {file}, {how}."))


@remote_only
def _import(
    remote: Remote,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The archive.")],
    scopes: Annotated[
        list[str] | None, typer.Argument(metavar="[SCOPE]...", help="net-<id> or vpc-<id>. Default: all in it.")
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="HOST", help="The host. Default: by load.")] = "",
    archive_password_file: ArchivePassword = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    from netloom.extension.moves.archive import read_archive  # asyncssh: twenty bare start-ups
    from netloom.extension.moves.backup import plan_import, put_back

    hosts = remote.names()
    if to:
        _check_host(to, hosts)
    wanted = _check_scopes(scopes or [])
    archived = read_archive(file, _archive_password(archive_password_file))
    if missing := set(wanted) - {it.scope_id for it in archived}:
        raise BadRequest(f"{file} has no {_listed(sorted(missing))}")
    chosen = [it for it in archived if not wanted or it.scope_id in wanted]

    async def work(mover: Mover) -> tuple[list[dict[str, object]], list[Moved]]:
        inventory = await _inventory(mover)
        plan = plan_import(chosen, inventory, to)
        if dry_run:
            return [{"scope": it.scope_id, "to": host, "status": 0} for it, host in plan], []
        display = MovesDisplay(len(plan))
        mover.on_step = display.step
        moved = []
        for it, host in plan:
            if mover.stopping.is_set():
                break
            moved.append(await put_back(mover, it, host, inventory, peer=it.host, fenced=False))
            _shown(display)(moved[-1])
        display.end()
        return [], moved

    rows, moved = _run(remote, hosts, work)
    if dry_run:
        _print_rows_or(rows, as_json, f"{file} has no network.")
    else:
        _print_moves(moved, as_json, f"{file} has no network.")


# ------------------------------------------------------------------------------------------------------ running


def _check_scopes(scopes: Sequence[str]) -> list[str]:
    """The scopes, without duplicates. Raises BadRequest."""
    from netloom.extension.moves.inventory import is_scope_id  # asyncssh: twenty bare start-ups

    for scope in scopes:
        if not is_scope_id(scope):
            raise BadRequest(f"{scope!r} is not a scope", hint="net-<id> of a network, or vpc-<id>")
    return list(dict.fromkeys(scopes))


def _check_host(host: str, hosts: Sequence[str]) -> None:
    if host not in hosts:
        raise BadRequest(f"{host} is none of the hosts {', '.join(hosts)}", hint="--hosts names all of them")


def _archive_password(file: str) -> Secret | None:
    if not file:
        return None
    return Secret((read_file(file).splitlines() or [""])[0])


async def _inventory(mover: Mover) -> Inventory:
    from netloom.extension.moves.inventory import take_inventory  # asyncssh: twenty bare start-ups

    return await take_inventory(mover.agents)


def _run(
    remote: Remote,
    hosts: Sequence[str],
    work: Callable[[Mover], Awaitable[T]],
    display: MovesDisplay | None = None,
    login: Any = None,
) -> T:
    """Run ``work`` with channels to the hosts.

    Ctrl-C lets the moves under way come to a safe end; a second one ends the program at once.
    """
    from netloom.extension.moves.agents import agents_over_ssh  # asyncssh: twenty bare start-ups
    from netloom.extension.moves.move import Mover
    from netloom.extension.proof import Credentials

    login = login or remote.login()

    async def main() -> T:
        mover = Mover(agents_over_ssh(hosts, login), Credentials(login))
        if display is not None:
            mover.on_step = display.step
        loop = asyncio.get_running_loop()

        def stop() -> None:
            mover.stopping.set()
            sys.stderr.write("netloom: stopping when the moves under way are safe; once more: at once\n")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop)
        try:
            return await work(mover)
        finally:
            mover.agents.close()

    return asyncio.run(main())


async def _carry_out(
    mover: Mover,
    plan: Sequence[Planned],
    inventory: Inventory,
    run_plan: Callable[..., Awaitable[list[Moved]]],
    first: str,
) -> list[Moved]:
    """Say what will be done, then do it and show the progress, all on stderr."""
    by_target: dict[str, int] = {}
    for it in plan:
        by_target[it.target] = by_target.get(it.target, 0) + 1
    shares = ", ".join(f"{count} to {host}" for host, count in by_target.items())
    sys.stderr.write(one_line(f"{first}Moving {_count(len(plan))}: {shares}.") + "\n")
    display = MovesDisplay(len(plan))
    mover.on_step = display.step
    moved = await run_plan(mover, plan, inventory, _shown(display))
    display.end()
    return moved


def _shown(display: MovesDisplay) -> Callable[[Moved], None]:
    def done(moved: Moved) -> None:
        display.done(moved.scope_id, str(moved.error) if moved.error else _told(moved), moved.error is not None)

    return done


# ------------------------------------------------------------------------------------------------------ output


def _gate(held: HeldScope) -> str:
    if held.gate == "standby":
        return f"stands by for {held.peer}" if held.peer else "no lease"
    return f"moved to {held.peer}" if held.gate == "moved" else held.gate


def _row(moved: Moved) -> dict[str, object]:
    return {
        "scope": moved.scope_id,
        "from": moved.source,
        "to": moved.target,
        "epoch": moved.epoch or None,
        "gap_ms": None if moved.gap_ms is None else round(moved.gap_ms, 1),
        "seconds": round(moved.took_s, 1),
        "connections": moved.flows if moved.gap_ms is not None else None,
        "not_copied": moved.lost or None,
        "note": moved.note,
        "status": moved.error.exit_code if moved.error else 0,
        "error": str(moved.error) if moved.error else "",
    }


def _told(moved: Moved) -> str:
    """The result of a successful move in one line."""
    note = f" {moved.note}." if moved.note else ""
    if moved.gap_ms is None:
        return one_line(f"{moved.scope_id} is on {moved.target}, epoch {moved.epoch}.{note}")
    lost = f", {moved.lost} were not" if moved.lost else ""
    return one_line(
        f"{moved.scope_id} went from {moved.source} to {moved.target}, epoch {moved.epoch}: switched over within "
        f"{moved.gap_ms:.0f} ms, {moved.flows} connections copied{lost}.{note}"
    )


def _print_moves(moved: Sequence[Moved], as_json: bool, nothing: str) -> None:
    _print_rows_or([_row(it) for it in moved], as_json, nothing)


def _print_rows_or(rows: list[dict[str, object]], as_json: bool, nothing: str) -> None:
    if as_json and not rows:
        echo_json([])
    elif rows:
        print_rows(rows, as_json)
    else:
        typer.echo(one_line(nothing))


def _print_plan(plan: Sequence[Planned], inventory: Inventory, as_json: bool) -> None:
    from netloom.extension.moves.balance import after  # asyncssh: twenty bare start-ups

    before = inventory.loads() | {it.source: _load_of(it.source, inventory) for it in plan}
    then = after(before, plan)
    moves = [{"scope": it.scope_id, "from": it.source, "to": it.target, "load": it.load} for it in plan]
    loads = [{"host": host, "load": load, "then": then[host]} for host, load in before.items()]
    if as_json:
        echo_json({"moves": moves, "loads": loads})
        return
    if moves:
        print_rows([{**it, "status": 0} for it in moves], as_json=False)
        typer.echo("")
    else:
        typer.echo("Nothing to move.\n")
    typer.echo(table.render(["HOST", "LOAD", "THEN"], [[one_line(str(it)) for it in row.values()] for row in loads]))


def _load_of(host: str, inventory: Inventory) -> int:
    from netloom.extension.moves.inventory import load  # asyncssh: twenty bare start-ups

    view = inventory.views.get(host)
    return sum(load(it) for it in view.scopes.values() if it.gate not in ("moved", "standby")) if view else 0


def _hosts(inventory: Inventory) -> list[dict[str, object]]:
    answered: list[dict[str, object]] = [
        {"host": host, "drained": view.drained, "evacuated": list(view.evacuated), "error": ""}
        for host, view in inventory.views.items()
    ]
    silent: list[dict[str, object]] = [
        {"host": host, "error": str(error)} for host, error in inventory.failures.items()
    ]
    return [*answered, *silent]


def _host_notes(inventory: Inventory) -> list[str]:
    notes = [f"{host} is drained." for host, view in inventory.views.items() if view.drained]
    dead: dict[str, list[str]] = {}
    for host, view in inventory.views.items():
        for it in view.evacuated:
            dead.setdefault(it, []).append(host)
    notes += [
        f"{it} was evacuated: {_listed(takers)} may take its networks. When it is back: netloom undrain {it}"
        for it, takers in dead.items()
    ]
    return [*notes, *map(str, inventory.failures.values())]


def _evacuated(host: str, unknown: Sequence[str], moved: Sequence[Moved], recorded: Sequence[str]) -> list[str]:
    """The result of an evacuation, a line per group."""
    placed: dict[str, list[str]] = {}
    for it in moved:
        if it.error is None:
            placed.setdefault(it.target, []).append(it.scope_id)
    lines = [f"With their state, on {target}: {', '.join(scopes)}." for target, scopes in placed.items()]
    lines += [f"Not placed: {it.scope_id}: {it.error}" for it in moved if it.error]
    if recorded:
        named = f" ({', '.join(unknown)}, and those that no host knows of)" if unknown else ""
        lines += [
            f"All other networks of {host}{named}: CloudStack's next command for one of them builds it on "
            f"{_listed(recorded, 'or')}, from what the command says. This holds for 7 days.",
            "Only a restart of such a network in CloudStack brings the rest: public addresses, static NAT, port "
            "forwards, rules, and DHCP and metadata of VMs that are not started anew.",
        ]
    return lines


def _complain(errors: Any, *, as_json: bool = False) -> None:
    """Write errors to stderr. Raises typer.Exit with the highest status, unless ``as_json``: the caller has one."""
    found = list(errors.values() if isinstance(errors, Mapping) else errors)
    for error in found:
        sys.stderr.write(f"netloom: {error}\n")
    if found and not as_json:
        raise typer.Exit(max(it.exit_code for it in found))


def _count(number: int) -> str:
    return "1 network" if number == 1 else f"{number} networks"


def _listed(texts: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}" if texts else "no host"
