"""Supervised fine-tuning from a checkout or a `ray job submit` working directory; the same as `tatar-dist sft`.

python launch/sft.py --config configs/sft.yaml key=value …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the uploaded sources win over an installed package

from tatar_dist.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
