"""Text templates of the demo: rationales and attribute texts, from the distortions applied or attributes measured.

IQA: exactly two sentences, 30-50 words, naming the one or two distortions and their strength. IAA: one narrative of
128-150 words through the eight attributes in the method's order, each with a graded word. For the controlled probes,
each task also has the other task's style: a long narrative for IQA, two sentences for IAA. Words are counted as
whitespace tokens. No text contains a number. Wording varies with the generator given. The vocabulary is small (well
under 700 words over both tasks), so that a 1024-token tokenizer covers it at about one token per word.
"""

from __future__ import annotations

import numpy as np

from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.types import EIGHT

STRENGTH = ("faint", "slight", "moderate", "strong", "severe", "extreme")
GRADE = ("terrible", "poor", "mediocre", "fair", "good", "superb")

# Family -> its name, what a strong one does, what a weak one does (the two lowest strengths). After the demo's own nine
# come the other kinds of KADID-10k; of a contrast change and a mean shift the direction is not known from the file.
FAMILY_NAMES = {
    "over_exposure": ("over exposure", "the bright areas wash out", "the bright areas are mostly kept"),
    "under_exposure": ("under exposure", "the dark areas sink into black", "the dark areas are mostly kept"),
    "low_contrast": ("low contrast", "the tones look flat and grey", "the tones are only a little flat"),
    "gaussian_blur": ("gaussian blur", "the edges look soft and weak", "the edges are only a little soft"),
    "motion_blur": ("motion blur", "the edges smear along one direction", "the edges only smear a little"),
    "noise": ("random noise", "the smooth areas look grainy", "the smooth areas are mostly clean"),
    "pixelation": ("blocky pixelation", "the edges turn into large squares", "the edges only turn a little rough"),
    "banding": ("colour banding", "the smooth tones break into steps", "the smooth tones are mostly kept"),
    "jpeg": ("jpeg compression", "small blocks appear around the edges", "the edges only turn a little rough"),
    "lens_blur": ("lens blur", "the whole looks out of focus", "the edges are only a little soft"),
    "color_diffusion": ("colour diffusion", "the colours run over their edges", "the colours only run a little"),
    "color_shift": ("colour shift", "coloured fringes appear around the edges", "the colours only part a little"),
    "color_quantization": ("colour quantization", "the colours break into flat areas", "the colours are mostly kept"),
    "desaturation": ("loss of colour", "the colours look pale and grey", "the colours are only a little pale"),
    "oversaturation": ("excess colour", "the colours look loud and false", "the colours are only a little loud"),
    "jpeg2000": ("jpeg compression", "the detail smears and rings at edges", "the detail only smears a little"),
    "color_noise": ("colour noise", "the smooth areas fill with coloured grain", "the smooth areas are mostly clean"),
    "impulse_noise": ("impulse noise", "bright and dark dots cover the areas", "only a few dots can be found"),
    "multiplicative_noise": ("grainy noise", "the bright areas look rough", "the bright areas are mostly clean"),
    "denoise": ("smearing by noise removal", "the fine detail looks painted over", "the fine detail is mostly kept"),
    "brighten": ("excess brightness", "the bright areas wash out", "the bright areas are mostly kept"),
    "darken": ("excess darkness", "the dark areas sink into black", "the dark areas are mostly kept"),
    "mean_shift": ("brightness shift", "the tones no longer look natural", "the tones are mostly kept"),
    "jitter": ("spatial jitter", "the edges look torn and frayed", "the edges only turn a little rough"),
    "patch_displacement": ("patch displacement", "pieces stand in a wrong place", "only small pieces are out of place"),
    "quantization": ("coarse quantization", "the smooth tones break into steps", "the smooth tones are mostly kept"),
    "color_blocks": ("blocky colouring", "flat squares hide parts of it", "only a few small squares hide parts"),
    "oversharpening": (
        "excess sharpening",
        "bright halos stand around the edges",
        "the edges only look hard",
    ),
    "contrast_change": ("contrast change", "the tones no longer look natural", "the tones are mostly kept"),
}


def grade_word(value: float, words: tuple[str, ...] = GRADE) -> str:
    """Return the word for a value in [0, 1], which the words divide into equal steps."""
    return words[min(int(max(value, 0.0) * len(words)), len(words) - 1)]


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


