"""Write manifests without unusable rows: `tatar-dist data validate --clean`.

`clean` takes a `Validation`, writes new manifests and counts the dropped rows by reason. A row is dropped if it cannot
be used, if it leaks (on the side not held out), or if its image came before in its pool. Image files are not moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tatar_dist.data.checks import duplicates
from tatar_dist.data.checks.validation import Validation, batches, open_source
from tatar_dist.data.schema import SCHEMA
from tatar_dist.data.writing import ManifestWriter
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, writing

WHY = {"unusable": duplicates.UNUSABLE, "leaked": duplicates.LEAKED, "duplicate": duplicates.DUPLICATE}


def clean_paths(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return the target of each manifest: `out` itself for one, a file of the same name in directory `out` for several.

    Raises UserError for an unsuitable target, one that cannot be written, or one that would overwrite a manifest being
    read.
    """
    with writing(out):
        is_directory = out.is_dir()
    if len(paths) == 1 and not is_directory:
        found = [out]
    elif out.suffix == ".parquet":
        raise UserError(f"--clean {out}: several manifests are given, name a directory for their clean copies")
    else:
        found = [out / p.name for p in paths]
    for path, target in zip(paths, found, strict=True):
        if target.resolve() in [p.resolve() for p in paths]:
            raise UserError(f"--clean {target}: would overwrite {path}, which it is made from; name another place")
    if len(set(found)) < len(found):
        raise UserError(f"--clean {out}: two manifests have the same file name; clean them one at a time")
    for target in found:
        probe(target)
    return found


def clean(found: Validation, out: Path) -> dict[str, dict[str, int]]:
    """Write the clean manifests. Returns row counts by file: kept, unusable, leaked, duplicate.

    Raises UserError if a manifest has no row left, before any is written, or if one cannot be written.
    """
    counts = {}
    targets = clean_paths([m.path for m in found.manifests], out)
    for manifest, target in zip(found.manifests, targets, strict=True):
        if not (found.fate_of(manifest) == duplicates.KEEP).any():
            raise UserError(f"{manifest.path}: no row is left to write to {target}")
    for manifest, target in zip(found.manifests, targets, strict=True):
        fate = found.fate_of(manifest)
        keep = fate == duplicates.KEEP
        file, _ = open_source(manifest.path)
        start = 0
        with file, writing(target), ManifestWriter(target, image_root=manifest.root) as writer:
            for table in batches(file, SCHEMA.names):
                writer.write(table.filter(pa.array(keep[start : start + len(table)])))
                start += len(table)
        counts[str(target)] = {"kept": int(keep.sum())} | {k: int(np.sum(fate == v)) for k, v in WHY.items()}
    return counts
