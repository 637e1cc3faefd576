"""The journal: what is written is read back, what was torn is cut, what was altered is refused."""

import asyncio
import os
import resource
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatar_dist.errors import UserError
from tatar_dist.run.journal import Journal, decode, encode

SETTINGS = {"model": "m", "temperature": 0.3}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def lines(path, settings=SETTINGS):
    found = []
    with Journal(path, settings) as journal:
        journal.read(found.append)
    return found


def filled(path, n=5):
    with Journal(path, SETTINGS) as journal:
        journal.read(lambda line: None)
        for i in range(n):
            journal.write({"i": i, "text": "é\n\u2028" * 3})
    return path


@given(st.dictionaries(st.text(), JSON))
def test_any_line_reads_back_as_it_was(line):
    raw = encode(line)
    assert raw.count(b"\n") == 1 and decode(raw) == line


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_line_with_any_byte_changed_is_none(position, flip):
    raw = bytearray(encode({"sample_id": "a", "text": "some text"}))
    raw[position % len(raw)] ^= flip
    assert decode(bytes(raw)) is None


@given(st.binary())
def test_any_bytes_are_a_line_or_none(raw):
    assert decode(raw) is None


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_ignored_and_cut(tmp_path, cut):
    path = filled(tmp_path / "j")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [line["i"] for line in lines(path)] == [0, 1, 2, 3]
    with Journal(path, SETTINGS) as journal:
        journal.read(lambda line: None)
        journal.write({"i": 4, "text": "é\n\u2028" * 3})
    assert path.read_bytes() == whole


def test_a_journal_torn_in_its_first_line_begins_anew(tmp_path):
    path = filled(tmp_path / "j", 0)
    path.write_bytes(path.read_bytes()[:20])
    assert lines(path) == [] and decode(path.read_bytes())["settings"] == SETTINGS


@pytest.mark.parametrize(
    "content", [b"my notes\nof a year\n", b"one line\n", b"no newline", b"\x00\xff" * 4000, b'{"sum":"1"}\n', b"\n"]
)
def test_a_file_that_holds_no_line_of_a_journal_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a journal;"):
        lines(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["j"]


def test_several_damaged_lines_at_the_end_are_counted_and_kept_beside(tmp_path):
    path = filled(tmp_path / "j")
    raw = path.read_bytes().splitlines(keepends=True)
    bad = [line.replace(b'"i"', b'"j"') for line in raw[3:]]
    path.write_bytes(b"".join([*raw[:3], *bad]))
    kept = []
    with Journal(path, SETTINGS) as journal:
        journal.read(kept.append)
        assert [line["i"] for line in kept] == [0, 1]
        assert "last 3 lines are damaged" in journal.cut and "j.damaged" in journal.cut
    assert (tmp_path / "j.damaged").read_bytes() == b"".join(bad)
    with Journal(path, SETTINGS) as journal:
        journal.read(lambda line: None)
        assert journal.cut is None


def test_a_torn_last_line_is_said(tmp_path):
    path = filled(tmp_path / "j")
    path.write_bytes(path.read_bytes()[:-10])
    with Journal(path, SETTINGS) as journal:
        journal.read(lambda line: None)
        assert "torn by a kill" in journal.cut
    assert os.listdir(tmp_path) == ["j"]


def test_nothing_is_reported_as_appended_before_a_sync_that_followed_its_write(tmp_path, monkeypatch):
    events, write, sync = [], os.write, os.fdatasync

    def noted_write(file, data):
        events.append(("write", bytes(data)))
        return write(file, data)

    def noted_sync(file):
        sync(file)
        events.append(("sync", b""))

    async def append_all(journal):
        for i in range(20):
            await journal.append({"i": i})
            written = next(n for n, (what, data) in enumerate(events) if what == "write" and b'"i":%d}' % i in data)
            assert ("sync", b"") in events[written:], "on disk, not only handed to the system"

    with Journal(tmp_path / "j", SETTINGS) as journal:
        journal.read(lambda line: None)
        monkeypatch.setattr(os, "write", noted_write)
        monkeypatch.setattr(os, "fdatasync", noted_sync)
        asyncio.run(append_all(journal))
        journal.write({"i": 20})
        assert events[-2][0] == "write" and events[-1][0] == "sync"


def test_damage_before_the_end_is_refused_with_its_line(tmp_path):
    path = filled(tmp_path / "j")
    raw = path.read_bytes().splitlines(keepends=True)
    raw[2] = raw[2].replace(b'"i":1', b'"i":7')
    path.write_bytes(b"".join(raw))
    with pytest.raises(UserError, match=":3: this line is damaged"):
        lines(path)


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(encode({"something": "else"}))
    with pytest.raises(UserError, match="not a journal of this version"):
        lines(path)


def test_other_settings_are_refused_and_named(tmp_path):
    path = filled(tmp_path / "j")
    with pytest.raises(UserError, match=r"temperature was 0\.3, is 0\.4"):
        lines(path, {**SETTINGS, "temperature": 0.4})
    with pytest.raises(UserError, match="extra was None, is 1"):
        lines(path, {**SETTINGS, "extra": 1})


def test_many_slots_share_a_commit_and_each_returns_only_when_its_line_is_on_disk(tmp_path, monkeypatch):
    path, commits, sync = tmp_path / "j", [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: commits.append(sync(file)))

    async def slot(journal, i):
        await journal.append({"i": i})
        assert any((decode(raw) or {}).get("i") == i for raw in path.read_bytes().splitlines(keepends=True))

    async def together(journal):
        await asyncio.gather(*(slot(journal, i) for i in range(200)))

    with Journal(path, SETTINGS) as journal:
        journal.read(lambda line: None)
        commits.clear()
        asyncio.run(together(journal))
        assert 0 < len(commits) < 100
    assert sorted(line["i"] for line in lines(path)) == list(range(200))


def test_a_full_disk_fails_every_later_line_too_so_that_none_follows_a_torn_one(tmp_path):
    path = tmp_path / "j"

    async def until_full(journal):
        outcomes = []
        for i in range(6):
            results = await asyncio.gather(journal.append({"i": i, "text": "x" * 400}), return_exceptions=True)
            outcomes += results
        return outcomes

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Journal(path, SETTINGS) as journal:
            journal.read(lambda line: None)
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 1000, limits[1]))
            outcomes = asyncio.run(until_full(journal))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert outcomes[:2] == [None, None] and all(isinstance(e, OSError) for e in outcomes[2:])
    assert [line["i"] for line in lines(path)] == [0, 1]
