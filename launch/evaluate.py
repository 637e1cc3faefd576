"""Evaluation from a checkout or a `ray job submit` working directory; the same as `tatar-dist evaluate`.

python launch/evaluate.py --config configs/eval.yaml key=value …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the uploaded sources win over an installed package

from tatar_dist.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
