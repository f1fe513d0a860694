"""Repair: plan (plan.py, files.py) → carry out (execute.py); records are saved out of damaged packs (salvage.py), lost
content is looked for elsewhere (sources.py).
"""
