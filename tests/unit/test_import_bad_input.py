"""Importers: bad input is one line that names file and row, and writes nothing; with --drop-bad it is counted."""

import io
import json
import os
import zipfile
from datetime import date
from pathlib import Path

import pytest

from tatar_dist.cli import main
from tatar_dist.data.imports import annotations
from tatar_dist.data.imports.folder import ImageFolder
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.registry import read_registry
from tatar_dist.errors import UserError

REGISTRY = read_registry()
HEAD = b"image,score\n"
VOTES = b"1 953619 0 0 0 0 0 0 0 0 0 0 1 2 3\n"
KONIQ = b"image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set\n"
BOTH = b"image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,MOS_zscore,set\na.jpg,0,0,1,0,0,1,50,0.5,50,test\n"


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "image,score\n")
    return data.getvalue()


def read(data, name="tad66k", folder=None, **choices):
    return assemble(Sources((("F", data),)), REGISTRY.find(name), Choices(**choices), folder)


def refused(data, name="tad66k", folder=None, **choices):
    with pytest.raises(UserError) as caught:
        read(data, name, folder, **choices)
    line = str(caught.value)
    assert "\n" not in line
    return line


BAD = [
    ("tad66k", b"", "F: the file is empty"),
    ("tad66k", b"\xef\xbb\xbf \n", "F: the file is empty"),
    ("tad66k", HEAD, "F: there are no rows under the header"),
    ("tad66k", b"[]", "F: the list is empty"),
    ("tad66k", b"Image,score\na.jpg,3\n", "F: format image-score needs columns 'image', the file has 'Image', 'score'"),
    ("tad66k", b"image;score\na.jpg;3\n", "needs columns 'image', 'score', the file has 'image;score'"),
    ("tad66k", HEAD + b"a.jpg,3\nb.jpg,three\n", "F:3: column score: 'three' is no number"),
    ("tad66k", HEAD + b"a.jpg,nan\n", "F:2: column score: 'nan' is no finite number"),
    ("tad66k", HEAD + b"a.jpg,-inf\n", "F:2: column score: '-inf' is no finite number"),
    ("tad66k", HEAD + b"a.jpg,1e999\n", "F:2: column score: '1e999' is no finite number"),
    ("tad66k", HEAD + b"a.jpg,1_0\n", "F:2: column score: '1_0' is no number"),
    ("tad66k", HEAD + "a.jpg,٣\n".encode(), "F:2: column score: '٣' is no number"),
    ("tad66k", HEAD + b"a.jpg, \n", "F:2: column score is empty"),
    ("tad66k", HEAD + b",3\n", "F:2: column image is empty"),
    ("tad66k", HEAD + b"a.jpg,3\n\nb.jpg,10.01\n", "F:4: column score: 10.01 is outside 0–10"),
    ("tad66k", HEAD + b"a.jpg,-0.1\n", "F:2: column score: -0.1 is outside 0–10"),
    ("tad66k", HEAD + b"a.jpg,3,4\n", "F:2: 3 values where 2 are due"),
    ("tad66k", HEAD + b"a.jpg\n", "F:2: 1 values where 2 are due"),
    ("tad66k", HEAD + b'"a\nb.jpg",3\nc.jpg,x\n', "F:2: image 'a\\nb.jpg' has a character that does not print"),
    ("tad66k", HEAD + b'"a.jpg,3\n', "broken CSV"),
    ("tad66k", b"image,score,score\na.jpg,3,4\n", "F: the header has column 'score' 2 times"),
    ("tad66k", HEAD + b"a.jpg,3\na.jpg,3\n", "F:3: image 'a.jpg' is already in F:2"),
    ("tad66k", HEAD + b"a.jpg,3\nb.jpg,3\na.jpg,4\n", "F:2: image 'a.jpg' has score 3 here and 4 in F:4 (2 of 3 rows"),
    ("tad66k", HEAD + b"a.jpg,3\ncaf\xe9.jpg,3\n", "F:3: byte 24 of the file (0xe9) is not UTF-8"),
    ("tad66k", "image,score\na,3\n".encode("utf-16"), "--encoding utf-16"),
    ("tad66k", HEAD + b"../a.jpg,3\n", "F:2: image '../a.jpg' has an empty part, '.' or '..' in its path"),
    ("tad66k", HEAD + b"/a.jpg,3\n", "F:2: image '/a.jpg' is an absolute path"),
    ("tad66k", HEAD + b"C:a.jpg,3\n", "F:2: image 'C:a.jpg' is an absolute path"),
    ("tad66k", HEAD + b"x\\a.jpg,3\n", "has a backslash"),
    ("tad66k", HEAD + b"x//a.jpg,3\n", "has an empty part"),
    ("tad66k", b'[{"image": "a", "gt_score": 3},\n {"image": "b", "gt_score": 4', "F:2: broken JSON"),
    ("tad66k", b'[{"image": "a", "gt_score": "57.3"}]', "F:1: key gt_score is text ('57.3'), must be a number"),
    ("tad66k", b'[{"image": "a", "gt_score": true}]', "F:1: key gt_score is true or false, must be a number"),
    ("tad66k", b'[\n{"image": "a", "gt_score": 3},\n{"image": "b"}]', "F:3: key gt_score is missing"),
    ("tad66k", b'[{"image": "a", "gt_score": null}]', "F:1: key gt_score is empty"),
    ("tad66k", b'[{"image": "a", "gt_score": NaN}]', "F:1: key gt_score: nan is no finite number"),
    ("tad66k", b'[{"image": "a", "gt_score": 1' + b"0" * 400 + b"}]", "is no finite number"),
    ("tad66k", b'[{"image": "a", "gt_score": ' + b"1" * 5000 + b"}]", "value has 5000 digits"),
    ("tad66k", b'[{"image": "\\ud800", "gt_score": 3}]', "holds half a character"),
    ("tad66k", b'[{"image": 7, "gt_score": 3}]', "F:1: key image is a number (7), must be text"),
    (
        "tad66k",
        b'[{"image": "a", "gt_score": 3}, {"image": "b", "gt_score": 3, "image": "c"}]',
        "'image' is given twice",
    ),
    ("tad66k", b'{"image": "a", "gt_score": 3}\n\n{"image": "b", "gt_score": }\n', "F:3: broken JSON"),
    (
        "tad66k",
        b'{\n"rows": [{"image": "a", "gt_score": 3}]}',
        "no row can be read: write a JSON list of objects, or one object a line",
    ),
    ("tad66k", b"[" * 50_000, "F: broken JSON"),
    ("tad66k", b"[1, 2]", "F:1: the row is a number, must be an object"),
    ("tad66k", b"PK\x03\x04 no workbook", "F: not a readable Excel workbook"),
    (
        "artimuse10k",
        b'{"image": "a", "gt_score": 3}\n{"image": "b", "gt_score": 3, "aesthetic_attributes": {"mood": "x"}}',
        "F:1: key aesthetic_attributes is missing",  # not a plain list: the second row's texts would be lost
    ),
    ("artimuse10k", HEAD + b"a.jpg,3\n", "F: looks like csv, in which ArtiMuse-10K has no format"),
    (
        "artimuse10k",
        b'{"image": "a", "gt_score": 3, "aesthetic_attributes": {"mood": "x"}}',
        "'mood' is none of the eight",
    ),
    ("ava", b"1 2 3\n", "nor lines of 15 fields, as in ava-txt"),
    ("ava", VOTES, "F:1: all vote counts are 0"),
    ("ava", VOTES.replace(b" 0 0 ", b" 0 x ", 1), "F:1: column n2: 'x' is no"),
    ("ava", VOTES.replace(b" 0 0 ", b" 0 1.5 ", 1), "F:1: column n2: '1.5' is no whole number"),
    ("ava", VOTES.replace(b" 0 0 ", b" 0 -3 ", 1), "F:1: column n2 is -3, which is no count of votes"),
    ("ava", VOTES.replace(b"953619", b"ab"), "F:1: column image_id: 'ab' is no whole number"),
    ("kadid10k", b"dist_img,ref_img,dmos,var\nI01_99_01.png,I01.png,3,.1\n", "has no distortion type 99"),
    ("kadid10k", b"dist_img,ref_img,dmos,var\nfoo.png,I01.png,3,.1\n", "is not named as KADID-10k names its images"),
    ("kadid10k", b"dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,3,-1\n", "-1 is no standard deviation on 1–5"),
    ("koniq10k", KONIQ + b"a.jpg,0.5,0.5,0,0,0,3,50,0.5,test\n", "c1 of c_total is 1.5, which is no count of votes"),
    ("koniq10k", KONIQ + b"a.jpg,0,0,1,0,0,3,50,0.5,dev\n", "F:2: column set: 'dev' is none of training"),
    ("koniq10k", BOTH, "fit more than one format of KonIQ-10k: distributions-sets (MOS on 0–100), scores-and-dist"),
    (
        "koniq10k",
        KONIQ + b"a.jpg,1,4,9,8,3,25,50,0.5,test\n",
        "F:2: columns c1 to c5 sum to 25; format distributions-sets",
    ),
    (
        "koniq10k",
        KONIQ + b"a.jpg,0,0,0,1,0,3,3.83,0.5,test\n",
        "F:2: column MOS is 3.83 of 0–100, the votes' mean is 75 of",
    ),
    (
        "koniq10k",
        b"PAR1\x15\x04",
        "F: a Parquet file, not annotations as text; convert it first: pandas.read_parquet(F)",
    ),
    ("koniq10k", b"MATLAB 5.0 MAT-file", "F: a MATLAB file, not"),
    ("koniq10k", b"\x93NUMPY\x01\x00", "F: a NumPy array, not"),
    ("koniq10k", b"\x80\x04\x95", "F: a Python pickle, not"),
    (
        "koniq10k",
        b"\xd0\xcf\x11\xe0\xa1\xb1",
        "F: an Excel file of the old format, not annotations as text; convert it first: save it as",
    ),
    ("koniq10k", b"\x1f\x8b\x08", "F: compressed by gzip, not annotations as text; convert it first: gunzip F"),
    (
        "koniq10k",
        zipped("a/labels.csv"),
        "F: a ZIP archive: unpack it and give the annotation file in it, such as a/labels.csv",
    ),
    ("flickr-aes", b"worker, imagePair, score\nA,a.jpg,3.5\n", "F:2: column score: 3.5 is no whole rating"),
    ("flickr-aes", b"worker, imagePair, score\nA,a.jpg,3\nA,a.jpg,4\n", "image 'a.jpg' by worker 'A' has score 3 here"),
]


