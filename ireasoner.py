# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "transformers>=5.24", "peft>=0.18", "pillow>=10.1", "numpy", "pytest"]
# ///
"""iReasoner: a vision-language model improves itself on unlabeled images.

A reference implementation of "iReasoner: Trajectory-Aware Intrinsic Reasoning Supervision for Self-Evolving Large
Multimodal Models", in one file. One training step:

    questions <- the Proposer (LoRA adapter 1) asks one question about each of a few unlabeled pictures
    rollouts  <- the Solver (LoRA adapter 2) answers each question N = 5 times, in numbered steps
    rewards   <- Solver: agreement of answers (Eq 1, 5) and of the majority's steps (Eq 2-4), mixed by Eq 6;
                 Proposer: g(H), for questions on which the answers agree in part
    update    <- KL-regularized REINFORCE against the adapter-free backbone (Eq 7), with one beta per role (Eq 8)

    python ireasoner.py demo                                   # laptop: watch a tiny Qwen2.5-VL improve, no download
    python ireasoner.py --data images                          # one GPU: train Qwen2.5-VL-7B on a folder of images
    torchrun --nproc_per_node=8 ireasoner.py --data images     # one node of eight GPUs
    python ireasoner.py ask a.png "How many?" --adapter STEP   # the reasoning and the answer of a trained Solver
    python ireasoner.py eval questions.jsonl --adapter STEP    # accuracy on labeled questions
    python ireasoner.py report RUN ...                         # the curves of runs, as a picture
    python ireasoner.py study FOLDER                           # the demo over rewards and seeds, as a table
    python ireasoner.py premise --model MODEL                  # do sound traces of MODEL earn more step reward?
    python ireasoner.py bench                                  # seconds a step, on random weights

To experiment, copy this file, edit the copy and run it: `python mine.py demo`. (demo and all from eval on need
test_ireasoner.py beside it.) Order: settings; Eq 1 to 8 and `group_rewards`, where a reward of your own goes; parsing;
Policy; Learner; ranks, images, run folder; `train`; the command line. Brackets name the source of a choice: a section
or table of the paper, [code] for the authors' released code, [ours].

Where the defaults depart from the paper's letter, and why:
- Eq 1: a rollout without a complete <answer>, or with an empty one, is invalid: it counts in N, never votes, earns 0.
- t_i: the trace is all before the last complete <answer>, in <think> or not: models often close <think> too early.
- g(H): the Proposer earns the smaller of g(H) with invalid rollouts as outcomes and g(H) without them, times the share
  of valid ones. Either alone could pay it for breaking rollouts.
- Eq 3: an empty step belongs to no G_j and scores 0. Positions where |G_j| < 2 are skipped: one trace agrees with
  itself.
- Eq 4: the weights w_j sum to 1 over a trace's comparable positions [code]. As printed, the sum grows with the number
  of steps; normalized, it can pay a trace for stopping before the steps that vary most.
- Eq 7: log pi is the mean over a rollout's tokens [code]. This is biased: E[(1/T) grad log pi] = grad E[1/T] is not 0,
  so a constant advantage teaches length, and no constant baseline removes that (Dr. GRPO, arXiv 2503.20783).
  --logprob_reduction sum is the unbiased reading.
- A step takes one image per rank, so 2,500 steps on eight ranks see 20,000 images; the paper's pool holds 2,500.
Good to know: ties of Eq 2 go to the answer seen first, so with votes 2-2-1 chance decides which pair earns r_step. mu_j
of Eq 3 contains e_ij itself, which compresses r_ij: two traces of cosine c have r = sqrt((1 + c) / 2). The KL of Eq 7
is exact at each sampled position; its gradient leaves out, as is usual (arXiv 2506.09477), that a token also changes
which positions come later. In our toy study the paper's step reward taught more with --advantage group than with the
default, ema (README). The defaults of Eq 1 to 8 below are for copies: training passes those of Config.

Symbols: x image, q question, y_i rollout, a_i its normalized answer (`vote`), s_ij step, e_ij its embedding, a_hat the
majority answer, G the rollouts that gave it, mu_j prototype, r_tilde agreement of a trace, rho density, lam lambda(t),
kappa `position_decay`, H entropy of the a_i, b baseline, beta `kl_coef`, tau `kl_target`, eta of Eq 8 `kl_adapt_rate`.
Axes in shape comments: B prompts (one image each), N rollouts of a question, P prompt tokens, R completion tokens,
T tokens of one completion, M those of several in a row, rows = B N, V vocabulary, d model width, J steps of a trace.
"""
import argparse
import contextlib
import dataclasses
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
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# A copy of this file under another name is run as `ireasoner` too, so that the tests and the demo import the copy
if __name__ in ("__main__", "__mp_main__"):
    sys.modules["ireasoner"] = sys.modules[__name__]

class UserError(Exception):
    """Ends the program with one line, the culprit and the remedy, and exit status 2."""

class Stopped(UserError):
    """A signal has ended training; the step in flight is saved."""

@contextlib.contextmanager
def blame(culprit):
    """Errors inside the block become a UserError: the culprit, then the library's words. Mistakes in code (NameError,
    TypeError ...) keep their traceback, as does everything under IREASONER_DEBUG=1."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, NameError, AttributeError, TypeError, AssertionError):
        raise
    except Exception as error:  # whatever a library raises at what comes from outside
        if os.environ.get("IREASONER_DEBUG"):
            raise
        words = " ".join(str(error).split())
        raise UserError(f"{culprit} ({type(error).__name__}: {words[:300]})") from error

# ---- Settings: one line makes a field of Config, its flag, its --help text, its check and its entry in config.json ---
def setting(default, allowed, meaning):
    """A field of Config. `allowed`: inclusive (low, high), a list of words, or None."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})

@dataclass(kw_only=True)
class Config:
    """All settings; brackets name the source of the default. Raises UserError if a value is not allowed."""
    # data and run folder
    model: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", None, "backbone: a folder or a Hugging Face id [4.1]")
    data: tuple = setting(("images",), None, "folders of unlabeled images, recursive, but not through links [4.1]")
    output_dir: str = setting("runs", None, "folder that holds the run folders [ours]")
    run_name: str = setting("ireasoner_seed{seed}", None, "name of the run folder [ours]")
    resume: bool = setting(False, None, "continue the run, or start it where there is none yet [ours]")
    dry_run: bool = setting(False, None, "check all that can be checked before the model loads, and end [ours]")
    # loop
    total_steps: int = setting(2500, (1, 999999), "training steps, over which lambda(t) rises [4.1]")
    num_rollouts: int = setting(5, (1, 1024), "N, Solver rollouts per question [4.1]")
    images_per_rank: int = setting(1, (1, 4096), "images (= questions) per step on each rank [ours]")
    proposer_every: int = setting(5, (1, 10**7), "steps between Proposer updates [4.1]")
    temperature: float = setting(1.0, (1e-3, 100), "sampling temperature, also used for scoring [code]")
    max_new_tokens_proposer: int = setting(128, (1, 65536), "longest question, tokens [code]")
    max_new_tokens_solver: int = setting(256, (1, 65536), "longest solution, tokens [code]")
    max_pixels: int = setting(802816, (784, 10**8), "pixels to which Qwen-VL models shrink larger images [ours]")
    # rewards, Eq 1 to 6
    answer_reward: str = setting("soft", ["soft", "discrete"], "soft: Eq 5, g(H); discrete: from 0 or 1 [Tab 1]")
    alpha: float = setting(0.7, (1e-6, 100), "sharpness of the answer reward, Eq 5 [code]")
    step_similarity: str = setting("cosine", ["cosine", "numbers"], "r_tilde: Eq 3, 4 [3.2]; overlap of numbers [ours]")
    eta: float = setting(0.05, (0, 1), "strength of the length penalty, Eq 5 [code]")
    target_words: int = setting(64, (1, 10**6), "words before the answer that cost nothing, Eq 5 [code]")
    gamma: float = setting(0.7, (0, 100), "exponent of the group density rho, Eq 2 [code]")
    position_decay: float = setting(0.15, (0, 100), "kappa, decay of the step weights w_j, Eq 4 [code]")
    min_group_size: int = setting(2, (1, 1024), "least |G_j|: traces needed to compare a position, Eq 3 [code]")
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
    logprob_reduction: str = setting("mean", ["mean", "sum"], "log pi and KL of a rollout, from its tokens [code]")
    advantage: str = setting("ema", ["ema", "mean", "group"], "Solver's: r - EMA b [4.1]; r - mean, GRPO's [ours]")
    baseline_momentum: float = setting(0.9, (0, 1), "momentum of the EMA baseline b, Eq 7 [code]")
    kl_coef: float = setting(1e-3, (0, 1e6), "beta at the first step, Eq 8 [code]")
    kl_coef_min: float = setting(1e-3, (0, 1e6), "lower bound of beta, Eq 8 [ours]")
    kl_coef_max: float = setting(1.0, (0, 1e6), "upper bound of beta, Eq 8 [ours]")
    kl_target: float = setting(0.02, (1e-9, 1e6), "tau, the KL that leaves beta alone, nats per token, Eq 8 [code]")
    kl_adapt_rate: float = setting(0.10, (0, 100), "eta of Eq 8: how fast beta follows the KL [code]")
    lora_r: int = setting(16, (1, 1024), "LoRA rank of each adapter [code]")
    lora_alpha: int = setting(32, (1, 10**6), "LoRA scale is lora_alpha / lora_r [code]")
    lora_dropout: float = setting(0.0, (0, 0.99), "above 0 the policy that learns is not the one that sampled [ours]")
    # machine and bookkeeping
    device: str = setting("auto", None, "auto, cpu, cuda or cuda:N (ROCm GPUs are cuda too) [ours]")
    enforce_eager: bool = setting(False, None, "sample by plain calls, without a CUDA graph [ours]")
    dtype: str = setting("auto", ["auto", "float32", "bfloat16"], "backbone; auto: bfloat16 on GPU, else float32 [4.1]")
    score_rollouts: int = setting(5, (1, 1024), "rollouts in a gradient pass, for memory [ours]")
    seed: int = setting(0, (0, 2**31), "of adapters, data order and sampling [ours]")
    save_every: int = setting(50, (1, 10**7), "steps between checkpoints [ours]")
    keep_checkpoints: int = setting(3, (1, 10**6), "newest checkpoints kept [ours]")
    show_every: int = setting(25, (0, 10**7), "steps between printed rollouts, 0 for none [ours]")
    watch_every: int = setting(25, (0, 10**7), "steps between looks for collapse, 0 for none [ours]")
    wandb: str = setting("", None, "log to this Weights & Biases project; empty: do not [ours]")

    def __post_init__(self):
        self.data = (self.data,) if isinstance(self.data, str) else tuple(self.data)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            allowed = f.metadata["allowed"]
            if isinstance(allowed, tuple):
                fits = allowed[0] <= value <= allowed[1]
            else:
                fits = allowed is None or value in allowed
            if not fits:
                raise UserError(f"--{f.name} {value} ({f.metadata['meaning']}): must be in {allowed}")
        if not self.kl_coef_min <= self.kl_coef <= self.kl_coef_max:
            raise UserError(f"--kl_coef {self.kl_coef:g}: must lie between --kl_coef_min and --kl_coef_max")

