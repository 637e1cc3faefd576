"""Demo rationales and attribute texts, from applied distortions or measured attributes.

IQA: exactly two sentences, 30-50 words, naming the one or two distortions and their strength. IAA: one narrative of
128-150 words through the eight attributes in the method's order, each with a graded word. For the controlled probes,
each task also has the other task's style: a long narrative for IQA, two sentences for IAA. Words are counted as
whitespace tokens. The sentences are in texts.yaml; which of them are chosen depends on the generator given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.types import EIGHT

_TEXTS = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
STRENGTH: list[str] = _TEXTS["strength"]
# Family -> its name, what a strong one does, what a weak one does (the two lowest strengths).
FAMILY_NAMES: dict[str, tuple[str, str, str]] = {family: tuple(names) for family, names in _TEXTS["families"].items()}


def grade_word(value: float, words: Sequence[str] = _TEXTS["grade"]) -> str:
    """Return the word for a value in [0, 1], which the words divide into equal steps."""
    return words[min(int(max(value, 0.0) * len(words)), len(words) - 1)]


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def iqa_rationale(distortions: tuple[Distortion, ...], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write two sentences (30-50 words), stronger distortion first; `scene`: photo category."""
    ordered = sorted(distortions, key=lambda d: -d.strength)
    words = {"scene": scene, "grade": grade_word(score / 100)}
    for k, d in enumerate(ordered, 1):
        name, strong, weak = FAMILY_NAMES[d.family]
        strength = grade_word(d.strength, STRENGTH)
        words |= {f"s{k}": strength, f"d{k}": name, f"e{k}": weak if strength in STRENGTH[:2] else strong}
    second = _TEXTS["iqa_second_of_one" if len(ordered) == 1 else "iqa_second_of_two"]
    return f"{_pick(_TEXTS['iqa_first'], rng)} {_pick(second, rng)}".format(**words)


def _graded(attributes: dict[str, float], score: float) -> dict[str, str]:
    words = {k: grade_word(v) for k, v in attributes.items()}
    words["light"] = grade_word((attributes["brightness"] - 0.05) / 0.8, _TEXTS["light"])
    words["warmth"] = grade_word(attributes["warmth"], _TEXTS["warmth"])
    words["mood"] = grade_word((attributes["colour"] + attributes["contrast"]) / 2, _TEXTS["mood"])
    words["total"] = grade_word(score / 100)
    return words


def attribute_texts(attributes: dict[str, float], score: float) -> dict[str, str]:
    """Return the eight attribute texts by name, in the method's order."""
    words = _graded(attributes, score)
    return {name: text.format(**words) for name, text in zip(EIGHT, _TEXTS["attributes"], strict=True)}


def iaa_rationale(attributes: dict[str, float], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write one narrative of 128-150 words through the eight attributes in order."""
    words = _graded(attributes, score) | {"scene": scene}
    return " ".join(_pick(options, rng).format(**words) for options in _TEXTS["iaa"])


def iqa_slow_rationale(distortions: tuple[Distortion, ...], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write the slow style: 125-150 words that inspect every kind of distortion in turn."""
    sentences = []
    for kind in _TEXTS["iqa_slow"]:
        strengths = [d.strength for d in distortions if d.family in kind["families"]]
        how = grade_word(max(strengths), STRENGTH) if strengths else "no clear"
        sentences.append(kind["text"].format(how=how, scene=scene))
    last = _pick(_TEXTS["iqa_slow_last"], rng).format(grade=grade_word(score / 100))
    return " ".join([*sentences, last])


def iaa_fast_rationale(attributes: dict[str, float], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write the fast style: two sentences, 30-50 words, naming the best and the worst attribute."""
    names = _TEXTS["iaa_fast_names"]
    order = sorted(names, key=lambda name: attributes[name])
    best, worst = order[-1], order[0]
    words = {"scene": scene, "best": names[best], "worst": names[worst]}
    words |= {"b": grade_word(attributes[best]), "w": grade_word(attributes[worst]), "total": grade_word(score / 100)}
    return f"{_pick(_TEXTS['iaa_fast_first'], rng)} {_pick(_TEXTS['iaa_fast_last'], rng)}".format(**words)
