"""Breaks one formula at a time and asks that some test notices: `python tests/mutations.py [NAME…]`.

Each mutation is one replacement in a copy of the package; the unit tests of its part run on the copy. A mutation that
no test notices, or whose text is no longer in the file, fails. Part of `make nightly`.
"""

# ruff: noqa: E501  one mutation a line reads best

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
REWARDS = ("test_thurstone.py", "test_rewards.py", "test_released_golden.py")
SAMPLER = ("test_sampler.py", "test_pools.py", "test_orders.py", "test_splits_of_a_run.py")
IMPORTS = ("test_import_formats.py", "test_import_bad_input.py", "test_import_fuzz.py")
PICTURES, TEXTS = (
    ("test_images.py", "test_validate.py", "test_validate_foreign.py"),
    ("test_rationale_checks.py", "test_rationale_marks.py"),
)
ASKING = ("test_rationale_resume.py", "test_rationale_journal.py", "test_rationale_endpoint.py")
PACKED, CUDA, HEAD, BATCH = ("test_shared_prefix.py",), ("test_ragged_cuda.py",), ("test_head.py",), ("test_batch.py",)
PACKING, BATCHES = ("test_packing.py",), ("test_batches.py",)
EXPECTED, ANSWERS = ("test_expected_score.py",), ("test_evaluate_answers.py",)
ADVANTAGES, LOSSES = ("test_advantages.py", "test_rewards.py"), ("test_losses.py",)
GPUS, ESTIMATED = ("test_gpus.py",), ("test_simulate_estimate.py",)
GPU_CHECK, PROOFS, NEAR = ("test_gpu_check.py",), ("test_proofs.py",), ("test_near.py",)

