"""Time a whole GRPO step beside TRL's GRPOTrainer: `tatar-dist bench step`.

The ratio is how many times faster a step is (generate, score, learn, push) than TRL's: with its other defaults, all
completions in one forward, and with the variant of trl_side.py that was fastest here (TUNED; the word `tune` compares
the first steps of all again); both targets must be met. TRL's default recomputes activations; ours keeps them, which
takes less memory than TRL's rows that recompute (bench learner); `recomputing` is the ratio where both recompute. Same
random 14M model, prompts, lengths and machine, other images each step, one run after the other, each with all cores,
the first step left out. Ours is grpo.py with one vLLM engine, one ZeRO-3 learner and a group a forward.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.harness import ratio, result
from tatar_dist.bench.trl_side import VARIANTS
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import RunError, UserError
from tatar_dist.prompts.render import PromptTexts
from tatar_dist.run.directory import read_metrics

PEER = Path(__file__).parents[2] / ".venv-trl/bin/python"
PROMPTS, GROUP, TOKENS, STEPS = 2, 8, 64, 3
IMAGES = PROMPTS * STEPS
TARGETS = {"defaults": 8.0, "tuned": 5.0}
TUNED = "a group a forward"
SAME_WORK = 0.05  # mean completion tokens may differ by this much

Side = dict[str, list[Any]]  # seconds and tokens of each counted step


def theirs(model: Path, directory: Path, variant: str, steps: int = STEPS) -> Side:
    """Run steps of TRL; return all, the first among them. Raises RunError when it fails."""
    options = {"prompts": PROMPTS, "group": GROUP, "tokens": TOKENS, "steps": steps, "variant": variant}
    script = Path(__file__).with_name("trl_side.py")
    done = subprocess.run(
        [str(PEER), "-P", str(script), str(model), str(directory), json.dumps(options)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"TRL ({variant}) ended with {done.returncode}: {done.stderr[-2000:]}")
    return read_steps(done.stdout, steps)


def read_steps(output: str, steps: int) -> Side:
    """Read the JSON lines of trl_side.py. Raises RunError when there are not `steps`."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]
    if len(lines) != steps:
        raise RunError(f"TRL printed {len(lines)} steps, {steps} were asked for: {output[-500:]}")
    return {key: [line[key] for line in lines] for key in ("seconds", "tokens", "prompt", "trl")}


def warm(side: Side) -> Side:
    """Return all steps but the first."""
    return {key: values[1:] for key, values in side.items()}


def tune(model: Path, directory: Path) -> tuple[str, dict[str, float | str]]:
    """Return TRL's fastest variant by first steps, and each one's seconds or error."""
    tried: dict[str, float | str] = {}
    for variant in (v for v in VARIANTS if v != "defaults"):
        try:
            tried[variant] = theirs(model, directory, variant, 1)["seconds"][0]
        except RunError as e:
            tried[variant] = str(e).splitlines()[-1]
    times = {v: s for v, s in tried.items() if isinstance(s, float)}
    if not times:
        raise RunError(f"bench step: every variant of TRL failed: {tried}")
    return min(times, key=times.__getitem__), tried


def ours(directory: Path, more: Sequence[str]) -> Side:
    """Run steps of the pipeline on the same images; `more`: config words."""
    from tatar_dist import grpo as controller

    manifest, output = directory / "iqa.parquet", Path(tempfile.mkdtemp(dir=directory))
    same = {"dataset": "bench", "task": "iqa", "split": "train", "rationale": None}
    rows = ({"sample_id": f"{i:04d}", "score": float(i), "image_bytes": subject.image(i)} for i in range(IMAGES))
    write_manifest(manifest, (same | row for row in rows))
    words = [
        f"output={output}", f"data.train=[{manifest}]", f"grpo.prompts_per_step={PROMPTS}", f"grpo.group_size={GROUP}",
        "grpo.micro_tokens=2048", f"grpo.max_steps={STEPS}", f"rollout.max_new_tokens={TOKENS}",
        "rollout.max_model_len=1536", f"rollout.max_num_seqs={PROMPTS * GROUP}", "checkpoint.every=0", *more,
    ]  # fmt: skip
    controller.run(subject.make(directory, words=words))
    names = {"seconds": "time/step", "tokens": "completion/tokens/iqa"}
    names |= {name: name for name in ("time/generate", "time/learn", "time/sync", "time/reward")}
    return warm({key: [line[name] for line in read_metrics(output)] for key, name in names.items()})


def compare(peer: Side, mine: Side) -> dict[str, float]:
    """Return the ratio of steps. Raises RunError when the two did not do the same work."""
    for key, what in (("tokens", "tokens a completion"), ("prompt", "tokens a prompt")):
        theirs, ours = (statistics.mean(side[key]) for side in (peer, mine))
        if abs(theirs / ours - 1) > SAME_WORK:
            raise RunError(f"not the same work: TRL had {theirs:.1f} {what}, the pipeline {ours:.1f}")
    return ratio(peer["seconds"], mine["seconds"])


def run(words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure everything; print each side's seconds to standard error once they are known.

    Raises UserError without .venv-trl, or for a word that is not `tune`.
    """
    if list(words) not in ([], ["tune"]):
        raise UserError(f"bench step: takes no {words[0]!r}, only tune")
    if not PEER.exists():
        raise UserError("bench step: .venv-trl is not there: run make bench-trl")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        config = subject.make(directory)
        model, texts = Path(config.model.path), PromptTexts(config)
        prompt = texts.tokens["iqa"] + texts.backbone.image_tokens(subject.PIXELS, subject.PIXELS)
        # the pipeline's own prompt; TRL puts the image in by itself
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in texts.wording.messages("iqa")]
        (directory / "messages.json").write_text(json.dumps(messages))
        subject.write_images(directory, IMAGES)
        best, tried = tune(model, directory) if words else (TUNED, {})
        sides: dict[str, Side] = {}
        for name, measure in {
            "defaults": lambda: warm(theirs(model, directory, "defaults")),
            "ours, recomputing": lambda: ours(directory, ["model.gradient_checkpointing=true"]),
            "tuned": lambda: warm(theirs(model, directory, best)),
            "ours": lambda: ours(directory, ["model.gradient_checkpointing=false"]),
        }.items():
            sides[name] = {"prompt": [prompt]} | measure()
            print(f"{name}: {', '.join(f'{s:.1f} s' for s in sides[name]['seconds'])}", file=sys.stderr, flush=True)
    ratios = {variant: compare(sides[variant], sides["ours"]) for variant in TARGETS}
    return result(
        "step",
        "TRL's GRPOTrainer, one forward, other defaults",
        ratios["defaults"],
        TARGETS["defaults"],
        "none counted: the two generate with different engines; met says both targets",
        ratios["tuned"]["median"] >= TARGETS["tuned"],
        tuned={"variant": best, "tried": tried, "ratio": ratios["tuned"], "target": TARGETS["tuned"]},
        recomputing=compare(sides["defaults"], sides["ours, recomputing"]),
        trl=sides["defaults"]["trl"][0],
        steps=sides,
    )