@pytest.mark.parametrize(("name", "data", "told"), BAD, ids=[told[:40] for _, _, told in BAD])
def test_bad_input_is_one_line_that_says_where(name, data, told):
    assert told in refused(data, name)


def test_one_score_with_two_rationales_is_a_contradiction_not_a_repetition():
    row = '{"image": "a", "gt_score": 3, "reversal_thinking": "%s"}'
    assert "has other values here than in F:2" in refused(f"{row % 'Sharp.'}\n{row % 'Soft.'}".encode(), "koniq10k")
    assert "is already in F:1" in refused(f"{row % 'Sharp.'}\n{row % 'Sharp.'}".encode(), "koniq10k")


def test_an_ambiguous_file_is_read_by_the_named_format():
    assert read(BOTH, "koniq10k", format="scores-and-distributions").report["files"][0]["range"] == [0, 100]
    assert "did you mean 'scores-and-distributions'?" in refused(BOTH, "koniq10k", format="score-distributions")


def test_byte_order_mark_blanks_and_carriage_returns_are_no_fault():
    made = read(b"\xef\xbb\xbf image , score \r\n a.jpg , 3 \r\n\r\nb.jpg,4\r\n")
    assert made.table["image"].to_pylist() == ["a.jpg", "b.jpg"] and made.table["score_raw"].to_pylist() == [3, 4]


