"""Bytes ↔ bytes, reversible and numbered; the chooser that picks one for each chunk."""