# The settings that --resume may change
MAY_CHANGE = ("data", "output_dir", "run_name", "total_steps", "images_per_rank", "device", "enforce_eager",
              "score_rollouts", "save_every", "keep_checkpoints", "show_every", "watch_every", "wandb")

PRESETS = {  # the rows of the paper's tables, for Config(**PRESETS["evolmm"], data="images")
    "ireasoner": {},                                                   # Table 2, Ours, Full
    "evolmm": {"lambda_max": 0.0},                                     # Table 2, soft majority only
    "discrete": {"answer_reward": "discrete", "lambda_max": 0.0},      # Table 1
    "discrete_step": {"answer_reward": "discrete"},                    # Table 1
    "step_only": {"lambda_max": 1.0, "lambda_schedule": "constant"},   # Table 2, from here on
    "no_warmup": {"lambda_schedule": "constant"},
    "no_position_decay": {"position_decay": 0.0},
    "no_density": {"gamma": 0.0},
    "no_length_penalty": {"eta": 0.0},
    "alpha_0.5": {"alpha": 0.5},                                       # printed as gamma = 0.5: it varies Eq 5's alpha
    "alpha_1.0": {"alpha": 1.0},                                       # printed as gamma = 1.0
    "steps_4": {"max_reasoning_steps": 4},                             # Table 3, from here on
    "steps_6": {"max_reasoning_steps": 6},
    "steps_10": {"max_reasoning_steps": 10},
}
PRESETS = {name: {"run_name": f"{name}_seed{{seed}}", **row} for name, row in PRESETS.items()}

def derive_seed(*keys):
    """Mixes integers and strings into one seed, the same on every machine; near keys give unrelated seeds."""
    return int(hashlib.blake2b(repr(keys).encode(), digest_size=8).hexdigest(), 16) >> 1

# ---- The paper, section 3.1: prompts, the answer distribution (Eq 1), the Proposer's reward --------------------------
def proposer_prompt() -> str:
    """What the Proposer is asked about every image; `parse_question` reads the reply. The dots of both prompts earn
    nothing when copied back; a word in their place did, and a real model soon replied nothing else."""
    return ("Look at the image and write one question about it.\n"
            "It must be answerable from the image alone, need several steps of reasoning, and have one short answer.\n"
            "Reply with the question only, in this form:\n"
            "<question>...</question>")

def solver_prompt(question: str) -> str:
    """What the Solver is asked; `parse_rollout` reads the reply. The numbered steps are the paper's step interface."""
    return (f"{question}\n"
            "Look at the image and reason in short numbered steps, one claim in each: first what you see, then what "
            "follows.\nReply in this form:\n"
            "<think>\nStep 1: ...\nStep 2: ...\n</think>\n<answer>...</answer>")

def answer_distribution(answers: list[str | None]) -> dict[str, float]:
    """Eq 1, p(a|x,q) = count(a) / N over the normalized answers of a question's N rollouts, in order of appearance.
    None marks an invalid rollout: it counts in N and votes for nothing [ours]."""
    counts = Counter(a for a in answers if a is not None)
    return {a: count / len(answers) for a, count in counts.items()}

def answer_entropy(answers: list[str | None]) -> float:
    """H(x, q) = -sum p log p in nats (section 3.1). Each invalid rollout (None) is an outcome of its own with mass
    1/N, so that garbage never looks like agreement [ours]."""
    n = len(answers)
    outcomes = Counter(i if a is None else a for i, a in enumerate(answers))  # each None under its own number
    return math.fsum(count / n * math.log(n / count) for count in outcomes.values())

def entropy_reward(entropy: float, mu: float = 0.90, sigma: float = 0.35) -> float:
    """g(H), the Proposer's reward (3.1, 3.3; form and values from the released code): a bell around H = mu nats,
    since a question on which all rollouts agree, or none do, teaches nothing."""
    return math.exp(-((entropy - mu) ** 2) / (2 * sigma ** 2))

# ---- The paper, section 3.2: agreement of the steps inside the majority group (Eq 2-4, Figure 7) ---------------------
def dominant_group(answers: list[str | None]) -> tuple[str | None, list[int]]:
    """Eq 2, the majority answer a_hat and the rollouts G that gave it. Ties go to the answer seen first; without any
    valid answer the result is (None, [])."""
    p = answer_distribution(answers)
    if not p:
        return None, []
    a_hat = max(p, key=p.get)  # the first of equals: p keeps the order of appearance
    return a_hat, [i for i, a in enumerate(answers) if a == a_hat]

def group_density(group_size: int, num_rollouts: int, gamma: float = 0.7) -> float:
    """Eq 2, rho = (|G| / N)^gamma: how far the majority can be trusted. gamma from the released code."""
    return (group_size / num_rollouts) ** gamma

