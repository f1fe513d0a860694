"""Whole-repository work: verify, usage, reindex. Never imports checkpoint/, nor the reverse.

Nothing here needs numpy or torch until a chunk is decoded that does:
usage never does, verify only with `data`.
"""
