"""Find near-duplicates across splits: pictures encoded or scaled again, and shifted or tighter crops.

Each picture is a thumbnail (images.THUMB). The middle WINDOW of one is sought in the other at shifts of STEP and three
scales. A window is hashed to its low DCT coefficients weighted by their frequency, since amplitudes of photographs fall
with it (Field 1987, doi 10.1364/JOSAA.4.002379), then scaled to length 1: the product of two hashes is a correlation
that neither brightness nor contrast changes. Hashes of nine shifts rule out nearly all pairs, the others decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.fft import dct

from tatar_dist.data.checks.validation import ValidationRows
from tatar_dist.data.images import THUMB

WINDOW, STEP, SCALES = 0.8, 0.03, (1.0, 0.9, 1 / 0.9)  # shares of a picture's sides; of the window
STEPS = 3  # at most, in each direction
TERMS, SAMPLES = 10, 24  # DCT coefficients and samples of a window in each direction
PLAIN = 50.0  # least length of a hash before scaling: a spread of about 2 of 255 grey levels
CANDIDATE, NEAR = 0.55, 0.85  # least correlation at one of nine shifts; at any shift and scale (README.md)
BLOCK = 64  # pictures


@dataclass
class NearDuplicates:
    """Pairs across splits, by the row that is not held out.

    match: (rows,) int64, the held-out row most like each, or -1. likeness: (rows,) float64, their correlation.
    pairs: all of them. compared: pictures, without plain ones.
    """

    match: np.ndarray
    likeness: np.ndarray
    pairs: int = 0
    compared: int = 0

    def most_alike(self) -> list[tuple[int, int, float]]:
        """Return (row, held-out row, correlation) of each row that has a match, the most alike first."""
        order = np.argsort(-self.likeness, kind="stable")[: int((self.match >= 0).sum())]
        return [(int(row), int(self.match[row]), float(self.likeness[row])) for row in order]


def near_duplicates(rows: ValidationRows, split: np.ndarray, tick: Callable[[], None]) -> NearDuplicates:
    """Compare the pictures of each split with those of the splits before it; `tick` is called now and then.

    split: (rows,) int64, places in SPLITS, or -1. Pairs of equal bytes or of one reference are left out.
    """
    found = NearDuplicates(np.full(len(split), -1), np.zeros(len(split)))
    if len(np.unique(split)) < 2:
        return found
    able = ~rows.unusable & (split >= 0)
    blocks = [rows.thumbnail[start : start + BLOCK] for start in range(0, len(split), BLOCK)]
    middles = np.concatenate([hashes(block, (1.0,), 0)[:, 0] for block in blocks])
    able &= middles.any(axis=1)
    found.compared = int(able.sum())
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
                known = (rows.picture[other] == rows.picture[row]).all(axis=1)
                known |= (rows.reference[other] == rows.reference[row]) & (rows.reference[row] != 0)
                other, likeness = (values[(likeness > NEAR) & ~known] for values in (other, likeness))
                found.pairs += len(other)
                better = likeness > found.likeness[other]
                found.match[other[better]], found.likeness[other[better]] = row, likeness[better]
    return found


def hashes(thumbnails: np.ndarray, scales: tuple[float, ...], steps: int) -> np.ndarray:
    """Return hashes (B, windows, terms) float32 of `thumbnails` (B, THUMB^2); zeros for plain windows.

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