def step_prototypes(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> dict[int, torch.Tensor]:
    """Eq 3, mu_j: the mean step embedding at each position over G_j, the members of the group that have a step there.
    embeddings[i] is (J_i, d), one row per step; an empty step is a zero vector and belongs to no G_j [ours]. The keys
    are 0-based positions, the values (d,). A position with |G_j| < `min_group` is left out [code]."""
    prototypes = {}
    longest = max((len(embeddings[i]) for i in group), default=0)
    for j in range(longest):
        e_j = [embeddings[i][j] for i in group if j < len(embeddings[i]) and embeddings[i][j].any()]
        if len(e_j) >= min_group:
            prototypes[j] = torch.stack(e_j).mean(dim=0)
    return prototypes

def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sim(a, b) of section 3.2 for two vectors, in [-1, 1]. Zero vectors and non-finite values give 0."""
    return F.cosine_similarity(a.double(), b.double(), dim=0).nan_to_num(0.0, 0.0, 0.0)

def step_similarity(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> torch.Tensor:
    """r_ij = sim(e_ij, mu_j) (section 3.2): (|G|, J) with J the longest trace of the group. NaN where rollout i has no
    step j or the position cannot be compared, 0 where it can and step j is empty."""
    longest = max((len(embeddings[i]) for i in group), default=0)
    r_ij = torch.full((len(group), longest), math.nan)  # (|G|, J)
    for j, mu_j in step_prototypes(embeddings, group, min_group).items():
        for row, i in enumerate(group):
            if j < len(embeddings[i]):
                r_ij[row, j] = cosine(embeddings[i][j], mu_j)
    return r_ij

def position_weights(num_steps: int, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, w_j = exp(-kappa (j - 1)): (num_steps,); normalized below. Early steps weigh more. kappa [code]."""
    return torch.exp(-decay * torch.arange(num_steps, dtype=torch.float32))

def trajectory_agreement(r_ij: torch.Tensor, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, r_tilde_i = sum_j w_j r_ij: (|G|, J) -> (|G|,). The w_j are normalized to sum to 1 over the positions where
    r_ij is defined [code]. 0 where nothing can be compared."""
    defined = ~r_ij.isnan()  # (|G|, J)
    w = position_weights(r_ij.shape[1], decay).to(r_ij.device) * defined  # (|G|, J)
    weighted = w * r_ij.nan_to_num(0.0)
    return weighted.sum(dim=1) / w.sum(dim=1).clamp_min(1e-30)

def trace_overlap(traces: list[list[str]], group: list[int], pattern: str = r"\d+"):
    """r_tilde for --step_similarity numbers [ours]: the mean, over the other members k of the group, of the Jaccard
    index of what `pattern` finds in all steps of i and of k, traces[i] and traces[k], in lower case: (|G|,). 0 where
    there is nothing to compare."""
    found = [set(re.findall(pattern, " ".join(traces[i]).lower())) for i in group]
    r_tilde = torch.zeros(len(group))
    for row, own in enumerate(found):
        others = found[:row] + found[row + 1:]
        for other in others:
            r_tilde[row] += len(own & other) / max(len(own | other), 1) / len(others)
    return r_tilde

def step_agreement(r_tilde: torch.Tensor, group: list[int], num_rollouts: int, gamma: float = 0.7) -> torch.Tensor:
    """The intrinsic CoT agreement reward r_step = rho r_tilde (section 3.2) of all N rollouts: (|G|,) -> (N,). `group`
    is G; rollouts outside of it get 0."""
    r_step = torch.zeros(num_rollouts)
    r_step[group] = group_density(len(group), num_rollouts, gamma) * r_tilde
    return r_step

def leave_one_out_similarity(embeddings: list[torch.Tensor], group: list[int]) -> torch.Tensor:
    """Figure 7, S_ij = sim(e_ij, mean of e_kj over the other members k of the group whose step j is not empty):
    (|G|, J), NaN where undefined."""
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
    return min(max((words - target) / target, 0.0), 1.0)

def answer_reward(p_answer: float, excess: float, alpha: float = 0.7, eta: float = 0.05) -> float:
    """Eq 5, r_ans = p(a_i|x,q)^alpha (1 - eta * excess)."""
    return p_answer ** alpha * (1 - eta * excess)

def step_reward_weight(step: int, total_steps: int, lam_max: float = 0.7, warmup_frac: float = 0.3,
                       schedule: str = "ramp") -> float:
    """Eq 6, lambda(t): 0 for the first `warmup_frac` of all steps, then linear to `lam_max` at the last step. `step`
    counts from 1 over the whole run: a resumed run continues the ramp. Schedule "constant": always `lam_max`."""
    if schedule == "constant":
        return lam_max
    progress = (step / total_steps - warmup_frac) / max(1 - warmup_frac, 1e-9)  # 1 at the last step
    return lam_max * min(max(progress, 0.0), 1.0)

def mix_rewards(r_ans, r_step, lam: float):
    """Eq 6, r_sol = (1 - lambda) r_ans + lambda r_step, for numbers or tensors."""
    return (1 - lam) * r_ans + lam * r_step

def reinforce_loss(logprobs: list[torch.Tensor], kl: list[torch.Tensor], advantages: list[float], beta: float,
                   reduction: str = "mean", max_tokens: int = 1) -> torch.Tensor:
    """Eq 7, the mean over rollouts of -(r - b) log pi(y|x,q) + beta KL(pi || pi_ref). A scalar.
    logprobs[i] and kl[i] are (T_i,), in nats; advantages[i] is r_i - b. log pi and KL are means over a rollout's tokens
    [code], or with "sum" sums divided by a constant, `max_tokens`, so that lr, beta and tau keep their scale [ours]."""
    losses = []
    for logp, divergence, advantage in zip(logprobs, kl, advantages):
        tokens = len(logp) if reduction == "mean" else max_tokens
        log_pi = logp.sum() / tokens
        losses.append(-advantage * log_pi + beta * divergence.sum() / tokens)
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
    """Eq 7, what multiplies log pi, for all rollouts of one question. "ema" is the paper's r - b. The others ignore b:
    "mean" is r - mean of these rewards [ours]; "group" is GRPO's (r - mean) / (sd + 1e-3) with their population sd
    [ours]. With these a single rollout learns nothing, and of two agreement pays both the same."""
    if kind == "ema":
        return [r - baseline for r in rewards]
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) + 1e-3 if kind == "group" else 1.0
    return [(r - mean) / scale for r in rewards]  # all 0 where all rewards are equal

def update_baseline(baseline: float, mean_reward: float, momentum: float = 0.9) -> float:
    """Eq 7, the EMA baseline: b <- m b + (1 - m) mean(r), once a step, after the update that used b [ours]. The
    released code, whose m this is, moves b after every rollout."""
    return momentum * baseline + (1 - momentum) * mean_reward

def adapt_kl_coef(beta: float, kl: float, target: float = 0.02, rate: float = 0.10, beta_min: float = 1e-3,
                  beta_max: float = 1.0) -> float:
    """Eq 8, beta <- clip(beta exp(eta (KL - tau) / tau), beta_min, beta_max), finite for any KL; NaN changes nothing.
    The bounds are ours. The rule is an integrator: with the released code's wide ones beta falls while the KL is small,
    reacts too late when it rises, and then overshoots."""
    exponent = rate * (kl - target) / target
    if math.isnan(exponent):
        exponent = 0.0
    exponent = min(max(exponent, -700.0), 700.0)  # math.exp overflows at 710
    return min(max(beta * math.exp(exponent), beta_min), beta_max)

def group_rewards(rollouts: list["Rollout"], embeddings: list[torch.Tensor], lam: float, config: Config,
                  question: str = "") -> dict:
    """YOUR REWARD HERE, or in a function that a script of yours gives to `train(config, reward=...)`: the rewards of a
    question, from its N parsed rollouts and their step embeddings, (J_i, d) each, at lambda(t). "r_sol", a list of N
    numbers, trains the Solver and "r_prop", a number, the Proposer; an image without a question never comes here and
    pays the Proposer 0. The dict goes into rollouts.jsonl, and the means of its numbers and of its lists of N numbers
    (None allowed) into metrics.jsonl."""
    n = len(rollouts)
    votes = [rollout.vote for rollout in rollouts]
    valid = [a for a in votes if a is not None]
    p = answer_distribution(votes)  # Eq 1
    _, group = dominant_group(votes)  # Eq 2
    r_ij = step_similarity(embeddings, group, config.min_group_size)  # (|G|, J), Eq 3
    r_tilde = trajectory_agreement(r_ij, config.position_decay)  # (|G|,), Eq 4
    if config.step_similarity == "numbers":  # then Eq 3 and 4 are logged, and pay nothing
        r_tilde = trace_overlap([rollout.steps for rollout in rollouts], group)
    r_step = step_agreement(r_tilde, group, n, config.gamma).tolist()  # N

    r_ans = [0.0] * n  # what an invalid rollout keeps
    for i, a in enumerate(votes):
        if config.answer_reward == "discrete":
            r_ans[i] = float(i in group and len(group) > 1)
        elif a is not None:
            excess = length_excess(rollouts[i].words_before_answer, config.target_words)
            r_ans[i] = answer_reward(p[a], excess, config.alpha, config.eta)  # Eq 5
    r_sol = [mix_rewards(r_ans[i], r_step[i], lam) for i in range(n)]  # Eq 6

    # g(H) with the invalid rollouts and without them, times the share of valid ones: at N = 5 and the default bell the
    # Proposer never gains by a question that breaks a rollout [ours]
    entropy = answer_entropy(votes)
    entropy_valid = answer_entropy(valid)
    if config.answer_reward == "discrete":
        r_prop = float(1 < len(group) < len(valid))  # some, but not all, valid rollouts agree
    else:
        r_prop = min(entropy_reward(h, config.entropy_mu, config.entropy_sigma) for h in (entropy, entropy_valid))
    r_prop *= len(valid) / n

    # The rest is only logged, for Figures 3, 5 and 7
    step_cosine = [None] * n
    for i, cosine_i in zip(group, r_ij.nanmean(dim=1).tolist()):
        step_cosine[i] = cosine_i
    return {
        "r_sol": r_sol, "r_prop": r_prop, "r_ans": r_ans, "r_step": r_step,
        "entropy": entropy, "entropy_valid": entropy_valid,
        "majority": [i in group for i in range(n)], "group_size": len(group),
        "density": group_density(len(group), n, config.gamma),
        "step_cosine": step_cosine, "comparable_steps": int(r_ij.isfinite().any(dim=0).sum()),
        "leave_one_out": leave_one_out_similarity(embeddings, group).tolist(),
    }

# ---- Parsing: what a model wrote (section 3.1). Nothing here raises, on any text; all of it is linear or quadratic ---
@dataclass
class Rollout:
    """One Solver reply, parsed."""
    text: str
    think: str                   # the trace t_i: all before the answer, without tags
    steps: list[str]
    answer: str | None           # raw text of the last complete <answer>; compare `vote` instead
    words_before_answer: int

    @property
    def vote(self):
        """a_i, the normalized answer; None if the rollout is invalid: no complete <answer>, or an empty one."""
        return normalize_answer(self.answer or "") or None

# The innermost pair: no other tag inside
_QUESTION_TAG = re.compile(r"<question>((?:(?!</?question>).)*)</question>", re.I | re.S)
# Leaves out a label such as "**Question 1:**"
_UNTAGGED_QUESTION = re.compile(r"^(?=.*[?？])[ \t#>*_-]*(?:question[\s*_\d]{0,9}:[\s*_]*)?(.*?[?？])", re.I | re.M)

def parse_question(text: str) -> str | None:
    """The question in the Proposer's reply, on one line, or None: the content of <question>...</question>, else the
    first line with a question mark, up to the mark."""
    questions = _QUESTION_TAG.findall(text)
    if not questions:
        untagged = re.sub("</?question>", "\n", text, flags=re.I)
        questions = _UNTAGGED_QUESTION.findall(untagged)
    for question in questions:
        if re.search(r"\w", question):
            return " ".join(question.split())
    return None

_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.I | re.S)

def parse_rollout(text: str, max_steps: int = 8):
    """Splits a Solver reply into trace t_i, steps s_ij and answer a_i (section 3.1). The trace is all before the last
    complete <answer>, since models often close <think> after a sentence and number their steps behind it."""
    answer = None
    before = re.split("<answer>", text, maxsplit=1, flags=re.I)[0]
    for tagged in _ANSWER_TAG.finditer(text):  # the last one counts: models correct themselves
        answer = tagged[1].strip()
        before = text[:tagged.start()]
    think = re.sub(r"</?(?:think|answer)>", "\n", before, flags=re.I).strip()
    return Rollout(text, think, split_steps(think, max_steps), answer, len(think.split()))

# "Step 2:", "### Step 2 -", "**Step 2** Add:", "2. Step 2 (add) of 3:". The group "line" matches where the label
# begins a line, perhaps behind markdown. A title goes with its label
_STEP_LABEL = re.compile(
    r"(?:(?P<line>^[ \t#>*_+•-]*(?:\d{1,2}[.)] ?)?)|(?<=\s)[*_]*)step ?#?(?P<number>\d{1,3})(?: of \d{1,3})?"
    r"(?: ?\([^()\n]{1,40}\))?"
    r"(?:[*_]{0,2} ?(?:[:)\]–—]|\.(?!\d)|-(?=\s)|$)[*_]{0,2}|[*_]{2}(?=\s)(?: [^\d:.\n]{1,40}:)?)", re.I | re.M)
_NUMBERED_LINE = re.compile(r"(?P<line>^[ \t#>*_+•-]*)\(?(?P<number>\d{1,2})[.)](?!\d)", re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*")

def split_steps(think: str, max_steps: int = 8) -> list[str]:
    """The numbered claims of a trace, in order, at most `max_steps` (section 3.2: s_i1 ... s_iJ).
    Reads `Step 1:` and its like; where that gives less than two steps, numbered lines, `1.` or `1)`; else sentences.
    The label decides the position, so that step j of one trace stands beside step j of another; a step that is empty or
    missing is "". What stands before a first `Step 2` is step 1, since models take that label over from the prompt.

    >>> split_steps("I look first.\\n**Step 1:** 3.5 is\\n  the height\\n2) so\\nstep 2 - it fits")
    ['3.5 is the height 2) so', 'it fits']
    >>> split_steps("red shows 3\\nStep 2: blue shows 4\\nStep 4: 7 is odd")
    ['red shows 3', 'blue shows 4', '', '7 is odd']
    >>> split_steps("Red shows 3. It is odd.")
    ['Red shows 3.', 'It is odd.']
    """
    for pattern in (_STEP_LABEL, _NUMBERED_LINE):
        steps = [""]  # steps[j] is step j, steps[0] what stands before the first label
        begin = 0
        for label in pattern.finditer(think):
            number = int(label["number"])
            expected = len(steps)
            is_next = number == expected or (number == 2 and expected == 1)
            if label["line"] is None and not is_next:
                continue  # inside a line only the next number is a label, not "as in Step 1: ..."
            steps[-1] = think[begin:label.start()]
            if not expected <= number <= expected + 2:
                number = expected  # a slip: it repeats, goes back or leaps
            if expected == 1 and number > 1:
                steps.insert(0, "")  # what stands before "Step 2" is step 1
            steps += [""] * (number - len(steps))  # numbers that were left out
            steps.append("")
            begin = label.end()
        steps[-1] = think[begin:]
        if len(steps) > 2:
            break
    else:
        unlabeled = _NUMBERED_LINE.sub("", _STEP_LABEL.sub("", think))
        sentences = _SENTENCE_END.split(unlabeled)
        steps = ["", *(re.sub(r"\A[#>*+•-]+\s", "", s) for s in sentences if re.search(r"\w", s))]  # without bullets
    steps = [re.sub(r"\*\*(?!\d)", "", step) for step in steps[1:max_steps + 1]]  # bold, not 2**3
    steps = [" ".join(step.split()) if re.search(r"\w", step) else "" for step in steps]
    return steps if any(steps) else []

# Minus signs and hyphens, typographic quotes; zero-width characters are dropped
_FOLDED_CHARACTERS = str.maketrans("−–‐‑“”«»‘’", "----\"\"\"\"''", "\u200b\ufeff")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORD = re.compile(rf"(?<![^\W_])(?:{'|'.join(_NUMBER_WORDS)})(?![^\W_])")
# "the cat", but not "a or b", "a b"
_ARTICLE = re.compile(r"\A(?:a|an|the)\s+(?!(?:or|and|[^\W\d_])\b)")
_WRAPPERS = [re.compile(wrapper, re.S) for wrapper in (
    r"\A\\(?:boxed|text|textbf|mathrm|mathbf)\{((?:[^{}]|\{[^{}]*\})*)\}\Z",  # LaTeX
    r"\A\\[(\[]((?:(?!\\[)\]]).)*)\\[)\]]\Z",
    r"\A(?P<mark>\*\*|__|\$\$|[*_$`\"'])((?:(?!(?P=mark)).)*)(?P=mark)\Z",  # markdown and quotes, but not *a* or *b*
    r"\A[(\[{]([^()\[\]{},]*)[)\]}]\Z",  # (a), but not (a) or (b), nor the pair (1,200)
)]
# "-$1,000.50", ".5", "12 %", "5 percent", "3km"
_QUANTITY = re.compile(r"(?P<sign>[+-]?)\s*(?P<currency>[$€£¥₹]?)\s*"
                       r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
                       r"(?:\s*(?P<percent>%|percent\b)(?P<rest>.*)|\s*(?P<unit>[^\W\d_].*))?", re.S)

def normalize_answer(text: str) -> str:
    """Folds the ways of writing one answer into one string, for voting (Eq 1). Idempotent on any string.
    Case, white space, quotes, brackets, markdown and LaTeX around it, a trailing full stop, thousands separators and a
    leading article are folded. Numbers equal in value become equal, zero to twelve in words are numbers, a unit may
    touch its number. Signs, decimal points, percent and currency signs keep their meaning; (1,200) is a pair.

    >>> [normalize_answer(a) for a in ("**7.0**", "$7$", "-5", "5 %", ".50", "1,000km", "(B).", "The cat", "Seven")]
    ['7', '7', '-5', '5%', '0.5', '1000 km', 'b', 'cat', '7']
    """
    text = text.translate(_FOLDED_CHARACTERS).casefold()
    text = _NUMBER_WORD.sub(lambda word: str(_NUMBER_WORDS.index(word[0])), text)
    before = None
    while text != before:  # until nothing changes, since one form may hide another: **$7.$**
        before = text
        text = " ".join(text.split())
        text = re.sub(r"\\([%$])", r"\1", text)  # LaTeX writes \% and \$
        for wrapper in _WRAPPERS:
            wrapped = wrapper.match(text)
            text = wrapped[wrapped.lastindex].strip() if wrapped else text
        text = text.rstrip(" .…")
        text = _ARTICLE.sub("", text)
        text = normalize_number(text)
    return text

def normalize_number(text):
    """A number, with its sign, currency, percent sign or unit, in one form: "+1,000.50KM" -> "1000.5 KM"."""
    match = _QUANTITY.fullmatch(text)
    if not match:
        return text
    number = Decimal(match["number"].replace(",", "")).normalize()
    sign = "-" if number and match["sign"] == "-" else ""  # -0 is 0
    percent = "%" if match["percent"] else ""
    unit = f" {match['unit']}" if match["unit"] else ""
    return f"{sign}{match['currency']}{number:f}{percent}{match['rest'] or ''}{unit}"  # never 1E+3

# ---- Policy: one frozen backbone, two LoRA adapters, one mechanism for sampling, gradient and reference (Eq 7) -------
ROLES = ("solver", "proposer")
LORA_TARGETS = r".*\.(language|text)_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
TEXT_FILES = "token|vocab|merges|template|processor"  # what clients of an adapter need

@dataclass
class EncodedImage:
    """An image after the frozen vision tower: encoded once, used in every pass of a step."""
    ids: list[int]               # the chat template up to the text, a placeholder for each visual token
    features: dict               # what the vision tower gives to the language model
    grid: torch.Tensor | None    # (1, 3) time, height and width in patches, for 3-D positions

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
    """Prompts in the key/value cache, ready to be continued. `repeat` turns its B rows into B N."""
    cache: object                 # B rows of P tokens, padded on the left
    mask: torch.Tensor            # (B, P), 1 for real tokens; once repeated (B N, P + room)
    next_position: torch.Tensor   # (B,) rotary position of the first completion token
    hidden: torch.Tensor          # (B, d) hidden state that predicts the first completion token

    def repeat(self, n, room, new_layer):
        """Every prompt n times in a row, with room for more tokens. `new_layer` makes the layers of the cache. The mask
        covers tokens to come too: the model hides what is not there yet."""
        layers = []
        for once in self.cache.layers:
            layer = new_layer()
            layer.update(once.keys.repeat_interleave(n, 0), once.values.repeat_interleave(n, 0))
            layers.append(layer)
        mask = F.pad(self.mask, (0, room), value=1).repeat_interleave(n, 0)
        next_position = self.next_position.repeat_interleave(n)
        cache = transformers.Cache(layers=layers)
        return Prefill(cache, mask, next_position, self.hidden.repeat_interleave(n, 0))

class Policy:
    """A vision-language model with the adapters "solver" and "proposer" on one frozen backbone. `hf` is the model of
    transformers with PEFT's adapters in it, `peft` the PeftModel around it, `stop_ids` the set of end-of-turn token
    ids. The reference policy of Eq 7 is the same backbone with its adapters off; it costs no memory and cannot drift.
    As a role, None means the reference. (To train all weights you would need a second backbone.)"""

    def __init__(self, config, backbone=None):
        """`backbone` is a (model, tokenizer, processor) to use instead of loading `config.model`."""
        self.config = config
        self.device = resolve_device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # On an H100, torch 2.11 to 2.13 take cuDNN, whose gradients can be NaN under a mask (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.hf, self.tokenizer, self.processor = backbone or load_backbone(config, self.device)
        self.lm_head = self.hf.get_output_embeddings()  # only completions need logits
        self.image_token_id = self.hf.config.image_token_id
        eos = self.hf.generation_config.eos_token_id  # one or several
        self.stop_ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        # The Qwen-VL models have positions in time, height and width, and patches in time
        self.has_3d_positions = hasattr(self.hf.model, "get_rope_index")
        for module in self.hf.modules():
            if self.has_3d_positions and isinstance(module, torch.nn.Conv3d):
                module.__class__ = PatchProduct
        # Families name the mask of image tokens differently, or have none
        arguments = inspect.signature(self.hf.model.forward).parameters
        self.image_mask_names = arguments.keys() & {"token_type_ids", "mm_token_type_ids"}
        # A policy on the CPU of a machine with a GPU must not capture: a CUDA graph would record nothing
        self.captures = not config.enforce_eager and (self.device.type == "cuda" or not torch.cuda.is_available())
        self.add_adapters()

    def add_adapters(self):
        """Puts PEFT's LoRA into the language model's blocks, in float32; the vision tower stays frozen. B starts at
        zero, so both roles start as the reference."""
        from peft import LoraConfig, get_peft_model
        config = self.config
        lora = LoraConfig(target_modules=LORA_TARGETS, r=config.lora_r, lora_alpha=config.lora_alpha,
                          lora_dropout=config.lora_dropout)
        torch.manual_seed(derive_seed(config.seed, "adapters"))  # the same on every rank
        with blame(f"--model {config.model}: no adapters fit a {self.hf.config.model_type} model"):
            self.peft = get_peft_model(self.hf, lora, adapter_name="solver")
            self.peft.add_adapter("proposer", dataclasses.replace(lora))
        name = os.path.abspath(config.model) if Path(config.model).is_dir() else config.model
        for adapter_config in self.peft.peft_config.values():
            adapter_config.base_model_name_or_path = name

    @contextlib.contextmanager
    def adapter(self, role):
        """Switches to a role, or to the reference for None. A role STAYS active after the block, for its backward pass:
        call backward() before another role's block, since PEFT's `set_adapter` turns `requires_grad` off for all other
        adapters. Blocks do not nest. (Gradient checkpointing of the decoder, if you add it, must not cross roles.)"""
        self.hf.get_decoder().train(torch.is_grad_enabled())  # LoRA dropout acts with gradients
        if role is None:
            with self.peft.disable_adapter():
                yield
        else:
            self.peft.set_adapter(role)
            yield

    def lora_weights(self, role):
        """A role's trainable parameters, whether it is active or not."""
        return [weight for name, weight in self.hf.named_parameters() if f".{role}." in name]

    def save(self, folder):
        """Writes folder/solver and folder/proposer, PEFT adapters with the backbone's tokenizer and processor files,
        copied byte for byte, since what one version of transformers writes may not load in an older one."""
        weights = {name: w.data.cpu() for name, w in self.peft.named_parameters() if ".lora_" in name}
        self.peft.save_pretrained(str(folder), selected_adapters=list(ROLES), state_dict=weights,
                                  save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        for file in backbone_folder(self.config.model).iterdir():
            if file.is_file() and re.search(TEXT_FILES, file.name):
                for role in ROLES:
                    shutil.copyfile(file, folder / role / file.name)

    def load(self, role, folder):
        """Reads a PEFT adapter folder into a role. Raises UserError if it is damaged or does not fit."""
        from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
        config = self.config
        settings = adapter_settings(folder)
        with blame(f"{folder}: does not fit --model {config.model}, or this run's --lora_r or --lora_alpha"):
            new = load_peft_weights(str(folder), device="cpu")
            old = get_peft_model_state_dict(self.peft, adapter_name=role)
            if new.keys() != old.keys():  # of other shapes PEFT complains itself
                raise ValueError("its matrices have other names")
            if settings["lora_alpha"] / settings["lora_r"] != config.lora_alpha / config.lora_r:
                raise ValueError("it has another scale lora_alpha / r")
            if not all(w.isfinite().all() for w in new.values()):
                raise ValueError("it is not finite")
            set_peft_model_state_dict(self.peft, new, adapter_name=role)

    @functools.cached_property
    def template(self):
        """The chat template of a turn with one image: what stands before its text, and the token ids behind it."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT-TEXT-SLOT"}]}
        chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        head, tail = chat.split("PROMPT-TEXT-SLOT")  # the text is tokenized apart
        return head, self.tokenizer(tail, add_special_tokens=False)["input_ids"]

    def preprocess(self, image):
        """(token ids of the chat template up to the text, what the processor makes of the image) for one image."""
        head, _ = self.template
        if hasattr(self.processor, "tokenizer"):
            bos = self.tokenizer.bos_token
            add_bos = bool(bos) and not head.startswith(bos)  # some templates write it themselves
            inputs = self.processor(text=[head], images=[image], return_tensors="pt", add_special_tokens=add_bos)
            ids = inputs["input_ids"][0].tolist()
        else:  # as the whole processor of the Qwen-VL models does: a placeholder for each visual token
            inputs = self.processor(images=[image], return_tensors="pt")
            visual_tokens = int(inputs["image_grid_thw"].prod()) // self.processor.merge_size ** 2
            head = head.replace("<|image_pad|>", "<|image_pad|>" * visual_tokens)
            ids = self.tokenizer(head)["input_ids"]
        return ids, inputs

    @torch.no_grad()
    def encode(self, image):
        """Runs the vision tower, unless it was run. Each image alone, so that no number depends on a batch."""
        if isinstance(image, EncodedImage):
            return image
        ids, inputs = self.preprocess(image)
        grid = inputs.get("image_grid_thw")  # stays on the CPU
        inputs = inputs.to(self.device, dtype=self.hf.dtype)
        # Each family wants other inputs beside the pixels: grids, image sizes
        accepted = inspect.signature(self.hf.model.get_image_features).parameters
        arguments = {name: value for name, value in inputs.items() if name in accepted}
        out = self.hf.model.get_image_features(**arguments, return_dict=True)
        features = {}
        for name in ("pooler_output", "deepstack_features"):  # Qwen3-VL also feeds deeper layers
            if out.get(name) is not None:
                features[name] = out[name]
        return EncodedImage(ids, features, grid)

    def tokenize(self, text):
        """Token ids of model or user text; special tokens that are spelled out in it become ordinary characters."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenized
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prefill(self, prompts):
        """Runs prompts through the active adapter once and keeps their keys and values."""
        _, tail = self.template
        images = [self.encode(prompt.image) for prompt in prompts]
        rows = [torch.tensor(image.ids + self.tokenize(p.text) + tail) for image, p in zip(images, prompts)]
        # On the left: all completions begin in one column. On the CPU: get_rope_index would often wait for the GPU
        ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=-1)  # (B, P)
        mask = (ids >= 0).long()
        is_image = (ids == self.image_token_id).int()
        ids = ids.clamp_min(0)
        positions = self.rotary_positions(images, ids, mask, is_image).to(self.device)  # (B, P) or (3, B, P)
        mask = mask.to(self.device)
        features = {}
        for name in images[0].features:
            features[name] = concatenate([image.features[name] for image in images])
        # Made without a config, it keeps all keys: layers with a sliding window would drop old ones
        cache = transformers.DynamicCache()
        # Image features that are there already, so that the vision tower does not run again
        out = self.hf.model(input_ids=ids.to(self.device), attention_mask=mask, position_ids=positions, cache=cache,
                            use_cache=True, mm_encoder_outputs={"image": transformers.utils.ModelOutput(features)},
                            **dict.fromkeys(self.image_mask_names, is_image.to(self.device)))
        # A prompt ends in text, whose positions in time, height and width are equal
        last = positions.reshape(-1, *ids.shape)[0, :, -1]
        return Prefill(cache, mask, last + 1, out.last_hidden_state[:, -1])

    def rotary_positions(self, images, ids, mask, is_image):
        """Positions of padded prompts: (B, P), or (3, B, P) in time, height and width for the Qwen-VL models."""
        if not self.has_3d_positions:
            return (mask.cumsum(-1) - 1).clamp_min(0)
        grids = torch.cat([image.grid for image in images])  # (B, 3)
        positions, _ = self.hf.model.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=grids, attention_mask=mask)
        return positions

    def extend(self, prefill, ids, done=0):
        """Hidden states (rows, T, d) of `ids` (rows, T), which follow a repeated prefill and `done` tokens after it."""
        offsets = done + torch.arange(ids.shape[1], device=self.device)  # `done`: maybe a (1,) tensor
        positions = prefill.next_position[:, None] + offsets  # (rows, T)
        if self.has_3d_positions:
            positions = positions.expand(3, -1, -1)  # text has equal time, height and width
        out = self.hf.model(input_ids=ids, attention_mask=prefill.mask, position_ids=positions,
                            cache=prefill.cache, use_cache=True)
        return out.last_hidden_state

    @torch.no_grad()
    def sample(self, role: str | None, prompts: list[Prompt], num_samples: int, max_new_tokens: int,
               temperature: float = 1.0, seed: int | list[int] = 0) -> list[list[Completion]]:
        """`num_samples` completions of every prompt from the plain softmax. Of the checkpoint's generation_config only
        the end-of-turn ids are used, so the policy that samples is the one that `score` scores. Temperature 0 decodes
        greedily, with log-probabilities at temperature 1. Random numbers are keyed by (seed, prompt, sample): with one
        seed per prompt, a completion does not depend on the batch it shares."""
        if not prompts:
            return []
        seeds = seed if isinstance(seed, list) else [derive_seed(seed, i) for i in range(len(prompts))]
        uniforms = uniform_numbers(seeds, num_samples, max_new_tokens).to(self.device)  # (rows, R)
        stop = torch.tensor(sorted(self.stop_ids), dtype=torch.long, device=self.device)
        # The state of the loop, allocated once and written in place: a captured step always meets the same tensors
        token_ids = torch.zeros_like(uniforms, dtype=torch.long)  # (rows, R)
        logprobs = torch.zeros_like(uniforms, dtype=torch.float32)  # (rows, R)
        finished = torch.zeros(len(uniforms), dtype=torch.bool, device=self.device)  # (rows,)
        t = torch.zeros(1, dtype=torch.long, device=self.device)  # how many tokens each row has

        def choose(hidden):
            """Samples token t of every row from the hidden states that predict it, (rows, d)."""
            logits = self.lm_head(hidden).float() / (temperature or 1.0)  # (rows, V)
            logp = torch.log_softmax(logits, dim=-1)
            if temperature:
                tokens = draw(logp, uniforms.index_select(1, t))  # (rows, 1)
            else:
                tokens = logp.argmax(-1, keepdim=True)
            token_ids.index_copy_(1, t, tokens)
            logprobs.index_copy_(1, t, logp.gather(-1, tokens))
            finished.logical_or_((tokens == stop).any(dim=1))
            t.add_(1)

        def decode():
            """One token more, in kernels alone: nothing here waits for the device or depends on a number in Python."""
            last = token_ids.index_select(1, t - 1)  # (rows, 1)
            choose(self.extend(repeated, last, done=t - 1)[:, 0])

        with self.adapter(role):
            prefill = self.prefill(prompts)
            # All room at once: a new token does not copy the old ones
            length = prefill.mask.shape[1] + max_new_tokens
            repeated = prefill.repeat(num_samples, max_new_tokens, lambda: transformers.StaticLayer(length))
            choose(repeated.hidden)
            step = on_side_stream(decode) if self.device.type == "cuda" else decode  # plain calls first
            for count in range(1, max_new_tokens):  # finished rows go on, and are cut in the end
                if count == 4:  # three plain calls have warmed up the libraries
                    step = self.captured(decode)
                if count % 16 == 0 and finished.all():  # seldom, since asking waits for the device
                    break
                step()
        completions = [self.completion(ids, logp) for ids, logp in zip(token_ids.tolist(), logprobs.cpu())]
        return [completions[i:i + num_samples] for i in range(0, len(completions), num_samples)]

    def captured(self, decode):
        """`decode` as a captured step; as it is where capturing is off or has failed."""
        try:
            return capture(decode) if self.captures else decode
        except RuntimeError as error:
            self.captures = False
            words = str(error.__context__ or error).splitlines()[0]
            print(f"warning: rank {rank()} samples by plain calls, slower: capturing failed: {words}", file=sys.stderr)
            return decode

    def completion(self, ids, logprobs):
        """The completion in a row of sampled tokens, with its end-of-turn token: stopping is rewarded like the rest."""
        stops = [t for t, token in enumerate(ids) if token in self.stop_ids]
        length = stops[0] + 1 if stops else len(ids)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Completion(ids[:length], logprobs[:length].clone(), text, finished=bool(stops))

    def score(self, role: str | None, prompt: Prompt, completions: list[Completion],
              temperature: float = 1.0):
        """The Scores of sampled completions: log-probabilities, conditioned on the image, and KL to the reference. The
        role stays active, for the backward pass."""
        prompt = Prompt(self.encode(prompt.image), prompt.text)  # once for both passes
        with torch.no_grad(), self.adapter(None):
            ref_hidden = self.completion_hidden(prompt, completions)  # (M, d)
        with self.adapter(role):
            hidden = self.completion_hidden(prompt, completions)  # (M, d)
        token_ids = torch.tensor([token for c in completions for token in c.token_ids], device=self.device)  # (M,)
        logprobs = []
        kl = []
        # Chunks bound the logits, 512 x 152,000 numbers for Qwen2.5-VL
        for chunk in zip(hidden.split(512), ref_hidden.split(512), token_ids.split(512)):
            # `checkpoint` frees the logits at once; the backward pass computes each chunk again
            of_chunk = checkpoint(token_statistics, *chunk, self.lm_head, temperature, use_reentrant=False)
            logprobs.append(of_chunk[0])
            kl.append(of_chunk[1])
        lengths = [len(c.token_ids) for c in completions]
        return Scores(list(torch.cat(logprobs).split(lengths)), list(torch.cat(kl).split(lengths)))

    def completion_hidden(self, prompt, completions):
        """Hidden states that predict the completions' tokens, (M, d). The prompt is prefilled once for all N, also with
        gradients: P + N R tokens go through the model instead of N (P + R)."""
        rows = [torch.tensor(c.token_ids) for c in completions]
        ids = pad_sequence(rows, batch_first=True).to(self.device)  # (N, R), padding unseen
        # Layers that grow by concatenation, which passes gradients on to the prompt
        prefill = self.prefill([prompt]).repeat(len(rows), ids.shape[1] - 1, transformers.DynamicLayer)
        hidden = prefill.hidden[:, None]  # (N, 1, d)
        if ids.shape[1] > 1:
            later = self.extend(prefill, ids[:, :-1])  # (N, R - 1, d)
            hidden = torch.cat([hidden, later], dim=1)  # (N, R, d)
        return torch.cat([h[:len(row)] for h, row in zip(hidden, rows)])

    @torch.no_grad()
    def embed_steps(self, steps: list[str]):
        """f(s) of section 3.2: the l2-normalized mean (of the sum: the same) of a step's token embeddings, (J, d), CPU.
        An empty step stays zero."""
        table = self.hf.get_input_embeddings().weight
        e = torch.zeros(len(steps), table.shape[1], device=self.device)
        for j, step in enumerate(steps):
            ids = torch.tensor(self.tokenize(step)[:self.config.embed_max_tokens], dtype=torch.long, device=self.device)
            e[j] = table[ids].float().sum(dim=0)
        return F.normalize(e, dim=-1).cpu()

def capture(step):
    """Records one call of `step` as a CUDA graph, without doing its work, and returns the graph's replay; without CUDA,
    `step`. A replay launches all kernels at once: one by one from Python, some 2,700 a token of the 7B, they keep the
    GPU waiting. `step` must read and write the same tensors at every call, for its numbers too."""
    if not torch.cuda.is_available():
        return step
    graph = torch.cuda.CUDAGraph()
    side = side_stream()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()  # other threads may use the GPU meanwhile
    return graph.replay

def on_side_stream(step):
    """Plain calls of `step` on the stream of captures: a capture must not be the first to use a library there."""
    side = side_stream()
    def run():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
    return run

@functools.cache
def side_stream():
    """The stream of captures, always the same: ROCm's hipBLASLt sets itself up once per stream."""
    return torch.cuda.Stream()

def uniform_numbers(seeds, num_samples, length):
    """Uniform numbers, (B N, length), float64: a stream per completion, keyed by its prompt's seed and its number."""
    rows = []
    for seed in seeds:
        for n in range(num_samples):
            generator = torch.Generator().manual_seed(derive_seed(seed, n))
            rows.append(torch.rand(length, dtype=torch.float64, generator=generator))
    return torch.stack(rows)

def draw(logp, uniform):
    """Tokens (rows, 1) from log-probabilities (rows, V) and uniform numbers (rows, 1), by the distribution function."""
    cdf = logp.double().exp().cumsum(-1)  # (rows, V)
    heights = uniform * cdf[:, -1:]  # the last value of cdf is 1 but for rounding
    return torch.searchsorted(cdf, heights, right=True).clamp_max(cdf.shape[-1] - 1)

def concatenate(values):
    """Joins image features: tensors, tuples of them (one per image), or lists of such (one per layer, as Qwen3-VL)."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if torch.is_tensor(values[0][0]):
        return tuple(tensor for value in values for tensor in value)
    return [concatenate(list(layer)) for layer in zip(*values)]

def resolve_device(name):
    """The torch device of a --device setting; under torchrun each rank takes the GPU of its LOCAL_RANK."""
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in ["cpu", *(f"cuda:{index}" for index in range(found))]:
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N; PyTorch sees {found} GPUs. See README")
    return torch.device(name)

class PatchProduct(torch.nn.Conv3d):
    """The patch embedding of the Qwen-VL vision towers, whose kernel is a whole patch, as the matrix product that it
    is: MIOpen (ROCm) crashes on this convolution, and cuDNN takes 10 to 20 times longer."""
    def forward(self, patches):  # (patches, channels, time, height, width)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)

def load_backbone(config, device):
    """(model, tokenizer, processor) of a checkpoint, the model frozen; for the Qwen-VL models, the image processor."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    backbone_folder(config.model)
    with blame(f"--model {config.model}: not a complete vision-language chat model"):
        transformers.utils.versions.require_version("transformers>=5.24")  # older: no `cache`
        hf, info = transformers.AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=getattr(torch, dtype), output_loading_info=True)
        wrong = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
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

