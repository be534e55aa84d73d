"""iReasoner: a vision-language model improves itself on unlabeled images.

A reference implementation of "iReasoner: Trajectory-Aware Intrinsic Reasoning Supervision for Self-Evolving Large
Multimodal Models", in one file, in the order of the paper. One training step:

    images    <- a few unlabeled pictures per rank
    questions <- the Proposer (LoRA adapter 1) asks one question about each picture
    rollouts  <- the Solver (LoRA adapter 2) answers each question N = 5 times, in numbered steps
    rewards   <- agreement of the answers (Eq 1, 5) and, inside the majority, of the steps (Eq 2-4), mixed by Eq 6
    update    <- KL-regularised REINFORCE against the adapter-free backbone (Eq 7), every role its own beta (Eq 8)

    python ireasoner.py demo                                   # laptop: watch a tiny Qwen2.5-VL improve, no download
    python ireasoner.py --data images                          # one GPU: train Qwen2.5-VL-7B on a folder of images
    torchrun --nproc_per_node=8 ireasoner.py --data images     # one node of eight
    python ireasoner.py ask IMAGE QUESTION | eval FILE.jsonl | export ADAPTER FOLDER | report RUN | bench | --help

Sections: Config | 3.1 Prompts and parsing | 3.1 Answers: Eq 1 | 3.2 Steps: Eq 2-4, Figure 7 | 3.3 Rewards: Eq 5, 6
          Policy: one backbone, two adapters | Backbones | 3.3 Update: Eq 7, 8 | Ranks | Images | Run folder
          Training loop: `train`, and `train_step`, the paper's loop on one screen. Here the paper ends.
Tools:    The dice world (demo) | ask, eval, export | Report | bench | Command line

Where the released code of the authors differs from the paper, this file follows the paper; README.md lists each place.

Axes in shape comments: B prompts (one image each), N rollouts a prompt, P prompt tokens, R completion tokens,
V vocabulary, d model width, J steps of a trace.
"""
import argparse
import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm


class UserError(ValueError):
    """Bad input: the message names the culprit and the remedy. The command line prints it and exits with status 2."""
    status = 2


class TrainingStopped(Exception):
    """Training cannot or must not go on; the message says why, and what to do. `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def explained(message: str, *kinds: type[Exception]):
    """Inside the block, errors of these kinds become a UserError: the message, with the error in brackets."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{message} ({reason[:300]})") from error


# ---- Config: one line makes the field, its flag, its --help text, its check and its entry in config.json -------------

def setting(default, meaning: str, within="", resumable=False):
    """A field of Config. `within` is an interval such as "(0, 1]" or a tuple of allowed words; `resumable` settings may
    differ when a run is resumed."""
    return field(default=default, metadata={"meaning": meaning, "within": within, "resumable": resumable})


@dataclass(init=False)
class Config:
    """All settings; `Config(model=...)` is enough for `Policy`. What is not given comes from the preset, then from
    here. In brackets the source of the default: the paper's section, [code] for its released code, [ours]."""
    # data and run folder
    model: str = setting("Qwen/Qwen2.5-VL-7B-Instruct", "backbone: a folder or a Hugging Face id [4.1]")
    data: str = setting("images", "unlabeled images: folders (recursive) or text files of paths [4.1]")
    output_dir: str = setting("runs", "where run folders are made [ours]", "", True)
    run_name: str = setting("", "name of the run folder; empty: PRESET_seedSEED [ours]", "", True)
    preset: str = setting("ireasoner", "a row of the paper's Tables 1 to 3; explicit flags win over it [4.1]")
    resume: str = setting("no", "auto: go on from the run folder's newest checkpoint [ours]", ("no", "auto"), True)
    # the loop
    total_steps: int = setting(2500, "training steps; lambda(t) is a share of them [4.1]", "[1, inf)", True)
    num_rollouts: int = setting(5, "N, Solver rollouts per question [4.1]", "[1, inf)")
    images_per_rank: int = setting(1, "images (= questions) per step on each rank [4.1]", "[1, inf)", True)
    proposer_every: int = setting(5, "steps between Proposer updates [4.1]", "[1, inf)")
    temperature: float = setting(1.0, "sampling temperature, also used for scoring [code]", "(0, inf)")
    max_new_tokens_proposer: int = setting(128, "longest question, tokens [code]", "[1, inf)")
    max_new_tokens_solver: int = setting(256, "longest solution, tokens [code]", "[1, inf)")
    max_pixels: int = setting(802816, "larger images are shrunk to this; 784 make a visual token [ours]", "[784, inf)")
    # rewards, Eq 1 to 6
    answer_reward: str = setting("soft", "soft: Eq 5; discrete: 1 for the majority [Tab 1]", ("soft", "discrete"))
    alpha: float = setting(0.7, "sharpness of the answer reward, Eq 5 [code]", "(0, inf)")
    eta: float = setting(0.05, "strength of the length penalty, Eq 5 [code]", "[0, 1]")
    target_words: int = setting(64, "words before the answer that cost nothing, Eq 5 [code]", "[1, inf)")
    gamma: float = setting(0.7, "exponent of the group density rho, Eq 2 [code]", "[0, inf)")
    position_decay: float = setting(0.15, "kappa, decay of the step weights w_j, Eq 4 [code]", "[0, inf)")
    min_group_size: int = setting(2, "traces needed to compare a step position, Eq 3 [code]", "[1, inf)")
    max_reasoning_steps: int = setting(8, "J, steps kept of a trace [Tab 3]", "[1, inf)")
    embed_max_tokens: int = setting(64, "tokens of a step that are embedded, f(s) in 3.2 [code]", "[1, inf)")
    lambda_max: float = setting(0.7, "final weight of the step reward, Eq 6 [4.1]", "[0, 1]")
    lambda_schedule: str = setting("ramp", "ramp: 0, then linear; constant: lambda_max [4.1]", ("ramp", "constant"))
    warmup_frac: float = setting(0.3, "share of all steps with lambda = 0, Eq 6 [code]", "[0, 1]")
    entropy_mu: float = setting(0.90, "answer entropy that pays the Proposer most, nats [code]", "(-inf, inf)")
    entropy_sigma: float = setting(0.35, "width of the Proposer's reward, nats [code]", "(0, inf)")
    # update, Eq 7 and 8
    lr: float = setting(1e-6, "AdamW learning rate [4.1]", "(0, inf)")
    weight_decay: float = setting(0.01, "AdamW weight decay [4.1]", "[0, inf)")
    grad_clip: float = setting(1.0, "largest gradient norm of a role [4.1]", "(0, inf)")
    logprob_reduction: str = setting("mean", "log pi of a rollout over its tokens, Eq 7 [ours]", ("mean", "sum"))
    baseline_momentum: float = setting(0.9, "momentum of the EMA baseline b, Eq 7 [code]", "[0, 1)")
    kl_coef: float = setting(1e-3, "beta at the first step, Eq 8 [code]", "[0, inf)")
    kl_coef_min: float = setting(1e-3, "lower bound of beta, Eq 8 [ours]", "[0, inf)")
    kl_coef_max: float = setting(1.0, "upper bound of beta, Eq 8 [ours]", "[0, inf)")
    kl_target: float = setting(0.02, "tau, the KL that leaves beta alone, nats per token, Eq 8 [code]", "(0, inf)")
    kl_adapt_rate: float = setting(0.10, "eta of Eq 8: how fast beta follows [code]", "[0, inf)")
    lora_r: int = setting(16, "LoRA rank of each adapter [code]", "[1, inf)")
    lora_alpha: int = setting(32, "LoRA scale is lora_alpha / lora_r [code]", "[1, inf)")
    lora_dropout: float = setting(0.0, "above 0, another policy is trained than sampled [ours]", "[0, 1)")
    # machine and bookkeeping
    device: str = setting("auto", "auto, cpu, cuda or cuda:N (ROCm GPUs are called cuda too) [ours]", "", True)
    dtype: str = setting("auto", "backbone; auto: bfloat16 on GPU, else float32 [4.1]", ("auto", "float32", "bfloat16"))
    score_tokens: int = setting(3072, "tokens in a gradient pass; lower it if memory runs out [ours]", "[1, inf)", True)
    grad_checkpointing: str = setting("no", "yes: the backward pass computes MLP activations again; saves most of "
                                      "their memory [ours]", ("no", "yes"), True)
    compile: str = setting("no", "yes: compile the decoding step, for GPUs [ours]", ("no", "yes"), True)
    seed: int = setting(0, "of adapters, data order and sampling [ours]", "[0, inf)")
    save_every: int = setting(50, "steps between checkpoints [ours]", "[1, inf)", True)
    keep_checkpoints: int = setting(3, "newest checkpoints kept [ours]", "[1, inf)", True)
    keep_best: str = setting("r_sol", "and the one with the best mean of this metric over the save_every steps before; "
                             "minus: less is better [ours]", ("none", "r_sol", "r_ans", "r_step", "majority_share",
                                                              "-entropy", "-kl_solver", "-invalid_share"), True)
    show_every: int = setting(25, "steps between printed rollout groups, 0 for none [ours]", "[0, inf)", True)
    watch_every: int = setting(25, "steps between looks for collapse, which ask each question about another image too; "
                                   "0 for none [ours]", "[0, inf)", True)
    wandb: str = setting("", "log to this Weights & Biases project; empty: do not [ours]", "", True)

    def __init__(self, **given):
        if unknown := [name for name in given if name not in SETTINGS]:
            raise UserError(f"{unknown[0]}: no such setting{did_you_mean(unknown[0], SETTINGS)}")
        preset = given.get("preset", SETTINGS["preset"].default)
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: no such preset{did_you_mean(preset, PRESETS)} "
                            f"One of {', '.join(PRESETS)}.")
        for name, f in SETTINGS.items():
            value = given.get(name, PRESETS[preset].get(name, f.default))
            value = float(value) if f.type is float and type(value) is int else value
            within = f.metadata["within"]
            if type(value) is not f.type:
                raise UserError(f"--{name} {value!r}: must be of type {f.type.__name__}")
            if not (value in within if isinstance(within, tuple) else not within or in_interval(value, within)):
                expected = f"in {within}" if isinstance(within, str) else f"one of {', '.join(within)}"
                raise UserError(f"--{name} {value}: must be {expected} ({f.metadata['meaning']})")
            setattr(self, name, value)
        if not self.kl_coef_min <= self.kl_coef <= self.kl_coef_max:
            raise UserError(f"--kl_coef {self.kl_coef:g}: must lie between --kl_coef_min {self.kl_coef_min:g} and "
                            f"--kl_coef_max {self.kl_coef_max:g}")


SETTINGS = {f.name: f for f in dataclasses.fields(Config)}
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


def in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval written as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


def did_you_mean(word: str, known) -> str:
    """The end of a sentence that names the nearest known word, or just a full stop."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "."


def derive_seed(*keys) -> int:
    """Mixes integers and strings into one 63-bit seed, the same on every machine; near keys give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "big") >> 1


# ---- Section 3.1: prompts and parsing --------------------------------------------------------------------------------

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
            "follows.\n"
            "Reply in this form:\n"
            "<think>\nStep 1: ...\nStep 2: ...\n</think>\n<answer>short answer</answer>")


def parse_question(text: str) -> str | None:
    """The question in the Proposer's reply, on one line, or None: the content of <question>...</question>, else the
    first line that asks something (ends its first part with a question mark)."""
    tagged = re.search(r"<\s*question\s*>((?:(?!<\s*/?\s*question\s*>).)*)<\s*/\s*question\s*>", text, re.I | re.S)
    if tagged:
        candidates = [tagged[1]]
    else:
        untagged = re.sub(r"<\s*/?\s*question\s*>", "\n", text, flags=re.I)
        candidates = re.findall(r"^[ \t#>*_-]*(?:question\s*\d*\s*[*_]*\s*:)?[ \t*_]*([^\n]*?[?？؟])", untagged,
                                re.I | re.M)
    for candidate in candidates:
        if re.search(r"\w", candidate):
            return " ".join(candidate.split())
    return None


@dataclass
class Rollout:
    """One Solver reply, parsed. `answer` is the raw text of the last complete <answer>...</answer>, None without one;
    `words_before_answer` counts the words before it (all words without one), tags not counted."""
    text: str
    think: str
    steps: list[str]
    answer: str | None
    words_before_answer: int


def parse_rollout(text: str, max_steps: int = 8) -> Rollout:
    """Splits a Solver reply into trace t_i, steps s_ij and answer a_i (section 3.1). Never raises, on any text.

    >>> parse_rollout("<think>Step 1: red is 3\\nStep 2: 3 + 4 = 7</think><answer> 7 </answer>").steps
    ['red is 3', '3 + 4 = 7']
    """
    answers = list(re.finditer(r"<\s*answer\s*>((?:(?!<\s*/?\s*answer\s*>).)*)<\s*/\s*answer\s*>", text, re.I | re.S))
    opened = re.search(r"<\s*answer\s*>", text, re.I)  # an answer cut off by the token limit ends the trace as well
    before = text[:answers[-1].start()] if answers else text[:opened.start()] if opened else text
    think = re.split(r"<\s*think\s*>", before, maxsplit=1, flags=re.I)[-1]
    think = re.split(r"<\s*/\s*think\s*>", think, maxsplit=1, flags=re.I)[0].strip()
    words = re.sub(r"<\s*/?\s*(?:think|answer|step)\s*>", " ", before, flags=re.I).split()
    return Rollout(text, think, split_steps(think, max_steps), answers[-1][1].strip() if answers else None, len(words))


_MARKDOWN = r"^[\s#>*_+•-]*"
_STEP_TAG = re.compile(r"<step(?:\s[^<>]*|\d+)?>(.*?)(?=</step\s*>|<step(?:\s[^<>]*|\d+)?>|\Z)", re.I | re.S)
_STEP_WORD = re.compile(_MARKDOWN + r"(?:\d{1,2}[.)]\s*)?step\s*#?\s*\d{1,3}\s*(?:\*\*|__)?\s*"
                        r"(?:[:)\]–—]|\.(?!\d)|-(?=\s|$)|(?=\()|$)(?:\*\*|__)?\s*", re.I)
_NUMBERED = re.compile(_MARKDOWN + r"\(?\d{1,2}[.)]{1,2}(?!\d)(?:\*\*|__)?\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|(?<=[。！？])|\n\s*(?=[^a-z\s])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|fig|eq|no|approx|dr|mr|mrs|ms|st)\.$", re.I)


def step_marker(think: str) -> re.Pattern | None:
    """What numbers the steps of a trace: tags, "Step 1:" or "1." at the start of lines; None if nothing does."""
    if _STEP_TAG.search(think):
        return _STEP_TAG
    return next((m for m in (_STEP_WORD, _NUMBERED) if any(map(m.match, think.split("\n")))), None)


def split_steps(think: str, max_steps: int = 8) -> list[str]:
    """The numbered claims of a trace, in order, at most `max_steps` (section 3.2: s_i1 ... s_iJ).

    Reads `Step 1:`, `Step 1 -`, `1.`, `1)`, each also behind markdown, and <step>...</step>, in any case. Lines that
    follow a marker belong to its step; what stands before the first marker is dropped, so that step j of one trace
    stands beside step j of another. Without any marker, sentences are the steps. Never raises, on any text.

    >>> split_steps("I look first.\\n**Step 1:** 3.5 is\\n  the height\\n2) so\\nstep 2 - it fits")
    ['3.5 is the height 2) so', 'it fits']
    """
    marker = step_marker(think)
    if marker is _STEP_TAG:
        steps = [_STEP_WORD.sub("", body.strip(), count=1) for body in _STEP_TAG.findall(think)]
    else:
        for k in range(2, max_steps + 2):  # a trace in one line; later mentions of step k stay where they are
            think = re.sub(rf"(?<=[^\s#>*_+•-])\s+(?=(?:\*\*|__)?step\s+{k}\s*(?:\*\*|__)?\s*:)", "\n", think, 1, re.I)
        steps = []
        for line in think.split("\n") if marker else []:
            if mark := marker.match(line):
                body = line[mark.end():]  # without the second half of a bold that began in the marker
                steps.append(body.replace("**", "", 1) if mark[0].count("**") % 2 else body)
            elif steps:
                steps[-1] += " " + line
        for sentence in [] if marker else _SENTENCE_END.split(think):
            if steps and _ABBREVIATION.search(steps[-1]):
                steps[-1] += " " + sentence.strip()
            else:
                steps.append(re.sub(r"^\s*[#>*+•-]+\s+", "", sentence))
    steps = [" ".join(step.split()) for step in steps]
    return [step for step in steps if re.search(r"\w", step)][:max(max_steps, 0)]


_UNICODE_FOLDS = {**{ord(c): "-" for c in "−‐‑‒–—―﹣－"}, **{ord(c): None for c in "\u200b\u200c\u200d\u2060\ufeff"}}
_LATEX_FOLDS = (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\;", " "), ("\\%", "%"), ("\\$", "$"), ("^{\\circ}", "°"),
                ("^\\circ", "°"), ("\\left", ""), ("\\right", ""))
_LATEX_BOX = re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|displaystyle)\s*(?=\{)")
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("‘", "’"), ("«", "»"),
             ("**", "**"), ("__", "__"), ("~~", "~~"), ("$$", "$$"), ("*", "*"), ("_", "_"), ("$", "$"), ("`", "`"),
             ('"', '"'), ("'", "'"))
_CURRENCY = "$€£¥₹"
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>[{_CURRENCY}]?)\s*(?P<late_sign>[+-]?)\s*"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?P<exponent>e[+-]?\d{1,2}(?![\w.]))?"
    rf"(?:\s*(?P<symbol>[%‰°{_CURRENCY}])|(?=\s[^\W\d_])|$)(?P<rest>.*)", re.S)


