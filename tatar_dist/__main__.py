"""Run `python -m tatar_dist` as `tatar-dist`."""

import sys

from tatar_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
