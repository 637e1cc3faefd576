"""`rationale template`: grounded texts from what is known, the same for a seed; an error where nothing is known."""

from itertools import product

import numpy as np
import pytest
import yaml
from rationale_cases import build_config, png

from tatar_dist.cli import main
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.make import make_crop
from tatar_dist.demo.data.texts import FAMILY_NAMES, iqa_rationale
from tatar_dist.errors import UserError
from tatar_dist.rationale import template
from tatar_dist.rationale.checks import check_text
from tatar_dist.rationale.wording import load_wording

KADID = [{"family": "lens_blur", "strength": 0.8}]


def row(sample_id="a", task="iqa", **meta):
    base = {"dataset": "d", "task": task, "image_bytes": png(0), "score": 40.0, "split": "train"}
    return {"sample_id": sample_id, **base, "meta": meta}


def templated(tmp_path, rows, seed=0, name="out"):
    write_manifest(tmp_path / "in.parquet", rows)
    template.run(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", seed)
    manifest = read_manifest(tmp_path / f"{name}.parquet")
    return [manifest.row(i) for i in range(len(manifest))]


def test_every_distortion_family_alone_and_beside_every_other_gives_a_text_that_passes_the_hard_checks():
    config = build_config().rationale
    wording = load_wording(config.prompts)
    rng = np.random.default_rng(0)
    for first, second in product(FAMILY_NAMES, [None, *FAMILY_NAMES]):
        for strength in (0.1, 0.9):
            known = [Distortion(first, strength)]
            known += [Distortion(second, strength)] if second not in (None, first) else []
            for score in (3.0, 97.0):
                text = iqa_rationale(tuple(known), "given", score, rng)
                assert check_text(text, "stop", "iqa", score, {}, config, wording) == [], text


def test_every_family_that_kadid_files_name_has_words():
    with open("configs/datasets.yaml", encoding="utf-8") as f:
        text = yaml.safe_load(f)
    names = next(v for k, v in _items(text) if k == "distortions" and isinstance(v, dict))
    assert len(names) == 25
    assert set(names.values()) <= set(FAMILY_NAMES)


def _items(node):
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _items(value)


def test_the_text_names_the_distortion_and_the_strongest_two_at_most(tmp_path):
    three = [{"family": f, "strength": s} for f, s in (("noise", 0.2), ("jpeg", 0.9), ("lens_blur", 0.5))]
    one, many = templated(tmp_path, [row("a", distortions=KADID), row("b", distortions=three)])
    assert "lens blur" in one["rationale"]
    assert "jpeg" in many["rationale"] and "lens blur" in many["rationale"] and "noise" not in many["rationale"]
    assert one["meta"]["distortions"] == KADID, "what is known of the row stays in it"


def test_demo_rows_of_both_tasks_get_texts_that_the_judge_would_be_asked_about(tmp_path):
    config = build_config().rationale
    wording = load_wording(config.prompts)
    crops = {task: make_crop(task, "train", 3, 0) for task in ("iqa", "iaa")}
    rows = [{**row(task, task, **c.meta), "score": c.score, "attributes": c.attributes} for task, c in crops.items()]
    for made in templated(tmp_path, rows):
        faults = check_text(made["rationale"], "stop", made["task"], made["score"], made["attributes"], config, wording)
        assert faults == []


def test_the_same_seed_gives_the_same_texts_whatever_stands_beside_a_row(tmp_path):
    rows = [row(f"r{i}", distortions=KADID) for i in range(12)]
    first = {r["sample_id"]: r["rationale"] for r in templated(tmp_path, rows)}
    assert {r["sample_id"]: r["rationale"] for r in templated(tmp_path, rows[::-2])}.items() <= first.items()
    assert [r["rationale"] for r in templated(tmp_path, rows, seed=1)] != list(first.values())
    assert len(set(first.values())) > 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("b"), "'b' has no distortions"),
        (row("b", distortions=[]), "'b' has no distortions"),
        (row("b", task="iaa"), "'b' has no attributes in meta"),
        (row("b", distortions=[{"family": "gausian_blur", "strength": 0.5}]), "no words for family 'gausian_blur'"),
        (row("b", distortions=[{"family": "noise", "strength": 3}]), "0.strength=3: must be at most 1"),
        (row("b", distortions=[{"family": "noise"}]), "missing key '0.strength'"),
        (row("b", task="iaa", attributes={"colour": 0.5}), "missing key 'contrast'"),
    ],
)
def test_a_row_of_which_nothing_usable_is_known_is_named_and_nothing_is_written(tmp_path, bad, said):
    with pytest.raises(UserError, match="row 1") as e:
        templated(tmp_path, [row("a", distortions=KADID), bad] if bad["task"] == "iqa" else [*_iaa_first(), bad])
    assert said in str(e.value)
    assert not (tmp_path / "out.parquet").exists()


def _iaa_first():
    return [row("a", task="iaa", attributes={name: 0.5 for name in template.ATTRIBUTES})]


def test_the_command_says_what_it_wrote_and_what_to_do_where_nothing_is_known(tmp_path, capsys):
    write_manifest(tmp_path / "m.parquet", [row("a", distortions=KADID)])
    assert main(["rationale", "template", f"{tmp_path}/m.parquet", "--output", f"{tmp_path}/r.parquet"]) == 0
    assert "1 rows with rationales" in capsys.readouterr().out
    write_manifest(tmp_path / "m.parquet", [row("a")])
    assert main(["rationale", "template", f"{tmp_path}/m.parquet", "--output", f"{tmp_path}/r.parquet"]) == 2
    assert "tatar-dist rationale build" in capsys.readouterr().err
