"""Every key of the configuration, with its type and default.

load.py merges YAML files and `key=value` words into a `Config`, rules.py checks it. One schema serves sft, grpo and
evaluate, so that one override file (configs/demo.yaml) covers a whole pipeline.
"""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt
from omegaconf import OmegaConf
from pydantic.dataclasses import dataclass

from tatar_dist.config.rationale import RationaleConfig
from tatar_dist.config.validate import STRICT_KEYS, AboveZero, AtLeastOne, AtLeastZero, Float, Int, NotNegative, Why

RankPool = Annotated[Int, Ge(2), Why("a single image cannot be ranked")]
GroupSize = Annotated[Int, Ge(2), Why("an advantage compares completions of one prompt")]
RatioCap = Annotated[Float, Ge(1), Why("it caps a ratio that is 1 where engine and learner agree")]
Temperature = Annotated[AboveZero, Why("greedy completions of one prompt are all alike: no group has an advantage")]
Probability = Annotated[Float, Ge(0), Le(1)]
Beta = Annotated[Float, Ge(0), Lt(1)]
Schedule = Literal["linear", "cosine", "constant"]
Importance = Literal["auto", "none", "token", "sequence"]
Aggregation = Literal["sequence-mean", "token-mean", "constant"]


@dataclass(frozen=True, config=STRICT_KEYS)
class ModelConfig:
    path: str = "???"  # Hugging Face model directory (or hub name where the hub is reachable)
    family: str = "qwen2_5_vl"  # a module of tatar_dist.models
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # for learners and engines alike
    min_pixels: Int = 3136  # smaller images are scaled up; learners and engines use the same sizes
    max_pixels: Int = 1572864  # larger images are scaled down
    float32_head: bool = True  # logits in float32 also where dtype is bfloat16, which rounds by 0.014 to 0.02 nats
    train_vision: bool = True  # false freezes the vision tower
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: less memory, more time
    lora_rank: AtLeastZero = 0  # above 0 low-rank adapters are trained instead of the weights (learner/lora.py)
    lora_alpha: AboveZero = 32.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
    lora_targets: list[str] = field(default_factory=list)  # last parts of layers' names, as q_proj; empty = all linear


@dataclass(frozen=True, config=STRICT_KEYS)
class DataConfig:
    root: str = "."  # where relative paths of manifests start
    image_root: str | None = None  # where image paths of manifests start; null = what each manifest says
    train: list[str] = field(default_factory=list)  # Parquet manifests; training reads their rows of the split train
    validation: list[str] = field(default_factory=list)  # likewise, validation: held-out loss and eval/*
    test: list[str] = field(default_factory=list)  # likewise, test: what `evaluate` reads
    prompts: str = "configs/prompts.yaml"  # wording of the prompts, the same for every stage
    iqa_fraction: Annotated[Float, Ge(0), Le(1)] = 0.5  # share of IQA samples in a batch
    min_rank_pool: RankPool = 2  # images of one data set that a GRPO batch must hold of a task whose reward ranks
    max_prompt_tokens: Int = 3072  # longer prompts are rejected, never truncated
    eval_limit: AtLeastOne | None = None  # samples per data set in an evaluation, also of a running GRPO; null = all


