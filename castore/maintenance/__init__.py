"""Whole-repository work: verify, usage, reindex. Never imports checkpoint/, nor the reverse; needs neither numpy nor torch."""
