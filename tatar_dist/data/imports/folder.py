"""List the images directory and resolve the image names of annotations to its files.

Results are paths relative to the directory, or the reason why there is none. The tree is listed once with `os.scandir`.
A broken link is not an image, nor is a pipe, which would block its reader. Names are compared exactly, case included,
even where the file system ignores case: a data set moves between machines. A bare name that lies in one sub-directory
only is found there (PIPAL's labels name files that way).
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from tatar_dist.assets import looked_in
from tatar_dist.data.imports.annotations import Bad
from tatar_dist.errors import UserError

# Control, format (may reverse the text direction), surrogates, line and paragraph separators. Blanks of any width and
# characters newer than this Python's Unicode tables are allowed.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def path_fault(name: str) -> str | None:
    """Return why a name cannot be a path inside a directory, or None. Names use `/`."""
    if "\\" in name:
        return "has a backslash; paths use /"
    if name.startswith("/") or name[1:2] == ":":
        return "is an absolute path; it must be relative to --images"
    if not name.isprintable() and any(unicodedata.category(c) in _UNSEEN for c in name):
        return "has a character that does not print"
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "has an empty part, '.' or '..' in its path; it must lead into --images"
    return None


def _kind(entry: os.DirEntry[str]) -> str:
    """Classify a directory entry. Links are followed, for a stat call each; others cost none."""
    try:
        if entry.is_dir():
            return "directory"
        if entry.is_file():
            return "file"
        return "pipe, socket or device" if os.path.exists(entry.path) else "broken link"
    except OSError:  # circular links, or links into a directory without access
        return "broken link"


class ImageFolder:
    """Files under `root`, listed once. Raises UserError if it is no directory or not readable."""

    def __init__(self, root: Path):
        self.root = root
        self.files: set[str] = set()
        self.unusable: dict[str, Bad] = {}  # entries that are neither file nor directory
        if not os.path.isdir(root):  # unlike Path.is_dir, no error for a name that is too long
            raise UserError(f"--images {root}: no such directory{looked_in(root)}")
        visited: set[str] = set()
        pending = [("", str(root))]
        while pending:
            prefix, directory = pending.pop()
            real = os.path.realpath(directory)
            if real in visited:  # a link to a parent would loop for ever
                continue
            visited.add(real)
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        path, kind = prefix + entry.name, _kind(entry)
                        if kind == "directory":
                            pending.append((f"{path}/", entry.path))
                        elif kind == "file":
                            self.files.add(path)
                        else:
                            self.unusable[path] = Bad(kind, f"image {path!r} is a {kind}")
            except OSError as e:
                raise UserError(f"--images {directory}: cannot list it: {e.strerror or e}") from None

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Group all paths by file name, without extension and case."""
        paths: dict[str, list[str]] = defaultdict(list)
        for path in sorted((*self.files, *self.unusable)):
            paths[posixpath.splitext(posixpath.basename(path))[0].casefold()].append(path)
        return paths

    def find(self, name: str) -> str | Bad:
        """Return the path of `name`, or why there is none, with a near match if one exists."""
        if name in self.files or name in self.unusable:
            return self.unusable.get(name, name)
        base = posixpath.basename(name)
        near = self._by_stem.get(posixpath.splitext(base)[0].casefold(), [])
        same = [path for path in near if posixpath.basename(path) == name]
        if len(same) == 1:
            return self.unusable.get(same[0], same[0])
        if same:
            text = f"image {name!r} lies in several directories ({', '.join(same[:2])}); name its path"
            return Bad("missing image", text)
        there = f"; there is {near[0]!r}" if near else ""
        return Bad("missing image", f"image {name!r} is not in {self.root}{there}")