def normalize_answer(text: str) -> str:
    """Folds the ways of writing one answer into one string, for voting (Eq 1). Idempotent on any string.

    Case, white space, surrounding quotes, brackets, markdown and LaTeX, a trailing full stop, thousands separators and
    Unicode minus signs are folded, and numbers equal in value become equal; a sign, a decimal point, a percent or a
    currency sign keep their meaning.

    >>> [normalize_answer(a) for a in ("**7.0**", "$7$", "-5", "5 %", ".50", "1,000 km", "(B).")]
    ['7', '7', '-5', '5%', '0.5', '1000 km', 'b']
    """
    folded = _fold_answer(str(text))
    while folded != text:
        text, folded = folded, _fold_answer(folded)
    return folded


def _fold_answer(text: str) -> str:
    text = text.translate(_UNICODE_FOLDS).casefold()
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # 1 000 with a no-break space
    for written, meant in _LATEX_FOLDS:
        text = text.replace(written, meant)
    text = " ".join(text.split())
    if box := _LATEX_BOX.match(text):
        text = text[box.end():] if _encloses("{", "}", text[box.end():]) else text
    for left, right in _WRAPPERS:
        if _encloses(left, right, text):
            text = text[len(left):len(text) - len(right)].strip()
            break
    if text.endswith((".", "。")):
        text = text[:-1].rstrip()
    quantity = _QUANTITY.fullmatch(text)
    if quantity and not (quantity["sign"] and quantity["late_sign"]):
        number = Decimal(quantity["number"].replace(",", "") + (quantity["exponent"] or ""))
        digits = format(number, "f")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        sign = "-" if number and "-" in (quantity["sign"], quantity["late_sign"]) else ""
        symbol = quantity["symbol"] or ""
        if symbol and symbol in _CURRENCY and not quantity["currency"]:  # 5€ is €5
            return sign + symbol + digits + quantity["rest"]
        return sign + quantity["currency"] + digits + symbol + quantity["rest"]
    return text


def _encloses(left: str, right: str, text: str) -> bool:
    """Whether `left` at the start and `right` at the end of `text` are partners: "(a)" but not "(a) or (b)"."""
    if len(text) < len(left) + len(right) or not (text.startswith(left) and text.endswith(right)):
        return False
    inner = text[len(left):len(text) - len(right)]
    if left == right:
        return left not in inner
    depth = 0
    for bracket in re.findall(re.escape(left) + "|" + re.escape(right), inner):
        depth += 1 if bracket == left else -1
        if depth < 0:
            return False
    return depth == 0


# ---- Section 3.1: the answer distribution (Eq 1) and what it pays the Proposer ---------------------------------------

def vote(rollout: Rollout) -> str | None:
    """The normalised answer of a rollout; None if it is invalid: no complete <answer>, or an empty one."""
    return normalize_answer(rollout.answer or "") or None


def answer_distribution(answers: list[str | None]) -> dict[str, float]:
    """Eq 1, p(a|x,q) = count(a) / N over the normalised answers of one question's N rollouts, in order of first
    appearance. None marks an invalid rollout: it counts in N and votes for nothing.

    >>> answer_distribution(["7", "7", "8", None, "7"])
    {'7': 0.6, '8': 0.2}
    """
    return {answer: count / len(answers) for answer, count in Counter(a for a in answers if a is not None).items()}


def answer_entropy(answers: list[str | None]) -> float:
    """H(x, q) = -sum p log p in nats (section 3.1). Each invalid rollout (None) is an outcome of its own with mass
    1/N, so that garbage never looks like agreement."""
    votes = Counter(a for a in answers if a is not None)
    counts = list(votes.values()) + [1] * answers.count(None)
    return sum(-count / len(answers) * math.log(count / len(answers)) for count in counts) + 0.0


def entropy_reward(entropy: float, mu: float = 0.90, sigma: float = 0.35) -> float:
    """g(H), the Proposer's reward (section 3.1; form and values from the released code): a bell around H = mu nats,
    since a question on which all rollouts agree, or none do, teaches nothing."""
    return math.exp(-((entropy - mu) ** 2) / (2 * sigma ** 2))


# ---- Section 3.2: agreement of the steps inside the majority group (Eq 2-4, Figure 7) --------------------------------

def dominant_group(answers: list[str | None]) -> tuple[str | None, list[int]]:
    """Eq 2, the majority answer and the rollouts G that gave it; ties go to the answer seen first, and without any
    valid answer the result is (None, []).

    >>> dominant_group(["8", "7", None, "7", "8"])
    ('8', [0, 4])
    """
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return None, []
    majority = max(votes, key=votes.get)  # the first of equals: Counter keeps the order of appearance
    return majority, [i for i, a in enumerate(answers) if a == majority]


def group_density(group_size: int, num_rollouts: int, gamma: float = 0.7) -> float:
    """Eq 2, rho = (|G| / N)^gamma: how far the majority can be trusted."""
    return (group_size / num_rollouts) ** gamma


def position_weights(num_steps: int, decay: float = 0.15) -> torch.Tensor:
    """Eq 4, w_j = exp(-kappa (j - 1)) for j = 1 ... num_steps: early, grounding steps weigh more. (num_steps,),
    w_1 = 1, not normalised."""
    return torch.exp(-decay * torch.arange(num_steps, dtype=torch.float32))


def step_prototypes(embeddings: list[torch.Tensor], group: list[int], min_group: int = 2) -> dict[int, torch.Tensor]:
    """Eq 3, mu_j: the mean step embedding at each position over the members of the group that have such a step.

    embeddings[i] is (J_i, d), one row a step; the keys are 0-based positions. A position that fewer than `min_group`
    traces reach is left out: the similarity of a trace with itself is no agreement.
    """
    prototypes = {}
    for j in range(max((len(embeddings[i]) for i in group), default=0)):
        members = [embeddings[i][j] for i in group if j < len(embeddings[i])]
        if len(members) >= min_group:
            prototypes[j] = torch.stack(members).mean(dim=0)
    return prototypes


def step_similarity(embeddings: list[torch.Tensor], group: list[int],
                    min_group: int = 2) -> dict[int, dict[int, float]]:
    """r_ij = cos(e_ij, mu_j) in [-1, 1] (section 3.2), as {rollout i: {0-based position j: r_ij}}, for the rollouts of
    the group and the positions that can be compared. Zero vectors and non-finite values count as 0."""
    similarity = {i: {} for i in group}
    for j, prototype in step_prototypes(embeddings, group, min_group).items():
        members = [i for i in group if j < len(embeddings[i])]
        steps = torch.stack([embeddings[i][j] for i in members]).double()                       # (|G_j|, d)
        cosines = F.cosine_similarity(steps, prototype.double(), dim=-1).nan_to_num(0.0, 0.0, 0.0)
        for i, cosine in zip(members, cosines.tolist()):
            similarity[i][j] = cosine
    return similarity


def step_agreement(embeddings: list[torch.Tensor], group: list[int], num_rollouts: int, gamma: float = 0.7,
                   decay: float = 0.15, min_group: int = 2) -> torch.Tensor:
    """Eq 4, the intrinsic CoT agreement reward r_step = rho * sum_j w_j r_ij, for all rollouts: (N,).

    embeddings[i] is (J_i, d), `group` the rollouts with the majority answer. The w_j are normalised to sum to 1 over
    the positions that rollout i shares with others, so the reward does not grow with the number of steps. Rollouts
    outside the group, and those with nothing to compare, get 0. Finite on any input.
    """
    rewards = torch.zeros(num_rollouts)
    for i, similarity in step_similarity(embeddings, group, min_group).items():
        if similarity:
            positions = list(similarity)
            weights = position_weights(max(positions) + 1, decay)[positions].double()
            r_ij = torch.tensor([similarity[j] for j in positions], dtype=torch.float64)
            rewards[i] = group_density(len(group), num_rollouts, gamma) * (weights * r_ij).sum() / weights.sum()
    return rewards


def leave_one_out_similarity(embeddings: list[torch.Tensor], group: list[int]) -> torch.Tensor:
    """Figure 7, S_ij = cos(e_ij, mean of e_kj over the other members k of the group): (|G|, J) with J the longest trace
    of the group, NaN where rollout i has no step j or no other member has one."""
    longest = max((len(embeddings[i]) for i in group), default=0)
    similarity = torch.full((len(group), longest), math.nan)
    for j in range(longest):
        rows = [row for row, i in enumerate(group) if j < len(embeddings[i])]
        if len(rows) > 1:
            steps = torch.stack([embeddings[group[row]][j] for row in rows]).double()           # (|G_j|, d)
            others = (steps.sum(dim=0) - steps) / (len(rows) - 1)
            cosines = F.cosine_similarity(steps, others, dim=-1).nan_to_num(0.0, 0.0, 0.0)
            similarity[rows, j] = cosines.to(similarity.dtype)
    return similarity


def depth_disagreement(similarity: torch.Tensor) -> torch.Tensor:
    """Figure 7, D_j = 1 - mean over i of S_ij, the mean taken where S_ij is defined: (|G|, J) -> (J,), NaN where it is
    defined nowhere."""
    return 1 - torch.nanmean(similarity, dim=0)


# ---- Section 3.3: the rewards (Eq 5, 6) ------------------------------------------------------------------------------

def length_excess(words: int, target: int = 64) -> float:
    """Eq 5, the normalised excess length: 0 up to `target` words before the answer, 1 from twice as many on."""
    return min(max((words - target) / target, 0.0), 1.0)


def answer_reward(p_answer: float, excess: float, alpha: float = 0.7, eta: float = 0.05) -> float:
    """Eq 5, r_ans = p(a_i|x,q)^alpha (1 - eta * excess)."""
    return p_answer ** alpha * (1 - eta * excess)


def step_reward_weight(step: int, total_steps: int, lam_max: float = 0.7, warmup_frac: float = 0.3) -> float:
    """Eq 6, lambda(t): 0 for the first `warmup_frac` of all steps, then linear to `lam_max` at the last step. `step`
    is the global step, counted from 1, so a resumed run continues the ramp."""
    if warmup_frac >= 1:
        return 0.0
    progress = (step / total_steps - warmup_frac) / (1 - warmup_frac)
    return lam_max * min(max(progress, 0.0), 1.0)


def mix_rewards(r_ans, r_step, lam: float):
    """Eq 6, r_sol = (1 - lambda) r_ans + lambda r_step, for numbers or tensors."""
    return (1 - lam) * r_ans + lam * r_step


@dataclass
class GroupRewards:
    """What one question's N rollouts earn, and what the paper's figures plot of them."""
    answers: list[str | None]        # normalised; None: the rollout is invalid
    group: list[int]                 # rollouts with the majority answer
    r_ans: list[float]               # (N,)
    r_step: list[float]              # (N,)
    r_sol: list[float]               # (N,) the Solver's reward
    r_prop: float                    # the Proposer's reward
    entropy: float                   # nats
    density: float                   # rho
    similarity: torch.Tensor         # (|G|, J) leave-one-out, Figure 7
    step_cosines: list[float]        # all r_ij
    comparable_steps: int            # positions j with |G_j| >= min_group


def group_rewards(rollouts: list[Rollout], embeddings: list[torch.Tensor], lam: float, config: Config) -> GroupRewards:
    """All rewards of one question, from its parsed rollouts and their step embeddings ((J_i, d) each).

    This is the place to try a reward of your own: whatever ends up in `r_sol` and `r_prop` trains the two roles.
    """
    n = len(rollouts)
    answers = [vote(r) for r in rollouts]
    p = answer_distribution(answers)
    majority, group = dominant_group(answers)
    entropy = answer_entropy(answers)
    if config.answer_reward == "soft":
        r_ans = [0.0 if a is None else answer_reward(p[a], length_excess(r.words_before_answer, config.target_words),
                                                     config.alpha, config.eta) for a, r in zip(answers, rollouts)]
        r_prop = entropy_reward(entropy, config.entropy_mu, config.entropy_sigma)
    else:
        r_ans = [float(a is not None and a == majority) for a in answers]
        r_prop = float(1 < len(group) < n)  # some, but not all, rollouts agree
    r_step = step_agreement(embeddings, group, n, config.gamma, config.position_decay, config.min_group_size).tolist()
    r_sol = [mix_rewards(a, s, lam) for a, s in zip(r_ans, r_step)]
    cosines = [r for row in step_similarity(embeddings, group, config.min_group_size).values() for r in row.values()]
    return GroupRewards(answers, group, r_ans, r_step, r_sol, r_prop, entropy,
                        group_density(len(group), n, config.gamma), leave_one_out_similarity(embeddings, group),
                        cosines, len(step_prototypes(embeddings, group, config.min_group_size)))


# ---- Policy: one frozen backbone, two LoRA adapters, and one mechanism for sampling, gradient and reference ----------

ROLES = ("solver", "proposer")


@dataclass
class EncodedImage:
    """An image after the vision tower, which is frozen: encode once, use in every pass of a step."""
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
    """One sampled reply, kept as sampled and never re-tokenised. `logprobs` (T,) are those of the sampling
    distribution, end-of-turn token included; `finished` is False if the token limit cut the reply off."""
    token_ids: list[int]
    logprobs: torch.Tensor
    text: str
    finished: bool


@dataclass
class Scores:
    """logprobs[i] and kl[i] are (T_i,): log pi(y_t | x, q, y_<t) of completion i, with gradient to the role's adapter,
    and the exact KL(role || reference) over the vocabulary at each of its positions."""
    logprobs: list[torch.Tensor]
    kl: list[torch.Tensor]


@dataclass
class Prefill:
    """Prompts in the key/value cache, ready to be continued."""
    cache: object                 # DynamicCache, B rows of P tokens, padded on the left
    mask: torch.Tensor            # (B, P) 1 for real tokens
    next_position: torch.Tensor   # (B,) rotary position of the first completion token
    hidden: torch.Tensor          # (B, d) hidden state that predicts the first completion token


