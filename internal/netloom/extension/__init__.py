"""A call of CloudStack on the management server: check its payload, choose its host, send it there over SSH."""
