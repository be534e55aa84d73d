# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.24", "peft>=0.18", "pillow>=10.1", "numpy", "pytest"]
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

Order: Config; the paper, Eq 1 to Eq 8, then `group_rewards`, yours to change; parsing; Policy; Learner; ranks, images,
run folder; `train`; tools. In brackets the source of a choice: a section of the paper, [code] for the authors' released
code, [ours]. Where that code differs from the paper, this file follows the paper. Where its defaults depart from the
paper's letter:
- Eq 1: a rollout without a complete <answer>, or with an empty one, is invalid: it counts in N, never votes, earns 0.
- g(H) is taken of the valid rollouts' entropy and multiplied by their share; else a question would pay
  best that makes some of the rollouts invalid.
- Eq 3: a step position that fewer than two traces of G have is left out: one trace always agrees with itself.
- Eq 4: the weights w_j are normalized over a trace's comparable positions; as printed, the sum grows with their number.
- Eq 7: log pi is the mean over a rollout's tokens, not their sum (--logprob_reduction sum). beta has bounds.
- A step takes one image per rank, so 2,500 steps on eight ranks see 20,000 images; the paper's pool holds 2,500.
- Table 2's rows "gamma = 0.5" and "1.0" vary what Eq 5 calls alpha: here they are the presets alpha_0.5 and alpha_1.0.

Symbols: x image, q question, y_i rollout, a_i its normalized answer (`vote`), s_ij step, e_ij its embedding, a_hat the
majority answer, G the rollouts that gave it, mu_j prototype, r_tilde agreement of a trace, rho density, lam lambda(t),
kappa `position_decay`, b baseline, beta `kl_coef`, tau `kl_target`, eta of Eq 8 `kl_adapt_rate`.
Axes in shape comments: B prompts (one image each), N rollouts of a question, P prompt tokens, R completion tokens,
T tokens of one completion, M those of several in one row, rows = B N, V vocabulary, d model width, J steps of a trace.
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
import typing
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
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

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status

@contextlib.contextmanager
def blame(culprit):
    """Errors inside the block become a UserError: the culprit, then the library's words. The usual mistakes in code
    (NameError, TypeError ...) keep their traceback, as does everything under IREASONER_DEBUG=1."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, NameError, AttributeError, TypeError, AssertionError):
        raise
    except Exception as error:  # whatever a library raises at what comes from outside
        if os.environ.get("IREASONER_DEBUG"):
            raise
        words = " ".join(str(error).split())
        raise UserError(f"{culprit} ({type(error).__name__}: {words[:300]})") from error


# ---- Config: one line per setting makes the field, its flag, its --help text, its check and its entry in config.json -

PRESETS = {  # the rows of the paper's tables: what each changes
    "ireasoner": {},                                            # Table 2, Ours, Full
    "evolmm": {"lambda_max": 0.0},                              # Table 2, soft majority only
    "discrete": {"answer_reward": "discrete", "lambda_max": 0.0},  # Table 1
    "discrete_step": {"answer_reward": "discrete"},                    # Table 1
    "step_only": {"lambda_max": 1.0, "lambda_schedule": "constant"},   # Table 2, from here on
    "no_warmup": {"lambda_schedule": "constant"},
    "no_position_decay": {"position_decay": 0.0},
    "no_density": {"gamma": 0.0},
    "no_length_penalty": {"eta": 0.0},
    "alpha_0.5": {"alpha": 0.5},                                       # printed as gamma = 0.5
    "alpha_1.0": {"alpha": 1.0},                                       # printed as gamma = 1.0
    "steps_4": {"max_reasoning_steps": 4},                             # Table 3, from here on
    "steps_6": {"max_reasoning_steps": 6},
    "steps_10": {"max_reasoning_steps": 10},
}

# Marks a setting that was not given: its value comes from the preset, or else it is the default
UNSET = object()

def setting(default, allowed, meaning, resumable=False):
    """A field of Config. `allowed`: inclusive (low, high), words, or None. `resumable`: --resume may change it."""
    return field(default=UNSET, metadata={"default": default, "allowed": allowed, "meaning": meaning,
                                          "resumable": resumable})

@dataclass(kw_only=True)
class Config:
    """All settings, all optional: what is not given comes from the preset, then from here; in brackets its source."""
    # data and run folder
    model: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", None, "backbone: a folder or a Hugging Face id [4.1]")
    data: tuple = setting(("images",), None, "folders of unlabeled images, recursive [4.1]")
    output_dir: str = setting("runs", None, "folder that holds the run folders [ours]", resumable=True)
    run_name: str = setting("", None, "name of the run folder; empty: PRESET_seedSEED [ours]", resumable=True)
    preset: str = setting("ireasoner", list(PRESETS), "row of the paper's Tables 1 to 3; explicit flags win [4.1]")
    resume: bool = setting(False, None, "continue the run, or start it where there is none yet [ours]", resumable=True)
    # loop
    total_steps: int = setting(2500, (1, 999999), "training steps, over which lambda(t) rises [4.1]", resumable=True)
    num_rollouts: int = setting(5, (1, 1024), "N, Solver rollouts per question [4.1]")
    images_per_rank: int = setting(1, (1, 4096), "images (= questions) per step on each rank [ours]", resumable=True)
    proposer_every: int = setting(5, (1, 10**7), "steps between Proposer updates [4.1]")
    temperature: float = setting(1.0, (1e-3, 100), "sampling temperature, also used for scoring [code]")
    max_new_tokens_proposer: int = setting(128, (1, 65536), "longest question, tokens [code]")
    max_new_tokens_solver: int = setting(256, (1, 65536), "longest solution, tokens [code]")
    max_pixels: int = setting(802816, (784, 10**8), "pixels to which Qwen-VL models shrink larger images [ours]")
    # rewards, Eq 1 to 6
    answer_reward: str = setting("soft", ["soft", "discrete"], "soft: Eq 5, g(H); discrete: 0 or 1 [Tab 1]")
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
    advantage: str = setting("ema", ["ema", "mean", "group"], "Solver's: r - EMA b [4.1]; r - mean, GRPO's [ours]")
    baseline_momentum: float = setting(0.9, (0, 1), "momentum of the EMA baseline b, Eq 7 [code]")
    kl_coef: float = setting(1e-3, (0, 1e6), "beta at the first step, Eq 8 [code]")
    kl_coef_min: float = setting(1e-3, (0, 1e6), "lower bound of beta, Eq 8 [ours]")
    kl_coef_max: float = setting(1.0, (0, 1e6), "upper bound of beta, Eq 8 [ours]")
    kl_target: float = setting(0.02, (1e-9, 1e6), "tau, the KL that leaves beta alone, nats per token, Eq 8 [code]")
    kl_adapt_rate: float = setting(0.10, (0, 100), "eta of Eq 8: how fast beta follows the KL [code]")
    lora_r: int = setting(16, (1, 1024), "LoRA rank of each adapter [code]")
    lora_alpha: int = setting(32, (1, 10**6), "LoRA scale is lora_alpha / lora_r [code]")
    lora_dropout: float = setting(0.0, (0, 0.99), "dropout; above 0 another policy trains than sampled [ours]")
    # machine and bookkeeping
    device: str = setting("auto", None, "auto, cpu, cuda or cuda:N (ROCm GPUs are cuda too) [ours]", resumable=True)
    dtype: str = setting("auto", ["auto", "float32", "bfloat16"], "backbone; auto: bfloat16 on GPU, else float32 [4.1]")
    score_rollouts: int = setting(5, (1, 1024), "rollouts in a gradient pass, for memory [ours]", resumable=True)
    seed: int = setting(0, (0, 2**31), "of adapters, data order and sampling [ours]")
    save_every: int = setting(50, (1, 10**7), "steps between checkpoints [ours]", resumable=True)
    keep_checkpoints: int = setting(3, (1, 10**6), "newest checkpoints kept [ours]", resumable=True)
    show_every: int = setting(25, (0, 10**7), "steps between printed rollouts, 0 for none [ours]", resumable=True)
    watch_every: int = setting(25, (0, 10**7), "steps between looks for collapse, 0 for none [ours]", resumable=True)
    wandb: str = setting("", None, "log to this Weights & Biases project; empty: do not [ours]", resumable=True)

    # The settings that nobody set by hand, with their values: `dataclasses.replace` passes all old values on, and those
    # that are still the filled-in ones follow the new preset
    filled: InitVar[dict | None] = None

    def __post_init__(self, filled: dict | None):
        preset = self.preset
        if preset is UNSET:
            preset = self.__dataclass_fields__["preset"].metadata["default"]
        of_preset = PRESETS.get(preset, {})
        before = filled or {}
        self.filled = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value == before.get(f.name, UNSET):
                value = of_preset.get(f.name, f.metadata["default"])
                self.filled[f.name] = value
            setattr(self, f.name, valid_value(f, value))
        if not self.kl_coef_min <= self.kl_coef <= self.kl_coef_max:
            raise UserError(f"--kl_coef {self.kl_coef:g}: must lie between --kl_coef_min and --kl_coef_max, "
                            f"{self.kl_coef_min:g} and {self.kl_coef_max:g}")

    @property
    def given(self):
        """The settings that were set by hand."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in self.filled}

def valid_value(f, value):
    """A value as the type of its setting. Raises UserError if it is of another type or not allowed."""
    types = typing.get_args(f.type) or (f.type,)  # a setting of your own may be float | None
    allowed = f.metadata["allowed"]
    if isinstance(value, numpy.generic):
        value = value.item()  # numpy.float32(0.5)
    if isinstance(value, Path):
        value = str(value)
    if float in types and type(value) is int:
        value = float(value)  # --lr 1
    if f.type is tuple:
        parts = value if isinstance(value, (list, tuple)) else [value]
        value = tuple(map(str, parts))
    fits = type(value) in types
    if fits and isinstance(allowed, list):
        fits = value in allowed
    if fits and isinstance(allowed, tuple) and value is not None:
        fits = allowed[0] <= value <= allowed[1]
    if not fits:
        hint = nearest(str(value), allowed) if isinstance(allowed, list) else "."
        raise UserError(f"--{f.name} {value!r} ({f.metadata['meaning']}): must be {describe(f)}{hint}")
    return value

def describe(f):
    """What a setting may be, in words."""
    allowed = f.metadata["allowed"]
    if isinstance(allowed, list):
        return f"one of {', '.join(allowed)}"
    kind = getattr(f.type, "__name__", str(f.type))
    if allowed:
        return f"{kind} from {allowed[0]:g} to {allowed[1]:g}"
    return kind

def nearest(word, known):
    """The end of an error message: the nearest known word, if one is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "."

def derive_seed(*keys) -> int:
    """Mixes integers and strings into one 63-bit seed, the same on every machine; near keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
    counts = Counter(a for a in answers if a is not None)
    return {a: count / len(answers) for a, count in counts.items()}

def answer_entropy(answers: list[str | None]) -> float:
    """H(x, q) = -sum p log p in nats (section 3.1). Each invalid rollout (None) is an outcome of its own with mass
    1/N, so that garbage never looks like agreement [ours]. This H is logged; g(H) takes that of the valid rollouts."""
    n = len(answers)
    # An invalid rollout is its own outcome: its number
    outcomes = Counter(i if a is None else a for i, a in enumerate(answers))
    return math.fsum(count / n * math.log(n / count) for count in outcomes.values())