def test_lines_and_cells_without_text_before_the_header_are_no_fault():
    made = read(b"\n,,\n" + HEAD + b"a.jpg,3\n")
    assert made.table["image"].to_pylist() == ["a.jpg"]
    assert "F:5: column score: 'x' is no number" in refused(b"\n,,\n" + HEAD + b"a.jpg,3\nb.jpg,x\n")


def test_another_encoding_is_read_when_it_is_named():
    data = "image,score\ncafé.jpg,3\n".encode("latin-1")
    assert read(data, encoding="latin-1").table["image"].to_pylist() == ["café.jpg"]
    for wrong in ("latin-7777", "hex"):
        assert refused(data, encoding=wrong).startswith(f"--encoding {wrong}: no such text encoding")


def workbook(*rows):
    from openpyxl import Workbook

    book = Workbook()
    book.active.append(["Image name", "MOS", "Brightness", "Colorfulness", "Contrast", "Noisiness", "Sharpness"])
    for row in rows:
        book.active.append(row)
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (date(2024, 5, 1), "F: row 3: column MOS is a datetime"),
        ("50", "F: row 3: column MOS is text ('50'), must be a number"),
        (True, "F: row 3: column MOS is true or false"),
        (None, "F: row 3: column MOS is empty"),
        ("=1+2", "F: row 3: column MOS is empty"),
        (100.5, "F: row 3: column MOS: 100.5 is outside 0–100"),
    ],
)
def test_an_excel_cell_that_holds_no_number_is_named_by_its_row(value, told):
    assert told in refused(workbook(["a.jpg", 50.0], ["b.jpg", value, 1, 2, 3, 4, 5]), "spaq")


