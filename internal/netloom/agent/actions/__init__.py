"""Custom actions: the built-in ones, and the operator's hooks."""
