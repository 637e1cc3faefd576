"""Time the scoring of a global batch: `tatar-dist bench reward`.

The ratio is 10 s over the seconds of scoring 100,000 completions (groups of 8, half IAA, four data sets; preset tatar
with its logistic link). The limit of ranking is arithmetic: each pair needs its transcendental functions (logistic: one
exp, one log; probit: one ndtr, one log1p, one log), timed in the same process on a block that stays in cache. Bytes are
no limit: a block of pairs is 3 MiB whatever the batch, and a group reads 32 bytes of each opponent. `presets` has the
seconds of the same batch with each preset, and of `reward/share` and `reward/share_parsed`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.algo.advantages import shares
from tatar_dist.bench.harness import ratio, result, seconds_of, timed
from tatar_dist.prompts.answer import answer_text
from tatar_dist.rewards.batch import Batch, batch_of_rows, read_answers
from tatar_dist.rewards.presets import load_preset, preset_names
from tatar_dist.rewards.score import score_batch
from tatar_dist.rewards.thurstone import BLOCK

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
GROUP = 8
WORDS = {"iqa": 40, "iaa": 130}
LINKS = ("logistic", "probit")
BUDGET_S, TARGET, ROUNDS = 10.0, 1.0, 3


def rows(n: int) -> Iterator[dict[str, Any]]:
    """Yield n completions in groups of 8, four data sets in turn; 3 % do not parse."""
    rng = np.random.default_rng(0)
    text = {task: " ".join(["word"] * words) for task, words in WORDS.items()}
    for i in range(n // GROUP):
        task = ("iqa", "iaa")[i % 2]
        target = float(rng.uniform(5, 95))
        for _ in range(GROUP):
            score = float(np.clip(target + rng.normal(0, 12), 0, 100))
            completion = answer_text(text[task], score) if rng.random() > 0.03 else text[task]
            dataset = f"{task}-{i // 2 % 2}"
            yield {"group_id": i, "task": task, "dataset": dataset, "target": target, "completion": completion}


def pairs_of(batch: Batch) -> int:
    """Count the completion x group pairs that a Thurstone ranking of the IAA rows compares."""
    sets = (batch.iaa & (batch.dataset == dataset) for dataset in np.unique(batch.dataset[batch.iaa]))
    return sum(int(compared.sum()) * len(np.unique(batch.group[compared])) for compared in sets)


def repeated(work: Callable[[], Any]) -> list[float]:
    """Return the seconds of ROUNDS calls, or of more until 0.2 s have passed."""
    seconds: list[float] = []
    while len(seconds) < ROUNDS or sum(seconds) < 0.2:
        seconds.append(seconds_of(work))
    return seconds


def seconds_per_pair() -> dict[str, float]:
    """Time the transcendental functions of one pair, by link, on a block in cache."""
    from scipy.special import ndtr

    z = np.linspace(-13.0, 0.0, BLOCK)
    out, positive = np.empty_like(z), np.exp(z)
    exp, phi, log1p, log = (
        min(repeated(lambda function=function, x=x: function(x, out=out))) / BLOCK  # type: ignore[misc]
        for function, x in ((np.exp, z), (ndtr, z), (np.log1p, positive), (np.log, positive))
    )
    return {"logistic": exp + log, "probit": phi + log1p + log}


def measure(n: int, limit: dict[str, float]) -> dict[str, Any]:
    """Time parsing and ranking of n completions with both links."""
    batch = batch_of_rows(rows(n))
    row: dict[str, Any] = {"completions": n, "pairs": pairs_of(batch)}
    row["parse_seconds"] = min(repeated(lambda: read_answers(batch.completions)))
    for link in LINKS:
        preset = load_preset("tatar", None, {"thurstone_link": link})
        seconds = repeated(lambda preset=preset: score_batch(batch, preset))  # type: ignore[misc]
        rank = min(seconds) - row["parse_seconds"]
        row[link] = {"seconds": seconds, "rank_seconds": rank, "limit_seconds": row["pairs"] * limit[link]}
    return row


def by_preset(batch: Batch) -> dict[str, dict[str, float]]:
    """Time scoring, and the shares of its terms, with every preset that ships."""
    found = {}
    for name in preset_names():
        preset, start = load_preset(name), time.perf_counter()
        scored = score_batch(batch, preset)
        score = time.perf_counter() - start  # once: `released` compares every pair of completions
        places = [np.flatnonzero(batch.iaa == iaa) for iaa in (False, True)]
        places += [rows[scored.answers.parsed[rows]] for rows in places]
        share = min(repeated(lambda s=scored, p=places: [shares(s.parts, rows, batch.group) for rows in p]))  # type: ignore[misc]
        found[name] = {"seconds": score, "share_seconds": share, "share_of_scoring": share / score}
    return found


def command(file: Path, link: str) -> dict[str, float]:
    """Time `tatar-dist rewards`, start of Python included."""
    preset = file.with_name(f"{link}.yaml")
    shipped = Path(__file__).parents[1] / "rewards" / "presets" / "tatar.yaml"
    preset.write_text(shipped.read_text().replace("link: logistic", f"link: {link}"))
    words = ["-m", "tatar_dist", "rewards", str(file), "--preset", str(preset)]
    return timed([*words, "--output", str(file.with_suffix(".out"))])[0]


def run() -> dict[str, Any]:
    """Measure everything, on one core and one thread."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        limit = seconds_per_pair()
        sizes = [measure(n, limit) for n in SIZES]
        presets = by_preset(batch_of_rows(rows(SIZES[-1])))
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "batch.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows(SIZES[-1])))
            commands = {link: command(file, link) for link in LINKS}
    finally:
        os.sched_setaffinity(0, before)
    seconds = sizes[-1]["logistic"]["seconds"]
    least = sizes[-1]["parse_seconds"] + sizes[-1]["logistic"]["limit_seconds"]
    return result(
        "reward",
        f"{BUDGET_S:g} s for {SIZES[-1]:,} completions",
        ratio([BUDGET_S] * len(seconds), seconds),
        TARGET,
        f"{BUDGET_S / least:.1f}: parsing as it is, and one exp and one log a pair",
        sizes=sizes,
        presets=presets,
        command=commands,
    )
