# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.24", "peft>=0.18", "pillow>=10.1", "numpy"]
# ///
"""iReasoner: a vision-language model improves itself on unlabeled images.

A reference implementation of "iReasoner: Trajectory-Aware Intrinsic Reasoning Supervision for Self-Evolving Large
Multimodal Models", in one file. One training step:

    images    <- a few unlabeled pictures per rank
    questions <- the Proposer (LoRA adapter 1) asks one question about each picture
    rollouts  <- the Solver (LoRA adapter 2) answers each question N = 5 times, in numbered steps
    rewards   <- agreement of the answers (Eq 1, 5) and, inside the majority, of the steps (Eq 2-4), mixed by Eq 6
    update    <- KL-regularized REINFORCE against the adapter-free backbone (Eq 7), with one beta per role (Eq 8)

    python ireasoner.py demo                                   # laptop: watch a tiny Qwen2.5-VL improve, no download
    python ireasoner.py --data images                          # one GPU: train Qwen2.5-VL-7B on a folder of images
    torchrun --nproc_per_node=8 ireasoner.py --data images     # one node of eight GPUs

Order: Config; the paper, Eq 1 to Eq 8 and the rewards, yours to change; parsing; Policy; Learner; ranks, images, run
folder; `train`; tools. In brackets the source of a choice: a section of the paper, [code] for the authors' released
code, [ours]. Where that code differs from the paper, this file follows the paper.

Axes in shape comments: B prompts (one image each), N rollouts per question, P prompt tokens, R completion tokens,
V vocabulary, d model width, J steps of a trace, G the majority group.
"""
import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

class UserError(Exception):
    """Ends the program with one line: the culprit and the remedy. Exit status 2, or 1 where training had to stop."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status

@contextlib.contextmanager
def blame(culprit: str):
    """Errors inside the block become a UserError: the culprit, then the library's words. IREASONER_DEBUG=1: as is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)) or os.environ.get("IREASONER_DEBUG"):
            raise
        raise UserError(f"{culprit} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


# ---- Config: one line per setting makes the field, its flag, its --help text, its check and its entry in config.json -

def setting(default, allowed, meaning: str, resumable: bool = False):
    """A field of Config. `allowed`: inclusive (low, high), words, or None. `resumable`: --resume may change it."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning, "resumable": resumable})

@dataclass(kw_only=True)
class Config:
    """All settings, all optional: what is not given comes from the preset, then from here; in brackets its source."""
    # data and run folder
    model: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", None, "backbone: a folder or a Hugging Face id [4.1]")
    data: tuple = setting(("images",), None, "folders of unlabeled images, recursive [4.1]")
    output_dir: str = setting("runs", None, "folder that holds the run folders [ours]", resumable=True)
    run_name: str = setting("", None, "name of the run folder; empty: PRESET_seedSEED [ours]", resumable=True)
    preset: str = setting("ireasoner", None, "row of the paper's Tables 1 to 3; explicit flags win over it [4.1]")
    resume: bool = setting(False, None, "go on from the newest checkpoint of the run folder [ours]", resumable=True)
    # loop
    total_steps: int = setting(2500, (1, 999999), "training steps; lambda(t) is a share of them [4.1]", resumable=True)
    num_rollouts: int = setting(5, (1, 1024), "N, Solver rollouts per question [4.1]")
    images_per_rank: int = setting(1, (1, 4096), "images (= questions) per step on each rank [4.1]", resumable=True)
    proposer_every: int = setting(5, (1, 10**7), "steps between Proposer updates [4.1]")
    temperature: float = setting(1.0, (1e-3, 100), "sampling temperature, also used for scoring [code]")
    max_new_tokens_proposer: int = setting(128, (1, 65536), "longest question, tokens [code]")
    max_new_tokens_solver: int = setting(256, (1, 65536), "longest solution, tokens [code]")
    max_pixels: int = setting(802816, (784, 10**8), "larger images are shrunk; 784 pixels are a visual token [ours]")
    # rewards, Eq 1 to 6
    answer_reward: str = setting("soft", ["soft", "discrete"], "soft: Eq 5; discrete: 1 for the majority [Tab 1]")
    alpha: float = setting(0.7, (1e-6, 100), "sharpness of the answer reward, Eq 5 [code]")
    eta: float = setting(0.05, (0, 1), "strength of the length penalty, Eq 5 [code]")
    target_words: int = setting(64, (1, 10**6), "words before the answer that cost nothing, Eq 5 [code]")
    gamma: float = setting(0.7, (0, 100), "exponent of the group density rho, Eq 2 [code]")
    position_decay: float = setting(0.15, (0, 100), "kappa, decay of the step weights w_j, Eq 4 [code]")
    min_group_size: int = setting(2, (1, 1024), "traces needed to compare a step position, Eq 3 [code]")
    max_reasoning_steps: int = setting(8, (1, 1000), "J, steps kept of a trace [Tab 3]")
    embed_max_tokens: int = setting(64, (1, 65536), "tokens of a step that are embedded, f(s) in 3.2 [code]")
    lambda_max: float = setting(0.7, (0, 1), "final weight of the step reward, Eq 6 [4.1]")
    lambda_schedule: str = setting("ramp", ["ramp", "constant"], "ramp: 0, then linear; constant: lambda_max [4.1]")
    warmup_frac: float = setting(0.3, (0, 1), "share of all steps with lambda = 0, Eq 6 [code]")
    entropy_mu: float = setting(0.90, (-100, 100), "answer entropy that pays the Proposer most, nats [code]")
    entropy_sigma: float = setting(0.35, (1e-6, 100), "width of the Proposer's reward, nats [code]")
    # update, Eq 7 and 8
    lr: float = setting(1e-6, (1e-15, 1), "AdamW learning rate [4.1]")
    weight_decay: float = setting(0.01, (0, 1), "AdamW weight decay [4.1]")
    grad_clip: float = setting(1.0, (1e-9, 1e9), "largest gradient norm of a role [4.1]")
    logprob_reduction: str = setting("mean", ["mean", "sum"], "log pi of a rollout from its tokens, Eq 7 [ours]")
    advantage: str = setting("ema", ["ema", "group"], "Solver: r - EMA baseline, or normalized in the group [4.1]")
    baseline_momentum: float = setting(0.9, (0, 1), "momentum of the EMA baseline b, Eq 7 [code]")
    kl_coef: float = setting(1e-3, (0, 1e6), "beta at the first step, Eq 8 [code]")
    kl_coef_min: float = setting(1e-3, (0, 1e6), "lower bound of beta, Eq 8 [ours]")
    kl_coef_max: float = setting(1.0, (0, 1e6), "upper bound of beta, Eq 8 [ours]")
    kl_target: float = setting(0.02, (1e-9, 1e6), "tau, the KL that leaves beta alone, nats per token, Eq 8 [code]")
    kl_adapt_rate: float = setting(0.10, (0, 100), "eta of Eq 8: how fast beta follows the KL [code]")
    lora_r: int = setting(16, (1, 1024), "LoRA rank of each adapter [code]")
    lora_alpha: int = setting(32, (1, 10**6), "LoRA scale is lora_alpha / lora_r [code]")
    lora_dropout: float = setting(0.0, (0, 0.99), "above 0 the trained policy is not the one that sampled [ours]")
    # machine and bookkeeping
    device: str = setting("auto", None, "auto, cpu, cuda or cuda:N (ROCm GPUs are cuda too) [ours]", resumable=True)
    dtype: str = setting("auto", ["auto", "float32", "bfloat16"], "backbone; auto: bfloat16 on GPU, else float32 [4.1]")
    score_rollouts: int = setting(5, (1, 1024), "rollouts in a gradient pass, for memory [ours]", resumable=True)
    seed: int = setting(0, (0, 2**31), "of adapters, data order and sampling [ours]")
    save_every: int = setting(50, (1, 10**7), "steps between checkpoints [ours]", resumable=True)
    keep_checkpoints: int = setting(3, (1, 10**6), "newest checkpoints kept [ours]", resumable=True)
    show_every: int = setting(25, (0, 10**7), "steps between printed rollout groups, 0 for none [ours]", resumable=True)
    watch_every: int = setting(25, (0, 10**7), "steps between looks for collapse, 0 for none [ours]", resumable=True)
    wandb: str = setting("", None, "log to this Weights & Biases project; empty: do not [ours]", resumable=True)

    def __new__(cls, **given):
        config = super().__new__(cls)
        config.given = given  # what was set explicitly wins over the preset
        return config

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset}: no such preset{nearest(str(self.preset), PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            setattr(self, name, self.given.get(name, value))
        self.data = tuple(map(str, self.data if isinstance(self.data, (list, tuple)) else [self.data]))
        for f in dataclasses.fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            value = float(value) if f.type is float and type(value) is int else value
            setattr(self, f.name, value)
            if type(value) is not f.type or isinstance(allowed, list) and value not in allowed or (
                    isinstance(allowed, tuple) and not allowed[0] <= value <= allowed[1]):
                raise UserError(f"--{f.name} {value!r}: must be {describe(f)}. {f.metadata['meaning']}")
        if not self.kl_coef_min <= self.kl_coef <= self.kl_coef_max:
            raise UserError(f"--kl_coef {self.kl_coef:g}: must lie between --kl_coef_min and --kl_coef_max, "
                            f"{self.kl_coef_min:g} and {self.kl_coef_max:g}")

def describe(f: dataclasses.Field) -> str:
    """What a setting may be, in words."""
    allowed = f.metadata["allowed"]
    return (f"one of {', '.join(allowed)}" if isinstance(allowed, list) else
            f.type.__name__ + (f" from {allowed[0]:g} to {allowed[1]:g}" if allowed else ""))

PRESETS = {  # the rows of the paper's tables: what each changes
    "ireasoner": {},                                                   # Table 2, Ours, Full
    "evolmm": {"lambda_max": 0.0},                                     # Table 2, soft majority reward only
    "discrete": {"answer_reward": "discrete", "lambda_max": 0.0},      # Table 1
    "discrete_step": {"answer_reward": "discrete"},                    # Table 1
    "step_only": {"lambda_max": 1.0, "lambda_schedule": "constant"},   # Table 2, from here on
    "no_warmup": {"lambda_schedule": "constant"},
    "no_position_decay": {"position_decay": 0.0},
    "no_density": {"gamma": 0.0},
    "no_length_penalty": {"eta": 0.0},
    "alpha_0.5": {"alpha": 0.5},
    "alpha_1.0": {"alpha": 1.0},
    "steps_4": {"max_reasoning_steps": 4},                             # Table 3, from here on
    "steps_6": {"max_reasoning_steps": 6},
    "steps_10": {"max_reasoning_steps": 10},
}

def nearest(word: str, known) -> str:
    """The end of an error message: the nearest known word, if one is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}? See --help" if near else ". See --help"

