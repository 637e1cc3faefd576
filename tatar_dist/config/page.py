"""The table of every config key in configs/README.md, generated from the schema and its trailing comments.

    python -m tatar_dist.config.page      rewrite the table below the marker line

Defaults come from an instance of `Config`, meanings from the comments on each field's lines in schema.py and
rationale.py. A field without a comment still gets a row.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tatar_dist.config import rationale, schema

PAGE = Path(__file__).parents[2] / "configs/README.md"
MARKER = "<!-- keys: python -m tatar_dist.config.page -->\n"


def comments(module: Any) -> dict[tuple[str, str], str]:
    """(class name, field name) -> the comments on the field's lines, for every annotated field of a module."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    at_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for cls in (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[cls.name, node.target.id] = " ".join(at_line[i] for i in lines if i in at_line)
    return found


def _yaml(value: Any) -> str:
    """A default as one writes it in a YAML file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value) if value not in ("", {}) else {"": '""'}.get(str(value), "{}")


def _section(title: str, instance: Any, meanings: dict[tuple[str, str], str]) -> list[str]:
    """One section's heading and table, then its subsections."""
    rows, below = [], list[str]()
    for f in fields(instance):
        value, key = getattr(instance, f.name), f"{title}.{f.name}".lstrip(".")
        if is_dataclass(value):
            below += _section(key, value, meanings)
            continue
        meaning = meanings.get((type(instance).__name__, f.name), "").replace("|", "\\|")
        default = "required" if value == "???" else f"`{_yaml(value)}`"
        rows.append(f"| `{key}` | {default} | {meaning} |")
    head = [f"### `{title}`" if title else "### Top level", "", "| key | default | meaning |", "|---|---|---|"]
    return [*(head if rows else head[:1]), *rows, "", *below]


def keys_table() -> str:
    """Every key of the schema as Markdown, a table per section, in the order of the schema."""
    return "\n".join(_section("", schema.Config(), comments(schema) | comments(rationale)))


def main() -> None:
    """Rewrite what follows the marker line of configs/README.md."""
    if not PAGE.exists():
        raise SystemExit(f"{PAGE}: not in a checkout")
    head, marker, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise SystemExit(f"{PAGE}: no line {MARKER.strip()}")
    PAGE.write_text(head + marker + "\n" + keys_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
