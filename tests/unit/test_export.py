"""Export: the model of a run as a directory for others, its card, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tatar_dist.assets import TINY_MODEL as TINY  # noqa: E402
from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.config.schema import CheckpointConfig, to_yaml  # noqa: E402
from tatar_dist.data.writing import write_manifest  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.prompts.answer import Prompts  # noqa: E402
from tatar_dist.run.checkpoints import Checkpoints  # noqa: E402
from tatar_dist.run.events import Events  # noqa: E402
from tatar_dist.run.files import Files, write_files  # noqa: E402
from tatar_dist.scoring import card as model_card  # noqa: E402
from tatar_dist.scoring import export  # noqa: E402

SMALL = ["model.min_pixels=12544", "model.max_pixels=12544", "model.dtype=float32"]


class Learner:
    """One rank; its model is the tiny one, its generation config another."""

    actors = (0,)

    def save(self, directory: Path) -> Future[Files]:
        done: Future[Files] = Future()
        jobs = [(f"model/{p.name}", lambda to, p=p: to.write_bytes(p.read_bytes())) for p in sorted(TINY.iterdir())]
        done.set_result(write_files(directory, [*jobs, ("deepspeed/rank_0.pt", lambda to: to.write_text("state"))]))
        return done


def make_run(run: Path, *words: str, stage: str = "grpo", steps: tuple[int, ...] = (1,), model: Path = TINY) -> Path:
    """A run directory as a stage leaves it, with a checkpoint of each of `steps`."""
    run.mkdir(parents=True)
    config = load_config([], [f"output={run}", f"model.path={model}", *SMALL, *words])
    (run / "config.yaml").write_text(to_yaml(config))
    for step in steps:
        store = Checkpoints(run, CheckpointConfig(keep=9), Events(run))
        store.save(step, {"same": {"stage": stage, "model.path": str(model)}}, Learner(), {})
        store.finish()
    return run


def evaluate(directory: Path, model: Path, n_parsed: int = 9) -> Path:
    """What an evaluation of `model` leaves: its config and metrics.json."""
    directory.mkdir(parents=True)
    config = load_config([], [f"output={directory}", f"model.path={model}", *SMALL])
    (directory / "config.yaml").write_text(to_yaml(config))
    row = {"n": 10, "n_parsed": n_parsed, "n_truncated": 1, "srcc": 0.75, "plcc": None, "rmse": 12.5}
    (directory / "metrics.json").write_text(json.dumps({"model": str(model), "datasets": {"koniq": row}}))
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def card(directory: Path) -> str:
    return (directory / model_card.NAME).read_text()


def test_the_card_names_the_changes_that_were_accepted_on_the_way(tmp_path):
    run = make_run(tmp_path / "run", stage="sft")
    same = {"stage": "sft", "model.path": str(TINY)}
    for step, before, now in ((2, 0.1, 0.2), (3, 0.2, 0.3)):
        store = Checkpoints(run, CheckpointConfig(accept=["sft"]), Events(run))
        if step == 2:  # the first checkpoint is of a run with a rate of its own
            store.save(1, {"same": {**same, "sft.optim.lr": before}}, Learner(), {})
            store.finish()
        changed = {**same, "sft.optim.lr": now}
        for _ in range(2):  # the second time as after a fault of the learners
            assert store.resume(changed)
        store.save(step, {"same": changed}, Learner(), {})
        store.finish()
    text = card(export.run(run, tmp_path / "out"))
    lines = [line for line in text.splitlines() if "changed after" in line]
    assert lines == [f"| changed after step {n} | sft.optim.lr from 0.{n} to 0.{n + 1} |" for n in (1, 2)]
    assert "changed after" not in card(export.run(make_run(tmp_path / "plain"), tmp_path / "other"))


def test_an_export_holds_the_same_weights_in_shards_that_the_index_names(tmp_path):
    target = export.run(make_run(tmp_path / "run"), tmp_path / "deep" / "out", shard_size="1MB")
    files = sorted(p.name for p in target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert all((target / name).stat().st_size <= 1_100_000 for name in files)
    before, after = weights(TINY), weights(target)
    assert before.keys() == after.keys() == index["weight_map"].keys()
    assert all(after[n].dtype == w.dtype and torch.equal(after[n], w) for n, w in before.items())
    assert sum(w.nbytes for w in after.values()) == index["metadata"]["total_size"]
    assert not (target / "deepspeed").exists() and [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_generation_is_greedy_ends_with_the_turn_and_never_writes_a_vision_placeholder(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    target = export.run(make_run(tmp_path / "run", "rollout.max_new_tokens=321"), tmp_path / "out")
    found, tokenizer = GenerationConfig.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert (found.do_sample, found.max_new_tokens) == (False, 321)
    assert tokenizer.convert_ids_to_tokens([found.eos_token_id, found.pad_token_id]) == ["<|im_end|>", "<|endoftext|>"]
    placeholders = {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}
    assert set(tokenizer.convert_ids_to_tokens(found.suppress_tokens)) == placeholders


def test_dtype_converts_weights_and_says_so_everywhere(tmp_path):
    run = make_run(tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        target = export.run(run, tmp_path / dtype, dtype=dtype)
        settings = json.loads((target / "config.json").read_text())
        said = {part["dtype"] for part in (settings, *settings.values()) if isinstance(part, dict) and "dtype" in part}
        assert settings["dtype"] == dtype and said == {dtype} and f'dtype="{dtype}"' in card(target)
        kinds = {w.dtype for w in weights(target).values()}
        assert kinds == {getattr(torch, dtype)}
    before = weights(TINY)
    assert all(torch.equal(w, before[n].to(torch.bfloat16)) for n, w in weights(tmp_path / "bfloat16").items())


def test_step_chooses_a_checkpoint_and_the_newest_is_the_default(tmp_path):
    run = make_run(tmp_path / "run", steps=(3, 6, 9))
    assert "| optimiser steps | 9 |" in card(export.run(run, tmp_path / "newest"))
    assert "| optimiser steps | 3 |" in card(export.run(run, tmp_path / "third", step=3))
    assert export.model_of(run) == run / "checkpoints" / "step_000009" / "model"
    with pytest.raises(UserError, match=r"--step 4: .*no such finished checkpoint; it has 3, 6, 9$"):
        export.run(run, tmp_path / "fourth", step=4)


def test_a_torn_checkpoint_is_passed_over_and_a_corrupt_one_refused(tmp_path):
    run = make_run(tmp_path / "run", steps=(1, 2))
    weights_file = run / "checkpoints" / "step_000002" / "model" / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-1])
    assert "| optimiser steps | 1 |" in card(export.run(run, tmp_path / "out"))
    weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="step_000002: damaged: model/model.safetensors has another sha256"):
        export.run(run, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_export_takes_an_empty_directory_and_refuses_anything_that_it_would_overwrite(tmp_path):
    run, full, file, empty = (tmp_path / n for n in ("run", "full", "file", "empty"))
    make_run(run)
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for target in (full, file):
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            export.run(run, target)
    assert [p.name for p in full.iterdir()] == ["mine.txt"] and file.read_text() == "mine"
    assert (export.run(run, empty) / "model.safetensors").is_file()
    assert os.stat(empty).st_mode & 0o777 == 0o755 and os.stat(empty / "model.safetensors").st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", [".", "../here", ""])
def test_export_into_the_working_directory_is_refused_in_words_and_leaves_it_there(tmp_path, monkeypatch, name):
    run, here = make_run(tmp_path / "run"), tmp_path / "here"
    (run / "prompts.yaml").write_text(Prompts("Be brief.", {"iqa": "How sharp?", "iaa": "How fair?"}).to_yaml())
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=f"--output {name}: is the directory that you are in"):
        export.run(run, name)
    assert os.path.samefile(here, os.getcwd()) and not any(here.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "run"]
    assert (export.run(run, "out") / "model.safetensors").is_file()


def test_export_of_a_run_without_a_checkpoint_says_so_and_makes_nothing(tmp_path):
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no finished checkpoint"):
            export.run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": "much"}, "--shard-size much: expected a size such as 5GB"),
        ({"dtype": "int8"}, "--dtype int8: must be bfloat16 or float32"),
        ({"evaluation": "nowhere"}, "--evaluation nowhere: metrics.json is absent"),
    ],
)
def test_a_bad_option_is_said_and_nothing_is_left(tmp_path, options, message):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        export.run(run, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path):
    """A file is in the way of the last one: the weights are written by then."""
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step_000001" / "model" / "model.safetensors.d").mkdir()  # copyfile refuses a directory
    with pytest.raises(UserError, match="cannot write"):
        export.run(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"out: needs 1000000000\.0 GB, its disk has [0-9.]+ GB free"):
        export._require_room(tmp_path / "not" / "there" / "out", 10**18)
    export._require_room(tmp_path / "out", 1)


def test_export_to_a_place_that_cannot_be_written_is_said(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export.run(tmp_path / "run", tmp_path / "file" / "out")


def test_the_wording_goes_along_as_the_run_used_it(tmp_path):
    run = make_run(tmp_path / "run")
    used = Prompts("Be brief: «é».", {"iqa": "How sharp?\nSay why.", "iaa": "How fair?"})
    (run / "prompts.yaml").write_text(used.to_yaml())
    target = export.run(run, tmp_path / "out")
    assert Prompts.load(target / "prompts.yaml") == used
    assert "> Be brief: «é»." in card(target)


def test_the_card_follows_the_stages_back_and_names_no_place_of_this_machine(tmp_path):
    rows = [("iqa", "train")] * 3 + [("iaa", "train")] * 2 + [("iqa", "test")]
    same = {"score": 50.0, "image": "x"}
    write_manifest(
        tmp_path / "m.parquet",
        ({"sample_id": str(i), "task": t, "split": s, "dataset": f"our-{t}"} | same for i, (t, s) in enumerate(rows)),
    )
    data = [f"data.train=[{tmp_path}/m.parquet]", f"data.test=[{tmp_path}/m.parquet,{tmp_path}/gone.parquet]"]
    sft = make_run(tmp_path / "sft", "sft.global_batch=48", *data, stage="sft", steps=(5,))
    model = sft / "checkpoints" / "latest" / "model"
    grpo = make_run(tmp_path / "grpo", "reward.preset=binary", *data, steps=(8,), model=model)
    text = card(export.run(grpo, tmp_path / "out"))
    assert text.index("| SFT | |") < text.index("| optimiser steps | 5 |") < text.index("| rows a step | 48 |")
    assert text.index("| rows a step | 48 |") < text.index("| GRPO | |") < text.index("| optimiser steps | 8 |")
    assert "# An image scorer: tiny-qwen2_5-vl after SFT and GRPO" in text and "reward preset `binary`" in text
    assert "| our-iqa | iqa | train | 3 |" in text and "| our-iaa | iaa | train | 2 |" in text
    assert "| our-iqa | iqa | test | 1 |" in text and "any more when this card was written: gone.parquet." in text
    assert "None: no evaluation of this checkpoint was found." in text
    assert "The base model is the demo's" in text and "no person rated" not in text  # the data are the user's own
    assert str(tmp_path) not in text and str(TINY.parent) not in text


def test_a_card_names_the_sets_that_no_person_rated(tmp_path):
    rows = ({"sample_id": n, "task": n[-3:], "split": "train", "dataset": n} for n in ("our-iqa", "demo-iaa"))
    write_manifest(tmp_path / "m.parquet", (row | {"score": 1.0, "image": "x"} for row in rows))
    text = card(export.run(make_run(tmp_path / "run", f"data.train=[{tmp_path}/m.parquet]"), tmp_path / "out"))
    assert "**demo-iaa is of the demo: " in text and "that no person rated" in text


def test_only_a_demo_model_is_called_one_and_a_hub_name_is_the_base_model(tmp_path):
    run = make_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(TINY), "Qwen/Qwen2.5-VL-7B-Instruct"))
    text = card(export.run(run, tmp_path / "out"))
    assert "base_model: Qwen/Qwen2.5-VL-7B-Instruct\n" in text and "demo" not in text.split("## How to use")[0]
    assert "base_model" not in card(export.run(make_run(tmp_path / "tiny"), tmp_path / "other"))


def test_results_are_those_of_this_checkpoint_with_what_was_asked_and_parsed(tmp_path):
    run = make_run(tmp_path / "run", steps=(1, 2))
    first, second = (run / "checkpoints" / f"step_{i:06d}" / "model" for i in (1, 2))
    evaluate(tmp_path / "of_first", first, n_parsed=4)
    assert "no evaluation of this checkpoint" in card(export.run(run, tmp_path / "a"))
    evaluate(tmp_path / "of_second", run / "checkpoints" / "latest" / "model")
    row = "| koniq | 10 | 9 | 1 | 0.750 | — | 12.500 |"
    assert row in card(export.run(run, tmp_path / "b"))
    assert row in card(export.run(run, tmp_path / "c", evaluation=tmp_path / "of_second"))
    assert "| koniq | 10 | 4 | 1 |" in card(export.run(run, tmp_path / "d", step=1))
    with pytest.raises(UserError, match="--evaluation .*of_first: metrics.json is absent or not of .*step_000002"):
        export.run(run, tmp_path / "e", evaluation=tmp_path / "of_first")
    assert second.is_dir()


def test_an_evaluation_of_what_was_latest_before_does_not_count(tmp_path):
    run = make_run(tmp_path / "run", steps=(1,))
    found = evaluate(tmp_path / "eval", run / "checkpoints" / "latest" / "model")
    store = Checkpoints(run, CheckpointConfig(keep=9), Events(run))
    store.save(2, {"same": {"stage": "grpo", "model.path": str(TINY)}}, Learner(), {})
    store.finish()
    os.utime(found / "metrics.json", (1, 1))
    assert "no evaluation of this checkpoint" in card(export.run(run, tmp_path / "out"))


def test_without_an_evaluation_the_runs_own_last_measure_before_the_checkpoint_stands_there(tmp_path):
    run = make_run(tmp_path / "run", steps=(4,))
    lines = [{"step": i, "eval/koniq/srcc": i / 10, "eval/koniq/plcc": None} for i in (1, 3, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"step": 6, "ev')
    text = card(export.run(run, tmp_path / "out"))
    assert "by the run itself at step 4 (how many answers parsed is not recorded there)" in text
    assert "| koniq | 0.300 | — |" in text


def test_lines_of_metrics_that_are_no_steps_are_passed_over_and_a_data_sets_name_may_have_a_slash(tmp_path):
    run = make_run(tmp_path / "run", steps=(4,))
    rows = [{"step": 1, "eval/ours/sharp/srcc": 0.4, "eval/ours/sharp/plcc": 0.5, "eval/koniq/srcc": 0.2}]
    rows += [{"eval/koniq/srcc": 0.9}, ["eval/koniq/srcc"], 7, None, {"step": "2", "eval/koniq/srcc": 0.9}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = card(export.run(run, tmp_path / "out"))
    assert "| ours/sharp | 0.400 | 0.500 |" in text and "| koniq | 0.200 | — |" in text and "at step 2 " in text