@dataclass(frozen=True, config=STRICT_KEYS)
class ClusterConfig:
    address: str | None = None  # Ray address to join; null starts Ray on this machine
    nodes: AtLeastOne = 1  # nodes to plan for; the launchers in slurm/ set it
    gpus_per_node: AtLeastZero = 8  # GPUs of each node, asked of Slurm; 0 = CPU only
    learners: AtLeastZero = 8  # ZeRO-3 ranks, one GPU each; 0 = as many as fit (plan/plan.py)
    learner_cpus: AboveZero = 1.0  # logical CPUs Ray reserves for a learner
    engine_cpus: AboveZero = 1.0  # logical CPUs Ray reserves for an engine
    threads: Int | None = None  # CPU threads to share out; null = this machine's cores
    pin_cores: bool = False  # CPU, one machine: engines on the first half of the cores, learners on the other
    object_store_mib: AtLeastOne = 1024  # used only when Ray is started here
    start_timeout_s: AboveZero = 600.0  # for actors to be placed, load the model and join
    placement: Literal["disaggregated", "colocated"] = "disaggregated"  # colocated: engines sleep on learners' GPUs
    learner_placement: Literal["pack", "spread"] = "pack"  # pack: fill node after node; spread: one node each
    zero_hpz_partition_size: AtLeastOne = 1  # k: k ranks of a node share a bfloat16 copy of all weights; 1 = none
    offload_optimizer: bool = False  # gradients, master weights and moments in the node's memory, not on the GPU
    network_interface: str | None = None  # of gloo and NCCL, for example ib0 or eth0; null = what they choose
    collective_timeout_s: AboveZero = 1800.0  # a collective of the learners that takes longer fails
    learner_restarts: AtLeastZero = 3  # restarts of the learners in a row without a finished step between them
    elastic: bool = True  # after a lost node learners may restart in a smaller number
    node_wait_s: NotNegative = 120.0  # how long to wait for a lost node before that


@dataclass(frozen=True, config=STRICT_KEYS)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"  # the optimiser
    lr: NotNegative = 1e-6  # learning rate after warm-up
    lr_scale: dict[str, NotNegative] = field(default_factory=dict)  # part of a parameter's name -> factor on its lr
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # of AdamW
    eps: AboveZero = 1e-8  # of AdamW
    weight_decay: NotNegative = 0.0  # decoupled with adamw, L2 with sgd; of matrices, not of norms and biases
    schedule: Schedule = "linear"  # of the learning rate after warm-up
    warmup_steps: AtLeastZero = 0  # steps from 0 to lr, linear
    clip_norm: NotNegative = 1.0  # largest gradient norm; 0 = no clipping
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a step whose gradient is infinite or NaN: never applied
    max_skipped: AtLeastOne = 3  # steps skipped in a row by on_nonfinite=skip; one more stops the run


@dataclass(frozen=True, config=STRICT_KEYS)
class ThoughtDropout:
    iqa: Probability = 0.0  # how often an answer is taught without its think block; above 0 a row may have none
    iaa: Probability = 0.0  # likewise


@dataclass(frozen=True, config=STRICT_KEYS)
class SFTConfig:
    global_batch: AtLeastOne = 128  # rows per optimiser step; fixed, whatever the number of ranks
    micro_tokens: AtLeastOne = 16384  # tokens in one forward, prompts and answers packed; a longer row goes alone
    epochs: AboveZero = 2.0  # passes over the training rows; max_steps overrides it
    max_steps: AtLeastOne | None = None  # optimiser steps; null = what epochs come to
    max_tokens: Int = 4096  # prompt + answer; longer rows are rejected
    eval_every: AtLeastZero = 100  # held-out loss, in steps; 0 = only at the end
    thought_dropout: ThoughtDropout = field(default_factory=ThoughtDropout)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))


