"""`data validate` and `data show` on files of other programs and at hostile places: one line each, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifest_cases import codes, picture, problems, raw, row, written
from test_images import png

from tatar_dist.cli import main
from tatar_dist.data.checks import validate as validating
from tatar_dist.data.checks.report import plain, printable
from tatar_dist.data.checks.validate import look_at, validate
from tatar_dist.data.images import MAX_PIXELS
from tatar_dist.data.manifest import SCHEMA, read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError

TEXTS = ("sample_id", "dataset", "task", "image", "split", "rationale", "attributes", "meta")


def texts(values: list[bytes | None]) -> pa.Array:
    """A column of type string that was never checked."""
    return pa.array(values, pa.binary()).view(pa.string())


def table(n: int = 20, **columns) -> pa.Table:
    rows = [row(i, image=f"{i}.png") for i in range(n)]
    made = {name: pa.array([r.get(name) for r in rows], SCHEMA.field(name).type) for name in SCHEMA.names}
    return pa.table(made | columns)


def run(capsys, *words: object) -> tuple[int, str]:
    """Exit status and last line on stderr, which is the only one but for progress."""
    status = main(["data", *map(str, words)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return status, (err.strip().splitlines() or [""])[-1]


def test_splits_of_other_names_are_errors_and_no_side_of_a_leak_is_taken_for_held_out(tmp_path, capsys):
    rows = [row(i, image_bytes=picture(i % 10), split="training" if i < 10 else "test") for i in range(20)]
    path = raw(tmp_path / "m.parquet", rows)
    assert run(capsys, "validate", path, "--clean", tmp_path / "c.parquet")[0] == 2
    assert problems(path) == [(i, "bad-split") for i in range(10)]
    assert [p.split for p in read_manifest(tmp_path / "c.parquet").pools] == ["test"]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_text_that_is_not_utf8_is_a_fault_of_its_row(tmp_path, capsys, name, kind):
    good = [None if v is None else v.encode() for v in table().column(name).to_pylist()]
    column = texts([b"caf\xe9" if i == 11 else v for i, v in enumerate(good)])
    column = {"large_string": lambda: column.cast(pa.large_string()), "dictionary": column.dictionary_encode}.get(
        kind, lambda: column
    )()
    path = tmp_path / "m.parquet"
    pq.write_table(table(**{name: column}), path)
    status, said = run(capsys, "validate", path)
    assert status == 2 and said.startswith("tatar-dist: 1 of 20 rows cannot be used")
    assert (11, "bad-text") in problems(path) and {r for r, _ in problems(path)} == {11}
    status, said = run(capsys, "show", path)
    assert status == 2 and "m.parquet" in said and "UTF-8" in said


def test_broken_ids_that_differ_are_no_duplicates_and_equal_ones_are(tmp_path):
    ids = [f"s{i}".encode() for i in range(20)]
    ids[3], ids[4], ids[5] = b"\xe9", b"\xe8", b"\xe9"
    pq.write_table(table(sample_id=texts(ids)), path := tmp_path / "m.parquet")
    validate([path])
    assert [p for p in problems(path) if p[1] == "duplicate-id"] == [(5, "duplicate-id")]


def test_whole_numbers_beyond_what_a_float_holds_are_wrong_scores(tmp_path, capsys):
    for kind in (pa.int64(), pa.uint64()):
        column = pa.array([2**60 + 1 if i == 4 else i for i in range(20)], kind)
        pq.write_table(table(score=column), path := tmp_path / "m.parquet")
        assert run(capsys, "validate", path)[0] == 2 and problems(path) == [(4, "bad-score")]


def test_a_repeated_column_is_one_line(tmp_path, capsys):
    twice = table()
    pq.write_table(twice.append_column("score", twice["score"]), path := tmp_path / "m.parquet")
    for command in ("validate", "show"):
        assert run(capsys, command, path) == (2, f"tatar-dist: {path}: column score is there 2 times")


def test_a_manifest_without_rows_is_unusable_alone_or_beside_others(tmp_path, capsys):
    empty, full = tmp_path / "e.parquet", written(tmp_path / "f.parquet", [row(0)])
    pq.write_table(table(0), empty)
    (tmp_path / "e.validate.png").write_bytes(b"of an earlier run")
    status, said = run(capsys, "validate", empty)
    assert status == 2 and said == f"tatar-dist: No rows: there is nothing to check: read {tmp_path}/e.validate.md"
    assert not (tmp_path / "e.validate.png").exists() and "![" not in (tmp_path / "e.validate.md").read_text()
    status, said = run(capsys, "validate", full, empty, "--output", tmp_path / "r")
    assert status == 2 and said.startswith("tatar-dist: e.parquet has no rows: read")


def test_outputs_that_cannot_be_written_are_known_before_a_picture_is_decoded(tmp_path, capsys, monkeypatch):
    path = written(tmp_path / "m.parquet", [row(0)])
    (tmp_path / "file").write_text("")
    (tmp_path / "d" / "m.validate.png").mkdir(parents=True)
    monkeypatch.setattr(validating, "_submitted", lambda *_: pytest.fail("decoded"))
    for words in (
        ["validate", path, "--output", tmp_path / "file"],
        ["validate", path, "--output", tmp_path / "file" / "below"],
        ["validate", path, "--output", tmp_path / "d"],
        ["validate", path, "--clean", tmp_path / "file" / "c.parquet"],
        ["validate", path, "--clean", tmp_path / ("long" * 100 + ".parquet")],
        ["show", path, "--output", tmp_path / "file" / "s.png"],
        ["show", path, "--output", tmp_path],
        ["demo", "--output", tmp_path / "file"],
    ):
        status, said = run(capsys, *words)
        assert status == 2 and "cannot be written" in said and str(tmp_path) in said, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "file", "m.parquet"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    path = raw(tmp_path / "m.parquet", [row(i, task="ocr") for i in range(300)])
    real = Path.open
    monkeypatch.setattr(  # the same calls on a file that is always full
        Path, "open", lambda self, mode="r", **k: real(Path("/dev/full") if mode == "w" else self, mode, **k)
    )
    with pytest.raises(UserError, match=r"m\.problems\.jsonl: cannot be written: No space left"):
        validate([path])


def test_nothing_is_cleaned_when_of_one_manifest_nothing_is_left(tmp_path, capsys):
    good, bad = written(tmp_path / "a.parquet", [row(0)]), raw(tmp_path / "b.parquet", [row(1, task="ocr")])
    status, said = run(capsys, "validate", good, bad, "--clean", tmp_path / "c")
    assert status == 2 and "b.parquet: no row is left" in said and not (tmp_path / "c").exists()


def with_files(directory: Path, n: int = 3) -> Path:
    """A manifest whose pictures lie in `directory`/pictures, moved away from them."""
    (directory / "pictures").mkdir(parents=True)
    for i in range(n):
        (directory / "pictures" / f"{i}.png").write_bytes(picture(i))
    rows = [row(i, image_bytes=None, image=f"{i}.png") for i in range(n)]
    write_manifest(directory / "m.parquet", rows)
    return directory / "m.parquet"


def test_images_elsewhere_are_named_and_the_hint_says_how(tmp_path, capsys):
    path = with_files(tmp_path)
    status, said = run(capsys, "validate", path)
    assert status == 2 and said.endswith(f"no image was found under {tmp_path}: name their directory with --images")
    assert "No image was found" in (tmp_path / "m.validate.md").read_text()
    clean = tmp_path / "sub" / "clean.parquet"
    assert run(capsys, "validate", path, "--images", tmp_path / "pictures", "--clean", clean)[0] == 0
    assert read_manifest(clean).get(2).image == picture(2)
    assert main(["data", "show", str(path)]) == 0 and "with --images" in capsys.readouterr().out
    assert main(["data", "show", str(path), "--images", str(tmp_path / "pictures"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["broken"], found["absent"]) == (0, 0)
    for command in ("validate", "show"):
        status, said = run(capsys, command, path, "--images", tmp_path / "no")
        assert status == 2 and "'--images': " in said and f"'{tmp_path}/no' does not exist" in said


def test_one_image_that_is_there_is_no_hint(tmp_path, capsys):
    path = with_files(tmp_path)
    (tmp_path / "0.png").write_bytes(picture(0))
    assert "--images" not in run(capsys, "validate", path)[1]


def test_what_is_no_regular_file_is_missing_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name, why in (("pipe", "not a regular file"), (".", "not a regular file"), ("broken", "No such file")):
        code = (
            "import sys; from pathlib import Path; from tatar_dist.data.checks.validate import look_at\n"
            "facts, digest = look_at(Path(sys.argv[1])); print(facts.problem, digest, facts.message)"
        )
        words = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
        assert done.stdout.startswith("missing b''") and why in done.stdout


@given(st.text())
def test_markdown_shows_any_text_on_one_line_as_it_is(text):
    shown = plain(text)
    assert len(shown.splitlines()) <= 1 and printable(shown) == shown
    left = shown.replace("\\\\", "")
    assert all(left[i - 1] == "\\" for i, c in enumerate(left) if c in "|<`*[")
    assert printable("naïve\u00a0名 | x") == "naïve\u00a0名 | x"


FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25000"))  # a small part of them, for what takes long
HOSTILE = ["a|b\n# x", "\x1b[31m", "$\\x$", "\u202e", "`<b>`"]
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8) | st.sampled_from(HOSTILE)


@settings(
    max_examples=FUZZ_EXAMPLES // 6000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(NAMES, NAMES)
def test_reports_of_any_names_have_whole_tables_and_no_control_codes(tmp_path, capsys, dataset, sample):
    path = raw(tmp_path / "m.parquet", [row(0, dataset=dataset, sample_id=sample, score=101.0), row(1)])
    main(["data", "validate", str(path)])
    text = (tmp_path / "m.validate.md").read_text() + capsys.readouterr().out
    assert not any(ord(c) < 32 and c != "\n" or 127 <= ord(c) < 160 for c in text)
    pools = [line for line in text.split("\n") if line.startswith("| ") and "| iqa |" in line]
    assert len(pools) == 2 and all(line.replace("\\\\", "").replace("\\|", "").count("|") == 11 for line in pools)


def test_large_pictures_wait_for_each_other_and_all_are_decoded():
    room, inside, most = validating._Room(MAX_PIXELS), [0], [0]
    lock = threading.Lock()

    def decode(pixels: int) -> None:
        with room.taken(pixels):
            with lock:
                inside[0] += pixels
                most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            with lock:
                inside[0] -= pixels

    sizes = [MAX_PIXELS, 1, MAX_PIXELS // 2, MAX_PIXELS // 2, MAX_PIXELS // 3 + 1] * 6
    threads = [threading.Thread(target=decode, args=(n,)) for n in sizes]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    assert not any(t.is_alive() for t in threads) and inside == [0] and MAX_PIXELS // 2 < most[0] <= MAX_PIXELS


def test_memory_of_decoding_does_not_grow_with_the_threads(tmp_path):
    side = 12_000  # 144 megapixels, a byte each
    data = png(side, side, 8, 0, (b"\0" + bytes(side)) * side)
    path = written(tmp_path / "m.parquet", [row(i, image_bytes=data + bytes([i])) for i in range(4)])
    code = (
        "import resource, sys; from pathlib import Path; from tatar_dist.data.checks import validate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert validate.validate([Path(sys.argv[1])], workers=4).ok\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 2 * side**2
    assert look_at(memoryview(data))[0].problem is None and codes(path) <= {"scores-few"}