def derive_seed(*keys) -> int:
    """Mixes integers and strings into one 63-bit seed, the same on every machine; near keys give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "big") >> 1


# ---- The paper, section 3.1: prompts, the answer distribution (Eq 1), the Proposer's reward --------------------------

def proposer_prompt() -> str:
    """What the Proposer is asked about every image; `parse_question` reads the reply."""
    return ("Look at the image and write one question about it.\n"
            "It must be answerable from the image alone, need several steps of reasoning, and have one short answer.\n"
            "Reply with the question only, in this form:\n"
            "<question>your question</question>")

def solver_prompt(question: str) -> str:
    """What the Solver is asked; `parse_rollout` reads the reply. The numbered steps are the paper's step interface."""
    return (f"{question}\n"
            "Look at the image and reason in short numbered steps, one claim in each: first what you see, then what "
            "follows.\nReply in this form:\n"
            "<think>\nStep 1: ...\nStep 2: ...\n</think>\n<answer>short answer</answer>")

def answer_distribution(answers: list[str | None]) -> dict[str, float]:
    """Eq 1, p(a|x,q) = count(a) / N over the normalized answers of one question's N rollouts, in order of first
    appearance. None marks an invalid rollout: it counts in N and votes for nothing [ours].

    >>> answer_distribution(["7", "7", "8", None, "7"])
    {'7': 0.6, '8': 0.2}
    """
    return {answer: count / len(answers) for answer, count in Counter(a for a in answers if a is not None).items()}

def answer_entropy(answers: list[str | None]) -> float:
    """H(x, q) = -sum p log p in nats (section 3.1). Each invalid rollout (None) is an outcome of its own with mass
    1/N, so that garbage never looks like agreement [ours]."""
    outcomes = Counter(i if a is None else a for i, a in enumerate(answers))
    return math.fsum(k / len(answers) * math.log(len(answers) / k) for k in outcomes.values())

def entropy_reward(entropy: float, mu: float = 0.90, sigma: float = 0.35) -> float:
    """g(H), the Proposer's reward (section 3.1; form and values from the released code): a bell around H = mu nats,
    since a question on which all rollouts agree, or none do, teaches nothing."""
    return math.exp(-((entropy - mu) ** 2) / (2 * sigma ** 2))


# ---- The paper, section 3.2: agreement of the steps inside the majority group (Eq 2-4, Figure 7) ---------------------

def dominant_group(answers: list[str | None]) -> tuple[str | None, list[int]]:
    """Eq 2, the majority answer and the rollouts G that gave it. Ties go to the answer seen first; without any valid
    answer the result is (None, []).

    >>> dominant_group(["8", "7", None, "7", "8"])
    ('8', [0, 4])
    """
    votes = Counter(a for a in answers if a is not None)
    majority = max(votes, key=votes.get, default=None)  # the first of equals: Counter keeps the order of appearance
    return majority, [i for i, a in enumerate(answers) if a is not None and a == majority]

def group_density(group_size: int, num_rollouts: int, gamma: float = 0.7) -> float:
    """Eq 2, rho = (|G| / N)^gamma: how far the majority can be trusted. gamma from the released code."""
    return (group_size / num_rollouts) ** gamma

