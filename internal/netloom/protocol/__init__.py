"""CloudStack's words: a checked Struct per payload shape, the feature per file."""