def test_an_excel_value_beyond_the_header_is_a_ragged_row_and_empty_cells_there_are_none():
    assert "F: row 2: 8 values where 7 are due" in refused(workbook(["a.jpg", 50.0, 1, 2, 3, 4, 5, "x"]), "spaq")
    assert len(read(workbook(["a.jpg", 50.0, 1, 2, 3, 4, 5, None, None], ["b.jpg", 40]), "spaq").table) == 2


def test_a_workbook_that_unpacks_to_more_than_memory_may_hold_is_not_opened(monkeypatch):
    monkeypatch.setattr(annotations, "XLSX_LIMIT", 1000)
    monkeypatch.setattr("openpyxl.load_workbook", lambda *_, **__: pytest.fail("opened"))
    assert "the workbook unpacks to more than" in refused(workbook(["a.jpg", 50.0]), "spaq")


def test_a_formula_in_a_column_that_is_not_read_is_no_fault():
    assert len(read(workbook(["a.jpg", 50.0, "=1+2"], [None] * 7, ["b.jpg", 40]), "spaq").table) == 2


def test_a_lower_is_better_format_is_flipped(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "datasets:\n  Mine:\n    task: iqa\n    in_domain: false\n    url: u\n    terms: t\n"
        "    split: {by: image, fractions: {test: 1}, official: none}\n    formats:\n      dmos:\n"
        "        {kind: csv, columns: [name, d], image: name, score: d, range: [0, 50], better: lower, source: s}\n"
    )
    dataset = read_registry([file]).find("mine")
    made = assemble(Sources((("F", b"name,d\na,0\nb,50\nc,10\n"),)), dataset, Choices())
    assert made.table["score"].to_pylist() == [100, 0, 80] and made.report["splits"] == {"test": 3}


def test_images_are_found_by_exact_name_and_near_misses_are_named(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.bmp", "one/d.jpg", "one/e.jpg", "two/e.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = ImageFolder(tmp_path)
    assert read(HEAD + b"a.jpg,3\nd.jpg,4\n", folder=folder).table["image"].to_pylist() == ["a.jpg", "one/d.jpg"]
    for name, told in {
        "b.png": "there is 'b.PNG'",
        "c.jpg": "there is 'c.bmp'",
        "two/d.jpg": "there is 'one/d.jpg'",
        "e.jpg": "lies in several directories (one/e.jpg, two/e.jpg)",
        "f.jpg": "no image was found: does --images name the right directory?",
    }.items():
        assert told in refused(HEAD + f"{name},3\n".encode(), folder=folder)
    line = refused(HEAD + b"a.jpg,3\nf.jpg,3\n", folder=folder)
    assert line.startswith(f"F:3: image 'f.jpg' is not in {tmp_path};")
    assert "F:3: image 'one/d.jpg' is already in F:2" in refused(HEAD + b"d.jpg,3\none/d.jpg,3\n", folder=folder)


def test_only_files_are_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for link, end in (("b.jpg", "a.jpg"), ("c.jpg", "gone.jpg"), ("sub/d.jpg", "d.jpg"), ("e.jpg", "pipe.jpg")):
        (tmp_path / link).symlink_to(end)
    folder = ImageFolder(tmp_path)
    rows = HEAD + b"".join(f"{name},3\n".encode() for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "pipe.jpg"))
    made = read(rows, folder=folder, drop_bad=True)
    assert made.table["image"].to_pylist() == ["a.jpg", "b.jpg"]
    assert made.report["dropped"] == {"broken link": 2, "pipe, socket or device": 2}
    assert "F:2: image 'sub/d.jpg' is a broken link" in refused(HEAD + b"d.jpg,3\n", folder=folder)


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u202f", "é", "\ue000"])
def test_names_with_any_visible_or_blank_character_are_names(blank):
    name = f"Screenshot 10.15{blank}AM.png"
    assert read(f"image,score\n{name},3\n".encode()).table["image"].to_pylist() == [name]


