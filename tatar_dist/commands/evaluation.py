"""Score pictures, measure agreement with opinion scores: `score`, `metrics`, `compare`."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tatar_dist.commands import Json, Settings
from tatar_dist.errors import UserError

Answers = Literal["prediction", "expected", "sample_mean", "direct"]


def score(
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURE|KEY=VALUE",
            help="Files, directories, globs; - reads from standard input. Config keys: model.*, rollout.*.",
        ),
    ],
    model: Annotated[Path, typer.Option(help="Model directory, for example RUN/checkpoints/latest/model.")],
    settings: Settings = None,
    task: Annotated[Literal["iqa", "iaa", "both"], typer.Option(help="Quality, aesthetics or both.")] = "both",
    samples: Annotated[int, typer.Option(min=0, help="Sampled answers beside the greedy one: mean and spread.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampled answers.")] = 0,
    expected: Annotated[
        bool, typer.Option("--expected", help="Also the expectation over the scores that might have been written.")
    ] = False,
    direct: Annotated[
        bool, typer.Option("--direct", help="Ask for the number at once: no rationale, few tokens.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also a page with thumbnails.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, as answers come back.")] = False,
) -> None:
    """Score pictures for quality (iqa) and aesthetics (iaa), with the model's own words.

    What cannot be read is named at the end, the rest is scored; exit status 1 then. `-` takes one picture, or a list of
    files, a line each.

    Example: [bold]tatar-dist score photo.jpg holiday/ --model runs/demo/grpo/checkpoints/latest/model[/bold]
    """
    from tatar_dist.scoring import output as score_output
    from tatar_dist.scoring.directory import model_config
    from tatar_dist.scoring.scorer import Scorer

    words = [word for word in pictures if re.match(r"\w+\.[\w.]+=", word) and not Path(word).exists()]
    overrides = [*(settings or []), *words]
    if len(words) == len(pictures):
        raise UserError(f"{' '.join(words)}: config keys only: name a picture, too")
    paths = score_output.find_pictures([word for word in pictures if word not in words])
    model_config(model, overrides)  # before anything is loaded
    warnings.simplefilter("ignore", FutureWarning)  # libraries tell each other
    logging.getLogger("vllm").setLevel(logging.ERROR)

    def load() -> Iterator[Any]:
        scorer = Scorer(model, overrides)
        return scorer.score(
            paths, task, samples=samples, temperature=temperature, seed=seed, expected=expected, direct=direct
        )

    total = len(paths) * (2 if task == "both" else 1)
    if score_output.run(load, total, as_json, html, given=paths):
        raise typer.Exit(1)


def metrics(
    file: Annotated[Path, typer.Argument(help="JSON lines: dataset, task, target, and prediction or completion.")],
    as_json: Json = False,
    bootstrap: Annotated[int, typer.Option(metavar="N", help="Rounds for 95 % intervals; 0 = none.")] = 0,
    ci_all: Annotated[bool, typer.Option("--ci-all", help="Intervals of every metric, also of KRCC, RMSE…")] = False,
    unparsed: Annotated[str, typer.Option(help="drop, or midpoint: count an unparsed answer as 50.")] = "drop",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Measure agreement with opinion scores by set: SRCC, PLCC, KRCC, RMSE, MAE, n and n_parsed.

    Example: [bold]tatar-dist metrics predictions.jsonl --bootstrap 1000 --json[/bold]
    """
    from tatar_dist.evaluate import audit, tables

    if ci_all and not bootstrap:
        raise UserError("--ci-all: how many rounds? Add --bootstrap 1000")
    result = audit.run(file, bootstrap=bootstrap, ci_all=ci_all, unparsed=unparsed, seed=seed)
    if as_json:
        print(json.dumps(audit.as_json(result)))
    else:
        tables.show({"model": str(file)} | audit.as_json(result))


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Output of an evaluation.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Output of another on the same samples.")],
    column_a: Annotated[Answers, typer.Option(help="Which answers of A.")] = "prediction",
    column_b: Annotated[Answers, typer.Option(help="Which answers of B.")] = "prediction",
    bootstrap: Annotated[int, typer.Option(metavar="N", help="Rounds of resampling.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare model B with A by data set: paired SRCC and PLCC differences, intervals, p-values.

    Example: [bold]tatar-dist compare runs/demo/sft_eval runs/demo/grpo_eval[/bold]
    """
    from tatar_dist.evaluate import compare as paired

    result = paired.run(before, after, columns=(column_a, column_b), rounds=bootstrap, seed=seed)
    if as_json:
        print(json.dumps(result))
    else:
        paired.show(result)
