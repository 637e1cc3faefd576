"""Find near-duplicates across splits: pictures encoded again, scaled, shifted or cropped.

Each picture is a thumbnail (images.THUMB). The middle WINDOW of one is sought in the other at shifts of STEP and three
scales. A window is hashed to its low DCT coefficients weighted by their frequency, since amplitudes of photographs fall
with it (Field 1987, doi 10.1364/JOSAA.4.002379), then scaled to length 1: the product of two hashes is a correlation
that neither brightness nor contrast changes. Hashes of nine shifts rule out nearly all pairs, the others decide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.fft import dct

from tatar_dist.data.checks.validation import ValidationRows
from tatar_dist.data.images import THUMB

WINDOW, STEP, SCALES = 0.8, 0.03, (1.0, 0.9, 1 / 0.9)  # shares of a picture's sides; of the window
STEPS, TERMS, SAMPLES = 3, 10, 24  # steps at most, DCT coefficients and samples of a window, in each direction
PLAIN = 50.0  # least length of a hash before scaling: a spread of about 2 of 255 grey levels
CANDIDATE, NEAR = 0.55, 0.85  # least correlation at one of nine shifts; at any shift and scale (README.md)
BLOCK = 64  # pictures
Alike = tuple[int, int, float]  # row, held-out row, correlation


def near_duplicates(rows: ValidationRows, split: np.ndarray, tick: Callable[[], None]) -> tuple[list[Alike], int, int]:
    """Return rows with their best match in a later split; number of pairs; pictures compared.

    The most alike come first. Pairs of equal bytes or of one reference are left out, plain pictures not compared.
    split: (rows,) int64, places in SPLITS, or -1. tick: called now and then.
    """
    if len(np.unique(split)) < 2:
        return [], 0, 0
    match, best, pairs = np.full(len(split), -1), np.zeros(len(split)), 0
    able = ~rows.unusable & (split >= 0)
    blocks = [rows.thumbnail[start : start + BLOCK] for start in range(0, len(split), BLOCK)]
    middles = np.concatenate([hashes(block, (1.0,), 0)[:, 0] for block in blocks])
    able &= middles.any(axis=1)
    for place in range(1, int(split.max(initial=0)) + 1):
        held, others = np.flatnonzero(able & (split == place)), np.flatnonzero(able & (split < place))
        middle = middles[others]
        for start in range(0, len(held) if len(others) else 0, BLOCK):
            tick()
            block = held[start : start + BLOCK]
            for row, windows in zip(block, hashes(rows.thumbnail[block], SCALES, STEPS), strict=True):
                nine = windows[: (2 * STEPS + 1) ** 2].reshape(2 * STEPS + 1, 2 * STEPS + 1, -1)[1::2, 1::2]
                likely = np.flatnonzero((nine.reshape(9, -1) @ middle.T).max(axis=0) > CANDIDATE)
                likeness = (middle[likely] @ windows.T).max(axis=1)
                other = others[likely]
                related = (rows.reference[other] == rows.reference[row]) & (rows.reference[row] != 0)
                new = (likeness > NEAR) & (rows.picture[other] != rows.picture[row]).any(axis=1) & ~related
                other, likeness = other[new], likeness[new]
                pairs += len(other)
                better = likeness > best[other]
                match[other[better]], best[other[better]] = row, likeness[better]
    order = np.argsort(-best, kind="stable")[: int((match >= 0).sum())]
    return [(int(row), int(match[row]), float(best[row])) for row in order], pairs, int(able.sum())


def hashes(thumbnails: np.ndarray, scales: tuple[float, ...], steps: int) -> np.ndarray:
    """Hash `thumbnails` (B, THUMB^2): (B, windows, terms) float32, zeros for plain windows.

    The windows of a scale are a square grid of at most `steps` shifts each way, as far as they lie in the picture.
    """
    terms, hashed = np.arange(TERMS), []
    frequency = np.add.outer(terms, terms).astype(np.float32)
    used = (frequency > 0) & (frequency <= TERMS)  # not the mean
    for scale in scales:
        most = min(steps, int((1 - WINDOW * scale) / 2 / STEP))
        centres = 0.5 + STEP * np.arange(-most, most + 1)
        at = centres[:, None] + WINDOW * scale * ((np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5)
        linear = np.maximum(0, 1 - np.abs((at * THUMB - 0.5)[..., None] - np.arange(THUMB)))
        basis = dct(linear, axis=1, norm="ortho")[:, :TERMS].astype(np.float32)
        grey = thumbnails.reshape(-1, 1, THUMB, THUMB).astype(np.float32)
        terms_of = (basis @ grey)[:, :, None] @ basis.transpose(0, 2, 1)
        hashed.append((terms_of[..., used] * frequency[used]).reshape(len(thumbnails), -1, int(used.sum())))
    windows = np.concatenate(hashed, axis=1)
    length = np.linalg.norm(windows, axis=2, keepdims=True)
    return np.where(length < PLAIN, 0, windows / np.maximum(length, PLAIN))