@pytest.mark.parametrize("unseen", ["\x07", "\x7f", "\u200b", "\u202e", "\u2028"])
def test_names_with_unseen_characters_are_refused_and_shown_escaped(unseen):
    line = refused(f"image,score\na{unseen}b.png,3\n".encode())
    assert "has a character that does not print" in line and unseen not in line


def run(tmp_path, data, *options, name="tad66k"):
    (tmp_path / "F.csv").write_bytes(data)
    out = tmp_path / "out" / "m.parquet"
    command = ["data", "import", name, "--annotations", str(tmp_path / "F.csv"), "--images", str(tmp_path)]
    return main([*command, "--output", str(out), *options]), out


def test_the_command_refuses_with_status_2_and_writes_nothing(tmp_path, capsys):
    status, out = run(tmp_path, HEAD + b"a.jpg,3\nb.jpg,x\n", "--no-check-images")
    line = capsys.readouterr().err
    assert (
        status == 2
        and line.startswith("tatar-dist: ")
        and f"{tmp_path / 'F.csv'}:3" in line
        and len(line.splitlines()) == 1
    )
    assert not out.parent.exists()


def test_dropped_rows_are_counted_by_reason_and_listed(tmp_path, capsys):
    rows = b"a.jpg,3\nb.jpg,x\nc.jpg,1,2\nd.jpg,11\ne.jpg,5\ne.jpg,5\nf.jpg,1\nf.jpg,2\ng.jpg,nan\n../h,1\n"
    status, out = run(tmp_path, HEAD + rows, "--no-check-images", "--drop-bad", "--json")
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["rows"] == 10 and report["kept"] == len(read_manifest(out)) == 2
    assert report["dropped"] == {
        **{"conflicting duplicate": 2, "wrong type": 1, "ragged row": 1, "out of range": 1},
        **{"exact duplicate": 1, "not finite": 1, "bad path": 1},
    }
    listed = [json.loads(line) for line in Path(report["dropped_file"]).read_text().splitlines()]
    assert len(listed) == 8 and listed[0]["at"] == f"{tmp_path / 'F.csv'}:3" and listed[0]["image"] == "b.jpg"
    assert report["kept"] + sum(report["dropped"].values()) == report["rows"]
    run(tmp_path, HEAD + b"a.jpg,3\n", "--no-check-images", "--drop-bad", "--json")
    assert not Path(report["dropped_file"]).exists()  # an older import's list would mislead


def test_embedded_images_are_the_files_bytes(tmp_path, capsys):
    for k in range(150):
        (tmp_path / f"{k}.jpg").write_bytes(bytes([k]) * 10)
    rows = "".join(f"{k}.jpg,{k / 20}\n" for k in range(150)).encode()
    status, out = run(tmp_path, HEAD + rows, "--embed", "--split", "test", "--json")
    capsys.readouterr()
    manifest = read_manifest(out)
    assert status == 0 and [manifest.row(k)["image_bytes"] for k in range(150)] == [bytes([k]) * 10 for k in range(150)]
    assert run(tmp_path, HEAD + rows, "--embed", "--no-check-images")[0] == 2