def entropy_reward(entropy: float, mu: float = 0.90, sigma: float = 0.35) -> float:
    """g(H), the Proposer's reward (section 3.1; form and values from the released code): a bell around H = mu nats,
    since a question on which all rollouts agree, or none do, teaches nothing."""
    return math.exp(-((entropy - mu) ** 2) / (2 * sigma ** 2))


# ---- The paper, section 3.2: agreement of the steps inside the majority group (Eq 2-4, Figure 7) ---------------------

def dominant_group(answers: list[str | None]) -> tuple[str | None, list[int]]:
    """Eq 2, the majority answer a_hat and the rollouts G that gave it. Ties go to the answer seen first; without any
    valid answer the result is (None, []).

    >>> dominant_group(["8", "7", None, "7", "8"])
    ('8', [0, 4])
    """
    p = answer_distribution(answers)
    if not p:
        return None, []
    a_hat = max(p, key=p.get)  # the first of equals: p keeps the order of appearance
    return a_hat, [i for i, a in enumerate(answers) if a == a_hat]

def group_density(group_size: int, num_rollouts: int, gamma: float = 0.7) -> float:
    """Eq 2, rho = (|G| / N)^gamma: how far the majority can be trusted. gamma from the released code."""
    return (group_size / num_rollouts) ** gamma

def step_prototypes(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> dict[int, torch.Tensor]:
    """Eq 3, mu_j: the mean step embedding at each position over G_j, the members of the group that have such a step.
    embeddings[i] is (J_i, d), one row per step; the keys are 0-based positions, the values (d,). A position with
    |G_j| < `min_group` is left out [code]: the similarity of one trace with itself is no agreement. A step that was
    left empty is a zero vector: it is a member of G_j that agrees with nothing."""
    prototypes = {}
    longest = max((len(embeddings[i]) for i in group), default=0)
    for j in range(longest):
        e_j = [embeddings[i][j] for i in group if j < len(embeddings[i])]  # e_ij of the i in G_j
        if len(e_j) >= min_group:
            prototypes[j] = torch.stack(e_j).mean(dim=0)
    return prototypes

def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sim(a, b) of section 3.2 for two vectors, in [-1, 1]. Zero vectors and non-finite values give 0."""
    return F.cosine_similarity(a.double(), b.double(), dim=0).nan_to_num(0.0, 0.0, 0.0)

def step_similarity(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> torch.Tensor:
    """r_ij = sim(e_ij, mu_j) (section 3.2): (|G|, J) with J the longest trace of the group, NaN where rollout i has no
    step j or the position cannot be compared."""
    longest = max((len(embeddings[i]) for i in group), default=0)
    r_ij = torch.full((len(group), longest), math.nan)  # (|G|, J)
    for j, mu_j in step_prototypes(embeddings, group, min_group).items():
        for row, i in enumerate(group):
            if j < len(embeddings[i]):
                r_ij[row, j] = cosine(embeddings[i][j], mu_j)
    return r_ij

def position_weights(num_steps: int, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, w_j = exp(-kappa (j - 1)): (num_steps,), not normalized. Early steps weigh more. kappa [code]."""
    return torch.exp(-decay * torch.arange(num_steps, dtype=torch.float32))

def trajectory_agreement(r_ij: torch.Tensor, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, r_tilde_i = sum_j w_j r_ij: (|G|, J) -> (|G|,). The w_j are normalized to sum to 1 over the positions where
    r_ij is defined [ours], so that it does not grow with the number of steps. 0 where nothing can be compared."""
    defined = ~r_ij.isnan()  # (|G|, J)
    w = position_weights(r_ij.shape[1], decay) * defined  # (|G|, J)
    weighted = w * r_ij.nan_to_num(0.0)
    return weighted.sum(dim=1) / w.sum(dim=1).clamp_min(1e-30)

def step_agreement(embeddings: list[torch.Tensor], group: list[int], num_rollouts: int, gamma: float = 0.7,
                   decay: float = 0.15, min_group: int = 2) -> torch.Tensor:
    """Eq 2-4, the intrinsic CoT agreement reward r_step = rho r_tilde of all N rollouts: (N,), finite on any input.
    embeddings[i] is (J_i, d), one row per step; `group` is G. Rollouts outside of G get 0."""
    r_step = torch.zeros(num_rollouts)  # what is not in G stays 0
    if group:
        rho = group_density(len(group), num_rollouts, gamma)
        r_ij = step_similarity(embeddings, group, min_group)  # (|G|, J)
        r_tilde = trajectory_agreement(r_ij, decay)  # (|G|,)
        r_step[group] = rho * r_tilde
    return r_step

def leave_one_out_similarity(embeddings: list[torch.Tensor], group: list[int]) -> torch.Tensor:
    """Figure 7, S_ij = sim(e_ij, mean of e_kj over the other members k of the group): (|G|, J), NaN where undefined."""
    longest = max((len(embeddings[i]) for i in group), default=0)
    s_ij = torch.full((len(group), longest), math.nan)  # (|G|, J)
    for row, i in enumerate(group):
        others = [k for k in group if k != i]
        for j, mean in step_prototypes(embeddings, others, min_group=1).items():
            if j < len(embeddings[i]):
                s_ij[row, j] = cosine(embeddings[i][j], mean)
    return s_ij

def depth_disagreement(similarity: torch.Tensor) -> torch.Tensor:
    """Figure 7, D_j = 1 - mean of S_ij over the i that have it: (|G|, J) -> (J,), NaN where none has."""
    return 1 - torch.nanmean(similarity, dim=0)


# ---- The paper, section 3.3: rewards (Eq 5, 6) and update (Eq 7, 8) --------------------------------------------------

def length_excess(words: int, target: int = 64) -> float:
    """Eq 5, the normalized excess length: 0 up to `target` words before the answer, 1 from twice as many on [code]."""
    excess = (words - target) / target
    return min(max(excess, 0.0), 1.0)

def answer_reward(p_answer: float, excess: float, alpha: float = 0.7, eta: float = 0.05) -> float:
    """Eq 5, r_ans = p(a_i|x,q)^alpha (1 - eta * excess)."""
    return p_answer ** alpha * (1 - eta * excess)

def step_reward_weight(step: int, total_steps: int, lam_max: float = 0.7, warmup_frac: float = 0.3,
                       schedule: str = "ramp") -> float:
    """Eq 6, lambda(t): 0 for the first `warmup_frac` of all steps, then linear to `lam_max` at the last step. `step`
    counts from 1 over the whole run, so a resumed run continues the ramp. Schedule "constant": always `lam_max`."""
    if schedule == "constant":
        return lam_max
    progress = (step / total_steps - warmup_frac) / max(1 - warmup_frac, 1e-9)  # 1 at the last step
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
        log_pi = logp.mean() if reduction == "mean" else logp.sum()  # (T_i,) -> scalar
        losses.append(-advantage * log_pi + beta * divergence.mean())
    return torch.stack(losses).mean()

def token_statistics(hidden: torch.Tensor, ref_hidden: torch.Tensor, token_ids: torch.Tensor, lm_head,
                     temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq 7, log pi(token) and the exact KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)), in nats, at M token
    positions: (M, d), (M, d), (M,) -> (M,), (M,). hidden[m] is the state that predicts token m. The log-softmax is
    float32, at the sampling temperature."""
    logp = torch.log_softmax(lm_head(hidden).float() / temperature, dim=-1)  # (M, V)
    with torch.no_grad():
        ref_logp = torch.log_softmax(lm_head(ref_hidden).float() / temperature, dim=-1)  # (M, V)
    token_logp = logp.gather(-1, token_ids[:, None])[:, 0]  # (M,)
    kl = (logp.exp() * (logp - ref_logp)).sum(dim=-1)  # (M,)
    return token_logp, kl

def advantages(rewards: list[float], baseline: float, kind: str = "ema") -> list[float]:
    """Eq 7, what multiplies log pi, for all rollouts of one question.
    "ema" is the paper's r - b. The others ignore b: "mean" is r - mean of these rewards [ours]; "group" is GRPO's
    (r - mean) / (sd + 1e-3) with their population sd [ours]. With these, a single rollout gets 0."""
    if kind == "ema":
        return [r - baseline for r in rewards]
    mean = statistics.fmean(rewards)
    if kind == "mean":
        return [r - mean for r in rewards]
    sd = statistics.pstdev(rewards)
    return [(r - mean) / (sd + 1e-3) for r in rewards]  # all 0 where all rewards are equal

def update_baseline(baseline: float, mean_reward: float, momentum: float = 0.9) -> float:
    """Eq 7, the EMA baseline: b <- m b + (1 - m) mean(r), after the step that used b. m from the released code."""
    return momentum * baseline + (1 - momentum) * mean_reward

def adapt_kl_coef(beta: float, kl: float, target: float = 0.02, rate: float = 0.10, beta_min: float = 1e-3,
                  beta_max: float = 1.0) -> float:
    """Eq 8, beta <- clip(beta exp(eta (KL - tau) / tau), beta_min, beta_max). A huge or infinite KL gives a bound; a
    KL of NaN leaves beta where it is. The bounds are ours: the rule is an integrator, and with the released code's wide
    bounds beta falls while the KL is small, reacts too late when it rises, and then overshoots."""
    exponent = rate * (kl - target) / target
    if math.isnan(exponent):
        exponent = 0.0
    exponent = min(max(exponent, -700.0), 700.0)  # math.exp overflows at 710
    return min(max(beta * math.exp(exponent), beta_min), beta_max)

def group_rewards(rollouts: list["Rollout"], embeddings: list[torch.Tensor], lam: float, config: Config,
                  question: str = "") -> dict:
    """All rewards of one question, from its N parsed rollouts and their step embeddings, (J_i, d) each, at lambda(t).
    YOUR REWARD HERE, or in a function of your own for `train(config, reward=...)`. "r_sol", a list of N numbers, trains
    the Solver and "r_prop", a number, the Proposer. All else is only logged: everything in rollouts.jsonl, and numbers
    and lists of N numbers (None allowed) also as their mean in metrics.jsonl."""
    n = len(rollouts)
    answers = [rollout.vote for rollout in rollouts]
    valid = [a for a in answers if a is not None]
    p = answer_distribution(answers)
    a_hat, group = dominant_group(answers)
    r_step = step_agreement(embeddings, group, n, config.gamma, config.position_decay, config.min_group_size)
    r_step = r_step.tolist()

    r_ans = [0.0] * n  # what an invalid rollout keeps
    for i, a in enumerate(answers):
        if config.answer_reward == "discrete":
            r_ans[i] = float(i in group)
        elif a is not None:
            excess = length_excess(rollouts[i].words_before_answer, config.target_words)
            r_ans[i] = answer_reward(p[a], excess, config.alpha, config.eta)
    r_sol = [mix_rewards(r_ans[i], r_step[i], lam) for i in range(n)]

    # [ours] H of the valid rollouts, times their share below: with invalid ones as outcomes, a question that breaks two
    # of five rollouts would earn nearly the maximum
    entropy_valid = answer_entropy(valid)
    if config.answer_reward == "discrete":
        r_prop = float(1 < len(group) < len(valid))  # some, but not all, valid rollouts agree
    else:
        r_prop = entropy_reward(entropy_valid, config.entropy_mu, config.entropy_sigma)
    r_prop *= len(valid) / n

    rewards = {"r_sol": r_sol, "r_prop": r_prop, "r_ans": r_ans, "r_step": r_step}
    rewards["entropy"] = answer_entropy(answers)
    rewards["entropy_valid"] = entropy_valid
    rewards |= group_statistics(embeddings, group, n, config)
    return rewards

def group_statistics(embeddings, group, num_rollouts, config):
    """What Figures 3, 5 and 7 show of one question's majority group; only logged."""
    r_ij = step_similarity(embeddings, group, config.min_group_size)  # (|G|, J)
    step_cosine = [None] * num_rollouts
    for i, cosine_i in zip(group, r_ij.nanmean(dim=1).tolist()):
        step_cosine[i] = cosine_i
    comparable = (~r_ij.isnan()).any(dim=0)
    return {
        "majority": [i in group for i in range(num_rollouts)],
        "group_size": len(group),
        "density": group_density(len(group), num_rollouts, config.gamma) if group else 0.0,
        "step_cosine": step_cosine,
        "comparable_steps": int(comparable.sum()),
        "leave_one_out": leave_one_out_similarity(embeddings, group).tolist(),
    }


# ---- Parsing: what a model wrote (section 3.1). Nothing here raises, on any text; all of it is linear or quadratic ---

@dataclass
class Rollout:
    """One Solver reply, parsed."""
    text: str
    think: str
    steps: list[str]
    answer: str | None           # raw text of the last complete <answer>...</answer>; None without one
    words_before_answer: int     # before the last complete <answer>, else the first open one, else all; without tags

    @property
    def vote(self) -> str | None:
        """a_i, the normalized answer; None if the rollout is invalid: no complete <answer>, or an empty one."""
        return normalize_answer(self.answer or "") or None

# The innermost pair: no other tag inside
_QUESTION_TAG = re.compile(r"<question>((?:(?!</?question>).)*)</question>", re.I | re.S)
# Leaves out a label such as "**Question 1:**"
_UNTAGGED_QUESTION = re.compile(r"[\s#>*_-]*(?:question[\s*_\d]{0,9}:[\s*_]*)?(.*?[?？])", re.I)

def parse_question(text: str) -> str | None:
    """The question in the Proposer's reply, on one line, or None: the content of <question>...</question>, else the
    first line with a question mark, up to the mark."""
    tagged = _QUESTION_TAG.search(text)
    candidates = []
    if tagged:
        candidates.append(tagged[1])
    else:
        for line in re.split(r"\n|</?question>", text, flags=re.I):
            if "?" in line or "？" in line:
                candidates.append(_UNTAGGED_QUESTION.match(line)[1])
    for candidate in candidates:
        if re.search(r"\w", candidate):
            return " ".join(candidate.split())
    return None

_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.I | re.S)
# Some chat templates open <think> themselves
_THINK = re.compile(r"(?:.*?<think>)?(.*?)(?:</think>|\Z)", re.I | re.S)

def parse_rollout(text: str, max_steps: int = 8) -> Rollout:
    """Splits a Solver reply into trace t_i, steps s_ij and answer a_i (section 3.1).

    >>> parse_rollout("<think>Step 1: red is 3\\nStep 2: 3 + 4 = 7</think><answer> 7 </answer>").steps
    ['red is 3', '3 + 4 = 7']
    """
    answers = list(_ANSWER_TAG.finditer(text))
    if answers:
        answer = answers[-1][1].strip()  # the last one: models correct themselves
        before = text[:answers[-1].start()]
    else:
        answer = None
        before = re.split("<answer>", text, maxsplit=1, flags=re.I)[0]
    think = _THINK.match(before)[1].strip()
    words = re.sub(r"</?(?:think|answer|step)>", " ", before, flags=re.I).split()
    return Rollout(text, think, split_steps(think, max_steps), answer, len(words))

# Labels of steps, each with its number. The group "line" matches where the label begins a line, perhaps behind
# markdown; in a tag it always matches
_STEP_TAG = re.compile(r"(?P<line>)<step[^<>]{0,30}>(?:\s*step ?(?P<number>\d{1,3})[:.)-])?", re.I)
_STEP_WORD = re.compile(
    r"(?:(?P<line>^[ \t#>*_+•-]*(?:\d{1,2}[.)] ?)?)|(?<=\s)(?:\*\*|__)?)step ?#?(?P<number>\d{1,3})(?:\*\*|__)? ?"
    r"(?:[:)\]–—]|\.(?!\d)|-(?=\s)|$)(?:\*\*|__)?", re.I | re.M)
_NUMBERED = re.compile(r"(?P<line>^[ \t#>*_+•-]*)\(?(?P<number>\d{1,2})[.)](?!\d)(?:\*\*|__)?", re.M)
_MENTION = re.compile(r"\b(?:in|of|from|by|to|with|after|before|see|using|at|as|and|or|for|than|on) +\Z", re.I)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!Fig\.)\s+|(?<=[。！？])|\n\s*")

