#!/usr/bin/env bash
# Create .venv (or the directory that is the argument) and install everything under exact pins; instant when nothing
# changed. Called by `make setup`.
#
# Environment: DEVICE (cpu|cuda), TORCH_INDEX (index for torch alone, may be empty), PYTHON (interpreter, may be empty).
# Packages come from wherever pip is configured to look. The order matters: torch first and by exact version, otherwise
# another package pulls a CUDA build of several GB onto a CPU machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=${DEVICE:?cpu or cuda}
case $device in cpu | cuda) ;; *) echo "setup: DEVICE=$device: must be cpu or cuda" >&2; exit 2 ;; esac
venv=${1:-.venv}
made_for=$(cat "$venv/.device" 2>/dev/null || true)
if [[ -n $made_for && $made_for != "$device" ]]; then
    echo "setup: $venv was made with DEVICE=$made_for: remove it to have DEVICE=$device here, or use another checkout" >&2
    exit 2
fi
constraints=launch/constraints-$device.txt
inputs=(pyproject.toml "$constraints" launch/photos.txt launch/fix_torchvision.py launch/setup.sh)
stamp=$venv/.ready-$device-$(cat "${inputs[@]}" | cksum | cut -d' ' -f1)
[[ -e $stamp ]] && exit 0

export PIP_DISABLE_PIP_VERSION_CHECK=1
log=$venv/setup.log
python=$venv/bin/python

# phase NAME COMMAND...: one line of progress; the command's own words only when it fails
phase() {
    local name=$1 start=$SECONDS
    shift
    printf 'setup (%s): %-42s' "$device" "$name"
    if ! "$@" >>"$log" 2>&1; then
        printf ' failed\n'
        tail -n 20 "$log" >&2
        echo "setup: '$name' failed; the whole output is in $log" >&2
        exit 1
    fi
    printf ' %3d s\n' $((SECONDS - start))
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or 3.12 is needed (looked for: ${PYTHON:-python3.11, python3.12, python3}); set PYTHON=" >&2
    return 1
}

# Build of the installed torch 2.13.0: cpu, cuda (vLLM's 13), another "CUDA N"; nothing if there is none.
installed_torch() {
    "$python" 2>/dev/null - <<'PYTHON' || true
import torch

cuda = torch.version.cuda
if torch.__version__.startswith("2.13.0"):
    print("cpu" if cuda is None else "cuda" if cuda.startswith("13.") else f"CUDA {cuda}")
PYTHON
}

# The same of the torch that pip would fetch for a requirement; nothing if it finds none. Asks for its metadata only;
# nothing is installed.
offered_torch() {
    local report=$venv/torch.json
    "$python" -m pip install --quiet --dry-run --no-deps --ignore-installed --report "$report" \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$1" >>"$log" 2>&1 || return 0
    "$python" - "$report" <<'PYTHON'
import json
import sys

from pip._vendor.packaging.requirements import Requirement

(torch,) = json.load(open(sys.argv[1]))["install"]
needs = [Requirement(line) for line in torch["metadata"].get("requires_dist", [])]
names = [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
if any(name.endswith("-cu12") for name in names):
    print("CUDA 12")
else:
    print("cuda" if any(name.startswith(("nvidia-", "cuda-")) for name in names) else "cpu")
PYTHON
}

base_python=$(find_python)
mkdir -p "$venv"
: >"$log"
rm -f "$venv"/.ready-*
phase "virtual environment" "$base_python" -m venv "$venv"

torch=torch==2.13.0
[[ $device == cpu ]] || torch+=,!=2.13.0+cpu # a CPU wheel that lies nearer must not win where CUDA is asked for
build=$(installed_torch)
if [[ -n $build && $build != "$device" ]]; then
    [[ $build == CUDA* ]] && other= || other=", or set DEVICE=$build"
    echo "setup: DEVICE=$device, but the torch in $venv is a $build build: remove $venv$other" >&2
    exit 2
elif [[ -z $build ]]; then
    build=$(offered_torch "$torch")
    [[ -n $build ]] || build=$(offered_torch torch==2.13.0)
    if [[ -z $build ]]; then
        tail -n 5 "$log" >&2
        echo "setup: pip finds no torch==2.13.0 for this Python and platform" >&2
        exit 1
    elif [[ $build != "$device" ]]; then
        [[ $build == cpu ]] && size= || size=" (several GB)"
        [[ $device == cpu ]] && wanted=CPU || wanted="CUDA 13.0"
        echo "setup: DEVICE=$device, but pip would install a $build build of torch$size: set TORCH_INDEX to the index of the $wanted build, which PyTorch's get-started page names" >&2
        exit 2
    fi
fi
echo "$device" >"$venv/.device"

# --no-deps: an index for torch alone need not hold the pinned versions of torch's dependencies; they come next.
phase "torch 2.13.0" "$python" -m pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
phase "Ray, vLLM, DeepSpeed, transformers, tools" \
    "$python" -m pip install -c "$constraints" -r <("$python" - "$device" <<'PYTHON'
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))
wanted = list(project["build-system"]["requires"]) + project["project"]["dependencies"]
for extra in (sys.argv[1], "demo", "dev", "wandb", "mlflow"):
    wanted += project["project"]["optional-dependencies"][extra]
print("\n".join(wanted))
PYTHON
)
phase "photographs of the demo" "$python" -m pip install --no-deps -r launch/photos.txt
phase "tatar_dist" "$python" -m pip install --no-deps --no-build-isolation -e .
phase "torchvision" "$python" launch/fix_torchvision.py
touch "$stamp"
