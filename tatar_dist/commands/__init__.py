"""Sub-commands of `tatar-dist`. Each parses its arguments, calls the package and prints.

Heavy imports are inside functions, so that `--help` answers at once.

    stages.py           demo, probes, sft, grpo, evaluate, plan
    evaluation.py       score, metrics, compare
    runs.py             status, report, export, serve
    data.py             data …, with data_tables.py (tables of import and sets)
    rationale.py        rationale …
    checks.py           rewards, bench, doctor, gpu-check
    doctor.py           checks of this machine; doctor_gpus.py: of its GPUs; doctor_nodes.py: of a cluster's nodes
"""

from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as a word KEY=VALUE; may repeat.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