def step_prototypes(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> dict[int, torch.Tensor]:
    """Eq 3, mu_j: the mean step embedding at each position over G_j, the members of the group that have such a step.
    embeddings[i] is (J_i, d), one row per step; the keys are 0-based positions, the values (d,). A position with
    |G_j| < `min_group` is left out [code]: the similarity of one trace with itself is no agreement."""
    prototypes = {}
    for j in range(max((len(embeddings[i]) for i in group), default=0)):
        members = [embeddings[i][j] for i in group if j < len(embeddings[i])]                           # e_ij, i in G_j
        if len(members) >= min_group:
            prototypes[j] = torch.stack(members).mean(dim=0)
    return prototypes

def step_similarity(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2,
                    leave_one_out: bool = False) -> torch.Tensor:
    """r_ij = cos(e_ij, mu_j) in [-1, 1] (section 3.2): (|G|, J) with J the longest trace of the group, NaN where
    rollout i has no step j or the position cannot be compared. Zero vectors and non-finite values count as 0. With
    `leave_one_out`, mu_j is the mean over the other members of the group."""
    similarity = torch.full((len(group), max((len(embeddings[i]) for i in group), default=0)), math.nan)
    for row, i in enumerate(group):
        members = [k for k in group if k != i] if leave_one_out else group
        for j, mu_j in step_prototypes(embeddings, members, min_group - leave_one_out).items():
            if j < len(embeddings[i]):
                cosine = F.cosine_similarity(embeddings[i][j].double(), mu_j.double(), dim=0)
                similarity[row, j] = cosine.nan_to_num(0.0, 0.0, 0.0)
    return similarity

def position_weights(num_steps: int, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, w_j = exp(-kappa (j - 1)): (num_steps,), not normalized. Early steps weigh more. kappa [code]."""
    return torch.exp(-decay * torch.arange(num_steps, dtype=torch.float32))

def trajectory_reward(similarity: torch.Tensor, group: list[int], num_rollouts: int, gamma: float = 0.7,
                      decay: float = 0.15) -> torch.Tensor:
    """Eq 4, r_step = rho * sum_j w_j r_ij for all N rollouts: r_ij (|G|, J) -> (N,).
    The w_j are normalized to sum to 1 over the positions where r_ij is defined [ours], so that the reward does not grow
    with the number of steps. Rollouts outside the group, and those with nothing to compare, get 0."""
    weights = position_weights(similarity.shape[1], decay) * ~similarity.isnan()                         # (|G|, J)
    mean = (weights * similarity.nan_to_num(0.0)).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-30)       # (|G|,)
    rewards = torch.zeros(num_rollouts)
    rewards[group] = group_density(len(group), max(num_rollouts, 1), gamma) * mean
    return rewards

def step_agreement(embeddings: list[torch.Tensor], group: list[int], num_rollouts: int, gamma: float = 0.7,
                   decay: float = 0.15, min_group: int = 2) -> torch.Tensor:
    """Eq 2-4, the intrinsic CoT agreement reward r_step of all N rollouts: (N,), finite on any input.
    embeddings[i] is (J_i, d), one row per step; `group` holds the rollouts with the majority answer."""
    return trajectory_reward(step_similarity(embeddings, group, min_group), group, num_rollouts, gamma, decay)

def leave_one_out_similarity(embeddings: list[torch.Tensor], group: list[int]) -> torch.Tensor:
    """Figure 7, S_ij = cos(e_ij, mean of e_kj over the other members k of the group): (|G|, J), NaN where undefined."""
    return step_similarity(embeddings, group, leave_one_out=True)

def depth_disagreement(similarity: torch.Tensor) -> torch.Tensor:
    """Figure 7, D_j = 1 - mean of S_ij over the i that have it: (|G|, J) -> (J,), NaN where none has."""
    return 1 - torch.nanmean(similarity, dim=0)


# ---- The paper, section 3.3: rewards (Eq 5, 6) and update (Eq 7, 8) --------------------------------------------------

def length_excess(words: int, target: int = 64) -> float:
    """Eq 5, the normalized excess length: 0 up to `target` words before the answer, 1 from twice as many on [code]."""
    return min(max((words - target) / target, 0.0), 1.0)

def answer_reward(p_answer: float, excess: float, alpha: float = 0.7, eta: float = 0.05) -> float:
    """Eq 5, r_ans = p(a_i|x,q)^alpha (1 - eta * excess)."""
    return p_answer ** alpha * (1 - eta * excess)

def step_reward_weight(step: int, total_steps: int, lam_max: float = 0.7, warmup_frac: float = 0.3) -> float:
    """Eq 6, lambda(t): 0 for the first `warmup_frac` of all steps, then linear to `lam_max` at the last step. `step`
    is the global step, counted from 1, so a resumed run continues the ramp."""
    progress = (step / total_steps - warmup_frac) / max(1 - warmup_frac, 1e-9)
    return lam_max * min(max(progress, 0.0), 1.0)

def mix_rewards(r_ans, r_step, lam: float):
    """Eq 6, r_sol = (1 - lambda) r_ans + lambda r_step, for numbers or tensors."""
    return (1 - lam) * r_ans + lam * r_step

def reinforce_loss(logprobs: list[torch.Tensor], kl: list[torch.Tensor], advantages: list[float], beta: float,
                   reduction: str = "mean") -> torch.Tensor:
    """Eq 7, the mean over rollouts of -(r - b) log pi(y|x,q) + beta KL(pi || pi_ref). A scalar.
    logprobs[i] and kl[i] are (T_i,), both in nats; advantages[i] is r_i - b. log pi is the mean over the rollout's
    tokens [ours] or their sum; the KL is the mean over its tokens."""
    losses = []
    for logp, divergence, advantage in zip(logprobs, kl, advantages):
        log_pi = logp.mean() if reduction == "mean" else logp.sum()
        losses.append(-advantage * log_pi + beta * divergence.mean())
    return torch.stack(losses).mean()

def token_statistics(hidden: torch.Tensor, ref_hidden: torch.Tensor, token_ids: torch.Tensor, lm_head,
                     temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq 7, log pi(token) and the exact KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)), in nats, at M token
    positions: (M, d), (M, d), (M,) -> (M,), (M,). The log-softmax is float32, at the sampling temperature."""
    logp = torch.log_softmax(lm_head(hidden).float() / temperature, dim=-1)                             # (M, V)
    with torch.no_grad():
        ref_logp = torch.log_softmax(lm_head(ref_hidden).float() / temperature, dim=-1)                 # (M, V)
    return logp.gather(-1, token_ids[:, None])[:, 0], (logp.exp() * (logp - ref_logp)).sum(dim=-1)

def advantages(rewards: list[float], baseline: float, kind: str = "ema") -> list[float]:
    """Eq 7, what multiplies log pi, for all rollouts of one question. "ema" is the paper's r - b. "group" is GRPO's
    (r - mean) / (sd + 1e-3) with the population sd of these rewards [ours]; it ignores b, and one rollout gets 0."""
    if kind == "group":
        mean, sd = statistics.fmean(rewards), statistics.pstdev(rewards)
        return [(r - mean) / (sd + 1e-3) for r in rewards]
    return [r - baseline for r in rewards]

def update_baseline(baseline: float, mean_reward: float, momentum: float = 0.9) -> float:
    """Eq 7, the EMA baseline: b <- m b + (1 - m) mean(r), after the step that used b. m from the released code."""
    return momentum * baseline + (1 - momentum) * mean_reward

def adapt_kl_coef(beta: float, kl: float, target: float = 0.02, rate: float = 0.10, beta_min: float = 1e-3,
                  beta_max: float = 1.0) -> float:
    """Eq 8, beta <- clip(beta exp(eta (KL - tau) / tau), beta_min, beta_max). A huge or infinite KL gives a bound; a
    KL of NaN leaves beta where it is. The bounds are ours: the rule is an integrator, and with the released code's wide
    bounds beta falls while the KL is small, reacts too late when it rises, and then overshoots."""
    exponent = rate * (kl - target) / target
    exponent = 0.0 if math.isnan(exponent) else min(max(exponent, -700.0), 700.0)  # math.exp overflows at 710
    return min(max(beta * math.exp(exponent), beta_min), beta_max)

def group_rewards(rollouts: list["Rollout"], embeddings: list[torch.Tensor], lam: float, config: Config,
                  question: str = "") -> dict:
    """All rewards of one question, from its N parsed rollouts and their step embeddings, (J_i, d) each, at lambda(t).
    YOUR REWARD HERE, or in a function of your own for `train(config, reward=...)`. "r_sol", a list of N numbers, trains
    the Solver and "r_prop", a number, the Proposer. All else is only logged: everything in rollouts.jsonl, and numbers
    and lists of N numbers (None allowed) also as their mean in metrics.jsonl."""
    n = len(rollouts)
    answers = [r.vote for r in rollouts]
    valid = [a for a in answers if a is not None]
    p = answer_distribution(answers)
    majority, group = dominant_group(answers)
    r_ij = step_similarity(embeddings, group, config.min_group_size)                                    # (|G|, J)
    r_step = trajectory_reward(r_ij, group, n, config.gamma, config.position_decay).tolist()
    if config.answer_reward == "soft":
        r_ans = [0.0 if a is None else answer_reward(p[a], length_excess(r.words_before_answer, config.target_words),
                                                     config.alpha, config.eta) for a, r in zip(answers, rollouts)]
        r_prop = entropy_reward(answer_entropy(valid), config.entropy_mu, config.entropy_sigma)
    else:
        r_ans = [float(a is not None and a == majority) for a in answers]
        r_prop = float(1 < len(group) < len(valid))  # some, but not all, valid rollouts agree
    # The valid share [ours]: with invalid rollouts as outcomes, breaking the Solver would be the best question.
    r_prop *= len(valid) / n
    cosines = dict(zip(group, r_ij.nanmean(dim=1).tolist()))
    return {"r_sol": [mix_rewards(a, s, lam) for a, s in zip(r_ans, r_step)], "r_prop": r_prop,
            "r_ans": r_ans, "r_step": r_step, "majority": [i in group for i in range(n)], "group_size": len(group),
            "density": group_density(len(group), n, config.gamma), "entropy": answer_entropy(answers),
            "step_cosine": [cosines.get(i) for i in range(n)],
            "comparable_steps": int((~r_ij.isnan()).any(dim=0).sum()),
            "leave_one_out": leave_one_out_similarity(embeddings, group).tolist()}


# ---- Parsing: what a model wrote (section 3.1). Nothing here raises, on any text; all of it is linear or quadratic ---

@dataclass
class Rollout:
    """One Solver reply, parsed."""
    text: str
    think: str
    steps: list[str]
    answer: str | None           # raw text of the last complete <answer>...</answer>; None without one
    words_before_answer: int     # all words without one; tags not counted

    @property
    def vote(self) -> str | None:
        """The normalized answer; None if the rollout is invalid: no complete <answer>, or an empty one."""
        return normalize_answer(self.answer or "") or None

def parse_question(text: str) -> str | None:
    """The question in the Proposer's reply, on one line, or None: the content of <question>...</question>, else the
    first line with a question mark, up to the mark."""
    tagged = re.search(r"<question>((?:(?!</?question>).)*)</question>", text, re.I | re.S)
    lines = [line for line in re.split(r"\n|</?question>", text, flags=re.I) if "?" in line or "？" in line]
    untagged = [re.match(r"[\s#>*_-]*(?:question[\s*_\d]{0,9}:[\s*_]*)?(.*?[?？])", line, re.I)[1] for line in lines]
    candidates = [tagged[1]] if tagged else untagged
    return next((" ".join(c.split()) for c in candidates if re.search(r"\w", c)), None)

def parse_rollout(text: str, max_steps: int = 8) -> Rollout:
    """Splits a Solver reply into trace t_i, steps s_ij and answer a_i (section 3.1).

    >>> parse_rollout("<think>Step 1: red is 3\\nStep 2: 3 + 4 = 7</think><answer> 7 </answer>").steps
    ['red is 3', '3 + 4 = 7']
    """
    answers = list(re.finditer(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.I | re.S))
    before = text[:answers[-1].start()] if answers else re.split("<answer>", text, maxsplit=1, flags=re.I)[0]
    think = re.match("(?:.*?<think>)?(.*?)(?:</think>|\\Z)", before, re.I | re.S)[1].strip()
    words = re.sub(r"</?(?:think|answer|step)>", " ", before, flags=re.I).split()
    return Rollout(text, think, split_steps(think, max_steps), answers[-1][1].strip() if answers else None, len(words))

_STEP_TAG = re.compile(r"(?P<line>)<step[^<>]{0,30}>(?:\s*step ?\d{1,3}[:.)-])?", re.I)
_STEP_WORD = re.compile(  # behind markdown at the start of a line, or in the middle of one
    r"(?:(?P<line>^[ \t#>*_+•-]*(?:\d{1,2}[.)] ?)?)|(?<=\s)(?:\*\*|__)?)step ?#?(?P<number>\d{1,3})(?:\*\*|__)? ?"
    r"(?:[:)\]–—]|\.(?!\d)|-(?=\s)|$)(?:\*\*|__)?", re.I | re.M)
_NUMBERED = re.compile(r"(?P<line>^[ \t#>*_+•-]*)\(?\d{1,2}[.)](?!\d)(?:\*\*|__)?", re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!Fig\.)\s+|(?<=[。！？])|\n\s*")

def split_steps(think: str, max_steps: int = 8) -> list[str]:
    """The numbered claims of a trace, in order, at most `max_steps` (section 3.2: s_i1 ... s_iJ).
    Reads `Step 1:`, `Step 1 -`, `1.`, `1)`, each also behind markdown, and <step>...</step>, in any case. Lines that
    follow a marker belong to its step. What stands before the first marker is dropped, so that step j of one trace
    stands beside step j of another. Without any marker, sentences are the steps.

    >>> split_steps("I look first.\\n**Step 1:** 3.5 is\\n  the height\\n2) so\\nstep 2 - it fits")
    ['3.5 is the height 2) so', 'it fits']
    """
    think = re.sub("</step>", "", think, flags=re.I)
    for pattern in (_STEP_TAG, _STEP_WORD, _NUMBERED):
        marks = []
        for mark in pattern.finditer(think):  # in the middle of a line only the next number is a marker, else a mention
            if mark["line"] is not None or int(mark["number"]) == len(marks) + 1:
                marks.append(mark)
        if marks:  # a step without the second half of a bold that began in its marker: "**Step 1: a**"
            ends = [mark.start() for mark in marks[1:]] + [len(think)]
            steps = [think[m.end():end].replace("**", "", m[0].count("**") % 2) for m, end in zip(marks, ends)]
            break
    else:
        steps = [re.sub(r"\A[#>*+•-]+\s", "", sentence) for sentence in _SENTENCE_END.split(think)]
    steps = [" ".join(step.split()) for step in steps]
    return [step for step in steps if re.search(r"\w", step)][:max(max_steps, 0)]

_FOLDED_CHARACTERS = {**dict.fromkeys(map(ord, "−–‐‑"), "-"), ord("\u200b"): None, ord("\ufeff"): None}
_WRAPPERS = [*((f"\\{name}{{", "}") for name in ("boxed", "text", "textbf", "mathrm", "mathbf")), ("\\(", "\\)"),
             ("\\[", "\\]"), ("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("‘", "’"), ("«", "»"),
             *((mark, mark) for mark in ("**", "__", "$$", "*", "_", "$", "`", '"', "'"))]
_QUANTITY = re.compile(r"(?P<sign>[+-]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<late_sign>[+-]?)\s*"
                       r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
                       r"(?:\s*(?P<symbol>[%€£¥₹])|(?=\s[^\W\d_])|$)(?P<rest>.*)", re.S)

def normalize_answer(text: str) -> str:
    """Folds the ways of writing one answer into one string, for voting (Eq 1). Idempotent on any string.
    Case, white space, surrounding quotes, brackets, markdown and LaTeX, a trailing full stop, thousands separators and
    Unicode minus signs are folded, and numbers equal in value become equal; a sign, a decimal point, a percent or a
    currency sign keep their meaning.

    >>> [normalize_answer(a) for a in ("**7.0**", "$7$", "-5", "5 %", ".50", "1,000 km", "(B).")]
    ['7', '7', '-5', '5%', '0.5', '1000 km', 'b']
    """
    text, before = text.translate(_FOLDED_CHARACTERS).casefold(), None
    while text != before:  # until nothing changes, since one form may hide another: **$7.$**
        before = text
        text = re.sub(r"\\([%$])", r"\1", text)
        text = normalize_number(unwrap(" ".join(text.split())).rstrip(" ."))
    return text

def unwrap(text: str) -> str:
    """The text without one pair of quotes, brackets, markdown or LaTeX around it: "(a)" -> "a", not "(a) or (b)"."""
    for left, right in _WRAPPERS:
        inner = text[len(left):len(text) - len(right)]
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
            opening, closing = left[-1], right[-1]
            balanced = inner.count(opening) == inner.count(closing) and inner.find(opening) <= inner.find(closing)
            if balanced if left != right else left not in inner:
                return inner.strip()
    return text

def normalize_number(text: str) -> str:
    """A number, with its sign, currency or unit, in one form: "+1,000.50 KM" -> "1000.5 km", "5 €" -> "€5"."""
    match = _QUANTITY.fullmatch(text)
    if not match or (match["sign"] and match["late_sign"]):
        return text
    number, symbol = Decimal(match["number"].replace(",", "")), match["symbol"] or ""
    digits = format(number, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    sign = "-" if number and "-" in (match["sign"], match["late_sign"]) else ""
    if symbol not in ("", "%") and not match["currency"]:
        return sign + symbol + digits + match["rest"]
    return sign + match["currency"] + digits + symbol + match["rest"]


# ---- Policy: one frozen backbone, two LoRA adapters, one mechanism for sampling, gradient and reference (Eq 7) -------

ROLES = ("solver", "proposer")

@dataclass
class EncodedImage:
    """An image after the frozen vision tower: encoded once, used in every pass of a step."""
    ids: list[int]               # the chat template up to the text, with a placeholder for each visual token
    features: dict               # what the vision tower gives to the language model
    grid: torch.Tensor | None    # (1, 3) time, height and width in patches, for 3-D rotary positions

@dataclass
class Prompt:
    """One user turn: an image and a text. The text is data: markers such as <|im_end|> in it stay plain text."""
    image: Image.Image | EncodedImage
    text: str

@dataclass
class Completion:
    """One sampled reply, kept as sampled and never re-tokenized."""
    token_ids: list[int]         # T of them, with the end-of-turn token
    logprobs: torch.Tensor       # (T,) under the sampling distribution
    text: str
    finished: bool               # False if the token limit cut the reply off

@dataclass
class Scores:
    """For each completion i, in nats per token: (T_i,)."""
    logprobs: list[torch.Tensor]    # log pi(y_t | x, q, y_<t), with gradient to the role's adapter
    kl: list[torch.Tensor]          # the exact KL(role || reference) over the vocabulary

@dataclass
class Prefill:
    """Prompts in the key/value cache, ready to be continued."""
    cache: object                 # B rows of P tokens, padded on the left
    mask: torch.Tensor            # (B, P), 1 for real tokens; once repeated (B N, P + R)
    next_position: torch.Tensor   # (B,) rotary position of the first completion token
    hidden: torch.Tensor          # (B, d) hidden state that predicts the first completion token

    def repeat(self, n: int, room: int) -> "Prefill":
        """Every prompt n times in a row, with `room` for more tokens in the mask. To score with gradients, the cache
        grows by concatenation, which is differentiable; else it is allocated in full, so that no token copies it."""
        from transformers.cache_utils import Cache, StaticLayer
        cache = self.cache
        if torch.is_grad_enabled():
            cache.batch_repeat_interleave(n)
        else:
            cache = Cache(layers=[StaticLayer(max_cache_len=self.mask.shape[1] + room) for _ in self.cache.layers])
            for layer, prompt in zip(cache.layers, self.cache.layers):
                layer.update(prompt.keys.repeat_interleave(n, 0), prompt.values.repeat_interleave(n, 0))
        mask = F.pad(self.mask, (0, room), value=1).repeat_interleave(n, 0)  # the model hides what is not there yet
        return Prefill(cache, mask, self.next_position.repeat_interleave(n), self.hidden.repeat_interleave(n, 0))

class LoRALinear(torch.nn.Module):
    """A frozen linear layer and a low-rank update per role: W x + (alpha / r) B A x, or W x alone for the reference.
    (..., d_in) -> (..., d_out). A and B are float32, also over a bfloat16 backbone; B starts at zero, so both roles
    start as the reference. The names are PEFT's."""

    def __init__(self, base_layer: torch.nn.Linear, policy: "Policy"):
        super().__init__()
        self.base_layer, self.policy, r = base_layer, policy, policy.config.lora_r
        self.lora_A = torch.nn.ModuleDict({role: torch.nn.Linear(base_layer.in_features, r, False) for role in ROLES})
        self.lora_B = torch.nn.ModuleDict({role: torch.nn.Linear(r, base_layer.out_features, False) for role in ROLES})
        for matrix in self.lora_B.values():
            torch.nn.init.zeros_(matrix.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, role, config = self.base_layer(x), self.policy.role, self.policy.config
        if role is None:
            return y
        low = self.lora_A[role](F.dropout(x.float(), config.lora_dropout, training=torch.is_grad_enabled()))
        return (y + config.lora_alpha / config.lora_r * self.lora_B[role](low)).to(y.dtype)

class Policy:
    """A vision-language model with the adapters "solver" and "proposer" on one frozen backbone. `hf` is the model of
    transformers, `stop_ids` the set of end-of-turn token ids.
    The reference policy of Eq 7 is the same backbone with its adapters off, so it costs no memory and cannot drift.
    Wherever a role is asked for, None means the reference."""

    def __init__(self, config: Config, backbone: tuple | None = None):
        """`backbone` is a (model, tokenizer, processor) to use instead of loading `config.model`."""
        self.config, self.device, self.role = config, resolve_device(config.device), None
        self.hf, self.tokenizer, self.processor = backbone or load_backbone(config, self.device)
        with blame(f"--model {config.model}: a {self.hf.config.model_type} model does not work here"):
            self.lm_head, self.image_token_id = self.hf.get_output_embeddings(), self.hf.config.image_token_id
            eos = self.hf.generation_config.eos_token_id
            self.stop_ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
            arguments = inspect.signature(self.hf.model.forward).parameters
            self.image_mask_name = next((n for n in ("mm_token_type_ids", "token_type_ids") if n in arguments), None)
            text = self.hf.config.get_text_config()
            if getattr(text, "final_logit_softcapping", None) or getattr(text, "logit_scale", 1) != 1:
                raise ValueError("its logits are not lm_head(hidden)")
            self.add_adapters()

    def add_adapters(self):
        """Replaces each linear layer of the language model's blocks by a LoRALinear. The vision tower stays frozen."""
        torch.manual_seed(derive_seed(self.config.seed, "adapters"))  # the same adapters on every rank
        blocks = self.hf.get_decoder().layers
        for name, layer in list(blocks.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                path, _, child = name.rpartition(".")
                setattr(blocks.get_submodule(path), child, LoRALinear(layer, self).to(self.device))

    # ---- adapters
    @contextlib.contextmanager
    def adapter(self, role: str | None):
        """Runs the block as a role, or as the reference for None. A backward pass may run outside of it."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    def parameters(self, role: str) -> dict[str, torch.nn.Parameter]:
        """A role's trainable parameters, its LoRA matrices, under the names that they have in a PEFT adapter folder."""
        return {f"base_model.model.{name.replace(f'.{role}.', '.')}": p for name, p in self.hf.named_parameters()
                if f".{role}." in name}

    def save(self, folder: Path):
        """Writes folder/solver and folder/proposer, PEFT adapters with the backbone's tokenizer and processor files."""
        from peft import LoraConfig
        from safetensors.torch import save_file
        config, local = self.config, Path(self.config.model)
        projections = "|".join(sorted({name.split(".")[-3] for name in self.parameters("solver")}))
        lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                          target_modules=rf".*\.layers\.\d+\.(?:self_attn|mlp)\.(?:{projections})", inference_mode=True,
                          base_model_name_or_path=str(local.absolute()) if local.is_dir() else config.model)
        for role in ROLES:
            lora.save_pretrained(str(folder / role))
            save_file({name: p.detach().cpu().contiguous() for name, p in self.parameters(role).items()},
                      folder / role / "adapter_model.safetensors", {"format": "pt"})
            for file in checkpoint_files(config.model, ("*token*", "*vocab*", "*merges*", "*template*", "*processor*")):
                shutil.copyfile(file, folder / role / file.name)

    @torch.no_grad()
    def load(self, role: str, folder: Path):
        """Reads a PEFT adapter folder into a role. Raises UserError if it is damaged or does not fit."""
        lora, saved = read_adapter(folder)
        parameters, config = self.parameters(role), self.config
        if ({name: p.shape for name, p in parameters.items()} != {name: w.shape for name, w in lora.items()}
                or saved["lora_alpha"] * config.lora_r != config.lora_alpha * saved["lora_r"]):
            raise UserError(f"{folder}: does not fit --model {config.model}, or this run's --lora_r or --lora_alpha")
        for name, p in parameters.items():
            p.copy_(lora[name])

    # ---- prompts
    @functools.cached_property
    def template(self) -> tuple[str, list[int]]:
        """The chat template of a turn with one image: what stands before its text, and the token ids behind it."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT-TEXT-SLOT"}]}
        chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        head, tail = chat.split("PROMPT-TEXT-SLOT")
        return head, self.tokenizer(tail, add_special_tokens=False)["input_ids"]

    def preprocess(self, image: Image.Image) -> tuple[list[int], dict[str, torch.Tensor]]:
        """(token ids of the chat template up to the text, inputs of the vision tower) for one image."""
        head, bos = self.template[0], self.tokenizer.bos_token
        if hasattr(self.processor, "tokenizer"):
            inputs = self.processor(text=[head], images=[image], return_tensors="pt",
                                    add_special_tokens=bool(bos) and not head.startswith(bos))
            ids = inputs["input_ids"][0].tolist()
        else:  # as the processor of the Qwen-VL models does: a placeholder for each visual token
            inputs = self.processor(images=[image], return_tensors="pt")
            visual_tokens = int(inputs["image_grid_thw"].prod()) // self.processor.merge_size ** 2
            ids = self.tokenizer(head.replace("<|image_pad|>", "<|image_pad|>" * visual_tokens))["input_ids"]
        of_text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        return ids, {name: value.to(self.device, self.hf.dtype if value.is_floating_point() else None)
                     for name, value in inputs.items() if name not in of_text}

    @torch.no_grad()
    def encode(self, image: Image.Image) -> EncodedImage:
        """Runs the vision tower. Each image alone, so that no number depends on the rest of a batch."""
        ids, inputs = self.preprocess(image)
        arguments = inspect.signature(self.hf.model.get_image_features).parameters
        out = self.hf.model.get_image_features(**{n: v for n, v in inputs.items() if n in arguments}, return_dict=True)
        features = {n: out[n] for n in ("pooler_output", "deepstack_features") if out.get(n) is not None}
        return EncodedImage(ids, features, inputs.get("image_grid_thw"))

    def encode_prompts(self, prompts: list[Prompt]) -> list[Prompt]:
        """The same prompts with every PIL image encoded."""
        return [p if isinstance(p.image, EncodedImage) else Prompt(self.encode(p.image), p.text) for p in prompts]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of model or user text; special tokens that are spelled out in it become ordinary characters."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenized
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of an encoded prompt: the chat template around its text."""
        return prompt.image.ids + self.tokenize(prompt.text) + self.template[1]

    def prefill(self, prompts: list[Prompt]) -> Prefill:
        """Runs encoded prompts through the active adapter once and keeps their keys and values."""
        from transformers import DynamicCache
        from transformers.utils import ModelOutput
        rows = [self.prompt_ids(p) for p in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=self.device)               # (B, P)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=self.device)   # (B, P)
        image_mask = ((ids == self.image_token_id) & (mask == 1)).int()
        if hasattr(self.hf.model, "get_rope_index"):  # time, height and width
            positions, _ = self.hf.model.get_rope_index(
                ids, mm_token_type_ids=image_mask, image_grid_thw=torch.cat([p.image.grid for p in prompts]),
                attention_mask=mask)                                                                       # (3, B, P)
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)                                                 # (B, P)
        features = {n: concatenate([p.image.features[n] for p in prompts]) for n in prompts[0].image.features}
        cache = DynamicCache()  # without a config: layers with a sliding window keep all keys, and are masked
        out = self.hf.model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True,
                            mm_encoder_outputs={"image": ModelOutput(features)},
                            **({self.image_mask_name: image_mask} if self.image_mask_name else {}))
        last = positions.masked_fill(mask == 0, -1).view(-1, *mask.shape).amax(dim=(0, 2))                 # (B,)
        return Prefill(cache, mask, last + 1, out.last_hidden_state[:, -1])

    def extend(self, prefill: Prefill, ids: torch.Tensor, done: int = 0) -> torch.Tensor:
        """Hidden states (rows, T, d) of `ids` (rows, T), which follow a repeated prefill and `done` tokens after it."""
        positions = prefill.next_position[:, None] + done + torch.arange(ids.shape[1], device=self.device)  # (rows, T)
        if hasattr(self.hf.model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)  # text has equal time, height and width
        return self.hf.model(input_ids=ids, attention_mask=prefill.mask, position_ids=positions, cache=prefill.cache,
                             use_cache=True).last_hidden_state

    # ---- sampling and scoring
    @torch.no_grad()
    def sample(self, role: str | None, prompts: list[Prompt], num_samples: int, max_new_tokens: int,
               temperature: float = 1.0, seed: int | list[int] = 0) -> list[list[Completion]]:
        """`num_samples` completions of every prompt from the plain softmax. Of the checkpoint's generation_config only
        the end-of-turn ids are used, so the policy that samples is the policy that `score` scores. Temperature 0
        decodes greedily, with log-probabilities at temperature 1.
        Random numbers are keyed by (seed, prompt, sample). With one seed per prompt, a completion does not depend on
        which other prompts share the batch."""
        if not prompts:
            return []
        seeds = seed if isinstance(seed, list) else [derive_seed(seed, i) for i in range(len(prompts))]
        uniforms = torch.stack([  # (rows, R): one stream of uniform numbers per completion, float64
            torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(derive_seed(s, n)))
            for s in seeds for n in range(num_samples)]).to(self.device)
        stop = torch.tensor(sorted(self.stop_ids), device=self.device)
        lengths = torch.full((len(uniforms),), max_new_tokens, device=self.device)
        finished, token_ids, logprobs = torch.zeros_like(lengths, dtype=torch.bool), [], []
        with self.adapter(role):
            prefill = self.prefill(self.encode_prompts(prompts)).repeat(num_samples, max_new_tokens)
            hidden = prefill.hidden                                                                     # (rows, d)
            for t in range(max_new_tokens):
                logp = torch.log_softmax(self.lm_head(hidden).float() / (temperature or 1.0), dim=-1)   # (rows, V)
                if temperature:  # invert the distribution function, in float64
                    cdf = logp.double().exp().cumsum(-1)
                    draw = uniforms[:, t, None] * cdf[:, -1:]
                    tokens = torch.searchsorted(cdf, draw, right=True).clamp_max(cdf.shape[-1] - 1)     # (rows, 1)
                else:
                    tokens = logp.argmax(-1, keepdim=True)
                token_ids.append(tokens)
                logprobs.append(logp.gather(-1, tokens))
                stopped = torch.isin(tokens[:, 0], stop) & ~finished
                lengths[stopped], finished = t + 1, finished | stopped
                if t + 1 == max_new_tokens or finished.all():
                    break
                hidden = self.extend(prefill, tokens, done=t)[:, 0]
        rows = zip(torch.cat(token_ids, 1).tolist(), torch.cat(logprobs, 1).cpu(), lengths.tolist(), finished.tolist())
        completions = [Completion(ids[:length], logp[:length].clone(),
                                  self.tokenizer.decode(ids[:length], skip_special_tokens=True), done)
                       for ids, logp, length, done in rows]
        return [completions[i:i + num_samples] for i in range(0, len(completions), num_samples)]

    def score(self, role: str | None, prompt: Prompt, completions: list[Completion],
              temperature: float = 1.0) -> Scores:
        """Log-probabilities of sampled completions, conditioned on the image, and their KL to the reference."""
        prompt = self.encode_prompts([prompt])[0]
        token_ids = torch.tensor([t for c in completions for t in c.token_ids], device=self.device)         # (M,)
        with torch.no_grad(), self.adapter(None):
            ref_hidden = self.completion_hidden(prompt, completions)                                        # (M, d)
        with self.adapter(role):
            hidden = self.completion_hidden(prompt, completions) if role else ref_hidden                    # (M, d)
        # chunks bound the logits, and `checkpoint` frees them: the backward pass computes each chunk again
        pieces = [checkpoint(token_statistics, *chunk, self.lm_head, temperature, use_reentrant=False)
                  for chunk in zip(hidden.split(512), ref_hidden.split(512), token_ids.split(512))]
        lengths = [len(c.token_ids) for c in completions]
        return Scores(*(list(torch.cat(column).split(lengths)) for column in zip(*pieces)))

    def completion_hidden(self, prompt: Prompt, completions: list[Completion]) -> torch.Tensor:
        """Hidden states that predict the completions' tokens, (M, d). The prompt is prefilled once for all N, also with
        gradients: P + N R tokens go through the model instead of N (P + R)."""
        longest = max(len(c.token_ids) for c in completions)
        ids = torch.tensor([c.token_ids + [0] * (longest - len(c.token_ids)) for c in completions], device=self.device)
        prefill = self.prefill([prompt]).repeat(len(completions), longest - 1)
        hidden = prefill.hidden[:, None]                                                                    # (N, 1, d)
        if longest > 1:
            hidden = torch.cat([hidden, self.extend(prefill, ids[:, :-1])], dim=1)                          # (N, R, d)
        return torch.cat([h[:len(c.token_ids)] for h, c in zip(hidden, completions)])

    @torch.no_grad()
    def embed_steps(self, steps: list[str]) -> torch.Tensor:
        """f(s) of section 3.2: the l2-normalized mean (here sum) of a step's input-token embeddings: (J, d), CPU."""
        table = self.hf.get_input_embeddings().weight
        ids = [self.tokenize(step)[:self.config.embed_max_tokens] for step in steps]
        rows = [table[torch.tensor(i, dtype=torch.long, device=self.device)].float().sum(dim=0) for i in ids]
        return F.normalize(torch.stack(rows), dim=-1).cpu() if rows else torch.zeros(0, table.shape[1])

def concatenate(values: list):
    """Joins image features: tensors, tuples of them (one per image), or lists of such (one per layer, as Qwen3-VL)."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if torch.is_tensor(values[0][0]):
        return tuple(tensor for value in values for tensor in value)
    return [concatenate(list(layer)) for layer in zip(*values)]

def resolve_device(name: str) -> torch.device:
    """The torch device of a --device setting; under torchrun each rank takes the GPU of its LOCAL_RANK."""
    match, found = re.fullmatch(r"(?:auto|cuda)(?::(\d+))?", name), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    index = int((match and match[1]) or os.environ.get("LOCAL_RANK", 0))
    if not match or index >= found:
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N; PyTorch sees {found} GPUs. See README")
    return torch.device("cuda", index)

def load_backbone(config: Config, device: torch.device) -> tuple:
    """(model, tokenizer, processor) of a checkpoint, the model frozen; for the Qwen-VL models, the image processor."""
    import transformers
    transformers.logging.disable_progress_bar()
    dtype = {"cpu": "float32"}.get(device.type, "bfloat16") if config.dtype == "auto" else config.dtype
    with blame(f"--model {config.model}: not a complete vision-language chat model, here or on the Hugging Face Hub"):
        hf, info = transformers.AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=getattr(torch, dtype), output_loading_info=True)
        if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"its files lack {len(wrong)} weights, such as {wrong[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        if hf.config.model_type.startswith("qwen"):  # its whole processor needs torchvision, for videos
            processor = transformers.AutoImageProcessor.from_pretrained(config.model, backend="pil")
            processor.size = {"shortest_edge": min(processor.size["shortest_edge"], config.max_pixels),  # areas,
                              "longest_edge": config.max_pixels}                                  # despite the names
        else:
            processor = transformers.AutoProcessor.from_pretrained(config.model)
            tokenizer = processor.tokenizer
        if not tokenizer.chat_template:
            raise ValueError("it has no chat template")
    return hf.to(device).eval().requires_grad_(False), tokenizer, processor

@functools.lru_cache
def checkpoint_files(model: str, patterns: tuple[str, ...] = ("*",)) -> list[Path]:
    """The files of a checkpoint, a folder or a Hugging Face id, without weights that are not safetensors."""
    others = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"]
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download
        with blame(f"{model}: neither a folder nor found on the Hugging Face Hub"):
            model = snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=others)
    return sorted(f for f in Path(model).glob("[!.]*") if f.is_file() and any(map(f.match, patterns))
                  and not any(map(f.match, others)))

def read_adapter(adapter: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(matrices, settings) of an adapter: a PEFT folder, or a step_* folder, whose Solver is meant."""
    from safetensors.torch import load_file
    folder = Path(adapter, "solver") if Path(adapter, "solver").is_dir() else Path(adapter)
    with blame(f"{adapter}: no usable PEFT adapter. Name a step_* folder of a run, or its solver/ folder"):
        peft = json.loads((folder / "adapter_config.json").read_text())
        lora = load_file(folder / "adapter_model.safetensors")
        if any(peft.get(option) for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")):
            raise ValueError("a kind of LoRA that this file cannot compute")
        for name, matrix in lora.items():
            if not matrix.isfinite().all() or matrix.shape[1 if ".lora_B." in name else 0] != peft["r"]:
                raise ValueError(f"{name} is not finite, or not of rank {peft['r']}")
        return lora, {"lora_r": peft["r"], "lora_alpha": peft["lora_alpha"], "model": peft["base_model_name_or_path"]}


# ---- Learner: one role's optimizer, baseline and beta (Eq 7, 8) ------------------------------------------------------

class ZeroLoss(torch.nn.Module):
    """A loss of 0 on a role's parameters. Its backward pass under DistributedDataParallel, which averages over the
    ranks whatever gradients the parameters hold by then, is the one exchange of an update. A rank without a rollout
    takes part like any other, so none waits."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__()
        self.weights = torch.nn.ParameterList(parameters)

    def forward(self) -> torch.Tensor:
        return sum(w.sum() for w in self.weights) * 0.0

class Learner:
    """What one role carries from step to step: its optimizer, baseline b and KL coefficient beta."""

    def __init__(self, policy: Policy, role: str):
        config = policy.config
        self.policy, self.role, self.beta, self.baseline, self.skips_in_a_row = policy, role, config.kl_coef, None, 0
        self.parameters = list(policy.parameters(role).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        if world_size() > 1:
            self.exchange = torch.nn.parallel.DistributedDataParallel(ZeroLoss(self.parameters))
            self.exchange().backward()  # DDP orders its buckets, and so its sums, after the first pass: this one

    def update(self, prompts: list[Prompt], completions: list[list[Completion]], rewards: list[list[float]]) -> dict:
        """One optimizer step over all rollouts of all ranks (Eq 7), then the baseline and beta (Eq 8). The lists have
        one entry per question of this rank. Returns what to log. If the loss or a gradient of any rank is not finite,
        all ranks skip the update together; the fifth skip in a row raises UserError."""
        config, kls, passes = self.policy.config, [], []
        reward_sum, count = all_sum(sum(map(sum, rewards)), sum(map(len, rewards)))
        if count == 0:  # no rank got a question to work on
            return {}
        baseline = reward_sum / count if self.baseline is None else self.baseline  # starts at the first mean [ours]
        for prompt, group, earned in zip(prompts, completions, rewards):
            of_group = advantages(earned, baseline, config.advantage if self.role == "solver" else "ema")
            for i in range(0, len(group), config.score_rollouts):  # only now is the group cut, to bound memory
                passes.append((prompt, group[i:i + config.score_rollouts], of_group[i:i + config.score_rollouts]))

        def loss(prompt, group, of_group):  # this pass's part of the mean over all rollouts of all ranks
            scores = self.policy.score(self.role, prompt, group, config.temperature)
            kls.extend(kl.detach().mean().item() for kl in scores.kl)
            mean = reinforce_loss(scores.logprobs, scores.kl, of_group, self.beta, config.logprob_reduction)
            return mean * len(group) / count * world_size()  # DDP divides by it

        self.optimizer.zero_grad(set_to_none=True)
        for arguments in passes:
            loss(*arguments).backward()
        if world_size() > 1:
            self.exchange().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip).item()
        kl = all_sum(sum(kls))[0] / count
        skipped = not (math.isfinite(grad_norm) and math.isfinite(kl))  # both are the same on all ranks
        stats = {"kl": kl, "beta": self.beta, "baseline": baseline, "grad_norm": grad_norm, "skipped": int(skipped)}
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        if self.skips_in_a_row == 5:
            raise UserError(f"the {self.role}'s loss or gradient was not finite in 5 updates in a row. Look at "
                            "metrics.jsonl; lower --lr, or try --dtype float32", status=1)
        if not skipped:
            self.optimizer.step()
            self.baseline = update_baseline(baseline, reward_sum / count, config.baseline_momentum)
            self.beta = adapt_kl_coef(self.beta, kl, config.kl_target, config.kl_adapt_rate, config.kl_coef_min,
                                      config.kl_coef_max)
        return stats


# ---- Ranks: torchrun starts one process per GPU; every printed or decided number is global ---------------------------

def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1

def rank() -> int:
    """The number of this process among them; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0

def say(text: str):
    """Prints a line, once for all ranks: any text, on any terminal. A reader that has gone (`| head`) ends nothing."""
    try:
        if rank() == 0:
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")

def join_ranks(device: torch.device):
    """Joins the process group of torchrun, if torchrun started us: nccl (RCCL on ROCm) on GPUs, gloo on the CPU."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(minutes=10)  # how long a rank may keep the others waiting
        store, number, size = next(rendezvous("env://", timeout=patience))
        # torchrun keeps its store over a restart: without a prefix the ranks would look for the dead ones' addresses
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=number,
                                world_size=size, timeout=patience)

def gather(value) -> list:
    """The values of all ranks, in order of rank, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def all_sum(*values: float) -> list[float]:
    """Each value summed over all ranks."""
    return [sum(column) for column in zip(*gather(values))]

@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside the block SIGTERM and SIGINT (preemption, Ctrl-C) only join a list, and the step in flight is finished."""
    caught = []
    with contextlib.ExitStack() as handlers:  # puts the old ones back
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # outside the main thread Python takes no handlers
                old = signal.signal(number, lambda number, frame: caught.append(number))
                handlers.callback(signal.signal, number, old)
        yield caught


# ---- Images ----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

def list_images(data: tuple[str, ...]) -> tuple[Path, ...]:
    """The image files of folders (recursive, none hidden), each file once, in a fixed order."""
    found = {}  # by real path: a link may lead to the same file again
    for folder in data:
        paths, visited = [], set()
        for root, subfolders, names in os.walk(folder, followlinks=True):
            new = os.path.realpath(root) not in visited  # else a link leads back up
            visited.add(os.path.realpath(root))
            subfolders[:] = sorted(name for name in subfolders if new and name[0] != ".")
            paths += [Path(root, name) for name in sorted(names)
                      if new and name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise UserError(f"--data {folder!r}: no folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return tuple(found.values())

def load_image(path: Path) -> Image.Image:
    """An upright RGB image: first frame, EXIF rotation, alpha on white, 16 bits as 8. Raises UserError."""
    with blame(f"{path}: cannot be read as an image"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: convert() would clip, not scale
            values = numpy.asarray(image, dtype=numpy.float64)
            top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0 if values.max() > 255 else 255.0
            image = Image.fromarray(numpy.clip(values / top * 255 + 0.5, 0, 255).astype("uint8"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if max(image.size) >= 200 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels is too narrow")
        return image.convert("RGB")

def training_image(paths: tuple[Path, ...], seed: int, slot: int) -> tuple[Path, Image.Image]:
    """Image number `slot` of the whole run, counted over all steps and ranks. The next readable file of the epoch takes
    the place of an unreadable one, the same on any number of ranks."""
    epoch, start = divmod(slot, len(paths))
    order = random.Random(derive_seed(seed, "order", epoch)).sample(paths, len(paths))  # new in each epoch
    for path in order[start:] + order[:start]:
        try:
            return path, load_image(path)
        except UserError as error:
            print(f"warning: skipping {error}", file=sys.stderr)
    raise UserError(f"--data: none of the {len(paths)} image files can be read; see the warnings above")


# ---- Run folder: config.json, metrics.jsonl, rollouts.jsonl, step_*/ -------------------------------------------------

AGENT = f"{os.uname().nodename} {os.getppid()}"  # the torchrun that started this rank: the same over all its restarts

@contextlib.contextmanager
def open_run(config: Config) -> Iterator[tuple[Path, Path | None]]:
    """Makes the run folder and locks it inside the block. Gives it, and the checkpoint to go on from or None."""
    run = Path(config.output_dir) / (config.run_name or f"{config.preset}_seed{config.seed}")
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            with blame(f"{run}: cannot be made or written. Choose another --output_dir or --run_name"):
                run.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(run / ".lock", "w"))
            with blame(f"{run}: another run is writing there. Wait for it, or choose another --run_name"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield run, gather(find_checkpoint(run, config) if rank() == 0 else None)[0]  # rank 0 decides for all

def find_checkpoint(run: Path, config: Config) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start. Raises UserError rather than overwrite another run."""
    if not (run / "config.json").exists():
        if config.resume or not all(p.name.startswith(".") for p in run.iterdir()):
            raise UserError(f"{run}: holds no run to resume. Leave --resume out, or choose another --run_name")
        return None
    with blame(f"{run / 'config.json'}: damaged. Choose another --run_name"):
        saved, here = json.loads((run / "config.json").read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
        different = [f for f in dataclasses.fields(config) if saved[f.name] != here[f.name]]
        words = {f.name: f"--{f.name} {saved[f.name]!r} there, {here[f.name]!r} here" for f in different}
    if fixed := [words[f.name] for f in different if not f.metadata["resumable"]]:
        raise UserError(f"{run}: holds a run with other settings ({'; '.join(fixed)}). Choose another --run_name")
    checkpoints = list_checkpoints(run)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and AGENT in [f.read_text() for f in run.glob(".agent")]:
        return checkpoints[-1] if checkpoints else None  # our own torchrun started this run, and now starts it again
    if not config.resume:
        raise UserError(f"{run}: holds a run already. Add --resume to continue it, or choose another --run_name")
    if not checkpoints:
        raise UserError(f"{run}: --resume, but no complete checkpoint is there. Delete the folder to start over")
    if "total_steps" in words:
        say(f"resuming with another length, which moves lambda(t): {words['total_steps']}")
    return checkpoints[-1]

def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(file.parent for file in run.glob("step_[0-9]*/trainer_state.pt"))

def start_run(run: Path, config: Config, last_step: int):
    """Writes the settings, cuts the logs back to the step from which the run continues, and removes leftovers."""
    with blame(f"{run}: cannot be written. Make room, or choose another --output_dir"):
        files = {".agent": AGENT, "config.json": json.dumps(dataclasses.asdict(config), indent=2) + "\n"}
        files |= {name: "".join(json.dumps(row) + "\n" for row in read_jsonl(run / name) if row["step"] <= last_step)
                  for name in ("metrics.jsonl", "rollouts.jsonl")}
        for name, text in files.items():  # written aside and renamed: there as a whole, or not at all
            (run / ".part").write_text(text, encoding="utf-8")
            os.replace(run / ".part", run / name)
        for part in run.glob(".step_*.part"):
            shutil.rmtree(part)

def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a log. A line that a crash has torn is left out; a missing file has no rows."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)

def append_jsonl(path: Path, rows: list[dict]):
    """Appends rows to a log; numbers that JSON cannot say (NaN, infinity) become null."""
    rows = [json.loads(json.dumps(row, default=str), parse_constant=lambda name: None) for row in rows]
    with blame(f"{path}: cannot be written. Make room"), open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))

def save_checkpoint(run: Path, step: int, images: int, policy: Policy, learners: dict[str, Learner]):
    """Writes run/step_NNNNNN aside and then renames it, so that a folder of that name is complete; deletes old ones."""
    part, folder = run / f".step_{step:06d}.part", run / f"step_{step:06d}"
    with blame(f"{part}: cannot be written. Make room; --resume goes on from the newest checkpoint"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        policy.save(part)
        state = {role: {"beta": x.beta, "baseline": x.baseline, "optimizer": x.optimizer.state_dict()}
                 for role, x in learners.items()}
        torch.save({"step": step, "images": images, **state}, part / "trainer_state.pt")
        for file in filter(Path.is_file, part.rglob("*")):
            with open(file, "rb") as written:
                os.fsync(written)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, or the run would have gone on behind it
        os.rename(part, folder)
        for old in list_checkpoints(run)[:-policy.config.keep_checkpoints]:
            shutil.rmtree(old.rename(run / f".{old.name}.part"))

def load_checkpoint(folder: Path, policy: Policy, learners: dict[str, Learner]) -> tuple[int, int]:
    """Restores adapters and trainer state, unpickling tensors and numbers alone; returns the step and images seen."""
    with blame(f"{folder}: damaged. Delete it to resume from the checkpoint before it"):
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        for role, learner in learners.items():
            policy.load(role, folder / role)
            learner.beta, learner.baseline = state[role]["beta"], state[role]["baseline"]
            learner.optimizer.load_state_dict(state[role]["optimizer"])
        return int(state["step"]), int(state["images"])


# ---- Training loop ---------------------------------------------------------------------------------------------------

@dataclass
class Episode:
    """One image on its way through one step."""
    slot: int                                   # number of the image within the global batch of this step
    path: Path
    image: EncodedImage
    proposal: Completion
    question: str | None                        # None: the proposal holds no question, and the Solver rests
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rewards: dict = field(default_factory=lambda: {"r_prop": 0.0})

def train(config: Config, reward: Callable[..., dict] = group_rewards) -> Path:
    """Self-evolution on a folder of unlabeled images, the paper's loop. `reward` is called as `group_rewards` is."""
    device = resolve_device(config.device)
    paths = list_images(config.data)
    training_image(paths, config.seed, 0)  # at least one must be readable: better known before the model loads
    join_ranks(device)
    with open_run(config) as (run, newest), contextlib.ExitStack() as stack:
        policy = Policy(config)
        learners = {role: Learner(policy, role) for role in ROLES}
        step, images = load_checkpoint(newest, policy, learners) if newest else (0, 0)
        log, stopped = Log(run, config, step, len(paths)), False
        signals = stack.enter_context(stop_signals())  # only now: until here Ctrl-C ends the program at once
        while step < config.total_steps and not stopped:
            step += 1
            torch.manual_seed(derive_seed(config.seed, step, rank()))  # for LoRA dropout; sampling has keys of its own
            lam = config.lambda_max if config.lambda_schedule == "constant" else step_reward_weight(
                step, config.total_steps, config.lambda_max, config.warmup_frac)

            episodes = propose(policy, paths, step, images)
            asked = [e for e in episodes if e.question is not None]
            solve(policy, asked, step)
            for e in asked:
                embeddings = [policy.embed_steps(r.steps) for r in e.rollouts]
                e.rewards = checked(reward(e.rollouts, embeddings, lam, config, e.question), len(e.rollouts))
            if config.watch_every and step % config.watch_every == 0:
                ask_about_another_image(policy, asked, paths, step, images)

            stats = {"solver": learners["solver"].update(
                [Prompt(e.image, solver_prompt(e.question)) for e in asked], [e.completions for e in asked],
                [e.rewards["r_sol"] for e in asked])}
            if step % config.proposer_every == 0:
                stats["proposer"] = learners["proposer"].update(
                    [Prompt(e.image, proposer_prompt()) for e in episodes], [[e.proposal] for e in episodes],
                    [[e.rewards["r_prop"]] for e in episodes])

            images += world_size() * config.images_per_rank
            log.step(step, episodes, lam, stats)
            stopped = all_sum(len(signals))[0] > 0  # a signal to any rank stops all of them after the same step
            if rank() == 0 and (stopped or step % config.save_every == 0 or step == config.total_steps):
                save_checkpoint(run, step, images, policy, learners)
            gather(None)  # no rank goes on or ends before rank 0 has saved
        log.close()
        if step < config.total_steps:
            raise UserError(f"{run}: stopped by a signal after step {step}, which is saved. Add --resume to go on",
                            status=128 + (signals or [signal.SIGTERM])[0])
        say(f"{run}/step_{step:06d} holds both adapters")
    return run

def propose(policy: Policy, paths: tuple[Path, ...], step: int, first_image: int) -> list[Episode]:
    """This rank's share of the step's images, each with one proposed question."""
    config = policy.config
    slots = range(rank() * config.images_per_rank, (rank() + 1) * config.images_per_rank)
    files, images = zip(*(training_image(paths, config.seed, first_image + slot) for slot in slots))
    prompts = [Prompt(policy.encode(image), proposer_prompt()) for image in images]
    seeds = [derive_seed(config.seed, step, slot, "proposer") for slot in slots]
    proposals = policy.sample("proposer", prompts, 1, config.max_new_tokens_proposer, config.temperature, seeds)
    return [Episode(slot, path, prompt.image, proposal, parse_question(proposal.text))
            for slot, path, prompt, (proposal,) in zip(slots, files, prompts, proposals)]

def solve(policy: Policy, asked: list[Episode], step: int, key: str = "solver"):
    """Fills in N Solver rollouts for each episode. `key` keys their random numbers."""
    config, prompts = policy.config, [Prompt(e.image, solver_prompt(e.question)) for e in asked]
    seeds = [derive_seed(config.seed, step, e.slot, key) for e in asked]
    samples = policy.sample("solver", prompts, config.num_rollouts, config.max_new_tokens_solver, config.temperature,
                            seeds)
    for e, e.completions in zip(asked, samples):
        e.rollouts = [parse_rollout(c.text, config.max_reasoning_steps) for c in e.completions]

def checked(rewards: dict, n: int) -> dict:
    """The result of a reward function, tensors as lists. Raises UserError if it cannot train the two roles."""
    rewards = {key: v.tolist() if hasattr(v, "tolist") else v for key, v in (rewards or {}).items()}
    for key, kind, k, form in (("r_sol", list, n, f"a list of {n} numbers"), ("r_prop", (int, float), 1, "a number")):
        if not isinstance(rewards.get(key), kind) or len(numbers(rewards[key], n)) != k:
            raise UserError(f'reward: "{key}" must be {form}, but is {str(rewards.get(key)):.200}')
    return rewards

def numbers(value, n: int) -> list[float]:
    """The numbers in a number, or in a list of n numbers or None; none in anything else."""
    values = value if isinstance(value, list) and len(value) == n else [value]
    plain = all(v is None or isinstance(v, (int, float)) for v in values)
    return [float(v) for v in values if v is not None and math.isfinite(v)] if plain else []

def ask_about_another_image(policy: Policy, asked: list[Episode], paths: tuple[Path, ...], step: int, first_image: int):
    """Looks for collapse: where the majority answer is as frequent when the same question is asked about the run's next
    image, the answers do not come from the picture. Logs its share there; alters no training number."""
    others = []
    for e in asked:
        path, image = training_image(paths, policy.config.seed, first_image + e.slot + 1)
        others += [dataclasses.replace(e, path=path, image=policy.encode(image))]
    solve(policy, others, step, "another image")
    for e, other in zip(asked, others):
        majority = dominant_group([r.vote for r in e.rollouts])[0]
        if majority and other.path != e.path:
            e.rewards["swapped_agreement"] = statistics.fmean(r.vote == majority for r in other.rollouts)

class Log:
    """Prints one line per step and writes metrics.jsonl and rollouts.jsonl (rank 0)."""

    def __init__(self, run: Path, config: Config, last_step: int, num_images: int):
        self.run, self.config, self.wandb = run, config, None
        if rank() == 0 and config.wandb:
            with blame(f"--wandb {config.wandb}: cannot be started. Try pip install wandb, or leave the flag out"):
                import wandb
                self.wandb = wandb.init(project=config.wandb, name=run.name, config=dataclasses.asdict(config),
                                        id=f"{derive_seed(str(run.resolve()))}", resume="allow")
        if rank() == 0:
            start_run(run, config, last_step)
            asked = (row["question"] for row in read_jsonl(run / "rollouts.jsonl") if row["question"])
            self.questions = deque(asked, maxlen=256)
        say(f"{num_images} images, {config.images_per_rank * world_size()} per step on {world_size()} rank(s); "
            f"preset {config.preset}; model {config.model}; run folder {run}"
            + f"; resumed after step {last_step}" * bool(last_step))
        self.since = time.perf_counter()

    def step(self, step: int, episodes: list[Episode], lam: float, stats: dict):
        """Gathers the step's episodes from all ranks; metrics are means over them, whatever the number of ranks."""
        rows = sum(gather([self.row(step, e) for e in episodes]), [])
        if rank() != 0:
            return
        metrics = {"step": step, "lambda": lam}
        for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
            if values := [v for row in rows for v in numbers(row.get(key), self.config.num_rollouts)]:
                metrics[key] = statistics.fmean(values)
        metrics |= {f"{key}_{role}": value for role in ROLES for key, value in stats.get(role, {}).items()}
        self.questions.extend(row["question"] for row in rows if row["question"])
        metrics |= {"distinct_questions": len(set(self.questions)) / max(len(self.questions), 1),
                    "tokens": sum(row["tokens"] for row in rows), "seconds": time.perf_counter() - self.since}
        self.since += metrics["seconds"]
        append_jsonl(self.run / "rollouts.jsonl", rows)
        append_jsonl(self.run / "metrics.jsonl", [metrics])
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.show(metrics)
        shown = [row for row in rows if row["question"]]
        if shown and self.config.show_every and step % self.config.show_every == 0:
            say(format_group(shown[0]))

    def row(self, step: int, e: Episode) -> dict:
        """An episode as a row of rollouts.jsonl."""
        return {**e.rewards, "step": step, "image": str(e.path), "proposal": e.proposal.text, "question": e.question,
                "no_question": e.question is None, "texts": [r.text for r in e.rollouts],
                "votes": [r.vote for r in e.rollouts], "invalid": [r.vote is None for r in e.rollouts],
                "steps": [r.steps for r in e.rollouts], "num_steps": [len(r.steps) for r in e.rollouts],
                "unfinished": [not c.finished for c in e.completions],
                "tokens": sum(len(c.token_ids) for c in [e.proposal, *e.completions])}

    def show(self, metrics: dict):
        """The line of a step and, from time to time, the signs of collapse behind it."""
        def of(key, spec):
            return format(metrics[key], spec) if metrics.get(key) is not None else "-"

        step, total, seconds = metrics["step"], self.config.total_steps, metrics["seconds"]
        left = timedelta(seconds=int(seconds * (total - step)))
        say(f"{step:5d}/{total} | H {of('entropy', '.2f')} maj {of('group_size', '.1f')} bad {of('invalid', '.0%')} | "
            f"r_ans {of('r_ans', '.2f')} r_step {of('r_step', '.2f')} lam {of('lambda', '.2f')} r_sol "
            f"{of('r_sol', '.2f')} r_prop {of('r_prop', '.2f')} | KL {of('kl_solver', '.4f')} beta "
            f"{of('beta_solver', '.4f')} | {seconds:.2f} s {metrics['tokens'] / seconds:.0f} tok/s, left {left}")
        if self.config.watch_every and step % self.config.watch_every == 0:
            say(f"    watch: majority answer {of('majority', '.0%')}, about another image "
                f"{of('swapped_agreement', '.0%')}; distinct questions {of('distinct_questions', '.0%')}")

    def close(self):
        """The last lines of a run, if it cannot have learned anything."""
        rows = list(read_jsonl(self.run / "metrics.jsonl")) if rank() == 0 else []
        for key, words in (("no_question", "proposals held no question: this backbone does not follow proposer_prompt"),
                           ("invalid", "rollouts had no answer: this backbone does not follow solver_prompt")):
            if statistics.fmean([row[key] for row in rows if key in row] or [0.0]) > 0.5:
                say(f"Most {words}")
        if self.wandb:
            self.wandb.finish()

def format_group(row: dict) -> str:
    """A row of rollouts.jsonl for a person to read."""
    lines = [f"      r_sol {r:.2f}  {vote or '(invalid)'}: {(' | '.join(steps) or ' '.join(text.split()))[:160]}"
             for r, vote, steps, text in zip(row["r_sol"], row["votes"], row["steps"], row["texts"])]
    return "\n".join([f"    {row['image']}: {row['question']}", *lines])


# ==== The paper ends here. What follows are tools; cut them off, and `train(Config(...))` still works =================

def demo(config: Config, cancel: float = 0.5, json: str = ""):
    """The dice world: builds, mistrains and improves a tiny Qwen2.5-VL on a laptop.

    --cancel SHARE   share of the mistaught sums whose error leaves the answer right (0.5)
    --json FILE      write the result there
    """
    with blame("demo: needs test_ireasoner.py beside ireasoner.py, and pytest"):
        import test_ireasoner
    test_ireasoner.demo(config, cancel, json)

def ask(config: Config, image: str, question: str, adapter: str = ""):
    """One image, one question: prints the reasoning and the answer, decoded greedily.

    --adapter FOLDER   step_* folder of a run or PEFT adapter folder; default: the plain backbone
    """
    prompt = Prompt(load_image(Path(image)), solver_prompt(question))
    policy, role = load_solver(config, adapter)
    rollout = parse_rollout(policy.sample(role, [prompt], 1, config.max_new_tokens_solver, 0.0)[0][0].text)
    for j, step in enumerate(rollout.steps, 1):
        say(f"Step {j}: {step}")
    say(f"Answer: {rollout.answer}" if rollout.answer else f"(no <answer> in the reply) {rollout.text}")

def load_solver(config: Config, adapter: str) -> tuple[Policy, str | None]:
    """A policy and the role that answers: "solver" with an adapter, on the backbone it was trained on, else None."""
    policy = Policy(Config(**{**read_adapter(adapter)[1], **config.given}) if adapter else config)
    if adapter:
        policy.load("solver", Path(adapter))
    return policy, "solver" if adapter else None

def evaluate_file(config: Config, file: str, adapter: str = "", batch_size: int = 32, predictions: str = "",
                  json: str = ""):
    """Accuracy on a JSONL file of questions.

    Each line: {"image": path relative to the file, "question": "...", "answer": one or a list of right ones}
    --adapter FOLDER     step_* folder of a run or PEFT adapter folder; default: the plain backbone
    --batch_size N       questions answered together (32)
    --predictions FILE   write every answer and text there, one line per question
    --json FILE          write the result there
    """
    rows = load_questions(file)
    check_outputs([file], {"--predictions": predictions, "--json": json})
    policy, role = load_solver(config, adapter)
    result, answered = evaluate(policy, role, rows, batch_size=max(1, batch_size))
    n = config.num_rollouts
    for label, key in ((f"mean@{n}", "mean_at_n"), (f"maj@{n}", "maj_at_n"), ("greedy", "greedy")):
        say("{:<8} {:.3f} [{:.3f}, {:.3f}]".format(label, result[key], *result["ci95"][key]))
    if predictions:
        Path(predictions).unlink(missing_ok=True)
        append_jsonl(Path(predictions), answered)
    write_json(json, result)

def load_questions(file: str) -> list[dict]:
    """The rows of a file of questions, with "answers", a list. Raises UserError with the line number."""
    rows = []
    with blame(f"{file}: cannot be read. Give a JSONL file of questions"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028
    for number, line in enumerate(lines, 1):
        with blame(f"{file} line {number}: must be an object with image, question and answer, none of them empty"):
            if line.strip():
                row = json.loads(line)
                answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                row |= {"image": str(Path(file).parent / row["image"]), "answers": list(map(str, answers))}
                filled = [row["question"].strip(), answers, None not in answers, *map(normalize_answer, row["answers"])]
                if not all(filled) or not Path(row["image"]).is_file():
                    raise ValueError(f"something is empty, or {row['image']} is missing")
                rows.append(row)
    if not rows:
        raise UserError(f"{file}: no questions in it")
    return rows

def evaluate(policy: Policy, role: str | None, rows: list[dict], temperature: float | None = None,
             batch_size: int = 32) -> tuple[dict, list[dict]]:
    """Accuracy on labeled questions: ({n, mean_at_n, maj_at_n, greedy, ci95}, the rows with "texts", "votes" and
    "right" of N sampled rollouts and, last, of greedy decoding).
    The shares are those of right answers among the sampled rollouts, by their majority vote, and by greedy decoding.
    "ci95" has Wilson's 95 % interval of each, which is conservative for mean@N, whose questions vary less."""
    config, answered = policy.config, []
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        prompts = policy.encode_prompts([Prompt(load_image(r["image"]), solver_prompt(r["question"])) for r in batch])
        seeds = [derive_seed(config.seed, "eval", start + i) for i in range(len(batch))]
        sampled = policy.sample(role, prompts, config.num_rollouts, config.max_new_tokens_solver,
                                config.temperature if temperature is None else temperature, seeds)
        greedy = policy.sample(role, prompts, 1, config.max_new_tokens_solver, 0.0)
        for row, completions in zip(batch, map(list.__add__, sampled, greedy)):
            votes = [parse_rollout(c.text).vote for c in completions]
            references = set(map(normalize_answer, row["answers"]))
            answered.append({**row, "texts": [c.text for c in completions], "votes": votes,
                             "right": [vote in references for vote in votes],
                             "majority_right": dominant_group(votes[:-1])[0] in references})
    n, z2, result = len(rows), 1.96 ** 2, {"n": len(rows), "ci95": {}}
    for key, values in (("mean_at_n", [statistics.fmean(row["right"][:-1]) for row in answered]),
                        ("maj_at_n", [row["majority_right"] for row in answered]),
                        ("greedy", [row["right"][-1] for row in answered])):
        result[key] = p = statistics.fmean(values)
        centre, half = p + z2 / (2 * n), math.sqrt(z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2)
        result["ci95"][key] = [(centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)]
    return result, answered

def export(config: Config, adapter: str, folder: str):
    """Merges an adapter into its backbone: a checkpoint folder for transformers, lmms-eval or vLLM.

    The backbone is --model, or else the one that the adapter was trained on. A weight becomes W + (alpha / r) B A and
    keeps its name, file and dtype. Every other file is copied byte for byte, since what one version of transformers
    writes may not load in an older one.
    """
    from safetensors.torch import load_file, save_file
    lora, saved = read_adapter(adapter)
    model, target, part = config.given.get("model", saved["model"]), Path(folder), Path(f"{folder}.part")
    # "layers.3.mlp.up_proj": the backbone's file may place the language model elsewhere than the loaded model does
    left = {re.search(r"layers\..*(?=\.lora_A)", name)[0]: name for name in lora if ".lora_A." in name}
    with blame(f"{folder}: cannot be made of {model} and {adapter}"), contextlib.ExitStack() as stack:
        if target.exists():
            raise ValueError("it exists already")
        part.mkdir(parents=True)
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        for source in checkpoint_files(model):
            if source.suffix == ".safetensors":
                weights = load_file(source)
                for name, weight in weights.items():
                    module = re.search(r"layers\..*(?=\.weight$)", name)
                    if module and module[0] in left and not re.search("vision|visual", name):
                        a = left.pop(module[0])
                        product = lora[a.replace(".lora_A.", ".lora_B.")].float() @ lora[a].float()
                        merged = weight.float() + saved["lora_alpha"] / saved["lora_r"] * product
                        weights[name] = merged.to(weight.dtype)
                save_file(weights, part / source.name, {"format": "pt"})
            else:
                shutil.copyfile(source, part / source.name)
        if left:
            raise ValueError(f"the backbone has no safetensors weight for {sorted(left)[0]}")
        part.rename(target)
    say(f"{folder} holds {model} with {adapter} merged in")

def report(config: Config, runs: list[str], out: str = "report.png"):
    """One picture: the curves of Figures 3, 5 and 6 and of all other metrics, runs overlaid, and Figure 7.

    --out FILE   report.png
    """
    with blame("report: needs matplotlib. Try pip install matplotlib"):
        from matplotlib.figure import Figure
    check_outputs([], {"--out": out})
    metrics = {run: [row for row in read_jsonl(Path(run, "metrics.jsonl")) if "step" in row] for run in runs}
    if empty := [run for run, rows in metrics.items() if not rows]:
        raise UserError(f"{empty[0]}: no run folder with finished steps. Name a folder with a metrics.jsonl in it")
    titles = {"r_prop": "Fig 3: Proposer's reward g(H)", "entropy": "Fig 3: answer entropy H (nats)",
              "density": "Fig 3: group density rho", "step_cosine": "Fig 3: step similarity r_ij",
              "r_sol": "Fig 5: Solver's reward", "r_ans": "Fig 5: r_ans", "r_step": "Fig 5: r_step",
              "group_size": "Fig 5: majority group |G|", "comparable_steps": "Fig 5: comparable steps",
              "num_steps": "Fig 6: steps per rollout", "lambda": "Eq 6: lambda(t)"}
    present = {key for rows in metrics.values() for row in rows for key in row if numbers(row[key], 0)} - {"step"}
    keys = [key for key in titles if key in present] + sorted(present - set(titles))
    height = len(keys) // 4 + 2
    figure = Figure(figsize=(15, 2.2 * height), layout="constrained")
    grid = figure.add_gridspec(height, 4)
    for i, key in enumerate(keys):
        axes = figure.add_subplot(grid[i // 4, i % 4], xlabel="step", ylabel=key, title=titles.get(key, key))
        for run, rows in metrics.items():
            x, y = [[row[k] for row in rows if numbers(row.get(key), 0)] for k in ("step", key)]
            sparse = len(x) < len(rows) / 2  # points: a line would claim what was not measured
            axes.plot(x, y, "." if sparse else "-", markersize=3, label=run.replace("$", r"\$"))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    tables = [numpy.array(row["leave_one_out"], float) for row in read_jsonl(Path(runs[-1], "rollouts.jsonl"))
              if len(row.get("leave_one_out") or []) > 1]
    if tables := [s for s in tables[-100:] if numpy.isfinite(s).any()]:
        s = min(tables, key=numpy.nanmean)
        disagreement = "  ".join(f"{d:.2f}" for d in depth_disagreement(torch.tensor(s)).tolist())
        axes = figure.add_subplot(grid[-1, :2], xlabel=f"step j; D_j = {disagreement}", ylabel="rollout i")
        axes.set_title("Fig 7: S_ij, the least alike of the last 100 groups of the last run")
        figure.colorbar(axes.imshow(s, aspect="auto"))
    with blame(f"--out {out}: cannot be written"):
        figure.savefig(out, dpi=110)
    say(f"written: {out}")

def check_outputs(inputs: list[str], outputs: dict[str, str]):
    """Raises UserError, before the work is done, if a file to be written is an input, another output, or cannot be."""
    taken = set(map(os.path.realpath, inputs))
    for flag, file in outputs.items():
        path = Path(file).absolute()
        if file and (os.path.realpath(path) in taken or path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{flag} {file}: is another file of this command, or a folder, or its folder is missing")
        taken.add(os.path.realpath(path))

def write_json(file: str, result: dict):
    """Writes a result for machines, if a file was named."""
    if file and rank() == 0:
        with blame(f"--json {file}: cannot be written"):
            Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---- Command line: the signature of a command is its command line, its docstring the help ----------------------------

ALL = tuple(Config.__dataclass_fields__)
SOLVER = ("model", "num_rollouts", "temperature", "max_new_tokens_solver", "max_pixels", "device", "dtype", "seed")
COMMANDS = {"train": (train, ALL), "demo": (demo, ALL), "ask": (ask, SOLVER), "eval": (evaluate_file, SOLVER),
            "export": (export, ("model",)), "report": (report, ())}  # function, and the settings that are its flags

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. See --help")

def parse_command_line(argv: list[str]) -> tuple[Callable, Config, dict]:
    """(command, settings, the command's own arguments). Raises UserError."""
    name, *rest = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, COMMANDS)}")
    command, settings = COMMANDS[name]
    others = "\n".join(f"  {other:<8} {inspect.getdoc(f).splitlines()[0]}" for other, (f, _) in COMMANDS.items())
    parser = _Parser(usage=f"ireasoner.py {name} ...", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=f"{inspect.getdoc(command)}\n\nCommands (train if none is given):\n{others}")
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("config", "reward")]
    for p in own:
        if p.default is p.empty:
            parser.add_argument(p.name, nargs="+" if p.annotation == list[str] else None)
        else:
            parser.add_argument(f"--{p.name}", type=p.annotation, default=p.default, help=argparse.SUPPRESS)
    for f in (Config.__dataclass_fields__[setting] for setting in settings):
        kind = {bool: {"action": "store_true"}, tuple: {"nargs": "+"}}.get(f.type, {"type": f.type, "metavar": "X"})
        text = f"{f.metadata['meaning']}; {describe(f)}; default {f.default!r}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    arguments, unknown = parser.parse_known_args(rest)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"{flag}: no such flag of {name}{nearest(flag, parser._option_string_actions)}")
    given = vars(arguments)
    return command, Config(**{k: v for k, v in given.items() if k in settings}), {p.name: given[p.name] for p in own}

def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if training had to stop, 2 after one line about bad input."""
    status, message = 0, ""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command, config, arguments = parse_command_line(sys.argv[1:] if argv is None else argv)
        command(config, **arguments)
    except UserError as error:
        message, status = str(error), error.status
    except torch.OutOfMemoryError as error:
        message, status = (f"out of memory ({str(error).splitlines()[0]}). Lower --score_rollouts, --images_per_rank, "
                           "--num_rollouts or --max_pixels"), 1
    except RuntimeError as error:
        if world_size() == 1 or not re.search("gloo|nccl|connection", str(error), re.I):
            raise
        message, status = f"rank {rank()} lost another rank; the first error says why", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if message:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # other ranks mostly say the same; torchrun ends them as soon as the first has said it
        print(f"ireasoner: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # at once: threads of gloo sometimes abort an interpreter that ends in the ordinary way
        sys.stdout.flush()
        os._exit(status)
    return status

if __name__ == "__main__":
    sys.modules["ireasoner"] = sys.modules["__main__"]  # the demo imports ireasoner: this module, not a second one
    sys.exit(main())
