"""From the state to what must be on a host: ruleset, links, routes, configuration files. Pure functions and values."""
