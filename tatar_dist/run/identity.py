"""The settings that determine what a run learns, which a resumed run must share.

All but those in `FREE` count: machines, speed, supervision and what is measured may change at any time. What is meant
to change is named in `checkpoint.accept`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from tatar_dist.config.schema import Config, GRPOConfig
from tatar_dist.errors import UserError

FREE = frozenset(
    """
    model.gradient_checkpointing
    data.root data.image_root data.validation data.test data.eval_limit
    sft.eval_every sft.micro_tokens sft.optim.on_nonfinite sft.optim.max_skipped
    grpo.eval_every grpo.micro_tokens grpo.logprob_gap_limit grpo.optim.on_nonfinite grpo.optim.max_skipped
    """.split()
)
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "max_model_len", "quantization")
FIXED = ("lora_", "dtype", "family", "train_vision", "optim.name", "optim.weight_decay", "optim.lr_scale")
BY_CONTENT = ("data.train", "data.prompts")  # the sampler compares manifests, `wording` is compared below


def identity(config: Config, stage: str, wording: str, reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines the result of `stage`, by key of the configuration, as JSON.

    Args:
        wording: the text of the prompts (`data.prompts`), which is compared by its content.
        reward: the preset with its overrides, as a mapping; used for GRPO.
    """
    sections: dict[str, Any] = {"model": asdict(config.model), "data": asdict(config.data)}
    sections[stage] = asdict(getattr(config, stage))
    if stage == "grpo":
        sections["rollout"] = {key: getattr(config.rollout, key) for key in SAMPLING}
        sections["reward"] = reward
    horizon = getattr(config, stage)
    fixed = horizon.optim.schedule == "constant" and getattr(horizon, "kl_schedule", "constant") == "constant"
    skipped = FREE | {*BY_CONTENT} | ({f"{stage}.epochs", f"{stage}.max_steps"} if fixed else set())
    same = {key: value for key, value in _flat(sections) if key not in skipped}
    digest = hashlib.sha256(wording.encode()).hexdigest()[:12]
    return {"stage": stage, "seed": config.seed, **same, "data.prompts": f"text {digest}"}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return {key: [was, is]} of what differs; a key unknown to `before` had its default."""
    if "seed" in before:
        before = {k: v for k, v in _defaults(before["stage"]).items() if k in now} | dict(before)
        before, now = _auto(before), _auto(now)
    adapters = {k for k in (*before, *now) if k.startswith("model.lora_")}  # earlier versions wrote them only if used
    added = adapters if "seed" not in before and now.get("model.lora_rank") else set()
    keys = [k for k in now if k in before] + sorted(added - before.keys())
    return {k: [before.get(k), now.get(k)] for k in keys if before.get(k) != now.get(k)}


@cache
def _defaults(stage: str) -> dict[str, Any]:
    known = identity(Config(output=""), stage, "", {})  # without the constants of rewards, which presets have
    return known | ({"grpo.scale": "group"} if stage == "grpo" else {})  # what it was before there was a key


def _auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with grpo.scale=auto where it says what auto means."""
    g = GRPOConfig(advantage=values.get("grpo.advantage", "std"))
    return dict(values) | ({"grpo.scale": "auto"} if values.get("grpo.scale") == g.scaling else {})


def require_same(
    where: str, before: Mapping[str, Any], now: Mapping[str, Any], accept: Sequence[str]
) -> dict[str, Any]:
    """Return the changes that `accept` (keys, or sections of them) names.

    Raises:
        UserError: others; each is named with both values.
    """
    changed = changes(before, now)
    if fixed := [key for key in changed if any(f".{part}" in key for part in FIXED)]:
        was, here = changed[fixed[0]]
        raise UserError(
            f"{where}: a checkpoint of a run with {fixed[0]}={was} (now {here}), which shapes the optimizer's state: "
            "give another output, with this checkpoint's model as model.path if you like"
        )
    refused = {k: v for k, v in changed.items() if not any(k == a or k.startswith(f"{a}.") for a in accept)}
    if refused:
        listed = ", ".join(f"{k}={was} (now {now})" for k, (was, now) in list(refused.items())[:5])
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UserError(
            f"{where}: a checkpoint of a run with {listed}{more}: give another output; or "
            f"checkpoint.accept=[{','.join(refused)}] if the change is meant; or checkpoint.resume=false to start over"
        )
    return changed


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if callable(value):  # a reward term of the user's own: its file and constants name it
            continue
        if isinstance(value, Mapping) and value and key != "lr_scale":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple | list) else value
