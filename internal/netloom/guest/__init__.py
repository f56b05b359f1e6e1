"""The guest process: DHCP, metadata and passwords for VMs, in one process without privileges."""
