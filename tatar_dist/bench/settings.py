"""Time our engine beside other settings of vLLM: `tatar-dist bench settings`.

Completion tokens a second of rollout.py's work by setting; the ratio is ours to the fastest other. Every setting is a
process with one engine that has loaded its model; they work in turns on all cores, every round with other images and
empty caches, as after a weight push. With chunked prefill vLLM's CPU sampler crashes on seeds (rollout/engine.py), so
that stays as it is. On GPUs nothing of this was run.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from tatar_dist.bench import rollout
from tatar_dist.bench.harness import ratio, result

OURS, ROUNDS, TARGET = "as it is", 4, 0.95
SETTINGS: dict[str, dict[str, Any]] = {  # arguments of vllm.LLM
    OURS: {},
    "compiled": {"enforce_eager": False},
    "no prefix caching": {"enable_prefix_caching": False},
    "no cache of processed images": {"mm_processor_cache_gb": 0},
    "scheduling not ahead": {"async_scheduling": False},
    "half of the sequences at a time": {"max_num_seqs": rollout.WORK.groups * rollout.WORK.size // 2},
}


def run() -> dict[str, Any]:
    """Measure everything."""
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        directory = Path(place)
        rollout.prepared(directory)  # before six processes look for it
        rollout.write_images(directory, ROUNDS + 1)
        sides = {name: rollout.Side(name, directory, "tatar_dist.bench.settings") for name in SETTINGS}
        for side in sides.values():
            stack.callback(side.close)
        for round_ in range(ROUNDS + 1):
            for name, side in sides.items():
                found = side.round(round_)
                if round_:
                    rates[name].append(found["tokens"] / found["seconds"])
    fastest = max((name for name in SETTINGS if name != OURS), key=lambda name: rates[name][0])  # the rest compares
    return result(
        "settings",
        f"the fastest other setting: {fastest}",
        ratio(rates[OURS][1:], rates[fastest][1:]),
        TARGET,
        "none counted: all compute the same",
        settings={name: {"vllm.LLM": str(SETTINGS[name] or ""), "tokens_per_second": rates[name]} for name in SETTINGS},
    )


def _main(name: str, directory: Path) -> None:
    import vllm

    made = vllm.LLM
    vllm.LLM = lambda *words, **options: made(*words, **options | SETTINGS[name])  # type: ignore[misc,assignment]
    rollout.answer(rollout.engine(directory))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