# name: (file below tatar_dist, text, what it becomes, tests)
DEVICE = ("../device/test_learner.py",)
MUTATIONS = {
    "score: a model's own pixel limits are taken as they are": ("scoring/directory.py", "high if high != OWN_LIMIT * (patch * merge) ** 2 else ModelConfig.max_pixels", "high", ("test_score_output.py",)),
    "prompts: pixels that would not do": ("prompts/render.py", "limit + 1 - max", "limit + 99 - max", ("test_prompt_source.py",)),
    "near: the shifts of a crop are not tried": ("data/checks/near.py", "hashes(rows.thumbnail[block], SCALES, STEPS)", "hashes(rows.thumbnail[block], SCALES, STEPS) * (np.arange(107) == 24)[:, None]", NEAR),
    "near: any two photographs are alike": ("data/checks/near.py", "CANDIDATE, NEAR = 0.55, 0.85", "CANDIDATE, NEAR = 0.0, 0.3", NEAR),
    "near: an image as it was stored, not upright": ("data/images.py", "_upright_rgb(small, orientation)", "_upright_rgb(small, 1)", NEAR),
    "exits: a full disk is a bug": ("run/files.py", "FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)", "FULL = (errno.EDQUOT,)", ("test_exits.py",)),
    "exits: no tokenizer is no matter": ("models/files.py", '("tokenizer", TOKENIZERS), ', "", ("test_exits.py",)),
    "exits: a report leaves out what it could not read": ("report/reading.py", "    notes.append(f\"{file.parent.name}/{file.name} could not be read: not what a run writes\")\n", "", ("test_exits.py",)),
    "push: NCCL where engines share GPUs": ("plan/plan.py", 'return "cuda_ipc" if config.cluster.placement == "colocated" else "nccl"', 'return "nccl"', ("test_plan.py",)),
    "push: a part has no name of its own": ("models/base.py", '"merger" if "merger" in name else "vision"', '"vision"', ("test_families.py",)),
    "status: the way back does not show": ("run/status.py", 's.push, s.push_checked = "object_store", False', "pass", ("test_status.py",)),
    "status: a jump of the clock counts": ("run/status.py", "if gap <= JUMP * statistics.median(gaps)", "", ("test_status.py",)),
    "status: a clock that goes back counts": ("run/status.py", "max(seconds, now - before)", "now - before", ("test_status.py",)),
    "lock: a refused run wipes its holder's name": ("run/directory.py", '".lock", "a+")', '".lock", "w+")', ("test_run_directory.py",)),
    "resume: damaged lines vanish": ("run/directory.py", "damaged[number] = line", "pass", ("test_run_directory.py",)),
    "gaussian: sign": ("rewards/terms.py", "np.exp(-0.5 * (d", "np.exp(0.5 * (d", REWARDS),
    "gaussian: width does not adapt": ("rewards/terms.py", "* d / 100.0", "* 0.0", REWARDS),
    "gaussian: task widths swapped": ("rewards/terms.py", "np.where(iaa, params.alpha_iaa, params.alpha_iqa)", "np.where(iaa, params.alpha_iqa, params.alpha_iaa)", REWARDS),
    "thurstone: missing floor": ("rewards/thurstone.py", "np.sqrt(np.maximum(v_i + v_j, params.floor**2))", "np.sqrt(np.maximum(v_i + v_j, 1e-4))", REWARDS),
    "thurstone: sign of the gap": ("rewards/thurstone.py", "gap = groups.g[i] - groups.g[rivals]", "gap = groups.g[rivals] - groups.g[i]", REWARDS),
    "thurstone: sign of z": ("rewards/thurstone.py", "z = (q[:, None] - self.mu) * self.inverse_scale", "z = (self.mu - q[:, None]) * self.inverse_scale", REWARDS),
    "thurstone: same-group pairs allowed": ("rewards/thurstone.py", "gap_weights(gap[None], (rivals != i)[None], params.m)", "gap_weights(gap[None], (rivals >= 0)[None], params.m)", REWARDS),
    "thurstone: far pairs weigh more": ("rewards/thurstone.py", ".clip(min=0.0) / m)", ".clip(min=0.0) / -m)", REWARDS),
    "thurstone: sample variance": ("rewards/thurstone.py", "minlength=n_groups) / safe\n    variance", "minlength=n_groups) / np.maximum(n - 1, 1)\n    variance", REWARDS),
    "thurstone: pools ignored": ("rewards/score.py", 'return iaa if pool == "list" else 2 * batch.dataset[index] + iaa', "return iaa", REWARDS),
    "thurstone: unparsed counted in means": ("rewards/thurstone.py", "weights=q[parsed], minlength=n_groups) / safe", "weights=q[parsed], minlength=n_groups) / np.maximum(np.bincount(group, minlength=n_groups), 1)", REWARDS),
    "bce: halves swapped": ("rewards/links.py", "a -= p * z", "a -= (1 - p) * z", REWARDS),
    "bce: probit halves swapped": ("rewards/links.py", "side = np.where(z >= 0, p, 1.0 - p)", "side = np.where(z >= 0, 1.0 - p, p)", REWARDS),
    "bce: no clamp": ("rewards/thurstone.py", "np.clip(z, -limit, limit), params.link)", "z, params.link)", REWARDS),
    "fidelity: one half missing": ("rewards/links.py", "np.sqrt(p * q) + np.sqrt(not_p * not_q)", "np.sqrt(p * q)", REWARDS),
    "pairwise: siblings always compared": ("rewards/pairwise.py", "if params.siblings else", "if True else", REWARDS),
    "pairwise: sign": ("rewards/pairwise.py", "(q[block, None] - q[None, rows]) / params.tau", "(q[None, rows] - q[block, None]) / params.tau", REWARDS),
    "length: tasks swapped": ("rewards/terms.py", "np.where(iaa, params.iaa_min", "np.where(~iaa, params.iaa_min", REWARDS),
    "length: unparsed paid": ("rewards/terms.py", "np.where(parsed,", "np.where(parsed | True,", REWARDS),
    "binary: inverted": ("rewards/terms.py", "np.abs(q - g) <", "np.abs(q - g) >=", REWARDS),
    "reward: weights ignored": ("algo/advantages.py", "total += weight * np.nan_to_num", "total += np.nan_to_num", ("test_custom_terms.py", *ADVANTAGES)),
    "reward: junk before a punished answer": ("rewards/custom.py", "values[index], sign * worst[group])", "values[index], 0.0)", ("test_custom_terms.py",)),
    "expected: 100 forgotten": ("prompts/expected.py", '("0", POINT, END) if digits == "10"', '(POINT, END) if digits == "10"', EXPECTED),
    "expected: half points on 100": ("prompts/expected.py", "v + half if v < 100 else 100.0", "v + half", EXPECTED),
    "expected: not normalised": ("prompts/expected.py", "for v, p in points) / mass\n    return", "for v, p in points)\n    return", EXPECTED),
    "refill: others replaced than those with a substitute": ("sampling.py", "if group.prompt.group_id not in new]", "if group.prompt.group_id not in list(silent)[: len(new)]]", ("test_prompt_source.py",)),
    "evaluate: answers of another picture": ("evaluate/answers.py", ' and line["image"] == _digest(sample)', "", ANSWERS),
    "evaluate: done ones not counted in batches": ("evaluate/answers.py", "batches_by_pixels(samples, size", "batches_by_pixels((s for s in samples if not done(s)), size", ANSWERS),
    "compare: unpaired sides swapped": ("evaluate/bootstrap.py", "statistic(t, a[rows]) - statistic(t, b[rows])", "statistic(t, b[rows]) - statistic(t, a[rows])", ("test_evaluation_tables.py", "test_metrics.py")),
    "compare: percentiles of twelve as of many": ("evaluate/bootstrap.py", "width = math.sqrt(expand / (expand - 1))", "expand, width = 10**6, 1.0", ("test_metrics.py",)),
    "metrics: the logistic fit starts anywhere": ("evaluate/metrics.py", "kind=\"stable\")[:STARTS]", "kind=\"stable\")[-STARTS:]", ("test_metrics.py",)),
    "bootstrap: clusters not kept whole": ("evaluate/bootstrap.py", "_, label, sizes = np.unique(cluster,", "_, label, sizes = np.unique(np.arange(len(cluster)),", ("test_metrics.py",)),
    "advantage: biased std": ("algo/advantages.py", "np.maximum(n - 1, 1)", "np.maximum(n, 1)", ADVANTAGES),
    "advantage: not centred": ("algo/advantages.py", "(x - group_mean(x, group)[group]) * factor", "x * factor", ADVANTAGES),
    "advantage: per term sums first": ("algo/advantages.py", 'if mode == "per_term" else total', 'if mode == "never" else total', ADVANTAGES),
    "advantage: batch scale by group": ("algo/advantages.py", 'or (mode == "std" and scale == "batch")', "", ADVANTAGES),
    "advantage: sum not scaled over the batch": ("algo/advantages.py", '    if scale == "batch":\n', "    if False:\n", ADVANTAGES),
    "advantage: silent groups count in the batch": ("algo/advantages.py", "sums[group_std(sums, group)[group] >= ZERO_STD]", "sums", ADVANTAGES),
    "advantage: the scale does not reach it": ("rewards/score.py", "advantage, eps, scale)", "advantage, eps)", ("test_custom_terms.py",)),
    "share: not centred among the parsed": ("algo/advantages.py", "part[rows] - group_mean(part[rows], label)[label]", "part[rows]", ADVANTAGES),
    "share: a step without one is low": ("rewards/metrics.py", "if not scoring or math.isnan(found):", "if not scoring:", ADVANTAGES),
    "thurstone: raters of one image": ("rewards/thurstone.py", "groups.rater_variance[i] + groups.rater_variance[rivals]", "2 * groups.rater_variance[i]", REWARDS),
    "thurstone: raters widen P alone": ("rewards/thurstone.py", "params) ** 2 + raters)", "params) ** 2)", REWARDS),
    "gaussian: raters left out": ("rewards/terms.py", "sigma0 = np.hypot(sigma0, np.nan_to_num(score_std))", "pass", ("test_custom_terms.py",)),
    "cost: one budget": ("rewards/terms.py", "np.where(iaa, params.iaa_budget, params.iqa_budget)", "params.iqa_budget", ("test_custom_terms.py",)),
    "length: thought is never optional": ("rewards/terms.py", "params.optional & (words == 0)", "False", ("test_custom_terms.py",)),
    "sft: thought is never dropped": ("sft.py", "if draw < p else sample", "if False else sample", ("test_prompt_source.py",)),
    "share: of the term's own variance": ("algo/advantages.py", "float(part @ total) / variance", "float(part @ part) / variance", ADVANTAGES),
    "thurstone: regret with the entropy": ("rewards/thurstone.py", "@ self.w - self.entropy @ self.w", "@ self.w", REWARDS),
    "thurstone: regret by the wrong constant": ("rewards/thurstone.py", "np.exp(-mean / params.kappa)", "np.exp(-mean * params.kappa)", REWARDS),
    "thurstone: the scale is not shared": ("rewards/thurstone.py", 'if params.scale == "shared" else', "if False else", REWARDS),
    "agreement: ties count": ("rewards/metrics.py", "np.abs(a).sum(1) * np.abs(b).sum(1)", "float(len(first)) ** 2 * (np.abs(a).sum(1) > 0)", REWARDS),
    "loss: sign": ("algo/loss.py", "return -torch.minimum", "return torch.minimum", LOSSES),
    "loss: max for min": ("algo/loss.py", "-torch.minimum(r.clamp(max=delta)", "-torch.maximum(r.clamp(max=delta)", LOSSES),
    "loss: one clip for both sides": ("algo/loss.py", "r.clamp(low, high) * advantage)", "r.clamp(low, 1.0 + form.clip_low) * advantage)", LOSSES),
    "loss: sequence ratio not a mean": ("algo/loss.py", "log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1)", "log_ratio.sum(dim=1)", LOSSES),
    "loss: k3 reversed": ("algo/loss.py", "r = ref_logp - logp", "r = logp - ref_logp", LOSSES),
    "loss: importance inverted": ("algo/loss.py", "off = old - engine", "off = engine - old", LOSSES),
    "loss: importance not capped": ("algo/loss.py", "ratio.clamp(max=cap), ratio > cap", "ratio, ratio > cap", LOSSES),
    "loss: importance masked above only": ("algo/loss.py", "(ratio > cap) | (ratio < floor)", "ratio > cap", LOSSES),
    "loss: the floor is not asked": ("algo/loss.py", "1.0 / cap if form.importance_floor is None else form.importance_floor", "1.0 / cap", LOSSES),
    "loss: delta counts, but does not bound": ("algo/loss.py", "r.clamp(max=delta)", "r", LOSSES),
    "loss: delta is not counted": ("algo/loss.py", "(r < low) | (r > delta)", "r < low", LOSSES),
    "loss: cispo through its weight": ("algo/loss.py", "r.clamp(low, high).detach()", "r.clamp(low, high)", LOSSES),
    "loss: sapo not scaled": ("algo/loss.py", "-4.0 / tau * torch", "-4.0 * torch", LOSSES),
    "loss: sapo with one temperature": ("algo/loss.py", ".masked_fill(advantage > 0, form.tau_positive)", "", LOSSES),
    "engine: a direct answer loses its tag": ("rollout/engine.py", "text=prompt.begun + c.text", "text=c.text", ("test_evaluate_answers.py",)),
    "bootstrap: seeds not drawn": ("evaluate/bootstrap.py", "rng.integers(0, len(pairs), len(pairs)).tolist()", "list(range(len(pairs)))", ("test_metrics.py",)),
    "forms: share of a mean alone": ("demo/forms.py", "all(v >= LEAST_SHARE for s in shares.values() for v in s)", "all(s[1] >= LEAST_SHARE for s in shares.values())", ("test_forms.py",)),
    "forms: a challenger without an interval": ("demo/forms.py", 'cells[cell]["difference"][1] > 0', 'cells[cell]["difference"][0] > 0', ("test_forms.py",)),
    "compare: one column for both": ("evaluate/compare.py", "(_read(side, column) for side, column in", "(_read(side, columns[0]) for side, column in", ("test_evaluation_tables.py",)),
    "loss: local normaliser": ("algo/loss.py", "policy = ((pg * mask).sum(dim=1) * weight).sum()", "policy = ((pg * mask).sum(dim=1) * weight).sum() / len(mask) * 7", LOSSES),
    "weights: dropped sequences counted": ("algo/aggregation.py", "max(1, int(counted.sum()))", "len(lengths)", LOSSES),
    "weights: token mean over sequences": ("algo/aggregation.py", "1.0 / tokens)", "1.0 / sequences)", LOSSES),
    "import: lower is not flipped": ("data/imports/rows.py", "scale.high - raw if lower_is_better", "raw - scale.low if lower_is_better", IMPORTS),
    "import: range starts at 0": ("data/imports/rows.py", "else raw - scale.low", "else raw", IMPORTS),
    "import: out of range accepted": ("data/imports/rows.py", "outside = (raw < fmt.range.low) | (raw > fmt.range.high)", "outside = np.zeros(len(raw), bool)", IMPORTS),
    "manifest: NaN accepted": ("data/schema.py", "bad = ~((scores >= 0) & (scores <= 100))", "bad = (scores < 0) | (scores > 100)", ("test_manifest.py",)),
    "manifest: stamp of another file believed": ("data/manifest.py", "(stamp.rows, stamp.groups) == (sum(sizes), groups_checksum(sizes))", "True", SAMPLER),
    "manifest: paths may leave the root": ("data/manifest.py", "if not os.path.isabs(name) and Path(target).is_relative_to(root) else None", "if not os.path.isabs(name) else None", ("test_manifest.py",)),
    "writer: pools mixed in a group": ("data/writing.py", "for key, part in _by_pool(table):", "for key, part in [(('', '', ''), table)]:", SAMPLER),
    "writer: repeated ids accepted": ("data/writing.py", "        writer.check_ids(place)\n", "", SAMPLER),
    "splits: every row is trained on": ("data/manifest.py", "if p.split == split)", "if True)", SAMPLER),
    "walk: excluded rows come back": ("data/pool_cursor.py", "            if ref in self.excluded:\n                continue\n", "", SAMPLER),
    "walk: rows put off are lost": ("data/pool_cursor.py", "                self.put_off.append(ref)\n", "", SAMPLER),
    "walk: every epoch alike": ("data/pool_cursor.py", "key = (self._seed, self.dataset, self.epoch)", "key = (self._seed, self.dataset)", SAMPLER),
    "walk: what was put off is not resumed": ("data/pool_cursor.py", 'self.put_off = [(m, row) for m, row in state["put_off"]]', "self.put_off = []", SAMPLER),
    "walk: pictures in rows in any order": ("data/pool_cursor.py", "if self._blocks is None else", "if True else", SAMPLER),
    "walk: a block for every run": ("data/pool_cursor.py", "sizes = np.diff(pool.rows_before(manifest.starts))", "sizes = pool.runs[:, 1]", SAMPLER),
    "resume: other manifests accepted": ("data/sampler.py", "if then != manifest.fingerprint:", "if False:", SAMPLER),
    "order: blocks in order": ("data/pool_cursor.py", 'permutation(len(sizes), (*key, "blocks"))', "np.arange(len(sizes))", SAMPLER),
    "order: windows not shuffled": ("data/pool_cursor.py", 'rows[permutation(len(rows), (*key, "window", w // WINDOW))]', "rows", SAMPLER),
    "resume: another order accepted": ("data/sampler.py", "if not cursor.keeps_old_order() and", "if False and", SAMPLER),
    "picture: EXIF ignored": ("data/images.py", "return _upright_rgb(image, _orientation(image) or 1)", "return _upright_rgb(image, 1)", PICTURES),
    "picture: 16 bits clipped": ("data/images.py", "scaled = values / 257", "scaled = values.clip(0, 255)", PICTURES),
    "picture: no limit of size": ("data/images.py", "image.width * image.height > MAX_PIXELS", "False", PICTURES),
    "validate: leaks unseen": ("data/checks/compare.py", "if split[group].min() < split[group].max()", "if False", PICTURES),
    "validate: the test side of a leak is dropped": ("data/checks/compare.py", "group[split[group] != protected]", "group[split[group] == protected]", PICTURES),
    "rationale: cut text kept": ("rationale/checks.py", 'if finish == "length":', 'if finish == "never":', TEXTS),
    "rationale: digits kept": ("rationale/checks.py", "if unicodedata.numeric(character, None) is not None:", "if False:", TEXTS),
    "rationale: order of attributes ignored": ("rationale/checks.py", "elif chain < least:", "elif False:", TEXTS),
    "rationale: copies kept": ("rationale/checks.py", "known = {gram for source in sources for gram in grams(bare(source))}", "known = set()", TEXTS),
    "judge: low marks kept": ("rationale/questions.py", "if value <= reject_at", "if value < reject_at", TEXTS),
    "judge: booleans are marks": ("rationale/questions.py", "type(answer[name]) is not int", "not isinstance(answer[name], int)", TEXTS),
    "judge: repeated keys accepted": ("rationale/questions.py", "if len(dict(pairs)) != len(pairs):", "if False:", TEXTS),
    "journal: damage in the middle passed over": ("run/journal.py", "elif bad is not None:", "elif False:", ASKING),
    "journal: other settings continued": ("run/journal.py", "if before.get(key) != now.get(key):", "if False:", ASKING),
    "prefix: prompts not causal": ("learner/shared_prefix.py", "return ragged.ragged(lengths, lengths, True)", "return ragged.ragged(lengths, lengths, False)", PACKED),
    "prefix: merge sign": ("learner/shared_prefix.py", "(x - both).exp()", "(both - x).exp()", PACKED),
    "prefix: shares swapped": ("learner/shared_prefix.py", "for x in (lse[p:], norm)]", "for x in (norm, lse[p:])]", PACKED),
    "prefix: backward with the parts' own lse": ("learner/shared_prefix.py", "lse = torch.cat([lse[:p], both])", "pass", PACKED),
    "prefix: no gradient through the prompt": ("learner/shared_prefix.py", "                total += part\n", "                pass\n", PACKED),
    "ragged: repeated queries pass gradient on": ("learner/ragged.py", "g = g * valid[:, None, :, None].to(g.device)", "pass", PACKED),
    "ragged: index one segment late": ("learner/ragged.py", "starts = [list(accumulate(x, initial=0))", "starts = [list(accumulate(x, initial=1))", PACKED),
    "ragged cuda: lse not transposed": ("learner/ragged.py", "lse.transpose(0, 1).contiguous()", "lse.contiguous()", CUDA),
    "ragged cuda: never causal": ("learner/ragged.py", "max_q, max_k, segments.causal, scale, None", "max_q, max_k, False, scale, None", CUDA),
    "ragged cuda: bounds swapped": ("learner/ragged.py", "lse.transpose(0, 1).contiguous(), cu_q, cu_k,", "lse.transpose(0, 1).contiguous(), cu_k, cu_q,", CUDA),
    "head: temperature missing in the gradient": ("learner/policy.py", "d.mul_(grad[c, None] / t)", "d.mul_(grad[c, None])", HEAD),
    "head: weight's gradient adds up in low precision": ("learner/policy.py", "dtype=torch.promote_types(weight.dtype, torch.float32))", "dtype=weight.dtype)", HEAD),
    "head: forbidden ids allowed": ("learner/policy.py", 'logits.index_fill_(-1, forbidden, float("-inf"))', "logits", HEAD),
    "batch: completions one position late": ("learner/batch.py", "start = before.max() + 1 ", "start = before.max() + 2 ", BATCH),
    "batch: not the prompt's last token": ("learner/batch.py", "ends.append(at - 1)", "ends.append(at - 2)", BATCH),
    "batch: mask without the end of turn": ("learner/batch.py", "mask[r, : len(row.completion_ids)] = not", "mask[r, : len(row.completion_ids) - 1] = not", BATCH),
    "batch: fillers count": ("learner/batch.py", "= not row.filler", "= True", BATCH),
    "packing: budget forgotten": ("learner/packing.py", "if _tokens(b) + unit.tokens <= budget", "if True", PACKING),
    "packing: ranks not relieved": ("learner/packing.py", "ranks > 1 and _relieve", "ranks > 9 and _relieve", PACKING),
    "packing: a prompt is free": ("models/costs.py", "return self.prompt + sum", "return sum", PACKING),
    "batches: one step staler": ("sampling.py", "n = step + 1 + len(self._queue)", "n = step + 2 + len(self._queue)", BATCHES),
    "batches: what is ahead is not kept": ("sampling.py", "_packed(g) for g in groups}", "_packed(g) for g in groups[:0]}", BATCHES),
    "batches: sampler not rewound": ("sampling.py", "            self.sampler.load_state_dict(before)\n", "", BATCHES),
    "batch: empty completions accepted": ("learner/batch.py", "if not row.completion_ids:", "if False:", BATCH),
    "device: buffers stay on the CPU": ("learner/zero3.py", "module._buffers[name] = buffer.to(self.device)", "pass", DEVICE),
    "device: rotary frequencies are rounded": ("learner/zero3.py", '"keep_in_fp32_modules": ["inv_freq"],', '"keep_in_fp32_modules": [],', DEVICE),
    "device: gradients summed in bfloat16": ("learner/zero3.py", '"grad_accum_dtype": "fp32",', "", DEVICE),
    "device: logits are rounded": ("learner/policy.py", "torch.mm(states, weight.T, out_dtype=torch.float32)", "(states @ weight.T).float()", DEVICE),
    "device: an update of many kernels": ("learner/zero3.py", 'fused = self.device.type != "cpu"', "fused = False", DEVICE),
    "gpus: an old driver passes": ("run/gpus.py", "m.cuda < CUDA and int", "m.cuda > CUDA and int", GPUS),
    "gpus: a compatibility package is ignored": ("run/gpus.py", "m.gpus and m.cuda < CUDA and", "m.gpus and", GPUS),
    "gpus: an old GPU passes": ("run/gpus.py", "gpu.capability < least", "gpu.capability < (7, 0)", GPUS),
    "gpus: MIG passes": ("run/gpus.py", "lambda gpu: gpu.mig)", "lambda gpu: False)", GPUS),
    "gpus: two kinds pass": ("run/gpus.py", "gpu.name != most)", "gpu.name != gpu.name)", GPUS),
    "gpus: hidden GPUs count": ("run/gpus.py", "if visible is not None:", "if False:", GPUS),
    "gpus: too small passes": ("plan/memory.py", "if sum(states.values()) > estimated.gpu_gib:", "if False:", GPUS),
    "plan: an engine on two nodes": ("plan/plan.py", "return sum((c.gpus_per_node - k) // tp for k in by_node(c, learners))", "return (c.nodes * c.gpus_per_node - sum(by_node(c, learners))) // tp", ("test_plan.py",)),
    "plan: a copy of the weights on uneven nodes": ("plan/plan.py", "if common % size:", "if learners % size:", ("test_plan.py",)),
    "memory: the reference is not copied": ("plan/memory.py", "everything + adapters + reference,", "everything + adapters,", ("test_memory.py",)),
    "memory: pinned memory is not rounded up": ("plan/memory.py", "2.0 ** math.ceil(math.log2(size))", "size", ("test_memory.py",)),
    "memory: the vision tower in fp8": ("plan/memory.py", 'sizes.text["num_hidden_layers"] * weights(sizes.linear[0]) if r.q', 'sizes.parameters if r.q', ("test_memory.py",)),
    "importance: fp8 engines are not corrected for": ("algo/schedule.py", 'config.rollout.quantization == "fp8" or ', "", ("test_schedule.py",)),
    "device: norms are sharded": ("learner/zero3.py", 'if shard_all or device.type == "cpu" else {}', "if True else {}", DEVICE),
    "device: a sum on the CPU": ("learner/zero3.py", "dtype=torch.float64, device=self.device)", "dtype=torch.float64)", DEVICE),
    "device: all pixels of a step": ("learner/actor.py", "yield batch.result()", "yield batch.result().to(self.device)", DEVICE),
    "plan: gradients of a layer": ("plan/memory.py", "GRADIENTS = 0.26", "GRADIENTS = 0.6", ("../device/test_memory.py",)),
    "plan: gradients beside an engine": ("plan/memory.py", "sum(moments(config, plan, sizes)[0].values())", "moments(config, plan, sizes)[0]['weights']", ("test_memory.py",)),
    "simulate: gathers hide nothing": ("plan/simulate/step.py", "hidden = overlap *", "hidden = 0 *", ESTIMATED),
    "simulate: a shard of any size": ("plan/simulate/step.py", "per_shard / setup.learners", "per_shard", ESTIMATED),
    "simulate: no push between nodes": ("plan/simulate/step.py", "per_gb = across_nodes", "pass", ESTIMATED),
    "simulate: one way of pushing": ("plan/simulate/step.py", "(setup.colocated and costs.push_colocated) or costs.push", "costs.push", ESTIMATED),
    "simulate: an engine of one sequence": ("plan/simulate/forecast.py", ">= min(call, r.max_num_seqs)", ">= 1", ESTIMATED),
    "simulate: a tower is read": ("plan/simulate/estimate.py", "read = wide * (layers * weights(sizes.linear[0]) + sizes.head)", "read = model", ESTIMATED),
    "simulate: shards in a node save nothing": ("plan/simulate/estimate.py", "zero_hpz_partition_size > 1 else 0", "zero_hpz_partition_size > 99 else 0", ESTIMATED),
    "recipes: room is not asked": ("plan/memory.py", "outside[\"learner meanwhile\"] = ", "unused = ", ("test_recipes.py",)),
    "device: cached memory is kept": ("learner/zero3.py", "torch.accelerator.empty_cache()", "pass", DEVICE),
    "device: kernels are compiled into the home": ("run/process.py", "os.environ.setdefault(name, str(directory / part))", "pass", ("test_process.py",)),
    "device: another model runner": ("rollout/options.py", '"VLLM_USE_V2_MODEL_RUNNER": "0",', "", ("test_process.py",)),
    "device: a sampler that nvcc compiles": ("rollout/options.py", '"VLLM_USE_FLASHINFER_SAMPLER": "0",', "", ("test_process.py",)),
    "device: workers are forked": ("rollout/options.py", '"VLLM_WORKER_MULTIPROC_METHOD": "spawn",', "", ("test_process.py",)),
    "store: buckets sent before they are copied": ("sync/object_store.py", "torch.cuda.current_stream().synchronize()", "torch.cuda.current_stream()", ("test_sync_source.py",)),
    "store: pieces viewed wherever they lie": ("sync/object_store.py", "np.array_equal(np.diff(at), [p.nbytes for p in pieces[:-1]])", "True", ("test_sync_source.py",)),
    "store: the first bucket as large as the last": ("sync/object_store.py", "chain((part // 4, part // 2), repeat(part))", "repeat(part)", ("test_sync_source.py",)),
    "device: the learner's stream is left": ("sync/nccl.py", ", stream=torch.cuda.current_stream())", ")", ("test_nccl_sender.py",)),
    "gpu-check: what ignores SIGTERM stays": ("gpu_check/runner.py", "for number in (signal.SIGTERM, signal.SIGKILL):", "for number in (signal.SIGTERM,):", GPU_CHECK),
    "gpu-check: a part outlives the budget": ("gpu_check/runner.py", "min(limit, left)", "limit", GPU_CHECK),
    "gpu-check: NaN is near": ("gpu_check/learner_parts.py", "if not far < limit:", "if far >= limit:", GPU_CHECK),
    "gpu-check: a failure does not revoke": ("run/proofs.py", 'row.get("status") != "passed"', "not row", PROOFS),
    "gpu-check: any version counts": ("run/proofs.py", 'for key in ("card", "count", "versions")', 'for key in ("card", "count")', PROOFS),
    "report: evaluations beside a run are ignored": ("report/reading.py", "found |= {t.kind: file.parent for t in trainings if _is_of(Path(path), t.path)}", "pass", ("test_report.py",)),
    "report: evaluations of any run": ("report/reading.py", "return moved or model.resolve()", "return bool(model) or model.resolve()", ("test_report.py",)),
    "report: most answers lost, and yellow": ("report/verdict.py", '"bad" if share >= bad else "watch"', '"watch"', ("test_report.py",)),
    "report: any two evaluations are before and after": ("report/verdict.py", "run.evaluations[0].model == BASE", "True", ("test_report.py",)),
    "card: all data are the demo's": ("scoring/card.py", " if name.startswith(DEMO_SETS)", "", ("test_export.py",)),
    "quarantine: repaired samples stay": ("run/directory.py", "(key[1] not in self._manifests or key not in self._met)", "False", ("test_run_directory.py",)),
    "score: lost samples are not counted": ("scoring/scorer.py", "return self.samples.count(None)", "return 0", ("test_score_output.py",)),
    "score: texts are cut": ("scoring/output.py", "len(named) > FEW and ", "", ("test_score_output.py",)),
    "plan: more warm-up than steps": ("plan/plan.py", "plan.warmup_steps >= plan.steps", "False", ("test_plan.py",)),
    "score: words are no config keys": ("commands/evaluation.py", "[*(settings or []), *words]", "[*(settings or [])]", ("test_cli.py",)),
    "serve: --set is ignored": ("commands/runs.py", "*(settings or []), ", "", ("test_cli.py",)),
    "metrics: every score is distinct": ("evaluate/metrics.py", "n_distinct=len(times)", "n_distinct=len(raw)", ("test_evaluation_tables.py",)),
}  # fmt: skip


