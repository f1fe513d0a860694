"""Push and pull: snapshots moved between repositories, sending only what is missing.

request.py    what is asked for: refs, where they go, how much history
plan.py       pure: which snapshots go, which refs move, how many bytes
moved.py      which snapshot at the target stands for one of the source, when their hashes differ
needs.py      the chunks of a snapshot, with what each holds
rehash.py     a manifest under another hash
sender.py     chunks: read, verified, written into packs of the target
execute.py    all of it, under a writer lease of the target
"""
