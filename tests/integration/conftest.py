"""Real Ray, vLLM and DeepSpeed on a model of one million parameters that already answers in the right format."""

from __future__ import annotations

import fcntl
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import ray
from PIL import Image

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.prompts.answer import Prompts
from tatar_dist.run.process import importing

# Files that start the most, first: both processes are then busy to the end.
LONGEST = (
    *("test_evaluate", "test_serve", "test_engine_faults", "test_processes", "test_pretended_gpus"),
    *("test_gpu_check", "test_shards", "test_rationale_pool", "test_resume"),
    *("test_dynamic_sampling", "test_lora", "test_run", "test_step_by_hand", "test_staleness", "test_recipe"),
    *("test_gpus", "test_gradients", "test_rationale_server", "test_shared_prefix_updates", "test_export"),
    *("test_observability",),
)
# Files whose tests share nothing that they start; the tests of any other stay in one process.
APART = ("test_dynamic_sampling", "test_engine_faults", "test_lora", "test_resume", "test_shared_prefix_updates")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)) if item.path.parent == here else -1)
    for item in items:
        if item.path.parent == here and item.path.stem not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


PIXELS = 112
FORMAT_STEPS = 70


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def manifest_rows(task: str, n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "sample_id": f"{task}-{i:03d}",
            "dataset": f"set-{task}",
            "task": task,
            "image_bytes": png(1000 * seed + i + (500 if task == "iaa" else 0)),
            "score": float(np.round(rng.uniform(5, 95), 2)),
            "split": "train",
            "rationale": "a plain view of it" if task == "iqa" else "a plain view " * 4 + "of it",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One small manifest per task."""
    directory = tmp_path_factory.mktemp("data")
    paths = []
    for task in ("iqa", "iaa"):
        path = directory / f"{task}.parquet"
        write_manifest(path, manifest_rows(task, 24))
        paths.append(str(path))
    return paths


def corpus() -> list[str]:
    """What the tokenizer learns its words from: the prompts, so that they take few tokens."""
    wording = Prompts.load("configs/prompts.yaml")
    return [wording.system, *wording.user.values(), "a plain view of it"] * 20


def any_number(rng: np.random.Generator) -> str:
    return f"{rng.integers(10, 99)}.{rng.integers(10, 99)}"


def train_format(directory: str, number: Callable[[np.random.Generator], str] = any_number) -> None:
    """Teach a random model the answer format, in this process and in seconds; it learns nothing of the images."""
    with importing():
        import torch
        from transformers.utils import logging

        from tatar_dist.learner.batch import Collator
        from tatar_dist.learner.policy import PolicyModel
        from tatar_dist.models import family
        from tatar_dist.types import LearnerRow

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = load_config([], ["output=unused", *model_words(directory)])
    backbone = family("qwen2_5_vl")(config.model)
    model = backbone.load_model()
    policy = PolicyModel(model, backbone, backbone.forbidden_ids())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    image = png(1)
    chat = functools.partial(backbone.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    prompts = [Prompts.load(config.data.prompts).render(task, chat) for task in ("iqa", "iaa")]
    for _ in range(FORMAT_STEPS):
        rows = []
        for i in range(6):
            think = "a plain view" if rng.random() < 0.5 else "a plain view of it"
            text = f"<think>{think}</think><answer>{number(rng)}</answer>"
            ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(LearnerRow(f"i{i % 2}", image, prompts[i % 2], (*ids, backbone.end_of_turn()), "iqa"))
        batch = Collator(backbone)(rows)
        loss = -policy(batch).logp.sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5, f"the fixture model did not learn the format: loss {loss.item():.2f}"
    model.save_pretrained(directory)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory `name` that `make` fills, made by the first process of pytest that asks for it, for all of them."""
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    directory = place / "shared" / name
    directory.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            make(directory)
            lock.write("made")
    return directory


def model_of(factory: pytest.TempPathFactory, name: str, tie: bool = False, **taught) -> str:
    def make(directory: Path) -> None:
        from tatar_dist.demo.tiny.build import build

        build(directory, tie=tie, corpus=corpus())
        train_format(str(directory), **taught)

    return str(once(factory, name, make))


@pytest.fixture(scope="session")
def model_untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory, "untied")


@pytest.fixture(scope="session")
def model_tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory, "tied", tie=True)


@pytest.fixture(scope="session")
def model_parsing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its greedy answers are numbers, too: of one that was taught any number they are often none, like 2.2.2."""
    number = lambda rng: f"{rng.choice([3, 5, 5, 7])}{rng.integers(0, 10)}.50"  # noqa: E731
    return model_of(tmp_path_factory, "parsing", number=number)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """Ray, started as a run starts it, for all modules of this process that ask for it: runs join a Ray that is up.

    A module that needs one of its own shuts this one down first; the next that asks for it starts it again.
    """
    if not ray.is_initialized():
        Cluster(load_config([], ["output=unused", *tiny_words("unused", [])]))
    yield


def model_words(path: str) -> list[str]:
    return [
        f"model.path={path}",
        "model.dtype=float32",
        f"model.min_pixels={PIXELS**2}",
        f"model.max_pixels={PIXELS**2}",
        "model.gradient_checkpointing=false",
    ]


def tiny_words(model: str, manifests: list[str]) -> list[str]:
    """Overrides for GRPO of the fixture model with two learners and two engines on CPU; all but `output`."""
    return [
        *model_words(model),
        f"data.train=[{','.join(manifests)}]",
        "cluster.gpus_per_node=0",
        "cluster.learners=2",
        "cluster.learner_cpus=0.5",
        "cluster.engine_cpus=0.5",
        "cluster.object_store_mib=128",
        "rollout.engines=2",
        "rollout.max_new_tokens=40",
        "data.max_prompt_tokens=400",
        "rollout.max_model_len=448",
        "rollout.max_num_seqs=16",
        "rollout.bucket_mib=1",
        "rollout.call_timeout_s=240",
        "reward.params.length_iaa_min=2",
        "grpo.prompts_per_step=4",
        "grpo.group_size=4",
        "grpo.logprob_gap_limit=0.0001",
        "grpo.kl_beta=0.01",
    ]


@pytest.fixture
def make_config(manifests: list[str], tmp_path):
    """make_config(model, 'key=value', ...) -> a checked Config for two learners and two engines on CPU."""

    def make(model: str, *words: str) -> Config:
        return load_config([], [f"output={tmp_path / 'run'}", *tiny_words(model, manifests), *words])

    return make
