"""Look at every row and picture of a manifest: `tatar-dist data validate` and `data show`.

validate.py      streams the manifests, decodes pictures on threads
validation.py    the records that it fills; how a manifest is read in pieces
rows.py          rules of single rows
duplicates.py    identical pictures, leaks between splits, conflicting scores
compare.py       the same rows over several manifests
problem_log.py   problems as JSON lines, in a file that grows
clean.py         writes manifests without what cannot be used
report.py        table, Markdown, figure, JSON
sheet.py         contact sheet of `data show`
"""
