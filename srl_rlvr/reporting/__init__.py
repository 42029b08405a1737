"""What a person sees of a run: live progress, the closing table, `result.json` and `report.html`.

It is handed tables and numbers; it must not know Ray, torch or how anything was trained.
"""
