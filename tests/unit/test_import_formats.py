"""Importers: each of the eight sets from files with its original columns, mapped exactly, through to the metrics.

The files under annotations/ have the published layouts and invented values.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tatar_dist.cli import main
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.registry import read_registry
from tatar_dist.errors import UserError
from tatar_dist.types import EIGHT

FILES = Path(__file__).parent / "annotations"
REGISTRY = read_registry()

# file -> set, format, rows of the manifest, its raw range, and raw -> score written out by hand
FORMATS = {
    "koniq10k_distributions_sets.csv": ("KonIQ-10k", "distributions-sets", 12, lambda x: x),
    "koniq10k_scores_and_distributions.csv": ("KonIQ-10k", "scores-and-distributions", 12, lambda x: x),
    "KonIQ-10K.json": ("KonIQ-10k", "list", 12, lambda x: x),
    "train_reversal_instruct.jsonl": ("KonIQ-10k", "rationale-iqa", 12, lambda x: x),
    "spaq.csv": ("SPAQ", "mos-and-attributes", 12, lambda x: x),
    "SPAQ.json": ("SPAQ", "list", 12, lambda x: x),
    "dmos.csv": ("KADID-10k", "dmos", 15, lambda x: (x - 1) * 25),
    "KADID.json": ("KADID-10k", "list", 15, lambda x: (x - 1) * 25),
    "A0001.txt": ("PIPAL", "train-label", 12, lambda x: (x - 916.7136) / (1835.9856 - 916.7136) * 100),
    "meta_info_PIPALDataset.csv": ("PIPAL", "meta-info", 12, lambda x: (x - 916.7136) / 919.272 * 100),
    "PIPAL.json": ("PIPAL", "list", 12, lambda x: (x - 1) * 25),
    "ArtiMuse-10K.json": ("ArtiMuse-10K", "list", 12, lambda x: x * 10),
    "train_cot_narrative.jsonl": ("ArtiMuse-10K", "rationale-iaa", 12, lambda x: x * 10),
    "AVA.txt": ("AVA", "ava-txt", 12, lambda x: (x - 1) / 9 * 100),
    "ava_counts.csv": ("AVA", "vote-counts", 12, lambda x: (x - 1) / 9 * 100),
    "AVA.json": ("AVA", "list", 12, lambda x: (x - 1) / 9 * 100),
    "tad66k_test.csv": ("TAD66K", "image-score", 12, lambda x: x * 10),
    "TAD66K.json": ("TAD66K", "list", 12, lambda x: x * 10),
    "FLICKR-AES_image_score.txt": ("FLICKR-AES", "image-score", 12, lambda x: x * 100),
    "FLICKR-AES_image_labeled_by_each_worker.csv": ("FLICKR-AES", "worker-ratings", 12, lambda x: (x - 1) * 25),
    "FLICKR-AES.json": ("FLICKR-AES", "list", 12, lambda x: x * 100),
}


def imported(file, **choices):
    dataset = REGISTRY.find(FORMATS[file][0])
    return assemble(Sources(((file, (FILES / file).read_bytes()),)), dataset, Choices(**choices))


def scores(file):
    rows = imported(file).table.to_pylist()
    return {row["image"]: row["score"] for row in rows}


@pytest.mark.parametrize("file", FORMATS)
def test_a_file_of_the_release_is_recognised_and_mapped_by_its_declared_range(file):
    name, fmt, n, by_hand = FORMATS[file]
    made = imported(file)
    assert made.report["dataset"] == name and made.report["files"][0]["format"] == fmt
    assert made.report["images"] == made.table.num_rows == n and not made.dropped
    raw, score = (np.array(made.table[c]) for c in ("score_raw", "score"))
    np.testing.assert_allclose(score, by_hand(raw), rtol=0, atol=1e-11)
    assert set(made.table["task"].to_pylist()) == {REGISTRY.find(name).task}
    assert len(set(made.table["sample_id"].to_pylist())) == n


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("koniq10k_distributions_sets.csv", "koniq10k_scores_and_distributions.csv", 0),
        ("koniq10k_distributions_sets.csv", "KonIQ-10K.json", 0),
        ("spaq.csv", "SPAQ.json", 0),
        ("dmos.csv", "KADID.json", 0),
        ("A0001.txt", "PIPAL.json", 1e-11),
        ("A0001.txt", "meta_info_PIPALDataset.csv", 0),
        ("ArtiMuse-10K.json", "train_cot_narrative.jsonl", 0),
        ("AVA.txt", "ava_counts.csv", 0),
        ("AVA.txt", "AVA.json", 0.005 * 100 / 9 + 1e-9),  # the list rounds to two decimals
        ("tad66k_test.csv", "TAD66K.json", 0),
        ("FLICKR-AES_image_score.txt", "FLICKR-AES.json", 0),
        ("FLICKR-AES_image_score.txt", "FLICKR-AES_image_labeled_by_each_worker.csv", None),  # another scale
    ],
)
def test_two_formats_of_one_set_agree_in_rank_and_where_exact_in_value(one, other, apart):
    a, b = scores(one), scores(other)
    assert a.keys() == b.keys()
    left, right = (np.array([s[k] for k in a]) for s in (a, b))
    assert spearmanr(left, right).statistic == pytest.approx(1, abs=1e-12)
    if apart is not None:
        assert np.abs(left - right).max() <= apart


def test_the_excel_file_of_spaq_reads_as_its_csv(tmp_path):
    from openpyxl import Workbook

    book = Workbook()
    for k, line in enumerate((FILES / "spaq.csv").read_text().splitlines()):
        cells = line.split(",")
        book.active.append(cells if k == 0 else [cells[0], *map(float, cells[1:])])
    book.save(tmp_path / "MOS and Image attribute scores.xlsx")
    data = (tmp_path / "MOS and Image attribute scores.xlsx").read_bytes()
    made = assemble(Sources((("scores.xlsx", data),)), REGISTRY.find("spaq"), Choices())
    assert made.report["files"][0]["kind"] == "xlsx"
    assert made.table.drop_columns("split").equals(imported("spaq.csv").table.drop_columns("split"))


def raw_of(file):
    """image -> raw score, read by other means than the importer's."""
    if file.endswith(".json"):
        return {r["image"]: r["gt_score"] for r in json.loads((FILES / file).read_text())}
    lines = (FILES / file).read_text().splitlines()
    if file == "AVA.txt":
        votes = {f"{x[1]}.jpg": np.array(x[2:12], float) for x in map(str.split, lines)}
        return {k: float(v @ np.arange(1, 11) / v.sum()) for k, v in votes.items()}
    columns = {"koniq10k_distributions_sets.csv": (0, 7), "spaq.csv": (0, 1), "dmos.csv": (0, 2)}
    columns |= {"tad66k_test.csv": (0, 1)}
    if file in columns:
        image, score = columns[file]
        return {x[image]: float(x[score]) for x in (line.split(",") for line in lines[1:])}
    separator = "," if file == "A0001.txt" else None
    return {k.strip(): float(v) for k, v in (line.split(separator) for line in lines)}