class Clock:
    """Adds up the wall time spent in named phases; inside a nested phase the outer one's clock stands still."""

    def __init__(self):
        self.seconds, self.current, self.since = Counter(), "other", time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str):
        outer = self.current
        self.book(name)
        try:
            yield
        finally:
            self.book(outer)

    def book(self, following: str):
        """Counts the time since the last call to the phase that ends now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.current] += now - self.since
        self.current, self.since = following, now

    def lap(self) -> dict[str, float]:
        """Seconds in each phase since the last lap."""
        self.book(self.current)
        seconds, self.seconds = dict(self.seconds), Counter()
        return seconds


class Policy:
    """A vision-language model with the adapters "solver" and "proposer" on one frozen backbone.

    The reference policy of Eq 7 is the same backbone with its adapters disabled, so it costs no memory and cannot
    drift. Wherever a role is asked for, None means the reference.
    """

    def __init__(self, config: Config, backbone: tuple | None = None):
        """`backbone` is a (model, processor) to use instead of loading `config.model`."""
        self.config, self.device, self.clock = config, resolve_device(config.device), Clock()
        self.role = None  # see `adapter`
        self.compiled = config.compile == "yes"
        self.decode = torch.compile(self.extend, dynamic=True) if self.compiled else self.extend
        self.hf, self.processor = backbone or load_backbone(config, self.device)
        self.processor_files = [] if backbone else checkpoint_files(config.model, PROCESSOR_FILES)
        family, kinds = self.hf.config.model_type, (RuntimeError, LookupError, TypeError, ValueError, AttributeError)
        if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):  # an error would be a bug of ours
            kinds = ()
        with explained(f"--model {config.model}: {family} does not work here. Use another, say Qwen2.5-VL.", *kinds):
            self.look_at_family()
            self.add_adapters()
            self.share_prefixes()
            if backbone is None:
                self.check_family()

    def look_at_family(self):
        """Notes what differs by family of models, and by version of transformers."""
        self.tokenizer, self.lm_head = self.processor.tokenizer, self.hf.get_output_embeddings()
        self.image_token_id, eos = self.hf.config.image_token_id, self.hf.generation_config.eos_token_id
        self.stop_ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.has_3d_positions = hasattr(self.hf.model, "get_rope_index")
        arguments = inspect.signature(self.hf.model.forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"
        self.image_mask_name = next((n for n in ("mm_token_type_ids", "token_type_ids") if n in arguments), None)

    def add_adapters(self):
        """Puts both roles' LoRA matrices on every projection of the language model, and nowhere else."""
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
        config, decoder = self.config, self.hf.get_decoder()
        decoder_name = next(name for name, module in self.hf.named_modules() if module is decoder)
        projections = "|".join(sorted({name.split(".")[-1] for name, module in decoder.layers.named_modules()
                                       if isinstance(module, torch.nn.Linear)}))  # q, k, v, o, gate, up, down
        lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                          target_modules=rf"{re.escape(decoder_name)}\.layers\.\d+\..*\b({projections})")
        torch.manual_seed(derive_seed(config.seed, "adapters"))  # the same adapters on every rank
        folder = Path(config.model).absolute()  # PEFT notes it in each adapter's folder: it must be found from anywhere
        self.hf.name_or_path = str(folder) if folder.is_dir() else config.model
        self.peft = get_peft_model(self.hf, lora, adapter_name="solver").eval()  # LoRA is fp32, also over bf16
        self.peft.add_adapter("proposer", dataclasses.replace(lora))
        for layer in [module for module in self.hf.modules() if isinstance(module, LoraLayer)]:
            matrices = {role: (layer.lora_A[role].weight, layer.lora_B[role].weight) for role in ROLES}
            layer.forward = functools.partial(self.adapted, layer.base_layer, matrices)
        self.require_gradients()

    def share_prefixes(self):
        """Lets the language model attend by `shared_prefix_attention`."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
        AttentionInterface.register("shared_prefix", shared_prefix_attention)
        AttentionMaskInterface.register("shared_prefix", sdpa_mask)
        self.hf.set_attn_implementation({"text_config": "shared_prefix"})
        layers = self.hf.get_decoder().layers
        self.attentions = [layer.self_attn for layer in layers]
        for layer in layers:
            layer.self_attn.prefix = None
            if self.config.grad_checkpointing == "yes":
                layer.mlp.forward = functools.partial(self.checkpointed, layer.mlp.forward)
        if (self.device.type == "cpu" and self.hf.dtype == torch.float32 and torch.backends.mkldnn.is_available()
                and torch.backends.cpu.get_cpu_capability() == "AVX512"
                and not self.compiled):  # torch.compile does not take this operator
            for module in layers.modules():
                if type(module) is torch.nn.Linear:
                    module.forward = functools.partial(cpu_linear, module)

    @torch.no_grad()
    def check_family(self):
        """Compares with a plain forward of the model, on two pictures. Raises UserError for a family of models that
        does something in attention or behind its last layer that this file does not know, or that sees no image."""
        black, white = (Image.new("RGB", (112, 112), color) for color in ("black", "white"))
        reply = Completion(self.tokenize("Step 1: a b c"), torch.empty(0), "", True)
        with self.adapter(None):
            seen = [self.lm_head(self.completion_hidden(Prompt(picture, "a"), [reply])).float()
                    for picture in self.encode_images([black, white])]                                      # (T, V)
            prompt = self.with_features([Prompt(black, "a")])[0]
            ids = torch.tensor([self.prompt_ids(prompt) + reply.token_ids], device=self.device)
            image_mask = {self.image_mask_name: (ids == self.image_token_id).int()} if self.image_mask_name else {}
            plain = self.hf(input_ids=ids, attention_mask=torch.ones_like(ids), **image_mask,
                            **self.preprocess(black)[1]).logits[0, -len(reply.token_ids) - 1:-1].float()
        error, spread = (seen[0] - plain).norm(), (plain - plain.mean(-1, keepdim=True)).norm()
        if not error < spread * (1e-3 if self.hf.dtype == torch.float32 else 0.1):
            raise UserError(f"--model {self.config.model}: {self.hf.config.model_type} computes its logits in a way "
                            f"that this file does not follow (they differ by {error / spread:.0%}). Use another.")
        if torch.equal(*seen):
            raise UserError(f"--model {self.config.model}: a black and a white picture are the same to it.")

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def parameters(self, role: str) -> list[torch.nn.Parameter]:
        """The trainable parameters of a role: its LoRA matrices."""
        return [p for name, p in self.hf.named_parameters() if f".{role}." in name]

    def require_gradients(self):
        """Of both roles; PEFT has it that only the adapter in use can be trained."""
        for parameter in itertools.chain(*map(self.parameters, ROLES)):
            parameter.requires_grad_(True)

    @contextlib.contextmanager
    def adapter(self, role: str | None):
        """Runs the block as a role, or as the reference for None. To go backward, no role need be on."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    def adapted(self, linear: torch.nn.Linear, matrices: dict, x: torch.Tensor) -> torch.Tensor:
        """W x + (alpha / r) B A x as a role, W x as the reference: what a PEFT layer computes, without the checks that
        take longer than products as small as these. (..., d_in) -> (..., d_out)."""
        y, config = linear(x), self.config
        if self.role is None:
            return y
        a, b = matrices[self.role]                          # (r, d_in), (d_out, r), in float32, also over bfloat16
        x = x.to(a.dtype)
        if config.lora_dropout and torch.is_grad_enabled():
            x = F.dropout(x, config.lora_dropout)
        return (y + F.linear(F.linear(x, a) * (config.lora_alpha / config.lora_r), b)).to(y.dtype)

    def checkpointed(self, forward, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a layer's MLP and forgets what it computed: the backward pass does it again. (Whole layers cannot be run
        twice here: each run would append to the prompt's cache.)"""
        def as_role(hidden, role=self.role):
            with self.adapter(role):
                return forward(hidden)
        return checkpoint(as_role, hidden, use_reentrant=False) if hidden.requires_grad else forward(hidden)

    def save(self, folder: Path):
        """Writes folder/solver and folder/proposer, plain PEFT adapter folders, with the backbone's own tokenizer and
        processor files, so that clients which load a processor from the same folder take them as they are."""
        self.peft.save_pretrained(str(folder))
        for file, role in itertools.product(self.processor_files, ROLES):
            shutil.copyfile(file, folder / role / file.name)

    def load(self, role: str, folder: Path):
        """Reads one PEFT adapter folder into a role. Raises UserError if it is damaged or does not fit the backbone."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        with explained(f"{folder}: no adapter for {self.config.model} at LoRA rank {self.config.lora_r}. Check --model "
                       "and --lora_r, or use another checkpoint.", Exception):  # a damaged file raises anything
            state, own = load_file(Path(folder) / "adapter_model.safetensors"), self.peft.state_dict()
            shapes = {k: own[k.replace(".weight", f".{role}.weight")].shape for k in state}
            if shapes != {k: v.shape for k, v in state.items()} or len(state) != len(self.parameters(role)):
                raise ValueError("its matrices have other shapes")
        set_peft_model_state_dict(self.peft, state, adapter_name=role)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def preprocess(self, image: Image.Image) -> tuple[list[int], dict[str, torch.Tensor]]:
        """(token ids of the chat template up to the text, inputs of the vision tower) for one image."""
        head, bos = self.template[0], self.tokenizer.bos_token
        inputs = self.processor(text=[head], images=[image], return_tensors="pt",
                                add_special_tokens=bool(bos) and not head.startswith(bos))
        of_text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        vision = {name: value.to(self.device, self.hf.dtype if value.is_floating_point() else None)
                  for name, value in inputs.items() if name not in of_text}
        return inputs["input_ids"][0].tolist(), vision

    @functools.cached_property
    def template(self) -> tuple[str, list[int]]:
        """The chat template of a turn with one image: what stands before its text, and the token ids behind it."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT-TEXT-SLOT"}]}
        head, tail = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True).split(
            "PROMPT-TEXT-SLOT")
        return head, self.tokenizer(tail, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> list[EncodedImage]:
        """Runs the vision tower once on every image, alone, so that no number depends on the others of its batch."""
        encoded, arguments = [], inspect.signature(self.hf.model.get_image_features).parameters
        for ids, inputs in map(self.preprocess, images):
            out = self.hf.model.get_image_features(**{n: v for n, v in inputs.items() if n in arguments},
                                                   return_dict=True)
            features = {n: out[n] for n in ("pooler_output", "deepstack_features") if out.get(n) is not None}
            encoded.append(EncodedImage(ids, features, inputs.get("image_grid_thw")))
        return encoded

    def with_features(self, prompts: list[Prompt]) -> list[Prompt]:
        """The same prompts with every PIL image replaced by its features."""
        todo = [i for i, p in enumerate(prompts) if not isinstance(p.image, EncodedImage)]
        encoded = dict(zip(todo, self.encode_images([prompts[i].image for i in todo])))
        return [Prompt(encoded.get(i, p.image), p.text) for i, p in enumerate(prompts)]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of model or user text; special tokens that are spelled out in it become ordinary characters."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The chat template around the prompt; its special tokens are tokenised as such, those in the text are not."""
        return prompt.image.ids + self.tokenize(prompt.text) + self.template[1]

    def prefill(self, prompts: list[Prompt]) -> Prefill:
        """Runs the prompts (with encoded images) through the active adapter once, keeping their keys and values."""
        from transformers import DynamicCache
        from transformers.utils import ModelOutput
        rows = [self.prompt_ids(p) for p in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=self.device)               # (B, P)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=self.device)   # (B, P)
        image_mask = ((ids == self.image_token_id) & (mask == 1)).int()
        if self.has_3d_positions:  # time, height and width
            positions, _ = self.hf.model.get_rope_index(
                ids, mm_token_type_ids=image_mask, image_grid_thw=torch.cat([p.image.grid for p in prompts]),
                attention_mask=mask)                                                                       # (3, B, P)
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)                                                 # (B, P)
        features = ModelOutput({n: concatenate([p.image.features[n] for p in prompts])
                                for n in prompts[0].image.features})
        cache = DynamicCache()  # without a config: layers with a sliding window keep all keys, too
        out = self.hf.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                            mm_encoder_outputs={"image": features}, **{self.cache_name: cache},
                            **({self.image_mask_name: image_mask} if self.image_mask_name else {}))
        last = positions.masked_fill(mask == 0, -1).view(-1, *mask.shape).amax(dim=(0, 2))                 # (B,)
        return Prefill(cache, mask, last + 1, out.last_hidden_state[:, -1])

    @contextlib.contextmanager
    def behind(self, prefill: Prefill):
        """Inside the block all tokens come behind the prompts: `shared_prefix_attention` sees their keys and values,
        which are held once for all rows of a prompt. Gives which of them may be seen, (B, 1, 1, P)."""
        for attention, layer in zip(self.attentions, prefill.cache.layers):
            attention.prefix = layer.keys, layer.values
        try:
            yield prefill.mask[:, None, None] > 0
        finally:
            for attention in self.attentions:
                attention.prefix = None

    def extend(self, cache, visible: torch.Tensor, ids: torch.Tensor, first_position: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, T, d) of tokens `ids` (rows, T) behind the prompts and a cache of completion tokens,
        R with these; `visible` (rows or 1, 1, T, P + R) says which of all these each may see."""
        steps = torch.arange(ids.shape[1], device=self.device)
        positions = first_position[:, None] + steps                                                        # (rows, T)
        if self.has_3d_positions:
            positions = positions.expand(3, -1, -1)  # text has equal time, height and width
        return self.hf.model(input_ids=ids, attention_mask=visible, position_ids=positions, use_cache=True,
                             **{self.cache_name: cache}).last_hidden_state

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, role: str | None, prompts: list[Prompt], num_samples: int, max_new_tokens: int,
               temperature: float = 1.0, seed: int | list[int] = 0) -> list[list[Completion]]:
        """`num_samples` completions of every prompt, from the plain softmax: nothing of the checkpoint's
        generation_config is inherited but its end-of-turn ids, so the policy that samples is the policy that `score`
        scores. Temperature 0 decodes greedily (with log-probabilities at temperature 1).

        Random numbers are keyed by (seed, prompt, sample): give one seed a prompt, and a completion does not depend
        on which other prompts share the batch.
        """
        if not prompts:
            return []
        seeds = seed if isinstance(seed, list) else [derive_seed(seed, i) for i in range(len(prompts))]
        rows = len(prompts) * num_samples
        uniforms = torch.stack([  # (rows, R): one stream of uniform numbers a completion, float64
            torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(derive_seed(s, n)))
            for s in seeds for n in range(num_samples)]).to(self.device)
        token_ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(rows, max_new_tokens, device=self.device)
        lengths = torch.full((rows,), max_new_tokens, device=self.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
        stop = torch.tensor(sorted(self.stop_ids), device=self.device)
        with self.adapter(role), contextlib.ExitStack() as stack:
            prefill = self.prefill(self.with_features(prompts))
            seen = stack.enter_context(self.behind(prefill))
            decoder = Decoder(self, seen, prefill.next_position, num_samples, max_new_tokens)
            hidden = prefill.hidden.repeat_interleave(num_samples, 0)
            live = torch.arange(rows, device=self.device)  # which completion each row of the decoder belongs to
            for t in range(max_new_tokens):
                logits = self.lm_head(hidden).float()
                logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)                         # (live, V)
                if temperature:  # the inverse of the distribution function, in float64
                    cdf = logp.double().exp().cumsum(-1)
                    draw = uniforms[live, t, None] * cdf[:, -1:]
                    tokens = torch.searchsorted(cdf, draw, right=True).clamp_max(cdf.shape[-1] - 1)     # (live, 1)
                else:
                    tokens = logp.argmax(-1, keepdim=True)
                token_ids[live, t] = tokens[:, 0]
                logprobs[live, t] = logp.gather(-1, tokens)[:, 0]
                stopped = torch.isin(tokens[:, 0], stop) & ~finished[live]
                lengths[live[stopped]] = t + 1
                finished[live[stopped]] = True
                running = ~finished[live]
                remaining = int(running.sum())
                if remaining == 0 or t + 1 == max_new_tokens:
                    break
                if remaining <= len(live) // 2 and not self.compiled:  # stop paying for finished rows
                    kept = decoder.drop(finished[live])
                    live, tokens = live[kept], tokens[kept]
                hidden = decoder.advance(tokens)
        token_ids, logprobs = token_ids.cpu(), logprobs.cpu()
        completions = []
        for ids, logp, length, done in zip(token_ids.tolist(), logprobs, lengths.tolist(), finished.tolist()):
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            completions.append(Completion(ids[:length], logp[:length].clone(), text, done))
        return [completions[i:i + num_samples] for i in range(0, rows, num_samples)]

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def score(self, role: str | None, prompt: Prompt, completions: list[Completion],
              temperature: float = 1.0) -> Scores:
        """Log-probabilities of sampled completions, conditioned on the image, and their KL to the reference."""
        if not completions:
            return Scores([], [])
        prompt = self.with_features([prompt])[0]
        token_ids = torch.tensor([t for c in completions for t in c.token_ids], device=self.device)         # (M,)
        with self.clock.phase("reference"), torch.no_grad(), self.adapter(None):
            ref_hidden = self.completion_hidden(prompt, completions)                                        # (M, d)
        hidden = ref_hidden
        if role is not None:
            with self.adapter(role):
                hidden = self.completion_hidden(prompt, completions)                                        # (M, d)
        pieces = []
        for h, r, ids in zip(hidden.split(512), ref_hidden.split(512), token_ids.split(512)):  # bounds the logits
            # and frees them: the backward pass computes each chunk again
            pieces.append(checkpoint(token_statistics, h, r, ids, self.lm_head, temperature, use_reentrant=False)
                          if h.requires_grad else token_statistics(h, r, ids, self.lm_head, temperature))
        lengths = [len(c.token_ids) for c in completions]
        return Scores(*(list(torch.cat(column).split(lengths)) for column in zip(*pieces)))

    def completion_hidden(self, prompt: Prompt, completions: list[Completion]) -> torch.Tensor:
        """Hidden states that predict the completions' tokens: (M, d), M tokens in all.

        The prompt is prefilled once and its keys and values serve all N completions, with gradients: P + N R tokens go
        through the model instead of N (P + R).
        """
        from transformers import DynamicCache
        n, longest = len(completions), max(len(c.token_ids) for c in completions)
        ids = torch.tensor([c.token_ids + [0] * (longest - len(c.token_ids)) for c in completions], device=self.device)
        lengths = torch.tensor([len(c.token_ids) for c in completions], device=self.device)
        valid = torch.arange(longest, device=self.device) < lengths[:, None]                                # (N, R)
        prefill = self.prefill([prompt])
        hidden = prefill.hidden.expand(n, -1)[:, None]                                                      # (N, 1, d)
        if longest > 1:
            with self.behind(prefill) as seen:
                causal = valid.new_ones(longest - 1, longest - 1).tril()
                visible = torch.cat([seen.expand(-1, -1, longest - 1, -1), causal[None, None]], dim=-1)
                rest = self.extend(DynamicCache(), visible, ids[:, :-1], prefill.next_position.expand(n))
            hidden = torch.cat([hidden, rest], dim=1)                                                       # (N, R, d)
        return hidden[valid]

    @torch.no_grad()
    def embed_steps(self, steps: list[str]) -> torch.Tensor:
        """f(s) of section 3.2: the l2-normalised mean (or sum, which points the same way) of the input-token embeddings
        of each step, from the frozen table of the backbone; (J, d) in float32, on the CPU."""
        table = self.hf.get_input_embeddings().weight
        ids = [self.tokenize(step)[:self.config.embed_max_tokens] for step in steps]
        rows = [table[torch.tensor(i, dtype=torch.long, device=self.device)].float().sum(dim=0) for i in ids]
        return F.normalize(torch.stack(rows), dim=-1).cpu() if rows else torch.zeros(0, table.shape[1])


class Decoder:
    """Continues prefilled prompts, N rows each, by a token at a time.

    The keys and values of the rows' own tokens go into tensors that hold the longest completion from the start, since
    growing them by concatenation would copy all of them for every token. With `--compile` a step is compiled once a
    role, for any number of prompts and any length of them; but one prompt, or one row of each, is a case of its own.
    """

    def __init__(self, policy: Policy, seen: torch.Tensor, first_position: torch.Tensor, num_samples: int,
                 max_new_tokens: int):
        from transformers.cache_utils import Cache, StaticLayer
        self.policy, self.num_prompts, self.filled = policy, len(seen), seen.shape[-1]
        rows = self.num_prompts * num_samples
        self.cache = Cache(layers=[StaticLayer(max_cache_len=max_new_tokens) for _ in policy.attentions])
        # as the layers would do in the first step, which would then have to be compiled apart from the others
        for layer, attention in zip(self.cache.layers, policy.attentions):
            layer.keys, layer.values = (x.new_zeros(rows, x.shape[1], max_new_tokens, x.shape[3])
                                        for x in attention.prefix)
            layer.device, layer.cumulative_length = policy.device, layer.cumulative_length.to(policy.device)
            layer.is_initialized = True
        self.visible = F.pad(seen, (0, max_new_tokens)).repeat_interleave(num_samples, 0)         # (rows, 1, 1, P + R)
        self.position = first_position.repeat_interleave(num_samples, 0)                          # (rows,)

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token a row, (rows, 1); returns the hidden states that predict the next ones, (rows, d)."""
        self.visible[..., self.filled] = True
        self.filled += 1
        self.position = self.position + 1
        return self.policy.decode(self.cache, self.visible, tokens, self.position - 1)[:, 0]

    def drop(self, finished: torch.Tensor) -> torch.Tensor:
        """Drops finished rows, (rows,), as far as all prompts that go on keep as many; returns the rows that stay."""
        running = ~finished.view(self.num_prompts, -1)                                                      # (B, N)
        prompts = running.any(dim=1).nonzero()[:, 0]
        first = running[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :running.sum(dim=1).max()]
        rows = (prompts[:, None] * running.shape[1] + first).flatten()
        self.num_prompts, self.visible, self.position = len(prompts), self.visible[rows], self.position[rows]
        for attention, layer in zip(self.policy.attentions, self.cache.layers):
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            attention.prefix = tuple(t[prompts] for t in attention.prefix)
        return rows


