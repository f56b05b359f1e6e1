"""The environment that the agent's child processes get instead of the agent's own."""

from __future__ import annotations

# systemd's default (systemd.exec(5)) with /sbin and /bin. The agent's own PATH may lack the sbin directories.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
