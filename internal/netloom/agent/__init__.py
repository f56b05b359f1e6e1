"""The host: the only privileged stage, the only writer of state, the only one that changes the kernel."""