@functools.cache
def backbone_folder(model):
    """The folder with a backbone's files: `model` itself, or its place in the Hugging Face Hub's cache."""
    if Path(model, "adapter_config.json").exists() or Path(model, "solver").exists():
        raise UserError(f"--model {model}: that is an adapter: give it as --adapter, and its backbone as --model")
    with blame(f"--model {model}: no such folder with a model, and not found on the Hub"):
        return Path(transformers.utils.cached_file(model, "config.json")).parent

def adapter_settings(folder):
    """What a PEFT adapter folder says of its LoRA: the settings that a Policy for it needs. Raises UserError."""
    with blame(f"{folder}: no usable PEFT adapter. Name a step_* folder of a run, or its solver/ folder"):
        peft = dict(json.loads((folder / "adapter_config.json").read_text()))
        if peft.get("use_rslora") or peft.get("use_dora") or peft.get("rank_pattern"):
            raise ValueError("a kind of LoRA that does not fit a Policy")
        return {"lora_r": peft["r"], "lora_alpha": peft["lora_alpha"], "model": peft["base_model_name_or_path"]}

# ---- Learner: one role's optimizer, baseline and beta (Eq 7, 8) ------------------------------------------------------
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
        if world_size() > 1:
            # The seed is the same, but another kind of GPU might draw other numbers
            for weight in self.weights:
                dist.broadcast(weight.data, src=0)

    def update(self, prompts: list[Prompt], completions: list[list[Completion]], rewards: list[list[float]],
               learn: bool = True):
        """One optimizer step over all rollouts of all ranks (Eq 7), then beta (Eq 8) and the baseline; without `learn`
        the baseline alone. The lists have one entry per question (Proposer: image) of this rank. Returns what to log.
        If the gradient norm or the KL is not finite, all ranks skip the update; five in a row raise UserError."""
        config = self.policy.config
        of_this_rank = sum(rewards, [])
        reward_sum, count = all_sum(sum(of_this_rank), len(of_this_rank))
        if count == 0:  # no rank got a question to work on
            return {}
        mean_reward = reward_sum / count
        baseline = mean_reward if self.baseline is None else self.baseline  # starts at the mean [ours]
        stats = {"baseline": baseline}
        if learn:
            kl = self.gradient(prompts, completions, rewards, baseline, count)
            grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, config.grad_clip).item()
            finite = math.isfinite(grad_norm) and math.isfinite(kl)  # the same on all ranks
            stats |= {"kl": kl, "beta": self.beta, "grad_norm": grad_norm, "skipped": int(not finite)}
            self.skips_in_a_row = 0 if finite else self.skips_in_a_row + 1
            if self.skips_in_a_row == 5:
                raise UserError(f"the {self.role}'s loss or gradient was not finite in 5 updates in a row. Look at "
                                "metrics.jsonl; lower --lr, or try --dtype float32")
            if not finite:
                return stats
            self.optimizer.step()
            self.beta = adapt_kl_coef(self.beta, kl, config.kl_target, config.kl_adapt_rate,
                                      config.kl_coef_min, config.kl_coef_max)
        self.baseline = update_baseline(baseline, mean_reward, config.baseline_momentum)
        return stats

    def gradient(self, prompts, completions, rewards, baseline, count):
        """Leaves in the weights' .grad the gradient of Eq 7, a mean over all `count` rollouts of all ranks. Returns
        their mean KL."""
        config = self.policy.config
        kind = config.advantage
        max_tokens = config.max_new_tokens_solver
        if self.role == "proposer":
            kind = "ema"  # with one sample per image, the other kinds would give 0
            max_tokens = config.max_new_tokens_proposer
        self.optimizer.zero_grad(set_to_none=True)
        kl_sum = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for prompt, replies, r in zip(prompts, completions, rewards):
            a = advantages(r, baseline, kind)  # of all N, before they are cut into passes
            for start in range(0, len(replies), config.score_rollouts):
                part = slice(start, start + config.score_rollouts)
                scores = self.policy.score(self.role, prompt, replies[part], config.temperature)
                loss = reinforce_loss(scores.logprobs, scores.kl, a[part], self.beta, config.logprob_reduction,
                                      max_tokens)
                share = len(replies[part]) / count  # in the mean over all ranks' rollouts
                (loss * share).backward()
                for kl in scores.kl:
                    kl_sum += kl.detach().mean()
        if world_size() > 1:  # once an update; a rank without a rollout adds 0
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)
        return all_sum(kl_sum.item())[0] / count

