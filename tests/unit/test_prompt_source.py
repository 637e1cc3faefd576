"""Samples to prompts: what cannot be used is quarantined once and replaced, and no prompt is ever cut."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("ray")

from PIL import Image  # noqa: E402

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import DataConfig  # noqa: E402
from tatar_dist.data.images import decode_image  # noqa: E402
from tatar_dist.data.manifest import read_manifest  # noqa: E402
from tatar_dist.data.sampler import PromptSampler  # noqa: E402
from tatar_dist.data.writing import write_manifest  # noqa: E402
from tatar_dist.demo.tiny.build import TinySizes, build  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.evaluate import runner  # noqa: E402
from tatar_dist.prompts.answer import answer_text  # noqa: E402
from tatar_dist.prompts.source import PromptSource, read_manifests  # noqa: E402
from tatar_dist.rewards.batch import batch_of_groups  # noqa: E402
from tatar_dist.rewards.presets import load_preset  # noqa: E402
from tatar_dist.rewards.score import score_batch, scored_groups  # noqa: E402
from tatar_dist.run.directory import RunDirectory  # noqa: E402
from tatar_dist.sampling import PromptBatch, ScoredBatches  # noqa: E402
from tatar_dist.sft import _held_out, dropped  # noqa: E402
from tatar_dist.types import Completion, Group, Prompt  # noqa: E402

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts.yaml"
SMALL = TinySizes(vocab=512, text_layers=1, text_intermediate=64, vision_depth=1, vision_intermediate=64)
SIDE = 112


def png(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    out = io.BytesIO()
    color = tuple(int(c) for c in np.random.default_rng(seed).integers(0, 256, 3))
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def row(i: int, task: str = "iqa", **changes) -> dict:
    base = {"sample_id": f"{task}-{i}", "dataset": f"set-{task}", "task": task, "image_bytes": png(i)}
    return base | {"score": float(10 + i), "split": "train", "rationale": f"view {i}"} | changes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [PROMPTS.read_text(), "a plain view of it"] * 20
    return build(tmp_path_factory.mktemp("tiny"), corpus=corpus, sizes=SMALL)


@pytest.fixture
def make_source(model, tmp_path) -> Iterator:
    """make_source('key=value', ...) -> a PromptSource whose quarantine goes to tmp_path/run."""
    opened: list[RunDirectory] = []

    def make(*words: str) -> PromptSource:
        base = [f"output={tmp_path / 'run'}", f"model.path={model}", f"data.prompts={PROMPTS}"]
        pixels = [f"model.min_pixels={SIDE**2}", f"model.max_pixels={16 * SIDE**2}"]
        config = load_config([], [*base, *pixels, *words])
        opened.append(RunDirectory(config))
        return PromptSource(config, opened[-1])

    yield make
    for run in opened:
        run.close()


def sampler_of(path: Path, rows: list[dict], **kwargs) -> PromptSampler:
    write_manifest(path, rows)
    return PromptSampler([read_manifest(path)], seed=0, **{"iqa_fraction": 1.0, **kwargs})


def quarantined(run: Path) -> dict[str, dict]:
    file = run / "run" / "quarantine.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({r["sample_id"] for r in rows}) == len(rows), "a sample was quarantined twice"
    return {r["sample_id"]: r for r in rows}


def test_unreadable_images_are_quarantined_with_their_reason_and_replaced(make_source, tmp_path):
    rows = [row(i) for i in range(8)]
    rows[1]["image_bytes"] = b"no image at all"
    rows[4]["image_bytes"] = png(4)[:60]
    rows[6] |= {"image_bytes": None, "image": "gone.png"}
    source, sampler = make_source(), sampler_of(tmp_path / "m.parquet", rows)
    taken = [s for _ in range(4) for s in source.samples(sampler, 5)]  # four batches: every bad row came up
    found = quarantined(tmp_path)
    assert set(found) == {"iqa-1", "iqa-4", "iqa-6"}
    assert all(r["manifest"] == str(tmp_path / "m.parquet") for r in found.values())
    assert "cannot decode image" in found["iqa-1"]["reason"] and "cannot decode image" in found["iqa-4"]["reason"]
    assert "gone.png" in found["iqa-6"]["reason"]
    assert {s.sample_id for s in taken} == {f"iqa-{i}" for i in (0, 2, 3, 5, 7)}
    assert len(taken) == 20


def test_a_batch_with_replacements_has_its_full_size_and_no_sample_twice(make_source, tmp_path):
    rows = [row(i, image_bytes=png(i) if i % 2 else b"broken") for i in range(12)]
    source, sampler = make_source(), sampler_of(tmp_path / "m.parquet", rows)
    for _ in range(3):
        ids = [s.sample_id for s in source.samples(sampler, 6)]
        assert sorted(ids) == [f"iqa-{i}" for i in (1, 11, 3, 5, 7, 9)]


def test_a_replacement_is_of_the_same_data_set(make_source, tmp_path):
    rows = [row(i) for i in range(6)] + [row(i, "iaa") for i in range(6)]
    rows[2]["image_bytes"] = rows[8]["image_bytes"] = b"broken"
    source = make_source()
    sampler = sampler_of(tmp_path / "m.parquet", rows, iqa_fraction=0.5)
    for _ in range(4):
        tasks = [s.task for s in source.samples(sampler, 8)]
        assert tasks.count("iqa") == tasks.count("iaa") == 4
    assert set(quarantined(tmp_path)) == {"iqa-2", "iaa-2"}


def test_data_without_a_usable_sample_ends_with_a_message(make_source, tmp_path):
    sampler = sampler_of(tmp_path / "m.parquet", [row(i, image_bytes=b"broken") for i in range(4)])
    with pytest.raises(UserError, match="fewer usable samples than one batch needs"):
        make_source().samples(sampler, 2)


def test_a_prompt_that_is_too_long_is_rejected_with_its_length_and_never_truncated(make_source, tmp_path):
    rows = [
        row(0),
        row(1, image_bytes=png(1, (4 * SIDE, 4 * SIDE))),
        row(2),
        row(3, image_bytes=png(3, (SIDE, 2 * SIDE))),
    ]
    limit = 200
    source, sampler = make_source(f"data.max_prompt_tokens={limit}"), sampler_of(tmp_path / "m.parquet", rows)
    prompts = [p for step in range(3) for p in source.batch(sampler, 3, step)]
    assert {p.sample.sample_id for p in prompts} == {"iqa-0", "iqa-2", "iqa-3"}

    def length(text: str, image: bytes) -> int:
        return len(source.backbone.encode_prompt(text, decode_image(image, "")).ids)

    whole = source.texts.wording.render("iqa", source.texts._chat)
    too_long = length(whole, rows[1]["image_bytes"])
    assert too_long > limit
    assert quarantined(tmp_path)["iqa-1"]["reason"] == (
        f"prompt of {too_long} tokens is over data.max_prompt_tokens={limit}"
    )
    for p in prompts:
        assert p.text == whole and length(p.text, p.sample.image) <= limit


def test_a_prompt_of_exactly_the_limit_is_taken_and_one_token_over_is_not(make_source, tmp_path):
    source = make_source()
    manifest_row = row(0)
    text = source.texts.wording.render("iqa", source.texts._chat)
    exact = len(source.backbone.encode_prompt(text, decode_image(manifest_row["image_bytes"], "")).ids)
    write_manifest(tmp_path / "m.parquet", [manifest_row])
    sample = read_manifest(tmp_path / "m.parquet").get(0)
    source.texts._data = replace(source.config.data, max_prompt_tokens=exact)
    assert source.problem(sample) is None
    source.texts._data = replace(source.config.data, max_prompt_tokens=exact - 1)
    assert "prompt of" in source.problem(sample)


def test_an_image_too_narrow_for_the_model_is_quarantined_and_does_not_end_the_run(make_source, tmp_path):
    rows = [row(0), row(1, image_bytes=png(1, (300, 1))), row(2)]
    source, sampler = make_source(), sampler_of(tmp_path / "m.parquet", rows)
    assert {s.sample_id for _ in range(2) for s in source.samples(sampler, 2)} == {"iqa-0", "iqa-2"}
    assert "aspect ratio" in quarantined(tmp_path)["iqa-1"]["reason"]


def test_a_quarantined_sample_does_not_take_its_namesake_of_another_data_set_along(make_source, tmp_path):
    rows = [row(i, "iqa", sample_id=f"{i}") for i in range(4)]
    rows[1]["image_bytes"] = b"broken"
    write_manifest(tmp_path / "iqa.parquet", rows)
    write_manifest(tmp_path / "iaa.parquet", [row(i, "iaa", sample_id=f"{i}") for i in range(4)])
    manifests = read_manifests(DataConfig(root=str(tmp_path), train=["iqa.parquet", "iaa.parquet"]), "train")
    source, sampler = make_source(), PromptSampler(manifests, seed=0)
    taken = [{(s.task, s.sample_id) for _ in range(4) for s in source.samples(sampler, 4)} for _ in range(2)]
    assert set(quarantined(tmp_path)) == {"1"}
    assert taken[1] == {("iqa", i) for i in "023"} | {("iaa", i) for i in "0123"}


def test_group_ids_name_step_data_set_and_sample_and_come_sorted(make_source, tmp_path):
    rows = [row(i) for i in range(4)] + [row(i, "iaa") for i in range(4)]
    source = make_source()
    prompts = source.batch(sampler_of(tmp_path / "m.parquet", rows, iqa_fraction=0.5), 8, 12)
    ids = [p.group_id for p in prompts]
    assert ids == sorted(ids) == [f"000012/set-{t}/{t}-{i}" for t in ("iaa", "iqa") for i in range(4)]
    for p in prompts:
        assert f"TASK: {p.sample.task.upper()}" in p.text
        assert p.text.count("<|image_pad|>") == 1 and p.text.endswith("<|im_start|>assistant\n")


class SameAnswers:
    """Engines that give every prompt of a group the same text: no group has an advantage."""

    refresh_blocked = True

    def generate(self, prompts: list[Prompt], sampling) -> list[Group]:
        answer = Completion("<think>a view</think><answer>50</answer>", (1,), (0.0,), "stop")
        return [Group(p, (1,), (answer,) * sampling.n, 0) for p in prompts]


@pytest.mark.parametrize("scarce", ["iqa", "iaa"])
def test_a_refill_from_an_exhausted_data_set_leaves_the_counts_of_the_tasks(make_source, tmp_path, scarce):
    rows = [row(i, task) for task in ("iqa", "iaa") for i in range(3 if task == scarce else 12)]
    write_manifest(tmp_path / "m.parquet", rows)
    words = (f"data.train=[{tmp_path / 'm.parquet'}]", "grpo.prompts_per_step=4", "grpo.zero_std=refill")
    source = make_source(*words)
    preset, config = load_preset("tatar"), source.config

    def score(groups, step):
        return scored_groups(groups, score_batch(batch_of_groups(groups), preset)), {}

    run = SimpleNamespace(directory=source.run, engines=SameAnswers(), scorer=SimpleNamespace(score=score))
    batches = ScoredBatches(config, run)  # type: ignore[arg-type]
    batch = PromptBatch(0, {}, batches._draw(0))
    out = batches._collect(batch)
    assert sorted(s.group.prompt.sample.task for s in out.scored) == ["iaa", "iaa", "iqa", "iqa"]
    kept, replaced = ([s.group.prompt.group_id for s in part] for part in (out.scored, out.replaced))
    assert len({*kept, *replaced}) == len(kept) + len(replaced) == 4 + 5  # one of the scarce set, two rounds of two
    assert {p.group_id for p in batch.prompts} < {*kept, *replaced}
    assert sum(scarce in name for name in replaced) == 1


def test_a_limit_of_held_out_samples_takes_from_every_data_set(make_source, tmp_path):
    rows = [row(i, dataset=name, sample_id=f"{name}-{i}") for name in ("a", "b") for i in range(3)]
    write_manifest(tmp_path / "m.parquet", rows)
    found = list(make_source().held_out([read_manifest(tmp_path / "m.parquet")], 2))
    assert [s.dataset for s in found] == ["a", "a", "b", "b"]  # both sets are of one task


def test_a_limit_spreads_over_the_scores_of_a_set_sorted_by_them(make_source, tmp_path):
    rows = [row(i, dataset="a", sample_id=f"a-{i:02d}", score=float(i)) for i in range(60)]
    write_manifest(tmp_path / "m.parquet", rows[:30])
    write_manifest(tmp_path / "n.parquet", rows[30:])
    manifests = [read_manifest(tmp_path / name) for name in ("m.parquet", "n.parquet")]
    source = make_source()
    scores = [s.score for s in source.held_out(manifests, 12)]
    assert len(set(scores)) == 12 and [s.score for s in source.held_out(manifests, 12)] == scores
    assert sum(score < 30 for score in scores) == 6 and min(scores) < 5 and max(scores) >= 54
    nested = {s.score for s in source.held_out(manifests, 6)}
    assert nested < set(scores), "a smaller limit takes a part of a larger one"
    assert len(list(source.held_out(manifests, 99))) == 60


def test_a_held_out_sample_that_cannot_be_used_is_replaced(make_source, tmp_path):
    rows = [row(i) for i in range(5)] + [row(i, "iaa") for i in range(3)]
    write_manifest(tmp_path / "whole.parquet", rows)
    source = make_source()
    whole = [s.sample_id for s in source.held_out([read_manifest(tmp_path / "whole.parquet")], 2)]
    for one in (whole[0], whole[-1]):
        next(r for r in rows if r["sample_id"] == one)["image_bytes"] = b"broken"
    write_manifest(tmp_path / "m.parquet", rows)
    manifests = [read_manifest(tmp_path / "m.parquet")]
    found = [s.sample_id for s in source.held_out(manifests, 2)]
    assert len(found) == 4 and set(whole[1:3]) < set(found) and not {whole[0], whole[-1]} & set(found)
    assert set(quarantined(tmp_path)) == {whole[0], whole[-1]}
    assert source.missing == {("set-iqa", "iqa"): 1, ("set-iaa", "iaa"): 1}
    assert len(list(source.held_out(manifests, None))) == 6


def test_a_supervised_row_is_the_whole_answer_and_its_end_of_turn(make_source, tmp_path):
    write_manifest(tmp_path / "m.parquet", [row(i) for i in range(3)])
    source, sampler = make_source(), PromptSampler([read_manifest(tmp_path / "m.parquet")], 0, 1.0, supervised=True)
    for sample in source.samples(sampler, 3):
        made = source.sft_row(sample)
        text = source.backbone.tokenizer.decode(made.completion_ids)
        assert text == answer_text(sample.rationale, sample.score) + "<|im_end|>"
        assert made.image_id == f"set-iqa/{sample.sample_id}" and made.image == sample.image
        assert made.prompt_text == source.prompt(sample, "g").text and made.sampled_logprobs is None


def test_rows_that_are_no_supervised_targets_are_quarantined_and_replaced(make_source, tmp_path):
    rows = [row(i) for i in range(6)]
    rows[1]["rationale"] = None
    rows[2]["rationale"] = " "
    rows[4]["rationale"] = "view " * 300
    rows[5]["rationale"] = "as <answer>1</answer> says"
    write_manifest(tmp_path / "m.parquet", rows)
    manifest = read_manifest(tmp_path / "m.parquet")
    source, sampler = make_source("sft.max_tokens=400"), PromptSampler([manifest], 0, 1.0, supervised=True)
    assert {s.sample_id for _ in range(4) for s in source.samples(sampler, 2)} == {"iqa-0", "iqa-3"}
    found = {i: r["reason"] for i, r in quarantined(tmp_path).items()}
    assert set(found) == {"iqa-1", "iqa-2", "iqa-4", "iqa-5"} and found["iqa-1"] == found["iqa-2"] == "no rationale"
    assert "over sft.max_tokens=400" in found["iqa-4"] and "'<answer>'" in found["iqa-5"]
    assert [s.sample_id for s in source.held_out([manifest], None, supervised=True)] == ["iqa-0", "iqa-3"]
    assert len(list(source.held_out([manifest], None))) == 6  # as prompts all of them will do


def test_thought_dropout_drops_think_as_often_as_it_says_and_trains_on_scores_alone(make_source, tmp_path):
    write_manifest(tmp_path / "m.parquet", [row(i, rationale=None if i else "view") for i in range(3)])
    source = make_source("sft.thought_dropout={iqa: 0.25}")
    sampler = PromptSampler([read_manifest(tmp_path / "m.parquet")], 0, 1.0, supervised=True)
    samples = {s.sample_id: s for s in source.samples(sampler, 3)}
    assert len(samples) == 3, "rows without a rationale are targets, too"
    texts = {i: source.backbone.tokenizer.decode(source.sft_row(s).completion_ids) for i, s in samples.items()}
    assert texts["iqa-0"].startswith("<think>view</think>") and texts["iqa-1"].startswith("<answer>")
    sample, config = samples["iqa-0"], source.config
    drawn = [dropped(sample, config, step).rationale is None for step in range(2000)]
    assert 0.22 < sum(drawn) / 2000 < 0.28
    assert drawn == [dropped(sample, config, step).rationale is None for step in range(2000)], "as after a resume"
    other = replace(config, seed=config.seed + 1)
    assert drawn != [dropped(sample, other, step).rationale is None for step in range(2000)]
    assert not any(dropped(replace(sample, task="iaa"), config, step).rationale is None for step in range(50))


def limit_answers(source: PromptSource, tokens: int) -> None:
    source.config = replace(source.config, sft=replace(source.config.sft, max_tokens=tokens))


def test_the_length_of_a_supervised_row_is_prompt_image_and_answer(make_source, tmp_path):
    write_manifest(tmp_path / "m.parquet", [row(0, image_bytes=png(0, (2 * SIDE, SIDE)))])
    sample = read_manifest(tmp_path / "m.parquet").get(0)
    source = make_source()
    made = source.sft_row(sample)
    prompt = source.backbone.encode_prompt(made.prompt_text, decode_image(sample.image, ""))
    assert made.prompt_tokens == len(prompt.ids)
    exact = len(prompt.ids) + len(made.completion_ids)
    limit_answers(source, exact)
    assert source.problem(sample, supervised=True) is None
    limit_answers(source, exact - 1)
    assert source.problem(sample, supervised=True) == (
        f"prompt and answer of {exact} tokens is over sft.max_tokens={exact - 1}"
    )
    assert source.problem(sample) is None


def held_out_rows(source: PromptSource) -> list[str]:
    return [r.image_id for r in _held_out(source.config, source)]


def test_held_out_rows_are_the_usable_ones(make_source, tmp_path):
    assert held_out_rows(make_source()) == []  # no manifest, no held-out loss
    rows = [row(i, dataset="a") for i in range(6)] + [row(i, "iaa", dataset="b") for i in range(3)]
    rows[0]["rationale"] = None
    write_manifest(tmp_path / "v.parquet", rows)
    source = make_source(f"data.validation=[{tmp_path / 'v.parquet'}]", f"output={tmp_path / 'other'}")
    assert sorted(held_out_rows(source)) == [f"a/iqa-{i}" for i in range(1, 6)] + [f"b/iaa-{i}" for i in range(3)]
    limit_answers(source, 1)
    with pytest.raises(UserError, match="data.validation has no usable row for the held-out loss"):
        held_out_rows(source)


def test_validation_without_any_rationale_is_refused_by_manifest_and_column(make_source, tmp_path):
    write_manifest(tmp_path / "v.parquet", [row(i, rationale=None) for i in range(3)])
    source = make_source(f"data.validation=[{tmp_path / 'v.parquet'}]")
    with pytest.raises(UserError, match="v.parquet: column rationale: no row has one"):
        held_out_rows(source)


def test_no_manifest_at_all_is_said_by_its_key():
    with pytest.raises(UserError, match="data.test is empty"):
        read_manifests(DataConfig(), "test")


def test_an_evaluation_without_a_usable_sample_changes_no_record(make_source, tmp_path):
    write_manifest(tmp_path / "m.parquet", [row(i, split="test", image_bytes=b"broken") for i in range(3)])
    source = make_source(f"data.test=[{tmp_path / 'm.parquet'}]", "rollout.engines=1", "cluster.gpus_per_node=0")
    source.run.close()
    for name in ("config.yaml", "prompts.yaml"):
        (tmp_path / "run" / name).write_text("of an evaluation before")
    with pytest.raises(UserError, match="data.test: no usable sample: 3 of 3 rejected rows for one reason: .*decode"):
        runner.run(source.config)
    assert {(tmp_path / "run" / name).read_text() for name in ("config.yaml", "prompts.yaml")} == {
        "of an evaluation before"
    }


def test_a_directory_without_a_model_is_said_before_anything_is_loaded(make_source, tmp_path):
    with pytest.raises(UserError, match="no config.json in it"):
        make_source(f"model.path={tmp_path}")


def test_a_limit_that_no_row_meets_is_said_at_once_with_the_value_that_would_do(make_source, tmp_path):
    rows = [row(i) for i in range(90)]
    write_manifest(tmp_path / "m.parquet", rows)
    manifests = [read_manifest(tmp_path / "m.parquet")]
    source = make_source("data.max_prompt_tokens=30")
    with pytest.raises(UserError) as refused:
        list(source.held_out(manifests, None))
    told = str(refused.value)
    assert told.startswith("none of the first 64 rows can be used: 64 of 64 rejected rows for one reason: prompt of ")
    (most,) = re.findall(r"; data.max_prompt_tokens=(\d+) would take them$", told)
    source.texts._data = dataclasses.replace(source.texts._data, max_prompt_tokens=int(most))
    source.unusable = type(source.unusable)()
    assert len(list(source.held_out(manifests, None))) == 90


def test_pictures_too_large_for_a_prompt_are_said_with_the_pixels_that_would_do(make_source, tmp_path):
    write_manifest(tmp_path / "m.parquet", [row(i, image_bytes=png(i, (300 + i, 200))) for i in range(90)])
    manifests = [read_manifest(tmp_path / "m.parquet")]
    short = make_source()
    limit = max(short.texts.tokens.values()) + short.texts.backbone.image_tokens(SIDE, SIDE) + 40
    own = make_source(f"output={tmp_path / 'own'}", f"data.max_prompt_tokens={limit}", "model.max_pixels=12845056")
    with pytest.raises(UserError) as refused:
        list(own.held_out(manifests, None))
    told = re.search(r" would take them, or model.max_pixels=(\d+), which scales them down$", str(refused.value))
    words = (f"data.max_prompt_tokens={limit}", f"model.max_pixels={told[1]}")
    taken = make_source(f"output={tmp_path / 'taken'}", *words)
    assert len(list(taken.held_out(manifests, None))) == 90
    tokens = [taken.texts.tokens_with((3000, 2000), task) for task in taken.texts.tokens]
    assert limit - 10 < max(tokens) <= limit  # as large as it may be


def test_a_manifest_away_from_its_pictures_is_said_at_once(make_source, tmp_path):
    rows = [row(i) | {"image_bytes": None, "image": f"{i}.png"} for i in range(90)]
    write_manifest(tmp_path / "m.parquet", rows)
    source = make_source()
    with pytest.raises(UserError, match="No such file or directory; data.image_root=DIRECTORY says where"):
        list(source.held_out([read_manifest(tmp_path / "m.parquet")], 3))
    assert len(quarantined(tmp_path)) < 64
