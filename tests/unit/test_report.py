"""The report page: whatever a run left behind is shown, nothing is fetched or run, and no text of a model is markup."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tatar_dist.data.manifest import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.report.html import write

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror=alert(2)>'
HOSTILE = SCRIPT + BREAKOUT + "' onmouseover=alert(3) {{ 7 * 7 }}</style></details>"
EXECUTING = {"script", "iframe", "object", "embed", "link", "base", "form", "input", "foreignobject", "use", "image"}
FETCHING = {"src", "href", "xlink:href", "srcset", "action", "poster", "data", "background", "formaction"}


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside <style>, as a browser would read them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.styles, self.texts, self._open = "", [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.styles += data
        else:
            self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]

    @property
    def sections(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    @property
    def notes(self) -> list[str]:
        return re.findall(r"<p>Left out: (.*?)</p>", self.source)


def assert_safe(page: Page) -> None:
    """Nothing that runs, nothing that loads."""
    for tag, attributes in page.tags:
        assert tag not in EXECUTING, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in FETCHING or value.startswith("data:image/"), (tag, name, value)
            assert "javascript:" not in (value or "").lower()
    css = page.styles + " ".join(a.get("style") or "" for _, a in page.tags)
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src" not in policy


def report(directory: Path) -> Page:
    file = write(directory)
    assert file == directory / "report.html"
    page = Page(file)
    assert_safe(page)
    return page


def png(color: tuple[int, int, int] = (10, 200, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def lines(directory: Path, rows: list[dict], name: str = "metrics.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def sft_rows(n: int = 12) -> list[dict]:
    rows = [{"step": i, "loss/total": 2.0 - 0.1 * i, "optim/grad_norm": 1.0, "time/step": 0.5} for i in range(n)]
    for i in (5, 11):
        rows[min(i, n - 1)] |= {"eval/loss/iqa": 1.5 - 0.05 * i, "eval/loss/iaa": 1.7 - 0.05 * i}
    return rows


def grpo_rows(n: int = 10) -> list[dict]:
    return [
        {
            "step": i,
            "reward/total/iqa": 1.0 + 0.1 * i,
            "reward/gaussian/iqa": 0.3 + 0.05 * i,
            "reward/total/iaa": 1.2,
            "reward/thurstone/iaa": 0.5,
            "reward/frac_zero_std/total/iqa": 0.1,
            "completion/tokens/iqa": 40.0,
            "completion/parse_failures/iqa": 0.0,
            "loss/kl": 0.001 * i,
            "loss/total": 0.0,
            "policy/entropy": 1.0,
            "optim/grad_norm": 0.4,
            "sync/logprob_gap": 1e-7,
            "time/step": 4.0,
            "time/generate": 3.0,
            "time/learn": 0.9,
        }
        for i in range(n)
    ]


def rollouts(directory: Path, rows: list[dict], step: int = 9) -> None:
    (directory / "rollouts").mkdir(parents=True, exist_ok=True)
    base = {"step": step, "index": 0, "dataset": "set-iqa", "task": "iqa", "target": 50.0, "reward": 1.0}
    pq.write_table(pa.Table.from_pylist([base | r for r in rows]), directory / "rollouts" / f"step_{step:06d}.parquet")


def predictions(
    n: int = 10, dataset: str = "set-iqa", task: str = "iqa", prefix: str = "", off: float = 3.0
) -> list[dict]:
    return [
        {
            "sample_id": f"{prefix}{i}",
            "dataset": dataset,
            "task": task,
            "source": f"photo_{i % 2}",
            "target": 10.0 * i,
            "prediction": min(100.0, 10.0 * i + off),
            "completion": f"<think>view number {i} of {dataset}</think><answer>{10 * i + off}</answer>",
            "truncated": False,
        }
        for i in range(n)
    ]


def scores(srcc: float | None = 0.9, **changes) -> dict:
    return {"n": 10, "n_parsed": 10, "srcc": srcc, "plcc": 0.8, "mae": 3.0, "reason": {}} | changes


def evaluation(directory: Path, datasets: dict[str, dict], rows: list[dict] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps({"model": "m", "datasets": datasets}))
    if rows is not None:
        pq.write_table(pa.Table.from_pylist(rows), directory / "predictions.parquet")
    return directory


def demo(directory: Path) -> Path:
    """A finished demo: three evaluations, two trainings, stages and gains."""
    lines(directory / "sft", sft_rows())
    lines(directory / "grpo", grpo_rows())
    for name, srcc, off in (("baseline", None, 40.0), ("sft_eval", 0.7, 20.0), ("grpo_eval", 0.9, 3.0)):
        rows = predictions(16, "demo-iqa", "iqa", "q", off) + predictions(16, "demo-iaa", "iaa", "a", off)
        evaluation(directory / name, {"demo-iqa": scores(srcc), "demo-iaa": scores(srcc)}, rows)
    pictures = [
        {
            "sample_id": f"q{i}",
            "dataset": "demo-iqa",
            "task": "iqa",
            "image_bytes": png(),
            "score": 10.0,
            "split": "test",
        }
        for i in range(16)
    ]
    (directory / "data").mkdir()
    write_manifest(directory / "data" / "iqa_test.parquet", pictures)
    summary = {
        "stages": [
            {"name": "sft", "seconds": 70.0, "budget_seconds": 60.0, "reused": False},
            {"name": "grpo_eval", "seconds": 0.0, "budget_seconds": 30.0, "reused": True},
        ],
        "gains": {"iqa": {"srcc": [0.2, 0.1, 0.3], "reward_gaussian": [0.01, -0.1, 0.12]}},
        "table": [],
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


# What is shown ------------------------------------------------------------------------------------------------------


def test_a_supervised_run_shows_its_loss_and_its_health_and_leaves_out_the_rest(tmp_path):
    page = report(lines(tmp_path / "mine", sft_rows()))
    assert "SFT · mine" in page.text and page.of("title") and "SFT, 12 steps" in page.text
    assert page.sections == ["Is it healthy?", "How it went"]
    assert "SFT loss and gradients finite: at every step" in page.text
    assert "Held-out loss (quality): 1.25 → 0.95." in page.text
    assert page.notes == [] and not page.of("img")


def test_a_grpo_run_shows_rewards_policy_times_and_what_it_said_last(tmp_path):
    lines(tmp_path, grpo_rows())
    rollouts(tmp_path, [{"sample_id": "old", "completion": "<answer>1.00</answer>"}], step=3)
    said = "<think>a dull view</think><answer>52.00</answer>"
    rollouts(tmp_path, [{"sample_id": "s1", "completion": said}, {"sample_id": "s1", "completion": "second"}], step=9)
    page = report(tmp_path)
    assert page.sections == ["Is it healthy?", "How it went", "What it says"]
    for title in ("Reward, quality", "Reward, aesthetics", "Completion length", "Policy", "Step time"):
        assert title in page.text
    assert "a dull view" in page.text and "second" not in page.text and "<dd>1.0</dd>" not in page.source
    assert "Engines and learners hold the same weights: largest gap 1e−7 nats" in page.text
    assert len(page.of("svg")) >= 6


def test_pictures_of_a_run_come_from_the_manifest_that_its_config_names(tmp_path):
    manifest = tmp_path / "train.parquet"
    row = {
        "sample_id": "s1",
        "dataset": "set-iqa",
        "task": "iqa",
        "image_bytes": png(),
        "score": 50.0,
        "split": "train",
    }
    write_manifest(manifest, [row])
    run = lines(tmp_path / "run", grpo_rows())
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [str(manifest)]}, "grpo": {"group_size": 8}}))
    rollouts(run, [{"sample_id": s, "completion": "<answer>50.00</answer>"} for s in ("s1", "s2")])
    page = report(run)
    (image,) = page.of("img")
    assert image["src"].startswith("data:image/png;base64,") and image["alt"] == "held-out image s1"
    assert "no picture" in page.text  # s2 is not in the manifest
    assert "GRPO completions a prompt 8" in page.text


def test_an_evaluation_shows_scores_scatter_photographs_and_answers(tmp_path):
    rows = predictions(20) + predictions(20, "set-iaa", "iaa", "b")
    page = report(evaluation(tmp_path, {"set-iqa": scores(0.91), "set-iaa": scores(0.5)}, rows))
    assert page.sections == ["Is it healthy?", "Where it is wrong", "What it says"]
    assert "Held-out scores: quality SRCC 0.91, aesthetics SRCC 0.50" in page.text
    assert "By source photograph" in page.text and "photo 1" in page.text
    assert "view number 3 of set-iqa" in page.text


def test_an_evaluation_without_predictions_shows_its_table_alone(tmp_path):
    page = report(evaluation(tmp_path, {"set-iqa": scores(0.91)}))
    assert page.sections == ["Is it healthy?"] and "0.910" in page.text


def test_a_demo_tells_what_was_learned_changed_and_spent(tmp_path):
    page = report(demo(tmp_path / "demo"))
    assert page.sections == [
        "What GRPO changed",
        "Is it healthy?",
        "How it went",
        "Where it is wrong",
        "What it says",
        "Time",
    ]
    assert "It learned to score quality and aesthetics" in page.text
    assert "quality none → 0.90" in page.text
    assert "+0.200 rose" in page.text and "+0.010 no clear change" in page.text
    assert "70 s in all, of a budget of 90 s" in page.text and "reused" in page.text
    assert {a["alt"][:16] for a in page.of("img")} == {"held-out image q"}
    assert page.notes == []


def test_a_demo_that_was_stopped_halfway_shows_the_stages_that_ran(tmp_path):
    evaluation(tmp_path / "baseline", {"demo-iqa": scores(0.1)}, predictions(10, "demo-iqa"))
    lines(tmp_path / "sft", sft_rows(3))
    page = report(tmp_path)
    assert "Demo ·" in page.text and "Time" not in page.sections and "What GRPO changed" not in page.sections
    assert "Held-out scores: quality SRCC 0.10" in page.text


def test_a_demo_whose_evaluations_were_cleaned_away_is_shown_from_its_summary(tmp_path):
    table = [{"model": m, "task": "iqa", **scores(v)} for m, v in (("base", 0.1), ("sft", 0.6), ("grpo", 0.8))]
    (tmp_path / "summary.json").write_text(json.dumps({"table": table}))
    page = report(tmp_path)
    assert "quality 0.10 → 0.80" in page.text and "0.600" in page.text


def test_a_run_of_one_step_has_a_page(tmp_path):
    assert "SFT, 1 step" in report(lines(tmp_path / "a", [{"step": 0, "loss/total": 2.0}])).text
    assert "GRPO, 1 step" in report(lines(tmp_path / "b", grpo_rows(1))).text


def test_writing_again_replaces_the_page_and_leaves_nothing_beside_it(tmp_path):
    lines(tmp_path, sft_rows(2))
    report(tmp_path)
    lines(tmp_path, sft_rows(3))
    assert "SFT, 3 steps" in report(tmp_path).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_page_of_a_harmless_run_names_no_address_on_the_web(tmp_path):
    source = report(demo(tmp_path / "demo")).source
    assert "//" not in re.sub('"data:image/[^"]*"', "", source)


# Figures that are no numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [float("nan"), None])
def test_a_rank_correlation_that_is_no_number_is_a_dash_with_its_reason(tmp_path, absent):
    bad = scores(absent, reason={"srcc": "all predictions are equal"})
    page = report(evaluation(tmp_path, {"set-iqa": bad, "set-iaa": scores(0.5)}))
    (dash,) = [a for a in page.of("span") if a.get("class") == "na"]
    assert dash["title"] == "all predictions are equal"
    assert page.source.count(">—</span>") == 1 and "0.500" in page.text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page.source, flags=re.DOTALL).lower()


def test_without_any_rank_correlation_the_page_says_why(tmp_path):
    bad = scores(None, n_parsed=0, plcc=None, mae=None, reason={"srcc": "no usable row"})
    page = report(evaluation(tmp_path, {"set-iqa": bad}))
    assert "No rank correlation could be computed: no usable row." in page.text
    assert "Held-out answers without a score (this model): 10 of 10" in page.text


def test_a_loss_that_is_no_number_fails_a_check_and_draws_no_point(tmp_path):
    rows = sft_rows()
    rows[4]["loss/total"] = float("nan")
    rows[5]["loss/total"] = float("inf")
    rows[6]["loss/total"] = None  # how a run writes the two above
    page = report(lines(tmp_path, rows))
    assert "SFT loss and gradients finite: not at 3 steps" in page.text
    assert all("nan" not in a["d"].lower() and "inf" not in a["d"].lower() for a in page.of("path"))


@pytest.mark.parametrize("rows", [sft_rows, grpo_rows])
def test_a_run_whose_metrics_are_all_null_has_a_page(tmp_path, rows):
    names = {k for r in rows() for k in r if k != "step"} | {"eval/set-iqa/srcc"}
    page = report(lines(tmp_path, [{"step": i, **dict.fromkeys(names)} for i in range(6)]))
    assert "loss and gradients finite: not at 6 steps" in page.text and not page.notes
    assert "None" not in page.text


def test_an_answer_without_a_score_is_counted_among_the_worst(tmp_path):
    rows = predictions(10)
    rows[7] |= {"prediction": None, "completion": "I would rather not say"}
    page = report(evaluation(tmp_path, {"set-iqa": scores(n_parsed=9)}, rows))
    worst = page.text[page.text.index("Furthest from the target") :]
    assert "I would rather not say" in worst and "this model none" in worst


# Damage -------------------------------------------------------------------------------------------------------------


def test_a_damaged_line_of_metrics_is_named_and_the_others_are_shown(tmp_path):
    text = [json.dumps(r) for r in sft_rows(5)]
    text[1] = text[1][:20]
    run = tmp_path / "mine"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(text) + "\n")
    page = report(run)
    assert page.notes == ["mine/metrics.jsonl: line 2 is not JSON and was left out"]
    assert "SFT, 4 steps" in page.text


def test_a_last_line_torn_by_a_crash_is_left_out_without_a_word(tmp_path):
    lines(tmp_path, sft_rows(4))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "loss/to')
    page = report(tmp_path)
    assert page.notes == [] and "SFT, 4 steps" in page.text


@pytest.mark.parametrize("name", ["predictions.parquet", "config.yaml", "metrics.json"])
def test_a_damaged_file_is_named_and_the_rest_of_the_page_stands(tmp_path, name):
    run = evaluation(lines(tmp_path / "mine", sft_rows()), {"set-iqa": scores()}, predictions())
    (run / name).write_bytes(b"{not: [closed")
    page = report(run)
    assert len(page.notes) == 1 and name in page.notes[0]
    assert "How it went" in page.sections


def test_a_damaged_manifest_and_an_undecodable_picture_cost_only_the_pictures(tmp_path):
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    row = {
        "sample_id": "s1",
        "dataset": "set-iqa",
        "task": "iqa",
        "image_bytes": b"no",
        "score": 50.0,
        "split": "train",
    }
    write_manifest(good, [row])
    bad.write_text("not parquet")
    run = lines(tmp_path / "run", grpo_rows())
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [str(good), str(bad)]}}))
    rollouts(run, [{"sample_id": "s1", "completion": "<answer>50.00</answer>"}])
    page = report(run)
    assert not page.of("img") and "no picture" in page.text
    assert any("bad.parquet: not a Parquet file" in n for n in page.notes)
    assert any("s1: cannot decode image" in n for n in page.notes)


def test_a_directory_without_a_run_is_an_error_and_gets_no_page(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        write(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    lines(tmp_path, sft_rows(2))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html: cannot be written"):
        write(tmp_path)


# Hostile texts ------------------------------------------------------------------------------------------------------


def assert_shown_as_text(page: Page, *, least: int = 1) -> None:
    assert "<script" not in page.source and "<img src=x" not in page.source
    assert "onerror" not in {name for _, a in page.tags for name in a}
    assert page.source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= least
    assert "{{ 7 * 7 }}" in page.source


def test_hostile_completions_and_sample_ids_of_a_grpo_run_are_text(tmp_path):
    manifest = tmp_path / "train.parquet"
    row = {
        "sample_id": HOSTILE,
        "dataset": "set-iqa",
        "task": "iqa",
        "image_bytes": png(),
        "score": 50.0,
        "split": "train",
    }
    write_manifest(manifest, [row])
    run = lines(tmp_path / "run", grpo_rows())
    (run / "config.yaml").write_text(
        json.dumps({"data": {"train": [str(manifest)]}, "reward": {"preset": HOSTILE}, "grpo": {"group_size": HOSTILE}})
    )
    long = f"<think>{HOSTILE} {'word ' * 60}{HOSTILE}</think><answer>50.00</answer>"
    rollouts(run, [{"sample_id": HOSTILE, "completion": long}, {"sample_id": "s2", "completion": HOSTILE}])
    lines(run, [{"sample_id": HOSTILE, "manifest": "m", "reason": HOSTILE}], "quarantine.jsonl")
    page = report(run)
    (image,) = page.of("img")
    assert image["alt"] == f"held-out image {HOSTILE}"
    assert_shown_as_text(page, least=7)  # alt, think text twice, bare completion, quarantine twice, facts


def test_hostile_names_of_metrics_data_sets_photographs_and_reasons_are_text(tmp_path):
    rows = [{"step": i, f"reward/{BREAKOUT}{{{{ 7 * 7 }}}}/iqa": 0.5, "reward/total/iqa": 1.0} for i in range(6)]
    lines(tmp_path, [r | {f"eval/{SCRIPT}/srcc": 0.1, f"eval/a{BREAKOUT}/srcc": 0.5} for r in rows])
    names = (HOSTILE, "other-iqa")
    found = [p | {"source": f"{HOSTILE}{p['source']}"} for n in names for p in predictions(20, n, "iqa", n)]
    evaluation(tmp_path, {n: scores(None, reason={"srcc": HOSTILE}) | {"plcc": 0.1} for n in names}, found)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["datasets"]["other-iqa"]["srcc"] = 0.4  # so that the table with its reasons is there
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = report(tmp_path)
    assert_shown_as_text(page, least=4)
    assert HOSTILE in [a.get("title") for a in page.of("span")]
    assert any(HOSTILE in (a.get("aria-label") or "") for a in page.of("svg"))
    assert "By source photograph" in page.text


def test_hostile_models_stages_and_gains_of_a_summary_are_text(tmp_path):
    table = [{"model": m, "task": HOSTILE, **scores(0.5)} for m in (HOSTILE, "grpo")]
    summary = {
        "table": table,
        "stages": [{"name": HOSTILE, "seconds": 1.0, "budget_seconds": HOSTILE}],
        "gains": {HOSTILE: {HOSTILE: [0.1, 0.0, 0.2]}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert_shown_as_text(report(tmp_path), least=4)


def test_a_hostile_directory_name_is_text(tmp_path):
    run = tmp_path / '"><img src=x onerror=alert(1)> {{ 7 * 7 }}'
    lines(run, [*sft_rows(2), *sft_rows(1)])
    (run / "metrics.jsonl").write_text("not json\n" + (run / "metrics.jsonl").read_text())  # the note names it too
    page = report(run)
    assert "<img" not in page.source and page.source.count("&lt;img src=x") == 3


def test_control_and_direction_characters_of_a_completion_are_dropped(tmp_path):
    lines(tmp_path, grpo_rows())
    rollouts(tmp_path, [{"sample_id": "s", "completion": "a\x00b\x1b[31mc\u202ed\u2066e"}])
    page = report(tmp_path)
    assert "ab[31mcde" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page.source)


def test_an_endless_completion_is_cut_on_the_page(tmp_path):
    lines(tmp_path, grpo_rows())
    rollouts(tmp_path, [{"sample_id": "s", "completion": "word " * 100_000}])
    assert len(report(tmp_path).source) < 60_000


def test_answers_of_two_data_sets_with_the_same_sample_ids_are_not_mixed_up(tmp_path):
    quality, aesthetics = predictions(4, off=0.0), predictions(4, "set-iaa", "iaa", off=0.0)
    for p in aesthetics:
        p["target"] = p["prediction"] = p["target"] + 55.0
    page = report(evaluation(tmp_path, {"set-iqa": scores(), "set-iaa": scores()}, quality + aesthetics))
    pairs = re.findall(
        r'class="target">([\d.]+)</dd>\s*<dt class="final">.*?<dd class="final">([\d.]+)</dd>', page.source
    )
    assert len(pairs) >= 6 and all(target == score for target, score in pairs)
