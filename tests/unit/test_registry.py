"""The registry of data sets: what it says, how it is checked, new sets by YAML alone."""

import json

import pytest

from tatar_dist.cli import main
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.registry import Range, read_registry
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS

# METHOD.md, section 2: task, test images, scale of the lists
PUBLISHED = {
    "KonIQ-10k": ("iqa", 2015, (0, 100)),
    "SPAQ": ("iqa", 2224, (0, 100)),
    "KADID-10k": ("iqa", 2000, (1, 5)),
    "PIPAL": ("iqa", 4640, (1, 5)),
    "ArtiMuse-10K": ("iaa", 1002, (0, 10)),
    "AVA": ("iaa", 19930, (1, 10)),
    "TAD66K": ("iaa", 14079, (0, 10)),
    "FLICKR-AES": ("iaa", 4737, (0, 1)),
}

MINE = """
datasets:
  Mine:
    task: iaa
    in_domain: true
    url: https://example.org
    terms: mine
    counts: {total: 2}
    list_range: [0, 20]
    split: {by: image, fractions: {train: 1}, official: none}
    formats:
      table: {kind: csv, columns: [file, points], image: file, score: points, range: [0, 50], source: own}
"""


def written(tmp_path, text, name="mine.yaml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_the_eight_sets_say_what_was_published():
    sets = read_registry().datasets
    assert {n: (d.task, d.counts["test"]) for n, d in sets.items()} == {n: p[:2] for n, p in PUBLISHED.items()}
    for name, (_, _, scale) in PUBLISHED.items():
        assert sets[name].formats["list"].range == Range(*scale)
    assert [n for n, d in sets.items() if d.in_domain] == ["KonIQ-10k", "ArtiMuse-10K"]


def test_a_set_of_ones_own_says_its_task_and_columns_and_no_more(tmp_path):
    text = """
datasets:
  Mine:
    task: iqa
    formats:
      table: {kind: csv, columns: [file, points], image: file, score: points, range: [0, 50]}
"""
    mine = read_registry([written(tmp_path, text)]).find("mine")
    assert (mine.in_domain, mine.url, mine.split.official) == (False, "", "")
    assert mine.split.fractions == {"train": 0.7, "validation": 0.1, "test": 0.2}


def test_every_format_names_its_source_and_reads_columns_it_has():
    for dataset in read_registry().datasets.values():
        assert dataset.url.startswith("https://") and dataset.split.official and dataset.terms
        for fmt in dataset.formats.values():
            assert fmt.source and fmt.image in fmt.used() and set(fmt.used()) <= set(fmt.columns)
            assert fmt.score or fmt.votes


def test_a_published_test_group_counts_as_many_images_as_published():
    sets = read_registry().datasets
    assert len(sets["KADID-10k"].split.test) * 125 == 2000  # 25 distortions at 5 levels
    assert len(sets["PIPAL"].split.test) * 116 == 4640
    assert len(sets["KADID-10k"].names.distortions) == 25


@pytest.mark.parametrize("name", ["KonIQ-10k", "koniq10k", "KONIQ_10K", "koniq-10k"])
def test_a_set_is_found_in_any_case_with_or_without_hyphens(name):
    assert read_registry().find(name).name == "KonIQ-10k"


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(UserError, match="konic10k: no such data set; did you mean 'KonIQ-10k'"):
        read_registry().find("konic10k")


def test_a_new_set_needs_yaml_only(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("file,points\na.jpg,25\nb.jpg,50\n")
    (tmp_path / "l.json").write_text('[{"image": "a.jpg", "gt_score": 5}]')
    mine = written(tmp_path, MINE)
    for file, scores in (("t.csv", [50, 100]), ("l.json", [25])):
        command = ["data", "import", "mine", "--registry", str(mine), "--annotations", str(tmp_path / file)]
        command += ["--images", str(tmp_path), "--no-check-images", "--output", str(tmp_path / "m.parquet"), "--json"]
        assert main(command) == 0
        report = json.loads(capsys.readouterr().out)
        assert (
            report["dataset"] == "Mine" and report["score"]["q0"] == scores[0] and report["score"]["q1"] == scores[-1]
        )


def test_later_files_add_sets_and_replace_them_whole(tmp_path):
    other = MINE.replace("Mine:", "koniq10k:").replace("[0, 20]", "[0, 7]")
    registry = read_registry([written(tmp_path, MINE), written(tmp_path, other, "b.yaml")])
    assert len(registry.datasets) == 9
    assert registry.find("KonIQ-10k").formats["list"].range == Range(0, 7)
    assert "distributions-sets" not in registry.find("koniq10k").formats


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("task: iaa", "taks: iaa", "unknown key 'datasets.Mine.taks'; did you mean 'task'?"),
        ("task: iaa", "task: vqa", "datasets.Mine.task='vqa': must be one of iqa, iaa"),
        ("    task: iaa\n", "", "missing key 'datasets.Mine.task'"),
        ("in_domain: true", "in_domain: maybe", "in_domain='maybe': must be a valid boolean"),
        ("score: points", "score: point", "score names 'point', not one of columns; did you mean 'points'?"),
        ("score: points, ", "", "needs score (a column) or votes"),
        ("range: [0, 50]", "range: [50, 0]", "range: [50, 0] is not a scale; write [lowest, highest]"),
        ("range: [0, 50]", "range: 50", "range: must be [lowest, highest], is 50"),
        ("range: [0, 50]", "range: [0, .inf]", "range.high=inf: must be a finite number"),
        ("kind: csv", "kind: cvs", "kind.0='cvs': must be one of csv, xlsx, json, jsonl, text"),
        ("kind: csv", "kind: text", "columns of kind text must be a mapping"),
        ("{train: 1}", "{train: 0.5}", "must be shares that add up to 1"),
        ("{train: 1}", "{tarin: 1}", "split.fractions.tarin: must be one of train, validation, test"),
        ("by: image", "by: reference", "by reference needs names with a pattern"),
        ("source: own", "source: own, image_pattern: x", "image_pattern 'x' must hold {} once"),
        ("source: own", "source: own, better: more", "better='more': must be one of higher, lower"),
        ("counts: {total: 2}", "counts: {total: -2}", "counts.total=-2: must not be negative"),
        ("    url:", "    names: {pattern: '('}\n    url:", "pattern is not a regular expression"),
        ("    url:", "    names: {pattern: x}\n    url:", "pattern needs a group (?P<reference>"),
        ("    terms: mine", "    terms: mine\n    terms: yours", "key 'terms' is given twice"),
        ("datasets:", "dataset:", "unknown key 'dataset'; did you mean 'datasets'?"),
        ("counts: {total: 2}", "counts: {total: 2", "not valid YAML"),
        ("task: iaa", "? [a]\n    : task", "not valid YAML"),
        ("terms: mine", "terms: 2024-13-45", "not valid YAML"),
        ("counts: {total: 2}", "counts: {total: 0x" + "f" * 20 + "}", "the number is too large"),
        ("official: none}", "official: none, test: 5}", "split.test=5: must be a list"),
        ("official: none}", "official: none, test: null}", "split.test=None: must be a list"),
        ("official: none}", "official: none, test: [08, 010]}", "split.test.1=8: must be text; put it in quotes"),
        ("source: own", "source: own, std: {range: [1, 5]}", "missing key 'datasets.Mine.formats.table.std.column'"),
        ("source: own", "source: own, std: {column: points}", "missing key 'datasets.Mine.formats.table.std.range'"),
        (
            "source: own",
            "source: own, split: {values: {a: test}}",
            "missing key 'datasets.Mine.formats.table.split.column'",
        ),
        (
            "source: own",
            "source: own, split: {column: points, values: {}}",
            "split.values={}: must hold at least 1 value",
        ),
        ("source: own", "source: own, votes_total: points", "votes_total needs votes"),
        ("source: own", "source: own, votes: {points: 1}", "column points has two meanings"),
        ("source: own", "source: own, separator: ';'", "separator goes with kind text"),
        ("score: points, ", "votes: {points: 51}, ", "votes: points: 51 is outside the range 0–50"),
        ("kind: csv", "kind: []", "kind=[]: must hold at least 1 value"),
        ("[file, points]", "[file, points, no]", "columns: False must be text; put it in quotes"),
        ("[file, points]", "[file, points, ' x']", "is not a name"),
        ("[file, points]", "[file, points, file]", "columns: 'file' is given twice"),
        ("range: [0, 50]", "range: [0, 1.0e-320]", "is not a scale"),
        ("range: [0, 50]", "range: [-1.0e+308, 1.0e+308]", "is not a scale"),
        (
            "    url:",
            "    names: {pattern: '(?P<reference>.)', levels: true}\n    url:",
            "names.levels: must be a number, is True",
        ),
        ("    url:", "    names: {pattern: '(?u)(?P<reference>.)'}\n    url:", "pattern is not a regular expression"),
        ("datasets:", "list_formats: {own: [3]}\ndatasets:", "list_formats.own=[3]: must be a mapping"),
        ("datasets:", "list_formats: {own: {range: [0, 1]}}\ndatasets:", "unknown key 'list_formats.own.range'"),
        ("  Mine:", "  m-i-n-e: {}\n  Mine:", "missing key 'datasets.m-i-n-e.task'"),
    ],
)
def test_a_wrong_entry_names_its_place_and_the_nearest_key(old, new, told, tmp_path):
    assert old in MINE
    file = written(tmp_path, MINE.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_registry([file])
    line = str(caught.value)
    assert line.startswith(str(file)) and told in line and "\n" not in line


def test_one_name_twice_in_a_file_is_refused(tmp_path):
    entry = MINE.partition("  Mine:\n")[2]
    with pytest.raises(UserError, match="Mine and M-INE are one name"):
        read_registry([written(tmp_path, MINE + "  M-INE:\n" + entry)])


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("I1_01_x.png", "Mine has no level x"),
        ("I1_01_9.png", "Mine has no level 9"),
        ("I1_01_0.png", "Mine has no level 0"),
        ("I1_01_.png", "Mine has no level"),
        ("I1_07_1.png", "Mine has no distortion type 07"),
        ("_01_1.png", "is not named as Mine names its images"),
    ],
)
def test_a_level_that_is_none_is_a_bad_row(image, told, tmp_path):
    names = (
        r"names: {pattern: '(?P<reference>\w*?)_(?P<type>\d+)_(?P<level>\w*)', levels: 2, distortions: {'01': blur}}"
    )
    mine = read_registry([written(tmp_path, MINE.replace("    url:", f"    {names}\n    url:"))]).find("mine")
    with pytest.raises(UserError, match=told):
        assemble(Sources((("F", f"file,points\n{image},3\n".encode()),)), mine, Choices())


