"""Time scoring and evaluation beside the bare engine: `tatar-dist bench evaluate`.

The bare engine is one `LLM.generate` of all prompts with their pictures decoded before. Beside it, on one engine in
turns: pictures a second of `Scorer.score` (files read, decoded, asked in batches, parsed); then those of an
evaluation's asking (journal, checks, an engine in a Ray actor); and the seconds of one picture from the shell to its
score beside the start of the engine alone. The model is the demo's base model, whose answers differ in length, so that
a batch that runs empty shows; pictures of 112 x 112. Targets: 0.9, and 1.5 times for the start.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tatar_dist.assets import TINY_MODEL
from tatar_dist.bench import subject
from tatar_dist.bench.harness import in_turns, ratio, result

PICTURES, PIXELS, TOKENS, ROUNDS, STARTS = 384, 112, 96, 3, 2
TARGET, START_TARGET = 0.9, 1.5
WORDS = [f"rollout.max_new_tokens={TOKENS}", "rollout.max_num_seqs=32"]
ENGINE_ALONE = """
import sys
from tatar_dist.scoring.scorer import Scorer
Scorer(sys.argv[1], sys.argv[2:])
"""


def _in_one_process(directory: str) -> dict[str, list[float]]:
    """Time the bare engine and a scorer, in turns, in this process."""
    from tatar_dist.data.images import decode_image
    from tatar_dist.rollout.engine import FORBIDDEN_BIAS
    from tatar_dist.scoring.scorer import Scorer

    files = [str(subject.file(i, Path(directory))) for i in range(PICTURES)]
    scorer = Scorer(TINY_MODEL, WORDS)
    from vllm import SamplingParams

    engine = scorer._engine
    bias = {i: FORBIDDEN_BIAS for i in engine.forbidden}
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, logit_bias=bias)
    text = scorer.texts.text["iqa"]
    inputs = [{"prompt": text, "multi_modal_data": {"image": decode_image(Path(f).read_bytes(), f)}} for f in files]

    def forget() -> None:
        """Keep a picture from being found in a cache of the round before."""
        engine._reset_caches()
        engine.llm.llm_engine.reset_mm_cache()

    def bare() -> None:
        forget()
        engine.llm.generate(inputs, params, use_tqdm=False)

    def ours() -> None:
        forget()
        list(scorer.score(files, "iqa"))

    return dict(zip(("bare", "score"), in_turns(bare, ours, rounds=ROUNDS), strict=True))


def _process(*command: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def _evaluate(directory: Path) -> float:
    """Return the seconds of an evaluation's asking, in a process of its own."""
    manifest = subject.manifest(directory / "m.parquet", PICTURES, "test", PIXELS)
    area, output = PIXELS**2, tempfile.mkdtemp(dir=directory)
    words = [f"output={output}", f"model.path={TINY_MODEL}", "model.dtype=float32", f"model.min_pixels={area}"]
    words += [f"model.max_pixels={area}", f"data.test=[{manifest}]", "cluster.gpus_per_node=0", "rollout.engines=1"]
    words += ["rollout.max_model_len=512", "data.iqa_fraction=1", *WORDS]
    _process("-m", "tatar_dist", "evaluate", "--config", str(subject.CONFIGS / "eval.yaml"), "--json", *words)
    answers = [json.loads(x)["line"] for x in Path(output, "answers.jsonl").read_text().splitlines()[1:]]
    tokens = sum(a["said"][0]["tokens"] for a in answers)
    return tokens / json.loads(Path(output, "metrics.json").read_text())["tokens_per_second"]


def run() -> dict[str, Any]:
    """Measure everything."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for i in range(PICTURES):
            subject.file(i, directory).write_bytes(subject.image(i, PIXELS))
        said = _process("-m", "tatar_dist.bench.evaluate", name)[1]
        seconds: dict[str, list[float]] = json.loads(said.splitlines()[-1])
        evaluations = [_evaluate(directory) for _ in range(ROUNDS)]
        one = str(subject.file(0, directory))
        told = [w for word in WORDS for w in ("--set", word)]
        starts: dict[str, list[float]] = {"engine": [], "score": []}
        for _ in range(STARTS):
            starts["engine"].append(_process("-c", ENGINE_ALONE, str(TINY_MODEL), *WORDS)[0])
            starts["score"].append(_process("-m", "tatar_dist", "score", one, "--model", str(TINY_MODEL), *told)[0])
    start = statistics.median(starts["score"]) / statistics.median(starts["engine"])
    scored, evaluated = ratio(seconds["bare"], seconds["score"]), ratio(seconds["bare"], evaluations)
    met = min(scored["median"], evaluated["median"]) >= TARGET and start <= START_TARGET
    return result(
        "evaluate",
        "the engine alone, all prompts at once",
        scored,
        TARGET,
        "1: nothing but the engine",
        evaluation={"ratio": evaluated, "target": TARGET},
        start={"ratio": round(start, 2), "target": START_TARGET, "seconds": starts},
        seconds={**seconds, "evaluate": evaluations},
        pictures_per_second={
            name: PICTURES / statistics.median(each) for name, each in {**seconds, "evaluate": evaluations}.items()
        },
        met=met,
    )


if __name__ == "__main__":
    print(json.dumps(_in_one_process(sys.argv[1])))
