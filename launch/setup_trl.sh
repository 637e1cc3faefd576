#!/usr/bin/env bash
# Create .venv-trl, the peer that `make bench-trl` measures beside: TRL under its own pins; instant when nothing changed.
# torch first and by exact version, as in setup.sh (TORCH_INDEX: index for torch alone, may be empty).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

constraints=launch/constraints-trl.txt
stamp=.venv-trl/.ready-$(cat "$constraints" launch/setup_trl.sh | cksum | cut -d' ' -f1)
[[ -e $stamp ]] && exit 0
export PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf .venv-trl
.venv/bin/python -m venv .venv-trl
{
    .venv-trl/bin/python -m pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
    .venv-trl/bin/python -m pip install -c "$constraints" trl transformers accelerate datasets pillow
    .venv-trl/bin/python -m pip install --no-deps -c "$constraints" torchvision
    .venv-trl/bin/python launch/fix_torchvision.py
} >.venv-trl/setup.log 2>&1 || { tail -n 20 .venv-trl/setup.log >&2; exit 1; }
touch "$stamp"