# ---- Ranks: torchrun starts one process per GPU; every printed or decided number is global ---------------------------
def world_size():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    """The number of this process among them; rank 0 prints and writes."""
    return int(os.environ.get("RANK", 0))

def say(text):
    """Prints a line, once for all ranks."""
    if rank() == 0:
        print(text, flush=True)

def join_ranks(device):
    """Joins the process group of torchrun, if torchrun started us: nccl (RCCL on ROCm) on GPUs, gloo on the CPU."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, number, size = next(rendezvous("env://"))
    # torchrun keeps its store, with the addresses of dead ranks, over a restart: each attempt has a part of its own
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size)

def gather(value):
    """The values of all ranks, in order of rank, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def all_sum(*values):
    """Each value summed over all ranks."""
    return [sum(column) for column in zip(*gather(values))]

def on_rank_zero(function, *arguments):
    """Calls a function on rank 0 alone, while the others wait. All return its result, or raise its UserError."""
    result = None
    try:
        if rank() == 0:
            result = function(*arguments)
    except UserError as error:
        result = error
    result = gather(result)[0]
    if isinstance(result, UserError):
        raise result
    return result

def stop_signals(stack):
    """A list of the SIGTERMs and SIGINTs (Ctrl-C) that come until the stack closes; nothing else follows from them."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, lambda number, frame: caught.append(number))
        stack.callback(signal.signal, number, before)
    return caught

# ---- Images ----------------------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

def list_images(data):
    """The image files of folders (recursive, none hidden) in a fixed order, each once though folders may overlap."""
    found = {}
    real_path = functools.cache(os.path.realpath)  # not of files: slow on a parallel file system
    for folder in data:
        top = Path(folder).expanduser()  # a ~ that the shell left alone
        if not top.is_dir() or not folder:
            raise UserError(f"--data {folder}: is not a folder")
        say(f"looking for images in {top}")
        images = [path for path in top.rglob("*")
                  if path.suffix.lower() in IMAGE_SUFFIXES and "/." not in f"/{path.relative_to(top)}"]
        if not images:
            raise UserError(f"--data {folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        for path in sorted(images):
            found.setdefault((real_path(path.parent), path.name), path)
    return list(found.values())

def load_image(path):
    """An upright RGB image: first frame, EXIF rotation, alpha on white, 16 bits scaled to 8. Raises UserError."""
    with blame(f"{path}: cannot be read as an image"), Image.open(path) as image:
        # Reads the EXIF tags and drops their bytes: `exif_transpose` would write all anew, and fails at strange ones
        image.getexif()
        image.info.pop("exif", None)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # converting to RGB would clip 16 bits, not scale them
            image = image.convert("I").point(lambda value: value / 257)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        if max(image.size) >= 200 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels is too narrow")
        return image.convert("RGB")

@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """The order of `count` files in an epoch."""
    rng = random.Random(derive_seed(seed, "order", epoch))
    return rng.sample(range(count), count)

def load_next_image(paths, seed, index):
    """(path, image) number `index` of a run, counted over all steps and ranks: the files in a new order in each epoch.
    The next readable file takes the place of an unreadable one, the same on any number of ranks."""
    epoch, start = divmod(index, len(paths))
    order = epoch_order(len(paths), seed, epoch)
    for offset in range(len(paths)):
        path = paths[order[(start + offset) % len(paths)]]
        try:
            return path, load_image(path)
        except UserError as error:
            print(f"warning: skipping {error}", file=sys.stderr)
    raise UserError(f"--data: none of the {len(paths)} image files can be read; see the warnings above")

# ---- Run folder: config.json, metrics.jsonl, rollouts.jsonl, step_*/ -------------------------------------------------
@contextlib.contextmanager
def open_run(config):
    """Makes the run folder and locks it inside the block. Gives it, and the checkpoint to continue from or None."""
    name = config.run_name.replace("{seed}", str(config.seed))
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise UserError(f"--run_name {name!r}: must be the name of one folder")
    run = Path(config.output_dir, name)
    with contextlib.ExitStack() as stack:
        yield run, on_rank_zero(lock_and_look, run, config, stack)

def lock_and_look(run, config, stack):
    """The checkpoint to continue from, or None to start. Raises UserError rather than touch another run."""
    with blame(f"{run}: cannot be made or written. Choose another --output_dir or --run_name"):
        run.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(run / ".lock", "w"))  # a crash frees it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run}: another run is writing there. Wait for it, or choose another --run_name")
    except OSError as error:  # a Lustre may be mounted without locks
        say(f"warning: {run}: cannot be locked ({error}). Let no second run write there")
    settings = run / "config.json"
    if not settings.exists():
        if any(not file.name.startswith(".") for file in run.iterdir()):  # not our .lock
            raise UserError(f"{run}: holds other files and no run. Choose another --run_name")
        return None
    if not config.resume:
        raise UserError(f"{run}: holds a run already. Add --resume to continue it, or choose another --run_name")
    with blame(f"{settings}: damaged. Choose another --run_name"):
        saved = dict(json.loads(settings.read_text()))
        saved["data"] = tuple(saved["data"])
    there = dataclasses.asdict(Config()) | saved  # a newer setting has its default
    for name, here in dataclasses.asdict(config).items():
        if here == there[name] or name in ("resume", "dry_run"):
            continue
        change = f"--{name} {there[name]} there, {here} here"
        if name not in MAY_CHANGE:
            raise UserError(f"{run}: holds a run with other settings ({change}). Choose another --run_name")
        say(f"{run}: resuming with a change: {change}")
    return next(iter(list_checkpoints(run)), None)

def list_checkpoints(run):
    """Complete checkpoints of a run, newest first."""
    return sorted((file.parent for file in run.glob(f"step_{'[0-9]' * 6}/trainer_state.pt")), reverse=True)

def start_log(run, config, last_step, stack):
    """Writes the settings. A resumed run makes the steps after its checkpoint again, so their rows are cut off."""
    if config.wandb:  # first: where it fails, the folder is still as it was
        with blame(f"--wandb {config.wandb}: cannot be started. Try pip install wandb, or leave the flag out"):
            import wandb
            wandb.init(project=config.wandb, name=run.name, id=str(derive_seed(str(run.resolve()))), resume="allow",
                       config=dataclasses.asdict(config))
            wandb.define_metric("*", step_metric="step")  # W&B's own counter refuses steps that are made again
            stack.callback(wandb.finish)
    kept = set(range(last_step + 1))  # a range would be searched step by step for a float
    texts = {"config.json": json.dumps(dataclasses.asdict(config), indent=2) + "\n"}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        rows = [row for row in read_jsonl(run / name) if row.get("step") in kept]
        texts[name] = "".join(json.dumps(row) + "\n" for row in rows)
    with blame(f"{run}: cannot be written. Make room, or choose another --output_dir"):
        # Each is written aside and renamed: a killed process leaves it as a whole or not at all
        for name, text in texts.items():
            part = run / ".part"
            part.write_text(text, encoding="utf-8")
            part.rename(run / name)

def read_jsonl(path, tail=math.inf):
    """The rows of a log, or of its last `tail` bytes; none if it is missing. A line that a crash tore is left out."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            file.seek(max(0, path.stat().st_size - tail))
            for line in file:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row

