"""`tatar-dist score` and `Scorer` on a real engine: same answers everywhere, expected scores as in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from scoring_process import Scored, scored


@pytest.fixture(scope="module")
def process(model_parsing, tmp_path_factory) -> Scored:
    return scored(tmp_path_factory, model_parsing)


@pytest.fixture(scope="module")
def pictures(process) -> Path:
    return process.pictures


@pytest.fixture(scope="module")
def found(process) -> dict:
    """What the scorer says."""
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("RESULT"))[6:])


def test_scores_do_not_depend_on_how_a_picture_comes(found):
    assert [s[:2] for s in found["scores"]] == [s[:2] for s in found["bytes"]]
    assert all(s[2] is None for s in found["bytes"])  # nobody asked for it
    assert [p[0] for p in found["pillow"]] == ["iqa", "iaa"] and found["pillow"][0][2] == found["scores"][0][1]
    parsed = [s for s in found["scores"] if s[0] is not None]
    assert len(parsed) >= 3 and all(0 <= s[0] <= 100 for s in parsed)  # the fixture model was taught the format
    assert all(len(s[2]) == 3 for s in found["scores"]) and any(len(set(s[2])) > 1 for s in found["scores"])
    assert found["refused"] == [
        ["picture 1", "the file is empty"],
        ["gone.png", "cannot be read: No such file or directory"],
    ]


def test_expected_scores_are_those_of_the_model_in_transformers(found, pictures, model_parsing):
    import torch

    from tatar_dist.models import family
    from tatar_dist.prompts.expected import expected_scores
    from tatar_dist.scoring.directory import model_config

    config = model_config(Path(model_parsing))
    backbone = family("qwen2_5_vl")(config.model)
    model = backbone.load_model().eval()
    checked = 0
    for i, (score, completion, *_, mean, sd) in enumerate(found["scores"]):
        if score is None:
            continue
        image = Image.open(pictures / f"{i}.png").convert("RGB")

        @torch.no_grad()
        def ask(questions, image=image):
            answers = []
            for _, text, symbols in questions:
                inputs = backbone.processor(text=[found["text"] + text], images=[image], return_tensors="pt")
                ids = [backbone.tokenizer.encode(s, add_special_tokens=False)[0] for s in symbols]
                p = model(**inputs).logits[0, -1][ids].softmax(-1)
                answers.append(dict(zip(symbols, p.tolist(), strict=True)))
            return answers

        (expected,) = expected_scores([completion], ask)
        assert (mean, sd) == pytest.approx((expected.mean, expected.sd), abs=1e-3)
        checked += 1
    assert checked >= 3


def test_a_direct_answer_continues_its_tag_as_the_model_in_transformers(found, pictures, model_parsing):
    import torch

    from tatar_dist.models import family
    from tatar_dist.scoring.directory import model_config

    backbone = family("qwen2_5_vl")(model_config(Path(model_parsing)).model)
    model = backbone.load_model().eval()
    for i, (score, completion, _, samples, expected, _) in enumerate(found["direct"]):
        assert completion.startswith("<answer>") and completion != found["scores"][i][1]
        assert len(samples) == 2 and (score is None) == (expected is None)  # nobody taught the model to answer so
        image = Image.open(pictures / f"{i}.png").convert("RGB")
        text = found["text"] + "<answer>"
        for _ in range(6):  # greedily, one token after another
            inputs = backbone.processor(text=[text], images=[image], return_tensors="pt")
            with torch.no_grad():
                text += backbone.tokenizer.decode([int(model(**inputs).logits[0, -1].argmax())])
        text = text.split("</answer>")[0].split("<|im_end|>")[0]
        assert (found["text"] + completion).startswith(text), (text, completion)


def test_the_command_scores_what_can_be_read_and_names_the_rest(process, found, pictures):
    *lines, status = process.stdout.split("RESULT")[1].splitlines()[1:]
    assert status == "STATUS 1"
    lines = [json.loads(line) for line in lines]
    assert [Path(line["image"]).name for line in lines] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]
    assert [line.get("completion") for line in lines[:5]] == [s[1] for s in found["scores"]]
    said = process.stderr
    assert "cannot decode image" in lines[5]["error"] and "1 of 6 pictures could not be scored" in said
    assert (pictures / "p.html").read_text().count("data:image/jpeg") == 5
