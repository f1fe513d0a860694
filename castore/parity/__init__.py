"""Parity: restore lost stretches of a pack (format/parity.py draws the file).

code.py      the Reed-Solomon code: a library, behind two functions
build.py     a pack → its parity file
restore.py   a damaged pack and its parity file → what the pack was
"""
