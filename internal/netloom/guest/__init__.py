"""What tenants may talk to: DHCP, metadata, passwords; one process without any privilege."""