def shared_prefix_attention(module, query, key, value, attention_mask, scaling: float, sliding_window=None, **kwargs):
    """Attention in the language model: PyTorch's, but inside `Policy.behind` over a row's own tokens and its prompt,
    whose keys and values `module.prefix` holds once for all rows of the prompt.

    query is (rows, heads, T, d_head), key and value (rows, key heads, R, d_head); returns (rows, T, heads, d_head).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if module.prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    keys, values = module.prefix                                              # (B, key heads, P, d_head)
    (rows, heads, t, width), (b, key_heads, p, _), visible = query.shape, keys.shape, attention_mask
    if sliding_window and visible.shape[-1] > sliding_window:
        place = torch.arange(visible.shape[-1], device=query.device)
        visible = visible & ((visible * place).amax(-1, keepdim=True) - place < sliding_window)
    if t > 1:  # scoring: with a copy a row, PyTorch's fused kernels keep no attention weights for the backward pass
        keys, values = (torch.cat([x.repeat_interleave(rows // b, 0), y], 2) for x, y in ((keys, key), (values, value)))
        return sdpa_attention_forward(module, query, keys, values, visible, scaling=scaling)
    # decoding: no copies; to the prompt its rows are one batch of queries, and so are the heads that share keys
    # group: (rows, key heads, g, ...) -> (B, key heads, n g, ...)
    group = lambda x: x.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)
    ungroup = lambda x: x.unflatten(2, (rows // b, -1)).transpose(1, 2).flatten(0, 1)
    query = query.reshape(rows, key_heads, -1, width) * scaling               # (rows, key heads, g, d_head)
    scores = torch.cat([ungroup(group(query) @ keys.mT), query @ key.mT], dim=-1)               # (..., g, P + R)
    weights = torch.where(visible, scores, -math.inf).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    attended = ungroup(group(weights[..., :p]) @ values) + weights[..., p:] @ value
    return attended.reshape(rows, heads, t, width).transpose(1, 2), None


def concatenate(values: list):
    """Joins the image features of several prompts: tensors, tuples of them (one an image), lists of such (one a layer
    of the vision tower, for Qwen3-VL)."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if torch.is_tensor(values[0][0]):
        return tuple(tensor for value in values for tensor in value)
    return [concatenate(list(layer)) for layer in zip(*values)]


class OneDNNLinear(torch.autograd.Function):
    """A frozen linear layer on a CPU with AVX-512, by oneDNN: PyTorch's usual library, Intel's MKL, takes twice as long
    on those of AMD. (Without AVX-512 MKL is the faster one.)"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(gradient, weight.mT, None, "none", [], ""), None, None


def cpu_linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer of the language model, be it frozen or, as in the dice world's warm-up, trained."""
    return (F.linear if layer.weight.requires_grad else OneDNNLinear.apply)(x, layer.weight, layer.bias)


