"""The processes that serve guests: dnsmasq and haproxy per scope, one guest process per host."""
