"""An operator on the management server, who moves networks between the hosts of the bed."""

from __future__ import annotations

import json
from typing import Any

from bed.lab import Bed, Host, agent_command, program_from_source
from bed.machines import Done


class Operator:
    """Runs netloom as root on the management server, with the key of the registration."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        bed.management.write("/root/key", bed.private_key, mode=0o600)

    def run(self, *words: str, check: bool = True, hosts: list[Host] | None = None) -> Done:
        hosts_option = ",".join(it.address for it in hosts or self.bed.hosts)
        login = ["--hosts", hosts_option, "--sshkey", "/root/key"]
        return self.bed.management.run(
            *program_from_source(), *words, *login, check=check, HOME="/root", NETLOOM_AGENT=agent_command()
        )

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json").out)

    def where(self, scope_id: str) -> list[str]:
        """The addresses of the hosts that serve the scope."""
        return [it["host"] for it in self.json("where")["scopes"] if it["scope"] == scope_id]