def split_steps(think: str, max_steps: int = 8) -> list[str]:
    """The numbered claims of a trace, in order, at most `max_steps` (section 3.2: s_i1 ... s_iJ).
    Reads `Step 1:`, `Step 1 -`, `1.`, `1)`, each also behind markdown, and <step>...</step>, in any case. Lines that
    follow a label belong to its step. The label decides the position, so that step j of one trace stands beside step
    j of another: what stands before `Step 1` is dropped, what stands before a first `Step 2` is step 1, and a step
    that is empty or missing is "". Without any label, sentences are the steps.

    >>> split_steps("I look first.\\n**Step 1:** 3.5 is\\n  the height\\n2) so\\nstep 2 - it fits")
    ['3.5 is the height 2) so', 'it fits']
    >>> split_steps("red shows 3\\nStep 2: in Step 1: I looked\\nStep 4: 3 is odd")
    ['red shows 3', 'in Step 1: I looked', '', '3 is odd']
    """
    think = re.sub("</step>", "", think, flags=re.I)
    labels = find_labels(think)
    if labels:
        steps = []
        if labels[0][0] > 1:
            steps.append(think[:labels[0][1].start()])  # the claim before a first "Step 2"
        ends = [label.start() for _, label in labels[1:]] + [len(think)]
        for (position, label), end in zip(labels, ends):
            while len(steps) < position - 1:
                steps.append("")  # a number that was left out
            claim = think[label.end():end]
            # Drop the other half of a bold that began in the label: "**Step 1: a**"
            if label[0].count("**") == 1:
                claim = claim.replace("**", "", 1)
            steps.append(claim)
    else:
        sentences = _SENTENCE_END.split(think)
        claims = [sentence for sentence in sentences if re.search(r"\w", sentence)]
        steps = [re.sub(r"\A[#>*+•-]+\s", "", claim) for claim in claims]  # without bullets
    steps = [" ".join(step.split()) if re.search(r"\w", step) else "" for step in steps]
    steps = steps[:max(max_steps, 0)]
    return steps if any(steps) else []

def find_labels(think):
    """(position from 1, match) of each label. Only the first of the three styles that the trace has is looked for."""
    for pattern in (_STEP_TAG, _STEP_WORD, _NUMBERED):
        labels = []
        expected = 1
        for label in pattern.finditer(think):
            number = int(label["number"] or expected)
            # Inside a line only the next number is a label, and not "as in Step 2: ..."
            if label["line"] is None:
                is_next = number == expected or (number == 2 and not labels)
                if not is_next or _MENTION.search(think[max(label.start() - 12, 0):label.start()]):
                    continue
            # A number that repeats, goes back or leaps further is a slip: the next position
            position = number if expected < number <= expected + 8 else expected
            labels.append((position, label))
            expected = position + 1
        if labels:
            return labels
    return []

