"""Files that come with the package: the recipes and tables of `configs/`, the demo's base model, the card's template.

`configs/` stands at the top of the repository; the link in this directory makes a wheel carry it.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent
CONFIGS = ASSETS / "configs"
TINY_MODEL = ASSETS / "tiny-qwen2_5-vl"
