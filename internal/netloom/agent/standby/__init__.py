"""Hosts that stand by for each other."""
