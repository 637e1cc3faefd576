"""The batch sampler: balance, rankability, epochs without repeats, exact resume, quarantine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tatar_dist.data import pool_cursor
from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.data.pools import Pool
from tatar_dist.data.sampler import PromptSampler, check_rationales
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError


def manifest(
    path: Path, task: str, n: int, dataset: str | None = None, score=lambda i: float(i % 101), text: str | None = "why"
) -> Manifest:
    name = dataset or f"set-{task}"
    same = {"dataset": name, "task": task, "image_bytes": b"x", "split": "train", "rationale": text}
    rows = ({"sample_id": f"{name}-{i}", "score": score(i), **same} for i in range(n))
    file = path / f"{name}-{task}.parquet"
    write_manifest(file, rows)
    return read_manifest(file)


def pool_of(manifest: Manifest, row: int) -> Pool:
    return next(p for p in manifest.pools if row in p)


@pytest.fixture
def both(tmp_path):
    return [manifest(tmp_path, "iqa", 37), manifest(tmp_path, "iaa", 23)]


def test_every_batch_holds_both_tasks_in_the_configured_share(both):
    sampler = PromptSampler(both, seed=1, iqa_fraction=0.25)
    for _ in range(30):
        tasks = [pool_of(both[m], r).task for m, r in sampler.next_batch(8)]
        assert tasks == ["iqa"] * 2 + ["iaa"] * 6


def test_no_row_comes_twice_in_a_batch_even_across_an_epoch(both):
    sampler = PromptSampler(both, seed=2)
    for _ in range(60):
        batch = sampler.next_batch(14)
        assert len(set(batch)) == 14


def test_an_epoch_shows_every_row_exactly_once(both):
    sampler = PromptSampler(both, seed=3)
    drawn = [ref for _ in range(100) for ref in sampler.next_batch(8)]
    for m, size in ((0, 37), (1, 23)):
        rows = [row for manifest, row in drawn if manifest == m]
        for epoch in range(10):
            assert sorted(rows[size * epoch : size * (epoch + 1)]) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]  # and the epochs differ in order


def test_same_seed_gives_the_same_batches_and_another_seed_others(both):
    def draw(seed):
        sampler = PromptSampler(both, seed=seed)
        return [sampler.next_batch(8) for _ in range(5)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_a_restored_sampler_continues_exactly_where_the_state_was_taken(both):
    sampler = PromptSampler(both, seed=4)
    sampler.exclude((1, 3))
    for _ in range(11):
        sampler.next_batch(8)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = [sampler.next_batch(8) for _ in range(20)]
    again = PromptSampler(both, seed=4)
    again.load_state_dict(state)
    assert [again.next_batch(8) for _ in range(20)] == rest


def test_state_of_another_seed_or_other_data_is_refused(both, tmp_path):
    state = PromptSampler(both, seed=4).state_dict()
    with pytest.raises(UserError, match="seed 4"):
        PromptSampler(both, seed=5).load_state_dict(state)
    other = [both[0], manifest(tmp_path, "iaa", 24, "set-iaa")]
    with pytest.raises(UserError, match="set-iaa-iaa.parquet: manifest 2 of data.train is not what"):
        PromptSampler(other, seed=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "embedded", "drawn", "refused"),
    [
        (65_536, False, True, False),
        (65_537, False, True, True),
        (65_537, False, False, False),
        (65_537, True, True, False),
    ],
)
def test_state_of_an_older_version_is_refused_where_its_order_was_another_one(tmp_path, rows, embedded, drawn, refused):
    same = {
        "dataset": "large",
        "task": "iqa",
        "split": "train",
        "rationale": None,
        "image": None if embedded else "x.png",
    }
    same["image_bytes"] = b"x" if embedded else None
    write_manifest(
        tmp_path / "m.parquet", ({"sample_id": str(i), "score": float(i % 101), **same} for i in range(rows))
    )
    sampler = PromptSampler([read_manifest(tmp_path / "m.parquet")], seed=4, iqa_fraction=1.0)
    if drawn:
        sampler.next_batch(8)
    state = sampler.state_dict()
    del state["order"]
    if refused:
        with pytest.raises(UserError, match="data set 'large' in the order of another version: train into another dir"):
            sampler.load_state_dict(state)
    else:
        sampler.load_state_dict(state)


def test_a_data_set_of_too_many_rows_is_refused(both, monkeypatch):
    monkeypatch.setattr(pool_cursor, "MAX_ROWS", 36)
    with pytest.raises(UserError, match="'set-iqa' has 37 rows, more than 36"):
        PromptSampler(both, seed=1)


def test_state_of_other_files_of_the_same_sizes_or_in_another_order_is_refused(tmp_path):
    two = [manifest(tmp_path, "iqa", 30), manifest(tmp_path, "iaa", 30)]
    state = json.loads(json.dumps(PromptSampler(two, seed=4).state_dict()))
    PromptSampler(two, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="set-iaa-iaa.parquet: manifest 1 of data.train is not what the checkpoint"):
        PromptSampler(two[::-1], seed=4).load_state_dict(state)
    (tmp_path / "other").mkdir()
    renamed = manifest(tmp_path / "other", "iaa", 30, text="why not")
    with pytest.raises(UserError, match="manifest 2 of data.train is not what"):
        PromptSampler([two[0], renamed], seed=4).load_state_dict(state)
    del state["manifests"]
    with pytest.raises(UserError, match="has no 'manifests': it is from another version"):
        PromptSampler(two, seed=4).load_state_dict(state)


def test_a_checkpoint_continues_after_the_manifests_moved(both, tmp_path):
    state = PromptSampler(both, seed=4).state_dict()
    moved = [read_manifest(m.path.rename(tmp_path / f"moved-{m.path.name}")) for m in both]
    PromptSampler(moved, seed=4).load_state_dict(state)


def test_excluded_samples_never_come_back(both):
    sampler = PromptSampler(both, seed=5)
    gone = set(sampler.next_batch(8))
    for m, row in gone:
        sampler.exclude((m, row))
    later = {ref for _ in range(40) for ref in sampler.next_batch(8)}
    assert not later & gone
    assert len(later) == 37 + 23 - 8


def test_the_iaa_part_of_a_batch_comes_from_one_data_set_in_proportion_to_size(tmp_path):
    sets = [manifest(tmp_path, "iqa", 10)]
    sets += [manifest(tmp_path, "iaa", 60, "large"), manifest(tmp_path, "iaa", 20, "small")]
    sampler = PromptSampler(sets, seed=6)
    seen: Counter[str] = Counter()
    for _ in range(40):
        names = {pool_of(sets[m], r).dataset for m, r in sampler.next_batch(8) if pool_of(sets[m], r).task == "iaa"}
        assert len(names) == 1
        seen.update(names)
    assert seen == {"large": 30, "small": 10}


def test_a_data_set_that_cannot_rank_is_refused_at_construction(tmp_path):
    iqa = manifest(tmp_path, "iqa", 10)
    with pytest.raises(UserError, match="'tiny' has 3 usable image.*min_rank_pool=4"):
        PromptSampler([iqa, manifest(tmp_path, "iaa", 3, "tiny")], seed=0, min_rank_pool=4)
    with pytest.raises(UserError, match="'flat': all scores are equal"):
        PromptSampler([iqa, manifest(tmp_path, "iaa", 9, "flat", score=lambda i: 50.0)], seed=0)


def test_a_batch_too_small_to_rank_is_an_error_not_a_silent_zero(both):
    with pytest.raises(UserError, match="ranking needs 3"):
        PromptSampler(both, seed=0, min_rank_pool=3).next_batch(4)


def test_exclusions_that_leave_nothing_to_rank_are_reported(tmp_path):
    sampler = PromptSampler([manifest(tmp_path, "iqa", 9), manifest(tmp_path, "iaa", 5)], seed=0)
    for i in range(2):
        sampler.exclude((1, i))
    with pytest.raises(UserError, match="largest has 3 usable"):
        sampler.next_batch(8)


def test_a_task_without_data_is_refused_unless_its_share_is_zero(tmp_path):
    iqa = manifest(tmp_path, "iqa", 9)
    with pytest.raises(UserError, match="no iaa samples"):
        PromptSampler([iqa], seed=0)
    assert len(PromptSampler([iqa], seed=0, iqa_fraction=1.0).next_batch(4)) == 4


def test_the_same_manifest_given_twice_is_refused(both):
    with pytest.raises(UserError, match="was given already"):
        PromptSampler([*both, both[0]], seed=0)


def test_steps_per_epoch_covers_the_larger_task(both):
    assert PromptSampler(both, seed=0).steps_per_epoch(8) == 10  # 37 rows at 4 a batch


def test_supervised_batches_mix_data_sets_in_proportion(tmp_path):
    sets = [manifest(tmp_path, "iqa", 10)]
    sets += [manifest(tmp_path, "iaa", 60, "large"), manifest(tmp_path, "iaa", 20, "small")]
    batch = PromptSampler(sets, seed=0, supervised=True).next_batch(16)
    assert Counter(pool_of(sets[m], r).dataset for m, r in batch) == {"set-iqa": 8, "large": 6, "small": 2}


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_manifest_without_any_rationale_is_refused_where_its_task_needs_them(tmp_path, text):
    sets = [manifest(tmp_path, "iqa", 4), manifest(tmp_path, "iaa", 4, text=text)]
    with pytest.raises(UserError, match="set-iaa-iaa.parquet: column rationale: no row has one.*sft.thought_dropout"):
        check_rationales(sets, ("iqa", "iaa"))
    check_rationales(sets, ("iqa",))


def test_a_supervised_batch_needs_nothing_to_rank(tmp_path):
    flat = manifest(tmp_path, "iaa", 4, score=lambda i: 50.0)
    assert len(PromptSampler([manifest(tmp_path, "iqa", 4), flat], seed=0, supervised=True).next_batch(2)) == 2


def test_another_row_of_a_data_set_avoids_what_was_asked_and_ends_when_there_is_none(tmp_path):
    sampler = PromptSampler([manifest(tmp_path, "iqa", 6, "q"), manifest(tmp_path, "iaa", 4, "a")], seed=0)
    avoid = {("a", sampler.sample_id(ref)) for ref in sampler.next_batch(4) if ref[0] == 1}
    for left in (1, 0):
        ref = sampler.another("a", avoid)
        assert ref is not None and ref[0] == 1 and ("a", sampler.sample_id(ref)) not in avoid
        avoid.add(("a", sampler.sample_id(ref)))
        assert 4 - len(avoid) == left
    assert sampler.another("a", avoid) is None
    assert sampler.another("q", ()) is not None


def test_rows_passed_over_by_another_are_not_lost_to_their_epoch(tmp_path):
    sampler = PromptSampler([manifest(tmp_path, "iqa", 6, "q"), manifest(tmp_path, "iaa", 6, "a")], seed=0)
    batch = [ref for ref in sampler.next_batch(4) if ref[0] == 1]
    coming = PromptSampler([*sampler.manifests], seed=0)
    coming.next_batch(4)
    avoid = {("a", sampler.sample_id(ref)) for ref in coming.next_batch(4) if ref[0] == 1}
    batch.append(sampler.another("a", avoid))
    batch += [ref for _ in range(3) for ref in sampler.next_batch(2 * 2) if ref[0] == 1]
    assert sorted(batch[:6]) == [(1, i) for i in range(6)]


def test_the_preset_decides_which_tasks_need_a_pool_that_ranks(tmp_path):
    iqa = [manifest(tmp_path, "iqa", 5, name) for name in ("q1", "q2")]
    iaa = [manifest(tmp_path, "iaa", 5, name) for name in ("a1", "a2")]

    def sets_of_a_batch(task, **ranked):
        sampler = PromptSampler([*iqa, *iaa], seed=0, **ranked)
        batch = [sampler.next_batch(8) for _ in range(3)]
        return [{pool.dataset for m, _ in b for pool in sampler.manifests[m].pools if pool.task == task} for b in batch]

    assert [len(s) for s in sets_of_a_batch("iaa")] == [1] * 3 and max(map(len, sets_of_a_batch("iqa"))) == 2
    both = {"ranked": ("iqa", "iaa")}
    assert [len(s) for s in sets_of_a_batch("iqa", **both)] == [1] * 3
    assert max(map(len, sets_of_a_batch("iaa", ranked=()))) == 2
    flat = manifest(tmp_path, "iqa", 9, "flat", score=lambda i: 50.0)
    PromptSampler([flat, *iaa], seed=0)
    with pytest.raises(UserError, match="IQA data set 'flat': all scores are equal"):
        PromptSampler([flat, *iaa], seed=0, **both)


def test_rows_put_off_at_an_epochs_end_are_shown_later_also_after_a_resume(tmp_path):
    """Batches of 4 from 5 rows: nearly every batch reaches across an epoch's end and puts rows off."""
    five = manifest(tmp_path, "iqa", 5)
    sampler = PromptSampler([five], seed=0, iqa_fraction=1.0)
    seen: Counter[int] = Counter()
    put_off = 0
    for _ in range(100):
        batch = sampler.next_batch(4)
        assert len(set(batch)) == 4
        seen.update(row for _, row in batch)
        state = json.loads(json.dumps(sampler.state_dict()))
        put_off += len(state["pools"]["set-iqa"]["put_off"])
        sampler = PromptSampler([five], seed=0, iqa_fraction=1.0)
        sampler.load_state_dict(state)
    assert put_off > 20 and sum(seen.values()) == 400
    assert max(seen.values()) - min(seen.values()) <= 2, seen
