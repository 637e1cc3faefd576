"""`tatar-dist bench table FILE…`: the JSON objects of benches as one Markdown table, the one of bench/README.md.

In: files that `tatar-dist bench NAME --json` wrote. Out: a row each: name, baseline, ratio, target, met, limit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError

COLUMNS = ("bench", "baseline", "ratio, median (min–max)", "target", "met", "limit")
FIELDS = {"name", "baseline", "ratio", "target", "met", "limit"}


def read(file: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError: it is no result of a bench."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file{looked_in(file)}") from None
    except ValueError:
        raise UserError(f"{file}: no JSON; was the bench cut short?") from None
    if not isinstance(found, dict) or not found.keys() >= FIELDS:
        raise UserError(f"{file}: not what a bench with a baseline prints with --json")
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    """One row a result, in the order given."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for r in results:
        spread = "{median:.2f} ({min:.2f}–{max:.2f})".format(**r["ratio"])
        rows.append((r["name"], r["baseline"], spread, f"{r['target']:g}", "yes" if r["met"] else "no", r["limit"]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
