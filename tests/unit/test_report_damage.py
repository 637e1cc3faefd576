"""The page of a run whose files are damaged or hostile: it stands, names the damage, and runs nothing."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
from report_pages import (
    BREAKOUT,
    HOSTILE,
    SCRIPT,
    Page,
    evaluation,
    grpo_rows,
    lines,
    one_row_manifest,
    predictions,
    report,
    rollouts,
    scores,
    sft_rows,
)

from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.report.html import write

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


@pytest.mark.parametrize("section", ["data", "grpo", "reward"])
def test_a_section_of_another_type_is_named_and_the_rest_of_the_page_stands(tmp_path, section):
    run = lines(tmp_path / "run", grpo_rows())
    rollouts(
        run, [{"sample_id": name, "completion": "<think>a</think><answer>50.00</answer>"} for name in ("s1", "s2")]
    )
    (run / "config.yaml").write_text(json.dumps({section: "foo", "seed": 0}))
    page = report(run)
    assert page.notes == [f"run/config.yaml: {section} is not a mapping and was left out"]
    assert "How it went" in page.sections


def test_metrics_that_are_no_mapping_are_left_out(tmp_path):
    run = evaluation(lines(tmp_path / "mine", sft_rows()), {"set-iqa": scores()}, predictions())
    for datasets in (3, {"set-iqa": 3}):
        (run / "metrics.json").write_text(json.dumps({"datasets": datasets}))
        assert "How it went" in report(run).sections


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


def one_byte_changed(file, text: bytes) -> None:
    """Write the Parquet file again without compression, and make the first byte of the last `text` in it no UTF-8."""
    pq.write_table(pq.read_table(file), file, compression="none", use_dictionary=False, write_statistics=False)
    data = bytearray(file.read_bytes())
    at = data.rindex(text)
    data[at] = 0xFF
    file.write_bytes(data)


def page_destroyed(file, column: str) -> None:
    """The footer stays valid, the pages of one column do not."""
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(data)


def ruin(how: str, file, column: str, text: str) -> None:
    if how == "byte":
        one_byte_changed(file, text.encode())
    else:
        page_destroyed(file, column)


@pytest.mark.parametrize("how", ["byte", "page"])
def test_predictions_with_a_valid_footer_and_a_damaged_page_are_named(tmp_path, how):
    run = evaluation(lines(tmp_path / "mine", sft_rows()), {"set-iqa": scores()}, predictions())
    ruin(how, run / "predictions.parquet", "completion", "<think>view number 3")
    page = report(run)
    assert len(page.notes) == 1 and page.notes[0].startswith("mine/predictions.parquet could not be read: ")
    assert "How it went" in page.sections


@pytest.mark.parametrize("how", ["byte", "page"])
@pytest.mark.parametrize("column", ["completion", "finish_reason"])
def test_rollouts_with_a_valid_footer_and_a_damaged_page_are_named_once(tmp_path, how, column):
    run = lines(tmp_path / "mine", grpo_rows())
    row = {
        "sample_id": "s",
        "group_id": "g",
        "completion": "it is good <answer>50.00</answer>",
        "finish_reason": "stop",
    }
    rollouts(run, [row | {"index": i} for i in range(4)])
    ruin(
        how, run / "rollouts" / "step_000009.parquet", column, {"completion": "it is", "finish_reason": "stop"}[column]
    )
    page = report(run)
    assert len(page.notes) == 1 and page.notes[0].startswith("rollouts/step_000009.parquet could not be read: ")
    assert "GRPO, 10 steps" in page.text


@pytest.mark.parametrize("column", ["image_bytes", "sample_id"])
def test_a_manifest_with_a_valid_footer_and_a_damaged_page_costs_only_the_pictures(tmp_path, column, monkeypatch):
    if column == "sample_id":  # of a large manifest the rows are not read before
        monkeypatch.setattr("tatar_dist.data.manifest.TRUSTED_ROWS", 0)
    manifest = one_row_manifest(tmp_path, "s1")
    page_destroyed(manifest, column)
    run = lines(tmp_path / "run", grpo_rows())
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [str(manifest)]}}))
    rollouts(run, [{"sample_id": "s1", "completion": "<answer>50.00</answer>"}])
    page = report(run)
    assert not page.of("img") and "no picture" in page.text
    assert len(page.notes) == 1 and "train.parquet could not be read: " in page.notes[0]


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
    manifest = one_row_manifest(tmp_path, HOSTILE)
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


def test_hostile_sets_stages_and_gains_of_a_demo_are_text(tmp_path):
    evaluation(tmp_path / "grpo_eval", {HOSTILE: scores(0.5)})
    summary = {
        "stages": [{"name": HOSTILE, "seconds": 1.0, "budget_seconds": HOSTILE, "reused": False}],
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