# Minus signs and hyphens; what has no width disappears
_FOLDED_CHARACTERS = {**dict.fromkeys(map(ord, "−–‐‑"), "-"), ord("\u200b"): None, ord("\ufeff"): None}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORD = re.compile(rf"(?<![^\W_])(?:{'|'.join(_NUMBER_WORDS)})(?![^\W_])")
_ARTICLE = re.compile(r"(?:a|an|the)\s+(?!or\b|and\b)")  # but not in "A or B"
_WRAPPERS = [*((f"\\{name}{{", "}") for name in ("boxed", "text", "textbf", "mathrm", "mathbf")), ("\\(", "\\)"),
             ("\\[", "\\]"), ("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("‘", "’"), ("«", "»"),
             *((mark, mark) for mark in ("**", "__", "$$", "*", "_", "$", "`", '"', "'"))]
# "-$1,000.50", "$-3", ".5", "12 %", "3km"
_QUANTITY = re.compile(r"(?P<sign>[+-]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<late_sign>[+-]?)\s*"
                       r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
                       r"(?:\s*(?P<percent>%)(?P<rest>.*)|\s*(?P<unit>[^\W\d_].*))?", re.S)

def normalize_answer(text: str) -> str:
    """Folds the ways of writing one answer into one string, for voting (Eq 1). Idempotent on any string.
    Case, white space, surrounding quotes, brackets, markdown and LaTeX, a trailing full stop, thousands separators and
    Unicode minus signs are folded. Numbers equal in value become equal, and zero to twelve in words are numbers; a unit
    may touch its number; a leading article is dropped. A sign, a decimal point, a percent or currency sign keep their
    meaning.

    >>> [normalize_answer(a) for a in ("**7.0**", "$7$", "-5", "5 %", ".50", "1,000km", "(B).", "The cat", "Seven")]
    ['7', '7', '-5', '5%', '0.5', '1000 km', 'b', 'cat', '7']
    """
    text = text.translate(_FOLDED_CHARACTERS).casefold()
    text = _NUMBER_WORD.sub(lambda word: str(_NUMBER_WORDS.index(word[0])), text)
    before = None
    while text != before:  # until nothing changes, since one form may hide another: **$7.$**
        before = text
        text = re.sub(r"\\([%$])", r"\1", text)  # LaTeX writes \% and \$
        text = " ".join(text.split())
        text = unwrap(text).rstrip(" .")
        article = _ARTICLE.match(text)
        if article:
            text = text[article.end():]
        text = normalize_number(text)
    return text

def unwrap(text):
    """The text without one pair of quotes, brackets, markdown or LaTeX around it: "(a)" -> "a", not "(a) or (b)"."""
    for left, right in _WRAPPERS:
        if len(text) < len(left + right) or not text.startswith(left) or not text.endswith(right):
            continue
        inner = text[len(left):len(text) - len(right)]
        if left == right:
            is_pair = left not in inner  # not '"a" or "b"'
        else:
            opening = left[-1]
            closing = right[-1]
            is_pair = inner.count(opening) == inner.count(closing) and inner.find(opening) <= inner.find(closing)
        if is_pair:
            return inner.strip()
    return text

def normalize_number(text):
    """A number, with its sign, currency, percent sign or unit, in one form: "+1,000.50KM" -> "1000.5 KM"."""
    match = _QUANTITY.fullmatch(text)
    if not match or (match["sign"] and match["late_sign"]):
        return text
    number = Decimal(match["number"].replace(",", ""))
    digits = format(number, "f")  # never 1E+3
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    negative = number and "-" in (match["sign"], match["late_sign"])  # -0 is 0
    sign = "-" if negative else ""
    tail = ""
    if match["percent"]:
        tail = "%" + match["rest"]
    elif match["unit"]:
        tail = " " + match["unit"]
    return sign + match["currency"] + digits + tail


# ---- Policy: one frozen backbone, two LoRA adapters, one mechanism for sampling, gradient and reference (Eq 7) -------

ROLES = ("solver", "proposer")
LORA_TARGETS = r".*\.(language|text)_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
# What clients of an adapter need
TEXT_FILES = ("*token*", "*vocab*", "*merges*", "*template*", "*processor*")

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
    mask: torch.Tensor            # (B, P), 1 for real tokens; once repeated (rows, P + room)
    next_position: torch.Tensor   # (B,) rotary position of the first completion token
    hidden: torch.Tensor          # (B, d) hidden state that predicts the first completion token

    def repeat_for_scoring(self, n, room):
        """Every prompt n times in a row, with `room` for more tokens in the mask. The cache grows by concatenation,
        which passes gradients on to the prompt. It is changed in place: this prefill is used up."""
        self.cache.batch_repeat_interleave(n)
        return self.repeat_with(self.cache, n, room)

    def repeat_for_sampling(self, n, room):
        """Every prompt n times in a row, in a cache allocated in full, so that no new token copies the old ones."""
        from transformers.cache_utils import Cache, StaticLayer
        length = self.mask.shape[1] + room
        layers = []
        for once in self.cache.layers:
            layer = StaticLayer(max_cache_len=length)
            layer.update(once.keys.repeat_interleave(n, 0), once.values.repeat_interleave(n, 0))
            layers.append(layer)
        return self.repeat_with(Cache(layers=layers), n, room)

    def repeat_with(self, cache, n, room):
        """The rest of a repeated prefill. The mask covers tokens to come too; the model hides what is not there yet."""
        mask = F.pad(self.mask, (0, room), value=1).repeat_interleave(n, 0)
        next_position = self.next_position.repeat_interleave(n)
        return Prefill(cache, mask, next_position, self.hidden.repeat_interleave(n, 0))

class Policy:
    """A vision-language model with the adapters "solver" and "proposer" on one frozen backbone. `hf` is the model of
    transformers, into which PEFT has put the adapters, `peft` the PeftModel around it, `stop_ids` the set of
    end-of-turn token ids.
    The reference policy of Eq 7 is the same backbone with its adapters off, so it costs no memory and cannot drift.
    Wherever a role is asked for, None means the reference."""

    def __init__(self, config, backbone=None):
        """`backbone` is a (model, tokenizer, processor) to use instead of loading `config.model`."""
        self.config = config
        self.device = resolve_device(config.device)
        self.hf, self.tokenizer, self.processor = backbone or load_backbone(config, self.device)
        self.lm_head = self.hf.get_output_embeddings()  # apart: only completions need logits
        self.image_token_id = self.hf.config.image_token_id
        eos = self.hf.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]  # checkpoints have one or several
        self.stop_ids = {self.tokenizer.eos_token_id, *eos} - {None}
        # The Qwen-VL models have positions in time, height and width
        self.has_3d_positions = hasattr(self.hf.model, "get_rope_index")
        arguments = inspect.signature(self.hf.model.forward).parameters
        # Families name the mask of image tokens differently, or have none
        self.image_mask_name = None
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in arguments:
                self.image_mask_name = name
        with blame(f"--model {config.model}: no adapters fit a {self.hf.config.model_type} model"):
            self.add_adapters()

    # ---- adapters
    def add_adapters(self):
        """Puts PEFT's LoRA into the language model's blocks, in float32; the vision tower stays frozen. B starts at
        zero, so both roles start as the reference."""
        from peft import LoraConfig, get_peft_model
        config = self.config
        lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                          target_modules=LORA_TARGETS)
        with torch.random.fork_rng(devices=[]):
            # A seed of its own, so that every rank starts with the same adapters
            torch.default_generator.manual_seed(derive_seed(config.seed, "adapters"))
            self.peft = get_peft_model(self.hf, lora, adapter_name="solver")
            self.peft.add_adapter("proposer", dataclasses.replace(lora))
        folder = Path(config.model)
        for adapter_config in self.peft.peft_config.values():
            name = str(folder.absolute()) if folder.is_dir() else config.model
            adapter_config.base_model_name_or_path = name

    @contextlib.contextmanager
    def adapter(self, role):
        """Runs the block as a role, which stays active after it for the backward pass, or as the reference for None.
        Blocks do not nest. Call backward() before another role's block: PEFT's `set_adapter` turns `requires_grad` off
        for all other adapters. (Gradient checkpointing of the decoder, if you add it, must not cross roles either.)"""
        # LoRA dropout acts in train mode: where gradients flow
        self.hf.get_decoder().train(torch.is_grad_enabled())
        if role is None:
            with self.peft.disable_adapter():
                yield
        else:
            self.peft.set_adapter(role)
            yield

    def lora_weights(self, role):
        """A role's trainable parameters, whether it is active or not."""
        return [weight for name, weight in self.hf.named_parameters() if f".{role}." in name]

    def save(self, folder: Path):
        """Writes folder/solver and folder/proposer, PEFT adapters with the backbone's tokenizer and processor files,
        copied byte for byte, since what one version of transformers writes may not load in an older one."""
        weights = {name: w.detach().cpu() for name, w in self.peft.named_parameters() if ".lora_" in name}
        self.peft.save_pretrained(str(folder), selected_adapters=list(ROLES), state_dict=weights,
                                  save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        source = checkpoint_folder(self.config.model)
        for pattern in TEXT_FILES:
            for file in source.glob(pattern):
                for role in ROLES:
                    shutil.copyfile(file, folder / role / file.name)

    def load(self, role: str, folder: Path):
        """Reads a PEFT adapter folder into a role. Raises UserError if it is damaged or does not fit."""
        from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
        config = self.config
        settings = adapter_settings(folder)
        with blame(f"{folder}: does not fit --model {config.model}, or this run's --lora_r or --lora_alpha"):
            new = load_peft_weights(str(folder), device="cpu")
            old = get_peft_model_state_dict(self.peft, adapter_name=role)
            new_shapes = {name: w.shape for name, w in new.items()}
            old_shapes = {name: w.shape for name, w in old.items()}
            if new_shapes != old_shapes:
                raise ValueError("its matrices have other names or shapes")
            if settings["lora_alpha"] / settings["lora_r"] != config.lora_alpha / config.lora_r:
                raise ValueError("it has another scale lora_alpha / r")
            if not all(w.isfinite().all() for w in new.values()):
                raise ValueError("it is not finite")
            set_peft_model_state_dict(self.peft, new, adapter_name=role)

    # ---- prompts
    @functools.cached_property
    def template(self):
        """The chat template of a turn with one image: what stands before its text, and the token ids behind it."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT-TEXT-SLOT"}]}
        chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        head, tail = chat.split("PROMPT-TEXT-SLOT")  # the text is tokenized apart
        return head, self.tokenizer(tail, add_special_tokens=False)["input_ids"]

    def preprocess(self, image):
        """(token ids of the chat template up to the text, inputs of the vision tower) for one image."""
        head, _ = self.template
        if hasattr(self.processor, "tokenizer"):
            bos = self.tokenizer.bos_token
            add_bos = bool(bos) and not head.startswith(bos)  # some templates write it themselves
            inputs = self.processor(text=[head], images=[image], return_tensors="pt", add_special_tokens=add_bos)
            ids = inputs["input_ids"][0].tolist()
        else:  # as the processor of the Qwen-VL models does: a placeholder for each visual token
            inputs = self.processor(images=[image], return_tensors="pt")
            visual_tokens = int(inputs["image_grid_thw"].prod()) // self.processor.merge_size ** 2
            head = head.replace("<|image_pad|>", "<|image_pad|>" * visual_tokens)
            ids = self.tokenizer(head)["input_ids"]
        of_vision = {}
        for name, value in inputs.items():
            if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                dtype = self.hf.dtype if value.is_floating_point() else value.dtype
                of_vision[name] = value.to(self.device, dtype)
        return ids, of_vision

    @torch.no_grad()
    def encode(self, image):
        """Runs the vision tower. Each image alone, so that no number depends on the rest of a batch."""
        ids, inputs = self.preprocess(image)
        # Each family wants other inputs beside the pixels: grids, image sizes
        accepted = inspect.signature(self.hf.model.get_image_features).parameters
        arguments = {name: value for name, value in inputs.items() if name in accepted}
        out = self.hf.model.get_image_features(**arguments, return_dict=True)
        features = {}
        for name in ("pooler_output", "deepstack_features"):  # Qwen3-VL also feeds deeper layers
            if out.get(name) is not None:
                features[name] = out[name]
        return EncodedImage(ids, features, inputs.get("image_grid_thw"))

    def encode_prompts(self, prompts):
        """The same prompts with every PIL image encoded."""
        encoded = []
        for prompt in prompts:
            if not isinstance(prompt.image, EncodedImage):
                prompt = Prompt(self.encode(prompt.image), prompt.text)
            encoded.append(prompt)
        return encoded

    def tokenize(self, text):
        """Token ids of model or user text; special tokens that are spelled out in it become ordinary characters."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenized
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, prompt):
        """The token ids of an encoded prompt: the chat template around its text."""
        _, tail = self.template
        return prompt.image.ids + self.tokenize(prompt.text) + tail

    def prefill(self, prompts):
        """Runs encoded prompts through the active adapter once and keeps their keys and values."""
        from transformers import DynamicCache
        from transformers.utils import ModelOutput
        rows = [self.prompt_ids(p) for p in prompts]
        longest = max(len(row) for row in rows)
        # On the left, so that all completions begin in one column
        padded = [[0] * (longest - len(row)) + row for row in rows]
        ids = torch.tensor(padded, device=self.device)  # (B, P)
        lengths = torch.tensor([[len(row)] for row in rows], device=self.device)  # (B, 1)
        columns = torch.arange(longest, device=self.device)
        mask = (columns >= longest - lengths).long()  # (B, P)
        is_image = ((ids == self.image_token_id) & (mask == 1)).int()  # (B, P)
        more = {}
        if self.image_mask_name:
            more[self.image_mask_name] = is_image
        if self.has_3d_positions:
            grids = torch.cat([p.image.grid for p in prompts])  # (B, 3)
            positions, _ = self.hf.model.get_rope_index(
                ids, mm_token_type_ids=is_image, image_grid_thw=grids, attention_mask=mask)  # (3, B, P)
            # A prompt ends in text, whose time, height and width are equal
            last = positions[0, :, -1]
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)  # (B, P)
            last = positions[:, -1]
        features = {}
        for name in prompts[0].image.features:
            features[name] = concatenate([p.image.features[name] for p in prompts])
        # Made without a config, it keeps all keys: layers with a sliding window would drop old ones
        cache = DynamicCache()
        # Image features that are there already, so that the vision tower does not run again
        more["mm_encoder_outputs"] = {"image": ModelOutput(features)}
        out = self.hf.model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache,
                            use_cache=True, **more)
        return Prefill(cache, mask, last + 1, out.last_hidden_state[:, -1])

    def extend(self, prefill, ids, done=0):
        """Hidden states (rows, T, d) of `ids` (rows, T), which follow a repeated prefill and `done` tokens after it."""
        offsets = done + torch.arange(ids.shape[1], device=self.device)
        positions = prefill.next_position[:, None] + offsets  # (rows, T)
        if self.has_3d_positions:
            positions = positions.expand(3, -1, -1)  # text has equal time, height and width
        out = self.hf.model(input_ids=ids, attention_mask=prefill.mask, position_ids=positions,
                            cache=prefill.cache, use_cache=True)
        return out.last_hidden_state

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
        uniforms = uniform_numbers(seeds, num_samples, max_new_tokens).to(self.device)  # (rows, R)
        stop = torch.tensor(sorted(self.stop_ids), dtype=torch.long, device=self.device)
        finished = torch.zeros(len(uniforms), dtype=torch.bool, device=self.device)  # (rows,)
        token_ids = []  # each (rows, 1)
        logprobs = []
        with self.adapter(role):
            prefill = self.prefill(self.encode_prompts(prompts))
            rows = prefill.repeat_for_sampling(num_samples, max_new_tokens)
            hidden = rows.hidden  # (rows, d)
            for t in range(max_new_tokens):  # rows that have finished go on, and are cut in the end
                if t > 0:
                    hidden = self.extend(rows, tokens, done=t - 1)[:, 0]
                logits = self.lm_head(hidden).float() / (temperature or 1.0)  # (rows, V)
                logp = torch.log_softmax(logits, dim=-1)
                if temperature:
                    tokens = draw(logp, uniforms[:, t])  # (rows, 1)
                else:
                    tokens = logp.argmax(-1, keepdim=True)
                token_ids.append(tokens)
                logprobs.append(logp.gather(-1, tokens))
                finished |= torch.isin(tokens[:, 0], stop)
                if finished.all():
                    break
        all_ids = torch.cat(token_ids, dim=1).tolist()  # (rows, R)
        all_logprobs = torch.cat(logprobs, dim=1).cpu()
        completions = [self.completion(ids, logp) for ids, logp in zip(all_ids, all_logprobs)]
        return [completions[i:i + num_samples] for i in range(0, len(completions), num_samples)]

    def completion(self, ids, logprobs):
        """The completion in a row of sampled tokens, which ends with the first end-of-turn token."""
        stops = [t for t, token in enumerate(ids) if token in self.stop_ids]
        # With the end-of-turn token: to stop is an action too, and is credited
        length = stops[0] + 1 if stops else len(ids)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Completion(ids[:length], logprobs[:length].clone(), text, finished=bool(stops))

    def score(self, role: str | None, prompt: Prompt, completions: list[Completion],
              temperature: float = 1.0) -> Scores:
        """Log-probabilities of sampled completions, conditioned on the image, and their KL to the reference. The role
        stays active, for the backward pass."""
        prompt = self.encode_prompts([prompt])[0]
        all_ids = [token for c in completions for token in c.token_ids]
        token_ids = torch.tensor(all_ids, device=self.device)  # (M,)
        with torch.no_grad(), self.adapter(None):
            ref_hidden = self.completion_hidden(prompt, completions)  # (M, d)
        hidden = ref_hidden
        if role is not None:
            with self.adapter(role):
                hidden = self.completion_hidden(prompt, completions)  # (M, d)
        logprobs = []
        kl = []
        # Chunks bound the logits, 512 x 152,000 numbers for Qwen2.5-VL
        for start in range(0, len(token_ids), 512):
            chunk = slice(start, start + 512)
            # `checkpoint` frees the logits at once; the backward pass computes each chunk again
            chunk_logprobs, chunk_kl = checkpoint(
                token_statistics, hidden[chunk], ref_hidden[chunk], token_ids[chunk], self.lm_head, temperature,
                use_reentrant=False)
            logprobs.append(chunk_logprobs)
            kl.append(chunk_kl)
        lengths = [len(c.token_ids) for c in completions]
        return Scores(list(torch.cat(logprobs).split(lengths)), list(torch.cat(kl).split(lengths)))

    def completion_hidden(self, prompt, completions):
        """Hidden states that predict the completions' tokens, (M, d). The prompt is prefilled once for all N, also with
        gradients: P + N R tokens go through the model instead of N (P + R)."""
        lengths = [len(c.token_ids) for c in completions]
        longest = max(lengths)
        # On the right: no token sees what comes after it
        rows = [c.token_ids + [0] * (longest - len(c.token_ids)) for c in completions]
        ids = torch.tensor(rows, device=self.device)  # (N, R)
        prefill = self.prefill([prompt]).repeat_for_scoring(len(rows), longest - 1)
        hidden = prefill.hidden[:, None]  # (N, 1, d)
        if longest > 1:
            later = self.extend(prefill, ids[:, :-1])  # (N, R - 1, d)
            hidden = torch.cat([hidden, later], dim=1)  # (N, R, d)
        return torch.cat([h[:length] for h, length in zip(hidden, lengths)])

    @torch.no_grad()
    def embed_steps(self, steps: list[str]) -> torch.Tensor:
        """f(s) of section 3.2: the l2-normalized sum, so also the mean, of a step's token embeddings: (J, d), CPU."""
        table = self.hf.get_input_embeddings().weight
        e = torch.zeros(len(steps), table.shape[1])  # (J, d); an empty step stays zero
        for j, step in enumerate(steps):
            ids = self.tokenize(step)[:self.config.embed_max_tokens]
            rows = table[torch.tensor(ids, dtype=torch.long, device=self.device)]
            e[j] = rows.float().sum(dim=0)
        return F.normalize(e, dim=-1)

