"""The exceptions that end a run with one line instead of a traceback.

Raise them with a single clear line: what is wrong, where (file, row, key), what to do. Anything else is a bug and keeps
its traceback.
"""

import os

EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = os.EX_TEMPFAIL


class UserError(Exception):
    """Bad input: a config key, a manifest row, a missing file, a port in use."""


class RunError(RuntimeError):
    """The run cannot go on: a process died or is late, or engines and learners differ. Exit 1."""


class LearnersFailed(RunError):
    """A learner died, failed or was late; all learners restart from the last checkpoint."""


class PushCutShort(LearnersFailed):
    """Learners failed in a push; its engines wait for the next, except `failed` {index: reason}."""

    def __init__(self, message: str, failed: dict[int, str]) -> None:
        super().__init__(message)
        self.failed = failed


class Interrupted(Exception):
    """The run stopped because it was asked to. `status`: its exit status."""

    def __init__(self, message: str, status: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.status = status


class StopRequested(BaseException):
    """End a wait whose result can be had again: nothing has been learned from it yet.

    Not an Exception: nothing on the way may take it for an error.
    """
