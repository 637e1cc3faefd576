"""The one exception that means "the user can fix this".

Raise it with a single clear line: what is wrong, where (file, row, key), what to do.
The command line prints the line and exits with status 2; anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: a config key, a manifest row, a missing file, a port in use."""
