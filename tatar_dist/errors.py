"""The exceptions that end a run with one line instead of a traceback.

Raise them with a single clear line: what is wrong, where (file, row, key), what to do. Anything else is a bug and keeps
its traceback.
"""


class UserError(Exception):
    """Bad input: a config key, a manifest row, a missing file, a port in use."""


class RunError(RuntimeError):
    """The run cannot go on: a process died or is late, engines and learners disagree. Exit status 1."""


class LearnersFailed(RunError):
    """A learner died, is late or broke: all of them restart from the last checkpoint."""
