"""A survey of exits: every sub-command, and what can go wrong with what it reads and writes.

Exit 2 is one line that names the file; exit 0 comes only with complete output: that of an undisturbed run. Output that
was there before stays, or is replaced by a complete one. SURVEY=all (nightly) adds each damage to each input and each
moment of a kill; else one of them stands for all.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

import exit_cases as cases
import pytest
from exit_cases import COMMANDS, DAMAGE, Command, contents
from openai_server import OpenAIServer

ALL = os.environ.get("SURVEY") == "all"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    directory = tmp_path_factory.mktemp("survey") / "inputs"
    cases.make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def teacher():
    with OpenAIServer() as server:
        keys = [(who, key) for who in ("teacher", "judge") for key in ("url", "model")]
        yield " ".join(f"rationale.{who}.{key}={server.url if key == 'url' else who}" for who, key in keys)


@pytest.fixture
def survey(everything, teacher, tmp_path, monkeypatch):
    """Return a `Surveyed` of a command by name."""

    class Surveyed:
        def __init__(self, name: str) -> None:
            self.command: Command = COMMANDS[name]
            self.words = self.command.words.format(teacher=teacher).split()
            self.places = (tmp_path / str(i) for i in itertools.count())

        def place(self) -> Path:
            """A new directory with the inputs, which is then the current one."""
            here = next(self.places)
            (here / "out").mkdir(parents=True)
            for name in {
                *(i.split("/")[0] for i in self.command.inputs),
                *re.findall("model|pictures", " ".join(self.words)),
            }:
                source = everything / name
                if source.is_dir():
                    shutil.copytree(source, here / name, symlinks=True)
                elif source.exists():
                    shutil.copy(source, here / name)
            monkeypatch.chdir(here)
            return here

        def output(self, here: Path) -> dict[str, bytes | None]:
            """What the command has written, by name."""
            found = contents(here / "out", self.command.exact)
            names = [name.removeprefix("out/") for name in self.command.outputs]
            return {k: v for k, v in found.items() if any(k == n or k.startswith(f"{n}/") for n in names)}

        def whole(self, *more: str) -> dict[str, bytes | None]:
            """The output of an undisturbed run."""
            here = self.place()
            done = cases.run([*self.words, *more])
            assert done.status == 0, done
            found = self.output(here)
            assert all((here / name).exists() for name in self.command.outputs), found.keys()
            return found

    return Surveyed


def of(column, *, writes=None):
    """Parametrize with the commands that have an outcome in a column; `writes`: only those with output, or without."""
    names = [
        name for name, c in COMMANDS.items()
        if not cases.cell(c, column).startswith("—") and (writes is None or bool(c.outputs) == writes)
    ]  # fmt: skip
    return pytest.mark.parametrize("name", [n for n in names if sampled(n, column)])


def sampled(name, column):
    """Every third cell, each command's at other columns; all nightly."""
    return ALL or (list(COMMANDS).index(name) + cases.COLUMNS.index(column)) % 3 == 0


def kept_or_whole(now, before, whole):
    """Each file is as it was or as an undisturbed run writes it, and none is gone or half there."""
    wrong = [name for name, data in now.items() if data not in (before.get(name, b"no such file"), whole.get(name))]
    assert not wrong and not before.keys() - now.keys(), (wrong, before.keys() - now.keys())


@pytest.mark.parametrize(
    ("name", "column"),
    [(n, c) for n, k in COMMANDS.items() for c in DAMAGE if sampled(n, c) and not cases.cell(k, c).startswith("—")],
)
def test_a_bad_input_is_one_line_that_names_it_and_changes_nothing(survey, name, column):
    surveyed = survey(name)
    command = surveyed.command
    for k, path in enumerate(command.inputs):
        kinds = list(DAMAGE[column].items())
        for kind, damage in kinds if ALL else [kinds[k % len(kinds)]]:
            here = surveyed.place()
            if column == "truncated" and (here / path).is_dir():
                continue
            damage(here / path)
            before = contents(here)
            done = cases.run(surveyed.words)
            letters = [letter for c, i, letter in command.tolerates if (c, i) == (column, path)]
            if not letters:
                assert Path(path).name in done.line or re.search(rf" {path.split('/')[0]}(/[\w.]+)?: ", done.line), (
                    kind,
                    done,
                )
                if not name.startswith(("sft", "grpo", "evaluate")):  # their event log says what happened
                    assert contents(here) == before, (path, kind)
                continue
            if letters == ["a"] and done.status == 2:
                assert done.line  # without its settings the defaults do not fit the machine
                continue
            said = done.out + done.err + "".join(f.read_text() for f in (here / "out").glob("*.html"))
            if kind == "directory" and done.status == 2:
                assert Path(path).name in done.line
            else:
                assert done.status == 0, (path, kind, done)
                assert all((here / output).exists() for output in command.outputs)
                named = kind != "directory" and letters in (["c"], ["m"])
                assert not named or Path(path).name in said, (path, kind)