def survives(name: str) -> str | None:
    """What is wrong with a mutation: not applicable, or no test failed; None when a test noticed it."""
    file, text, becomes, tests = MUTATIONS[name]
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for part in ("tatar_dist", "tests", "configs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "integration"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / "tatar_dist" / file).read_text()
        if text not in source:
            return f"{file} does not contain {text!r}"
        (copy / "tatar_dist" / file).write_text(source.replace(text, becomes))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/unit/{t}" for t in tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "SURVEY": "all"},
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return "no test noticed"
    if done.returncode in (-signal.SIGFPE, -signal.SIGSEGV, -signal.SIGABRT):  # a native kernel, given nonsense
        print(f"noticed   {name}: {signal.Signals(-done.returncode).name} while tests ran", flush=True)
        return None
    if done.returncode != 1:  # 1: tests ran and failed
        return f"pytest ended with {done.returncode}: {done.stdout[-300:]}"
    failed = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), None)
    if failed is None:  # an error before any test ran would notice every mutation, or none
        return f"no test failed, yet pytest ended with 1: {done.stdout[-300:]}"
    print(f"noticed   {name}: {failed.removeprefix('FAILED tests/unit/').split(' - ')[0]}", flush=True)
    return None


def main(names: list[str]) -> int:
    """Run the named mutations, or all; 0 if every one was noticed."""
    names = names or list(MUTATIONS)
    with ThreadPoolExecutor(2) as threads:
        found = dict(zip(names, threads.map(survives, names), strict=True))
    wrong = {name: why for name, why in found.items() if why}
    for name, why in wrong.items():
        print(f"SURVIVED  {name}: {why}")
    print(f"{len(found) - len(wrong)} of {len(found)} mutations noticed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
