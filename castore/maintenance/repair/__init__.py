"""Repair: plan (plan.py) → carry out (execute.py); records are saved out of damaged packs (salvage.py), lost content is
looked for elsewhere (sources.py).
"""