def uniform_numbers(seeds, num_samples, length):
    """A stream of uniform numbers per completion, (B N, length), float64, keyed by the seed of its prompt and by the
    number of the sample."""
    rows = []
    for seed in seeds:
        for n in range(num_samples):
            generator = torch.Generator().manual_seed(derive_seed(seed, n))
            rows.append(torch.rand(length, dtype=torch.float64, generator=generator))
    return torch.stack(rows)

def draw(logp, uniform):
    """Tokens (rows, 1) from log-probabilities (rows, V): inverts the distribution function, in float64."""
    cdf = logp.double().exp().cumsum(-1)  # (rows, V)
    heights = uniform[:, None] * cdf[:, -1:]  # the last value of cdf is 1 but for rounding
    return torch.searchsorted(cdf, heights, right=True).clamp_max(cdf.shape[-1] - 1)

def concatenate(values):
    """Joins image features: tensors, tuples of them (one per image), or lists of such (one per layer, as Qwen3-VL)."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if torch.is_tensor(values[0][0]):
        return tuple(tensor for value in values for tensor in value)
    return [concatenate(list(layer)) for layer in zip(*values)]

def resolve_device(name: str) -> torch.device:
    """The torch device of a --device setting; under torchrun each rank takes the GPU of its LOCAL_RANK."""
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in [f"cuda:{index}" for index in range(found)]:
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N; PyTorch sees {found} GPUs. See README")
    return torch.device(name)

def load_backbone(config, device):
    """(model, tokenizer, processor) of a checkpoint, the model frozen; for the Qwen-VL models, the image processor."""
    import transformers
    from transformers.utils.versions import require_version
    transformers.logging.disable_progress_bar()
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    with blame(f"--model {config.model}: not a complete vision-language chat model, here or on the Hugging Face Hub"):
        require_version("transformers>=5.24")  # older ones take the argument `cache` and forget it
        hf, info = transformers.AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=getattr(torch, dtype), output_loading_info=True)
        wrong = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if wrong:
            raise ValueError(f"its files lack {len(wrong)} weights, such as {wrong[0]}")
        text_config = hf.config.get_text_config()
        if getattr(text_config, "final_logit_softcapping", None) or getattr(text_config, "logit_scale", 1) != 1:
            raise ValueError("its logits are not lm_head(hidden)")
        # Their whole processor needs torchvision, for videos
        if hf.config.model_type.startswith("qwen"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
            processor = transformers.AutoImageProcessor.from_pretrained(config.model, backend="pil")
            smallest = min(processor.size["shortest_edge"], config.max_pixels)
            # These are areas, despite their names
            processor.size = {"shortest_edge": smallest, "longest_edge": config.max_pixels}
        else:
            processor = transformers.AutoProcessor.from_pretrained(config.model)
            tokenizer = processor.tokenizer
        if not tokenizer.chat_template:
            raise ValueError("it has no chat template")
    return hf.to(device).eval(), tokenizer, processor

def checkpoint_folder(model):
    """The folder of a checkpoint: `model` itself, or where the Hugging Face Hub's tokenizer files are kept here."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    with blame(f"{model}: neither a folder nor found on the Hugging Face Hub"):
        return Path(snapshot_download(model, allow_patterns=list(TEXT_FILES)))

def adapter_settings(folder):
    """What a PEFT adapter folder says of its LoRA: the settings that a Policy for it needs. Raises UserError."""
    with blame(f"{folder}: no usable PEFT adapter. Name a step_* folder of a run, or its solver/ folder"):
        peft = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(peft, dict) or any(peft.get(kind) for kind in ("use_rslora", "use_dora", "rank_pattern")):
            raise ValueError("a kind of LoRA that does not fit a Policy")
        return {"lora_r": peft["r"], "lora_alpha": peft["lora_alpha"], "model": peft["base_model_name_or_path"]}


# ---- Learner: one role's optimizer, baseline and beta (Eq 7, 8) ------------------------------------------------------

