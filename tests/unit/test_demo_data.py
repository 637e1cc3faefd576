"""The demo set: reproducible to the byte, split by photograph, with targets and words that follow from the pixels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tatar_dist.data.images import decode_image
from tatar_dist.data.manifest import read_manifest
from tatar_dist.demo.data import aesthetics, distortions
from tatar_dist.demo.data import texts as templates
from tatar_dist.demo.data.distortions import FAMILIES, Distortion
from tatar_dist.demo.data.make import DemoCrop, make_crop, make_demo
from tatar_dist.demo.data.photos import PHOTOS, Photo, grade, load_photo, locate, make_scene, photos_of, soften
from tatar_dist.errors import UserError

SMALL = {"train": 70, "validation": 6, "test": 9}


@cache
def crops(task: str, split: str = "train", n: int = 240) -> tuple[DemoCrop, ...]:
    return tuple(make_crop(task, split, i, seed=11) for i in range(n))


def test_every_photograph_is_there_and_belongs_to_one_split():
    assert len({p.name for p in PHOTOS}) == len({(p.package, p.path) for p in PHOTOS}) == len(PHOTOS)
    for photo in PHOTOS:
        assert min(load_photo(photo).size) >= 256
        x0, y0, x1, y1 = photo.box
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def test_the_test_split_holds_out_at_least_four_photographs_of_several_kinds():
    test = photos_of("test")
    assert len(test) >= 4 and {p.category for p in test} >= {"landscape", "object", "portrait"}


def test_a_missing_photograph_names_its_package_and_the_remedy():
    for package, path in (("no_such_package", "x.png"), ("numpy", "x.png")):
        photo = Photo("ghost", package, path, "train", "object", (0, 0, 1, 1), "")
        with pytest.raises(UserError, match=f"'ghost'.*{package}.*make setup"):
            locate(photo)


def test_no_package_of_photographs_is_imported_nor_anything_heavy():
    code = (
        "import sys; from tatar_dist.demo.data.make import make_crop; make_crop('iqa', 'train', 0, 0);"
        "print(sorted({m.split('.')[0] for m in sys.modules} &"
        "{'skimage', 'sklearn', 'matplotlib', 'gradio', 'thumbor', 'imgaug', 'mahotas', 'torch', 'ray', 'vllm'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
    counts = make_demo(tmp_path / "a", seed=3, **SMALL, workers=1)
    assert counts == {f"{t}_{s}": n for t in ("iqa", "iaa") for s, n in SMALL.items()}
    make_demo(tmp_path / "b", seed=3, **SMALL, workers=2)
    for name in counts:
        assert (tmp_path / f"a/{name}.parquet").read_bytes() == (tmp_path / f"b/{name}.parquet").read_bytes()
        manifest = read_manifest(tmp_path / f"a/{name}.parquet")
        task, split = name.split("_")
        assert len(manifest) == counts[name] and {p.task for p in manifest.pools} == {task}
        sample = manifest.get(5)
        crop = make_crop(task, split, 5, seed=3)
        assert np.array_equal(np.asarray(decode_image(sample.image, "x")), crop.pixels)
        assert (sample.split, sample.score, sample.rationale) == (split, crop.score, crop.rationale)
        assert sample.meta == crop.meta


def marked(mark: str) -> list[str]:
    """Command lines of living processes that inherited an environment variable MARK=mark."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if command and f"MARK={mark}".encode() in (directory / "environ").read_bytes():  # a zombie has no command
                found.append(command[:100])
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def test_a_killed_parent_leaves_no_worker_behind(tmp_path):
    mark = uuid.uuid4().hex
    code = (
        "import sys; from pathlib import Path; from tatar_dist.demo.data.make import make_demo\n"
        "if __name__ == '__main__': make_demo(Path(sys.argv[1]), train=20_000, workers=2)\n"
    )
    (tmp_path / "make.py").write_text(code)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "make.py"), str(out)]
    parent = subprocess.Popen(command, env={**os.environ, "MARK": mark, "PYTHONPATH": os.getcwd()})
    try:
        wait_until(lambda: any(f.stat().st_size > 10_000 for f in out.glob(".iqa_train*")), 300, "the first rows")
        assert len(marked(mark)) >= 4, marked(mark)  # the parent, the resource tracker, two workers
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not marked(mark), 60, "the end of all processes")


def test_a_set_already_made_is_kept_and_another_recipe_replaces_it(tmp_path):
    sizes = {"train": 3, "validation": 3, "test": 3}
    make_demo(tmp_path, seed=1, **sizes, workers=1)
    first = (tmp_path / "iqa_train.parquet").stat().st_mtime_ns
    make_demo(tmp_path, seed=1, **sizes, workers=1)
    assert (tmp_path / "iqa_train.parquet").stat().st_mtime_ns == first
    make_demo(tmp_path, seed=2, **sizes, workers=1)
    assert read_manifest(tmp_path / "iqa_train.parquet").sample_id(0).startswith("demo-iqa-train-2-")
    (tmp_path / "demo.json").write_bytes(b"\xff{")  # damaged: made again
    make_demo(tmp_path, seed=1, **sizes, workers=1)
    assert read_manifest(tmp_path / "iqa_train.parquet").sample_id(0).startswith("demo-iqa-train-1-")
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.tmp"))


