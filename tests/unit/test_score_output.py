"""`tatar-dist score`: which pictures are meant, what is shown of their scores, which directories are no models."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tatar_dist.errors import UserError
from tatar_dist.scoring import output as score_output
from tatar_dist.scoring.directory import model_config
from tatar_dist.scoring.output import as_table, by_picture, find_pictures, run, write_page
from tatar_dist.scoring.scorer import Score, read_picture


def weightless(model: Path) -> None:
    """Write a whole safetensors file without tensors, and a chat template."""
    (model / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "tokenizer.json").write_text('{"model": {}}')


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
    (pictures / "unknown").write_bytes(b"?")
    assert find_pictures([str(pictures / "unknown")]) == [str(pictures / "unknown")]  # named, so it is tried
    with pytest.raises(UserError, match=r"notes.txt: a text file, no picture; for a list of file names: .* - < "):
        find_pictures([str(pictures / "notes.txt")])


def test_hidden_files_of_a_directory_are_left_out(pictures):
    (pictures / ".Trash").mkdir()
    for hidden in ("._a.JPG", ".Trash/b.png"):
        (pictures / hidden).write_bytes(b"resource fork")
    assert len(find_pictures([str(pictures)])) == 3


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
    phone = Image.new("RGB", (30, 20))
    phone.getexif()[0x0112] = 6
    phone.save(pictures / "phone.jpg", exif=phone.getexif())
    _, turned = read_picture(Image.open(pictures / "phone.jpg"))
    assert Image.open(io.BytesIO(turned)).size == (20, 30)  # as the file would be
    assert Image.open(io.BytesIO(read_picture(Image.new("CMYK", (3, 2)))[1])).mode == "RGB"
    (pictures / "cut.png").write_bytes((pictures / "b.png").read_bytes()[:60])
    assert read_picture(Image.open(pictures / "cut.png"))[1].startswith("cannot be read:")
    name, data = read_picture(Image.new("L", (3, 2)), 0)
    assert name == "picture 1" and Image.open(io.BytesIO(data)).size == (3, 2)
    os.mkfifo(pictures / "pipe.png")
    assert read_picture(pictures / "pipe.png")[1] == "is no file"
    assert read_picture("gone.png") == ("gone.png", "cannot be read: No such file or directory")


SCORES = [
    Score("<b>.png", "iqa", 40.0, "<script>alert(1)</script>", "…", samples=(39.0, None, 43.0), mean=41.0, sd=2.8),
    Score("<b>.png", "iaa", None, "", "…", reason="no <answer>"),
    Score("good.png", "iqa", 90.0, "fine", "…", expected=88.0, expected_sd=4.0),
    Score("[/x]bad.png", "iqa", error="cannot decode image"),
    Score("[red]odd.png", "iqa", 7.0, "[/INST] it said"),
]


def test_what_cannot_be_scored_is_named_and_the_rest_is_shown(capsys):
    assert run(lambda: iter(SCORES), 5, as_json=True, html=None) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("score") for line in lines] == [40.0, None, 90.0, None, 7.0]
    assert lines[0]["samples"] == [39.0, None, 43.0] and "samples" not in lines[2]
    assert "[/x]bad.png: cannot decode image" in err and "1 of 4 pictures could not be scored" in err
    run(lambda: iter(SCORES), 5, as_json=False, html=None)
    table = capsys.readouterr().out
    assert (
        "± 2.8" in table
        and "expected 88.0" in table
        and "no score" in table
        and "bad.png" not in table
        and "[red]odd" in table
        and "[/INST]" in table
    )
    run(lambda: iter(SCORES[1:2]), 1, as_json=False, html=None)
    assert "no <answer>" in capsys.readouterr().out  # instead of its words, why there is no score
    assert "1 of 5 answers hold no score" in err


def test_sampled_answers_that_hold_no_score_are_counted(capsys, tmp_path):
    scores = [SCORES[0], Score("b.png", "iqa", None, "", "…", samples=(None, None, None)), SCORES[2]]
    run(lambda: iter(scores), 3, as_json=True, html=None)
    assert [json.loads(line).get("unparsed") for line in capsys.readouterr().out.splitlines()] == [1, 3, None]
    run(lambda: iter(scores), 3, as_json=False, html=tmp_path / "p.html")
    table, err = capsys.readouterr()
    assert "1 of 3 unread" in table and "3 of 3 unread" in table
    assert "4 of 6 sampled answers hold no score; mean and spread are of the others" in err
    page = (tmp_path / "p.html").read_text()
    assert "3 samples, 1 without a score: 41.0 ± 2.8" in page and "3 samples, 3 without a score<" in page


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_the_whole_text_of_few_pictures_and_the_beginning_of_many(width):
    text = " ".join(f"word{i}" for i in range(100))
    for n, last in ((20, "word99"), (21, "…")):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(as_table([Score(f"{i}.png", task, 7.0, text) for i in range(n) for task in ("iqa", "iaa")]))
        lines = [line.split("│")[1].strip() for line in console.export_text().splitlines() if "│" in line]
        words = " ".join(lines).split()
        assert sum(word.endswith(last) for word in words) == 2 * n and words.count("quality:") == n
        assert max(map(len, lines)) > width - 40  # what the scores leave of the width
    assert sum(map(len, lines)) < 21 * 2 * 250


def test_there_is_no_empty_table(capsys):
    assert run(lambda: iter(SCORES[3:4]), 1, as_json=False, html=None) == 1
    assert capsys.readouterr().out == ""


def test_the_table_names_the_directory_once(capsys):
    found = [Score(f"/a/long/place/{name}", "iqa", 7.0, "") for name in ("sub/x.png", "y.png")]
    run(lambda: iter(found), 2, as_json=False, html=None)
    table = capsys.readouterr().out
    assert table.count("long") == 1 and " sub/x.png" in table and " y.png" in table
    run(lambda: iter(found[:1]), 1, as_json=False, html=None)
    assert "place" in capsys.readouterr().out


def test_what_was_scored_before_ctrl_c_is_shown(capsys, tmp_path):
    def interrupted():
        yield SCORES[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, 9, as_json=False, html=tmp_path / "p.html", given=[("good.png", b"")])
    assert "good.png" in capsys.readouterr().out and "good.png" in (tmp_path / "p.html").read_text()
    with pytest.raises(UserError, match="cannot be written"):  # before a model is loaded
        run(lambda: pytest.fail("loaded"), 9, as_json=False, html=tmp_path / "gone" / "p.html")


def test_the_page_of_very_many_shows_the_best_and_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(score_output, "MOST_SHOWN", 4)
    write_page(tmp_path / "p.html", [Score(f"s{i}s", "iqa", float(i), "", "") for i in range(10)])
    page = (tmp_path / "p.html").read_text()
    assert [f"s{i}s" in page for i in range(10)] == [i in (0, 1, 8, 9) for i in range(10)]
    assert "6 in the middle are not shown" in page


def test_the_page_escapes_what_a_model_writes_and_loads_nothing(pictures):
    named = [*SCORES, Score(str(pictures / "b.png"), "iqa", 99.0, "red")]
    write_page(pictures / "page.html", named)
    page = (pictures / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert page.index("b.png") < page.index("good.png") < page.index("&lt;b&gt;.png")  # best first
    assert page.count("data:image/jpeg;base64,") == 1 and "cannot decode image" in page
    with pytest.raises(UserError, match="cannot be written"):
        write_page(pictures / "gone" / "page.html", named)
    assert list(by_picture(SCORES)) == ["<b>.png", "good.png", "[red]odd.png"]


def test_directories_that_are_no_model_of_ours(tmp_path):
    with pytest.raises(UserError, match="no such model directory"):
        model_config(tmp_path / "gone")
    with pytest.raises(UserError, match="first: hf download org/name-7B --local-dir DIRECTORY"):
        model_config("org/name-7B")
    (tmp_path / "run/checkpoints/latest/model").mkdir(parents=True)
    with pytest.raises(UserError, match="a run directory; its newest model is .*/run/checkpoints/latest/model$"):
        model_config(tmp_path / "run")
    with pytest.raises(UserError, match="no config.json"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(UserError, match="config.json: cannot be read"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'; known families are qwen2_5_vl, qwen3_vl"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(UserError, match="no .*safetensors"):
        model_config(tmp_path)
    weightless(tmp_path)
    with pytest.raises(UserError, match="no image processor"):
        model_config(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {}}')
    with pytest.raises(UserError, match="no processor_config.json in it says how many pixels"):
        model_config(tmp_path)


def test_a_model_is_asked_as_its_own_files_say(tmp_path):
    weightless(tmp_path)
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


def test_a_model_with_its_own_pixel_limits_scales_a_photograph_to_what_a_prompt_takes(tmp_path):
    weightless(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    settings = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))  # as released
    assert model_config(tmp_path).model.max_pixels == 1572864  # 1,536 tokens
    settings["size"]["longest_edge"] = 4000000  # somebody has chosen it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert model_config(tmp_path).model.max_pixels == 4000000
    assert model_config(tmp_path, ["model.max_pixels=16777216"]).model.max_pixels == 16777216
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": None}))
    with pytest.raises(UserError, match="its processor has patch_size=None and merge_size=2: must be integers"):
        model_config(tmp_path)


def test_a_checkpoint_is_asked_as_its_run_was(tmp_path):
    model = tmp_path / "a: run/checkpoints/step_000100/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "qwen2_5_vl", "dtype": "float32"}')
    weightless(model)
    untouched = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    (model / "preprocessor_config.json").write_text(json.dumps(untouched))
    run = tmp_path / "a: run"
    (run / "prompts.yaml").write_text("")
    (run / "config.yaml").write_text("rollout: {max_new_tokens: 777}")
    (run / "checkpoints/latest").symlink_to("step_000100")
    config = model_config(run / "checkpoints/latest/model")
    assert config.model.path == str(run / "checkpoints/latest/model") and config.rollout.max_new_tokens == 777
    assert Path(config.data.prompts).resolve() == (run / "prompts.yaml").resolve()
    assert config.model.max_pixels == 1572864  # 12.8 megapixels are Qwen's own, nobody's training here
    for damaged in ("seed: 0", "rollout:"):
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(UserError, match=r"config.yaml: does not say rollout.max_new_tokens"):
            model_config(model)
    (run / "config.yaml").unlink()
    (model / "generation_config.json").write_text('{"max_new_tokens": 555}')
    assert model_config(model).rollout.max_new_tokens == 555
