"""Check (`tatar-dist data validate`) or show (`data show`) the rows and images of a manifest:

validate.py      streams the manifests, decodes images on threads
validation.py    the records that it fills; how a manifest is read in pieces
rows.py          rules of single rows; statistics of pools
duplicates.py    identical images, leaks between splits, fates of rows
compare.py       the same rows over several manifests; conflicting scores
problem_log.py   problems as JSON lines, in a file that grows
clean.py         writes manifests without what cannot be used
report.py        table, Markdown, figure, JSON
sheet.py         contact sheet of `data show`
"""