_FIRST = (
    "The {scene} photo shows {s1} {d1}, and as a result of it {e1} across the frame.",
    "In this {scene} photo there is {s1} {d1}, so that {e1} in most places.",
    "I notice {s1} {d1} in this {scene} picture, and because of it {e1} in most places.",
    "The main problem of this {scene} picture is {s1} {d1}, which means that {e1} in the frame.",
)
_SECOND_ONE = (
    "No other clear distortion can be seen, so the technical quality is {grade} for the viewer.",
    "Nothing else disturbs the detail and the tones, which leaves a technical quality that is {grade} as a whole.",
    "The rest of the picture is clean, which makes the technical quality {grade} when seen as a whole.",
)
_SECOND_TWO = (
    "There is also {s2} {d2}, where {e2}, and both together make the technical quality {grade}.",
    "A second problem is {s2} {d2}, as {e2}, so the technical quality as a whole is {grade}.",
    "On top of that {s2} {d2} can be seen, {e2}, and the technical quality is {grade}.",
)


def iqa_rationale(distortions: tuple[Distortion, ...], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write two sentences, 30-50 words, the stronger distortion first; `scene` is the photograph's category."""
    ordered = sorted(distortions, key=lambda d: -d.strength)
    words = {"scene": scene, "grade": grade_word(score / 100)}
    for k, d in enumerate(ordered, 1):
        name, strong, weak = FAMILY_NAMES[d.family]
        strength = grade_word(d.strength, STRENGTH)
        words |= {f"s{k}": strength, f"d{k}": name, f"e{k}": weak if strength in STRENGTH[:2] else strong}
    second = _SECOND_ONE if len(ordered) == 1 else _SECOND_TWO
    return f"{_pick(_FIRST, rng)} {_pick(second, rng)}".format(**words)


# One sentence per attribute, 16-18 words each, so that eight make 128-144 whatever the choice.
_NARRATIVE: tuple[tuple[str, ...], ...] = (
    (
        "Looking at this {scene} photo, the first thing I notice is {colour} colour with {contrast} contrast in it.",
        "The visual elements of this {scene} photo come first: the colour is {colour} and the contrast is {contrast}.",
        "What meets the eye first in this {scene} photo is {colour} colour, next to {contrast} contrast of tones.",
        "At first sight the {scene} photo offers {colour} colour, and its tones give it {contrast} contrast as well.",
    ),
    (
        "The composition is {placement}, because the main subject meets the lines of the thirds in a {placement} way.",
        "Its composition feels {placement} when I see how the main subject sits on the lines of thirds.",
        "Turning to composition, the structure is {placement}, judged by where and how large the main subject stands.",
        "As for structure, the place and size of the main subject make the composition look {placement} here.",
    ),
    (
        "As a whole the picture holds together in a {simplicity} way, with {simplicity} calm in the background.",
        "The overall gestalt is {simplicity}, since the clutter in the background decides how well the picture reads.",
        "Seen as one whole, the parts join in a {simplicity} way, and the background keeps {simplicity} calm.",
        "Taken together the shapes form a {simplicity} whole, and the eye finds {simplicity} rest in the background.",
    ),
    (
        "On the technical side the exposure is {exposure} with {light} light, and the sharpness is {sharpness} here.",
        "The technical work shows {exposure} exposure in {light} light, and the fine detail has {sharpness} sharpness.",
        "In technical terms I see {light} light and {exposure} exposure, while the edges show {sharpness} sharpness.",
        "The technical execution has {exposure} exposure in {light} light, and the sharpness of detail is {sharpness}.",
    ),
    (
        "The theme speaks through its subject, which stands out from its surroundings in a {separation} way here.",
        "Its theme reaches the viewer in a {separation} way, as the subject parts from its surroundings.",
        "The message of the theme is {separation}, judged by how clearly the subject leaves its surroundings.",
        "What the theme wants to say is {separation} when the subject stands against its surroundings.",
    ),
    (
        "The mood is {warmth}, and the feeling that light and colours leave in the viewer is {mood}.",
        "A {warmth} mood fills the frame, and the response of the viewer to it is rather {mood}.",
        "Its emotion comes from a {warmth} mood, and the viewer answers with a feeling that is {mood}.",
        "The colours give the scene a {warmth} mood, and the emotion that stays with me is {mood}.",
    ),
    (
        "The original idea lies in how the colours work together, and their harmony is {harmony} in here.",
        "In terms of originality, the creative harmony of the colours is {harmony} and shapes what feels new.",
        "Some originality comes from the play of colours, whose harmony I find {harmony} in the whole frame.",
        "The creative choice of colours brings {harmony} harmony, and this says much about how original it is.",
    ),
    (
        "Overall, when I weigh light, colour, contrast, detail and structure, this is a picture of {total} beauty.",
        "In the end, with every part weighed, the overall beauty of this picture is {total} to me.",
        "Overall, light, colour, contrast and detail add up to a picture whose beauty I would call {total}.",
        "Taken together, the light, the colour and the detail give an overall beauty that is {total} here.",
    ),
)

_LIGHT = ("black", "dark", "dim", "even", "bright", "harsh")
_WARMTH = ("frosty", "cold", "cool", "neutral", "warm", "glowing")
_MOOD = ("dull", "weak", "quiet", "pleasant", "lively", "strong")

_TEXTS = (
    "Colour is {colour}; contrast is {contrast}.",
    "Placement and size of the subject are {placement}.",
    "Order against clutter is {simplicity}.",
    "Exposure is {exposure} in {light} light; sharpness is {sharpness}.",
    "Subject against surroundings is {separation}.",
    "A {warmth} mood with a {mood} response.",
    "Harmony of the colours is {harmony}.",
    "Overall the picture is {total}.",
)


def _graded(attributes: dict[str, float], score: float) -> dict[str, str]:
    words = {k: grade_word(v) for k, v in attributes.items()}
    words["light"] = grade_word((attributes["brightness"] - 0.05) / 0.8, _LIGHT)
    words["warmth"] = grade_word(attributes["warmth"], _WARMTH)
    words["mood"] = grade_word((attributes["colour"] + attributes["contrast"]) / 2, _MOOD)
    words["total"] = grade_word(score / 100)
    return words


def attribute_texts(attributes: dict[str, float], score: float) -> dict[str, str]:
    """Return the eight attribute texts by name, in the method's order."""
    words = _graded(attributes, score)
    return {name: text.format(**words) for name, text in zip(EIGHT, _TEXTS, strict=True)}


def iaa_rationale(attributes: dict[str, float], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write one narrative of 128-150 words through the eight attributes in order."""
    words = _graded(attributes, score) | {"scene": scene}
    return " ".join(_pick(options, rng).format(**words) for options in _NARRATIVE)


# The slow style for IQA: what a deliberate look at each kind of distortion finds. 16-19 words each.
_INSPECTION: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("over_exposure",),
        "In the bright areas of this {scene} photo I see {how} over exposure, judged by how they wash out.",
    ),
    (
        ("under_exposure",),
        "In the dark areas of the picture I see {how} under exposure, judged by how they sink into black.",
    ),
    (("low_contrast",), "When I look at the tones as a whole, there is {how} low contrast that makes them flat."),
    (
        ("gaussian_blur", "motion_blur"),
        "When I look at the fine detail, the edges show {how} blur, judged by how soft they look here.",
    ),
    (("noise",), "In the smooth areas of the frame I see {how} random noise, judged by how grainy they look."),
    (
        ("pixelation", "jpeg"),
        "Around the edges there is {how} damage by blocks and squares, judged by how rough they look here.",
    ),
    (("banding",), "In the smooth tones of the frame I see {how} colour banding, judged by how they break into steps."),
)
_WEIGHED = (
    "Overall, when I weigh light, tones, edges and smooth areas, the technical quality of this picture is {grade}.",
    "In the end, with every part weighed, the technical quality of this picture is {grade} to me as a viewer.",
)
NONE = "no clear"


def iqa_slow_rationale(distortions: tuple[Distortion, ...], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write the slow style: a narrative of 125-150 words that inspects every kind of distortion in turn."""
    strength: dict[str, float] = {}
    for d in distortions:
        strength[d.family] = max(d.strength, strength.get(d.family, 0.0))
    sentences = []
    for families, text in _INSPECTION:
        found = [strength[f] for f in families if f in strength]
        how = grade_word(max(found), STRENGTH) if found else NONE
        sentences.append(text.format(how=how, scene=scene))
    return " ".join([*sentences, _pick(_WEIGHED, rng).format(grade=grade_word(score / 100))])


_SEEN = {
    "colour": "the colour",
    "contrast": "the contrast of tones",
    "placement": "the place of the subject",
    "simplicity": "the calm of the background",
    "sharpness": "the sharpness of detail",
    "exposure": "the exposure",
    "separation": "the way the subject stands out",
    "harmony": "the harmony of the colours",
}
_BEST_WORST = (
    "The first thing I notice in this {scene} photo is {best}, which is {b} here, next to {worst}, which is {w}.",
    "In this {scene} picture {best} is {b} to my eye, and {worst} is rather {w} when seen as a whole.",
)
_BEAUTY = (
    "Overall, with every part weighed, this is a picture of {total} beauty for the viewer.",
    "Taken together, the light, the colour and the detail give an overall beauty that is {total} here.",
)


def iaa_fast_rationale(attributes: dict[str, float], scene: str, score: float, rng: np.random.Generator) -> str:
    """Write the fast style: two sentences, 30-50 words, naming the best and the worst attribute."""
    order = sorted(_SEEN, key=lambda name: attributes[name])
    best, worst = order[-1], order[0]
    words = {"scene": scene, "best": _SEEN[best], "worst": _SEEN[worst]}
    words |= {"b": grade_word(attributes[best]), "w": grade_word(attributes[worst]), "total": grade_word(score / 100)}
    return f"{_pick(_BEST_WORST, rng)} {_pick(_BEAUTY, rng)}".format(**words)
