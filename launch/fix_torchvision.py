"""Make `import torchvision` work next to a CPU-only torch. Run once by `make setup`; harmless anywhere else.

The registry's torchvision wheels are CUDA builds. Beside a CPU torch their binary part does not load, and importing
the package dies with "operator torchvision::nms does not exist", although all we need of it (transforms, which
transformers' Qwen2.5-VL processor imports) is plain Python. vLLM inspects models in a sub-process before any code of
ours runs, so the cure has to live in the environment: a `.pth` file in site-packages that installs a lazy import hook.
The hook declares the two missing operators when torchvision is first imported; start-up of Python imports nothing.
torchaudio and torchcodec come with vLLM in CUDA builds too and are not used here; transformers imports torchaudio
wherever it finds it, so those that cannot load beside a CPU torch are uninstalled, in a virtual environment only.

    python launch/fix_torchvision.py      # with the interpreter of the environment to repair

Nothing is written where torch has CUDA or torchvision imports by itself (a hook left from before is then removed).
Exit status 0 only if afterwards torchvision imports in a fresh process, and, where transformers is installed, so does
its Qwen2.5-VL processor.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK_OFF = "TATAR_DIST_NO_TORCHVISION_HOOK"
MODULE = "_tatar_dist_torchvision_hook"

HOOK = f'''"""Written by launch/fix_torchvision.py: lets a CUDA-built torchvision import beside a CPU-only torch."""

import os
import sys


def declare_operators():
    import torch

    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define("torchvision::" + name, signature)


class TorchvisionFinder:
    """Hands out the normal spec of torchvision, whose loader first declares the missing operators."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        load = spec.loader.exec_module

        def exec_module(module):
            declare_operators()
            load(module)

        spec.loader.exec_module = exec_module
        return spec


if not os.environ.get("{HOOK_OFF}"):
    sys.meta_path.insert(0, TorchvisionFinder())
'''

TORCHVISION = "import torchvision, torchvision.transforms.v2.functional"
PROCESSOR = "from transformers import Qwen2_5_VLProcessor"
TORCH_IS_CPU_ONLY = "import sys, torch; sys.exit(0 if torch.version.cuda is None and torch.version.hip is None else 1)"


def runs(code: str, hook: bool = True) -> tuple[bool, str]:
    """Whether `code` runs in a fresh Python process, and the last line it wrote to stderr."""
    env = {k: v for k, v in os.environ.items() if k != HOOK_OFF} | ({} if hook else {HOOK_OFF: "1"})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


@functools.cache
def cpu_only() -> bool:
    return runs(TORCH_IS_CPU_ONLY)[0]


def installed(package: str) -> bool:
    return runs(f"import sys, importlib.util as u; sys.exit(u.find_spec({package!r}) is None)")[0]


def remove_unloadable(packages: tuple[str, ...]) -> None:
    """Uninstall those of `packages` that are installed and cannot be imported. Never outside a virtual environment."""
    for package in packages:
        if sys.prefix == sys.base_prefix or not installed(package) or runs(f"import {package}")[0]:
            continue
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", package]
        if subprocess.run(pip).returncode == 0:
            print(f"{package}: removed, its build cannot load beside a CPU-only torch and nothing here uses it")


def main() -> int:
    site = Path(sysconfig.get_paths()["purelib"])
    pth, module = site / f"{MODULE}.pth", site / f"{MODULE}.py"
    for package in ("torch", "torchvision"):
        if not installed(package):
            print(f"fix_torchvision: {package} is not installed for {sys.executable}", file=sys.stderr)
            return 1

    if runs(TORCHVISION, hook=False)[0]:
        pth.unlink(missing_ok=True)
        module.unlink(missing_ok=True)
        print("torchvision imports by itself: nothing to do")
    elif not cpu_only():
        # A CUDA torch whose torchvision fails is a mismatch of versions; hiding it would only move the crash.
        print(f"fix_torchvision: torchvision does not import: {runs(TORCHVISION, hook=False)[1]}", file=sys.stderr)
        return 1
    else:
        # The module before the .pth: a Python starting in between must not find a .pth without its module.
        for path, text in ((module, HOOK), (pth, f"import {MODULE}\n")):
            if not path.is_file() or path.read_text() != text:
                beside = path.with_suffix(path.suffix + ".new")
                beside.write_text(text)
                beside.replace(path)
        print("torchvision: operators of the CPU-only build declared on import")

    if cpu_only():
        remove_unloadable(("torchaudio", "torchcodec"))

    wanted = [TORCHVISION] + ([PROCESSOR] if installed("transformers") else [])
    for code in wanted:
        ok, error = runs(code)
        if not ok:
            print(f"fix_torchvision: `{code}` still fails: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