def append_jsonl(path, rows):
    """Appends rows to a log. NaN and infinity become null, since JSON has no such numbers."""
    with blame(f"{path}: cannot be written. Make room"), open(path, "a", encoding="utf-8") as file:
        for row in rows:
            plain = json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)
            file.write(json.dumps(plain) + "\n")

def save_checkpoint(run, progress, policy, learners):
    """Writes run/step_NNNNNN aside and then renames it, so that a folder of that name is complete; deletes old ones."""
    folder = run / f"step_{progress['step']:06d}"
    part = run / f".{folder.name}.part"
    state = dict(progress)
    for role, learner in learners.items():
        state[role] = {"beta": learner.beta, "baseline": learner.baseline}
        state[role]["optimizer"] = learner.optimizer.state_dict()
    with blame(f"{part}: cannot be written. Make room; --resume goes on from the newest checkpoint"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        policy.save(part)
        torch.save(state, part / "trainer_state.pt")
        # On the disk before the name says that it is complete
        for file in part.rglob("*.*"):
            with open(file, "rb") as written:
                os.fsync(written)
        # A folder of this name has no trainer_state.pt, or the run would have been resumed from it
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in list_checkpoints(run)[policy.config.keep_checkpoints:]:
            shutil.rmtree(old.rename(run / f".{old.name}.part"))

def load_checkpoint(folder, policy, learners):
    """Restores adapters and trainer state, unpickling tensors and numbers alone, and returns it."""
    with blame(f"{folder}: damaged. Delete it to resume from the checkpoint before it"):
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        for role, learner in learners.items():
            policy.load(role, folder / role)
            learner.beta = state[role]["beta"]
            learner.baseline = state[role]["baseline"]
            learner.optimizer.load_state_dict(state[role]["optimizer"])
        return state

# ---- Training loop ---------------------------------------------------------------------------------------------------
@dataclass
class Episode:
    """One image on its way through one step."""
    slot: int                                   # number of the image within the step's global batch
    path: Path
    image: EncodedImage
    request: Prompt                             # what the Proposer is asked
    proposal: Completion | None = None
    question: str | None = None                 # None: no question; the Solver rests, and r_prop stays 0
    prompt: Prompt | None = None                # what the Solver is asked
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rewards: dict = field(default_factory=lambda: {"r_prop": 0.0})
    watch: dict = field(default_factory=dict)   # signs of collapse, at some steps

def train(config: Config, reward=group_rewards):
    """Self-evolution on folders of images. `reward` is called as `group_rewards` is. Returns the run folder."""
    join_ranks(resolve_device(config.device))
    # Fail early, where there is no image, no readable one or no backbone
    paths = list_images(config.data)
    load_next_image(paths, config.seed, 0)
    backbone_folder(config.model)
    with open_run(config) as (run, newest), contextlib.ExitStack() as stack:
        start = f"resumed after step {int(newest.name[5:])}" if newest else "from the start"
        say(f"{len(paths)} image(s), {config.images_per_rank * world_size()} a step on {world_size()} rank(s); model "
            f"{config.model}; run folder {run}; {start}")
        if config.dry_run:
            say(f"--dry_run: nothing was refused; {shutil.disk_usage(run).free / 1e9:.0f} GB are free there")
            return run
        policy = Policy(config)
        learners = {role: Learner(policy, role) for role in ROLES}
        progress = {"step": 0, "images_seen": 0, "num_files": len(paths)}
        if newest:
            progress = load_checkpoint(newest, policy, learners)
        if progress["num_files"] != len(paths):
            say(f"warning: there were {progress['num_files']} images before, so their order changes from here on")
        step = progress["step"]
        images_seen = progress["images_seen"]
        on_rank_zero(start_log, run, config, step, stack)
        if config.num_rollouts == 1:
            say("with --num_rollouts 1 nothing can agree, so nothing is learned from agreement")
        signals = stop_signals(stack)  # only now: Ctrl-C while a model downloads ends at once
        stopped = False
        while step < config.total_steps and not stopped:
            step += 1
            started = time.perf_counter()
            torch.manual_seed(derive_seed(config.seed, step, rank()))  # for dropout alone
            lam = step_reward_weight(step, config.total_steps, config.lambda_max, config.warmup_frac,
                                     config.lambda_schedule)

            # The Proposer asks, the Solver answers N times
            episodes = propose(policy, paths, step, images_seen)
            asked = [e for e in episodes if e.question is not None]
            solve(policy, asked, step)
            # The reward: agreement of these N rollouts with each other
            for e in asked:
                embeddings = [policy.embed_steps(rollout.steps) for rollout in e.rollouts]
                rewards = reward(e.rollouts, embeddings, lam, config, e.question)
                e.rewards = valid_rewards(rewards, config.num_rollouts)
            if config.watch_every and (step == 1 or step % config.watch_every == 0):
                ask_about_another_image(policy, asked, paths, step, images_seen)

            # One optimizer step per role, over the rollouts of all ranks
            stats = {}
            stats["solver"] = learners["solver"].update(
                [e.prompt for e in asked],
                [e.completions for e in asked],
                [e.rewards["r_sol"] for e in asked])
            # The Proposer's adapter learns every `proposer_every` steps [4.1], its baseline at each one [ours]
            stats["proposer"] = learners["proposer"].update(
                [e.request for e in episodes],
                [[e.proposal] for e in episodes],
                [[e.rewards["r_prop"]] for e in episodes],
                learn=step % config.proposer_every == 0)

            images_seen += world_size() * config.images_per_rank
            rows = sum(gather([log_row(e, step, lam) for e in episodes]), [])  # in order of rank
            on_rank_zero(log_step, run, config, rows, stats, time.perf_counter() - started)
            stopped = all_sum(len(signals))[0] > 0  # all stop after the same step
            if stopped or step % config.save_every == 0 or step == config.total_steps:
                progress = {"step": step, "images_seen": images_seen, "num_files": len(paths)}
                on_rank_zero(save_checkpoint, run, progress, policy, learners)
    if step < config.total_steps:
        raise Stopped(f"{run}: stopped by a signal after step {step}, which is saved. Add --resume to go on")
    say(f"finished: {run}/step_{step:06d} holds both adapters")
    return run

def propose(policy, paths, step, first_image):
    """This rank's share of the step's images, each with one proposed question."""
    config = policy.config
    episodes = []
    for slot in range(rank() * config.images_per_rank, (rank() + 1) * config.images_per_rank):
        path, image = load_next_image(paths, config.seed, first_image + slot)
        encoded = policy.encode(image)
        episodes.append(Episode(slot, path, encoded, Prompt(encoded, proposer_prompt())))
    prompts = [e.request for e in episodes]
    seeds = [derive_seed(config.seed, step, e.slot, "proposer") for e in episodes]
    samples = policy.sample("proposer", prompts, 1, config.max_new_tokens_proposer, config.temperature, seeds)
    for e, (proposal,) in zip(episodes, samples):
        e.proposal = proposal
        e.question = parse_question(proposal.text)
    return episodes

def solve(policy, asked, step, key="solver"):
    """Fills in N Solver rollouts for each episode. `key` keys their random numbers."""
    config = policy.config
    for e in asked:
        e.prompt = Prompt(e.image, solver_prompt(e.question))
    prompts = [e.prompt for e in asked]
    seeds = [derive_seed(config.seed, step, e.slot, key) for e in asked]
    samples = policy.sample("solver", prompts, config.num_rollouts, config.max_new_tokens_solver,
                            config.temperature, seeds)
    for e, completions in zip(asked, samples):
        e.completions = completions
        e.rollouts = [parse_rollout(c.text, config.max_reasoning_steps) for c in completions]

def valid_rewards(rewards, n):
    """The result of a reward function, tensors as lists. Raises UserError if it cannot train the two roles."""
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in (rewards or {}).items()}
    r_sol = plain.get("r_sol")
    if not isinstance(r_sol, list) or len(numbers(r_sol, n)) != n:
        raise UserError(f'reward: "r_sol" must be a list of {n} numbers, but is {str(r_sol):.200}')
    if len(numbers(plain.get("r_prop"), 0)) != 1:
        raise UserError(f'reward: "r_prop" must be a number, but is {str(plain.get("r_prop")):.200}')
    return plain

