"""`tatar-dist score` and a `Scorer` on one engine, in a process of its own, because an engine keeps its memory.

The process runs once for all tests that ask what it said: those of scores, and those of the server, which is the same
judge.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import once, png

TOKENS = 48  # rollout.max_new_tokens
SERVED = 3  # the seed of the picture that the command is asked about alone, and the server, too

SCORING = """
import json, sys
from PIL import Image
import tatar_dist.scoring.scorer
from tatar_dist import Scorer
from tatar_dist.cli import main

directory, alone, model, words = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
made = []

class Kept(Scorer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        made.append(self)

tatar_dist.scoring.scorer.Scorer = Kept
told = [word for pair in words for word in ("--set", pair)]
print("ALONE", main(["score", alone, "--model", model, "--json", *told]), flush=True)
(scorer,) = made
files = sorted(f"{directory}/{i}.png" for i in range(5))
one = list(scorer.score(files, "iqa", expected=True, samples=3, seed=1))
again = list(scorer.score([open(f, "rb").read() for f in files], "iqa", samples=3, seed=1))
direct = list(scorer.score(files, "iqa", expected=True, samples=2, direct=True))
pillow = list(scorer.score([Image.open(files[0])], "both"))
assert "tatar_dist.cluster" not in sys.modules  # no Ray, no learners
print("RESULT" + json.dumps({
    "scores": [[s.score, s.completion, s.samples, s.mean, s.expected, s.expected_sd] for s in one],
    "bytes": [[s.score, s.completion, s.expected] for s in again],
    "direct": [[s.score, s.completion, s.rationale, s.samples, s.expected, s.expected_sd] for s in direct],
    "pillow": [[s.task, s.image, s.completion] for s in pillow],
    "refused": [[s.image, s.error] for s in scorer.score([b"", files[1], "gone.png"], "iaa") if s.error],
    "text": scorer.texts.text["iqa"],
}))
tatar_dist.scoring.scorer.Scorer = lambda *_: scorer  # the command uses the engine that is loaded
page = f"{directory}/p.html"
print("STATUS", main(["score", directory, "--model", model, "--task", "iqa", "--json", "--html", page]))
"""


@dataclass(frozen=True)
class Scored:
    """What it said: of one picture, from Python and of a directory, whose pictures are in `pictures`."""

    pictures: Path
    alone: list[str]
    stdout: str
    stderr: str


def scored(factory: pytest.TempPathFactory, model: str) -> Scored:
    def make(place: Path) -> None:
        (place / "pictures").mkdir()
        for i in range(5):
            (place / "pictures" / f"{i}.png").write_bytes(png(40 + i))
        (place / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing follows")
        (place / "alone.png").write_bytes(png(SERVED))
        command = [sys.executable, "-c", SCORING, str(place / "pictures"), str(place / "alone.png"), model]
        command += [f"rollout.max_new_tokens={TOKENS}", "rollout.max_num_seqs=2"]
        with open(place / "stdout", "w") as out, open(place / "stderr", "w") as err:
            done = subprocess.run(command, stdout=out, stderr=err, timeout=900)
        assert done.returncode == 0, (place / "stderr").read_text()

    place = once(factory, "scored", make)
    alone, _, rest = (place / "stdout").read_text().partition("ALONE 0\n")
    return Scored(place / "pictures", alone.splitlines(), rest, (place / "stderr").read_text())