class ZeroLoss(torch.nn.Module):
    """A loss of 0 on a role's parameters. Its backward pass under DistributedDataParallel, which averages over the
    ranks whatever gradients the parameters hold by then, is the one exchange of an update. A rank without a rollout
    takes part like any other, so none waits."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)

    def forward(self) -> torch.Tensor:
        return sum(weight.sum() for weight in self.weights) * 0.0

class Learner:
    """What one role carries from step to step: its optimizer, baseline b and KL coefficient beta."""

    def __init__(self, policy, role):
        config = policy.config
        self.policy = policy
        self.role = role
        self.beta = config.kl_coef
        self.baseline = None
        self.skips_in_a_row = 0
        self.weights = policy.lora_weights(role)
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.lr, weight_decay=config.weight_decay)
        self.exchange = None
        if world_size() > 1:
            with policy.adapter(role):  # DDP takes the parameters that require gradients now
                self.exchange = torch.nn.parallel.DistributedDataParallel(ZeroLoss(self.weights))
                # DDP orders its buckets, and so its sums, after its first pass: make that one now
                self.exchange().backward()

    def update(self, prompts: list[Prompt], completions: list[list[Completion]], rewards: list[list[float]]) -> dict:
        """One optimizer step over all rollouts of all ranks (Eq 7), then the baseline and beta (Eq 8). The lists have
        one entry per question of this rank. Returns what to log. If the gradient norm or the KL is not finite, all
        ranks skip the update together; the fifth skip in a row raises UserError."""
        config = self.policy.config
        local_sum = sum(sum(r) for r in rewards)
        local_count = sum(len(r) for r in rewards)
        reward_sum, count = all_sum(local_sum, local_count)
        if count == 0:  # no rank got a question to work on
            return {}
        mean_reward = reward_sum / count
        # b starts at the first mean [ours]
        baseline = mean_reward if self.baseline is None else self.baseline
        # With one sample per image, the other kinds would give the Proposer 0
        kind = config.advantage if self.role == "solver" else "ema"

        self.optimizer.zero_grad(set_to_none=True)
        kl_sum = 0.0
        for prompt, replies, r in zip(prompts, completions, rewards):
            # From all N rewards, before the rollouts are cut into gradient passes
            a = advantages(r, baseline, kind)
            for start in range(0, len(replies), config.score_rollouts):
                part = slice(start, start + config.score_rollouts)
                scores = self.policy.score(self.role, prompt, replies[part], config.temperature)
                loss = reinforce_loss(scores.logprobs, scores.kl, a[part], self.beta, config.logprob_reduction)
                # The share of this pass in the mean over all rollouts of all ranks
                share = len(replies[part]) / count
                (loss * share * world_size()).backward()  # DDP will divide by the number of ranks
                kl_sum += sum(kl.mean().item() for kl in scores.kl)
        # p.grad holds this rank's sum; the backward pass of a zero loss makes DDP average it
        if self.exchange:
            with self.policy.adapter(self.role):
                self.exchange().backward()

        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, config.grad_clip).item()
        kl = all_sum(kl_sum)[0] / count
        # Both are the same on all ranks
        skipped = not (math.isfinite(grad_norm) and math.isfinite(kl))
        stats = {"kl": kl, "beta": self.beta, "baseline": baseline}
        stats |= {"grad_norm": grad_norm, "skipped": int(skipped)}
        if skipped:
            self.skips_in_a_row += 1
            if self.skips_in_a_row == 5:
                raise UserError(f"the {self.role}'s loss or gradient was not finite in 5 updates in a row. Look at "
                                "metrics.jsonl; lower --lr, or try --dtype float32", status=1)
            return stats
        self.skips_in_a_row = 0
        self.optimizer.step()
        self.baseline = update_baseline(baseline, mean_reward, config.baseline_momentum)
        self.beta = adapt_kl_coef(self.beta, kl, config.kl_target, config.kl_adapt_rate,
                                  config.kl_coef_min, config.kl_coef_max)
        return stats


# ---- Ranks: torchrun starts one process per GPU; every printed or decided number is global ---------------------------

def world_size():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    """The number of this process among them; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0

def say(text):
    """Prints a line, once for all ranks: any text, on any terminal. Where the reader has gone (`| head`), it goes on in
    silence."""
    if rank() != 0 or sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        sys.stdout = None

def join_ranks(device):
    """Joins the process group of torchrun, if torchrun started us: nccl (RCCL on ROCm) on GPUs, gloo on the CPU."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    patience = timedelta(minutes=10)  # how long a rank may keep the others waiting
    with blame("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not as torchrun sets them"):
        store, number, size = next(rendezvous("env://", timeout=patience))
        # torchrun keeps its store over a restart: without a prefix the ranks would look for the dead ones' addresses
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=patience)

def gather(value):
    """The values of all ranks, in order of rank, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def all_sum(*values):
    """Each value summed over all ranks."""
    return [sum(column) for column in zip(*gather(values))]

@contextlib.contextmanager
def stop_signals():
    """Inside the block SIGTERM and SIGINT (preemption, Ctrl-C) only join a list, and the step in flight is finished."""
    caught = []
    with contextlib.ExitStack() as handlers:  # puts the old ones back
        for number in (signal.SIGTERM, signal.SIGINT):
            # Outside the main thread Python takes no handlers
            with contextlib.suppress(ValueError):
                old = signal.signal(number, lambda number, frame: caught.append(number))
                handlers.callback(signal.signal, number, old)
        yield caught


# ---- Images ----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