ONE_EACH = [
    *("koniq10k_distributions_sets.csv", "spaq.csv", "dmos.csv", "A0001.txt"),
    *("ArtiMuse-10K.json", "AVA.txt", "tad66k_test.csv", "FLICKR-AES_image_score.txt"),
]


def metrics(tmp_path, capsys, lines):
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["metrics", str(file), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["datasets"]


def test_a_perfect_predictor_scores_one_on_all_eight_sets(tmp_path, capsys):
    lines = []
    for file in ONE_EACH:
        name, _, _, by_hand = FORMATS[file]
        output = tmp_path / f"{name}.parquet"
        command = ["data", "import", name, "--annotations", str(FILES / file), "--images", str(tmp_path)]
        assert main([*command, "--no-check-images", "--json", "--output", str(output)]) == 0
        capsys.readouterr()
        manifest, raw = read_manifest(output), raw_of(file)
        assert len(manifest) == len(raw)
        for i in range(len(manifest)):
            row = manifest.row(i)
            prediction = float(by_hand(raw[row["image"]]))
            lines.append({"dataset": name, "task": row["task"], "target": row["score"], "prediction": prediction})
    found = metrics(tmp_path, capsys, lines)
    assert set(found) == set(REGISTRY.datasets)
    for name, values in found.items():
        for key in ("srcc", "plcc", "krcc"):
            assert values[key] == pytest.approx(1, abs=1e-12), (name, key)


@pytest.mark.parametrize("file", ["dmos.csv", "spaq.csv"])
def test_a_scale_guessed_from_the_value_would_not_score_one(file, tmp_path, capsys):
    # METHOD.md, defects 8 and 9: MOS 1.0 became 100, SPAQ's 4.0-4.8 became 75-95.
    def guessed(x):
        return x * 100 if x <= 1 else (x - 1) * 25 if x <= 5 else x * 10 if x <= 10 else x

    mapped = scores(file)
    lines = [
        {"dataset": "d", "task": "iqa", "target": mapped[image], "prediction": guessed(raw)}
        for image, raw in raw_of(file).items()
    ]
    assert metrics(tmp_path, capsys, lines)["d"]["srcc"] < 0.95


def test_spreads_are_in_score_points_and_counts_are_kept():
    koniq = {r["image"]: r for r in imported("koniq10k_distributions_sets.csv").table.to_pylist()}
    first = koniq["10004473376.jpg"]
    assert first["score_std"] == pytest.approx(1.36418844043 * 25)  # SD on 1-5 beside a MOS on 0-100
    assert json.loads(first["meta"]) == {"counts": {"1": 29, "2": 9, "3": 30, "4": 21, "5": 11}}
    other = {r["image"]: r["meta"] for r in imported("koniq10k_scores_and_distributions.csv").table.to_pylist()}
    assert {k: r["meta"] for k, r in koniq.items()} == other
    ava = imported("AVA.txt").table.to_pylist()[0]
    votes = np.array([4, 21, 16, 49, 32, 33, 20, 15, 9, 1])
    every = np.repeat(np.arange(1, 11), votes)
    assert ava["image"] == "953619.jpg" and ava["score_raw"] == pytest.approx(every.mean())
    assert ava["score_std"] == pytest.approx(every.std() * 100 / 9)
    assert list(json.loads(ava["meta"])["counts"].values()) == votes.tolist()


def test_ratings_are_averaged_per_image_whatever_their_order():
    made = imported("FLICKR-AES_image_labeled_by_each_worker.csv")
    assert made.report["rows"] == made.report["kept"] == 60 and made.report["images"] == 12
    lines = (FILES / "FLICKR-AES_image_labeled_by_each_worker.csv").read_text().splitlines()[1:]
    for row in made.table.to_pylist():
        mine = np.array([int(line.split(",")[2]) for line in lines if row["image"] in line])
        assert row["score_raw"] == pytest.approx(mine.mean())
        assert row["score_std"] == pytest.approx(mine.std() * 25)
        assert json.loads(row["meta"])["counts"] == {str(v): int((mine == v).sum()) for v in range(1, 6)}


def test_kadid_names_tell_reference_distortion_and_strength():
    meta = {r["image"]: json.loads(r["meta"]) for r in imported("dmos.csv").table.to_pylist()}
    assert meta["I81_09_02.png"] == {"reference": "I81", "distortions": [{"family": "jpeg2000", "strength": 0.4}]}
    assert meta["I01_01_05.png"]["distortions"] == [{"family": "gaussian_blur", "strength": 1}]


@pytest.mark.parametrize(("file", "published"), [("dmos.csv", "I03"), ("A0001.txt", "A0006")])
def test_no_reference_image_crosses_splits_and_published_test_references_are_test(file, published):
    made = imported(file)
    by_reference = {}
    for row in made.table.to_pylist():
        by_reference.setdefault(json.loads(row["meta"])["reference"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_reference.values())
    assert [r for r, splits in by_reference.items() if splits == {"test"}] == [published]
    assert made.report["split_official"] is False and "published test list" in made.report["split_rule"]


def test_koniq_splits_come_from_its_column_and_are_the_official_ones():
    made = imported("koniq10k_distributions_sets.csv")
    assert made.report["splits"] == {"train": 7, "validation": 1, "test": 4} and made.report["split_official"] is True
    with pytest.raises(UserError, match="its column set says the split"):
        imported("koniq10k_distributions_sets.csv", split="test")


def test_rationales_and_attributes_come_in_the_methods_order():
    iqa = imported("train_reversal_instruct.jsonl").table.to_pylist()[3]
    assert iqa["rationale"].endswith("image 3 looks usable.") and iqa["attributes"] is None
    iaa = imported("train_cot_narrative.jsonl").table.to_pylist()[3]
    assert iaa["rationale"].startswith("Looking at picture 3")
    assert tuple(json.loads(iaa["attributes"])) == EIGHT


def test_attribute_conversations_are_joined_by_image():
    data = (FILES / "artimuse_text.jsonl").read_bytes()
    sources = Sources(
        (("ArtiMuse-10K.json", (FILES / "ArtiMuse-10K.json").read_bytes()),), attributes=("artimuse_text.jsonl", data)
    )
    made = assemble(sources, REGISTRY.find("artimuse10k"), Choices(split="test"))
    found = [r["attributes"] for r in made.table.to_pylist()]
    assert [f is not None for f in found] == [True] * 10 + [False] * 2
    same = imported("train_cot_narrative.jsonl").table.to_pylist()
    assert found[:10] == [r["attributes"] for r in same[:10]]
    assert made.report["notes"] == ["attributes of artimuse_text.jsonl joined to 10 of 12 images"]


def test_the_hash_rule_is_the_same_in_every_file_and_near_its_fractions():
    names = [f"{i}.jpg" for i in range(4000)]
    rows = "".join(f"{n},5\n" for n in names)
    dataset = REGISTRY.find("tad66k")

    def splits(text):
        table = assemble(Sources((("a.csv", ("image,score\n" + text).encode()),)), dataset, Choices()).table
        return dict(zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True))

    every = splits(rows)
    some = splits("".join(f"{n},3\n" for n in reversed(names[1000:1500])))
    assert all(every[n] == s for n, s in some.items())
    share = {s: list(every.values()).count(s) / 4000 for s in ("train", "validation", "test")}
    assert share == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.03)