@dataclass(frozen=True, config=STRICT_KEYS)
class GRPOConfig:
    prompts_per_step: AtLeastOne = 16  # prompts, one image each, per optimiser step
    group_size: GroupSize = 8  # G, completions per prompt
    micro_tokens: AtLeastOne = 16384  # tokens in one forward, each prompt counted once; a longer group goes alone
    epochs: AboveZero = 3.0  # passes over the training prompts; max_steps overrides it
    max_steps: AtLeastOne | None = None  # optimiser steps; null = what epochs come to
    kl_beta: NotNegative = 0.001  # weight of the k3 KL to the start model; 0 loads no reference model
    kl_schedule: Schedule = "constant"  # the way from kl_beta to kl_beta_end over the run
    kl_beta_end: NotNegative = 0.0  # weight at the last step, with kl_schedule linear or cosine
    aggregation: Aggregation = "sequence-mean"  # token-mean as in DAPO, constant (max_new_tokens) as in Dr. GRPO
    ratio: Literal["token", "sequence"] = "token"  # sequence as in GSPO, whose clips are near 3e-4
    objective: Literal["clip", "cispo", "sapo"] = "clip"  # what is made of the ratio; clip as in GRPO and PPO
    clip_low: NotNegative = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: NotNegative = 0.2  # the ratio is clipped above 1 + clip_high
    clip_delta: AboveZero | None = None  # the ratio is also bounded by it where the advantage is negative; null = not
    tau_positive: AboveZero = 1.0  # with objective sapo: how fast the weight of a token falls, where it is to gain
    tau_negative: AboveZero = 1.05  # likewise, where it is to lose
    importance: Importance = "auto"  # correction of engine-learner mismatch; auto: algo/README.md
    importance_mode: Literal["truncate", "mask"] = "truncate"  # at importance_cap, or mask outside [1/cap, cap]
    importance_cap: RatioCap = 2.0  # >= 1: cap on exp(learner - engine log-probability); unused without importance
    importance_floor: Probability | None = None  # lower bound of importance_mode=mask; null = 1/importance_cap
    mask_truncated: bool = False  # true: a completion cut off by max_new_tokens stays out of the loss
    advantage: Literal["std", "mean", "per_term"] = "per_term"  # scaling of rewards in a group; mean as in Dr. GRPO
    advantage_eps: NotNegative = 1e-4  # added to the std
    scale: Literal["auto", "group", "batch"] = "auto"  # whose std divides; auto: batch with per_term (GDPO), else group
    zero_std: Literal["keep", "drop", "refill"] = "keep"  # groups whose completions all got the same reward
    refill_limit: AtLeastOne = 2  # rounds of new prompts a step for such groups, with refill; what is left is dropped
    inner_iterations: AtLeastOne = 1  # updates per batch of completions, one optimiser step each
    staleness: AtLeastZero = 0  # k: completions are sampled from the weights of k steps before, while the learners work
    eval_every: AtLeastZero = 0  # steps between greedy answers on data.validation (eval/*); 0 = never
    logprob_gap_limit: NotNegative = 0.05  # nats, mean |engine - learner| over a step's tokens; above it the run stops
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def scaling(self) -> Literal["group", "batch"]:
        """Return `scale`, with auto resolved."""
        if self.scale != "auto":
            return self.scale
        return "batch" if self.advantage == "per_term" else "group"


@dataclass(frozen=True, config=STRICT_KEYS)
class RolloutConfig:
    engines: AtLeastZero = 1  # vLLM engines; 0 = as many as fit (plan/plan.py)
    tensor_parallel: AtLeastOne = 1  # GPUs per engine
    temperature: Temperature = 1.0  # of sampling; the loss uses it too
    top_p: Float = 1.0  # 1.0 only: the loss takes the full softmax
    top_k: Int = -1  # -1 or 0 only, for the same reason
    max_new_tokens: AtLeastOne = 384  # longest completion
    max_model_len: Int = 4096  # longest prompt and completion together
    max_num_seqs: AtLeastOne = 64  # completions an engine decodes at once
    gpu_memory_utilization: Float = 0.85  # share of a GPU's memory for an engine
    cpu_kv_cache_gib: Int = 1  # KV cache of an engine on a CPU
    bucket_mib: AtLeastOne = 256  # weight push: bytes in flight at once
    call_timeout_s: AboveZero = 1800.0  # an engine, learner or reward actor that takes longer is restarted
    suspect_after_s: AboveZero = 600.0  # an engine that takes longer is suspect: it gets no more work until it answers
    hedge: bool = False  # a suspect engine's prompts are given to an idle one too; the first answer counts
    min_engines: AtLeastOne = 1  # with fewer living or restarting engines the run stops
    engine_restarts: AtLeastZero = 5  # restarts of one engine in a row without an answer between them
    restart_backoff_s: AboveZero = 1.0  # wait before the first restart; doubles with each, up to a minute
    quantization: Literal["none", "fp8"] = "none"  # of the engines' weights; fp8: learner and checkpoint keep bfloat16
    deterministic: bool = False  # one group per engine call, caches reset before it
    push: Literal["auto", "object_store", "nccl", "cuda_ipc"] = "auto"  # weight push; auto: sync/README.md
    push_timeout_s: AboveZero = 600.0  # an engine that takes longer for one bucket is dead
    push_check_s: NotNegative = 300.0  # limit of the check of nccl and cuda_ipc before training; 0 = no check