def numbers(value, n):
    """The finite numbers in a number or in a list of n values; none in anything else. The log writes their mean."""
    values = value if isinstance(value, list) and len(value) == n else [value]
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]

def ask_about_another_image(policy, asked, paths, step, first_image):
    """Looks for collapse: asks each question about the run's next image too. Where two rollouts about different images
    agree as often as two about one, no answer comes from the picture. Alters no training number."""
    others = []
    for e in asked:
        path, image = load_next_image(paths, policy.config.seed, first_image + e.slot + 1)
        others.append(dataclasses.replace(e, path=path, image=policy.encode(image)))
    solve(policy, others, step, "another image")
    n = policy.config.num_rollouts
    for e, other in zip(asked, others):
        here = Counter(rollout.vote for rollout in e.rollouts if rollout.vote)
        there = Counter(rollout.vote for rollout in other.rollouts if rollout.vote)
        e.watch["pair_agreement"] = sum(c * (c - 1) for c in here.values()) / max(n * (n - 1), 1)
        if other.path != e.path:  # a folder may hold a single image
            e.watch["swapped_agreement"] = sum(c * there[vote] for vote, c in here.items()) / n ** 2

def log_row(e, step, lam):
    """An episode as a row of rollouts.jsonl."""
    votes = [rollout.vote for rollout in e.rollouts]
    own = {
        "step": step, "lambda": lam, "image": str(e.path),
        "proposal": e.proposal.text, "question": e.question, "no_question": e.question is None,
        "texts": [rollout.text for rollout in e.rollouts],
        "steps": [rollout.steps for rollout in e.rollouts],
        "num_steps": [len(rollout.steps) for rollout in e.rollouts],
        "votes": votes, "invalid": [vote is None for vote in votes],
        "unfinished": [not c.finished for c in e.completions],
        "tokens": sum(len(c.token_ids) for c in [e.proposal, *e.completions]),
    }
    return join_names(e.rewards, own | e.watch)

