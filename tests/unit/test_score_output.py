"""`tatar-dist score`: which pictures are meant, what is shown of their scores, which directories are no models."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from tatar_dist.errors import UserError
from tatar_dist.model_directory import model_config
from tatar_dist.score_output import by_picture, find_pictures, run, write_page
from tatar_dist.scorer import Score, read_picture


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/er/c.webp"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_words_name_files_directories_and_globs_each_picture_once(pictures):
    found = find_pictures([str(pictures), str(pictures / "b.png"), str(pictures / "*.png")])
    assert [f.removeprefix(f"{pictures}/") for f in found] == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert find_pictures([str(pictures / "notes.txt")]) == [str(pictures / "notes.txt")]  # named, so it is tried


def test_standard_input_is_a_picture_or_a_list_of_files(pictures):
    data = (pictures / "b.png").read_bytes()
    assert find_pictures(["-"], io.BytesIO(data)) == [("standard input", data)]
    assert find_pictures(["-"], io.BytesIO(b"x.png\n\n y z.jpg \n")) == ["x.png", "y z.jpg"]


@pytest.mark.parametrize(
    ("word", "said"), [("gone.png", "no such file"), ("*.nothing", "no such file"), ("-", "is empty")]
)
def test_words_that_name_nothing(word, said):
    with pytest.raises(UserError, match=said):
        find_pictures([word], io.BytesIO(b" \n"))


def test_a_directory_without_pictures(tmp_path):
    with pytest.raises(UserError, match="no pictures in it"):
        find_pictures([str(tmp_path)])


def test_pictures_come_as_paths_bytes_tuples_and_pillow_images(pictures):
    assert read_picture(pictures / "b.png")[1] == (pictures / "b.png").read_bytes()
    assert read_picture(b"x", 3) == ("picture 4", b"x") and read_picture(("n", b"x")) == ("n", b"x")
    name, data = read_picture(Image.new("L", (3, 2)), 0)
    assert name == "picture 1" and Image.open(io.BytesIO(data)).size == (3, 2)
    assert read_picture("gone.png") == ("gone.png", "cannot be read: No such file or directory")


SCORES = [
    Score("<b>.png", "iqa", 40.0, "<script>alert(1)</script>", "…", samples=(39.0, None, 43.0), mean=41.0, sd=2.8),
    Score("<b>.png", "iaa", None, "", "…", reason="no <answer>"),
    Score("good.png", "iqa", 90.0, "fine", "…", expected=88.0, expected_sd=4.0),
    Score("bad.png", "iqa", error="cannot decode image"),
]


def test_what_cannot_be_scored_is_named_and_the_rest_is_shown(capsys):
    assert run(lambda: lambda: iter(SCORES), 4, as_json=True, html=None) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("score") for line in lines] == [40.0, None, 90.0, None]
    assert lines[0]["samples"] == [39.0, None, 43.0] and "samples" not in lines[2]
    assert "bad.png: cannot decode image" in err and "1 of 3 pictures could not be scored" in err
    run(lambda: lambda: iter(SCORES), 4, as_json=False, html=None)
    table = capsys.readouterr().out
    assert "± 2.8" in table and "expected 88.0" in table and "no score" in table and "bad.png" not in table


def test_the_page_escapes_what_a_model_writes_and_loads_nothing(pictures):
    named = [*SCORES, Score(str(pictures / "b.png"), "iqa", 99.0, "red")]
    write_page(pictures / "page.html", named)
    page = (pictures / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert page.index("b.png") < page.index("good.png") < page.index("&lt;b&gt;.png")  # best first
    assert page.count("data:image/jpeg;base64,") == 1 and "cannot decode image" in page
    with pytest.raises(UserError, match="cannot write there"):
        write_page(pictures / "gone" / "page.html", named)
    assert list(by_picture(SCORES)) == ["<b>.png", "good.png"]


def test_directories_that_are_no_model_of_ours(tmp_path):
    with pytest.raises(UserError, match="no such model directory"):
        model_config(tmp_path / "gone")
    with pytest.raises(UserError, match="no config.json"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'; known are qwen2_5_vl, qwen3_vl"):
        model_config(tmp_path)


def test_a_model_is_asked_as_its_own_files_say(tmp_path):
    settings = {"model_type": "qwen2_5_vl", "dtype": "float32", "text_config": {"max_position_embeddings": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    size = {"image_processor": {"size": {"shortest_edge": 12544, "longest_edge": 50176}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(size))
    config = model_config(tmp_path, ["rollout.max_new_tokens=250"])
    assert (config.model.min_pixels, config.model.max_pixels, config.model.dtype) == (12544, 50176, "float32")
    assert config.rollout.max_model_len == 1024 and config.rollout.max_new_tokens == 250
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 784, "max_pixels": 1568}')
    (tmp_path / "prompts.yaml").write_text("")
    config = model_config(tmp_path)
    assert (config.model.min_pixels, config.model.max_pixels) == (784, 1568)
    assert config.data.prompts == str(tmp_path / "prompts.yaml")  # its own wording before ours
