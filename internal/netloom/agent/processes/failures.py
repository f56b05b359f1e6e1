"""The failure of a service: what its network lacks for that reason."""

from __future__ import annotations

import msgspec

from netloom.agent import exhausted
from netloom.errors import HostRefused, one_line
from netloom.state.served import Served

GUEST: frozenset[Served] = frozenset({"dhcp", "metadata"})


class ServiceFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A service that does not do what the state says.

    ``name``: that of the service, unique within the scope. ``serves``: what is missing, in the network ``network_id``;
    empty: in all networks of the scope. ``stale``: the process still answers from what it had before.
    """

    name: str
    message: str
    hint: str = ""
    serves: frozenset[Served]
    network_id: str = ""
    stale: bool = False

    @property
    def error(self) -> HostRefused:
        """The error of a call that asked for this service."""
        return HostRefused(self.message, hint=self.hint)

    def __str__(self) -> str:
        return one_line(f"{self.message} ({self.hint})" if self.hint else self.message)


class ServicesFailed(HostRefused):
    """Some services of a scope failed. ``did``: the steps that were done all the same, in words."""

    def __init__(self, failures: list[ServiceFailure], did: list[str]) -> None:
        super().__init__(failures[0].message, hint=failures[0].hint)
        self.failures = tuple(failures)
        self.did = did


def refusal(what: str, error: HostRefused | OSError) -> HostRefused:
    """An error of the operating system, for example a full /run, as the failure of one service."""
    if not isinstance(error, OSError):
        return error
    return HostRefused(f"{what}: {error.strerror or error}", hint=exhausted.remedy(error))
