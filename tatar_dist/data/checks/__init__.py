"""Check (`tatar-dist data validate`) or show (`data show`) rows and images of a manifest:

validate.py      streams the manifests, decodes images on threads
validation.py    the records and problems that it fills, rules of rows, statistics of pools, reading in pieces
compare.py       identical images, conflicting scores, leaks between splits over several manifests; clean manifests
near.py          near-duplicates across splits
report.py        table, Markdown (validate.md.j2), figure, JSON
sheet.py         contact sheets of `data show` and of near-duplicates
"""