def list_images(data: tuple[str, ...]) -> tuple[Path, ...]:
    """The image files of folders (recursive, none hidden), each file once, in a fixed order."""
    found = {}  # by real path: folders may overlap
    for folder in data:
        paths = []
        for root, subfolders, names in os.walk(folder):
            # In place, since os.walk goes on with this list
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    paths.append(Path(root, name))
        if not paths:
            raise UserError(f"--data {folder!r}: no folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for path in sorted(paths):
            found.setdefault(os.path.realpath(path), path)
    return tuple(found.values())

def load_image(path: Path) -> Image.Image:
    """An upright RGB image: first frame, EXIF rotation, alpha on white. Integers of more than 8 bits are taken for 16
    bits, floating-point numbers for shares of 1. Raises UserError."""
    with blame(f"{path}: cannot be read as an image"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # convert() would clip, not scale
            top = 1.0 if image.mode == "F" else 65535.0
            shares = numpy.asarray(image, dtype=numpy.float64) / top
            image = Image.fromarray((shares.clip(0, 1) * 255).round().astype("uint8"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        if max(image.size) >= 200 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels is too narrow")
        return image.convert("RGB")

class ImageStream:
    """The images of a whole run, counted over all steps and ranks: the files in a new order in each epoch."""

    def __init__(self, paths, seed):
        self.paths = paths
        self.seed = seed
        self.epoch = None
        self.order = []

    def load(self, index: int) -> tuple[Path, Image.Image]:
        """Image number `index` of the run. The next readable file of the epoch takes the place of an unreadable one,
        the same on any number of ranks."""
        epoch, start = divmod(index, len(self.paths))
        if epoch != self.epoch:
            self.epoch = epoch
            rng = random.Random(derive_seed(self.seed, "order", epoch))
            self.order = rng.sample(self.paths, len(self.paths))
        for offset in range(len(self.paths)):
            path = self.order[(start + offset) % len(self.paths)]
            try:
                return path, load_image(path)
            except UserError as error:
                print(f"warning: skipping {error}", file=sys.stderr)
        raise UserError(f"--data: none of the {len(self.paths)} image files can be read; see the warnings above")


# ---- Run folder: config.json, metrics.jsonl, rollouts.jsonl, step_*/ -------------------------------------------------

@contextlib.contextmanager
def open_run(config):
    """Makes the run folder and locks it inside the block. Gives it, and the checkpoint to continue from or None."""
    name = config.run_name or f"{config.preset}_seed{config.seed}"
    if name in (".", "..") or "/" in name or not name.isprintable() or not config.output_dir:
        raise UserError(f"--run_name {name!r} in --output_dir {config.output_dir!r}: name one folder in another one")
    run = Path(config.output_dir, name)
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            with blame(f"{run}: cannot be made or written. Choose another --output_dir or --run_name"):
                run.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(run / ".lock", "w"))  # a crash frees it
            with blame(f"{run}: another run is writing there. Wait for it, or choose another --run_name"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checkpoints = gather(find_checkpoint(run, config) if rank() == 0 else None)
        yield run, checkpoints[0]  # rank 0 decides for all

def find_checkpoint(run, config):
    """The checkpoint to continue from, or None to start. Raises UserError rather than touch another run."""
    settings = run / "config.json"
    if not settings.exists():
        if any(not file.name.startswith(".") for file in run.iterdir()):  # not our .lock
            raise UserError(f"{run}: holds other files and no run. Choose another --run_name")
        return None
    if not config.resume:
        raise UserError(f"{run}: holds a run already. Add --resume to continue it, or choose another --run_name")
    with blame(f"{settings}: damaged. Choose another --run_name"):
        saved = dict(json.loads(settings.read_text()))
    here = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples are lists, as in the file
    for f in dataclasses.fields(config):
        # A setting that is newer than the run has its default
        there = saved.get(f.name, f.metadata["default"])
        change = f"--{f.name} {there!r} there, {here[f.name]!r} here"
        if there != here[f.name] and not f.metadata["resumable"]:
            raise UserError(f"{run}: holds a run with other settings ({change}). Choose another --run_name")
        if f.name == "total_steps" and there != here[f.name]:
            say(f"resuming with another length, which moves lambda(t): {change}")
    checkpoints = list_checkpoints(run)
    return checkpoints[-1] if checkpoints else None

def list_checkpoints(run):
    """Complete checkpoints of a run, oldest first."""
    return sorted(file.parent for file in run.glob("step_[0-9]*/trainer_state.pt"))

def prepare_run(run, config, last_step):
    """Writes the settings, cuts the logs back to the step from which the run continues, and removes leftovers."""
    texts = {"config.json": json.dumps(dataclasses.asdict(config), indent=2) + "\n"}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        # Later steps are made again
        rows = [row for row in read_jsonl(run / name) if row.get("step") in range(last_step + 1)]
        texts[name] = "".join(json.dumps(row) + "\n" for row in rows)
    with blame(f"{run}: cannot be written. Make room, or choose another --output_dir"):
        # Each is written aside and renamed, so that it is there as a whole or not at all
        for name, text in texts.items():
            part = run / ".part"
            part.write_text(text, encoding="utf-8")
            part.rename(run / name)
        for part in run.glob(".step_*.part"):
            shutil.rmtree(part)

def read_jsonl(path):
    """The rows of a log. What is no row, as a line that a crash has torn, is left out; a missing file has no rows."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row

def append_jsonl(path, rows):
    """Appends rows to a log; numbers that JSON cannot say (NaN, infinity) become null."""
    lines = []
    for row in rows:
        plain = json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)
        lines.append(json.dumps(plain) + "\n")
    with blame(f"{path}: cannot be written. Make room"), open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))

def save_checkpoint(run, step, images_seen, policy, learners):
    """Writes run/step_NNNNNN aside and then renames it, so that a folder of that name is complete; deletes old ones."""
    folder = run / f"step_{step:06d}"
    part = run / f".{folder.name}.part"
    state = {"step": step, "images": images_seen}
    for role, learner in learners.items():
        state[role] = {"beta": learner.beta, "baseline": learner.baseline}
        state[role]["optimizer"] = learner.optimizer.state_dict()
    with blame(f"{part}: cannot be written. Make room; --resume goes on from the newest checkpoint"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        policy.save(part)
        torch.save(state, part / "trainer_state.pt")
        # On the disk before the name says that it is complete
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written)
        # A folder of this name has no trainer_state.pt, or the run would have been resumed from it
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in list_checkpoints(run)[:-policy.config.keep_checkpoints]:
            shutil.rmtree(old.rename(run / f".{old.name}.part"))

def load_checkpoint(folder, policy, learners):
    """Restores adapters and trainer state, unpickling tensors and numbers alone; returns the step and images seen."""
    with blame(f"{folder}: damaged. Delete it to resume from the checkpoint before it"):
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        for role, learner in learners.items():
            policy.load(role, folder / role)
            learner.beta = state[role]["beta"]
            learner.baseline = state[role]["baseline"]
            learner.optimizer.load_state_dict(state[role]["optimizer"])
        return int(state["step"]), int(state["images"])


# ---- Training loop ---------------------------------------------------------------------------------------------------

@dataclass
class Episode:
    """One image on its way through one step."""
    slot: int                                   # number of the image within the global batch of this step
    path: Path
    image: EncodedImage
    proposal: Completion | None = None
    question: str | None = None                 # None: the proposal holds no question, and the Solver rests
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rewards: dict = field(default_factory=lambda: {"r_prop": 0.0})

def train(config: Config, reward: Callable[..., dict] = group_rewards) -> Path:
    """Self-evolution on a folder of unlabeled images, the paper's loop. `reward` is called as `group_rewards` is.
    Returns the run folder."""
    device = resolve_device(config.device)
    stream = ImageStream(list_images(config.data), config.seed)
    stream.load(0)  # at least one must be readable: better known before the model loads
    join_ranks(device)
    gpus = [device] if device.type == "cuda" else []
    with open_run(config) as (run, newest), stop_signals() as signals, torch.random.fork_rng(gpus):
        policy = Policy(config)
        learners = {role: Learner(policy, role) for role in ROLES}
        step, images_seen = load_checkpoint(newest, policy, learners) if newest else (0, 0)
        log = Log(run, config, step, len(stream.paths))
        stopped = False
        while step < config.total_steps and not stopped:
            step += 1
            # For LoRA dropout; sampling has keys of its own
            torch.manual_seed(derive_seed(config.seed, step, rank()))
            lam = step_reward_weight(step, config.total_steps, config.lambda_max, config.warmup_frac,
                                     config.lambda_schedule)

            # The Proposer asks, the Solver answers N times
            episodes = propose(policy, stream, step, images_seen)
            asked = [e for e in episodes if e.question is not None]
            solve(policy, asked, step)
            # The only reward: agreement of these N rollouts with each other
            for e in asked:
                embeddings = [policy.embed_steps(rollout.steps) for rollout in e.rollouts]
                rewards = reward(e.rollouts, embeddings, lam, config, e.question)
                e.rewards = valid_rewards(rewards, config.num_rollouts)
            if config.watch_every and step % config.watch_every == 0:
                ask_about_another_image(policy, asked, stream, step, images_seen)

            # One optimizer step per role, over the rollouts of all ranks
            stats = {}
            stats["solver"] = learners["solver"].update(
                [Prompt(e.image, solver_prompt(e.question)) for e in asked],
                [e.completions for e in asked],
                [e.rewards["r_sol"] for e in asked])
            # From this step's proposals alone: older ones would be off-policy
            if step % config.proposer_every == 0:
                stats["proposer"] = learners["proposer"].update(
                    [Prompt(e.image, proposer_prompt()) for e in episodes],
                    [[e.proposal] for e in episodes],
                    [[e.rewards["r_prop"]] for e in episodes])

            images_seen += world_size() * config.images_per_rank
            log.write(step, episodes, lam, stats)
            # A signal to any rank stops all of them after the same step
            stopped = all_sum(len(signals))[0] > 0
            if rank() == 0 and (stopped or step % config.save_every == 0 or step == config.total_steps):
                save_checkpoint(run, step, images_seen, policy, learners)
            gather(None)  # no rank goes on or ends before rank 0 has saved
        log.close()
    if step < config.total_steps:
        raise UserError(f"{run}: stopped by a signal after step {step}, which is saved. Add --resume to go on",
                        status=128 + (signals or [signal.SIGTERM])[0])
    say(f"{run}/step_{step:06d} holds both adapters")
    return run

def propose(policy, stream, step, first_image):
    """This rank's share of the step's images, each with one proposed question."""
    config = policy.config
    first_slot = rank() * config.images_per_rank
    episodes = []
    for slot in range(first_slot, first_slot + config.images_per_rank):
        path, image = stream.load(first_image + slot)
        episodes.append(Episode(slot, path, policy.encode(image)))
    prompts = [Prompt(e.image, proposer_prompt()) for e in episodes]
    seeds = [derive_seed(config.seed, step, e.slot, "proposer") for e in episodes]
    samples = policy.sample("proposer", prompts, 1, config.max_new_tokens_proposer, config.temperature, seeds)
    for e, (proposal,) in zip(episodes, samples):
        e.proposal = proposal
        e.question = parse_question(proposal.text)
    return episodes

def solve(policy, asked, step, key="solver"):
    """Fills in N Solver rollouts for each episode. `key` keys their random numbers."""
    config = policy.config
    prompts = [Prompt(e.image, solver_prompt(e.question)) for e in asked]
    seeds = [derive_seed(config.seed, step, e.slot, key) for e in asked]
    samples = policy.sample("solver", prompts, config.num_rollouts, config.max_new_tokens_solver,
                            config.temperature, seeds)
    for e, completions in zip(asked, samples):
        e.completions = completions
        e.rollouts = [parse_rollout(c.text, config.max_reasoning_steps) for c in completions]

def valid_rewards(rewards, n):
    """The result of a reward function, tensors as lists. Raises UserError if it cannot train the two roles."""
    plain = {}
    for key, value in (rewards or {}).items():
        plain[key] = value.tolist() if hasattr(value, "tolist") else value
    r_sol = plain.get("r_sol")
    r_prop = plain.get("r_prop")
    if not isinstance(r_sol, list) or len(numbers(r_sol, n)) != n:
        raise UserError(f'reward: "r_sol" must be a list of {n} numbers, but is {str(r_sol):.200}')
    if isinstance(r_prop, list) or len(numbers(r_prop, n)) != 1:
        raise UserError(f'reward: "r_prop" must be a number, but is {str(r_prop):.200}')
    return plain

def numbers(value, n):
    """The finite numbers in a number, or in a list of n numbers or None; none in anything else."""
    values = value if isinstance(value, list) and len(value) == n else [value]
    if not all(v is None or isinstance(v, (int, float)) for v in values):
        return []
    return [float(v) for v in values if v is not None and math.isfinite(v)]

def ask_about_another_image(policy, asked, stream, step, first_image):
    """Looks for collapse: asks each question about the run's next image. Where the old majority answer is as frequent
    there, the answers do not come from the picture. Logs its share there; alters no training number."""
    others = []
    for e in asked:
        path, image = stream.load(first_image + e.slot + 1)
        others.append(dataclasses.replace(e, path=path, image=policy.encode(image)))
    solve(policy, others, step, "another image")
    for e, other in zip(asked, others):
        a_hat, _ = dominant_group([rollout.vote for rollout in e.rollouts])
        if a_hat and other.path != e.path:  # a folder may hold a single image
            agree = [rollout.vote == a_hat for rollout in other.rollouts]
            e.rewards["swapped_agreement"] = statistics.fmean(agree)

STEP_LINE = ("{step:5d}/{total_steps} | H {entropy:.2f} (valid {entropy_valid:.2f}) maj {group_size:.1f} "
             "bad {invalid:.0%} | r_ans {r_ans:.2f} r_step {r_step:.2f} lam {lambda:.2f} r_sol {r_sol:.2f} "
             "r_prop {r_prop:.2f} | KL {kl_solver:.4f} beta {beta_solver:.4f} | {seconds:.2f} s {speed:.0f} tok/s, "
             "left {left}")
WATCH_LINE = ("    watch: majority answer {majority:.0%}, about another image {swapped_agreement:.0%}; "
              "distinct questions {distinct_questions:.0%}")

class Log:
    """Prints one line per step and writes metrics.jsonl and rollouts.jsonl (rank 0)."""

    def __init__(self, run, config, last_step, num_images):
        self.run = run
        self.config = config
        self.resumed_after = last_step
        self.started = time.perf_counter()
        self.last_time = self.started
        self.questions = deque(maxlen=256)  # for distinct_questions
        self.wandb = None
        if rank() == 0:
            if config.wandb:
                self.open_wandb()
            prepare_run(run, config, last_step)  # after wandb: where that fails, the folder is still as it was
            rows = read_jsonl(run / "rollouts.jsonl")
            self.questions.extend(row["question"] for row in rows if row.get("question"))
        start = f"resumed after step {last_step}" if last_step else "from the start"
        say(f"{num_images} images, {config.images_per_rank * world_size()} per step on {world_size()} rank(s); preset "
            f"{config.preset}; model {config.model}; run folder {run}; {start}")

    def open_wandb(self):
        """Starts the run on Weights & Biases, or continues it."""
        with blame(f"--wandb {self.config.wandb}: cannot be started. Try pip install wandb, or leave the flag out"):
            import wandb
            run_id = str(derive_seed(str(self.run.resolve())))
            self.wandb = wandb.init(project=self.config.wandb, name=self.run.name, id=run_id, resume="allow",
                                    config=dataclasses.asdict(self.config))

    def write(self, step, episodes, lam, stats):
        """Gathers the step's episodes from all ranks; metrics are means over them, whatever the number of ranks."""
        gathered = gather([self.row(step, e) for e in episodes])
        if rank() != 0:
            return
        rows = sum(gathered, [])  # in order of rank
        values = defaultdict(list)
        for row in rows:
            for key, value in row.items():
                # What holds no numbers stays in rollouts.jsonl
                values[key] += numbers(value, self.config.num_rollouts)
            if row["question"]:
                self.questions.append(row["question"])
        metrics = {"lambda": lam}
        metrics |= {key: statistics.fmean(of_key) for key, of_key in values.items() if of_key}
        metrics["step"] = step
        for role, of_role in stats.items():
            for key, value in of_role.items():
                metrics[f"{key}_{role}"] = value
        now = time.perf_counter()
        metrics["distinct_questions"] = len(set(self.questions)) / max(len(self.questions), 1)
        metrics["tokens"] = sum(values["tokens"])
        metrics["seconds"] = now - self.last_time
        self.last_time = now
        append_jsonl(self.run / "rollouts.jsonl", rows)
        append_jsonl(self.run / "metrics.jsonl", [metrics])
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.show(metrics, rows)

    def row(self, step, e):
        """An episode as a row of rollouts.jsonl."""
        votes = [rollout.vote for rollout in e.rollouts]
        own = {
            "step": step,
            "image": str(e.path),
            "proposal": e.proposal.text,
            "question": e.question,
            "no_question": e.question is None,
            "texts": [rollout.text for rollout in e.rollouts],
            "steps": [rollout.steps for rollout in e.rollouts],
            "num_steps": [len(rollout.steps) for rollout in e.rollouts],
            "votes": votes,
            "invalid": [vote is None for vote in votes],
            "unfinished": [not c.finished for c in e.completions],
            "tokens": sum(len(c.token_ids) for c in [e.proposal, *e.completions]),
        }
        return {**e.rewards, **own}

    def show(self, metrics, rows):
        """The line of a step and, from time to time, the signs of collapse and the rollouts of one question."""
        config = self.config
        step = metrics["step"]
        seconds_a_step = (self.last_time - self.started) / (step - self.resumed_after)
        left = timedelta(seconds=int(seconds_a_step * (config.total_steps - step)))
        values = defaultdict(lambda: math.nan, metrics)  # "nan" where this step has no such number
        values |= {"total_steps": config.total_steps, "left": left}
        values["speed"] = metrics["tokens"] / metrics["seconds"]
        say(STEP_LINE.format_map(values))
        if config.watch_every and step % config.watch_every == 0:
            say(WATCH_LINE.format_map(values))
        shown = [row for row in rows if row["question"]]
        if shown and config.show_every and step % config.show_every == 0:
            self.show_rollouts(shown[0])

    def show_rollouts(self, row):
        """A row of rollouts.jsonl for a person to read."""
        say(f"    {row['image']}: {row['question']}")
        for r_sol, vote, steps, text in zip(row["r_sol"], row["votes"], row["steps"], row["texts"]):
            trace = " | ".join(steps) or " ".join(text.split())
            say(f"      r_sol {r_sol:.2f}  {vote or '(invalid)'}: {trace[:160]}")

    def close(self):
        """The last lines of a run, if it cannot have learned anything."""
        if rank() == 0:
            rows = list(read_jsonl(self.run / "metrics.jsonl"))
            for key, words in (("no_question", "proposals held no question"), ("invalid", "rollouts had no answer")):
                shares = [row[key] for row in rows if key in row]
                if shares and statistics.fmean(shares) > 0.5:
                    prompt = "proposer_prompt" if key == "no_question" else "solver_prompt"
                    say(f"Most {words}: this backbone does not follow {prompt}")
        if self.wandb:
            self.wandb.finish()


# ==== The paper ends here. What follows are tools; cut them off, and `train(Config(...))` still works =================

def demo(config: Config, cancel: float = 0.5, json: str = ""):
    """The dice world: builds, mistrains and improves a tiny Qwen2.5-VL on a laptop.

    --cancel SHARE   share of the mistaught sums whose error leaves the answer right (0.5)
    --json FILE      write the result to this new file
    """
    companion().demo(config, cancel, json)

def report(config: Config, runs: list[str], out: str = "report.png"):
    """One picture: the curves of Figures 3, 5 and 6 and of all other metrics, runs overlaid, and Figure 7.

    --out FILE   report.png
    """
    companion().report(runs, out)

def companion():
    """The module test_ireasoner.py, which has the demo and the report."""
    with blame("this command needs test_ireasoner.py beside ireasoner.py, and pytest"):
        import test_ireasoner
    return test_ireasoner

def ask(config: Config, image: str, question: str, adapter: str = ""):
    """One image, one question: prints the reasoning and the answer, decoded greedily.

    --adapter FOLDER   step_* folder of a run or PEFT adapter folder; default: the plain backbone
    """
    prompt = Prompt(load_image(Path(image)), solver_prompt(question))
    policy, role = load_solver(config, adapter)
    reply = policy.sample(role, [prompt], 1, config.max_new_tokens_solver, temperature=0.0)[0][0]
    rollout = parse_rollout(reply.text)
    for j, step in enumerate(rollout.steps, 1):
        say(f"Step {j}: {step}")
    if rollout.answer:
        say(f"Answer: {rollout.answer}")
    else:
        say(f"(no <answer> in the reply) {rollout.text}")

def load_solver(config, adapter):
    """A policy and the role that answers: "solver" with an adapter, on the backbone it was trained on, else None."""
    if not adapter:
        return Policy(config), None
    folder = Path(adapter, "solver") if Path(adapter, "solver").is_dir() else Path(adapter)
    policy = Policy(Config(**{**adapter_settings(folder), **config.given}))
    policy.load("solver", folder)
    return policy, "solver"

def evaluate_file(config: Config, file: str, adapter: str = "", batch_size: int = 32, json: str = ""):
    """Accuracy on a JSONL file of questions.

    Each line: {"image": path relative to the file, "question": "...", "answer": one or a list of right ones}
    --adapter FOLDER     step_* folder of a run or PEFT adapter folder; default: the plain backbone
    --batch_size N       questions answered together (32)
    --json FILE          write the result, with all texts, to this new file
    """
    questions = load_questions(file)
    with result_file(json) as result:
        policy, role = load_solver(config, adapter)
        result |= evaluate(policy, role, questions, batch_size=max(1, batch_size))
    n = config.num_rollouts
    for label, key in ((f"mean@{n}", "mean_at_n"), (f"maj@{n}", "maj_at_n"), ("greedy", "greedy")):
        low, high = result["ci95"][key]
        say(f"{label:<8} {result[key]:.3f} [{low:.3f}, {high:.3f}]")

@contextlib.contextmanager
def result_file(path):
    """A dict that the end of the block writes to a new JSON file. The file is opened first, so that no work is lost to
    a bad name and no older file to the result. Without a name the dict goes nowhere."""
    result = {}
    if not path or rank() != 0:
        yield result
        return
    with blame(f"--json {path}: must be a new file in a folder that exists"):
        file = open(path, "x", encoding="utf-8")
    try:
        yield result
        json.dump(result, file, indent=2)
    except BaseException:  # Ctrl-C too: what is left would be half a result
        os.unlink(path)
        raise
    finally:
        file.close()

def load_questions(file):
    """The rows of a file of questions, with "answers", a list. Raises UserError with the line number."""
    rows = []
    with blame(f"{file}: cannot be read. Give a JSONL file of questions"):
        # `splitlines` would also split at U+2028
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with blame(f"{file} line {number}: must be an object with image, question and answer, none of them empty"):
                rows.append(read_question(json.loads(line), Path(file).parent))
    if not rows:
        raise UserError(f"{file}: no questions in it")
    return rows

def read_question(row, folder):
    """A row of a file of questions, checked. Raises ValueError."""
    if not isinstance(row, dict) or not row.keys() >= {"image", "question", "answer"}:
        raise ValueError("something is missing")
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not all(type(a) in (str, int, float) and normalize_answer(str(a)) for a in answers):
        answers = []
    if not answers or type(row["question"]) is not str or not row["question"].strip():
        raise ValueError("the question or an answer is empty, or no text or number")
    image = folder / str(row["image"])
    if not image.is_file():
        raise ValueError(f"{image} is missing")
    return {**row, "image": str(image), "answers": [str(a) for a in answers]}

def evaluate(policy: Policy, role: str | None, rows: list[dict], temperature: float | None = None,
             batch_size: int = 32) -> dict:
    """Accuracy on labeled questions: {n, mean_at_n, maj_at_n, greedy, ci95, predictions}. The shares are those of right
    answers among N sampled rollouts, by their majority vote, and by greedy decoding. "ci95" has Wilson's 95 % interval
    of each, too wide for mean@N, since a mean of N varies less than one vote. A prediction is a row with the "texts",
    "votes" and "right" of the N rollouts and, last, of greedy decoding."""
    config = policy.config
    temperature = config.temperature if temperature is None else temperature
    predictions = []
    shares = {"mean_at_n": [], "maj_at_n": [], "greedy": []}
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        prompts = [Prompt(load_image(row["image"]), solver_prompt(row["question"])) for row in batch]
        prompts = policy.encode_prompts(prompts)
        # Keyed by the row, so that the batch size changes nothing
        seeds = [derive_seed(config.seed, "eval", start + i) for i in range(len(batch))]
        length = config.max_new_tokens_solver
        sampled = policy.sample(role, prompts, config.num_rollouts, length, temperature, seeds)
        greedy = policy.sample(role, prompts, 1, length, temperature=0.0)
        for row, rollouts, best in zip(batch, sampled, greedy):
            texts = [completion.text for completion in rollouts + best]
            votes = [parse_rollout(text).vote for text in texts]
            answers = {normalize_answer(answer) for answer in row["answers"]}
            right = [vote in answers for vote in votes]
            a_hat, _ = dominant_group(votes[:-1])  # the last vote is the greedy one
            predictions.append({**row, "texts": texts, "votes": votes, "right": right})
            shares["mean_at_n"].append(statistics.fmean(right[:-1]))
            shares["maj_at_n"].append(float(a_hat in answers))
            shares["greedy"].append(float(right[-1]))
    result = {"n": len(rows), "ci95": {}, "predictions": predictions}
    for key, values in shares.items():
        result[key] = statistics.fmean(values)
        result["ci95"][key] = wilson_interval(result[key], len(rows))
    return result

def wilson_interval(p, n):
    """Wilson's 95 % interval of a share p of n."""
    z2 = 1.96 ** 2  # 95 % of a normal distribution lie within 1.96 deviations
    centre = p + z2 / (2 * n)
    half = math.sqrt(z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2)
    return [(centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)]


# ---- Command line: the signature of a command is its command line, its docstring the help ----------------------------

TRAIN_FLAGS = tuple(f.name for f in dataclasses.fields(Config))
ASK_FLAGS = ("model", "max_new_tokens_solver", "max_pixels", "device", "dtype")
EVAL_FLAGS = (*ASK_FLAGS, "num_rollouts", "temperature", "seed")
COMMANDS = {  # function, and the settings that are its flags
    "train": (train, TRAIN_FLAGS),
    "demo": (demo, TRAIN_FLAGS),
    "ask": (ask, ASK_FLAGS),
    "eval": (evaluate_file, EVAL_FLAGS),
    "report": (report, ()),
}

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. See --help")

def parse_command_line(argv):
    """(command, settings, the command's own arguments). Raises UserError."""
    name = "train"
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, COMMANDS)} See --help")
    command, settings = COMMANDS[name]
    parser = make_parser(name)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"{flag}: no such flag of {name}{nearest(flag, parser._option_string_actions)} See --help")
    own = vars(arguments)  # flags and arguments alike
    given = {key: own.pop(key) for key in settings if key in own}
    return command, Config(**given), own

def make_parser(name):
    """The parser of a command: its own parameters, then a flag for each of its settings."""
    command, settings = COMMANDS[name]
    summaries = [f"  {other:<8} {inspect.getdoc(f).splitlines()[0]}" for other, (f, _) in COMMANDS.items()]
    description = f"{inspect.getdoc(command)}\n\nCommands (train if none is given):\n" + "\n".join(summaries)
    parser = _Parser(usage=f"ireasoner.py {name} ...", allow_abbrev=False, description=description,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for p in inspect.signature(command).parameters.values():
        if p.name in ("config", "reward"):
            continue
        if p.default is p.empty:
            parser.add_argument(p.name, nargs="+" if p.annotation == list[str] else None)
        else:
            parser.add_argument(f"--{p.name}", type=p.annotation, default=p.default, help=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        if f.name not in settings:
            continue
        meaning = f"{f.metadata['meaning']}; {describe(f)}; default {f.metadata['default']!r}"
        options = {"help": meaning.replace("%", "%%")}
        if f.type is bool:
            options["action"] = "store_true"
        elif f.type is tuple:
            options["nargs"] = "+"
        else:
            kinds = typing.get_args(f.type) or (f.type,)
            options |= {"type": kinds[0], "metavar": "X"}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)
    return parser

def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0; 1 where memory or training failed; 2 after one line about bad
    input; 128 + the number of a signal that stopped training."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    status = 0
    message = ""
    try:
        command, config, own = parse_command_line(sys.argv[1:] if argv is None else argv)
        command(config, **own)
    except UserError as error:
        message = str(error)
        status = error.status
    except torch.OutOfMemoryError as error:
        message = (f"out of memory ({str(error).splitlines()[0]}). Lower --score_rollouts, --images_per_rank, "
                   "--num_rollouts or --max_pixels")
        status = 1
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    if message:
        print(f"ireasoner: {message}", file=sys.stderr, flush=True)
    # Threads of gloo sometimes abort an interpreter that ends in the ordinary way
    if dist.is_initialized():
        if sys.stdout:
            sys.stdout.flush()
        os._exit(status)
    return status

if __name__ == "__main__":
    # The tests and the demo import this file; run that module too, so that there is one set of classes
    import ireasoner
    sys.exit(ireasoner.main())
