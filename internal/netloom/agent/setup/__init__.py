"""The agent's own installation on a host: install, activate, uninstall, and the selftest."""
