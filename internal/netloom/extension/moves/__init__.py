"""Operators' commands that move scopes between hosts: move, drain, rebalance, evacuate, export and import."""
