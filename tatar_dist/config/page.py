"""Write the table of every config key in configs/README.md.

    python -m tatar_dist.config.page      rewrite the tables below the marker lines

Keys, defaults and choices come from the schema, meanings from the comment at the end of each field's line; the names of
TRL and verl from foreign.py.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tatar_dist.config import foreign
from tatar_dist.config.schema import Config

PAGE = Path(__file__).parents[2] / "configs/README.md"
NAMES, END = "<!-- names: python -m tatar_dist.config.page -->\n", "<!-- end of the names -->\n"
MARKER = "<!-- keys: python -m tatar_dist.config.page -->\n"
FIELD = re.compile(r"^    (\w+): .+?  # (.+)$", re.MULTILINE)


def keys_table(title: str = "", section: Any = None) -> str:
    """Return the schema's or a section's keys as Markdown, a table per section, in its order."""
    section = section or Config()
    comments, hints = dict(FIELD.findall(inspect.getsource(type(section)))), get_type_hints(type(section))
    rows, subsections = [], []
    for f in fields(section):
        default, key = getattr(section, f.name), f"{title}.{f.name}".lstrip(".")
        if is_dataclass(default):
            subsections.append(keys_table(key, default))
            continue
        choices = get_args(hints[f.name]) if get_origin(hints[f.name]) is Literal else ()
        meaning = "; ".join(filter(None, (" | ".join(choices), comments.get(f.name)))).replace("|", "\\|")
        value = default if isinstance(default, str) and default else json.dumps(default)
        rows.append(f"| `{key}` | {'required' if value == '???' else f'`{value}`'} | {meaning} |")
    head = ["| key | default | meaning |", "|---|---|---|"] if rows else []
    return "\n".join([f"### `{title}`" if title else "### Top level", "", *head, *rows, "", *subsections])


def main() -> None:
    """Rewrite both generated parts of configs/README.md."""
    head, _ = PAGE.read_text(encoding="utf-8").split(MARKER)
    before, _, rest = head.partition(NAMES)
    head = f"{before}{NAMES}\n{foreign.table()}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(f"{head}{MARKER}\n{keys_table()}", encoding="utf-8")


if __name__ == "__main__":
    main()
