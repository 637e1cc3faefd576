"""An exported model read by others: transformers and vLLM, as the card says and with nothing of ours, answer as our
engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

from conftest import model_words

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config, to_yaml
from tatar_dist.data.manifest import read_manifest
from tatar_dist.demo.data.make import make_demo
from tatar_dist.prompts.answer import parse
from tatar_dist.prompts.source import PromptSource
from tatar_dist.rollout.engine import RolloutEngine, Sampling
from tatar_dist.run.checkpoints import Checkpoints
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.events import Events
from tatar_dist.run.files import Files, write_files
from tatar_dist.scoring import export
from tatar_dist.types import Sample

IMAGES = int(os.environ.get("EXPORT_IMAGES", "4"))  # per task; `make nightly` asks about more
CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # the model is traced as ever, but no C++ is compiled: that took most of the test's time
}

# The card's example: the lines before `question` once, those from there on for every question.
ASK = """
import contextlib, io, json, re, sys
which, questions, answers = int(sys.argv[1]), json.load(open(sys.argv[2])), []
lines = re.findall(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S)[which].splitlines()
assert len(lines) == 10, lines
at = next(i for i, line in enumerate(lines) if line.startswith("question"))
names = {}
exec("\\n".join(lines[:at]), names)
for task, image in questions:
    code = "\\n".join(lines[at:]).replace('"iqa"', repr(task)).replace('"photo.jpg"', repr(image))
    assert task in code and image in code
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, names)
    answers.append(said.getvalue().removesuffix("\\n"))
assert not [m for m in sys.modules if m.startswith("tatar_dist.")]
json.dump(answers, open(sys.argv[3], "w"))
"""


class Learner:
    """One rank that writes the files of a model directory."""

    actors = (0,)

    def __init__(self, model: str) -> None:
        self.model = Path(model)

    def save(self, directory: Path) -> Future[Files]:
        done: Future[Files] = Future()
        jobs = [(f"model/{p.name}", lambda to, p=p: to.write_bytes(p.read_bytes())) for p in self.model.iterdir()]
        done.set_result(write_files(directory, jobs))
        return done


def finished_run(config: Config, model: str) -> Path:
    """A run directory as training leaves it, whose checkpoint of step 7 is `model`."""
    run = Path(config.output)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    store = Checkpoints(run, config.checkpoint, Events(run))
    store.save(7, {"same": {"stage": "grpo", "model.path": config.model.path}}, Learner(model), {})
    store.finish()
    return run


def held_out(data: Path, n: int) -> list[Sample]:
    manifests = [read_manifest(data / f"{task}_test.parquet") for task in ("iqa", "iaa")]
    return [m.get(i) for m in manifests for i in range(n)]


def as_our_engine_answers(config: Config, samples: list[Sample]) -> list[str]:
    with RunDirectory(config) as run:
        source = PromptSource(config, run)
    engine = RolloutEngine(config, 0)
    engine.setup(threads=os.cpu_count() or 1, version=0)
    prompts = [source.prompt(s, s.sample_id) for s in samples]
    groups = engine.generate(prompts, Sampling(1, 0.0, config.rollout.max_new_tokens), 0)
    return [g.completions[0].text for g in groups]


def as_the_card_says(model: Path, which: int, samples: list[Sample], directory: Path) -> list[str]:
    """Answers of the card's example 0 (transformers) or 1 (vLLM), in a process that imports none of our code."""
    directory.mkdir()
    questions = []
    for i, sample in enumerate(samples):
        image = directory / f"{i}.png"
        image.write_bytes(sample.image)
        questions.append((sample.task, str(image)))
    (directory / "ask.py").write_text(ASK)
    (directory / "questions.json").write_text(json.dumps(questions))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | CPU
    files = [str(directory / name) for name in ("ask.py", "questions.json", "answers.json")]
    words = [sys.executable, files[0], str(which), *files[1:]]
    subprocess.run(words, cwd=model, env=environment, check=True)
    return json.loads(Path(files[2]).read_text())


def test_transformers_and_vllm_answer_like_our_engine_by_the_cards_examples(model_tied, tmp_path, monkeypatch):
    for key, value in CPU.items():
        monkeypatch.setenv(key, value)
    make_demo(tmp_path / "data", train=IMAGES, validation=IMAGES, test=IMAGES)
    rollout = ["rollout.max_new_tokens=40", "rollout.max_model_len=448", "rollout.max_num_seqs=16"]
    words = [*model_words(model_tied), *rollout, "cluster.gpus_per_node=0", "reward.params.length_iaa_min=2"]
    config = load_config([], [f"output={tmp_path / 'run'}", *words])
    run = finished_run(config, model_tied)
    model = export.run(run, tmp_path / "exported", shard_size="1MB")
    assert len(list(model.glob("*.safetensors"))) > 1 and (model / "model.safetensors.index.json").is_file()
    samples = held_out(tmp_path / "data", IMAGES)
    exported = load_config([], [f"output={tmp_path / 'asked'}", *words, f"model.path={model_tied}"])
    ours = as_our_engine_answers(exported, samples)
    assert sum(parse(text).value is not None for text in ours) >= IMAGES and len(set(ours)) > 1  # there is something
    assert as_the_card_says(model, 0, samples, tmp_path / "transformers") == ours
    assert as_the_card_says(model, 1, samples, tmp_path / "vllm") == ours
