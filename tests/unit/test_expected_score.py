"""The expectation over the numbers a model might write, against all numbers counted out."""

from __future__ import annotations

import numpy as np
import pytest

from tatar_dist.prompts.answer import answer_start
from tatar_dist.prompts.expected import DIGITS, END, POINT, expected_scores

TEXT = "<think>fine</think><answer> 57.30</answer>"


class Numbers:
    """A model that writes the integers 0 to 100 with given probabilities, each with decimals."""

    def __init__(self, probability: np.ndarray) -> None:
        self.weight = {f"{i}.": p for i, p in enumerate(probability)}
        self.calls: list[int] = []

    def __call__(self, questions):
        self.calls.append(len(questions))
        found = []
        for _, text, symbols in questions:
            so_far = text.rsplit("<answer> ", 1)[1]
            each = {s: sum(p for n, p in self.weight.items() if n.startswith(so_far + s)) for s in symbols}
            total = sum(each.values())
            found.append({s: p / total for s, p in each.items()})
        return found


def test_the_mean_and_spread_are_those_of_all_numbers():
    probability = np.random.default_rng(0).dirichlet(np.ones(101))
    probability[[0, 10, 100]] += 0.2
    probability /= probability.sum()
    (found,) = expected_scores([TEXT], Numbers(probability))
    points = np.append(np.arange(100) + 0.5, 100.0)
    mean = (points * probability).sum()
    assert found.mass == pytest.approx(1.0)
    assert found.mean == pytest.approx(mean)
    assert found.sd == pytest.approx(np.sqrt((probability * (points - mean) ** 2).sum()))


def test_a_number_without_decimals_gets_no_half_point():
    sure = np.zeros(101)
    sure[57] = 1.0
    (found,) = expected_scores(["<answer> 57</answer>"], Numbers(sure))
    assert (found.mean, found.sd, found.mass) == (57.0, 0.0, 1.0)


def test_an_improbable_first_digit_is_left_out_and_the_mass_says_so():
    probability = np.zeros(101)
    probability[[20, 90]] = 0.995, 0.005
    (found,) = expected_scores([TEXT], Numbers(probability))
    assert found.mean == 20.5 and found.mass == pytest.approx(0.995)


def test_what_does_not_parse_is_not_asked_about_and_all_texts_share_three_calls():
    ask = Numbers(np.full(101, 1 / 101))
    found = expected_scores([TEXT, "<answer>none</answer>", TEXT, ""], ask)
    assert [f is None for f in found] == [False, True, False, True]
    assert ask.calls == [2, 18, 2]  # 0 is the first digit of one number in 101
    assert expected_scores([], ask) == [] and expected_scores(["no"], ask) == [None]


def test_only_what_the_grammar_allows_is_asked_for():
    asked: dict[str, tuple[str, ...]] = {}

    def ask(questions):
        asked.update({text.rsplit("<answer> ", 1)[1]: symbols for _, text, symbols in questions})
        return [dict.fromkeys(symbols, 1 / len(symbols)) for _, _, symbols in questions]

    expected_scores([TEXT], ask)
    assert asked[""] == DIGITS and asked["0"] == (POINT, END)
    assert asked["5"] == (*DIGITS, POINT, END) and asked["10"] == ("0", POINT, END)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, "57.30"),
        ("a <ANSWER>\n7</ANSWER><|im_end|>", "7"),
        ("<answer>-3.5e1</answer>", "-3.5e1"),
        ("<answer>5</answer><answer>6</answer>", None),
        ("<answer>5", None),
    ],
)
def test_where_the_number_of_an_answer_stands(text, expected):
    found = answer_start(text)
    assert (found and found[1]) == expected
    assert found is None or text.startswith(found[1], found[0])
