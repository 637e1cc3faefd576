"""Importers: every bad row is named by its line, in files of any layout, and naming many costs no more than reading."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatar_dist.data.imports.annotations import parse
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.registry import read_registry

TAD = read_registry().find("tad66k")
BLANKS = st.text(" \t\r\n", max_size=4)


def line_of(text, at):
    return 1 + text.count("\n", 0, at)


@given(st.lists(st.tuples(BLANKS, st.sampled_from(["", ",", ", \n ,"]), BLANKS), min_size=1, max_size=8))
def test_a_row_of_a_json_list_is_placed_where_its_bracket_opens(gaps):
    text = "[" + gaps[0][0]
    wanted = []
    for k, (before, inside, after) in enumerate(gaps):
        wanted.append(line_of(text, len(text)))
        # Commas, brackets and escaped line ends inside a text are no row.
        text += json.dumps({"image": f"{k}]{inside}[", "inner": [1, {"a": []}]}).replace(": [1", ":" + before + "[1")
        text += after + ("," if k + 1 < len(gaps) else "") + before
    rows = parse((text + "]").encode(), "F", None, [])
    assert [rows.at[i] for i in range(len(gaps))] == [f"F:{line}" for line in wanted]


@given(
    st.lists(st.tuples(st.sampled_from(["a", "a\nb", "\n\n", 'say "a"\n']), st.integers(0, 2)), min_size=1, max_size=8)
)
def test_a_row_of_a_csv_file_is_placed_where_it_begins(rows):
    text = "\nimage,score\n"
    wanted = []
    for name, blank_lines in rows:
        wanted.append(line_of(text, len(text)))
        text += '"' + name.replace('"', '""') + '",3\n' + "\n" * blank_lines
    found = parse(text.encode(), "F", None, list(TAD.formats.values()))
    assert [found.at[i] for i in range(len(rows))] == [f"F:{line}" for line in wanted]


def test_rows_of_several_files_are_placed_in_their_own():
    def file(rows):
        return b"image,score\n" + b"".join(rows)

    files = (("A", file([b"a,3\n"])), ("B", file([b"b,3\n", b"c,x\n"])), ("C", file([b"d,x\n", b"e,3\n", b"a,3\n"])))
    dropped = assemble(Sources(files), TAD, Choices(drop_bad=True)).dropped
    assert [d["at"] for d in dropped] == ["B:3", "C:2", "C:4"] and "already in A:2" in dropped[2]["text"]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_naming_thousands_of_bad_rows_costs_about_what_reading_costs(kind):
    n = 8000
    if kind == "csv":
        data = "image,score\n" + "".join(f"{i % n}.jpg,3\n" for i in range(2 * n))
    else:
        data = json.dumps([{"image": f"{i % n}.jpg", "gt_score": 3} for i in range(2 * n)])
    start = time.process_time()
    made = assemble(Sources((("F", data.encode()),)), TAD, Choices(drop_bad=True))
    assert len(made.dropped) == n
    assert time.process_time() - start < 4  # about 0.2 s; a walk through the file for each row took minutes
