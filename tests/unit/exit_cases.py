"""What the survey of exits runs (test_exits.py): commands on tiny inputs, and what goes wrong with them."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tatar_dist import cli, rewards
from tatar_dist.assets import TINY_MODEL

SMALL = "data.iqa_fraction=1.0 data.validation=[] model.min_pixels=12544 model.max_pixels=12544"
NUMBERS = re.compile(rb"\d[\d.:e+-]*")  # times, mostly


@dataclass(frozen=True)
class Command:
    """A sub-command on tiny inputs, run in a directory that holds copies of them.

    Attributes:
        words: what the user types; {url} is an endpoint that answers well.
        inputs: files and directories that it reads; of directories also files in them, as run/config.yaml.
        outputs: files and directories that it writes; none: it prints.
        another: words that ask for another result at the same place; "" where none do.
        exact: an undisturbed run writes the same bytes again; else all but its numbers, which are times.
        tolerates: what does not stop it though an input is damaged, as (what goes wrong, input, letter of `REASONS`).
        cells: outcomes other than the usual ones, or letters of `REASONS` where there is none.
    """

    words: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    another: str = ""
    exact: bool = True
    tolerates: tuple[tuple[str, str, str], ...] = ()
    cells: Mapping[str, str] = field(default_factory=dict)


REASONS = {
    "a": "an empty YAML file sets nothing",
    "b": "reads what a run has written so far: absent parts are left out, a cut-off last line is ignored",
    "c": "reads what is there and names the file that it could not read",
    "d": "a run of an older version has none: the wording that its configuration names is used",
    "e": "prints only: a full disk is that of its standard output",
    "f": "refuses a directory that is not empty",
    "g": "no words ask for another result",
    "h": "the same command continues or finds it done; other settings are refused: `integration/test_resume.py`, "
    "`unit/test_identity.py`; full disks and cut-off checkpoints: `cluster/test_checkpoints.py`",
    "i": "needs an engine: `integration/test_score.py`; the page is written whole or not at all",
    "j": "writes nothing",
    "k": "takes no files",
    "l": "minutes of work by the stages above, each continued by the same command; settings.json refuses others",
    "m": "the estimate of memory is left out and says why",
}
COLUMNS = (
    "missing", "empty", "truncated", "another kind", "read-only", "full disk", "killed", "twice", "another setting"
)  # fmt: skip

LIVING = tuple((column, "run/events.jsonl", "b") for column in COLUMNS[:3])
ONCE = {"another setting": "g"}
PRINTS = {"read-only": "j", "killed": "j", "another setting": "j"}
STAGE = {"full disk": "h", "killed": "h", "twice": "h", "another setting": "h"}
MODEL = tuple(
    f"model{name}" for name in
    ("", "/config.json", "/model.safetensors", "/tokenizer.json", "/processor_config.json", "/chat_template.jinja")
)  # fmt: skip
COMMANDS = {
    "data import": Command(
        "data import tad66k --annotations scores.csv --images pictures --output out/m.parquet",
        ("scores.csv", "pictures"), ("out/m.parquet",), "--split test",
    ),
    "data sets": Command("data sets --registry sets.yaml --json", ("sets.yaml",), cells=PRINTS),
    "data validate": Command(
        "data validate m.parquet --output out --clean out/clean.parquet --json", ("m.parquet",),
        ("out/clean.parquet", "out/m.problems.jsonl", "out/m.validate.md", "out/m.validate.png"), cells=ONCE,
    ),
    "data show": Command(
        "data show m.parquet --output out/sheet.png", ("m.parquet",), ("out/sheet.png",), "--rows 2"
    ),
    "rationale template": Command(
        "rationale template meta.parquet --output out/r.parquet", ("meta.parquet",), ("out/r.parquet",), "--seed 1"
    ),
    "rationale build": Command(
        "rationale build m.parquet --output out/r.parquet --config asking.yaml {teacher}", ("m.parquet", "asking.yaml"),
        ("out/r.parquet", "out/r.rejected.jsonl", "out/r.report.md"), "rationale.limit=3", exact=False,
        tolerates=(("empty", "asking.yaml", "a"),),
    ),
    "rationale judge": Command(
        "rationale judge written.parquet --output out/r.parquet --config asking.yaml {teacher}",
        ("written.parquet", "asking.yaml"),
        ("out/r.parquet", "out/r.rejected.jsonl", "out/r.report.md"), "rationale.limit=3", exact=False,
        tolerates=(("empty", "asking.yaml", "a"),),
    ),
    "rewards": Command(
        "rewards batch.jsonl --preset preset.yaml --output out/scored.jsonl", ("batch.jsonl", "preset.yaml"),
        ("out/scored.jsonl",), "--advantage mean",
    ),
    "rewards STEP.parquet": Command(
        "rewards step.parquet --output out/scored.jsonl", ("step.parquet",), ("out/scored.jsonl",), "--preset binary",
    ),
    "metrics": Command("metrics batch.jsonl --json", ("batch.jsonl",), cells=PRINTS),
    "compare": Command(
        "compare eval_a eval_b --bootstrap 20 --json", ("eval_a", "eval_b/predictions.parquet"), cells=PRINTS
    ),
    "plan": Command(
        "plan --config plan.yaml model.path=model", ("plan.yaml", "model/config.json"), cells=PRINTS,
        tolerates=(("empty", "plan.yaml", "a"), *((c, "model/config.json", "m") for c in COLUMNS[:4])),
    ),
    "plan --times": Command(
        "plan --config plan.yaml model.path=model --simulate --times times.yaml --gpus 8 --json",
        ("plan.yaml", "times.yaml"), cells=PRINTS, tolerates=(("empty", "plan.yaml", "a"),),
    ),
    "bench table": Command("bench table bench.json", ("bench.json",), cells=PRINTS),
    "status": Command(
        "status run --json", ("run", "run/events.jsonl", "run/metrics.jsonl"), exact=False, cells=PRINTS,
        tolerates=tuple((c, f"run/{name}.jsonl", "b") for c in COLUMNS[:4] for name in ("events", "metrics")),
    ),
    "report": Command(
        "report run --output out/page.html",
        ("run", "run/config.yaml", "run/metrics.jsonl", "run/events.jsonl", "run/rollouts/step_000001.parquet"),
        ("out/page.html",), exact=False, cells=ONCE,
        tolerates=(
            *LIVING, ("missing", "run/config.yaml", "b"), ("missing", "run/rollouts/step_000001.parquet", "b"),
            *((c, f"run/{name}", "c") for c in COLUMNS[1:4]
              for name in ("config.yaml", "rollouts/step_000001.parquet")),
            ("another kind", "run/events.jsonl", "c"),
        ),
    ),
    "report A B": Command(
        "report run run2 --output out/page.html", ("run", "run2/config.yaml", "run2/metrics.jsonl"),
        ("out/page.html",), exact=False, cells=ONCE,
        tolerates=(
            ("missing", "run2/config.yaml", "b"),
            *((c, "run2/config.yaml", "c") for c in COLUMNS[1:4]),
        ),
    ),
    "export": Command(
        "export run --output out/model",
        ("run", "run/config.yaml", "run/prompts.yaml", "run/checkpoints/latest/state.json",
         "run/checkpoints/latest/model/model.safetensors", "run/checkpoints/latest/model/config.json"),
        ("out/model",), "--dtype float32", cells={"twice": "2 f", "another setting": "2 f"},
        tolerates=(("missing", "run/prompts.yaml", "d"),),
    ),
    "sft": Command(
        f"sft --config stage.yaml output=out/run data.train=[train.parquet] {SMALL}",
        ("stage.yaml", "train.parquet", *MODEL), cells=STAGE, tolerates=(("empty", "stage.yaml", "a"),),
    ),
    "grpo": Command(
        f"grpo --config stage.yaml output=out/run data.train=[train.parquet] {SMALL}",
        ("stage.yaml", "train.parquet", "model/tokenizer.json"), cells=STAGE,
        tolerates=(("empty", "stage.yaml", "a"),),
    ),
    "evaluate": Command(
        f"evaluate --config stage.yaml output=out/run data.test=[test.parquet] {SMALL}",
        ("stage.yaml", "test.parquet", "model/tokenizer.json"), cells=STAGE, tolerates=(("empty", "stage.yaml", "a"),),
    ),
    "score": Command(
        "score pictures/0.png --model model --html out/page.html", MODEL[:-1],
        cells=dict.fromkeys(COLUMNS[4:], "i"),
    ),
    "serve": Command("serve --model model --port 0", MODEL[:-1], cells=dict.fromkeys(COLUMNS[4:], "j")),
    "demo, probes": Command(
        "probes --output out/probes --smoke", cells=dict.fromkeys(COLUMNS[:4], "k") | dict.fromkeys(COLUMNS[5:], "l")
    ),
    "doctor, gpu-check, bench NAME": Command("", cells=dict.fromkeys(COLUMNS, "k")),
}  # fmt: skip


def make_inputs(here: Path) -> None:
    """Fill a directory with everything that the commands read."""
    from manifest_cases import picture
    from rationale_cases import manifest as rationale_manifest
    from rationale_cases import rows as rationale_rows
    from report_run import write_run
    from test_bench_table import RESULT
    from test_export import make_run
    from test_simulate_costs import MINIMAL

    from tatar_dist.data.writing import write_manifest
    from tatar_dist.prompts.answer import Prompts

    here.mkdir(parents=True)
    (here / "pictures").mkdir()
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        (here / "pictures" / name).write_bytes(picture(i))
    rows = [f"{name},{i + 2}.5" for i, name in enumerate(names)]
    (here / "scores.csv").write_text("\n".join(["image,score", *rows, ""]))
    rationale_manifest(here / "m.parquet")
    rationale_manifest(here / "written.parquet", rationale=True)
    meta = {"distortions": [{"family": "gaussian_blur", "strength": 0.5}], "photo": "coffee"}
    row = {"dataset": "d", "task": "iqa", "image_bytes": picture(), "score": 40.0, "split": "train", "meta": meta}
    write_manifest(here / "meta.parquet", [row | {"sample_id": f"s{i}"} for i in range(4)])
    (here / "sets.yaml").write_text(
        "datasets:\n  Mine:\n    task: iqa\n    url: https://example.org\n    terms: mine\n    formats:\n"
        "      table: {kind: csv, columns: [file, points], image: file, score: points, range: [0, 50], source: own}\n"
    )
    preset = Path(rewards.__file__).with_name("presets") / "binary.yaml"
    (here / "preset.yaml").write_text(json.dumps(yaml.safe_load(preset.read_text())))
    answer = "<think>sharp</think><answer>{}</answer>"
    batch = [
        {"group_id": f"g{i // 2}", "task": "iqa", "dataset": "d", "target": 30.0 + 9 * (i // 2), "sample_id": f"s{i}",
         "completion": answer.format(31 + 7 * i)} for i in range(8)
    ]  # fmt: skip
    (here / "batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in batch))
    for name, shift in (("eval_a", 0.0), ("eval_b", 3.0)):
        (here / name).mkdir()
        columns = {
            "sample_id": [f"s{i}" for i in range(8)], "dataset": ["d"] * 8, "task": ["iqa"] * 8, "source": [None] * 8,
            "target": [10.0 * i for i in range(8)], "prediction": [9.0 * i + shift * (i % 2) for i in range(8)],
        }  # fmt: skip
        schema = {"source": pa.string()}
        table = {n: pa.array(v, schema.get(n)) for n, v in columns.items()}
        pq.write_table(pa.table(table), here / name / "predictions.parquet")
    (here / "plan.yaml").write_text("cluster: {nodes: 2, learners: 8}\ndata: {train: [m.parquet]}\n")
    (here / "asking.yaml").write_text("rationale: {limits: {retries: 2, backoff_s: 0.02, backoff_max_s: 0.05}}\n")
    (here / "stage.yaml").write_text("cluster: {gpus_per_node: 0, learners: 1}\nmodel: {path: model, dtype: float32}\n")
    rationale_manifest(here / "train.parquet", rationale=True)
    write_manifest(here / "test.parquet", [row | {"split": "test"} for row in rationale_rows(6)])
    (here / "times.yaml").write_text(json.dumps(MINIMAL))
    (here / "bench.json").write_text(json.dumps(RESULT))
    make_run(here / "run")
    (here / "run/prompts.yaml").write_text(Prompts("Be brief.", {"iqa": "How sharp?", "iaa": "How fair?"}).to_yaml())
    write_run(here / "run", 2, 10, (24, 24))
    write_run(here / "run2", 2, 10, (24, 24))
    shutil.copy(here / "run/rollouts/step_000001.parquet", here / "step.parquet")
    shutil.copytree(TINY_MODEL, here / "model")


# -- what goes wrong with an input ---------------------------------------------------------------------------------


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def emptied(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def halved(path: Path) -> None:
    size = path.stat().st_size // 2 + 5
    if path.suffix == ".csv":  # not between two lines: that is a whole file
        size = path.read_bytes().rfind(b",", 0, size)
    if path.suffix == ".jsonl":  # in the first line: a last one that is cut off is a crash's
        size = path.read_bytes().split(b"\n")[0].rfind(b",")
    if path.suffix == ".yaml":  # in a key: a value that is cut off may be one
        size = path.read_bytes().rfind(b"\n  ", 0, size) + 6
    os.truncate(path, size)


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
KINDS: dict[str, bytes | None] = {
    "directory": None,
    "picture": PNG + bytes(300),
    "text": b"hello, reader\n",
    "zip": b"PK\x03\x04" * 9,
}


def other(kind: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        directory, content = path.is_dir(), KINDS[kind]
        gone(path)
        if directory or content is not None:
            path.write_bytes(content or b"a file")
        else:
            path.mkdir()

    return replace


DAMAGE: dict[str, dict[str, Callable[[Path], None]]] = {
    "missing": {"": gone},
    "empty": {"": emptied},
    "truncated": {"": halved},
    "another kind": {kind: other(kind) for kind in KINDS},
}


# -- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exit:
    """How a command ended: its status, or the traceback of what came through, and what it printed."""

    status: int | str
    out: str
    err: str

    @property
    def line(self) -> str:
        """What a failing command says last; AssertionError unless this is one line of ours."""
        lines = self.err.strip().splitlines()
        assert self.status == 2, self
        assert len(lines) == 1 and lines[0].startswith("tatar-dist: ") and "Traceback" not in self.err, self
        return lines[0]


def run(words: list[str]) -> Exit:
    """Run a command in this process."""
    import traceback

    status: int | str
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(words)
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            status = traceback.format_exc()
    return Exit(status, out.getvalue(), err.getvalue())


def contents(here: Path, exact: bool = True) -> dict[str, bytes | None]:
    """Every file below a directory by name; a directory is None. Without `exact`, numbers are left out."""
    found: dict[str, bytes | None] = {}
    for path in sorted(here.rglob("*")):
        data = path.read_bytes() if path.is_file() else None
        if path.suffix == ".parquet" and data:
            with contextlib.suppress(pa.ArrowInvalid):
                data = repr(pq.read_table(path).to_pylist()).encode()
        elif data is not None and not exact:
            data = NUMBERS.sub(b"#", data)
        found[path.relative_to(here).as_posix()] = data
    return found


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process grow beyond `room` bytes: writing fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # Python ignores SIGXFSZ: EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Take the right to write in a directory, from root too: this thread puts off CAP_DAC_OVERRIDE."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, data) == 0
    had = data[0]
    mode = directory.stat().st_mode
    directory.chmod(0o555)
    data[0] = had & ~0b10
    assert libc.capset(head, data) == 0
    try:
        assert not os.access(directory, os.W_OK, effective_ids=True)
        yield
    finally:
        data[0] = had
        libc.capset(head, data)
        directory.chmod(mode)


PRELOADED = ("exit_cases", "tatar_dist.report.html", "tatar_dist.data.checks.report", "tatar_dist.rewards.audit")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(list(PRELOADED))
WRITES = os.O_WRONLY | os.O_RDWR


def _die_at(event: int) -> None:
    """Kill this process where it is about to make, open for writing, rename or remove its `event`-th file."""
    left = event

    def hook(name: str, args: tuple) -> None:
        nonlocal left
        if name in ("os.rename", "os.remove", "os.mkdir", "os.link") or (name == "open" and args[2] & WRITES):
            if name == "open" and str(args[0]).startswith(("/dev", "/proc")):
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _killed(here: str, words: list[str], event: int) -> None:
    os.chdir(here)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    _die_at(event)
    os._exit(cli.main(words))


def killed(here: Path, words: list[str], event: int) -> bool:
    """Run a command in a process of its own that dies at its `event`-th change of a file; False if it made fewer."""
    process = PROCESSES.Process(target=_killed, args=(str(here), words, event))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _on_full_output(here: str, words: list[str]) -> None:
    os.chdir(here)
    with open("/dev/full", "w") as full, open("err.txt", "w") as err:
        os.dup2(full.fileno(), 1)
        os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    sys.exit(cli.main(words))


def on_full_output(here: Path, words: list[str]) -> Exit:
    """Run a command in a process of its own that prints to a full disk, to the end of Python."""
    process = PROCESSES.Process(target=_on_full_output, args=(str(here), words))
    process.start()
    process.join()
    return Exit(process.exitcode, "", (here / "err.txt").read_text())


# -- the table -------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- exits: python tests/unit/exit_cases.py -->\n", "<!-- end of exits -->\n"


def cell(command: Command, column: str) -> str:
    """What the table says: exit statuses, or a dash, with letters of `REASONS`."""
    if text := command.cells.get(column):
        return text if text[0].isdigit() else f"— {text}"
    if column in DAMAGE:
        letters = sorted({letter for name, _, letter in command.tolerates if name == column})
        inputs = {name for name, input_, _ in command.tolerates if name == column for name in [input_]}
        strict = "2" if set(command.inputs) - inputs else ""
        return ", ".join(filter(None, [strict, "0 " + " ".join(letters) if letters else ""]))
    if column in ("read-only", "full disk"):
        return "2" if command.outputs or column == "read-only" else "2 e"
    return "0"


def table() -> str:
    """Return the survey as Markdown, with the reasons below."""
    lines = ["| command | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    used = set()
    for name, command in COMMANDS.items():
        cells = [cell(command, column) for column in COLUMNS]
        used |= {word for text in cells for word in text.replace(",", "").split() if word in REASONS}
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    assert used == set(REASONS), set(REASONS) - used
    return "\n".join([*lines, "", *(f"- {letter}: {text}" for letter, text in REASONS.items()), ""])


def main() -> None:
    """Rewrite the table in tests/README.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