def test_paths_are_relative_to_the_images_directory_wherever_the_manifest_lies(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"bytes of a")
    status, out = run(tmp_path, HEAD + b"a.jpg,3\n", "--json")
    assert status == 0 and read_manifest(out).get(0).image == b"bytes of a"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--split", "dev"], "--split dev: must be one of train, validation, test"),
        (["--split-list", "names.txt"], "--split-list names.txt: must be SPLIT=FILE"),
        (["--split-list", "dev=F.csv"], "must be SPLIT=FILE with SPLIT one of train, validation, test"),
        (["--split-list", "test=absent"], "--split-list absent: cannot read it"),
        (["--attributes", "absent.jsonl"], "--attributes absent.jsonl: cannot read it"),
        (["--format", "imagescore"], "did you mean 'image-score'?"),
        (["--registry", "absent.yaml"], "absent.yaml: cannot read the registry"),
    ],
)
def test_wrong_options_are_one_line(options, told, tmp_path, capsys):
    assert run(tmp_path, HEAD + b"a.jpg,3\n", "--no-check-images", *options)[0] == 2
    assert told in capsys.readouterr().err


def test_no_input_is_overwritten_by_the_output(tmp_path, capsys):
    file = tmp_path / "F.csv"
    file.write_bytes(HEAD + b"a.jpg,3\n")
    command = ["data", "import", "tad66k", "--annotations", str(file), "--images", str(tmp_path), "--no-check-images"]
    assert main([*command, "--output", str(file)]) == 2
    assert "would overwrite" in capsys.readouterr().err and file.read_bytes() == HEAD + b"a.jpg,3\n"


@pytest.mark.parametrize("output", [".", "", "/", "..", "held", "pipe", "file/m.parquet", "m.parquet"])
def test_an_output_that_cannot_be_a_file_is_refused_before_the_work(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "m.dropped.jsonl").mkdir()
    command = ["data", "import", "tad66k", "--annotations", "not read yet", "--images", ".", "--no-check-images"]
    assert main([*command, "--output", output]) == 2
    line = capsys.readouterr().err
    assert line.startswith("tatar-dist: ") and "--annotations" not in line and len(line.splitlines()) == 1


def test_a_name_longer_than_a_file_may_have_is_one_line(tmp_path, capsys):
    command = ["data", "import", "tad66k", "--annotations", "a" * 300, "--output", str(tmp_path / "m.parquet")]
    assert main([*command, "--images", str(tmp_path)]) == 2
    assert main([*command[:3], "--annotations", __file__, *command[5:], "--images", "b" * 300]) == 2
    assert "--images " + "b" * 300 + ": no such directory" in capsys.readouterr().err


def test_an_unknown_set_names_the_nearest(tmp_path, capsys):
    assert run(tmp_path, HEAD, name="TAD-66")[0] == 2
    assert "TAD-66: no such data set; did you mean 'TAD66K'?" in capsys.readouterr().err


def test_a_missing_images_directory_is_told_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "F.csv").write_bytes(HEAD + b"a.jpg,3\n")
    command = [
        "data",
        "import",
        "tad66k",
        "--annotations",
        str(tmp_path / "F.csv"),
        "--output",
        str(tmp_path / "o.parquet"),
    ]
    assert main([*command, "--images", str(tmp_path / "absent")]) == 2
    assert "absent: no such directory" in capsys.readouterr().err and not (tmp_path / "o.parquet").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"image": "a.jpg", "conversations": []}', "A:1: 'conversations' must be a list of questions"),
        (b'{"image": "a.jpg", "conversations": [{"value": "light?"}, {"value": "x"}]}', "names 0"),
        (b'{"image": "a.jpg"}', "A:1: neither 'conversations'"),
        (b'{"conversations": []}', "A:1: key 'image' must be a file name"),
        (b'{"image": "z.jpg", "aesthetic_attributes": {"overall_gestalt": "x"}}', "none of its images is an image"),
        (b"image,text\na,b\n", "A: attributes must be JSON"),
        (
            b'{"image": "a.jpg", "aesthetic_attributes": {"overall_gestalt": "x"}}\n'
            b'{"image": "a.jpg", "aesthetic_attributes": {"Overall Gestalt": "y"}}',
            "A:2: image 'a.jpg': 'overall gestalt' is given twice, with different texts",
        ),
    ],
)
def test_bad_attribute_files_are_named_by_line(line, told):
    sources = Sources((("F", b'[{"image": "a.jpg", "gt_score": 3}]'),), attributes=("A", line))
    with pytest.raises(UserError) as caught:
        assemble(sources, REGISTRY.find("artimuse10k"), Choices())
    assert told in str(caught.value)