@dataclass(frozen=True, config=STRICT_KEYS)
class RewardConfig:
    preset: str = "tatar"  # a name in tatar_dist/rewards/presets, or a YAML file of that form
    weights: dict[str, float] = field(default_factory=dict)  # overrides of the preset's term weights
    params: dict[str, bool | float | str | None] = field(default_factory=dict)  # overrides of the preset's constants


@dataclass(frozen=True, config=STRICT_KEYS)
class EvaluateConfig:
    samples: AtLeastZero = 0  # sampled completions per image: mean, spread, reward terms; 0 = greedy answers only
    seed: Int = 0  # of the sampled completions
    expected: bool = False  # beside each greedy answer the expectation over the scores it might have been
    direct: bool = False  # beside each greedy answer one that begins with <answer>: no thought, few tokens
    unparsed: Literal["drop", "midpoint"] = "drop"  # an answer without a score is left out, or counts as 50
    bootstrap: AtLeastZero = 0  # rounds for 95 % intervals of SRCC and PLCC; 0 = none
    in_domain: list[str] | None = None  # data sets that were trained on; null = as configs/datasets.yaml has it
    slices: list[str] = field(default_factory=lambda: ["distortion", "distortions", "style", "styles"])  # keys of meta
    published: bool = False  # print figures of configs/published.yaml beside ours


@dataclass(frozen=True, config=STRICT_KEYS)
class CheckpointConfig:
    every: AtLeastZero = 50  # steps; 0 = only at the end
    keep: AtLeastOne = 2  # how many of the newest stay
    keep_every: AtLeastZero = 0  # checkpoints whose step is a multiple of this stay too; 0 = none
    keep_best: str | None = None  # the best by this metric stays too, for example eval/koniq/srcc
    best_mode: Literal["max", "min"] = "max"  # whether the largest or smallest value of keep_best is best
    asynchronous: bool = True  # files are written while training goes on
    verify: bool = True  # read everything and compare checksums before resuming
    storage: Literal["shared", "local"] = "shared"  # local: only the controller sees output, parts come through Ray
    resume: bool = True  # continue from OUTPUT/checkpoints/latest when it exists
    accept: list[str] = field(default_factory=list)  # keys, or sections, that may differ from the run's so far
    grace_seconds: AboveZero = 120.0  # from SIGTERM or SIGUSR1 to the end of the process


@dataclass(frozen=True, config=STRICT_KEYS)
class WatchConfig:
    stall_factor: NotNegative = 10.0  # no progress for this many median steps is a stall; 0 = no watching
    stall_min_s: NotNegative = 300.0  # a stall is at least this long
    stall_action: Literal["report", "restart", "stop"] = "report"  # stack dumps alone, or restart what hangs, or stop
    prometheus: bool = True  # metrics through Ray's exporter, where the cluster has one


@dataclass(frozen=True, config=STRICT_KEYS)
class TrackConfig:
    tensorboard: bool = True  # curves in OUTPUT/tensorboard
    wandb: bool = False  # Weights & Biases; needs pip install 'tatar_dist[wandb]'
    mlflow: bool = False  # needs pip install 'tatar_dist[mlflow]'
    project: str = "tatar_dist"  # project of W&B, experiment of MLflow
    name: str | None = None  # name of the run there; null = the last part of output
    mode: Literal["offline", "online"] = "offline"  # into OUTPUT, for later; or to the server in their environment


@dataclass(frozen=True, config=STRICT_KEYS)
class Config:
    output: str = "???"  # run directory; a run found in it is continued
    seed: Int = 0  # of the sampler, of every completion and of the trainers
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    failpoints: list[str] = field(default_factory=list)  # faults on purpose, see run/failpoints.py
    rationale: RationaleConfig = field(default_factory=RationaleConfig)


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, as written to a run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