def log_step(run, config, rows, stats, seconds):
    """Writes and prints a step, from the rows of all ranks: metrics are means over them."""
    values = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            values[key] += numbers(value, config.num_rollouts)
    means = {key: statistics.fmean(of_key) for key, of_key in values.items() if of_key}
    own = {"seconds": seconds, "tokens_per_second": sum(values["tokens"]) / seconds}
    for role, of_role in stats.items():
        own |= {f"{key}_{role}": value for key, value in of_role.items()}
    if "pair_agreement" in means:
        earlier = read_jsonl(run / "rollouts.jsonl", tail=10**7)
        questions = [row["question"] for row in [*earlier, *rows] if row.get("question")][-256:]
        own["distinct_questions"] = len(set(questions)) / len(questions)
    metrics = join_names(means, own)
    append_jsonl(run / "rollouts.jsonl", rows)
    append_jsonl(run / "metrics.jsonl", [metrics])
    if config.wandb:
        sys.modules["wandb"].log(metrics)
    asked = [row for row in rows if row["question"]]
    if asked:
        print_step(config, metrics, asked[0])
    else:
        say(f"{rows[0]['step']:5d}/{config.total_steps} | no proposal held a question: see them in rollouts.jsonl")

# Edit these to print another metric; what a step does not have is "nan", and z makes "0.0" of "-0.0"
STEP_LINE = ("{step:5.0f}/{total_steps} | H {entropy:.2f} (valid {entropy_valid:.2f}) maj {group_size:.1f} "
             "bad {invalid:.0%} | r_ans {r_ans:.2f} r_step {r_step:z.2f} lam {lambda:.2f} r_sol {r_sol:z.2f} "
             "r_prop {r_prop:.2f} no question {no_question:.0%} | KL {kl_solver:z.4f} beta {beta_solver:.4f} | "
             "{seconds:.2f} s {tokens_per_second:.0f} tok/s, {left:.0f} min left")
WATCH_LINE = ("    watch: two replies agree {pair_agreement:.0%}, two about different images {swapped_agreement:.0%}; "
              "distinct questions {distinct_questions:.0%}")

def print_step(config, metrics, row):
    """The line of a step and, from time to time, the signs of collapse and the rollouts of a question."""
    values = defaultdict(lambda: math.nan, total_steps=config.total_steps)
    values["left"] = metrics["seconds"] * (config.total_steps - row["step"]) / 60
    values |= metrics
    say(STEP_LINE.format_map(values))
    if "pair_agreement" in metrics:
        say(WATCH_LINE.format_map(values))
    if config.show_every and row["step"] % config.show_every == 0:
        say(f"    {row['image']}: {row['question']}")
        for r_sol, vote, text in zip(row["r_sol"], row["votes"], row["texts"]):
            say(f"      r_sol {r_sol:.2f}  {vote or '(invalid)'}: {' '.join(text.split())[:160]}")

def join_names(of_reward, of_log):
    """One dict of both. Raises UserError if a reward of your own uses a name of the log."""
    for name in of_reward.keys() & of_log.keys():
        raise UserError(f"reward: {name!r} is a name of the log. Choose another one")
    return of_reward | of_log

# ==== The paper ends here. What follows asks a trained Solver and reads the command line ==============================
def ask(argv):
    """One image, one question: prints the reasoning and the answer, decoded greedily."""
    parser = Parser("ask", ASK_SETTINGS)
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--adapter", default="", help="step_* folder of a run; default: the plain backbone")
    settings, own = parser.read(argv)
    prompt = Prompt(load_image(own["image"]), solver_prompt(own["question"]))
    policy, role = load_solver(settings, own["adapter"])
    reply = policy.sample(role, [prompt], 1, policy.config.max_new_tokens_solver, temperature=0.0)[0][0]
    rollout = parse_rollout(reply.text, 1000)
    for j, step in enumerate(rollout.steps, 1):
        say(f"Step {j}: {step}")
    say(f"Answer: {rollout.answer}" if rollout.answer else f"(no <answer> in the reply) {rollout.text}")

def load_solver(settings, adapter):
    """A policy and the role that answers: "solver" with an adapter, on the backbone it was trained on, else None."""
    if not adapter:
        return Policy(Config(**settings)), None
    folder = Path(adapter, "solver") if Path(adapter, "solver").is_dir() else Path(adapter)
    if folder.name == "proposer":
        raise UserError(f"--adapter {adapter}: a Proposer, which answers nothing. Give the solver folder beside it")
    trained = adapter_settings(folder)
    if "model" not in settings and Path(trained["model"]).is_absolute() and not Path(trained["model"]).exists():
        raise UserError(f"--adapter {adapter}: its backbone is not at {trained['model']} any more. Name it by --model")
    policy = Policy(Config(**{**trained, **settings}))
    policy.load("solver", folder)
    return policy, "solver"

ALL_SETTINGS = tuple(f.name for f in dataclasses.fields(Config))
ASK_SETTINGS = ("model", "max_new_tokens_solver", "max_pixels", "device", "dtype", "enforce_eager")

class Parser(argparse.ArgumentParser):
    """The command line of a command, with a flag for each of some settings. `defaults` are the command's own."""

    def __init__(self, command, settings=(), defaults={}):
        super().__init__(
            prog=f"ireasoner.py {command}", usage="%(prog)s ...", allow_abbrev=False,
            description=(__doc__ or "").split("\n\nWhere the defaults")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter)
        self.settings = settings
        kinds = {bool: {"action": "store_true"}, tuple: {"nargs": "+"}}
        for f in dataclasses.fields(Config):
            options = kinds.get(f.type, {"type": f.type, "metavar": "X"})
            if isinstance(f.metadata["allowed"], list):
                options = {"choices": f.metadata["allowed"]}
            if f.name in settings:
                meaning = f"{f.metadata['meaning']}; default {defaults.get(f.name, f.default)!r}".replace("%", "%%")
                self.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=meaning, **options)
        if settings == ALL_SETTINGS:
            self.add_argument("--preset", choices=PRESETS, default="ireasoner",
                              help="row of the paper's Tables 1 to 3; other flags win over it")

    def read(self, argv):
        """(settings: the preset's row, and over it what was given; the command's own arguments)."""
        arguments = vars(self.parse_args(argv))
        given = {name: arguments.pop(name) for name in self.settings if name in arguments}
        row = PRESETS.get(arguments.pop("preset", None), {})
        return {**row, **given}, arguments

    def error(self, message):
        raise UserError(f"{message}. See --help; a text with blanks needs quotes")

def main(argv=None):
    """Runs one command. Returns the exit status: 0, or 2 after one line that says why it could not go on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    sys.stdout.reconfigure(errors="backslashreplace")  # any text, on any terminal
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        argv = ["train", *argv]
    command, *argv = argv
    message = ""
    stopped = False
    try:
        if command == "train":
            settings, _ = Parser("train", ALL_SETTINGS).read(argv)
            train(Config(**settings))
        elif command == "ask":
            ask(argv)
        else:
            with blame(f"{command}: not in ireasoner.py, and test_ireasoner.py with more commands cannot be imported"):
                import test_ireasoner
            test_ireasoner.run_command(command, argv)
    except UserError as error:
        message = str(error)
        stopped = isinstance(error, Stopped)
    except torch.OutOfMemoryError as error:
        message = f"{str(error).splitlines()[0]} Lower --max_pixels, --score_rollouts, --images_per_rank or the batch"
    except KeyboardInterrupt:
        message = "interrupted"
    status = 2 if message else 0
    # The first rank that fails says why; before they have joined, the last of each node: it lacks a GPU if they are few
    speaks = int(os.environ.get("LOCAL_RANK", 0)) + 1 == int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if message and dist.is_initialized():
        speaks = dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    if message and speaks:
        print(f"ireasoner: {message}", file=sys.stderr)
        if "TORCHELASTIC_RUN_ID" in os.environ and not stopped:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun would start the refused run again
    if dist.is_initialized():
        os._exit(status)  # threads of gloo abort one interpreter in fifty that ends in the usual way
    return status

if __name__ == "__main__":
    sys.exit(main())
