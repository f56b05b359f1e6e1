"""State to artefacts: rulesets, links, routes, configuration files. Text and values; nothing runs."""