def test_a_crop_is_112_pixels_square():
    pixels = make_crop("iaa", "validation", 7, seed=4).pixels
    assert pixels.shape == (112, 112, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("task", ["iqa", "iaa"])
def test_photographs_and_pasted_subjects_stay_within_their_split(task):
    for split in ("train", "validation", "test"):
        own = {p.name for p in photos_of(split)}
        metas = [c.meta for c in (crops(task, split, 60) if split == "validation" else crops(task, split))]
        assert {m["photo"] for m in metas} <= own
        assert {m["pasted"] for m in metas} - {None} <= own


@pytest.mark.parametrize("task", ["iqa", "iaa"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_scores_fill_the_scale_and_most_variance_lies_within_a_photograph(task, split):
    scores = np.array([c.score for c in crops(task, split)])
    photos = np.array([c.meta["photo"] for c in crops(task, split)])
    assert scores.min() >= 0 and scores.max() <= 100
    low, middle, high = np.percentile(scores, (5, 50, 95))
    assert low < 20 and 40 < middle < 62 and high > 88
    between = sum(np.mean(photos == p) * (scores[photos == p].mean() - scores.mean()) ** 2 for p in set(photos))
    assert 1 - between / scores.var() >= 0.6


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_within_a_family_quality_falls_with_strength_whatever_the_photograph(family):
    strengths, values = [], []
    for i in range(90):
        rng = np.random.default_rng([21, i])
        scene = make_scene("train" if i % 2 else "test", rng, paste_share=0.15)
        strength = float(rng.random())
        distorted = distortions.distort(scene.pixels, (Distortion(family, strength),), rng)
        strengths.append(strength)
        values.append(distortions.full_reference(distortions.to_uint8(scene.pixels), distorted))
    assert spearmanr(strengths, values).statistic <= -0.9


def test_an_undistorted_crop_has_quality_one_and_any_two_crops_lie_in_the_unit_interval():
    pixels = [c.pixels for c in crops("iaa")[:60]]
    assert [distortions.full_reference(p, p) for p in pixels] == pytest.approx([1.0] * 60, abs=1e-4)
    for a, b in zip(pixels, pixels[1:], strict=False):
        assert 0 <= distortions.full_reference(a, b) < 0.6


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_both_score_mappings_are_monotone_and_stay_on_the_scale(a, b):
    for mapping in (distortions.quality_score, aesthetics.aesthetic_score):
        low, high = mapping(min(a, b)), mapping(max(a, b))
        assert 0 <= low <= high <= 100


def test_measured_attributes_follow_what_was_done_to_the_picture():
    scene = make_scene("train", np.random.default_rng(4), paste_share=0.0)

    def measured(pixels):
        return aesthetics.measure(distortions.to_uint8(pixels), scene.box)

    same = {"stops": 0.0, "contrast": 1.0, "saturation": 1.0, "tint": (0.0, 0.0), "vignette": 0.0}
    plain = measured(scene.pixels)
    assert set(aesthetics.WEIGHTS) < set(plain) and all(0 <= v <= 1 for v in plain.values())
    assert measured(grade(scene.pixels, **same | {"saturation": 0.0}))["colour"] == 0
    assert measured(grade(scene.pixels, **same | {"contrast": 0.4}))["contrast"] < plain["contrast"]
    assert measured(grade(scene.pixels, **same | {"tint": (0.3, 0.0)}))["warmth"] > plain["warmth"]
    assert measured(soften(scene.pixels, 2.0))["sharpness"] < plain["sharpness"]
    dark, darker = (measured(grade(scene.pixels, **same | {"stops": s})) for s in (-3.0, -6.0))
    assert darker["exposure"] < dark["exposure"] < plain["exposure"]
    assert sum(aesthetics.WEIGHTS.values()) == pytest.approx(1.0)


def test_quality_rationales_are_two_sentences_of_30_to_50_words_naming_what_was_applied():
    for crop in crops("iqa"):
        assert 30 <= len(crop.rationale.split()) <= 50, crop.rationale
        assert crop.rationale.count(".") == 2 and crop.rationale.endswith(".")
        for d in crop.meta["distortions"]:
            name = templates.FAMILY_NAMES[d["family"]][0]
            assert f"{templates.grade_word(d['strength'], templates.STRENGTH)} {name}" in crop.rationale
        absent = set(FAMILIES) - {d["family"] for d in crop.meta["distortions"]}
        assert not any(templates.FAMILY_NAMES[f][0] in crop.rationale for f in absent)
        assert f" {templates.grade_word(crop.score / 100)} " in crop.rationale.replace(".", " ")


def test_aesthetic_rationales_tell_eight_attributes_in_order_in_126_to_150_words():
    topics = ("colour", "composition", "background", "technical", "theme", "mood", "harmony", "beauty")
    for crop in crops("iaa"):
        assert 126 <= len(crop.rationale.split()) <= 150, crop.rationale
        sentences = crop.rationale.split(". ")
        assert len(sentences) == 8
        assert all(topic in s.lower() for topic, s in zip(topics, sentences, strict=True)), crop.rationale
        assert templates.grade_word(crop.score / 100) in sentences[-1]
        assert templates.grade_word(crop.meta["attributes"]["exposure"]) in sentences[3]
        assert tuple(crop.attributes) == templates.EIGHT


def test_rationales_hold_no_number_vary_in_wording_and_use_a_small_vocabulary():
    words: set[str] = set()
    for task in ("iqa", "iaa"):
        texts = [c.rationale for c in crops(task)]
        assert len(set(texts)) > 0.8 * len(texts)
        assert not any(re.search(r"\d|\ba [aeiou]", t) for t in texts)  # nor a wrong article
        assert {c for t in texts for c in t if not c.isalpha()} <= set(" .,:")
        words.update(w for t in texts for w in re.findall(r"\w+", t))
    assert len(words) <= 700


def test_attribute_texts_are_never_copied_at_length_into_the_narrative():
    assert all(len(t.split()) <= 15 for c in crops("iaa") for t in c.attributes.values())