@of("read-only")
def test_output_that_cannot_be_written_is_one_line_and_what_was_there_stays(survey, name):
    surveyed = survey(name)
    whole = surveyed.whole() if surveyed.command.outputs else {}
    for placed in (
        (False, True) if surveyed.command.outputs and cases.cell(surveyed.command, "twice") == "0" else (False,)
    ):
        here = surveyed.place()
        if placed:
            cases.run(surveyed.words)
        with cases.read_only(here / "out"):
            done = cases.run(surveyed.words)
        assert "out" in done.line
        assert surveyed.output(here) == (whole if placed else {}), name
    here = surveyed.place()
    (here / "out").rmdir()
    (here / "out").write_text("a file where a directory is needed")
    assert "out" in cases.run(surveyed.words).line


@of("full disk", writes=True)
def test_a_full_disk_is_one_line_and_what_was_there_stays(survey, name):
    surveyed = survey(name)
    whole = surveyed.whole()
    room = max(len(data or b"") for data in whole.values()) // 2
    again = cases.cell(surveyed.command, "twice") == "0"
    for placed, most in [(False, 0), (again, room), *([(again, 0), (False, room)] if ALL else [])]:
        here = surveyed.place()
        if placed:
            cases.run(surveyed.words)
        before = surveyed.output(here)
        with cases.full_disk(most):
            done = cases.run(surveyed.words)
        assert done.status == 2 and "Traceback" not in done.err, done
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("tatar-dist: out/") and ("too large" in last or "No space" in last), last
        kept_or_whole(surveyed.output(here), before, whole)
        if not placed:
            assert cases.run(surveyed.words).status == 0 and surveyed.output(here) == whole, name


@of("full disk", writes=False)
def test_printing_to_a_full_disk_is_one_line(survey, name):
    surveyed = survey(name)
    done = cases.on_full_output(surveyed.place(), surveyed.words)
    assert (done.status, done.err) == (2, "tatar-dist: the output: No space left on device; what was finished is "
                                         "kept: make room on that disk and run again\n")  # fmt: skip


@of("killed", writes=True)
def test_a_killed_command_leaves_whole_files_and_the_same_command_completes_them(survey, name):
    surveyed = survey(name)
    whole = surveyed.whole()
    here, moments = surveyed.place(), 0
    while cases.killed(here, surveyed.words, moments):
        kept_or_whole(surveyed.output(here), {}, whole)
        moments += 1
        if cases.run(surveyed.words).status == 2:
            assert cases.cell(surveyed.command, "twice") == "2 f" and surveyed.output(here) == whole
        assert surveyed.output(here) == whole, moments
        here = surveyed.place()
        if moments == 2 and not ALL:
            break
    assert moments, "it was killed at least once"


@of("twice")
def test_a_command_given_twice_leaves_the_same(survey, name):
    surveyed = survey(name)
    here = surveyed.place()
    first = cases.run(surveyed.words)
    before = surveyed.output(here)
    second = cases.run(surveyed.words)
    if cases.cell(surveyed.command, "twice") == "0":
        assert second.status == 0, second
        assert surveyed.command.outputs or not surveyed.command.exact or second.out == first.out
    else:
        assert "out/" in second.line
    assert surveyed.output(here) == before


@of("another setting", writes=True)
def test_another_setting_gives_its_own_output_or_none(survey, name):
    surveyed = survey(name)
    more = surveyed.command.another.split()
    other = surveyed.whole(*more)
    here = surveyed.place()
    cases.run(surveyed.words)
    before = surveyed.output(here)
    assert before != other
    done = cases.run([*surveyed.words, *more])
    if cases.cell(surveyed.command, "another setting") == "0":
        assert done.status == 0 and surveyed.output(here) == other, done
    else:
        assert done.line and surveyed.output(here) == before


def test_every_command_is_in_the_survey():
    from tatar_dist.cli import app

    words = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands}
    for group in app.registered_groups:
        words |= {f"{group.name} {c.name}" for c in group.typer_instance.registered_commands}
    rows = set(re.split(", ", ", ".join(COMMANDS)))
    missing = {w for w in words if not any(row == w or row.startswith(f"{w} ") for row in rows)}
    assert missing == {"data demo"}  # makes what `demo` does first, from installed packages


def test_the_page_has_the_table():
    text = cases.PAGE.read_text(encoding="utf-8")
    found = text.partition(cases.BEGIN)[2].partition(cases.END)[0]
    assert found.strip() == cases.table().strip(), "run: python tests/unit/exit_cases.py"


def test_results_are_written_whole_or_not_at_all():
    """A file written in place is half there after a kill; these are in directories that are new, or renamed whole."""
    new = {
        *("bench", "gpu_check", "config/page.py", "scoring/export.py", "demo/tiny/pretrain.py", "run/files.py"),
        *("run/checkpoints.py", "faults/stall.py", "assets"),
    }
    package = ROOT / "tatar_dist"
    found = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py")
        if re.search(r"\.write_(text|bytes)\(", path.read_text())
    }  # fmt: skip
    assert {f for f in found if not any(f == n or f.startswith(f"{n}/") for n in new)} == set()
