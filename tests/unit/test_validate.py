"""`data validate` on real manifests with real pictures: every fault is named, what is clean passes."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifest_cases import codes, picture, problems, raw, row, written
from PIL import Image

from tatar_dist.cli import main
from tatar_dist.data.checks.compare import clean
from tatar_dist.data.checks.validate import validate
from tatar_dist.data.checks.validation import DUPLICATE, KEEP
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25000"))  # a small part of them, for what takes long


def test_a_clean_manifest_passes_and_leaves_its_reports(tmp_path, capsys):
    path = written(tmp_path / "m.parquet", [row(i, rationale="text" if i % 2 else None) for i in range(30)])
    assert main(["data", "validate", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["rows"] == 30 and not found["unusable"] and found["verdict"].startswith("All 30 rows")
    assert found["manifests"][0]["pools"][0]["rationales"] == 15
    assert (tmp_path / "m.validate.md").read_text().splitlines()[
        2
    ] == "**All 30 rows can be used. One split: nothing to compare.**"
    assert Image.open(tmp_path / "m.validate.png").size[0] > 1000
    assert (tmp_path / "m.problems.jsonl").read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("m.parquet", "m.problems.jsonl", "m.validate.md", "m.validate.png")
    ]


@pytest.mark.parametrize(
    "code, changes",
    [
        ("no-value", {"sample_id": None}),
        ("no-value", {"split": None}),
        ("empty-key", {"sample_id": ""}),
        ("empty-key", {"dataset": ""}),
        ("bad-task", {"task": "ocr"}),
        ("bad-split", {"split": "training"}),
        ("bad-split", {"split": ""}),
        ("bad-score", {"score": 100.5}),
        ("bad-score", {"score": float("nan")}),
        ("bad-score", {"score": float("-inf")}),
        ("bad-json", {"meta": "{half"}),
        ("bad-json", {"attributes": "[1]"}),
        ("bad-json", {"meta": "[" * 100_000}),
        ("bad-json", {"attributes": '{"reference":' * 100_000}),
        ("no-image", {"image_bytes": None}),
        ("outside", {"image_bytes": None, "image": "../other/x.png"}),
        ("outside", {"image_bytes": None, "image": "/etc/hostname"}),
        ("missing", {"image_bytes": None, "image": "nowhere.png"}),
        ("missing", {"image_bytes": None, "image": "nul\0byte.png"}),
        ("missing", {"image_bytes": b""}),
        ("corrupt", {"image_bytes": b"<html>not found</html>"}),
        ("truncated", {"image_bytes": picture(1)[:60]}),
        ("extreme-aspect", {"image_bytes": picture(1, size=(6001, 30))}),
    ],
)
def test_every_fault_of_a_row_is_found_with_its_row_and_code(tmp_path, code, changes, capsys):
    path = raw(tmp_path / "m.parquet", [row(i, **(changes if i == 11 else {})) for i in range(20)])
    assert main(["data", "validate", str(path)]) == 2
    assert problems(path) == [(11, code)]
    out, err = capsys.readouterr()
    assert "1 of 20 rows cannot be used" in out and code in out
    last = err.strip().splitlines()[-1]
    assert last == f"tatar-dist: 1 of 20 rows cannot be used: read {tmp_path / 'm.validate.md'}"


def test_a_repeated_id_is_found_across_row_groups(tmp_path):
    path = raw(tmp_path / "m.parquet", [row(i) for i in range(20)] + [row(90, sample_id="s2")])
    found = validate([path])
    assert problems(path) == [(20, "duplicate-id")] and found.unusable == 1


def test_all_pictures_of_all_rows_are_looked_at_whatever_the_row_groups(tmp_path):
    rows = [row(i, image_bytes=picture(i) if i % 5 else b"x") for i in range(600)]
    path = written(tmp_path / "m.parquet", rows)
    found = validate([path], workers=3)
    assert found.unusable == 120 and [r for r, _ in problems(path)] == list(range(0, 600, 5))


def test_pictures_in_files_are_read_from_the_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    rows = [row(i, image_bytes=None, image=f"{i}.png") for i in range(3)]
    write_manifest(tmp_path / "sub" / "m.parquet", rows, image_root=tmp_path / "pictures")
    assert validate([tmp_path / "sub" / "m.parquet"]).ok
    out = tmp_path / "elsewhere" / "clean.parquet"
    assert clean(validate([tmp_path / "sub" / "m.parquet"]), out) == {
        str(out): {"kept": 3, "unusable": 0, "leaked": 0, "duplicate": 0}
    }
    assert read_manifest(out).get(2).image == picture(2)


def test_the_same_picture_twice_in_a_pool_is_a_warning_and_goes_from_the_clean_manifest(tmp_path):
    path = written(tmp_path / "m.parquet", [row(0), row(1), row(2, image_bytes=picture(0), score=0.0)])
    found = validate([path])
    assert found.ok and found.warnings == 1 and problems(path) == [(2, "duplicate-image")]
    clean(found, tmp_path / "c.parquet")
    assert [read_manifest(tmp_path / "c.parquet").sample_id(i) for i in range(2)] == ["s0", "s1"]


def test_identical_pictures_with_other_scores_conflict(tmp_path):
    path = written(tmp_path / "m.parquet", [row(0, score=10.0), row(1), row(2, image_bytes=picture(0), score=60.0)])
    validate([path])
    assert ("conflicting-scores" in codes(path)) and "10 to 60" in path.with_name("m.problems.jsonl").read_text()


def test_the_same_picture_for_both_tasks_is_no_duplicate(tmp_path):
    path = written(tmp_path / "m.parquet", [row(0), row(1, image_bytes=picture(0), task="iaa", dataset="other")])
    assert validate([path]).ok and problems(path) == []


def test_a_picture_in_train_and_test_leaks_across_manifests_and_its_ids_are_named(tmp_path, capsys):
    train = written(tmp_path / "train.parquet", [row(i) for i in range(5)])
    test = written(tmp_path / "test.parquet", [row(i, split="test", sample_id=f"t{i}") for i in (3, 50)])
    assert main(["data", "validate", str(train)]) == 0
    assert main(["data", "validate", str(train), str(test), "--output", str(tmp_path / "r")]) == 2
    assert "1 row leaks between splits" in capsys.readouterr().err.splitlines()[-1]
    line = json.loads((tmp_path / "r" / "train.problems.jsonl").read_text())
    assert (line["row"], line["sample_id"], line["code"]) == (3, "s3", "leak-image")
    assert "'t3' (row 0 of test.parquet)" in line["message"]


def test_one_reference_in_two_splits_leaks_within_its_data_set_only(tmp_path):
    rows = [row(i, meta={"reference": f"I{i // 3}"}, split="test" if i == 5 else "train") for i in range(9)]
    path = written(tmp_path / "m.parquet", rows)
    assert not validate([path]).ok
    assert problems(path) == [(3, "leak-reference"), (4, "leak-reference")]
    other = written(tmp_path / "o.parquet", [row(90, dataset="e", split="test", meta={"reference": "I0"})])
    assert validate([path, other], tmp_path / "r").leaking == 2


@pytest.mark.parametrize(
    "code, score",
    [
        ("scores-constant", lambda i: 50.0),
        ("scores-narrow", lambda i: 1.0 + i / 25),
        ("scores-few", lambda i: 20.0 * (i % 5)),
        (None, lambda i: float(i)),
    ],
)
def test_suspicious_scores_of_a_pool_are_warned_of(tmp_path, code, score):
    path = written(tmp_path / "m.parquet", [row(i, score=score(i)) for i in range(100)])
    assert validate([path]).ok and codes(path) == ({code} if code else set())


def test_of_many_pools_the_picture_shows_the_first_and_the_summary_all(tmp_path, capsys):
    path = written(tmp_path / "m.parquet", [row(i, dataset=f"set-{i:03d}") for i in range(100)])
    assert main(["data", "validate", str(path)]) == 0
    assert Image.open(tmp_path / "m.validate.png").size[1] < 1500  # a dozen
    assert (tmp_path / "m.validate.md").read_text().count("| set-") == 100


def test_files_that_are_no_manifest_are_one_line(tmp_path, capsys):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    for name, said in (("x", "not a Parquet file"), ("y", "no such manifest")):
        assert main(["data", "validate", str(tmp_path / f"{name}.parquet")]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1


def test_a_half_written_row_group_is_named(tmp_path):
    path = written(tmp_path / "m.parquet", [row(i) for i in range(50)])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.parquet: damaged Parquet file"):
        validate([path])
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]  # no half report either


def test_a_clean_manifest_never_overwrites_what_it_is_made_from(tmp_path, capsys):
    path = written(tmp_path / "m.parquet", [row(0)])
    assert main(["data", "validate", str(path), "--clean", str(path)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    other = written(tmp_path / "n.parquet", [row(1)])
    assert main(["data", "validate", str(path), str(other), "--clean", str(tmp_path / "c.parquet")]) == 2
    assert "name a directory" in capsys.readouterr().err


MADE = st.tuples(
    st.sampled_from(["train", "validation", "test"]),
    st.integers(0, 4),  # the picture; 4 is broken
    st.sampled_from([None, "A", "B"]),  # the reference
    st.sampled_from(["iqa", "iaa"]),
)


@settings(max_examples=FUZZ_EXAMPLES // 2500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MADE, min_size=1, max_size=12), st.lists(MADE, max_size=6))
def test_a_cleaned_manifest_validates_clean_and_keeps_what_is_held_out(tmp_path, first, second):
    paths, n = [], 0
    for name, made in (("a", first), ("b", second)):
        rows = []
        for split, kind, reference, task in made:
            data = picture(kind) if kind < 4 else b"broken"
            rows.append(row(n, split=split, image_bytes=data, task=task, meta={"reference": reference}))
            n += 1
        if rows:
            paths.append(written(tmp_path / f"{name}.parquet", rows))
    found = validate(paths, tmp_path / "r")
    kept = [int((found.fate_of(m) == KEEP).sum()) for m in found.manifests]
    if not all(kept):
        with pytest.raises(UserError, match="no row is left"):
            clean(found, tmp_path / "c")
        return
    (tmp_path / "c").mkdir(exist_ok=True)
    counts = clean(found, tmp_path / "c")
    again = validate([Path(p) for p in counts], tmp_path / "r2")
    assert again.ok and again.rows == sum(kept) == sum(c["kept"] for c in counts.values())
    assert not any("duplicate-image" in m.log.counts for m in again.manifests)
    for m in found.manifests:  # the writer has put pools together, so the file says which row is which
        for i in range(m.rows):
            values = read_manifest(m.path).row(i)
            if values["split"] == "test" and values["image_bytes"] != b"broken":
                assert found.fate_of(m)[i] in (KEEP, DUPLICATE)


def test_memory_does_not_grow_with_the_embedded_bytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "BMP")  # 360 kB, quick to decode
    data = buffer.getvalue()
    path = written(tmp_path / "m.parquet", [row(i, image_bytes=data + str(i).encode()) for i in range(900)])  # 324 MB
    code = (
        "import resource, sys; from pathlib import Path; from tatar_dist.data.checks.validate import validate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert validate([Path(sys.argv[1])], workers=2).ok\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 150


def test_ctrl_c_ends_at_once_with_130_and_no_half_files(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000), (1, 2, 3)).save(buffer, "PNG")
    path = written(tmp_path / "m.parquet", [row(i, image_bytes=buffer.getvalue()) for i in range(400)])
    words = [sys.executable, "-m", "tatar_dist", "data", "validate", str(path), "--workers", "2"]
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        child.stderr.readline()  # the first line of progress: it decodes
        looking = psutil.Process(child.pid)
        worked = sum(looking.cpu_times()[:2])
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=300)
    worked = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before - worked
    assert child.returncode == 130 and worked < 15  # seconds of a core, whoever else wants it
    assert "Traceback" not in err and "interrupted" in err
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]
