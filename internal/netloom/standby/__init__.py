"""Who serves the scopes of two hosts: leases, votes and terms, without input, output or clocks."""