def test_votes_beside_a_score_give_counts_but_no_deviation_on_another_scale(tmp_path):
    text = MINE.replace("[file, points]", "[file, points, n1, n2]").replace("own}", "own, votes: {n1: 1, n2: 5}}")
    mine = read_registry([written(tmp_path, text)]).find("mine")
    made = assemble(Sources((("F", b"file,points,n1,n2\na,24,1,1\n"),)), mine, Choices()).table.to_pylist()[0]
    assert made["score_std"] is None and json.loads(made["meta"]) == {"counts": {"1": 1, "5": 1}}


@pytest.mark.parametrize("text", ["", "[]", "3", "datasets: 3", "datasets: {x: 3}", "datasets: {3: {}}"])
def test_a_file_that_is_no_registry_is_one_line(text, tmp_path):
    with pytest.raises(UserError):
        read_registry([written(tmp_path, text)])


def test_the_map_is_linear_and_exact_at_both_ends():
    from hypothesis import given
    from hypothesis import strategies as st

    from tatar_dist.data.imports.rows import to_score

    ends = st.floats(-1e6, 1e6)

    @given(ends, st.floats(1e-3, 1e6), st.floats(0, 1), st.booleans())
    def holds(low, width, share, lower):
        import numpy as np

        scale = Range(low, low + width)
        raw = min(max(low + share * width, scale.low), scale.high)
        a, b, mid = to_score(np.array([scale.low, scale.high, raw]), scale, lower)
        assert (a, b) == (pytest.approx(100 if lower else 0), pytest.approx(0 if lower else 100))
        exact = (raw - scale.low) / (scale.high - scale.low) * 100
        assert mid == pytest.approx(100 - exact if lower else exact, abs=1e-7) and 0 <= mid <= 100

    holds()


def test_sets_prints_every_set_and_where_to_get_it(capsys):
    assert main(["data", "sets"]) == 0
    out = capsys.readouterr().out
    for name, dataset in read_registry().datasets.items():
        assert name in out and all(f in out for f in dataset.formats)
    assert main(["data", "sets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["formats"][0]["columns"] == ["image", "gt_score"]
    assert [s["name"] for s in listed] == list(PUBLISHED) and set(SPLITS) >= set(listed[0]["counts"]) - {"total"}