def test_split_lists_take_bare_ids_csv_and_json_and_say_what_is_not_there():
    ava = (("AVA.txt", (FILES / "AVA.txt").read_bytes()),)
    lists = (("test", "g.jpgl", (FILES / "generic_test.jpgl").read_bytes()),)
    made = assemble(Sources(ava, lists), REGISTRY.find("ava"), Choices())
    assert made.report["splits"] == {"train": 8, "test": 4} and made.report["split_official"] is None
    assert made.report["notes"][-1] == "1 of the 5 names in g.jpgl are not in the annotations"
    tad = (("t.csv", (FILES / "tad66k_test.csv").read_bytes()),)
    rows = (FILES / "tad66k_test.csv").read_text().splitlines()
    as_csv = "\n".join(rows[:6]).encode()
    as_json = (FILES / "TAD66K.json").read_bytes()
    for data, n in ((as_csv, 5), (as_json, 12), (rows[1].split(",")[0].encode(), 1)):
        made = assemble(Sources(tad, (("validation", "l", data),)), REGISTRY.find("tad66k"), Choices())
        assert made.report["splits"]["validation"] == n
    with pytest.raises(UserError, match="in none of the split lists"):
        assemble(Sources(tad, (("train", "l", as_csv),)), REGISTRY.find("tad66k"), Choices())