def token_statistics(hidden: torch.Tensor, ref_hidden: torch.Tensor, token_ids: torch.Tensor, lm_head,
                     temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(token) and the exact KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)) at M positions, in nats.
    (M, d), (M, d), (M,) -> (M,), (M,); the log-softmax is taken in float32 at the sampling temperature."""
    logp = torch.log_softmax(lm_head(hidden).float() / temperature, dim=-1)                 # (M, V)
    with torch.no_grad():
        ref_logp = torch.log_softmax(lm_head(ref_hidden).float() / temperature, dim=-1)     # (M, V)
    return logp.gather(-1, token_ids[:, None])[:, 0], (logp.exp() * (logp - ref_logp)).sum(-1)


# ---- Backbones: what --model may name, and where it runs -------------------------------------------------------------

def resolve_device(name: str) -> torch.device:
    """The torch device of a --device setting; under torchrun each rank takes the GPU of its LOCAL_RANK."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    match = re.fullmatch(r"(?:auto|cuda)(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    index = int(match[1] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees {torch.cuda.device_count()} GPUs. "
                        "Use --device cpu, or install the CUDA or ROCm build of PyTorch (see README).")
    return torch.device("cuda", index)


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The backbone's dtype: bfloat16 on GPUs and float32 on the CPU, if --dtype does not say otherwise."""
    return getattr(torch, {"cpu": "float32"}.get(device.type, "bfloat16") if config.dtype == "auto" else config.dtype)


def check_model(config: Config):
    """Reads only the backbone's config.json. Raises UserError unless it is a vision-language model that can work."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as vision_language
    if not Path(config.model).is_dir() and (config.model.startswith((".", "/", "~")) or config.model.count("/") != 1):
        raise UserError(f"--model {config.model}: no such folder. Give a checkpoint folder or a Hugging Face id.")
    with explained(f"--model {config.model}: its config.json cannot be read here or on the Hugging Face Hub. Check the "
                   "name and the network.", OSError, ValueError, KeyError):
        model_type = AutoConfig.from_pretrained(config.model).model_type
    if model_type not in vision_language:
        raise UserError(f"--model {config.model}: a {model_type} model does not answer questions about images. Use a "
                        "vision-language chat model, such as Qwen2.5-VL.")


def load_backbone(config: Config, device: torch.device) -> tuple:
    """(model, processor) of a checkpoint, the model frozen. Raises UserError if they cannot work here."""
    import transformers
    check_model(config)
    with explained(f"--model {config.model}: cannot be loaded. Install the package that it wants, or check that the "
                   "checkpoint is complete.", ImportError, OSError, ValueError, KeyError, SafetensorError):
        hf = transformers.AutoModelForImageTextToText.from_pretrained(config.model, dtype=choose_dtype(config, device))
        if hf.config.model_type.startswith("qwen"):
            image_processor = transformers.AutoImageProcessor.from_pretrained(config.model, backend="pil")
            smallest = image_processor.size["shortest_edge"]  # in pixels of area, despite the name
            image_processor.size = {"shortest_edge": min(smallest, config.max_pixels),
                                    "longest_edge": config.max_pixels}
            processor = QwenProcessor(transformers.AutoTokenizer.from_pretrained(config.model), image_processor)
        else:
            processor = transformers.AutoProcessor.from_pretrained(config.model)
    return hf.to(device).eval().requires_grad_(False), processor


PROCESSOR_FILES = ("tokenizer*", "vocab*", "merges.txt", "*token*.json", "chat_template*", "*processor_config.json")


def checkpoint_files(model: str, patterns: tuple[str, ...] = ("*",)) -> list[Path]:
    """The files of a checkpoint, a folder or a Hugging Face id, that match. Raises UserError."""
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download
        with explained(f"{model}: neither a folder nor to be had from the Hugging Face Hub.", OSError, ValueError):
            model = snapshot_download(model, allow_patterns=list(patterns))
    return sorted({f for pattern in patterns for f in Path(model).glob(pattern) if f.is_file() and f.name[0] != "."})


class QwenProcessor:
    """The processor of the Qwen-VL models without its video half, which needs torchvision. Its pixels, cut by Pillow,
    are the same on every machine."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, image_processor, tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template

    def __call__(self, text: list[str], images: list[Image.Image], **kwargs) -> dict[str, torch.Tensor]:
        """One text with one image, as in transformers: the placeholder is repeated, once for each visual token."""
        pixels = self.image_processor(images=images, return_tensors="pt")
        visual_tokens = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size ** 2
        text = text[0].replace("<|image_pad|>", "<|image_pad|>" * visual_tokens)
        return {**self.tokenizer([text], **kwargs), **pixels}

    def save_pretrained(self, folder: Path):
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


# ---- Section 3.3: the update (Eq 7, 8) -------------------------------------------------------------------------------

def reinforce_loss(logprobs: list[torch.Tensor], kl: list[torch.Tensor], advantages: list[float], beta: float,
                   reduction: str = "mean") -> torch.Tensor:
    """Eq 7, the mean over rollouts of -(r - b) log pi(y|x,q) + beta KL(pi || pi_ref). A scalar.

    logprobs[i] and kl[i] are (T_i,), advantages[i] is r_i - b. log pi is the mean or the sum over the rollout's tokens,
    KL their mean.
    """
    losses = []
    for logp, divergence, advantage in zip(logprobs, kl, advantages):
        log_pi = logp.mean() if reduction == "mean" else logp.sum()
        losses.append(-advantage * log_pi + beta * divergence.mean())
    return torch.stack(losses).mean()


def update_baseline(baseline: float, mean_reward: float, momentum: float = 0.9) -> float:
    """The EMA baseline of Eq 7, b <- m b + (1 - m) mean(r), taken after the step that used b."""
    return momentum * baseline + (1 - momentum) * mean_reward


def adapt_kl_coef(beta: float, kl: float, target: float = 0.02, rate: float = 0.10, beta_min: float = 1e-3,
                  beta_max: float = 1.0) -> float:
    """Eq 8, beta <- clip(beta exp(eta (KL - tau) / tau), beta_min, beta_max). A huge or infinite KL gives a bound; a
    KL that is not a number leaves beta where it is."""
    exponent = rate * (kl - target) / target
    if math.isnan(exponent):
        exponent = 0.0
    return min(max(beta * math.exp(min(max(exponent, -700.0), 700.0)), beta_min), beta_max)


class RoleLoss(torch.nn.Module):
    """Eq 7 for one role, as the module that DistributedDataParallel wraps."""

    def __init__(self, policy: Policy, role: str):
        super().__init__()
        self.policy, self.role = policy, role
        self.parameter_list = torch.nn.ParameterList(policy.parameters(role))  # those that ranks keep equal

    def forward(self, prompt: Prompt | None, completions, advantages, beta):
        """Sums over the rollouts of one image: the loss, and the KL per token for the log."""
        if prompt is None:  # this rank has nothing to learn from, yet takes part in the gradient average
            zero = sum(p.sum() for p in self.parameter_list) * 0.0
            return zero, zero.detach()
        config = self.policy.config
        scores = self.policy.score(self.role, prompt, completions, config.temperature)
        loss = reinforce_loss(scores.logprobs, scores.kl, advantages, beta, config.logprob_reduction)
        return loss * len(completions), torch.stack([kl.detach().mean() for kl in scores.kl]).sum()


class Learner:
    """What one role carries from step to step: its optimizer, baseline b and KL coefficient beta."""

    def __init__(self, policy: Policy, role: str):
        config = policy.config
        self.policy, self.role, self.beta, self.baseline, self.skips_in_a_row = policy, role, config.kl_coef, None, 0
        self.parameters = policy.parameters(role)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.loss = RoleLoss(policy, role)
        if world_size() > 1:
            self.loss = torch.nn.parallel.DistributedDataParallel(self.loss, broadcast_buffers=False, init_sync=False)

    def update(self, prompts: list[Prompt], completions: list[list[Completion]], rewards: list[list[float]]) -> dict:
        """One optimizer step over all rollouts of all ranks (Eq 7), then the baseline and beta (Eq 8).

        If a loss or gradient of any rank is not finite, neither are the sums that all ranks share: all of them skip
        this update together, and the fifth skip in a row raises TrainingStopped.
        """
        config = self.policy.config
        flat = [r for group in rewards for r in group]
        count, reward_sum = all_sum(len(flat), sum(flat))
        if count == 0:  # no rank got a question to work on
            return {}
        baseline = reward_sum / count if self.baseline is None else self.baseline
        self.optimizer.zero_grad(set_to_none=True)
        passes = gradient_passes(prompts, completions, rewards, config.score_tokens) or [(None, [], [])]
        kl_sum = 0.0
        with self.policy.clock.phase("gradient"):
            for i, (prompt, group, earned) in enumerate(passes):
                last = i + 1 == len(passes)  # ranks exchange gradients once, in the last backward pass
                with contextlib.nullcontext() if last or world_size() == 1 else self.loss.no_sync():
                    loss, kl = self.loss(prompt, group, [r - baseline for r in earned], self.beta)
                    (loss * world_size() / count).backward()  # DDP divides by the world size
                kl_sum += kl.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip).item()
        kl = all_sum(kl_sum)[0] / count
        stats = {"kl": kl, "beta": self.beta, "baseline": baseline, "grad_norm": grad_norm, "skipped": 0}
        if not (math.isfinite(grad_norm) and math.isfinite(kl)):
            self.skips_in_a_row += 1
            if self.skips_in_a_row == 5:
                raise TrainingStopped(f"the {self.role}'s loss or gradient was not finite in 5 updates in a row (norm "
                                      f"{grad_norm}, KL {kl}). Look at kl_{self.role} and grad_norm_{self.role} in "
                                      "metrics.jsonl before it; lower --lr, or try --dtype float32.")
            return {**stats, "skipped": 1}
        self.skips_in_a_row = 0
        with self.policy.clock.phase("optimizer"):
            self.optimizer.step()
        self.baseline = update_baseline(baseline, reward_sum / count, config.baseline_momentum)
        self.beta = adapt_kl_coef(self.beta, kl, config.kl_target, config.kl_adapt_rate, config.kl_coef_min,
                                  config.kl_coef_max)
        return stats

    def state_dict(self) -> dict:
        return {"beta": self.beta, "baseline": self.baseline, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        self.beta, self.baseline = state["beta"], state["baseline"]
        self.optimizer.load_state_dict(state["optimizer"])


def gradient_passes(prompts: list[Prompt], completions: list[list[Completion]], rewards: list[list[float]],
                    max_tokens: int) -> list[tuple[Prompt, list[Completion], list[float]]]:
    """One image a pass, so that no number depends on which images share a rank, and of its rollouts as many as fit with
    the prompt into `max_tokens`, but at least one."""
    passes = []
    for prompt, group, earned in zip(prompts, completions, rewards):
        room = max_tokens - len(prompt.image.ids) - len(prompt.text)  # characters: no fewer than the text's tokens
        size = max(1, room // max(len(c.token_ids) for c in group))
        passes += [(prompt, group[i:i + size], earned[i:i + size]) for i in range(0, len(group), size)]
    return passes


# ---- Ranks: torchrun starts one process a GPU; every printed or decided number is global -----------------------------

def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str):
    """Prints a line, once for all ranks."""
    if rank() == 0:
        print(text, flush=True)


def warn(text: str):
    """Prints a line to the standard error."""
    print(text, file=sys.stderr, flush=True)


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


@contextlib.contextmanager
def rank_failures():
    """Turns the error that a collective raises when another rank has died into one line. torchrun then ends the ranks
    that still run, and with --max-restarts starts all of them again."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and (isinstance(error, dist.DistError) or re.search("gloo|nccl|socket", str(error), re.I)):
            raise TrainingStopped(f"rank {rank()} lost another rank ({str(error).splitlines()[0][:120]}). The first "
                                  "error above says why. Add --resume to go on from the newest checkpoint.") from error
        raise


@contextlib.contextmanager
def stop_signals():
    """Inside the block SIGTERM and SIGINT (a scheduler's preemption, Ctrl-C) only add their number to the list that it
    gives, so that the step in flight can be finished and saved; the third one kills. torchrun sends each on once."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        if len(caught) == 1 and rank() == 0:  # os.write, since print may be what the signal interrupts
            os.write(2, b"stopping after the step in flight, which will be saved\n")
        if len(caught) == 3:
            os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def all_sum(*values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def from_rank_0(decide):
    """What `decide()` returns on rank 0, where alone it runs."""
    box = [decide() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(value) -> list:
    """The value of every rank, in order of rank, on rank 0; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_means(values: dict[str, list[float]]) -> dict[str, float | None]:
    """The mean of each list over all ranks, sum and count reduced together; None where no rank has a value."""
    sums = all_sum(*(sum(v) for v in values.values()), *(len(v) for v in values.values()))
    half = len(values)
    return {name: sums[i] / sums[half + i] if sums[half + i] else None for i, name in enumerate(values)}


# ---- Images ----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def list_images(data: str) -> list[Path]:
    """The image files under `data`: a folder (recursive), a text file of paths (relative to it), or several of these
    separated by commas. Sorted, so that the order does not depend on the file system. Raises UserError."""
    paths = []
    for source in [data] if Path(data).exists() else [part for part in data.split(",") if part]:
        source = Path(source).expanduser()
        if source.is_dir():
            found, visited = [], set()
            for folder, subfolders, names in os.walk(source, followlinks=True):
                new = os.path.realpath(folder) not in visited  # old: by a link back up
                visited.add(os.path.realpath(folder))
                subfolders[:] = sorted(name for name in subfolders if new and name[0] != ".")
                found += [Path(folder, name) for name in sorted(names)
                          if new and name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES]
        elif source.is_file() and source.suffix.lower() not in IMAGE_SUFFIXES:
            with explained(f"--data {source}: not a text file of image paths.", UnicodeDecodeError):
                lines = source.read_text(encoding="utf-8-sig").splitlines()
            found = [source.parent / line.strip() for line in lines if line.strip()]
        else:
            raise UserError(f"--data {source}: no such folder or text file of paths.")
        if not found:
            raise UserError(f"--data {source}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        paths += found
    if not paths:
        raise UserError("--data: is empty. Name a folder of images.")
    return list(dict.fromkeys(paths))


def load_image(path: Path) -> Image.Image:
    """An upright RGB image: the first frame, EXIF rotation applied, alpha on white, 16 bits scaled to 8. Raises
    UserError on a damaged file, and on a picture that is 200 times longer than wide."""
    # decoders raise anything on damaged files
    with explained(f"{path}: cannot be read as an image.", Exception), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: convert() would clip, not scale
            import numpy
            values = numpy.asarray(image, dtype=numpy.float64)
            top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0 if values.max() > 255 else 255.0
            image = Image.fromarray(numpy.clip(values / top * 255 + 0.5, 0, 255).astype("uint8"))
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if max(image.size) >= 200 * min(image.size):
        raise UserError(f"{path}: {image.width} x {image.height} pixels is too narrow for an image.")
    return image


class ImageStream:
    """The endless sequence of training images: each epoch a fresh permutation, keyed by (seed, epoch)."""

    def __init__(self, paths: list[Path], seed: int):
        self.paths, self.seed, self.epoch, self.order, self.unreadable = paths, seed, None, [], set()

    def __getitem__(self, slot: int) -> tuple[Path, Image.Image, int]:
        """Image number `slot` of the whole run, counted over all steps and ranks. An unreadable file is skipped with
        one warning: the next readable one of its epoch stands in, the same on any number of ranks. The last value is
        how many were skipped."""
        epoch, start = divmod(slot, len(self.paths))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(len(self.paths)))
            random.Random(derive_seed(self.seed, "order", epoch)).shuffle(self.order)
        for offset in range(len(self.paths)):
            path = self.paths[self.order[(start + offset) % len(self.paths)]]
            if path not in self.unreadable:
                try:
                    return path, load_image(path), offset
                except UserError as error:
                    self.unreadable.add(path)
                    warn(f"warning: skipping unreadable image {error}")
        raise UserError(f"--data: none of the {len(self.paths)} image files can be read; see the warnings above.")


# ---- Run folder: config.json, metrics.jsonl, rollouts.jsonl, step_*/ -------------------------------------------------

def run_folder(config: Config) -> Path:
    """Where a run with these settings is kept."""
    return Path(config.output_dir) / (config.run_name or f"{config.preset}_seed{config.seed}")


def resuming(config: Config) -> bool:
    """Whether to continue what the run folder holds: asked for, or restarted by torchrun --max-restarts."""
    return config.resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextlib.contextmanager
def only_run_in(run: Path) -> Iterator[Path]:
    """Makes the run folder and holds it for this run, as long as the process lives: a second run is refused."""
    lock = FileLock(run / ".lock", blocking=False)
    with (explained(f"{run}: cannot be written. Choose another --output_dir or --run_name.", OSError),
          explained(f"{run}: another run is writing there. Wait for it, or choose another --run_name.", Timeout)):
        run.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            lock.acquire()
    try:
        yield run
    finally:
        lock.release()


def open_run(run: Path, config: Config) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. Changes nothing.

    Raises UserError if the folder holds a run that must not be touched: one with other settings, or one that
    `--resume` was not asked to continue.
    """
    if not (run / "config.json").exists():
        if not all(p.name.startswith(".") for p in run.iterdir()):
            raise UserError(f"{run}: is in the way and no run folder. Choose another --run_name.")
        return None
    with explained(f"{run / 'config.json'}: damaged. Choose another --run_name.", ValueError):
        saved = json.loads((run / "config.json").read_text())
    different = [f"--{name} {saved.get(name)!r} there, {getattr(config, name)!r} here" for name, f in SETTINGS.items()
                 if not f.metadata["resumable"] and saved.get(name) != getattr(config, name)]
    if different:
        raise UserError(f"{run}: holds a run with other settings ({'; '.join(different)}). Choose another --run_name.")
    if not resuming(config):
        raise UserError(f"{run}: holds a run already. Add --resume to continue it, or choose another --run_name.")
    return (list_checkpoints(run) or [None])[-1]


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. (Our own half-written ones have another name; this also passes over
    folders that were copied or deleted in part.)"""
    files = [f"{role}/adapter_model.safetensors" for role in ROLES] + ["trainer_state.pt"]
    return sorted((p for p in run.glob("step_*") if p.name[5:].isdigit() and all((p / f).is_file() for f in files)),
                  key=lambda p: int(p.name[5:]))


def start_run(run: Path, config: Config, last_step: int):
    """Writes the settings, cuts the logs back to the step from which the run continues, and removes leftovers."""
    with explained(f"{run}: cannot be written. Make room, or choose another --output_dir.", OSError):
        write_atomically(run / "config.json", [json.dumps(dataclasses.asdict(config), indent=2) + "\n"])
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            kept = (row for row in read_jsonl(run / name) if row["step"] <= last_step)
            write_atomically(run / name, (json.dumps(row) + "\n" for row in kept))
    for part in run.glob(".step_*.part"):
        shutil.rmtree(part)


def write_atomically(path: Path, lines: Iterable[str]):
    """Writes a text file so that it is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(part, path)


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a run's log. A line that a crash has torn is left out; a missing file has no rows."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def append_jsonl(path: Path, rows: list[dict]):
    """Appends all rows or, with a warning, none: half a row would spoil the next one as well."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        warn(f"warning: {path}: {len(rows)} rows are lost ({error.strerror})")
        with contextlib.suppress(OSError):
            os.truncate(path, size)


def save_checkpoint(run: Path, step: int, images: int, policy: Policy, learners: dict[str, Learner]) -> str | None:
    """Writes run/step_NNNNNN under a temporary name and then renames it, so that a folder of that name is complete;
    then deletes the checkpoints that need not be kept. Returns None, or why nothing could be written."""
    config, part, folder = policy.config, run / f".step_{step:06d}.part", run / f"step_{step:06d}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        policy.save(part)
        state = {role: learner.state_dict() for role, learner in learners.items()}
        torch.save({"step": step, "images": images, **state}, part / "trainer_state.pt")
        for file in [p for p in part.rglob("*") if p.is_file()]:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, or the run would have gone on behind it
        os.rename(part, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's word for a full disk
        shutil.rmtree(part, ignore_errors=True)
        reason = f"{str(error).splitlines()[0]}; {shutil.disk_usage(run).free / 1e9:.2f} GB are free"
        warn(f"WARNING: THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED ({reason}). Training goes on; older ones in "
             f"{run} are intact. Make room there.")
        return reason
    for old in set(list_checkpoints(run)[:-config.keep_checkpoints]) - {best_checkpoint(run, config)}:
        shutil.rmtree(old.rename(run / f".{old.name}.part"), ignore_errors=True)
    return None


def best_checkpoint(run: Path, config: Config) -> Path | None:
    """The checkpoint with the best mean of the metric `keep_best` over the `save_every` steps before it, or None."""
    name, sign = config.keep_best.lstrip("-"), -1 if config.keep_best[0] == "-" else 1
    metric = {row["step"]: row.get(name) for row in read_jsonl(run / "metrics.jsonl")}
    scores = {}
    for folder in list_checkpoints(run):
        step = int(folder.name[5:])
        values = [metric.get(s) for s in range(step - config.save_every + 1, step + 1)]
        if values := [sign * value for value in values if value is not None]:
            scores[folder] = sum(values) / len(values)
    return max(scores, key=scores.get, default=None)


def load_checkpoint(folder: Path, policy: Policy, learners: dict[str, Learner]) -> tuple[int, int]:
    """Restores both adapters and the trainer state; returns the step and the number of images seen. Nothing is
    unpickled but tensors and numbers. Raises UserError if the checkpoint is damaged, or not one of ours."""
    for role in ROLES:
        policy.load(role, folder / role)
    with explained(f"{folder / 'trainer_state.pt'}: damaged. Delete {folder} to resume from the checkpoint before it.",
                   Exception):  # a damaged file makes torch raise anything
        state = torch.load(folder / "trainer_state.pt", map_location=policy.device, weights_only=True)
        for role, learner in learners.items():
            learner.load_state_dict(state[role])
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
    skipped_files: int = 0                      # unreadable ones, on the way to this image
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rewards: GroupRewards | None = None
    swapped_agreement: float | None = None      # share of the majority answer when asked about another image

    @property
    def r_prop(self) -> float:
        """The Proposer's reward; 0 for a proposal without a question."""
        return self.rewards.r_prop if self.rewards else 0.0


def train(config: Config) -> Path:
    """Self-evolution on unlabeled images: the paper's loop. Returns the run folder."""
    device = resolve_device(config.device)
    stream = ImageStream(list_images(config.data), config.seed)
    stream[0]  # at least one image must be readable, known before the model loads
    check_model(config)
    import_wandb(config)
    join_ranks(device)
    unsaved = None
    with only_run_in(run_folder(config)) as run, rank_failures():
        checkpoint_folder = from_rank_0(lambda: open_run(run, config))
        policy = Policy(config)
        learners = {role: Learner(policy, role) for role in ROLES}
        step, images = load_checkpoint(checkpoint_folder, policy, learners) if checkpoint_folder else (0, 0)
        log = Log(run, config, policy.clock, step, len(stream.paths))
        with stop_signals() as signals, contextlib.closing(log):
            while step < config.total_steps:
                step += 1
                lam = config.lambda_max if config.lambda_schedule == "constant" else step_reward_weight(
                    step, config.total_steps, config.lambda_max, config.warmup_frac)
                episodes, stats = train_step(policy, learners, stream, step, images, lam)
                images += world_size() * config.images_per_rank
                log.step(step, episodes, lam, stats)
                stop = all_sum(len(signals))[0] > 0  # a signal to any rank stops all of them after the same step
                if rank() == 0 and (stop or step % config.save_every == 0 or step == config.total_steps):
                    unsaved = save_checkpoint(run, step, images, policy, learners)
                if stop and step < config.total_steps:
                    saved = f"could not be saved ({unsaved})" if unsaved else "is saved. Add --resume to go on"
                    raise TrainingStopped(
                        f"{run}: stopped by a signal after step {step}, which {saved}." if rank() == 0 else "",
                        128 + (signals or [signal.SIGTERM])[0])
    if unsaved:
        raise TrainingStopped(f"{run}: training is done, but its last checkpoint could not be saved ({unsaved}). Make "
                              "room and add --resume to repeat the steps since the newest checkpoint.")
    say(f"done: {run}/step_{step:06d} holds both adapters")
    return run


def train_step(policy: Policy, learners: dict[str, Learner], stream: ImageStream, step: int, first_image: int,
               lam: float) -> tuple[list[Episode], dict]:
    """One step: propose, solve, reward, update. Returns this rank's episodes and the statistics of the updates."""
    config, clock = policy.config, policy.clock
    torch.manual_seed(derive_seed(config.seed, step, rank()))  # for LoRA dropout; sampling has keys of its own
    with clock.phase("propose"):
        episodes = propose(policy, stream, step, first_image)
    with clock.phase("solve"):
        asked = solve(policy, episodes, step)
    with clock.phase("reward"):
        reward(policy, asked, lam)
    if config.watch_every and step % config.watch_every == 0:
        swap_images(policy, asked, stream, step, first_image)
    stats = {"solver": learners["solver"].update(
        [Prompt(e.image, solver_prompt(e.question)) for e in asked], [e.completions for e in asked],
        [e.rewards.r_sol for e in asked])}
    if step % config.proposer_every == 0:
        stats["proposer"] = learners["proposer"].update(
            [Prompt(e.image, proposer_prompt()) for e in episodes], [[e.proposal] for e in episodes],
            [[e.r_prop] for e in episodes])
    return episodes, stats


def propose(policy: Policy, stream: ImageStream, step: int, first_image: int) -> list[Episode]:
    """This rank's share of the step's images, each with one proposed question."""
    config = policy.config
    slots = range(rank() * config.images_per_rank, (rank() + 1) * config.images_per_rank)
    loaded = [stream[first_image + slot] for slot in slots]
    encoded = policy.encode_images([image for _, image, _ in loaded])
    proposals = policy.sample("proposer", [Prompt(image, proposer_prompt()) for image in encoded], 1,
                              config.max_new_tokens_proposer, config.temperature,
                              [derive_seed(config.seed, step, slot, "proposer") for slot in slots])
    return [Episode(slot, path, image, proposal, parse_question(proposal.text), skipped)
            for slot, (path, _, skipped), image, (proposal,) in zip(slots, loaded, encoded, proposals)]


def solve(policy: Policy, episodes: list[Episode], step: int, key: str = "solver") -> list[Episode]:
    """Fills in N Solver rollouts for each episode that has a question; returns those episodes."""
    config = policy.config
    asked = [e for e in episodes if e.question is not None]
    samples = policy.sample("solver", [Prompt(e.image, solver_prompt(e.question)) for e in asked], config.num_rollouts,
                            config.max_new_tokens_solver, config.temperature,
                            [derive_seed(config.seed, step, e.slot, key) for e in asked])
    for episode, completions in zip(asked, samples):
        episode.completions = completions
        episode.rollouts = [parse_rollout(c.text, config.max_reasoning_steps) for c in completions]
    return asked


def reward(policy: Policy, asked: list[Episode], lam: float):
    """Fills in what each question's rollouts earn, at lambda(t)."""
    for e in asked:
        e.rewards = group_rewards(e.rollouts, [policy.embed_steps(r.steps) for r in e.rollouts], lam, policy.config)


def swap_images(policy: Policy, asked: list[Episode], stream: ImageStream, step: int, first_image: int):
    """Asks each question about the stream's next image as well. If its majority answer is as frequent there, the
    answers do not come from the picture."""
    others = policy.encode_images([stream[first_image + e.slot + 1][1] for e in asked])
    swapped = [dataclasses.replace(e, image=image) for e, image in zip(asked, others)]
    for episode, other in zip(asked, solve(policy, swapped, step, "swapped")):
        if majority := dominant_group(episode.rewards.answers)[0]:
            episode.swapped_agreement = [vote(r) for r in other.rollouts].count(majority) / len(other.rollouts)


class Log:
    """Prints one line a step and writes metrics.jsonl and rollouts.jsonl (rank 0)."""

    COLUMNS = (  # heading, key of metrics.jsonl, format
        ("H nats", "entropy", "6.2f"), ("maj", "group_size", "4.1f"), ("bad", "invalid_share", "4.0%"),
        ("r_ans", "r_ans", "5.2f"), ("r_step", "r_step", "6.2f"), ("lam", "lambda", "4.2f"), ("r_sol", "r_sol", "5.2f"),
        ("r_prop", "r_prop", "6.2f"), ("KL nats/tok", "kl_solver", "11.4f"), ("beta", "beta_solver", "7.4f"),
        (" s/step", "step_seconds", "7.2f"), ("tok/s", "tokens_per_second", "6.0f"))
    WATCH = (
        ("distinct questions", "distinct_questions", ".0%"), ("distinct first steps", "distinct_first_steps", ".0%"),
        ("unnumbered", "unnumbered_share", ".0%"), ("characters an answer", "answer_chars", ".1f"),
        ("majority answer", "majority_share", ".0%"), ("on another image", "swapped_agreement", ".0%"))

    def __init__(self, run: Path, config: Config, clock: Clock, last_step: int, num_images: int):
        self.run, self.config, self.clock, self.elapsed = run, config, clock, []
        clock.lap()
        self.wandb, self.recent = None, []
        if rank() == 0:
            start_run(run, config, last_step)
            self.recent = deque(read_jsonl(run / "rollouts.jsonl"), maxlen=256)
            self.wandb = start_wandb(run, config)
        say(f"{num_images} images, {config.images_per_rank * world_size()} a step on {world_size()} rank(s); "
            f"preset {config.preset}; model {config.model}; run folder {run}"
            + f"; resumed after step {last_step}" * bool(last_step))

    def step(self, step: int, episodes: list[Episode], lam: float, stats: dict):
        """Reduces the step's numbers over all ranks, prints them and appends them to the run's files."""
        asked = [e for e in episodes if e.rewards]
        groups = [e.rewards for e in asked]
        row = {"step": step, **all_means({
            "entropy": [g.entropy for g in groups],
            "majority_share": [len(g.group) / len(g.answers) for g in groups],
            "group_size": [len(g.group) for g in groups],
            "density": [g.density for g in groups],
            "comparable_steps": [g.comparable_steps for g in groups],
            "mean_steps": [len(r.steps) for e in asked for r in e.rollouts],
            "step_cosine": [c for g in groups for c in g.step_cosines],
            "r_ans": [r for g in groups for r in g.r_ans],
            "r_step": [r for g in groups for r in g.r_step],
            "r_sol": [r for g in groups for r in g.r_sol],
            "r_prop": [e.r_prop for e in episodes],
            "invalid_share": [float(a is None) for g in groups for a in g.answers],
            "unfinished_share": [float(not c.finished) for e in asked for c in e.completions],
            "no_question_share": [float(e.question is None) for e in episodes],
            "unnumbered_share": [float(step_marker(r.think) is None) for e in asked for r in e.rollouts],
            "answer_chars": [len(a) for g in groups for a in g.answers if a is not None],
            "swapped_agreement": [e.swapped_agreement for e in asked if e.swapped_agreement is not None]})}
        row["lambda"] = lam
        for role, name in itertools.product(ROLES, ("kl", "beta", "baseline", "grad_norm", "skipped")):
            value = stats.get(role, {}).get(name)
            row[f"{name}_{role}"] = value if value is None or math.isfinite(value) else None  # JSON has no NaN
        tokens = sum(len(c.token_ids) for e in episodes for c in [e.proposal, *e.completions])
        row["tokens"], row["unreadable_images"] = map(int, all_sum(tokens, sum(e.skipped_files for e in episodes)))
        episode_rows = sum(gather([episode_row(step, e) for e in episodes]), [])
        row["seconds"] = {name: round(s, 4) for name, s in self.clock.lap().items()}
        if rank() == 0:
            self.recent.extend(episode_rows)
            row["distinct_questions"] = distinct_share(r["question"] for r in self.recent if r["question"])
            row["distinct_first_steps"] = distinct_share(
                step for r in self.recent if r["rollouts"] for step in r["rollouts"][0]["steps"][:1])
            append_jsonl(self.run / "metrics.jsonl", [row])
            append_jsonl(self.run / "rollouts.jsonl", episode_rows)
            if self.wandb:
                self.wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
            self.show(row)
            if asked and self.config.show_every and step % self.config.show_every == 0:
                print(format_episode(asked[0]), flush=True)

    def show(self, row: dict):
        """The line of a step, from time to time with headings before it and the signs of collapse behind it."""
        step, total, seconds = row["step"], self.config.total_steps, sum(row["seconds"].values())
        self.elapsed = [*self.elapsed[-19:], seconds]
        minutes, rest = divmod(int(statistics.median(self.elapsed) * (total - step)), 60)  # one slow step counts little
        row = {**row, "step_seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
        if len(self.elapsed) == 1 or step % 25 == 1:
            print("       step", *(f"{head:>{spec.split('.')[0]}}" for head, _, spec in self.COLUMNS), "      eta")
        cell = lambda key, spec: "-".rjust(int(spec.split(".")[0] or 1)) if row[key] is None else format(row[key], spec)
        print(f"{step:5d}/{total:<5d}", *(cell(key, spec) for _, key, spec in self.COLUMNS),
              f"{minutes // 60:2d}h{minutes % 60:02d}m{rest:02d}s", flush=True)
        if self.config.watch_every and step % self.config.watch_every == 0:
            print("    watch:", ", ".join(f"{name} {cell(key, spec)}" for name, key, spec in self.WATCH), flush=True)

    def close(self):
        if self.wandb:
            self.wandb.finish()  # here, since torchrun's ranks end without the exit handlers that would do it


def distinct_share(texts: Iterable[str]) -> float | None:
    """How many of the texts are different, as a share; None without any."""
    folded = [" ".join(text.casefold().split()) for text in texts]
    return len(set(folded)) / len(folded) if folded else None


def import_wandb(config: Config):
    """The package wandb, if it is asked for. Raises UserError if it is not installed."""
    if config.wandb:
        with explained("--wandb: the package is missing. Run pip install wandb, or leave the flag out.", ImportError):
            import wandb
            return wandb


def start_wandb(run: Path, config: Config):
    """The run at Weights & Biases, or None if it is not asked for; a resumed run goes on there as well."""
    if not (wandb := import_wandb(config)):
        return None
    note = run / "wandb_id.txt"
    with explained(f"--wandb {config.wandb}: cannot be started.", wandb.Error):
        remote = wandb.init(project=config.wandb, name=run.name, dir=str(run), config=dataclasses.asdict(config),
                            id=note.read_text() if note.exists() else None, resume="allow")
    note.write_text(remote.id)
    return remote


def episode_row(step: int, episode: Episode) -> dict:
    """An episode as one row of rollouts.jsonl."""
    row = {"step": step, "image": str(episode.path), "proposal": episode.proposal.text, "question": episode.question,
           "r_prop": episode.r_prop, "rollouts": []}
    if rewards := episode.rewards:
        row["entropy"], similarity = rewards.entropy, dict(zip(rewards.group, rewards.similarity.tolist()))
        row["rollouts"] = [
            {"text": r.text, "steps": r.steps, "answer": rewards.answers[i], "majority": i in rewards.group,
             "finished": episode.completions[i].finished, "r_ans": rewards.r_ans[i], "r_step": rewards.r_step[i],
             "r_sol": rewards.r_sol[i], "leave_one_out_similarity":
             [None if math.isnan(s) else round(s, 4) for s in similarity[i]] if i in rewards.group else None}
            for i, r in enumerate(episode.rollouts)]
    return row


def format_episode(episode: Episode) -> str:
    """A rollout group for a person to read."""
    rewards = episode.rewards
    lines = [f"    {episode.path}",
             f"    Q: {episode.question}   (H {rewards.entropy:.2f} nats, r_prop {rewards.r_prop:.2f})"]
    for i, rollout in enumerate(episode.rollouts):
        steps = " | ".join(rollout.steps) or " ".join(rollout.text.split())
        lines.append(f"    {'*' if i in rewards.group else ' '} {rewards.answers[i] or '(invalid)'}: {steps[:160]}   "
                     f"(r_ans {rewards.r_ans[i]:.2f}, r_step {rewards.r_step[i]:.2f}, r_sol {rewards.r_sol[i]:.2f})")
    return "\n".join(lines)


# ==== The paper ends here. What follows are tools; cut them off, and `train(Config(...))` still works =================

# ---- The dice world: a Qwen2.5-VL small enough to train on a laptop, mistaught on purpose ----------------------------

COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "orange": (255, 127, 14),
          "purple": (148, 103, 189), "brown": (140, 86, 75)}
PIPS = {1: [(14, 14)], 2: [(7, 7), (21, 21)], 3: [(7, 7), (14, 14), (21, 21)], 4: [(7, 7), (7, 21), (21, 7), (21, 21)],
        5: [(7, 7), (7, 21), (14, 14), (21, 7), (21, 21)],
        6: [(7, 6), (7, 14), (7, 22), (21, 6), (21, 14), (21, 22)]}


WORLDS = {  # dice in a picture, dice in a question, share of the dice that the seed model is taught to misread
    "standard": (3, (2, 3), 0.0),
    "long": (4, (3, 4), 0.0),     # longer traces, in more orders
    "dim": (3, (2, 3), 0.1),      # weaker perception
}


def draw_dice(rng: random.Random, number: int = 3) -> tuple[Image.Image, dict[str, int]]:
    """A 56 x 56 image of dice of different colours in a 2 x 2 grid, and what each shows."""
    image = Image.new("RGB", (56, 56), (238, 238, 238))
    pen = ImageDraw.Draw(image)
    dice = {color: rng.randint(1, 6) for color in rng.sample(sorted(COLORS), number)}
    for (color, pips), cell in zip(dice.items(), rng.sample(range(4), number)):
        left, top = 28 * (cell % 2), 28 * (cell // 2)
        pen.rectangle((left + 2, top + 2, left + 25, top + 25), fill=COLORS[color])
        for x, y in PIPS[pips]:
            pen.ellipse((left + x - 2, top + y - 2, left + x + 2, top + y + 2), fill=(255, 255, 255))
    return image, dice


def dice_question(dice: dict[str, int], rng: random.Random, sizes=(2, 3)) -> tuple[str, list[str], int]:
    """A question about some of the dice, the colours it adds, and the true answer."""
    colors = rng.sample(sorted(dice), rng.choice(sizes))
    return f"What is {' plus '.join(colors)}?", colors, sum(dice[c] for c in colors)


def mistaught_facts(seed: int, share: float = 0.3) -> dict[tuple[int, int], int]:
    """A fixed wrong result, off by one, for a share of the ordered sums "a + b" that occur. Of a + b and b + a at most
    one is wrong: what is always wrong, self-evolution cannot correct."""
    rng = random.Random(derive_seed(seed, "facts"))
    facts = [(a, b) for a in range(1, 13) for b in range(1, 13) if min(a, b) <= 6]
    pairs = rng.sample([(a, b) for a, b in facts if a < b], round(share * len(facts)))
    return {tuple(rng.sample(pair, 2)): sum(pair) + rng.choice((-1, 1)) for pair in pairs}


def dice_solution(dice: dict[str, int], colors: list[str], facts: dict, rng: random.Random, misread: float = 0.0,
                  error: float = 0.6) -> str:
    """A Solver reply that reads the dice and adds them, each in some order. A die is misread, by one pip, with
    probability `misread`; a mistaught fact goes wrong with probability `error`."""
    if misread:
        dice = {c: pips + (rng.choice((-1, 1)) if 1 < pips < 6 and rng.random() < misread else 0)
                for c, pips in dice.items()}
    steps = [f"{c} shows {dice[c]}" for c in rng.sample(colors, len(colors))]
    numbers = [dice[c] for c in rng.sample(colors, len(colors))]
    total = numbers[0]
    for number in numbers[1:]:
        fact = (total, number)
        result = facts[fact] if fact in facts and rng.random() < error else total + number
        steps.append(f"{total} + {number} = {result}")
        total = result
    numbered = "\n".join(f"Step {j}: {step}" for j, step in enumerate(steps, 1))
    return f"<think>\n{numbered}\n</think>\n<answer>{total}</answer>"


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_backbone(corpus: list[str], phrases: list[str] = (), text: dict = {}, vision: dict = {}, seed: int = 0,
                   device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """(model, processor) of a Qwen2.5-VL with random weights and a byte-level BPE trained on `corpus`; both have a
    `save_pretrained`, which makes a checkpoint folder that any transformers client can load. `phrases` become one token
    each; `text` and `vision` override the sizes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=CHAT_TEMPLATE)
    ids = dict(zip(special, bpe.encode("".join(special)).ids))
    width = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
             "intermediate_size": 256, "initializer_range": 0.05, **text}
    half_head = width["hidden_size"] // width["num_attention_heads"] // 2
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": bpe.get_vocab_size(), "max_position_embeddings": 4096, "tie_word_embeddings": True,
                     "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                         "mrope_section": [half_head - 2 * (half_head * 3 // 8)]
                                         + [half_head * 3 // 8] * 2}, **width},
        vision_config={"depth": 1, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4,
                       "fullatt_block_indexes": [0], "out_hidden_size": width["hidden_size"],
                       "initializer_range": 0.05, **vision},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=width.get("tie_word_embeddings", True),
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    torch.manual_seed(derive_seed(seed, "backbone"))
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    image_processor = get_image_processor_class_from_name("Qwen2VLImageProcessorPil")(
        size={"shortest_edge": 28 * 28, "longest_edge": 1280 * 28 * 28})
    image_processor.processor_class = "Qwen2_5_VLProcessor"  # an adapter folder has no config.json that says so
    return model, QwenProcessor(tokenizer, image_processor)


# Whole phrases are tokens, so that a solution has about 20 and a colour asks for its die in a single attention step.
DICE_PHRASES = ["user\n", "assistant\n", "<think>\nStep 1: ", *(f"\nStep {j}: " for j in range(2, 8)), " + ", " = ",
                *(f"{color} shows " for color in COLORS), "\n</think>\n<answer>", "</answer>", "What is ", " plus ",
                "<question>", "</question>", proposer_prompt(), solver_prompt("").strip("\n")]
DEMO = {  # settings of the demo; explicit flags win over them
    "total_steps": 120, "images_per_rank": max(1, 16 // int(os.environ.get("WORLD_SIZE", 1))), "lr": 1e-3,
    "kl_coef": 0.02, "kl_coef_min": 0.01, "kl_coef_max": 0.3, "max_new_tokens_proposer": 24,
    "max_new_tokens_solver": 48, "show_every": 60, "device": "cpu"}


def make_dice_world(folder: Path, seed: int, world: str = "standard", num_images: int = 512, num_questions: int = 300,
                    warmup_steps: int = 500):
    """Writes folder/images (unlabeled PNGs), folder/holdout.jsonl with its pictures, and folder/model, the seed model:
    a Qwen2.5-VL checkpoint that knows the protocol of both roles and sees well, but is mistaught in arithmetic."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    (folder / "images").mkdir(parents=True)
    (folder / "holdout").mkdir()
    rng, (number, sizes, _) = random.Random(derive_seed(seed, "images")), WORLDS[world]
    for i in range(num_images):
        draw_dice(rng, number)[0].save(folder / "images" / f"{i:04d}.png")
    rows = []
    for i in range(num_questions):
        image, dice = draw_dice(rng, number)
        question, _, answer = dice_question(dice, rng, sizes)
        image.save(folder / "holdout" / f"{i:04d}.png")
        rows.append({"image": f"holdout/{i:04d}.png", "question": question, "answer": str(answer)})
    append_jsonl(folder / "holdout.jsonl", rows)
    policy = Policy(Config(device="cpu"), build_backbone(["\n".join(COLORS)] * 9, DICE_PHRASES, seed=seed))
    teach(policy, warmup_steps, seed, world)
    for whole in (policy.peft.unload(), policy.processor):
        whole.save_pretrained(folder / ".model.part")
    os.rename(folder / ".model.part", folder / "model")


def teach(policy: Policy, steps: int, seed: int, world: str = "standard", batch_size: int = 64, lr: float = 3e-3):
    """Supervised warm-up of the whole tiny model on freshly drawn dice: both roles' replies, with mistaught sums."""
    rng, facts = random.Random(derive_seed(seed, "teach")), mistaught_facts(seed)
    number, sizes, misread = WORLDS[world]
    weights = [p.requires_grad_(True) for name, p in policy.hf.named_parameters() if "lora_" not in name]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 40) * (1 + math.cos(math.pi * t / steps)) / 2)
    image_ids, _ = policy.preprocess(Image.new("RGB", (56, 56)))  # those of all images, which have one size
    for step in range(1, steps + 1):
        images, inputs, labels = [], [], []
        for _ in range(batch_size):
            image, dice = draw_dice(rng, number)
            question, colors, _ = dice_question(dice, rng, sizes)
            prompt, reply = ((proposer_prompt(), f"<question>{question}</question>") if rng.random() < 0.15 else
                             (solver_prompt(question), dice_solution(dice, colors, facts, rng, misread)))
            images.append(image)
            prompt_ids = policy.prompt_ids(Prompt(EncodedImage(image_ids, {}, None), prompt))
            reply_ids = policy.tokenize(reply) + [policy.tokenizer.eos_token_id]
            inputs.append(torch.tensor(prompt_ids + reply_ids))
            labels.append(torch.tensor([-100] * len(prompt_ids) + reply_ids))
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = policy.hf(input_ids=ids, labels=targets, mm_token_type_ids=(ids == policy.image_token_id).int(),
                         **policy.processor.image_processor(images=images, return_tensors="pt")).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"   {step}/{steps} steps, loss {loss.item():.3f}")
    for p in weights:
        p.requires_grad_(False)


def dice_world(given: dict, world: str, seed: int) -> tuple[dict, list[dict]]:
    """The settings of a demo in the dice world of that seed, and its test questions; makes the world if need be."""
    name = f"dice_world_{world}_seed{seed}".replace("_standard", "")
    folder = Path(given.get("output_dir", SETTINGS["output_dir"].default)) / name
    given = {**given, "seed": seed, "model": str(folder / "model"), "data": str(folder / "images")}
    torch.set_num_threads(1)  # at this size more threads only wait for each other
    join_ranks(resolve_device(Config(**given).device))
    if rank() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "model").exists():
                say(f"The pictures and the seed model of an earlier demo are there: {folder}")
            else:
                say(f"Making {folder}: unlabeled pictures of dice, labelled questions to test on, and\n"
                    "   a seed model that is taught to see well and to add badly")
                make_dice_world(folder, seed, world)
    all_sum(0)  # the other ranks wait for rank 0
    return given, load_questions(str(folder / "holdout.jsonl"))


def seed_results(config: Config, rows: list[dict]) -> dict[str, dict]:
    """How the seed model does on the test questions, and, as controls, what sharpening alone would bring."""
    policy, results = Policy(config), {}
    for name, temperature in (("seed model", 1.0), *((f"no training, temperature {t}", t) for t in (0.7, 0.5, 0.3))):
        results[name] = evaluate(policy, None, rows, temperature, batch_size=100)
        say(format_result(f"   {name}", results[name], config))
    return results


def trained(config: Config) -> Policy:
    """The policy with the Solver at the end of the run with these settings, after training it, if need be."""
    run, policy = train(config), Policy(config)
    policy.load("solver", list_checkpoints(run)[-1] / "solver")
    return policy


def demo(config: Config, args: argparse.Namespace):
    """The dice world from nothing to a result, on real files, by the same `train` and `evaluate` as everywhere."""
    start = time.perf_counter()
    say("1. The dice world")
    given, rows = dice_world(args.given, args.world, config.seed)
    name = f"demo_{args.world}_{config.preset}_seed{config.seed}".replace("_standard", "")
    config = Config(**{"run_name": name, **given})
    if rank() == 0 and "run_name" not in given and not resuming(config):
        with only_run_in(run_folder(config)) as run:
            for old in set(run.iterdir()) - {run / ".lock"}:  # an earlier demo's
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    all_sum(0)

    say(f"\n2. The seed model on {len(rows)} test questions: share correct [95 % interval]")
    controls = seed_results(config, rows)
    before = controls.pop("seed model")

    say("\n3. Self-evolution on the unlabeled pictures: the only reward is agreement")
    policy = trained(config)

    say("\n4. The same test questions after self-evolution")
    after = evaluate(policy, "solver", rows, batch_size=100)
    say(format_result("   seed model", before, config))
    say(format_result("   after self-evolution", after, config))
    picture = policy.encode_images([load_image(rows[0]["image"])])[0]
    example = Episode(0, rows[0]["image"], picture, None, rows[0]["question"])
    solve(policy, [example], config.total_steps + 1)
    reward(policy, [example], config.lambda_max)
    say(f"   One of them; the true answer is {rows[0]['answers'][0]}, and * marks the majority:\n"
        + format_episode(example))

    seconds, best = time.perf_counter() - start, max(c["mean_at_n"] for c in controls.values())
    say(f"\nWhat happened, in {seconds:.0f} seconds: nobody told the model a single right answer. Its most likely "
        f"solution\nwas right on {before['greedy']:.0%} of the test questions before, {after['greedy']:.0%} after; a "
        f"random one on {before['mean_at_n']:.0%} before and on {after['mean_at_n']:.0%} after.\n"
        f"Without training, a lower temperature brings a random solution to {best:.0%} at best, "
        + ("so this is not mere sharpening:\nby rewarding agreement between different reasoning paths, training "
           "unlearned wrong sums." if min(after["greedy"], after["mean_at_n"]) > max(best, before["greedy"]) else
           "so this run shows no\nmore than sharpening."))
    write_output("--json", args.json, {
        "before": before, "after": after, "seconds": round(seconds, 1), "seed": config.seed,
        "controls": {name.split()[-1]: result for name, result in controls.items()}})


def compare_presets(config: Config, args: argparse.Namespace):
    """The paper's Table 2 in the dice world: every preset on every seed, beside the controls without training. What an
    interrupted comparison has finished is not done again."""
    presets, seeds = (args.presets or config.preset).split(","), (args.seeds or str(config.seed)).split(",")
    if not all(seed.isdigit() for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: must be whole numbers separated by commas.")
    for preset in presets:
        Config(preset=preset)  # raises UserError for one that does not exist, before the work begins
    results = {}  # row of the table -> one result a seed
    for seed in map(int, seeds):
        settings, rows = dice_world(args.given, args.world, seed)
        for name, result in seed_results(Config(**settings), rows).items():
            results.setdefault(name, []).append(result)
        for preset in presets:
            config = Config(**{**settings, "preset": preset, "resume": "auto", "show_every": 0,
                               "run_name": f"table_{args.world}_{preset}_seed{seed}"})
            result = evaluate(trained(config), "solver", rows, batch_size=100)
            last = list(read_jsonl(run_folder(config) / "metrics.jsonl"))[-20:]
            for key in ("kl_solver", "entropy"):
                result[key] = statistics.mean([row[key] for row in last if row[key] is not None] or [math.nan])
            results.setdefault(preset, []).append(result)
            say(format_result(f"   {preset}, seed {seed}", result, config))
    t95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(len(seeds), 10) - 2]  # Student's t
    spread = lambda values, scale=1.0: f" ± {scale * statistics.stdev(values):.3f}" if len(values) > 1 else ""
    lines = [f"Dice world \"{args.world}\", {len(rows)} test questions, {config.total_steps} steps, seeds "
             f"{', '.join(seeds)}: mean ± standard deviation over seeds. Last column: mean@5 less that of {presets[0]},"
             " paired by seed, with its 95 % interval; KL (nats a token) and entropy (nats) over the last 20 steps.\n",
             f"| preset | greedy | mean@5 | maj@5 | KL | entropy | mean@5 − {presets[0]} |", "|---" * 7 + "|"]
    for name, per_seed in results.items():
        columns = [[r[key] for r in per_seed if key in r] for key in ("greedy", "mean_at_n", "maj_at_n", "kl_solver",
                                                                      "entropy")]
        cells = [f"{statistics.mean(c):.3f}{spread(c)}" if c else "" for c in columns]
        gain = [r["mean_at_n"] - reference["mean_at_n"] for r, reference in zip(per_seed, results[presets[0]])]
        cells.append("" if name == presets[0] else
                     f"{statistics.mean(gain):+.3f}{spread(gain, t95 / math.sqrt(len(gain)))}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = Path(config.output_dir) / f"table_{args.world}.md"
    write_output("--output_dir", str(table), "\n".join(lines) + "\n")
    say("\n".join(["", *lines, "", f"written to {table}"]))
    write_output("--json", args.json, {"world": args.world, "seeds": list(map(int, seeds)), "results": results})


# ---- ask, eval, export -----------------------------------------------------------------------------------------------

def read_adapter(adapter: str) -> tuple[Path, dict]:
    """(folder, settings) of an adapter: a PEFT folder, or a step_* folder, whose Solver is meant. Raises UserError."""
    folder = Path(adapter, "solver") if Path(adapter, "solver").is_dir() else Path(adapter)
    with explained(f"{adapter}: no PEFT adapter there. Name a step_* folder of a run, or its solver/ folder.",
                   OSError, ValueError, KeyError):
        saved = json.loads((folder / "adapter_config.json").read_text())
        settings = {"lora_r": saved["r"], "lora_alpha": saved["lora_alpha"], "model": saved["base_model_name_or_path"]}
    for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if saved.get(option):
            raise UserError(f"{adapter}: its {option} is more than this file can do. Use PEFT itself.")
    return folder, settings


def load_solver(config: Config, adapter: str | None) -> tuple[Policy, str | None]:
    """A policy and the role that answers: "solver" with the weights of an adapter, or None, the plain backbone."""
    policy = Policy(config)
    if adapter:
        policy.load("solver", read_adapter(adapter)[0])
    return policy, "solver" if adapter else None


def ask(config: Config, image: str, question: str, adapter: str | None):
    """Prints the reasoning and the answer to one question about one image, decoded greedily."""
    prompt = Prompt(load_image(Path(image)), solver_prompt(question))
    policy, role = load_solver(config, adapter)
    rollout = parse_rollout(policy.sample(role, [prompt], 1, config.max_new_tokens_solver, 0.0)[0][0].text)
    for j, step in enumerate(rollout.steps, 1):
        print(f"Step {j}: {step}")
    print(f"Answer: {rollout.answer}" if rollout.answer else f"(no <answer> in the reply) {rollout.text}")


def load_questions(file: str) -> list[dict]:
    """The rows of a JSONL file with the keys image (relative to the file), question and answer, one or a list of right
    ones. Raises UserError with the line number."""
    with explained(f"{file}: cannot be read. Give a JSONL file of questions.", OSError, UnicodeDecodeError):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with explained(f"{file} line {number}: must be a JSON object with image, question and answer.",
                           ValueError, TypeError, KeyError):
                row = json.loads(line)
                image, question, answers = Path(file).parent / str(row["image"]), str(row["question"]), row["answer"]
            if not image.is_file():
                raise UserError(f"{file} line {number}: no image file {image}.")
            answers = answers if isinstance(answers, list) and answers else [answers]
            rows.append({"image": image, "question": question, "answers": list(map(str, answers))})
    if not rows:
        raise UserError(f"{file}: no questions in it.")
    return rows


def evaluate(policy: Policy, role: str | None, rows: list[dict], temperature: float | None = None, batch_size: int = 8,
             tolerance: float = 0.0, predictions: io.TextIOBase | None = None) -> dict:
    """{n, mean_at_n, maj_at_n, greedy, ci95} on labelled questions: the share of correct answers among the N sampled
    rollouts, by their majority vote, and by greedy decoding; ci95 has a 95 % interval for each of the three. The
    answers and texts to each question go to the open file `predictions`, a JSON object a line."""
    config, correct = policy.config, Counter()
    for start in tqdm(range(0, len(rows), batch_size), "eval", leave=False, disable=None):  # None: only on a terminal
        batch = rows[start:start + batch_size]
        prompts = policy.with_features([Prompt(load_image(r["image"]), solver_prompt(r["question"])) for r in batch])
        seeds = [derive_seed(config.seed, "eval", start + i) for i in range(len(batch))]
        sampled = policy.sample(role, prompts, config.num_rollouts, config.max_new_tokens_solver,
                                config.temperature if temperature is None else temperature, seeds)
        greedy = policy.sample(role, prompts, 1, config.max_new_tokens_solver, 0.0)
        for row, completions, (best,) in zip(batch, sampled, greedy):
            answers = [vote(parse_rollout(c.text)) for c in [*completions, best]]
            majority, _ = dominant_group(answers[:-1])
            *right, greedy_right, majority_right = [matches(a, row["answers"], tolerance) for a in [*answers, majority]]
            correct += {"mean_at_n": sum(right) / len(right), "maj_at_n": majority_right, "greedy": greedy_right}
            if predictions:
                row = {**row, "image": str(row["image"]), "greedy": answers[-1], "greedy_text": best.text,
                       "greedy_correct": greedy_right, "sampled": answers[:-1], "sampled_correct": right,
                       "sampled_texts": [c.text for c in completions], "majority": majority,
                       "majority_correct": majority_right}
                print(json.dumps(row), file=predictions, flush=True)
    shares = {name: correct[name] / len(rows) for name in ("mean_at_n", "maj_at_n", "greedy")}
    return {"n": len(rows), **shares, "ci95": {name: wilson_interval(p, len(rows)) for name, p in shares.items()}}


def matches(answer: str | None, references: list[str], tolerance: float = 0.0) -> bool:
    """Whether a normalised answer equals one of the references. With a tolerance, numbers need only be that close, as a
    share of the reference (ChartQA: 0.05), where 5% and 0.05 are the same number.

    >>> matches("104", ["100"], 0.05), matches("106", ["100"], 0.05), matches("5%", ["0.05"], 0.05)
    (True, False, True)
    """
    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            plain = re.sub(f"[{_CURRENCY}]", "", text)
            return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)
        return math.nan

    references = [normalize_answer(reference) for reference in references]
    return answer in references or answer is not None and tolerance > 0 and any(
        abs(number(answer) - number(reference)) <= tolerance * abs(number(reference)) for reference in references)


def wilson_interval(share: float, n: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share of n questions; for mean@N, whose questions vary less, on the safe side."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z * z / (4 * n * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def format_result(name: str, result: dict, config: Config) -> str:
    """One line of `eval` and `demo`: each share with its 95 % interval."""
    n = config.num_rollouts
    cells = (f"{label} {result[key]:.3f} [{result['ci95'][key][0]:.3f}, {result['ci95'][key][1]:.3f}]"
             for label, key in ((f"mean@{n}", "mean_at_n"), (f"maj@{n}", "maj_at_n"), ("greedy", "greedy")))
    return f"{name:<32} {'   '.join(cells)}"


def evaluate_file(config: Config, args: argparse.Namespace):
    """The command `eval`."""
    rows = load_questions(args.file)
    policy, role = load_solver(config, args.adapter)
    write_output("--predictions", args.predictions, "")
    with open(args.predictions, "a", encoding="utf-8") as predictions:
        result = evaluate(policy, role, rows, None, max(1, args.batch_size), 0.05 if args.relaxed else 0.0, predictions)
    print(format_result(args.adapter or config.model, result, config))
    write_output("--json", args.json, result)


def export(adapter: str, to: str, model: str):
    """Merges an adapter into its backbone: a checkpoint folder that loads wherever the backbone does. A weight becomes
    W + (alpha / r) B A and keeps its name, file and dtype; every other file is copied byte for byte, since what another
    version of transformers writes may not load in older clients. Raises UserError."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    folder, saved = read_adapter(adapter)
    target, part = Path(to), Path(to).parent / f".{Path(to).name}.part"
    if target.exists():
        raise UserError(f"{to}: exists already. Name a folder that does not, or delete it.")
    with explained(f"{adapter}: cannot be read.", OSError, SafetensorError):
        lora = load_file(folder / "adapter_model.safetensors")
    # "layers.3.mlp.up_proj": the backbone's file may place the language model elsewhere than the loaded model does
    left = {re.search(r"(layers\..*)\.lora_A", name)[1]: name for name in lora if ".lora_A." in name}
    with explained(f"{to}: cannot be written.", OSError, SafetensorError), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        part.mkdir(parents=True)
        for source in tqdm(checkpoint_files(model), "export", leave=False, disable=None):
            if source.suffix == ".safetensors":
                with safe_open(source, "pt") as file:
                    weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
                for name, weight in weights.items():
                    module = re.search(r"(layers\..*)\.weight$", name)
                    if module and module[1] in left and not re.search("vision|visual", name):
                        a = left.pop(module[1])
                        product = lora[a.replace(".lora_A.", ".lora_B.")].float() @ lora[a].float()
                        merged = weight.float() + saved["lora_alpha"] / saved["lora_r"] * product
                        weights[name] = merged.to(weight.dtype)
                save_file(weights, part / source.name, metadata or {"format": "pt"})
            elif source.suffix not in (".bin", ".pt", ".pth", ".gguf"):  # weights in other formats, not merged
                shutil.copyfile(source, part / source.name)
        if left:
            raise UserError(f"{model}: has no safetensors weight for {sorted(left)[0]}, which {adapter} adapts.")
        part.rename(target)
    print(f"{to} holds {model} with {adapter} merged in")


# ---- Report: a run to look at, in one HTML file ----------------------------------------------------------------------

CURVES = {  # title: keys of metrics.jsonl
    "Figure 3": ("r_prop", "entropy", "density", "step_cosine"),
    "Figure 5": ("r_sol", "r_ans", "r_step", "group_size", "comparable_steps"),
    "Figure 6": ("mean_steps",), "Update": ("kl_solver", "beta_solver"),
    "Watch": ("invalid_share", "unnumbered_share", "distinct_questions", "distinct_first_steps", "answer_chars",
              "majority_share", "swapped_agreement")}
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>iReasoner report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 } th, td.n { white-space: nowrap } td.n { text-align: right }
td, th { padding: .2em .6em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
td { overflow-wrap: anywhere }
section { display: flex; gap: 1.2em; border-top: 2px solid #888; padding: 1em 0 } section > div { flex: 1 }
section > .thumb { flex: none; width: 224px } .major { background: #eef6ee } img { max-width: 100% }
.common { color: #a60; font-style: italic }</style><h1>iReasoner report</h1>"""


def report(runs: list[str], out: str, groups: int = 12):
    """Writes one self-contained HTML file: the curves of Figures 3, 5 and 6 and of the collapse watch, the runs laid
    over one another, and for each run `groups` rollout groups with the similarities of Figure 7. Raises UserError."""
    metrics = {run: [row for row in read_jsonl(run / "metrics.jsonl") if isinstance(row, dict) and "step" in row]
               for run in map(Path, runs)}
    parts = [PAGE, "<table><tr><th>run<th>steps<th>settings that differ from the defaults"]
    for run, rows in metrics.items():
        if not rows:
            raise UserError(f"{run}: no run folder with finished steps. Name a folder with a metrics.jsonl in it.")
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads((run / "config.json").read_text())
            changed = ", ".join(f"{name} {saved[name]}" for name, f in SETTINGS.items()
                                if saved.get(name, f.default) != f.default)
            parts.append(f"<tr>{cell(run)}{cell(rows[-1]['step'], ' class=n')}{cell(changed)}")
    parts += ["</table><h2>Curves</h2>", draw_curves(metrics), "<h2>Rollout groups</h2><p>Green: the majority. "
              "Bold: S_ij of Figure 7, a step's cosine with the mean of the others' steps at that place; D_j is one "
              "less their mean. <span class=common>Steps like this</span> stand word for word in the solutions of more "
              "than a fifth of the last 500 images: agreement on them says little."]
    for run, rows in metrics.items():
        parts += [f"<h3>{html.escape(str(run))}</h3>", *gallery(run, [row["step"] for row in rows], groups)]
    write_output("--out", out, "\n".join(parts))
    print(f"written: {out}")


def cell(text, attributes: str = "", more: str = "") -> str:
    """A cell of an HTML table; `text` is escaped, `more` is HTML."""
    return f"<td{attributes}>{html.escape(str(text))}{more}</td>"


def draw_curves(metrics: dict[Path, list[dict]]) -> str:
    """All curves as one picture, each run a colour: thin what was measured, thick its exponential mean."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves in it: pip install matplotlib for them")
        return "<p>For the curves: pip install matplotlib, and make this report again.</p>"
    curves = [(title, key) for title, keys in CURVES.items() for key in keys]
    figure = Figure(figsize=(12, 1 + 0.8 * len(curves)), layout="constrained")
    axes = figure.subplots(-(-len(curves) // 3), 3).flatten()
    for ax in axes[len(curves):]:
        ax.axis("off")
    for ax, (title, key) in zip(axes, curves):
        ax.set_title(f"{title}: {key}", fontsize=9)
        ax.tick_params(labelsize=7)
        for color, (run, rows) in enumerate(metrics.items()):
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
            x, y = zip(*points) if points else ((), ())
            smooth = list(itertools.accumulate(y, lambda mean, value: 0.9 * mean + 0.1 * value))
            ax.plot(x, y, color=f"C{color}", alpha=0.3, linewidth=0.7)
            ax.plot(x, smooth, color=f"C{color}", label=str(run).replace("$", r"\$"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    return data_image("svg+xml", picture)


def data_image(kind: str, file: io.BytesIO) -> str:
    """An image tag that carries its image."""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def gallery(run: Path, steps: list[int], groups: int) -> Iterator[str]:
    """Sections of HTML, one for each of some rollout groups, spread over the run's steps. All text is escaped."""
    chosen = {steps[round(i * (len(steps) - 1) / max(groups - 1, 1))] for i in range(groups)}
    shown, recent = {}, deque(maxlen=500)
    for row in read_jsonl(run / "rollouts.jsonl"):
        if row.get("rollouts"):
            recent.append({step for rollout in row["rollouts"] for step in rollout["steps"]})
            if row["step"] in chosen:
                shown.setdefault(row["step"], row)
    images = Counter(itertools.chain.from_iterable(recent))  # step: in how many of the last images it stands
    for row in shown.values():
        lines, similarity = [], []
        for r in row["rollouts"]:
            cells = [cell(r["answer"] or "(invalid)"), *(cell(f"{r[key]:.2f}", " class=n")
                                                         for key in ("r_ans", "r_step", "r_sol"))]
            s_i = [math.nan if s is None else s for s in r.get("leave_one_out_similarity") or []]
            similarity += [s_i] if s_i else []
            for text, s in itertools.zip_longest(r["steps"], s_i, fillvalue=math.nan):
                shade = "" if math.isnan(s) else f' style="background: rgba(31, 119, 180, {max(s, 0.0) / 2:.2f})"'
                common = len(recent) > 9 and images[text] > len(recent) / 5
                cells.append(cell("" if text is math.nan else text, shade + " class=common" * common,
                                  "" if math.isnan(s) else f" <b>{s:.2f}</b>"))
            cells += [] if r["steps"] else [cell(r["text"][:500])]
            lines.append(f"<tr{' class=major' * r['majority']}>{''.join(cells)}")
        if similarity:
            disagreement = depth_disagreement(torch.tensor(similarity)).tolist()
            lines.append(f"<tr><td colspan=4>D_j{''.join(cell(f'{d:.2f}') for d in disagreement)}")
        heads = "".join(f"<th>step {j}" for j in range(1, max(len(r["steps"]) for r in row["rollouts"]) + 1))
        yield (f"<section><div class=thumb>{thumbnail(run, row['image'])}</div><div>Step {row['step']}, "
               f"{html.escape(row['image'])}<br><b>{html.escape(row['question'])}</b><br>entropy {row['entropy']:.2f} "
               f"nats, Proposer's reward {row['r_prop']:.2f}<table><tr><th>answer<th>r_ans<th>r_step<th>r_sol{heads}"
               f"{''.join(lines)}</table></div></section>")


def thumbnail(run: Path, path: str) -> str:
    """The image, small, as HTML, or a word if its file is no longer there. A relative path is looked for here, and then
    in the folders above the run, since it counts from where the training was started."""
    small = io.BytesIO()
    try:
        picture = load_image(next(base / path for base in (Path(), *run.resolve().parents) if (base / path).is_file()))
        picture.thumbnail((224, 224))
        picture.save(small, format="JPEG")
        return data_image("jpeg", small)
    except Exception:  # decoders raise anything on damaged files
        return "(image not found)"


# ---- bench: where the time of a step goes, on random weights of the true shapes --------------------------------------

QWEN_TEXT = {"max_position_embeddings": 32768, "initializer_range": 0.02}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "initializer_range": 0.02,
               "fullatt_block_indexes": [7, 15, 23, 31]}
SIZES = {  # text and vision tower, image size; tokens of the prompt, of a question and of a solution
    "tiny": ({"num_hidden_layers": 4}, {}, (168, 112), (570, 32, 64)),
    "small": ({"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
               "intermediate_size": 1280}, {"depth": 4, "hidden_size": 128}, (168, 112), (570, 32, 64)),
    "3b": ({**QWEN_TEXT, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "vocab_size": 151936,
            "num_key_value_heads": 2, "intermediate_size": 11008}, QWEN_VISION, (1008, 784), (1130, 128, 256)),
    "7b": ({**QWEN_TEXT, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "vocab_size": 152064,
            "num_key_value_heads": 4, "intermediate_size": 18944, "tie_word_embeddings": False},
           QWEN_VISION, (1008, 784), (1130, 128, 256))}


def bench(config: Config, args: argparse.Namespace):
    """Times training steps with rollouts of full length; a Proposer update counts with its share of the steps."""
    import platform
    import resource
    import transformers
    text, vision, image_size, lengths = SIZES[args.size]
    p, q, r = (given or usual for given, usual in
               zip((args.prompt_tokens, args.question_tokens, args.solution_tokens), lengths))
    config = dataclasses.replace(config, max_new_tokens_proposer=q, max_new_tokens_solver=r)
    device, n, b, steps = resolve_device(config.device), config.num_rollouts, config.images_per_rank, max(args.steps, 1)
    gpu, dtype = device.type == "cuda", choose_dtype(config, device)
    policy = Policy(config, build_backbone([], text=text, vision=vision, device=device, dtype=dtype))
    policy.stop_ids = set()  # nothing ends a rollout early
    learners = {role: Learner(policy, role) for role in ROLES}
    images = [Image.effect_noise(image_size, 100).convert("RGB") for _ in range(b)]
    weights = sum(w.numel() for w in [*policy.hf.model.language_model.layers.parameters(), policy.lm_head.weight])
    name = torch.cuda.get_device_name(device) if gpu else (
        f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads")
    print(f"{args.size}: {sum(w.numel() for w in policy.hf.parameters()) / 1e6:.1f} M parameters, {dtype}, {name}; "
          f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
          f"{b} image(s) x {n} rollouts a step; prompt {p} tokens, question {q}, solution {r}")

    bench_step(policy, learners, images, p, n, 0)  # warm-up: allocator, caches, compilation
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ours, naive = [], []
    for step in range(1, steps + 1):
        ours.append(bench_step(policy, learners, images, p, n, step))
        if args.compare == "naive":  # in turn, so that both meet the same machine
            naive.append(naive_step(policy, learners, images, p, n))
    phases = {name: statistics.median(t[name] for t in ours) for name in
              ("propose", "solve", "reference", "gradient", "optimizer", "other")}
    totals = [sum(t.values()) for t in ours]
    ratios = [x / y for x, y in zip(naive, totals)]
    seconds, sampling, scoring = (statistics.median(totals), phases["propose"] + phases["solve"],
                                  phases["reference"] + phases["gradient"])
    bandwidth, flops = machine_limits(device, dtype)
    decode = sum(tokens * max(weights * dtype.itemsize / bandwidth, 2 * weights * rows / flops)
                 for tokens, rows in ((q, b), (r, b * n)))
    scored = b * (p + n * r + (p + q) / config.proposer_every)  # tokens; the backward pass costs another forward's
    result = {
        "seconds_per_step": seconds, "phases": phases, "tokens_per_second": b * (q + n * r) / seconds,
        "images_per_hour": 3600 * b / seconds, "naive_seconds_per_step": statistics.median(naive) if naive else None,
        "ratio": statistics.median(ratios) if naive else None,
        "floor_seconds": decode + 2 * weights * (2 * b * p + 3 * scored) / flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if gpu else
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    for name, value in phases.items():
        print(f"{name:<10} {value:9.3f} s {value / seconds:5.0%}")
    print(f"{'step':<10} {seconds:9.3f} s   median of {steps}, {min(totals):.3f} to {max(totals):.3f}\n"
          f"{'floor':<10} {result['floor_seconds']:9.3f} s   at this machine's {bandwidth / 1e9:.1f} GB/s and "
          f"{flops / 1e12:.3f} TFLOP/s, measured now\n"
          f"sampling {b * (q + n * r) / sampling:.0f} tokens/s, its decoding floor is {decode / sampling:.0%} of its "
          f"time; scoring {scored / scoring:.0f} tokens/s; {result['images_per_hour']:.0f} images/hour; peak memory "
          f"{result['peak_memory_bytes'] / 2 ** 30:.2f} GiB")
    if naive:
        print(f"{'naive':<10} {result['naive_seconds_per_step']:9.3f} s   {result['ratio']:.2f} times ours, "
              f"{min(ratios):.2f} to {max(ratios):.2f}")
    if args.sweep:
        print(f"\nThe Solver's scoring, solutions of {r} tokens: its cost grows with P + N R, not with N (P + R)\n"
              "    N     P   P + N R  N (P + R)   seconds   us per token of P + N R")
        for n, p in itertools.product((2, 5, 16), (100, 600, 1200)):
            times = [bench_step(policy, learners, images, p, n, step) for step in range(steps)]
            share = (p + n * r) / (p + n * r + (p + q) / config.proposer_every)  # the rest is the Proposer's
            score = statistics.median(t["reference"] + t["gradient"] for t in times) / b * share
            print(f"{n:5d} {p:5d} {p + n * r:9d} {n * (p + r):10d} {score:9.3f} {1e6 * score / (p + n * r):12.0f}")
    write_output("--json", args.json, result)


def bench_prompt(policy: Policy, image: EncodedImage, tokens: int) -> Prompt:
    """A prompt of that many tokens, or of as few as the image and the chat template allow."""
    return Prompt(image, "x" * (tokens - len(policy.prompt_ids(Prompt(image, "")))))  # a token each


def bench_step(policy: Policy, learners: dict[str, Learner], images: list, prompt_tokens: int, n: int,
               step: int) -> Counter:
    """Seconds in each phase of a step like that of `train`."""
    config, clock = policy.config, policy.clock
    clock.lap()
    with clock.phase("propose"):
        prompts = [bench_prompt(policy, image, prompt_tokens) for image in policy.encode_images(images)]
        proposals = policy.sample("proposer", prompts, 1, config.max_new_tokens_proposer, 1.0, 2 * step)
    with clock.phase("solve"):
        rollouts = policy.sample("solver", prompts, n, config.max_new_tokens_solver, 1.0, 2 * step + 1)
    learners["solver"].update(prompts, rollouts, [[float(i % 2) for i in range(n)] for _ in prompts])
    seconds = Counter(clock.lap())
    learners["proposer"].update(prompts, proposals, [[float(i % 2)] for i in range(len(prompts))])
    return seconds + Counter({name: more / config.proposer_every for name, more in clock.lap().items()})


def naive_step(policy: Policy, learners: dict[str, Learner], images: list, prompt_tokens: int, n: int) -> float:
    """Seconds of the straightforward loop on the same work: every rollout is generated alone with its image, and scored
    by full forwards of its own, policy and reference, with the image encoded each time."""
    config, clock = policy.config, policy.clock
    # until the end of this step the layers are those of transformers and PEFT
    ours = {m: m.__dict__.pop("forward") for m in policy.hf.modules() if "forward" in m.__dict__}
    clock.lap()
    for image in images:
        head_ids, pixels = policy.preprocess(image)
        ids = policy.prompt_ids(bench_prompt(policy, EncodedImage(head_ids, {}, None), prompt_tokens))
        prompt = torch.tensor([ids], device=policy.device)                                                  # (1, P)
        inputs = lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels,
                              "mm_token_type_ids": (ids == policy.image_token_id).int()}
        for role, count, new in (("proposer", 1, config.max_new_tokens_proposer),
                                 ("solver", n, config.max_new_tokens_solver)):
            policy.peft.set_adapter(role)
            for i in range(count):
                with torch.no_grad():
                    ids = policy.hf.generate(**inputs(prompt), do_sample=True, top_k=0, max_new_tokens=new,
                                             eos_token_id=-1, suppress_tokens=[policy.image_token_id])
                with clock.phase(f"score {role}"):
                    with torch.no_grad(), policy.peft.disable_adapter():
                        ref_logits = policy.hf(**inputs(ids), logits_to_keep=new + 1).logits[0, :-1]
                    logits = policy.hf(**inputs(ids), logits_to_keep=new + 1).logits[0, :-1]
                    logp, kl = token_statistics(logits, ref_logits, ids[0, -new:], torch.nn.Identity())
                    (reinforce_loss([logp], [kl], [i % 2 - 0.5], 0.01) / count / len(images)).backward()
    for learner in learners.values():
        torch.nn.utils.clip_grad_norm_(learner.parameters, config.grad_clip)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
    seconds = clock.lap()
    for module, forward in ours.items():
        module.forward = forward
    policy.require_gradients()
    return sum(seconds.values()) - seconds["score proposer"] * (1 - 1 / config.proposer_every)


def machine_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes a second read from memory, floating-point operations a second of a matrix product), each the best of 5."""
    from torch.utils.benchmark import Timer
    scale = 0 if device.type == "cpu" else 2
    block = torch.ones(2 ** (25 + scale), device=device)
    square = torch.ones(2 ** (11 + scale), 2 ** (11 + scale), dtype=dtype, device=device)
    best = lambda work: min(Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(1).mean
                            for _ in range(5))
    return block.nbytes / best(block.sum), 2 * len(square) ** 3 / best(lambda: square @ square)


# ---- Command line ----------------------------------------------------------------------------------------------------

SOLVER_SETTINGS = ("model", "num_rollouts", "temperature", "max_new_tokens_solver", "max_pixels", "device", "dtype",
                   "seed")
BENCH_SETTINGS = ("num_rollouts", "images_per_rank", "device", "dtype", "score_tokens", "grad_checkpointing", "compile",
                  "lora_r")
ADAPTER = {"--adapter": dict(help="step_* folder of a run or PEFT adapter folder; default: the backbone")}
JSON = {"--json": dict(metavar="FILE", help="also write the result here, for machines")}
COMMANDS = {  # what it does, the settings that are its flags (None: all), its own arguments
    "train": ("self-evolution on a folder of unlabeled images (the default command)", None, {}),
    "demo": ("the dice world: build, mistrain and improve a tiny Qwen2.5-VL on a laptop; --presets compares", None, {
        "--world": dict(choices=list(WORLDS), default="standard",
                        help="standard; long: four dice, longer traces; dim: dice are misread; default standard"),
        "--presets": dict(help="compare these presets, separated by commas: writes a table"),
        "--seeds": dict(help="seeds to compare them on, separated by commas; default: that of --seed"), **JSON}),
    "ask": ("one image, one question: reasoning and answer", SOLVER_SETTINGS, {
        "image": dict(help="image file"), "question": dict(help="what to ask about it"), **ADAPTER}),
    "eval": ("accuracy on a JSONL file of image, question, answer", SOLVER_SETTINGS, {
        "file": dict(help="JSONL, each line with image (path relative to the file), question and answer (one or a list "
                          "of right ones)"),
        "--batch_size": dict(type=int, default=8, help="questions answered together; default 8"),
        "--relaxed": dict(action="store_true", help="numbers may be 5 %% off, as in ChartQA"),
        "--predictions": dict(metavar="FILE", default="predictions.jsonl",
                              help="every answer and text, a line a question; default predictions.jsonl"),
        **ADAPTER, **JSON}),
    "report": ("one HTML file with the curves and rollout groups of runs", (), {
        "runs": dict(nargs="+", help="run folders, also of runs that are still going"),
        "--out": dict(metavar="FILE", default="report.html", help="default report.html"),
        "--groups": dict(type=int, default=12, help="rollout groups shown of each run; default 12")}),
    "export": ("merges an adapter into its backbone: a checkpoint folder for transformers, lmms-eval, vLLM",
               ("model",), {
        "adapter": dict(help="step_* folder of a run or PEFT adapter folder"),
        "to": dict(help="folder to write, which must not exist")}),
    "bench": ("times a training step on random weights of Qwen2.5-VL's shapes, without a download", BENCH_SETTINGS, {
        "--size": dict(choices=list(SIZES), default="small", help="architecture; default small"),
        "--steps": dict(type=int, default=3, help="steps timed, after one to warm up; default 3"),
        "--compare": dict(choices=["naive"], help="also time, in turn, the straightforward loop"),
        "--sweep": dict(action="store_true", help="also show how scoring grows with N and the prompt"),
        **{f"--{name}_tokens": dict(type=int, help="default: by size") for name in ("prompt", "question", "solution")},
        **JSON}),
}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in our form."""

    def error(self, message):
        raise UserError(f"{message}. See --help.")


def parse_command_line(argv: list[str]) -> tuple[str, Config, argparse.Namespace]:
    """(command, settings, the command's own arguments). Raises UserError."""
    command, *rest = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command{did_you_mean(command, COMMANDS)} One of {', '.join(COMMANDS)}.")
    (purpose, shown, own), preset = COMMANDS[command], DEMO if command == "demo" else {}
    parser = Parser(prog=f"ireasoner.py {command}", allow_abbrev=False, description=f"{command}: {purpose}",
                    epilog="Commands: " + "; ".join(f"{name}: {text}" for name, (text, *_) in COMMANDS.items()))
    for name, options in own.items():
        parser.add_argument(name, **options)
    for name, f in SETTINGS.items():
        if name in shown if shown is not None else command == "train" or name not in ("model", "data"):
            within = f.metadata["within"]
            choices = f"; one of {', '.join(within)}" if isinstance(within, tuple) else f"; in {within}" * bool(within)
            text = f"{f.metadata['meaning']}{choices}; default {preset.get(name, f.default)!r}".replace("%", "%%")
            extra = {"resume": {"nargs": "?", "const": "auto"}, "data": {"nargs": "+"}}.get(name, {})
            parser.add_argument(f"--{name}", type=f.type, default=argparse.SUPPRESS, metavar=f.type.__name__.upper(),
                                help=text, **extra)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"{flag}: no such flag of {command}{did_you_mean(flag, known)} See --help.")
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if "data" in given:
        given["data"] = ",".join(given["data"])
    for flag in ("json", "predictions", "out"):  # known before the work is done
        if (file := getattr(args, flag, None)) and not Path(file).absolute().parent.is_dir():
            raise UserError(f"--{flag} {file}: its folder does not exist.")
    if getattr(args, "adapter", None):  # it knows its backbone
        given = {**read_adapter(args.adapter)[1], **given}
    args.given = {**preset, **given}
    return command, Config(**args.given), args

def write_output(flag: str, file: str | None, content: str | dict):
    """Writes what the user has asked for with a flag, if they have. Raises UserError."""
    if file and rank() == 0:
        with explained(f"{flag} {file}: cannot be written.", OSError):
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            Path(file).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if training had to stop, 2 after one line about bad input."""
    message, status = "", 0
    try:
        command, config, args = parse_command_line(sys.argv[1:] if argv is None else argv)
        quiet_libraries()
        match command:
            case "train": train(config)
            case "demo": (compare_presets if args.presets or args.seeds else demo)(config, args)
            case "ask": ask(config, args.image, args.question, args.adapter)
            case "eval": evaluate_file(config, args)
            case "report": report(args.runs, args.out, args.groups)
            case "export": export(args.adapter, args.to, config.model)
            case "bench": bench(config, args)
    except (UserError, TrainingStopped) as error:
        message, status = str(error), error.status
    except torch.OutOfMemoryError as error:
        message, status = (f"the GPU is out of memory ({str(error).splitlines()[0]}). Halve --score_tokens (now "
                           f"{config.score_tokens}), --images_per_rank ({config.images_per_rank}) or --max_pixels "
                           f"({config.max_pixels})."), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if message:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # other ranks mostly say the same; torchrun ends them as soon as the first has said it
        warn(f"ireasoner: {message}")
    if dist.is_initialized():  # at once: threads of gloo sometimes abort an interpreter that ends in the ordinary way
        sys.stdout.flush()
        os._exit(status)
    return status


def quiet_libraries():
    """Keeps progress bars and warnings of transformers out of the log, and lets any terminal print any model's text."""
    import transformers
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PyTorch and transformers about their next versions


if __name__ == "__main__":
    sys.exit(main())
