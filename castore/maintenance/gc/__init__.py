"""Garbage collection: the protocol is in collect.py."""