def listed(name, rows, *lists):
    sources = tuple((split, f"L{k}", "\n".join(names).encode()) for k, (split, names) in enumerate(lists))
    made = assemble(Sources((("F", rows.encode()),), sources), REGISTRY.find(name), Choices())
    splits = dict(zip(made.table["image"].to_pylist(), made.table["split"].to_pylist(), strict=True))
    return splits, made.report


def test_beside_a_test_list_alone_the_rule_parts_the_others_into_train_and_validation():
    names = [f"{i}.jpg" for i in range(5000)]
    rows = "image,score\n" + "".join(f"{n},5\n" for n in names)
    splits, report = listed("tad66k", rows, ("test", names[:1000]))
    assert {n for n, s in splits.items() if s == "test"} == set(names[:1000])
    # 0.7 and 0.1 of the rule, as shares of what is left
    assert list(splits.values()).count("validation") / 4000 == pytest.approx(1 / 8, abs=0.02)
    assert report["split_rule"] == "test = L0; the others by hash of the image: train 87.5%, validation 12.5%"
    assert "not the official split" in report["notes"][0] and report["split_official"] is None
    assert listed("tad66k", rows, ("test", names[:1000]))[0] == splits


def test_a_list_for_validation_or_train_is_obeyed_as_it_is():
    names = [f"{i}.jpg" for i in range(200)]
    rows = "image,score\n" + "".join(f"{n},5\n" for n in names)
    _, report = listed("tad66k", rows, ("test", names[:20]), ("validation", names[20:30]))
    assert report["splits"] == {"train": 170, "validation": 10, "test": 20} and not report["notes"]
    _, report = listed("tad66k", rows, ("test", names[:20]), ("train", names[20:]))
    assert report["splits"] == {"train": 180, "test": 20} and not report["notes"]


def test_what_is_drawn_beside_a_test_list_keeps_reference_images_together():
    names = [f"I{r:02d}_0{t}_0{v}.png" for r in range(1, 82) for t in range(1, 6) for v in range(1, 6)]
    rows = "dist_img,ref_img,dmos,var\n" + "".join(f"{n},{n[:3]}.png,3,0.1\n" for n in names)
    splits, report = listed("kadid10k", rows, ("test", [n for n in names if n < "I11"]))
    of = {}
    for image, split in splits.items():
        of.setdefault(image[:3], set()).add(split)
    assert all(len(found) == 1 for found in of.values()) and report["splits"]["validation"] > 0
    assert "by hash of the reference image: train 90%, validation 10%" in report["split_rule"]
