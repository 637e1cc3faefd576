"""The typed configuration. Its page, with every key, is configs/README.md.

schema.py      the keys, their types, defaults and meanings
rationale.py   the section `rationale`
validate.py    reads YAML files, validates with pydantic, and words every fault in one line
rules.py       what types cannot express: combinations of keys
load.py        merges YAML files and `key=value`; unknown keys fail with the nearest name
foreign.py     names of TRL and verl, and ours
page.py        writes the tables of configs/README.md
"""
