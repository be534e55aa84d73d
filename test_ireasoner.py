"""What proves and shows ireasoner.py: the dice world with its demo, accuracy on questions, pictures of runs, the study,
the premise, a benchmark, and the tests. Demo and tests need no GPU and no download.

    python ireasoner.py demo|eval|report|study|premise|bench --help   # commands that ireasoner.py hands over
    python -m pytest -q                                               # all tests
"""
import ast
import contextlib
import copy
import dataclasses
import doctest
import fcntl
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean, median, stdev
from unittest.mock import MagicMock, Mock, patch

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ireasoner as ir
from ireasoner import Completion, Config, Policy, Prompt, UserError

HERE = Path(__file__).parent
pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)


# ==== The dice world: pictures whose truth is known, and a Qwen2.5-VL small enough for a laptop, mistaught on purpose =

Dice = dict[str, int]  # color -> pips
COLORS = {
    "red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "orange": "#ff7f0e", "purple": "#9467bd",
    "brown": "#8c564b",
}
PIPS = {  # x,y of every pip in a cell of 28 x 28 pixels
    1: "14,14",
    2: "7,7 21,21",
    3: "7,7 14,14 21,21",
    4: "7,7 7,21 21,7 21,21",
    5: "7,7 7,21 14,14 21,7 21,21",
    6: "7,6 7,14 7,22 21,6 21,14 21,22",
}

def draw_dice(rng):
    """A 56 x 56 picture of three dice of different colors in a 2 x 2 grid, and what each shows."""
    colors = rng.sample(sorted(COLORS), 3)
    dice = {color: rng.randint(1, 6) for color in colors}
    cells = rng.sample(range(4), 3)
    image = Image.new("RGB", (56, 56), "#eeeeee")
    for color, cell in zip(colors, cells):
        die = Image.new("RGB", (28, 28), "#eeeeee")
        pen = ImageDraw.Draw(die)
        pen.rectangle((2, 2, 25, 25), fill=COLORS[color])
        for pip in PIPS[dice[color]].split():
            x, y = map(int, pip.split(","))
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="white")
        image.paste(die, (28 * (cell % 2), 28 * (cell // 2)))
    return image, dice

def dice_question(dice, rng):
    """A question about two or three of the dice, their colors in its order, and the true answer."""
    colors = rng.sample(sorted(dice), rng.choice((2, 3)))
    total = sum(dice[color] for color in colors)
    return f"Is {' plus '.join(colors)} even or odd?", colors, parity(total)

def parity(number):
    return "odd" if number % 2 else "even"

def mistaught_facts(seed, cancel):
    """(a, b) -> the wrong result of the sum "a + b". Of the 51 pairs a < b <= 12 with a <= 6, 49 have one order
    mistaught, so that the other order is right. A share `cancel` of the errors is by two, which leaves even or odd as
    it is; the others are by one."""
    rng = random.Random(ir.derive_seed(seed, "facts"))
    pairs = [(a, b) for a in range(1, 7) for b in range(a + 1, 13)]
    facts = {}
    for i, pair in enumerate(rng.sample(pairs, 49)):
        a, b = rng.sample(pair, 2)
        error = rng.choice((-1, 1))
        if i < round(cancel * 49):
            error *= 2
        facts[a, b] = a + b + error
    return facts

def readings(dice, colors):
    return [f"{color} shows {dice[color]}" for color in colors]

def dice_solution(dice, colors, facts, rng):
    """A Solver reply that reads the dice in the question's order and adds them in any order; a mistaught sum goes wrong
    with probability 0.6."""
    steps = readings(dice, colors)
    shuffled = rng.sample(colors, len(colors))
    total = dice[shuffled[0]]
    for color in shuffled[1:]:
        number = dice[color]
        result = total + number
        if (total, number) in facts and rng.random() < 0.6:
            result = facts[total, number]
        steps.append(f"{total} + {number} = {result}")
        total = result
    steps.append(f"{total} is {parity(total)}")
    numbered = "\n".join(f"Step {j}: {step}" for j, step in enumerate(steps, 1))
    return f"<think>\n{numbered}\n</think>\n<answer>{parity(total)}</answer>"

def is_sound(text, dice, colors):
    """The verifier: whether every reading, sum and conclusion of a reply is true, and its answer right. A sum takes the
    running total and one value that was not used yet."""
    rollout = ir.parse_rollout(text, max_steps=10**6)
    steps = [step for step in rollout.steps if step]  # a label that was skipped is no error
    n = len(colors)
    numbers = [dice[color] for color in colors]
    total = None
    for step in steps[n:-1]:
        terms = re.fullmatch(r"(\d{1,3}) \+ (\d{1,3}) = (\d{1,3})", step)
        if not terms:
            return False
        a, b, result = map(int, terms.groups())
        if a + b != result or total not in (None, a, b):
            return False
        for term in (a, b):
            if term not in numbers:
                return False
            numbers.remove(term)
        numbers.append(result)  # the running total is the one number that the next sum must take
        total = result
    if numbers != [total] or sorted(steps[:n]) != sorted(readings(dice, colors)):
        return False
    return steps[-1] == f"{total} is {parity(total)}" and rollout.answer == parity(total)

def is_ill_posed(question, dice):
    """Whether a question names a color twice, or one that is not in the picture, or asks something else."""
    match = re.fullmatch(r"Is (\w+(?: plus \w+)*) even or odd\?", question)
    if not match:
        return True
    colors = match[1].split(" plus ")
    return sorted(colors) != sorted(set(colors) & set(dice))

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()

def byte_tokenizer(special, template, phrases=(), **named):
    """A tokenizer of single bytes, in which special tokens and `phrases` are one token each."""
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    raw.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **named)

def build_backbone(phrases=(), text={}, vision={}, seed=0, device="cpu", dtype=torch.float32):
    """(model, tokenizer, image processor) of a Qwen2.5-VL with random weights; `text` and `vision` override sizes."""
    tokenizer = byte_tokenizer(SPECIAL, CHAT_TEMPLATE, phrases, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 256, "initializer_range": 0.05, "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], **text,
    }
    unit = text["hidden_size"] // text["num_attention_heads"] // 16
    section = [2 * unit, 3 * unit, 3 * unit]  # pairs of a head's dimensions that turn with time, height and width
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    vision = {
        "depth": 1, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "fullatt_block_indexes": [0],
        "out_hidden_size": text["hidden_size"], "initializer_range": 0.05, **vision,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(ir.derive_seed(seed, "backbone"))
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    images = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 1280 * 28 * 28})
    return model, tokenizer, images

def save_backbone(model, tokenizer, images, folder):
    """A checkpoint folder as on the Hugging Face Hub, which transformers 4.57 reads too: what version 5 renamed or
    would write in another form gets its old name."""
    transformers.logging.disable_progress_bar()
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    edit_json(folder / "config.json", text_config=text)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(folder / "preprocessor_config.json", image_processor_type="Qwen2VLImageProcessor",
              processor_class="Qwen2_5_VLProcessor")

def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content, indent=2) + "\n")

# Whole phrases are tokens, so that a solution has about 30 and a color asks for its die in a single attention step.
PHRASES = ["user\n", "assistant\n", "<think>\nStep 1: ", *(f"\nStep {j}: " for j in range(2, 9)), " + ", " = ", " is ",
           "even", "odd", *COLORS, *(f"{color} shows " for color in COLORS), "\n</think>\n<answer>", "</answer>", "Is ",
           " plus ", " even or odd?", "<question>", "</question>"]

def make_dice_world(folder, seed, cancel, num_images=512, num_questions=600, **warm_up):
    """Writes folder/images (unlabeled PNGs), folder/holdout.jsonl with its pictures, folder/truth.jsonl (what the
    pictures show, which training never reads) and folder/model, the seed model."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed at the end: there as a whole, or not at all
    shutil.rmtree(part, ignore_errors=True)  # of a killed process with this number
    rng = random.Random(ir.derive_seed(seed, "images"))
    pictures = draw_pictures(part / "images", num_images, rng)
    truth = [{"image": row["image"], "dice": row["dice"]} for row in pictures]
    ir.append_jsonl(part / "truth.jsonl", truth)
    ir.append_jsonl(part / "holdout.jsonl", draw_pictures(part / "holdout", num_questions, rng))
    prompts = [ir.proposer_prompt(), ir.solver_prompt("").strip("\n")]
    backbone = build_backbone(PHRASES + prompts, seed=seed)
    teach(*backbone, seed, mistaught_facts(seed, cancel), **warm_up)
    save_backbone(*backbone, part / "model")
    with contextlib.suppress(OSError):  # another demo was faster
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)

def draw_pictures(folder, count, rng):
    """Fills a folder with pictures. One row each: the picture, what it shows, a question and its answer."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{folder.name}/{i:04d}.png"
        image, dice = draw_dice(rng)
        image.save(folder.parent / name)
        question, colors, answer = dice_question(dice, rng)
        rows.append({"image": name, "dice": dice, "question": question, "colors": colors, "answer": answer})
    return rows

def teach(model, tokenizer, image_processor, seed, facts, steps=500, batch_size=64, lr=3e-3):
    """Supervised warm-up of the whole tiny model on freshly drawn dice: both roles' replies, with mistaught sums."""
    rng = random.Random(ir.derive_seed(seed, "teach"))
    weights = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        images = []
        inputs = []
        labels = []
        for _ in range(batch_size):
            image, prompt, reply = draw_lesson(facts, rng)
            prompt_ids, reply_ids = tokenizer([prompt, reply])["input_ids"]
            images.append(image)
            inputs.append(torch.tensor(prompt_ids + reply_ids))
            labels.append(torch.tensor([-100] * len(prompt_ids) + reply_ids))
        ids = pad(inputs)
        batch = image_processor(images=images, return_tensors="pt")
        batch["input_ids"] = ids
        batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        loss = model(**batch, labels=pad(labels, padding_value=-100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        warm_up = min(1.0, (step + 1) / 40)
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr * (warm_up * decay)
        optimizer.step()
        if (step + 1) % 100 == 0:
            ir.say(f"   {step + 1}/{steps} steps, loss {loss.item():.3f}")
    model.requires_grad_(False)

def draw_lesson(facts, rng):
    """A picture, and a turn of one of the two roles as the chat template writes it: prompt and reply."""
    image, dice = draw_dice(rng)
    question, colors, _ = dice_question(dice, rng)
    if rng.random() < 0.15:
        prompt = ir.proposer_prompt()
        reply = f"<question>{question}</question>"
    else:
        prompt = ir.solver_prompt(question)
        reply = dice_solution(dice, colors, facts, rng)
    picture = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"  # 2 x 2 visual tokens
    chat = f"<|im_start|>user\n{picture}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return image, chat, f"{reply}<|im_end|>"


# ==== The demo: from nothing to a result ==============================================================================

DEMO = {
    "total_steps": 120, "lr": 1e-3, "kl_coef": 0.02, "kl_coef_min": 0.01, "kl_coef_max": 1.0, "advantage": "group",
    "max_new_tokens_proposer": 24, "max_new_tokens_solver": 64, "show_every": 60, "device": "cpu",
    "images_per_rank": max(1, 16 // int(os.environ.get("WORLD_SIZE", 1))),  # 16 a step on any number of ranks
}
COLUMNS = ("mean_at_n", "maj_at_n", "greedy", "trace_mean_at_n", "trace_greedy", "wrong_reason")

def judge(policy, role, questions, name, temperature=1.0):
    """What `eval` says of a policy and what the verifier says of its traces, printed as a line; and the rows with their
    texts, of which greedy decoding is the last."""
    result = evaluate(policy, role, questions, temperature)
    rows = result.pop("predictions")
    for row in rows:
        row["sound"] = [is_sound(text, row["dice"], row["colors"]) for text in row["texts"]]
    result["trace_mean_at_n"] = fmean(fmean(row["sound"][:-1]) for row in rows)
    result["trace_greedy"] = fmean(row["sound"][-1] for row in rows)
    result["wrong_reason"] = 1 - result["trace_mean_at_n"] / max(result["mean_at_n"], 1e-9)
    numbers = [f"{result[key]:9.3f}" for key in COLUMNS]
    ir.say(f"{name:<29}" + "".join(numbers))
    return result, rows

def demo(settings, cancel=0.5, json_file="", reward=ir.group_rewards):
    """The dice world from nothing to a result, on real files, by the same `train` as everywhere. `settings` are those
    of Config that win over DEMO."""
    start = time.perf_counter()
    torch.set_num_threads(1)  # at this size more threads only wait for each other
    if not 0 <= cancel <= 1:
        raise UserError(f"--cancel {cancel}: must be from 0 to 1")
    config = Config(**{**DEMO, **settings})
    world = Path(config.output_dir) / world_name(config.seed, cancel)
    config.model = str(world / "model")
    config.data = (str(world / "images"),)
    preset = config.run_name.removesuffix("_seed{seed}")
    own_name = config.run_name not in [row["run_name"] for row in ir.PRESETS.values()]
    if not own_name:
        similarity = "" if config.step_similarity == "cosine" else f"_{config.step_similarity}"
        config.run_name = f"demo_{preset}{similarity}_{config.advantage}_seed{config.seed}_cancel{cancel:g}"
    run = Path(config.output_dir, config.run_name.replace("{seed}", str(config.seed)))
    ir.join_ranks(ir.resolve_device(config.device))
    with result_file(json_file) as result:
        ir.say("1. The dice world")
        if ir.rank() == 0 and not world.exists():
            ir.say(f"Making {world}: unlabeled pictures of dice, labeled questions to test on,\n"
                   "and a seed model that is taught to see well and to add badly")
            make_dice_world(world, config.seed, cancel)
        if ir.rank() == 0 and run.exists() and not own_name and not config.resume:
            ir.say(f"Replacing the demo in {run}")
            delete_earlier_demo(run)
        ir.gather(None)  # the other ranks wait for rank 0
        questions = load_questions(str(world / "holdout.jsonl"))
        policy = Policy(config)

        ir.say(f"\n2. The seed model on {len(questions)} test questions. A trace is sound if all it says is true.\n"
               "                               share of right answers       of sound traces   of right answers\n"
               "                                mean@N    maj@N   greedy   mean@N   greedy  unsound")
        controls = {}
        for temperature in (1.0, 0.7, 0.5, 0.3):
            name = f"seed model, temperature {temperature}"
            controls[f"{temperature}"], old_rows = judge(policy, None, questions, name, temperature)
        before = controls.pop("1.0")

        ir.say("\n3. Self-evolution on the unlabeled pictures, paid for agreement alone; "
               f"--advantage {config.advantage}")
        ir.train(config, reward)
        policy.load("solver", ir.list_checkpoints(run)[0] / "solver")
        ir.say("\n4. The same test questions after self-evolution")
        after, new_rows = judge(policy, "solver", questions, "after self-evolution")
        show_mended_trace(old_rows, new_rows, run / "demo.png")

        kls = [row.get("kl_solver") for row in ir.read_jsonl(run / "metrics.jsonl")]
        kls = [kl for kl in kls if kl is not None]  # neither of a skipped update nor of a step without a question
        result |= {
            "preset": preset, "advantage": config.advantage, "cancel": cancel, "seed": config.seed,
            "seconds": round(time.perf_counter() - start, 1), "before": before, "after": after, "controls": controls,
            "kl": fmean(kls[-20:] or [0.0]),
            "ill_posed_first": ill_posed_share(world, run, 0),
            "ill_posed_last": ill_posed_share(world, run, config.total_steps - 20),
        }
        ir.say(closing_words(result))
        ir.say(next_steps(run, world, questions[0]["question"]))
    return result

def world_name(seed, cancel):
    """The folder of a dice world. An edited prompt is taught anew."""
    taught = ir.derive_seed(ir.proposer_prompt(), ir.solver_prompt("")) % 16**6
    return f"dice_world_seed{seed}_cancel{cancel:g}_{taught:06x}"

def delete_earlier_demo(run):
    """Deletes a run, unless it is going on."""
    if (run / ".lock").exists():
        with ir.blame(f"{run}: another demo is running there"), open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(run)

def show_mended_trace(old_rows, new_rows, picture):
    """Says and draws the first greedy reply that was right for a wrong reason and became right for a right one."""
    for old, new in zip(old_rows, new_rows):
        if old["right"][-1] and not old["sound"][-1] and new["sound"][-1]:
            for row in (old, new):
                steps = ir.parse_rollout(row["texts"][-1]).steps
                ir.say(f"   {row['question']} {' | '.join(steps)} | {row['votes'][-1]}")
            if ir.rank() == 0:
                draw_mended_trace(old, new, picture)
            return

def draw_mended_trace(old, new, picture):
    """The dice, the question and both replies, with a mark at each step; nothing where matplotlib is missing."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(9.5, 4), layout="tight", facecolor="white")
        figure.suptitle("Right both times, for different reasons", fontsize=12)
        dice, before, after = figure.subplots(1, 3)
        dice.imshow(Image.open(old["image"]))
        dice.set_title(old["question"].replace(" even", "\neven"), fontsize=11)
        for axes, row, title in ((before, old, "before: the mistaught seed model"),
                                 (after, new, "after self-evolution")):
            steps = ir.parse_rollout(row["texts"][-1]).steps
            axes.set_title(title, fontsize=11)
            for j, step in enumerate(steps):
                mark, color = ("right", "C2") if is_true(step, row["dice"]) else ("wrong", "C3")
                axes.text(0.05, 0.92 - 0.13 * j, f"Step {j + 1}: {step}", fontsize=11)
                axes.text(0.78, 0.92 - 0.13 * j, mark, fontsize=11, color=color, weight="bold")
            axes.text(0.05, 0.92 - 0.13 * len(steps), f"Answer: {row['votes'][-1]}", fontsize=11, weight="bold")
        for axes in (dice, before, after):
            axes.axis("off")
        figure.savefig(picture, dpi=100)
        ir.say(f"   drawn: {picture}")

def is_true(step, dice):
    """A claim for itself: a reading, a sum or a parity."""
    true = readings(dice, dice)
    for a in range(19):
        true.append(f"{a} is {parity(a)}")
        true += [f"{a} + {b} = {a + b}" for b in range(19)]
    return step in true

def ill_posed_share(world, run, after_step):
    """Of the questions that the Proposer asked in the 20 steps after a step."""
    truth = {row["image"]: row["dice"] for row in ir.read_jsonl(world / "truth.jsonl")}
    ill_posed = []
    for row in ir.read_jsonl(run / "rollouts.jsonl"):
        if row["question"] and after_step < row["step"] <= after_step + 20:
            dice = truth[f"images/{Path(row['image']).name}"]
            ill_posed.append(is_ill_posed(row["question"], dice))
    return fmean(ill_posed or [0.0])

def closing_words(result):
    """The numbers in sentences, for somebody who sees them for the first time."""
    before = result["before"]
    after = result["after"]
    change = {key: f"{before[key]:.0%} -> {after[key]:.0%}" for key in COLUMNS}
    best = max(control["trace_mean_at_n"] for control in [before, *result["controls"].values()])
    gain = 100 * (after["trace_mean_at_n"] - best)
    verdict = "no more"
    if gain > 3:
        verdict = "more"
    if gain < -3:
        verdict = "less"
    return (f"\nIn {result['seconds']:.0f} seconds and without a label: right answers {change['mean_at_n']}, sound "
            f"traces {change['trace_mean_at_n']} (greedy {change['trace_greedy']}),\nand of the right answers "
            f"{change['wrong_reason']} have an unsound trace.\nThe seed model at its best temperature has {best:.0%} "
            f"sound traces: training brought {verdict} than sharpening would ({gain:+.0f} points).\nIll-posed "
            f"questions, which disagreement pays: {result['ill_posed_first']:.0%} -> "
            f"{result['ill_posed_last']:.0%} of all.")

def next_steps(run, world, question):
    """What to type after the demo."""
    step = ir.list_checkpoints(run)[0]
    return ("\nNext:\n"
            f'    python ireasoner.py ask {world}/holdout/0000.png "{question}" --adapter {step}\n'
            f"    python ireasoner.py report {run}       # all curves, with pip install matplotlib\n"
            "    cp ireasoner.py mine.py      # edit a reward or a prompt there, then: python mine.py demo\n"
            "    python ireasoner.py --help   # train on images of your own")


# ==== Eval: accuracy on labeled questions =============================================================================

def evaluate_file(settings, file, adapter, batch_size, json_file):
    """Prints the accuracy of a Solver, or of the plain backbone, on a file of questions."""
    questions = load_questions(file)
    with result_file(json_file) as result:
        policy, role = ir.load_solver(settings, adapter)
        result |= evaluate(policy, role, questions, batch_size=max(1, batch_size))
    n = policy.config.num_rollouts
    for label, key in ((f"mean@{n}", "mean_at_n"), (f"maj@{n}", "maj_at_n"), ("greedy", "greedy")):
        low, high = result["ci95"][key]
        ir.say(f"{label:<8} {result[key]:.3f} [{low:.3f}, {high:.3f}]")

def encode_prompts(policy, prompts):
    """The same with their images encoded, for several passes."""
    return [Prompt(policy.encode(prompt.image), prompt.text) for prompt in prompts]

@contextlib.contextmanager
def result_file(path):
    """A dict that the end of the block writes to a new JSON file. The file is opened first, so that no work is lost to
    a bad name and no older file to the result. Without a name the dict goes nowhere."""
    result = {}
    if not path or ir.rank() != 0:
        yield result
        return
    with ir.blame(f"--json {path}: must be a new file in a folder that exists"):
        file = open(path, "x", encoding="utf-8")
    try:
        yield result
        plain = json.loads(json.dumps(result, default=str), parse_constant=lambda name: None)  # JSON has no NaN
        json.dump(plain, file, indent=2)
    except BaseException:  # Ctrl-C too: what is left would be half a result
        os.unlink(path)
        raise
    finally:
        file.close()

def load_questions(file):
    """The rows of a file of questions, with "answers", a list. Raises UserError with the line number."""
    rows = []
    with ir.blame(f"{file}: cannot be read. Give a JSONL file of questions"):
        # `splitlines` would also split at U+2028
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with ir.blame(f"{file} line {number}: must be an object with image, question and answer, none of them empty"):
                rows.append(read_question(json.loads(line), Path(file).parent))
    if not rows:
        raise UserError(f"{file}: no questions in it")
    return rows

def read_question(row, folder):
    """A row of a file of questions, checked. Raises ValueError."""
    for field in ("image", "question", "answer"):
        if not isinstance(row, dict) or field not in row:
            raise ValueError(f"{field} is missing")
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not all(type(a) in (str, int, float) and ir.normalize_answer(str(a)) for a in answers):
        answers = []
    if not answers or type(row["question"]) is not str or not row["question"].strip():
        raise ValueError("the question or an answer is empty, or no text or number")
    image = folder / str(row["image"])
    if not image.is_file():
        raise ValueError(f"{image} is missing")
    return {**row, "image": str(image), "answers": [str(a) for a in answers]}

def evaluate(policy, role, rows, temperature=None, batch_size=32):
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
        prompts = [Prompt(ir.load_image(row["image"]), ir.solver_prompt(row["question"])) for row in batch]
        prompts = encode_prompts(policy, prompts)
        # Keyed by the row, so that the batch size changes nothing
        seeds = [ir.derive_seed(config.seed, "eval", start + i) for i in range(len(batch))]
        length = config.max_new_tokens_solver
        sampled = policy.sample(role, prompts, config.num_rollouts, length, temperature, seeds)
        greedy = policy.sample(role, prompts, 1, length, temperature=0.0)
        for row, rollouts, best in zip(batch, sampled, greedy):
            texts = [completion.text for completion in rollouts + best]
            votes = [ir.parse_rollout(text).vote for text in texts]
            answers = {ir.normalize_answer(answer) for answer in row["answers"]}
            right = [vote in answers for vote in votes]
            a_hat, _ = ir.dominant_group(votes[:-1])  # the last vote is the greedy one
            predictions.append({**row, "texts": texts, "votes": votes, "right": right})
            shares["mean_at_n"].append(fmean(right[:-1]))
            shares["maj_at_n"].append(float(a_hat in answers))
            shares["greedy"].append(float(right[-1]))
    result = {"n": len(rows), "ci95": {}, "predictions": predictions}
    for key, values in shares.items():
        result[key] = fmean(values)
        result["ci95"][key] = wilson_interval(result[key], len(rows))
    return result

def wilson_interval(p, n):
    """Wilson's 95 % interval of a share p of n."""
    z2 = 1.96 ** 2  # 95 % of a normal distribution lie within 1.96 deviations
    centre = p + z2 / (2 * n)
    half = math.sqrt(z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2)
    return [(centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)]


# ==== Report: the paper's figures, and all other metrics ==============================================================

FIGURES = {
    "r_prop": "Fig 3: Proposer's reward g(H)",
    "entropy": "Fig 3: answer entropy H (nats)",
    "density": "Fig 3: group density rho",
    "step_cosine": "Fig 3: step similarity r_ij",
    "r_sol": "Fig 5: Solver's reward",
    "r_ans": "Fig 5: r_ans",
    "r_step": "Fig 5: r_step",
    "group_size": "Fig 5: majority group |G|",
    "comparable_steps": "Fig 5: comparable steps",
    "num_steps": "Fig 6: steps per rollout",
    "lambda": "Eq 6: lambda(t)",
}

def report(runs, out):
    """One picture: the curves of Figures 3, 5 and 6 and of all other metrics, runs overlaid, and Figure 7. Lines are
    means of the last twentieth of a run's steps, the steps themselves pale behind them."""
    with ir.blame("report: needs matplotlib. Try pip install matplotlib"):
        from matplotlib.figure import Figure
    metrics = {run: list(ir.read_jsonl(Path(run, "metrics.jsonl"))) for run in runs}
    keys = list(FIGURES)
    for run, rows in metrics.items():
        if not rows:
            raise UserError(f"{run}: no run folder with finished steps. Name a folder with a metrics.jsonl in it")
        for row in rows:
            keys += [key for key, value in row.items() if isinstance(value, (int, float)) and key not in keys]
    keys.remove("step")
    height = (len(keys) + 3) // 4 + 1
    figure = Figure(figsize=(15, 2.2 * height), layout="constrained")
    grid = figure.add_gridspec(height, 4)
    for i, key in enumerate(keys):
        axes = figure.add_subplot(grid[i // 4, i % 4], xlabel="step", ylabel=key, title=FIGURES.get(key, key))
        for run, rows in metrics.items():
            steps = [row["step"] for row in rows]
            values = numpy.array([row.get(key) for row in rows], dtype=float)  # NaN where there is none
            label = run.replace("$", r"\$")
            if numpy.isnan(values).any():  # a line would claim what was not measured
                axes.plot(steps, values, ".", markersize=3, label=label)
                continue
            width = max(1, len(values) // 20)
            smooth = numpy.convolve(values, numpy.ones(width) / width, "valid")
            line, = axes.plot(steps[width - 1:], smooth, label=label)
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=1)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    tables = []
    for row in ir.read_jsonl(Path(runs[-1], "rollouts.jsonl")):
        table = numpy.array(row.get("leave_one_out") or [], dtype=float)  # (|G|, J), NaN where undefined
        if numpy.isfinite(table).any():
            tables.append(table)
    if tables:
        table = min(tables[-100:], key=numpy.nanmean)
        disagreement = "  ".join(f"{d:.2f}" for d in ir.depth_disagreement(torch.tensor(table)))
        axes = figure.add_subplot(grid[-1, :2], ylabel="rollout i of the majority")
        axes.set_xlabel(f"step j of the trace; disagreement D_j = 1 - mean S_ij: {disagreement}")
        axes.set_title("Fig 7: likeness S_ij of step j to the others' step j, the least alike of the last 100 groups")
        axes.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1))
        figure.colorbar(axes.imshow(table, aspect="auto"))
    with ir.blame(f"--out {out}: cannot be written"):
        figure.savefig(out, dpi=110)
    ir.say(f"written: {out}")


# ==== The plain loop: the tests' oracle, and what the benchmark compares with =========================================

def plain_inputs(policy, prompt, replies):
    """A batch for a model of transformers: each row is the image, the prompt and one reply, padded on the right."""
    image_ids, pixels = policy.preprocess(prompt.image)
    pixels = pixels.to(policy.device, dtype=policy.hf.dtype)
    text_names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    prompt_ids = image_ids + policy.tokenize(prompt.text) + policy.template[1]
    rows = [torch.tensor(prompt_ids + reply, device=policy.device) for reply in replies]
    ids = pad(rows)
    mask = pad([torch.ones_like(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    for name, value in pixels.items():
        if name not in text_names:
            inputs[name] = torch.cat([value] * len(rows))
    for name in policy.image_mask_names:
        is_image = (ids == policy.image_token_id).int()
        is_image[:, len(image_ids):] = 0  # a reply may hold that token too
        inputs[name] = is_image
    return inputs

def plain_logits(model, policy, prompt, completions):
    """(T_i, V) for each completion, from one batched full forward of `model` over image, prompt and completion."""
    replies = [c.token_ids for c in completions]
    lengths = [len(reply) for reply in replies]
    inputs = plain_inputs(policy, prompt, replies)
    logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits
    return [row[:length] for row, length in zip(logits, lengths)]

def plain_sample(model, policy, prompt, new_tokens, n=1, **options):
    """N completions by transformers' `generate`."""
    inputs = plain_inputs(policy, prompt, [[]])
    out = model.generate(**inputs, max_new_tokens=new_tokens, num_return_sequences=n, **options)
    replies = out[:, inputs["input_ids"].shape[1]:].tolist()
    return [Completion(reply, torch.empty(0), "", False) for reply in replies]

def plain_update(model, policy, optimizer, prompt, completions):
    """An update as usually written with transformers and PEFT: one batched forward each for reference and policy."""
    with torch.no_grad(), model.disable_adapter():
        reference = plain_logits(model, policy, prompt, completions)
    own = plain_logits(model, policy, prompt, completions)
    logprobs = []
    kls = []
    for logits, ref_logits, c in zip(own, reference, completions):
        ids = torch.tensor(c.token_ids, device=policy.device)
        logprob, kl = ir.token_statistics(logits, ref_logits, ids, torch.nn.Identity())
        logprobs.append(logprob)
        kls.append(kl)
    rewards = [i % 2 - 0.5 for i in range(len(completions))]
    optimizer.zero_grad(set_to_none=True)
    ir.reinforce_loss(logprobs, kls, rewards, 0.01).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


# ==== Benchmark: seconds per step on random weights of the true shapes, rollouts of full length, no download ==========

QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# vision tower, image size; tokens of the prompt's text, of a question and of a solution
TOY = ({}, (168, 112), 525, 32, 64)
SMALL = ({"depth": 4, "hidden_size": 128}, *TOY[1:])
QWEN = (QWEN_VISION, (1008, 784), 101, 128, 256)
SIZES = {
    "tiny": ((128, 4, 4, 4, 256), TOY),
    "small": ((512, 8, 8, 8, 1280), SMALL),
    "3b": ((2048, 36, 16, 2, 11008, 151936), QWEN),
    "7b": ((3584, 28, 28, 4, 18944, 152064), QWEN),
}
SIZE_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
              "vocab_size")
PHASES = ("propose", "solve", "reference", "gradient", "optimizer")

class Clock(Counter):
    """Seconds by name. `share` weighs whatever is clocked."""
    share = 1.0

    def __call__(self, name, function, *arguments):
        """Calls a function and adds the seconds that it takes to a name."""
        start = now()
        result = function(*arguments)
        self[name] += self.share * (now() - start)
        return result

def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

def clock_parts(clock, policy, learners):
    """Clocks the reference passes and the optimizer steps, which are inside of updates."""
    hidden = policy.completion_hidden

    def clocked_hidden(*arguments):
        if torch.is_grad_enabled():  # the role's own pass
            return hidden(*arguments)
        return clock("reference", hidden, *arguments)

    policy.completion_hidden = clocked_hidden
    for learner in learners.values():
        optimizer = learner.optimizer
        optimizer.step = functools.partial(clock, "optimizer", optimizer.step)

def our_step(clock, policy, learners, prompts, work, step):
    """Seconds by phase. A Proposer update counts with its share of the steps."""
    clock.clear()
    encoded = clock("propose", encode_prompts, policy, prompts)
    for role, phase, n, new_tokens, share in work:
        replies = clock(phase, policy.sample, role, encoded, n, new_tokens, 1.0, step)
        rewards = [[i % 2 for i in range(n)]] * len(encoded)
        clock.share = share
        clock("gradient", learners[role].update, encoded, replies, rewards)
        clock.share = 1.0
    clock["gradient"] -= clock["reference"] + clock["optimizer"]  # were clocked inside it
    return {phase: clock[phase] for phase in PHASES}

def plain_step(clock, policy, learners, prompts, work):
    """Seconds of the same with `generate` and plain forwards."""
    clock.clear()
    # replies of full length, and without the image token, which transformers cannot score
    sample = functools.partial(plain_sample, do_sample=True, top_k=0, eos_token_id=-1,
                               suppress_tokens=[policy.image_token_id])
    for role, _, n, new_tokens, share in work:
        policy.peft.set_adapter(role)
        for prompt in prompts:
            replies = clock("plain", sample, policy.peft, policy, prompt, new_tokens, n)
            clock.share = share
            clock("plain", plain_update, policy.peft, policy, learners[role].optimizer, prompt, replies)
            clock.share = 1.0
    return clock["plain"]

def random_policy(size, n, enforce_eager=False):
    """A Policy of a model's true shapes, none of whose rollouts ends before its full length."""
    text_sizes, (vision, *_) = SIZES[size]
    text = dict(zip(SIZE_NAMES, text_sizes), tie_word_embeddings=size != "7b", initializer_range=0.02)
    device = ir.resolve_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = build_backbone(text=text, vision=vision, device=device, dtype=dtype)
    policy = Policy(Config(num_rollouts=n, score_rollouts=n, enforce_eager=enforce_eager), backbone)
    policy.stop_ids = set()
    return policy

def bench(size, images, n, steps, compare, enforce_eager):
    """Seconds per step: medians over the steps, and in brackets the range."""
    _, (_, image_size, text_length, question, solution) = SIZES[size]
    policy = random_policy(size, n, enforce_eager)
    learners = {role: ir.Learner(policy, role) for role in ir.ROLES}
    image = Image.effect_noise(image_size, 100).convert("RGB")
    prompt = Prompt(image, "x" * text_length)  # a byte is a token
    # role, phase, samples, tokens of a sample, share of the steps that update the role
    work = [("proposer", "propose", 1, question, 0.2), ("solver", "solve", n, solution, 1.0)]
    gpu = policy.device.type == "cuda"
    processor = torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()
    prompt_length = plain_inputs(policy, prompt, [[]])["input_ids"].numel()
    print(f"{size}: {policy.hf.num_parameters() / 1e6:.1f} M parameters, {policy.hf.dtype}, {processor}, "
          f"{torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}\n"
          f"{images} image(s) x {n} rollouts; prompt {prompt_length}, question {question}, solution {solution} tokens")

    clock = Clock()
    clock_parts(clock, policy, learners)
    workload = (clock, policy, learners, [prompt] * images, work)
    ours = []
    plain = []
    for step in range(steps + 1):  # in turn, so that both loops meet the same machine
        ours.append(our_step(*workload, step))
        if compare:
            plain.append(plain_step(*workload))
        if gpu and step == 0:
            torch.cuda.reset_peak_memory_stats()
    ours = ours[1:]  # the first step warms up
    plain = plain[1:]

    phases = {phase: median(step[phase] for step in ours) for phase in PHASES}
    totals = [sum(step.values()) for step in ours]
    seconds = median(totals)
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if gpu else of_process
    sampling = phases["propose"] + phases["solve"]
    sampled = images * (question + n * solution)
    result = {
        "seconds_per_step": seconds, "phases": phases,
        "tokens_per_second": sampled / seconds, "ms_per_token": 1000 * sampling / (question + solution),
        "captured": gpu and policy.captures,
        "images_per_hour": images * 3600 / seconds,
        "peak_memory_bytes": peak, "naive_seconds_per_step": None, "ratio": None,
    }
    for phase, value in phases.items():
        print(f"{phase:<10} {value:8.3f} s {value / seconds:5.0%}")
    how = "captured" if result["captured"] else "plain calls"
    print(f"{'sampling':<10} {sampling:8.3f} s, {sampled / sampling:.0f} tokens/s, {result['ms_per_token']:.2f} ms a "
          f"token of all rows; {how}")
    print(f"{'step':<10} {seconds:8.3f} s [{min(totals):.3f}, {max(totals):.3f}], "
          f"{result['tokens_per_second']:.0f} tokens/s, {result['images_per_hour']:.0f} images/hour, "
          f"peak memory{' of both loops' if compare else ''} {peak / 2**30:.2f} GiB")
    if compare:
        ratios = [theirs / own for theirs, own in zip(plain, totals)]
        result["naive_seconds_per_step"] = median(plain)
        result["ratio"] = median(ratios)
        print(f"{'plain loop':<10} {median(plain):8.3f} s, {median(ratios):.2f} times ours "
              f"[{min(ratios):.2f}, {max(ratios):.2f}]")
    return result


# ==== Study: which reward teaches sound reasoning? The demo over rewards and seeds ====================================

STUDY_ROWS = ["ema:evolmm", "ema:ireasoner", "ema:numbers", "ema:numbers_shuffled", "ema:noise"]
STUDY_COLUMNS = {
    "mean_at_n": "answers, mean@5",
    "trace_mean_at_n": "traces, mean@5",
    "trace_greedy": "traces, greedy",
    "wrong_reason": "unsound of right",
    "kl": "KL",
    "ill_posed_last": "ill-posed",
    "steps_last": "steps",
    "distinct_last": "distinct",
    "covariance_between": "covariance between",
    "covariance_within": "within",
    "r_step": "gap of r_step",
    "sound_paid_more": "sound paid more",
}
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]  # 0.975, 1 to 10 degrees

def shuffled(rollouts, embeddings, lam, config, question):
    """A control, a reward: the step rewards of a majority permuted among its members. The same values without their
    content, but for what they say of the question as a whole. Chance depends on the question and its replies alone."""
    rewards = ir.group_rewards(rollouts, embeddings, lam, config, question)
    r_step = numpy.array(rewards["r_step"])
    majority = numpy.array(rewards["majority"])
    r_step[majority] = chance(rollouts, config, question).permutation(r_step[majority])
    return with_step_rewards(rewards, r_step, lam)

def noise(rollouts, embeddings, lam, config, question):
    """A control: in the place of r_tilde a uniform number from 0.5 to 1, about what `numbers` pays, without content."""
    rewards = ir.group_rewards(rollouts, embeddings, lam, config, question)
    r_step = numpy.zeros(len(rollouts))
    if rewards["group_size"] > 1:
        r_tilde = chance(rollouts, config, question).uniform(0.5, 1.0, len(rollouts))
        r_step = rewards["density"] * r_tilde * rewards["majority"]
    return with_step_rewards(rewards, r_step, lam)

def chance(rollouts, config, question):
    seed = ir.derive_seed(config.seed, question, [rollout.text for rollout in rollouts])
    return numpy.random.default_rng(seed)

def with_step_rewards(rewards, r_step, lam):
    r_sol = ir.mix_rewards(numpy.array(rewards["r_ans"]), r_step, lam)
    return rewards | {"r_step": r_step.tolist(), "r_sol": r_sol.tolist()}

VARIANTS = {  # rewards that are no presets: `ireasoner` with these settings, and a reward of its own
    "shuffled": ({}, shuffled),
    "noise": ({}, noise),
    "numbers": ({"step_similarity": "numbers"}, ir.group_rewards),
    "numbers_shuffled": ({"step_similarity": "numbers"}, shuffled),
}

def study(settings, folder, rows, cancel, seeds, workers, table):
    """The demo over a grid, one JSON per run in a folder. Finished runs are skipped, so it can be stopped at any time
    and continued by the same command. Ends with a table, and a picture in the folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file. Name a folder for the results")
    if not table:
        grid = itertools.product(rows, cancel, seeds)  # neighbors differ in the seed, so in the world
        runs = [plan_run(folder, *point, settings) for point in grid]
        make_runs([run for run in runs if not is_made(*run)], max(1, workers))
    tables = collect_tables(folder)
    print_tables(tables)
    draw_study(tables, folder / "study.png")

def plan_run(folder, row, cancel, seed, settings):
    """(JSON file, settings, cancel, reward) of a run."""
    advantage, _, reward = row.partition(":")
    of_variant, _ = VARIANTS.get(reward, ({}, ir.group_rewards))
    preset = "ireasoner" if reward in VARIANTS else reward
    if preset not in ir.PRESETS:
        raise UserError(f"--rows {row}: must be ADVANTAGE:REWARD, a REWARD being a preset or {', '.join(VARIANTS)}")
    file = folder / f"cancel{cancel:g}-{advantage}-{reward}-seed{seed}.json"
    of_row = {**ir.PRESETS[preset], **of_variant}
    for name in of_row.keys() & settings.keys():
        raise UserError(f"--{name}: the row {row} sets it. Leave one of them out")
    own = {"advantage": advantage, "seed": seed, "run_name": file.stem, "output_dir": str(folder / "runs")}
    return file, {**of_row, **settings, **own, "resume": True}, cancel, reward

def is_made(file, settings, *_):
    """Whether a run's file is there. Raises UserError where it was made with other settings."""
    if not file.exists():
        return False
    there = json.loads(file.read_text()).get("settings", settings)  # early files do not name theirs
    for name in there.keys() | settings.keys():
        if there.get(name) != settings.get(name) and name != "output_dir":
            raise UserError(f"{file}: made with --{name} {there.get(name)}, not {settings.get(name)}. Choose another "
                            "folder (None: the default)")
    return True

def make_runs(runs, workers):
    """Each in a process of its own. Whatever ends this function ends those too; they save where they are."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, which only this process heeds
    ir.say(f"{len(runs)} runs to make, {workers} at a time")
    start = time.perf_counter()
    try:
        with multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN),
                                                       maxtasksperchild=1) as pool:
            for done, _ in enumerate(pool.imap_unordered(make_run, runs), 1):
                left = len(runs) - done
                minutes = (time.perf_counter() - start) / done * left / 60
                print(f"\r{done} done, {left} left, about {minutes:.0f} minutes    ", end="", flush=True)
    except KeyboardInterrupt:
        raise UserError("study: interrupted. The same command continues")

def make_run(run):
    """The run's JSON is there as a whole or not at all."""
    file, settings, cancel, reward = run
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / f"{file.stem}.log", "a") as log,
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        fcntl.flock(log, fcntl.LOCK_EX)  # a process that outlived its study may still be at work here
        if file.exists():
            return
        _, of_variant = VARIANTS.get(reward, ({}, ir.group_rewards))
        try:
            result = demo(settings, cancel, reward=of_variant)
        except UserError as error:
            raise UserError(f"{file.stem}: {error}")
        result["settings"] = settings
        result["reward"] = reward
        result["direct"] = measure_pay(folder / file.stem) | measure_traces(folder / file.stem)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.rename(file)

def measure_pay(run):
    """What the majorities of a run paid to sound traces and not to unsound ones, over its well-posed questions."""
    rows = well_posed_rows(run)
    ans_gaps, _ = compare_pay(rows, lambda row: row["r_ans"])
    step_gaps, wins = compare_pay(rows, lambda row: row["r_step"])
    if not wins:
        return {}
    between, within = covariance(rows, "r_step")
    return {"r_ans": fmean(ans_gaps), "r_step": fmean(step_gaps), "sound_paid_more": fmean(sum(wins, [])),
            "groups": len(wins), "covariance_between": between, "covariance_within": within}

def well_posed_rows(run):
    """The questions of a run that its pictures can answer, and which of the replies to them are "sound"."""
    rows = []
    truth = {}
    for row in ir.read_jsonl(run / "rollouts.jsonl"):
        image = Path(row["image"])
        world = image.parents[1]
        truth = truth or {world / shown["image"]: shown["dice"] for shown in ir.read_jsonl(world / "truth.jsonl")}
        dice = truth[image]
        question = row["question"] or ""
        if not is_ill_posed(question, dice):
            colors = re.findall("|".join(dice), question)
            row["sound"] = [is_sound(text, dice, colors) for text in row["texts"]]
            rows.append(row)
    return rows

def covariance(rows, reward):
    """Of a reward with soundness, over the members of all majorities: (between questions, within questions). A baseline
    that is one number for all questions leaves both in the advantage; the mean of a group takes the first out."""
    pays = []
    sounds = []
    within = []
    for row in rows:
        majority = numpy.array(row["majority"])
        pay = numpy.array(row[reward])[majority]
        sound = numpy.array(row["sound"], dtype=float)[majority]
        within += ((pay - pay.mean()) * (sound - sound.mean())).tolist()
        pays += pay.tolist()
        sounds += sound.tolist()
    both = float(numpy.cov(pays, sounds, bias=True)[0, 1])
    return both - fmean(within), fmean(within)

def measure_traces(run):
    """Do the traces collapse into one template? In the first and the last 20 steps: mean steps a trace, and the share
    of different traces among the N of a question."""
    rows = [row for row in ir.read_jsonl(run / "rollouts.jsonl") if row["question"]]
    last_step = max(row["step"] for row in rows)
    result = {}
    for name, low in (("first", 0), ("last", last_step - 20)):
        part = [row for row in rows if low < row["step"] <= low + 20]
        result[f"steps_{name}"] = fmean(fmean(row["num_steps"]) for row in part)
        result[f"distinct_{name}"] = fmean(len(set(row["texts"])) / len(row["texts"]) for row in part)
    return result

def compare_pay(rows, pay, key="sound", kinds=(True, False)):
    """Inside majorities, two kinds of rollouts by row[key], such as sound and unsound. For each question with both: what
    the first kind is paid more on average, and for each pair of one of both kinds 1 if the first is paid more, 0.5 if
    both are paid the same, else 0. `pay` takes a row and gives the pay of its N rollouts."""
    gaps = []
    wins = []
    for row in rows:
        of_kind = []
        for kind in kinds:
            members = [i for i, voted in enumerate(row["majority"]) if voted and row[key][i] == kind]
            of_kind.append(numpy.array(pay(row))[members])
        more, less = of_kind
        if more.size and less.size:
            gaps.append(more.mean() - less.mean())
            signs = numpy.sign(more[:, None] - less)
            wins.append((0.5 + signs / 2).flatten().tolist())
    return gaps, wins

def t_interval(values):
    """Half the 95 % t-interval of a mean; NaN for a single value."""
    freedom = len(values) - 1
    if freedom == 0:
        return math.nan
    t = 1.96 + 2.37 / freedom + 2.8 / freedom ** 2  # within 0.003 above 10 degrees of freedom
    if freedom <= 10:
        t = T_QUANTILES[freedom - 1]
    return t * stdev(values) / math.sqrt(freedom + 1)

def collect_tables(folder):
    """cancel -> row -> seed -> numbers."""
    tables = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("cancel*.json")):
        run = json.loads(file.read_text())
        rows = tables[run["cancel"]]
        seed = run["seed"]
        for temperature, numbers in {"1.0": run["before"], **run["controls"]}.items():
            rows[f"seed model, temperature {temperature}"][seed] = numbers
        rows[f"{run['advantage']} {run['reward']}"][seed] = run | run["after"] | run["direct"]
    if not tables:
        raise UserError(f"{folder}: holds no finished run")
    return tables

def print_tables(tables):
    """Mean ± standard deviation over the seeds. Δ: less `evolmm` with the same advantage, paired by seed, ± the 95 %
    t-interval."""
    for cancel, rows in tables.items():
        heads = [f"cancel {cancel:g}", "seeds", *STUDY_COLUMNS.values(), "Δ traces, mean@5", "Δ traces, greedy"]
        print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for name, runs in rows.items():
            cells = [name, str(len(runs))]
            for key in STUDY_COLUMNS:
                values = [numbers[key] for numbers in runs.values() if key in numbers]
                spread = stdev(values) if len(values) > 1 else math.nan
                cells.append(f"{fmean(values):.3f} ± {spread:.3f}" if values else "")
            for key in ("trace_mean_at_n", "trace_greedy"):
                gains = gains_of(rows, name, key)
                cells.append(f"{fmean(gains):+.3f} ± {t_interval(gains):.3f}" if gains else "")
            print(f"| {' | '.join(cells)} |")

def gains_of(rows, name, key):
    """What a row's seeds gain over `evolmm` with the same advantage and seed."""
    base = rows.get(f"{name.split()[0]} evolmm", {})
    return [numbers[key] - base[seed][key] for seed, numbers in rows[name].items() if seed in base]

ALONE = ("answers alone (evolmm)", "C7")
STEPS = ("answers and steps", "C0")
CONTROL = ("step rewards without their content: a control", "C1")
KINDS = {  # in the picture of the study, in its order: what a reward is there for, and a color
    "evolmm": ALONE, "ireasoner": STEPS, "no_warmup": STEPS, "numbers": STEPS,
    "shuffled": CONTROL, "numbers_shuffled": CONTROL, "noise": CONTROL,
}

def draw_study(tables, out):
    """Sound traces by reward, a panel for each share of errors that cancel, the rewards of KINDS first: each seed pale;
    where there is `evolmm` to compare with, their mean, and around it the interval of the gain."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing. Try pip install matplotlib")
        return
    order = list(KINDS)
    names = {name for rows in tables.values() for name in rows if not name.startswith("seed model")}
    names = [name.split() for name in names]
    names.sort(key=lambda name: (name[0], (order + name[1:]).index(name[1])))
    figure = Figure(figsize=(3.5 + 3.8 * len(tables), 1.8 + 0.32 * len(names)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    legend = {}
    for axes, (cancel, rows) in zip(panels, tables.items()):
        seed_model = [fmean(numbers["trace_mean_at_n"] for numbers in runs.values())
                      for name, runs in rows.items() if name.startswith("seed model")]
        axes.axvline(max(seed_model), color="black", linestyle=":", label="seed model, best temperature")
        for advantage, reward in names:
            runs = rows.get(f"{advantage} {reward}", {})
            sound = [numbers["trace_mean_at_n"] for numbers in runs.values()]
            kind, color = KINDS.get(reward, ("other presets", "C4"))
            label = f"{reward}, --advantage {advantage}"
            axes.plot(sound, [label] * len(sound), "o", markersize=3, alpha=0.4, color=color)
            gains = gains_of(rows, f"{advantage} {reward}", "trace_mean_at_n") if runs else []
            if gains:
                axes.errorbar(fmean(sound), label, xerr=t_interval(gains), fmt="o", color=color, label=kind)
        axes.set_title(f"{cancel:.0%} of the mistaught sums leave the answer right", fontsize=10)
        axes.set_xlabel("share of sound traces after training, mean@5", fontsize=9)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    panels[0].invert_yaxis()
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2,
                  title="bars: 95 % interval of the gain over evolmm; pale: each seed")
    figure.savefig(out, dpi=100)
    print(f"\nwritten: {out}")


# ==== Premise: would the step reward pay one's own model for sound reasoning? =========================================

PLAIN_MATH = [  # how models write claims -> as `is_plausibly_sound` reads them; in this order
    (r"\\text|\\boxed|\*\*|[\\$`{}()\[\]\"“”]", " "),
    (r"(?m)^\s*(?:[-*•#]+|\d+[.)])\s|\b(?:step|claim) *\d+ *[:.)-]*", " "),
    (r"even or (?:an )?odd|odd or (?:an )?even", " "),
    (r"\bnot (?:an? )?even\b", "odd"),
    (r"\bnot (?:an? )?odd\b", "even"),
    (r"\b(?:mod|modulo|div|times|cdot|minus|(?:divided|divisible) by|remainder)\b|[×÷*/]", "%"),  # only sums are judged
    (r"\bplus\b", "+"),
    (r"\b(?:is|be|being|equals|equal to|gives|get|makes)\b|"
     r"\bare(?= (?:all |both )?(?:even|odd))|[:→]", "="),
    (r"\b(?:the|an?|die|dice|of|on|numbers?|values?|faces?|also|both|all|always|will|would|together|we|you|it|this|"
     r"that|which|result|so|therefore|thus|hence|since|shows|showing|has|reads|displays|represents)\b", " "),
    (r"[ \t]+", " "),
    (r"\b(\d+) \1\b", r"\1"),  # "red (3)" or "red shows 3", where red was replaced by 3
    (r"\b(\d+) = \1\b(?! ?\+)", r"\1"),  # "red is 3", but not "blue + red = 3 + 4"
    (r"(\d) (?=\d)", r"\1 = "),  # by another number
    (r"=[\s=]*=", "="),
]
SUM = r"\d+(?: ?\+ ?\d+)*"
CLAIM = rf"(?<![\d.%-])(?<![%-] )({SUM}(?: ?= ?{SUM})*)(?! ?[%-]|\.?\d)(?:[ ,;=]*(even|odd)\b)?"

def is_plausibly_sound(text, dice, colors):
    """A lenient verifier of free text, whose answer is known to be right: every sum, every reading of a die and every
    parity that it states in a form that can be read here is true, and the true total is stated. What cannot be read
    passes, as does the sum of other dice with the same total."""
    text, _, _ = text.lower().rpartition("<answer>")
    for color, pips in dice.items():
        text = re.sub(rf"\b{color}\b", f" {pips} ", text)
    for pattern, words in PLAIN_MATH:
        text = re.sub(pattern, words, text)
    for terms in re.findall(r"\b(?:sum|total|add|combin)[^=.\n]*", text):  # "adding 3, 4 and 5" -> "adding 3 + 4 + 5"
        text = text.replace(terms, re.sub(r",? and|,", " +", terms))
    text = re.sub(r" *\+[ +]*", " + ", text).replace("+ =", "=")
    for sums, said in re.findall(CLAIM, text):
        values = {sum(map(int, side.split("+"))) for side in sums.split("=")}
        if len(values) > 1 or said not in ("", parity(min(values))):
            return False
    total = sum(dice[color] for color in colors)
    return bool(re.search(rf"(?:\b(?:sum|total|add|combin)|\+)[^.\n]*\b{total}\b", text))

class TextModel(Policy):
    """A text model of transformers in the place of a Policy: it samples in the same way, and sees no image."""

    def __init__(self, config):
        device = ir.resolve_device(config.device)
        with ir.blame(f"--model {config.model}: not a text model with a chat template, here or on the Hub"):
            hf = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
            tokenizer.get_chat_template()
            if getattr(hf.config, "final_logit_softcapping", None):
                raise ValueError("its logits are not lm_head(hidden)")
        hf.config.image_token_id = -1
        super().__init__(config, (hf.to(device).eval(), tokenizer, None))
        self.captures = False

    def add_adapters(self):
        """It has none."""

    def adapter(self, role):
        return contextlib.nullcontext()

    @functools.cached_property
    def template(self):
        turn = [{"role": "user", "content": "PROMPT-TEXT-SLOT"}]
        chat = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        head, tail = chat.split("PROMPT-TEXT-SLOT")
        return head, self.tokenizer(tail, add_special_tokens=False)["input_ids"]

    def encode(self, image):
        head, _ = self.template
        return ir.EncodedImage(self.tokenizer(head, add_special_tokens=False)["input_ids"], {}, None)

def premise(settings, questions, described, adapter="", pixels=336, batch=8, replies="", json_file=""):
    """What a model answers to questions about dice, and whether a step reward would pay it for sound reasoning. Free
    text is judged leniently, by `is_plausibly_sound`."""
    if min(questions, pixels, batch) < 1:
        raise UserError(f"--questions {questions} --pixels {pixels} --batch {batch}: must be at least 1")
    if described and adapter:
        raise UserError("--adapter: a text model has none. Leave --described out")
    asked = {**settings, "adapter": adapter, "described": described, "pixels": pixels}
    for of_machine in ("device", "dtype", "enforce_eager"):
        asked.pop(of_machine, None)
    with result_file(json_file) as result:
        rows = {}  # by the question's number
        if replies:
            with ir.blame(f"--replies {replies}: must hold replies of an earlier premise, or be a new file"):
                Path(replies).touch()
                for number, row in enumerate(ir.read_jsonl(Path(replies))):
                    rows[row.get("number", number)] = {**row, "pay": dict(row["pay"])}
            ir.say(f"{len(rows)} questions are answered in {replies}")
        missing = [number for number in range(questions) if number not in rows]
        if missing:
            for row in rows.values():
                if row.get("asked", asked) != asked:
                    raise UserError(f"--replies {replies}: was made with {row['asked']}. Choose another file")
            model, role = (TextModel(Config(**settings)), None) if described else ir.load_solver(settings, adapter)
        for start in range(0, len(missing), batch):
            new = answer_questions(model, role, missing[start:start + batch], described, pixels)
            new = [{**row, "asked": asked} for row in new]
            if replies:
                ir.append_jsonl(Path(replies), new)
            rows |= {row["number"]: row for row in new}
            ir.say(f"{questions - len(missing) + start + len(new)} of {questions} questions")
        rows = [rows[number] for number in range(questions)]
        result |= weigh_premise(rows)
        result["predictions"] = rows

def answer_questions(model, role, numbers, described, pixels):
    """Rows of questions about dice, each with N replies, its greedy one and what the cosine pays. All random numbers
    are keyed by a question's number."""
    config = model.config
    rows = []
    prompts = []
    for number in numbers:
        rng = random.Random(ir.derive_seed("premise", number))
        image, dice = draw_dice(rng)
        question, colors, answer = dice_question(dice, rng)
        rows.append({"number": number, "question": question, "dice": dice, "colors": colors, "answer": answer})
        text = ir.solver_prompt(question)
        if described:
            shown = ", ".join(f"the {color} die shows {pips}" for color, pips in dice.items())
            text = f"The image shows three dice: {shown}.\n{text}"
        prompts.append(Prompt(image.resize((pixels, pixels)), text))
    prompts = encode_prompts(model, prompts)
    seeds = [ir.derive_seed(config.seed, "premise", number) for number in numbers]
    length = config.max_new_tokens_solver
    samples = model.sample(role, prompts, config.num_rollouts, length, config.temperature, seeds)
    greedy = model.sample(role, prompts, 1, length, temperature=0.0)
    for row, completions, (best,) in zip(rows, samples, greedy):
        rollouts = [ir.parse_rollout(c.text) for c in completions]
        embeddings = [model.embed_steps(rollout.steps) for rollout in rollouts]
        rewards = ir.group_rewards(rollouts, embeddings, 1.0, config, row["question"])
        row["texts"] = [rollout.text for rollout in rollouts]
        row["greedy"] = best.text
        row["votes"] = [rollout.vote for rollout in rollouts]
        row["majority"] = rewards["majority"]
        _, group = ir.dominant_group(row["votes"])
        r_tilde = ir.trajectory_agreement(ir.leave_one_out_similarity(embeddings, group), config.position_decay)
        leave_one_out = ir.step_agreement(r_tilde, group, config.num_rollouts, config.gamma).tolist()
        row["pay"] = {"cosine": rewards["r_step"], "leave-one-out cosine": leave_one_out}
    return rows

PATTERNS = {  # likenesses of traces by what they have in common
    "numbers": r"\d+",
    "words": r"\w+",
    "trigrams of words": r"\b(?=(\w+\W+\w+\W+\w+))",
}
RARITY = {  # by words, each weighted by log(rollouts / rollouts with it), over so many questions
    "words, rare in all questions": 10**9,
    "words, rare in 8 questions": 8,
    "words, rare in the question": 1,
    "new words, rare in 8 questions": 8,  # those of the prompt apart
}

def add_likenesses(rows):
    """row["pay"]: a name -> what this likeness of traces pays the N rollouts; beside the cosines, which are there."""
    for row in rows:
        rollouts = [ir.parse_rollout(text) for text in row["texts"]]
        traces = [" ".join(rollout.steps).lower() for rollout in rollouts]
        for name, pattern in PATTERNS.items():
            row["pay"][name] = pay_overlap(row, [set(re.findall(pattern, trace)) for trace in traces])
        row["pay"]["fewer words"] = [-len(trace.split()) for trace in traces]
    for name, size in RARITY.items():
        for start in range(0, len(rows), size):
            block = rows[start:start + size]
            words = [words_of(row, name.startswith("new")) for row in block]
            rollouts = sum(words, [])
            counts = Counter(word for found in rollouts for word in found)
            rarity = {word: math.log(len(rollouts) / count) for word, count in counts.items()}
            for row, found in zip(block, words):
                row["pay"][name] = pay_overlap(row, found, rarity)

def words_of(row, only_new):
    """The set of words in each rollout's steps."""
    known = set(re.findall(r"\w+", ir.solver_prompt(row["question"]).lower())) if only_new else set()
    traces = [" ".join(ir.parse_rollout(text).steps) for text in row["texts"]]
    return [set(re.findall(r"\w+", trace.lower())) - known for trace in traces]

def pay_overlap(row, found, weights=None):
    """`trace_overlap` with weights: the mean, over the other members of the majority, of the weight of what two traces
    have in common, as a share of the weight of what either has."""
    def weigh(things):
        return sum(weights[thing] for thing in things) if weights else len(things)

    group = [i for i, voted in enumerate(row["majority"]) if voted]
    r_tilde = torch.zeros(len(group))
    for at, i in enumerate(group):
        for k in group:
            either = weigh(found[i] | found[k])
            if k != i and either:
                r_tilde[at] += weigh(found[i] & found[k]) / either / (len(group) - 1)
    return ir.step_agreement(r_tilde, group, len(found)).tolist()

GRADES = {  # of a reply that was read: which are compared
    "true over false": ("S", "F"),        # sound and complete; something false that matters
    "true over incomplete": ("S", "P"),   # nothing false, the decisive part missing
}

def weigh_premise(rows):
    """Prints and returns the numbers, each as [value, low, high, count], with 95 % intervals: Wilson's for shares, with
    the number of questions for n, since the replies to one question are alike; Student's for gaps. Rows may have
    "grades" of replies that were read."""
    flags = defaultdict(list)  # name -> for each question a list of truth values
    for row in rows:
        right = [vote == row["answer"] for vote in row["votes"]]
        row["sound"] = [is_plausibly_sound(text, row["dice"], row["colors"]) for text in row["texts"]]
        row["sound"] = [s and r for s, r in zip(row["sound"], right)]
        flags["invalid"].append([vote is None for vote in row["votes"]])
        flags["right, mean@N"].append(right)
        flags["right, maj@N"].append([ir.dominant_group(row["votes"])[0] == row["answer"]])
        flags["right, greedy"].append([ir.parse_rollout(row["greedy"]).vote == row["answer"]])
        flags["sound"].append(row["sound"])
        flags["unsound of right"].append([not s for s, r in zip(row["sound"], right) if r])
    result = {name: share_of(lists) for name, lists in flags.items() if any(lists)}
    for name, numbers in result.items():
        ir.say(f"{name:<30} {in_brackets(numbers)}")

    add_likenesses(rows)
    ir.say("\nBy likeness of traces: the correlation of its pay with soundness over all majorities, which is what a\n"
           "baseline for all questions sees; inside right majorities, how often the sound one of two is paid more")
    result["likeness"] = {}
    for name in rows[0]["pay"]:
        result["likeness"][name] = {"correlation": correlate(rows, name)}
        ir.say(f"{name:<30} correlation           {in_brackets(result['likeness'][name]['correlation'])}")
        compared = {"sound over unsound": compare_kinds(rows, name, "sound", (True, False))}
        for label, grades in GRADES.items():
            compared[label] = compare_kinds([row for row in rows if "grades" in row], name, "grades", grades)
        for label, numbers in compared.items():
            if numbers:
                result["likeness"][name][label] = numbers
                paid_more, gap = numbers.values()
                ir.say(f"{name:<30} {label:<20}  {in_brackets(paid_more)}  by {in_brackets(gap)}")
    if "sound over unsound" not in result["likeness"]["cosine"]:
        ir.say("no right majority had both sound and unsound traces")
    return result

def correlate(rows, likeness):
    """Of pay and soundness over the members of all majorities: [value, low, high, questions], the interval from 2,000
    draws of questions."""
    sums = []
    for row in rows:
        majority = numpy.array(row["majority"])
        pay = numpy.array(row["pay"][likeness])[majority]
        sound = numpy.array(row["sound"], dtype=float)[majority]
        sums.append([len(pay), pay.sum(), sound.sum(), pay @ pay, sound @ sound, pay @ sound])
    draws = numpy.random.default_rng(0).multinomial(len(rows), [1 / len(rows)] * len(rows), 2000)
    n, p, s, pp, ss, ps = (numpy.vstack([numpy.ones(len(rows)), draws]) @ numpy.array(sums)).T
    with numpy.errstate(all="ignore"):
        r = (ps - p * s / n) / numpy.sqrt((pp - p * p / n) * (ss - s * s / n))
    r = r[numpy.isfinite(r)]  # others: all pay or all soundness is the same
    if r.size <= 1:
        return [math.nan, math.nan, math.nan, len(rows)]
    low, high = numpy.quantile(r[1:], [0.025, 0.975])
    return [float(r[0]), float(low), float(high), len(rows)]

def compare_kinds(rows, likeness, key, kinds):
    """{paid_more, gap} of the rollouts of two kinds, as row[key] names them, or {} where no majority has both."""
    gaps, wins = compare_pay(rows, lambda row: row["pay"][likeness], key, kinds)
    if not gaps:
        return {}
    gap = fmean(gaps)
    half = t_interval(gaps)
    return {"paid_more": share_of(wins), "gap": [gap, gap - half, gap + half, len(gaps)]}

def share_of(lists):
    """A mean over lists, one for each question: [value, low, high, count]."""
    values = sum(lists, [])
    share = fmean(values)
    questions = sum(map(bool, lists))
    return [share, *wilson_interval(share, questions), len(values)]

def in_brackets(numbers):
    value, low, high, count = numbers
    return f"{value:6.3f} [{low:6.3f}, {high:6.3f}] of {count}"


# ==== Command line ====================================================================================================

def run_command(command, argv):
    """Reads the command line of a command that ireasoner.py does not have, and runs it."""
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command; there are train, ask, {', '.join(COMMANDS)}")
    COMMANDS[command](argv)

def add_json(parser):
    parser.add_argument("--json", dest="json_file", default="", metavar="FILE", help="write the result to a new file")

def run_demo(argv):
    parser = ir.Parser("demo", ir.ALL_SETTINGS, DEMO)
    parser.add_argument("--cancel", type=float, default=0.5, metavar="SHARE",
                        help="share of the mistaught sums whose error leaves the answer right; default 0.5")
    add_json(parser)
    settings, own = parser.read(argv)
    for name in settings.keys() & {"model", "data", "dry_run"}:
        raise UserError(f"demo --{name}: the demo makes its own pictures and model. Leave the flag out")
    demo(settings, **own)

def run_eval(argv):
    parser = ir.Parser("eval", (*ir.ASK_SETTINGS, "num_rollouts", "temperature", "seed"))
    parser.add_argument("file", help='lines of {"image": path relative to the file, "question": "...", "answer": one or '
                        'a list of right ones}')
    parser.add_argument("--adapter", default="", help="step_* folder of a run; default: the plain backbone")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="questions at a time; default 32")
    add_json(parser)
    settings, own = parser.read(argv)
    evaluate_file(settings, **own)

def run_report(argv):
    parser = ir.Parser("report")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", default="report.png", metavar="FILE", help="default report.png")
    _, own = parser.read(argv)
    report(**own)

def run_study(argv):
    of_grid = ("advantage", "seed", "run_name", "output_dir", "resume", "dry_run", "model", "data")
    parser = ir.Parser("study", [name for name in ir.ALL_SETTINGS if name not in of_grid], DEMO)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 to 4")
    parser.add_argument("--cancel", type=float, nargs="+", default=[0.5, 1.0], metavar="SHARE", help="default 0.5 1.0")
    parser.add_argument("--rows", nargs="+", default=STUDY_ROWS, metavar="ADVANTAGE:REWARD",
                        help=f"a REWARD is a preset, or one of {', '.join(VARIANTS)}; default {' '.join(STUDY_ROWS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes; default 2")
    parser.add_argument("--table", action="store_true", help="of what is there, without another run")
    settings, own = parser.read(argv)
    study(settings, **own)

def run_premise(argv):
    parser = ir.Parser("premise", (*ir.ASK_SETTINGS, "num_rollouts", "temperature", "seed"))
    parser.add_argument("--adapter", default="", help="step_* folder of a run; default: the plain backbone")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--described", action="store_true", help="a text model, which is told what the picture shows")
    parser.add_argument("--pixels", type=int, default=336, metavar="N", help="width of the pictures; default 336")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="questions at a time; default 8")
    parser.add_argument("--replies", default="", metavar="FILE",
                        help="append the replies to this file; questions that it holds are not asked again")
    add_json(parser)
    settings, own = parser.read(argv)
    premise(settings, **own)

def run_bench(argv):
    parser = ir.Parser("bench")
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, default in (("images", 1), ("num_rollouts", 5), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--compare", action="store_true", help="also time the plain loop, in turn")
    parser.add_argument("--enforce_eager", action="store_true", help="on a GPU: without a captured decode step")
    add_json(parser)
    _, own = parser.read(argv)
    images, n, steps = own["images"], own["num_rollouts"], own["steps"]
    if min(images, n, steps) < 1:
        raise UserError(f"--images {images} --num_rollouts {n} --steps {steps}: must be at least 1")
    with result_file(own["json_file"]) as result:
        result |= bench(own["size"], images, n, steps, own["compare"], own["enforce_eager"])

COMMANDS = {"demo": run_demo, "eval": run_eval, "report": run_report, "study": run_study, "premise": run_premise,
            "bench": run_bench}


# ==== Tests ===========================================================================================================

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="more than 20 seconds: set SLOW=1")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about itself

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are tiny: more threads only wait for each other, also in the processes that tests start."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small dice world whose seed model knows the format of both roles, and little else."""
    folder = tmp_path_factory.mktemp("worlds") / "world"
    make_dice_world(folder, seed=0, cancel=0.5, num_images=24, num_questions=12, steps=130, batch_size=32)
    (folder / "model" / "additional_chat_templates").mkdir()  # as transformers may write
    return folder

@pytest.fixture
def policy(world):
    """Both adapters perturbed, differently, so that neither is the reference."""
    policy = Policy(Config(model=str(world / "model")))
    generator = torch.Generator().manual_seed(0)
    for role, scale in (("solver", 0.03), ("proposer", 0.05)):
        for weight in policy.lora_weights(role):
            weight.data += torch.randn(weight.shape, generator=generator) * scale
    return policy

def image(seed=0, size=(56, 56)):
    picture, _ = draw_dice(random.Random(seed))
    return picture.resize(size)

def train_settings(world, folder, **more):
    settings = {"model": str(world / "model"), "data": str(world / "images"), "output_dir": str(folder)}
    settings |= {"run_name": "run", "total_steps": 6, "save_every": 3, "show_every": 2, "watch_every": 2, "lr": 1e-3}
    settings |= {"proposer_every": 2, "num_rollouts": 3, "images_per_rank": 4}
    settings |= {"max_new_tokens_proposer": 16, "max_new_tokens_solver": 48}
    return settings | more

def flags(settings):
    """The same settings as a command line."""
    return [f"--{name}={value}" for name, value in settings.items()]

def metrics(run):
    rows = list(ir.read_jsonl(run / "metrics.jsonl"))
    for row in rows:
        del row["seconds"], row["tokens_per_second"]
    return rows

def adapters(step):
    """All matrices of a checkpoint, by (role, name)."""
    matrices = {}
    for role in ir.ROLES:
        for name, matrix in load_file(step / role / "adapter_model.safetensors").items():
            matrices[role, name] = matrix
    return matrices

@pytest.fixture(scope="session")
def straight_run(world, tmp_path_factory):
    return ir.train(Config(**train_settings(world, tmp_path_factory.mktemp("straight"))))

# ---- Parsing, normalization and settings -----------------------------------------------------------------------------

@pytest.mark.parametrize("normal_form, spellings", [
    ("7", "7.0 | +7 | 07 |  7  | 7. | (7) | “7” | ٧ | Seven"),
    ("7", r"**7** | *7* | `7` | '7' | $7$ | $$7$$ | \(7\) | \[7\] | [7] | \boxed{7} | **$7.$** | \boxed{\text{7}}"),
    ("-5", r"−5 | - 5 | (-5) | $-5$ | \boxed{-5.0}"),
    ("0", "−0.0"),
    ("0.5", ".5 | +.50"),
    ("5%", r"5 % | $5\%$ | 5 percent"),
    ("1000", r"1,000 | \boxed{1,000}"),
    ("$5", r"$5.00 | \$5"),
    ("7 cm", "7.0 CM. | 7cm | seven cm"),
    ("cat", "The cat | a  cat"),
    ("b", "(B)."),
    ("", r". | ... | … | \boxed{}"),
])
def test_spellings_of_one_answer_are_one_vote(normal_form, spellings):
    for spelling in spellings.split(" | "):
        assert ir.normalize_answer(spelling) == normal_form

DIFFERENT_ANSWERS = ("5|5.5|15|1,5|50|5!|x=5|1/2|1-5|5 or 6|a or b|a b|a c|(a) or (b)|*a* or *b*|5 cm|€5|$5 million|"
                     "(1,200)|(0,1)|[0,1]")

@pytest.mark.parametrize("answer", DIFFERENT_ANSWERS.split("|"))
def test_answers_that_mean_something_else_stay_apart(answer):
    """Fault 6: the released normalizer turns -5 and 5% into 5, .5 into 5, and 1,5 into 15."""
    assert ir.normalize_answer(answer) == answer

MARKUP = "<think>|</think>|<answer>|</answer>|<question>|\\boxed{|}|**|\\(|\\)|Step 1:|Step 1 (|step|1. |9,|1,000|a? |\n"
PIECES = [*MARKUP.split("|"), *map(chr, range(128)), *"−１½²İßſ٣。\u200b\ud800"]

def hostile_texts():
    rng = random.Random(0)
    yield "(" * 4000 + ")" * 4000
    yield "question" + "_" * 8000 + "?"
    yield "\\boxed{" * 1000 + "}" * 1000
    for piece in PIECES:
        yield piece * (8000 // len(piece))
    for _ in range(2000):
        yield "".join(rng.choices(PIECES, k=rng.randrange(40)))

def test_parsers_survive_any_text():
    """Each text takes less than a second; with a pattern of cubic time this test would take hours."""
    for text in hostile_texts():
        answer = ir.normalize_answer(text)
        assert ir.normalize_answer(answer) == answer
        question = ir.parse_question(text)
        assert question is None or question.strip()
        steps = ir.parse_rollout(text, 3).steps
        assert len(steps) <= 3
        assert steps == [] or any(steps)

@pytest.mark.parametrize("think, steps", [
    ("Step 1: a\nSTEP 2 – b", "a | b"),
    ("step 1 - a\nStep 2\nb", "a | b"),
    ("1) a\n**2.** b\n> 3. c", "a | b | c"),
    ("**Step 1**: a\n**Step 2:** b\n**Step 3: Add** 2**3", "a | b | Add 2**3"),
    ("Step 1: a Step 2: as in Step 1: Step 3: -5", "a | as in Step 1: | -5"),
    ("Step 1 (look): a\n**Step 2** b\n**Step 3** Add: c\nStep 4 of 4: d", "a | b | c | d"),
    ("Step 9: a\nStep 10: b", "a | b"),
    ("Step 1: a\n1. b\n2. c\nStep 2: d", "a 1. b 2. c | d"),
    ("Step 1: a. Step 1 is all.", "a. | Step 1 is all."),
    ("I look.\nStep 1: a\n  goes on\nStep 2: b", "a goes on | b"),
    ("claim\nStep 2: b", "claim | b"),
    ("Step 1:\nStep 2: b", " | b"),
    ("1. a\n3. c", "a |  | c"),
    ("Step 1: a\n7. b\nStep 2: c", "a 7. b | c"),
    ("1. 3.5\n2.5\n2. b", "3.5 2.5 | b"),
    ("3.5 is high", "3.5 is high"),  # fault 6: the released parser makes "5 is high" of it
    ("It is 3. So?\n- Yes!", "It is 3. | So? | Yes!"),
    ("Step 1: ...\nStep 2:", ""),
    ("1. a\n2. b\n3. c\n4. d\n5. e\n6. f\n7. g\n8. h\n9. i", "a | b | c | d | e | f | g | h"),
])
def test_split_steps(think, steps):
    assert " | ".join(ir.split_steps(think)) == steps

@pytest.mark.parametrize("opening", ["<think>\n", ""])  # some chat templates have written it already
def test_a_reply_is_parsed_into_its_parts(opening):
    think = "Step 1: a\nStep 2: b c"
    text = f"{opening}{think}\n</think>\n<answer> 7 </answer>"
    assert ir.parse_rollout(text) == ir.Rollout(text, think, ["a", "b c"], "7", words_before_answer=7)

def test_steps_behind_a_think_that_was_closed_early_are_read():
    assert ir.parse_rollout("<think>look</think> Step 1: a Step 2: b<answer>7</answer>").steps == ["a", "b"]

@pytest.mark.parametrize("text, answer", [
    ("<answer>4</answer>, <answer>5</answer>", "5"),
    ("<answer>4<answer>5</answer><answer>", "5"),
    ("<Answer></ANSWER>", ""),
    ("<answer>7", None),
])
def test_the_answer_is_the_last_complete_tag(text, answer):
    assert ir.parse_rollout(text).answer == answer

@pytest.mark.parametrize("text, question", [
    ("So!\n<QUESTION>\nWhat\n  is it? </QUESTION> bye", "What is it?"),
    ("<question>Find it.</question>", "Find it."),
    ("**Question:** Is it 3.5? No.", "Is it 3.5?"),
    ("I see.", None),
    ("?", None),
])
def test_the_question_is_tagged_or_ends_in_a_question_mark(text, question):
    assert ir.parse_question(text) == question

def test_a_form_that_is_copied_from_a_prompt_is_empty():
    """With a word in place of the dots a real model soon replied <answer>answer</answer> to everything."""
    assert ir.parse_question(ir.proposer_prompt().splitlines()[-1]) is None
    copied = ir.parse_rollout(ir.solver_prompt("How many?"))
    assert copied.answer == "..."
    assert copied.vote is None
    form = ir.solver_prompt("").partition("form:\n")[2]
    assert ir.parse_rollout(form).steps == []
    filled = form.replace("...", "a")
    assert ir.parse_rollout(filled).steps == ["a", "a"]
    assert ir.parse_rollout(filled).vote == "a"

def test_the_dice_worlds_verifier_accepts_true_traces_only():
    rng = random.Random(0)
    facts = mistaught_facts(0, cancel=0.5)
    for _ in range(200):
        _, dice = draw_dice(rng)
        _, colors, _ = dice_question(dice, rng)
        taught = dice_solution(dice, colors, facts, rng)
        is_mistaken = any(f": {a} + {b} = {wrong}\n" in taught for (a, b), wrong in facts.items())
        assert is_sound(taught, dice, colors) != is_mistaken
        true = dice_solution(dice, colors, {}, rng)
        assert is_sound(true, dice, colors)
        for part in ("shows ", "= ", "is ", "<answer>"):
            assert not is_sound(true.replace(part, part + "1"), dice, colors)

def test_settings_are_used_and_say_where_they_come_from():
    source = inspect.getsource(ir)
    for field in dataclasses.fields(Config):
        assert re.search(rf"\bconfig\.{field.name}\b", source), field.name
        assert re.search(r"\w.* \[(3\.2|4\.1|Tab [123]|code|ours)\]$", field.metadata["meaning"]), field.name

def test_examples_in_docstrings_hold():
    failed, attempted = doctest.testmod(ir)
    assert failed == 0
    assert attempted >= 4

def test_script_block_lists_the_requirements():
    [block] = re.findall("^# dependencies = (.*)", inspect.getsource(ir), re.M)
    requirements = (HERE / "requirements.txt").read_text().split()
    assert sorted(json.loads(block)) == sorted(requirements)

@pytest.mark.parametrize("preset, row", ir.PRESETS.items())
def test_a_preset_changes_its_row_and_nothing_else(preset, row):
    expected = dataclasses.asdict(Config(data="pictures")) | row
    assert dataclasses.asdict(Config(**row, data="pictures")) == expected
    assert row["run_name"] == preset + "_seed{seed}"

def read_flags(line):
    return ir.Parser("train", ir.ALL_SETTINGS).read(line.split())[0]

def test_on_the_command_line_what_is_given_wins_over_the_preset(monkeypatch):
    given = read_flags("--preset evolmm --lambda_max 0.7 --data a b")  # 0.7 is the default, but given
    assert given == {"run_name": "evolmm_seed{seed}", "lambda_max": 0.7, "data": ["a", "b"]}
    assert read_flags("--preset=steps_4 --run_name=x") == {"run_name": "x", "max_reasoning_steps": 4}
    monkeypatch.setitem(ir.PRESETS, "ireasoner", {"gamma": 0.3})
    assert read_flags("") == {"gamma": 0.3}  # an edited row of the default preset takes effect

@pytest.mark.parametrize("name, value", [
    ("lr", -1.0),
    ("lr", math.nan),
    ("num_rollouts", 0),
    ("advantage", "grpo"),
    ("kl_coef", 2.0),
])
def test_a_setting_of_the_wrong_type_or_size_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^--{name} "):
        Config(**{name: value})

# ---- The equations, each against an independent derivation -----------------------------------------------------------

def test_eq2_majority_is_the_most_frequent_valid_answer():
    assert ir.dominant_group(["8", None, "7", None, "7"]) == ("7", [2, 4])

def test_entropy_counts_each_invalid_rollout_as_an_outcome_of_its_own():
    entropy = ir.answer_entropy(["7", "7", None, None])
    assert entropy == pytest.approx(1.5 * math.log(2))  # 1.5 bits

def random_embeddings(lengths):
    """Traces of these lengths: a row of normal numbers for each step."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 5, generator=generator) for length in lengths]

def step_rewards(embeddings, group, n, gamma=0.7, decay=0.15, min_group=2):
    """Eq 2 to 4, by the functions that `group_rewards` calls."""
    r_ij = ir.step_similarity(embeddings, group, min_group)
    r_tilde = ir.trajectory_agreement(r_ij, decay)
    return ir.step_agreement(r_tilde, group, n, gamma)

def agreement_by_loops(embeddings, group, n, gamma=0.7, decay=0.15, min_group=2):
    """Eq 2 to 4, one step at a time."""
    rewards = [0.0] * n
    for i in group:
        total = 0.0
        weights = 0.0
        for j, step in enumerate(embeddings[i]):
            peers = [embeddings[k][j] for k in group if j < len(embeddings[k]) and embeddings[k][j].norm() > 0]
            if len(peers) >= min_group:
                mu = sum(peers) / len(peers)
                cosine = step @ mu / max(step.norm() * mu.norm(), 1e-12)
                weight = math.exp(-decay * j)
                total += weight * cosine.item()
                weights += weight
        if weights:
            rewards[i] = (len(group) / n) ** gamma * total / weights
    return rewards

@pytest.mark.parametrize("group", [[0, 1, 2, 4], [2], []])
@pytest.mark.parametrize("options", [(0.7, 0.15, 2), (1.3, 2, 1), (0, 0, 3)])
def test_eq3_eq4_step_agreement(group, options):
    embeddings = random_embeddings([3, 0, 5, 2, 3])
    embeddings[0][1] = 0  # an empty step
    embeddings[4][0] = 0
    expected = agreement_by_loops(embeddings, group, 5, *options)
    rewards = step_rewards(embeddings, group, 5, *options)
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)

def test_a_lone_step_beside_an_empty_one_does_not_agree_with_itself():
    e1, e2 = torch.eye(2)
    empty = torch.zeros(2)
    r_ij = ir.step_similarity([torch.stack([e1, e2]), torch.stack([e1, empty])], [0, 1])
    expected = torch.tensor([[1.0, math.nan], [1.0, math.nan]])
    torch.testing.assert_close(r_ij, expected, equal_nan=True)

@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e38])
def test_step_agreement_is_finite_on_any_input(value):
    strange = torch.full((2, 3), value)
    rewards = step_rewards([torch.eye(3), strange, torch.zeros(0)], [0, 1, 2], 3)
    assert (rewards.abs() <= 1).all()

@pytest.mark.parametrize("pattern, expected", [
    (r"\d+", [(1 / 3 + 0) / 2, 1 / 6, 0]),     # 3 and 4, 3 and 14, none
    (r"[a-z]+", [(1 + 1 / 2) / 2, 3 / 4, 1 / 2]),
])
def test_overlap_of_traces_by_hand(pattern, expected):
    traces = [["Red 3", "is 4"], ["x"], ["red is", "3 14"], ["is"]]
    assert ir.trace_overlap(traces, [0, 2, 3], pattern).tolist() == pytest.approx(expected)
    assert ir.trace_overlap(traces, [1]).tolist() == [0]
    assert ir.trace_overlap(traces, []).tolist() == []

def test_agreement_by_numbers_pays_by_numbers_and_logs_the_cosine():
    texts = ["1. 3 + 4 = 7\n2. odd<answer>odd</answer>", "1. 4 + 3 = 7\n2. odd<answer>odd</answer>",
             "1. 3 + 4 = 9\n2. odd<answer>odd</answer>"]
    by_numbers = rewards_of(texts, step_similarity="numbers")
    by_cosine = rewards_of(texts)
    assert by_numbers["r_step"] == pytest.approx([(1 + 1 / 2) / 2, (1 + 1 / 2) / 2, 1 / 2])
    assert by_numbers["step_cosine"] == by_cosine["step_cosine"]
    assert by_numbers["r_ans"] == by_cosine["r_ans"]

def test_figure7_by_hand():
    right_and_up = torch.eye(2)
    diagonal = torch.ones(1, 2)
    up = right_and_up[1:]
    traces = [right_and_up, up, diagonal, torch.cat([up, diagonal])]
    similarity = ir.leave_one_out_similarity(traces, group=[0, 1, 3])
    cosine = math.sqrt(0.5)  # of the diagonal with either
    expected = torch.tensor([[0.0, cosine], [cosine, math.nan], [cosine, cosine]])
    torch.testing.assert_close(similarity, expected, equal_nan=True)
    assert ir.depth_disagreement(similarity).tolist() == pytest.approx([1 - 2 * cosine / 3, 1 - cosine])

@pytest.mark.parametrize("step, weight", [(300, 0), (301, 0.001), (650, 0.35), (1000, 0.7)])
def test_eq6_step_reward_ramps_up_after_the_warmup(step, weight):
    assert ir.step_reward_weight(step, 1000) == pytest.approx(weight)
    assert ir.step_reward_weight(step, 1000, schedule="constant") == 0.7

@pytest.mark.parametrize("reduction, expected", [
    ("mean", [-0.125, -0.125, 0.5, 0.025, 0.025, 0.05]),
    ("sum", [-0.0625, -0.0625, 0.125, 0.0125, 0.0125, 0.0125]),  # every token weighs the same, whatever the length
])
def test_eq7_gradients_by_hand(reduction, expected):
    rows = [torch.zeros(length, requires_grad=True) for length in (2, 1, 2, 1)]
    loss = ir.reinforce_loss(rows[:2], rows[2:], [0.5, -1.0], 0.1, reduction, max_tokens=4)
    gradient = torch.cat(torch.autograd.grad(loss, rows))
    assert gradient.tolist() == pytest.approx(expected)

def test_eq7_token_statistics_are_those_of_torch_distributions():
    hidden, ref_hidden = random_embeddings([4, 4])
    hidden.requires_grad = True
    ref_hidden.requires_grad = True
    ids = torch.tensor([0, 8, 3, 3])
    lm_head = torch.nn.Linear(5, 9)
    got = torch.stack(ir.token_statistics(hidden, ref_hidden, ids, lm_head, temperature=0.7))
    policy = Categorical(logits=lm_head(hidden) / 0.7)
    reference = Categorical(logits=lm_head(ref_hidden.detach()) / 0.7)
    expected = torch.stack([policy.log_prob(ids), kl_divergence(policy, reference)])
    torch.testing.assert_close(got, expected)
    (got - expected).sum().backward()
    torch.testing.assert_close(hidden.grad, torch.zeros(4, 5))
    assert ref_hidden.grad is None

@pytest.mark.parametrize("kind, advantages", [
    ("ema", [0.7, -0.3]),
    ("mean", [0.5, -0.5]),
    ("group", [0.998004, -0.998004]),  # the standard deviation of 1 and 0 is 0.5; 0.001 is added to it
])
def test_eq7_advantages(kind, advantages):
    assert ir.advantages([1.0, 0.0], 0.3, kind) == pytest.approx(advantages)

def test_eq7_baseline_follows_the_rewards():
    assert ir.update_baseline(0.5, 1.0) == pytest.approx(0.55)

@pytest.mark.parametrize("kl, beta", [
    (0.0, 0.0095),
    (0.06, 0.01 * math.exp(0.2)),
    (200, 0.5),
    (math.inf, 0.5),
    (math.nan, 0.01),
])
def test_eq8_beta_follows_the_kl_within_bounds(kl, beta):
    """Fault 9: in the released code a KL of 200 raises OverflowError."""
    assert ir.adapt_kl_coef(0.01, kl, beta_min=0.0095, beta_max=0.5) == pytest.approx(beta)

def rewards_of(texts, **settings):
    rollouts = [ir.parse_rollout(text) for text in texts]
    embeddings = random_embeddings([len(rollout.steps) for rollout in rollouts])
    return ir.group_rewards(rollouts, embeddings, 0.4, Config(**settings))

SIX_REPLIES = [
    "1. a\n2. b<answer>7</answer>",
    "1. a\n2. c<answer>7.0</answer>",
    "no idea",
    "w " * 500 + "<answer>8</answer>",
    "w " * 96 + "<answer>(7)</answer>",  # a word costs from the 65th to the 128th
    "<answer>7</answer>",
]
SEVEN = (4 / 6) ** 0.7
EIGHT = (1 / 6) ** 0.7

@pytest.mark.parametrize("kind, r_ans", [
    ("soft", [SEVEN, SEVEN, 0, EIGHT * 0.95, SEVEN * 0.975, SEVEN]),
    ("discrete", [1, 1, 0, 0, 1, 1]),
])
def test_group_rewards_combine_the_equations(kind, r_ans):
    rewards = rewards_of(SIX_REPLIES, answer_reward=kind)
    r_step = agreement_by_loops(random_embeddings([2, 2, 1, 1, 1, 0]), [0, 1, 4, 5], 6)
    expected = [0.6 * answer + 0.4 * step for answer, step in zip(r_ans, r_step)]
    assert rewards["r_sol"] == pytest.approx(expected, abs=1e-6)

@pytest.mark.parametrize("text", [
    "I cannot help with that.",
    "<think>Step 1: red\nStep 2: blue",
    "<think>Step 1: a</think><answer>7",
])
def test_invalid_rollouts_pay_neither_role(text):
    """Fault 5: in the released code five refusals, or five cut-off traces, vote with their last line: reward 1."""
    rewards = rewards_of([text] * 5)
    assert rewards["r_sol"] == [0] * 5
    assert rewards["r_prop"] == 0

SURE = math.exp(-(0.9 / 0.35) ** 2 / 2)
FIVE = math.exp(-((math.log(5) - 0.9) / 0.35) ** 2 / 2)

def test_discrete_rewards_pay_nobody_where_nobody_agrees():
    texts = [f"<answer>{answer}</answer>" for answer in "12345"]
    assert rewards_of(texts, answer_reward="discrete")["r_ans"] == [0] * 5

def test_no_way_of_breaking_rollouts_pays_the_proposer():
    """With g(H) alone three agreeing and two broken rollouts would pay 0.99 where five agreeing ones pay 0.04; with g
    of the valid rollouts alone five different answers pay 0.13, and two of them broken 0.51."""
    def pay(answers):
        return rewards_of([f"<answer>{answer}</answer>" for answer in answers])["r_prop"]

    for answers in itertools.product("12345", repeat=5):
        for broken in range(1, 5):
            if list(answers) == sorted(answers):
                assert pay(answers[:5 - broken] + (" ",) * broken) <= pay(answers) + 1e-12

@pytest.mark.parametrize("answer_reward, answers, r_prop", [
    ("soft", "77777", SURE),
    ("soft", "77   ", 0.4 * SURE),
    ("soft", "78   ", 0.4 * FIVE),  # as many outcomes as five different answers
    ("discrete", "77887", 1),
    ("discrete", "778  ", 0.6),
    ("discrete", "77777", 0),
    ("discrete", "78", 0),
])
def test_the_proposer_is_paid_for_the_share_of_valid_rollouts(answer_reward, answers, r_prop):
    texts = [f"<answer>{answer}</answer>" for answer in answers]
    rewards = rewards_of(texts, answer_reward=answer_reward)
    assert rewards["r_prop"] == pytest.approx(r_prop)

NAMES = list(vars(ir))
EQUATIONS = NAMES[NAMES.index("answer_distribution"):NAMES.index("group_rewards")]  # Eq 1 to 8, in one unbroken run
LIBRARIES = {"Counter", "F", "math", "re", "statistics", "torch"}

@pytest.mark.parametrize("name", EQUATIONS)
def test_an_equation_needs_libraries_and_at_most_six_more_functions(name):
    needed = [name]
    for current in needed:  # grows in the loop
        tree = ast.parse(inspect.getsource(getattr(ir, current)))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for other in used.intersection(NAMES).difference(LIBRARIES, needed):
            assert other in EQUATIONS
            needed.append(other)
    assert len(needed) <= 7

OTHER_NAMES = {"decay": "position_decay", "min_group": "min_group_size", "target": "kl_target", "rate": "kl_adapt_rate",
               "beta_min": "kl_coef_min", "beta_max": "kl_coef_max", "mu": "entropy_mu", "sigma": "entropy_sigma",
               "momentum": "baseline_momentum", "lam_max": "lambda_max", "schedule": "lambda_schedule",
               "kind": "advantage", "reduction": "logprob_reduction"}

@pytest.mark.parametrize("name", EQUATIONS)
def test_the_defaults_of_an_equation_are_those_of_its_settings(name):
    for parameter in inspect.signature(getattr(ir, name)).parameters.values():
        setting = OTHER_NAMES.get(parameter.name, parameter.name)
        if name == "length_excess":
            setting = "target_words"
        if parameter.default is not parameter.empty and hasattr(Config, setting):
            wanted = 1 if name == "leave_one_out_similarity" else getattr(Config(), setting)
            assert parameter.default == wanted, parameter.name

def test_another_similarity_in_one_line_changes_reward_and_log(monkeypatch):
    monkeypatch.setattr(ir, "step_similarity", lambda embeddings, group, min_group: torch.tensor([[0.25], [0.5]]))
    rollouts = [ir.parse_rollout("<answer>1</answer>")] * 2
    rewards = ir.group_rewards(rollouts, [torch.zeros(0, 2)] * 2, 1.0, Config())
    assert rewards["r_sol"] == rewards["step_cosine"] == [0.25, 0.5]

# ---- Policy: sampling and scoring ------------------------------------------------------------------------------------

QUESTION = ir.solver_prompt("Is red plus blue even or odd?")
PROMPTS = [
    Prompt(image(1), QUESTION),
    Prompt(image(2, (84, 140)), "Hi."),
    Prompt(image(3, (112, 56)), QUESTION),
]
same = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)

def tokens(completions):
    return torch.cat([torch.tensor(c.token_ids) for c in completions])

def sampled(completions):
    """The log-probabilities of all tokens, one completion behind the other."""
    return torch.cat([c.logprobs for c in completions])

def sample(policy, n, length, role="solver", **how):
    return policy.sample(role, PROMPTS[:1], n, length, **how)[0]

def scored(policy, completions, role="solver"):
    return torch.cat(policy.score(role, PROMPTS[0], completions).logprobs)

def plain(model, policy, prompt, completions, temperature=1.0):
    """The distributions of all tokens, from a plain forward of `model`."""
    logits = torch.cat(plain_logits(model, policy, prompt, completions))
    return Categorical(logits=logits.float() / temperature)

def gradients(value, policy, role):
    return torch.autograd.grad(value, policy.lora_weights(role), retain_graph=True)

def loss_gradients(logprobs, kl, policy, role):
    """Of a loss like that of Eq 7, which makes some tokens likelier and others less likely."""
    advantages = torch.linspace(-1, 1, len(kl))
    loss = (advantages * logprobs + kl).mean()
    return gradients(loss, policy, role)

def check_scores(policy, role, temperature=1.0):
    """Of what the role samples, all that Eq 7 needs is what plain forwards say that see the image. The reference is
    compared with a model that never had an adapter."""
    base = transformers.AutoModelForImageTextToText.from_pretrained(policy.config.model)
    groups = policy.sample(role, PROMPTS, 3, 24, temperature, seed=1)
    for prompt, group in zip(PROMPTS, groups):
        # a random model may write image tokens, and the plain forward takes them for images
        completions = [c for c in group if policy.image_token_id not in c.token_ids]
        token_ids = tokens(completions)
        with policy.adapter(role):
            own = plain(policy.hf, policy, prompt, completions, temperature)
        with torch.no_grad():
            reference = plain(base, policy, prompt, completions, temperature)
        true_logprobs = own.log_prob(token_ids)
        true_kl = kl_divergence(own, reference)
        assert true_kl.mean() > 1e-3

        scores = policy.score(role, prompt, completions, temperature)
        logprobs = torch.cat(scores.logprobs)
        kl = torch.cat(scores.kl)
        same(logprobs, true_logprobs)
        same(logprobs, sampled(completions))
        same(kl, true_kl)
        fast = loss_gradients(logprobs, kl, policy, role)
        slow = loss_gradients(true_logprobs, true_kl, policy, role)
        same(fast, slow)

        off = policy.score(None, prompt, completions, temperature)
        same(torch.cat(off.logprobs), reference.log_prob(token_ids))
        assert not torch.cat(off.kl).any()
        other_image = Prompt(image(4), prompt.text)
        unseen = policy.score(role, other_image, completions, temperature)
        assert (torch.cat(unseen.logprobs) - logprobs).abs().max() > 0.01

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("role", ir.ROLES)
def test_logprobs_kl_and_gradients_are_those_of_plain_forwards(policy, role, temperature):
    """Faults 1 and 7: the released gradient pass gets no image, re-tokenizes decoded text and drops the end-of-turn
    token, so that it scores another distribution, and stopping is never credited. Fault 2: the released reference is
    not frozen, so its KL reads 0, or compares one role with the other."""
    check_scores(policy, role, temperature)

@pytest.mark.parametrize("role", ir.ROLES)
def test_a_role_starts_as_the_reference(policy, role):
    fresh = Policy(policy.config)
    completions = sample(fresh, 2, 12, role)
    kl = fresh.score(role, PROMPTS[0], completions).kl
    assert not torch.cat(kl).any()

def test_dropout_acts_in_the_gradient_pass_alone(policy):
    dropped = Policy(dataclasses.replace(policy.config, lora_dropout=0.5))
    dropped.hf.load_state_dict(policy.hf.state_dict())
    completions = sample(dropped, 2, 12)
    same(sampled(completions), scored(policy, completions))
    first = scored(dropped, completions)
    second = scored(dropped, completions)
    assert not torch.equal(first, second)

def test_a_mistake_in_edited_code_keeps_its_traceback():
    with pytest.raises(NameError), ir.blame("--model folder"):
        raise NameError("typo")

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_peft_reads_a_role_as_float32_and_gives_its_scores(world, policy, tmp_path, dtype, tolerance):
    from peft import PeftModel
    ours = Policy(Config(model=str(world / "model"), dtype=dtype, lora_alpha=24))
    ours.hf.load_state_dict(policy.hf.state_dict())
    ours.save(tmp_path)
    for role in ir.ROLES:
        base = transformers.AutoModelForImageTextToText.from_pretrained(world / "model", dtype=dtype)
        peft = PeftModel.from_pretrained(base, tmp_path / role)
        completions = sample(ours, 3, 24, role)
        theirs = plain(peft, ours, PROMPTS[0], completions).log_prob(tokens(completions))
        own = scored(ours, completions, role)
        assert (own - theirs).abs().mean() < tolerance
        assert (own - sampled(completions)).abs().mean() < tolerance
        matrices = load_file(tmp_path / role / "adapter_model.safetensors")
        assert len(matrices) == 2 * 7 * 2
        for name, matrix in matrices.items():
            assert ".language_model.layers." in name
            assert matrix.dtype == torch.float32

def test_a_saved_role_serves_clients_that_load_a_processor_from_it(world, policy, tmp_path):
    policy.save(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        copied = tmp_path / "solver" / name
        assert copied.read_bytes() == (world / "model" / name).read_bytes()
    assert not (tmp_path / "solver" / "config.json").exists()  # clients would look for a whole model there

def test_greedy_decoding_is_that_of_transformers(policy):
    ours = sample(policy, 1, 30, temperature=0)
    with policy.adapter("solver"):
        theirs = plain_sample(policy.hf, policy, PROMPTS[0], 30, do_sample=False)
    assert ours[0].token_ids == theirs[0].token_ids
    same(sampled(ours), scored(policy, ours))  # at temperature 1

def test_sampling_follows_the_plain_softmax(policy):
    """The checkpoint's generation_config (top_k, repetition_penalty) must not reach the sampler."""
    policy.hf.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0)
    n = 4000
    first = sample(policy, n, 1, temperature=1.5)
    with policy.adapter("solver"):
        p = plain(policy.hf, policy, PROMPTS[0], first[:1], temperature=1.5).probs[0]
    counts = torch.bincount(tokens(first), minlength=len(p))
    assert (counts / n - p).abs().max() < 5 * math.sqrt(0.25 / n)
    assert counts.count_nonzero() > 5

def test_a_completion_does_not_depend_on_the_batch_it_shares(policy):
    seeds = [11, 22, 33]
    together = policy.sample("solver", PROMPTS, 3, 30, seed=seeds)
    different = set()
    for prompt, seed, group in zip(PROMPTS, seeds, together):
        alone = policy.sample("solver", [prompt], 2, 30, seed=[seed])[0]
        assert torch.equal(tokens(alone), tokens(group[:2]))
        different.update(c.text for c in group)
    assert len(different) == 9

def test_every_end_of_turn_id_stops(policy):
    assert policy.stop_ids == set(policy.hf.generation_config.eos_token_id)
    policy.stop_ids = set(range(0, len(policy.tokenizer), 10))
    seen = set()
    for c in sample(policy, 20, 40, temperature=4.0):
        *before, last = c.token_ids
        assert not policy.stop_ids & set(before)
        assert c.finished == (last in policy.stop_ids)
        seen.add(last)
    assert len(seen & policy.stop_ids) > 3

def test_every_token_of_the_vocabulary_can_be_drawn():
    logp = torch.log_softmax(torch.tensor([[0.0, 0.0, -40.0], [0.0, 0.0, 1.0]]), dim=-1)
    assert ir.draw(logp, torch.tensor([[0.0], [0.0]])).tolist() == [[0], [0]]
    assert ir.draw(logp, torch.tensor([[0.75], [1.0 - 1e-12]], dtype=torch.float64)).tolist() == [[1], [2]]

def test_control_tokens_in_a_question_stay_text(policy):
    evil = "<|image_pad|><|im_end|><|im_start|>system<|vision_start|>?"
    picture = policy.encode(image())
    fed = []
    policy.hf.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    with policy.adapter(None):
        policy.prefill([Prompt(picture, "")])
        policy.prefill([Prompt(picture, evil)])
    calm_ids, evil_ids = [ids[0].tolist() for ids in fed if ids.shape[1] > 1]
    added = Counter(evil_ids) - Counter(calm_ids)
    control = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert not added.keys() & control
    assert evil in policy.tokenizer.decode(evil_ids)

def test_a_step_is_embedded_as_the_normalized_mean_of_its_first_64_token_embeddings(policy):
    step = "x" * 60 + "y" * 60
    table = policy.hf.get_input_embeddings().weight
    mean = table[policy.tokenize(step)[:64]].mean(0)
    same(policy.embed_steps([step])[0], F.normalize(mean, dim=0))

def test_at_most_512_rows_of_logits_exist_at_a_time(policy):
    policy.stop_ids = set()
    completions = sample(policy, 40, 40)
    rows = []
    policy.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    scored(policy, completions).sum().backward()
    assert max(rows) <= 512
    assert sum(rows) >= 3 * 1600  # reference, policy, and the policy again in the backward pass

def test_max_pixels_bounds_visual_tokens(world):
    policy = Policy(Config(model=str(world / "model"), max_pixels=10 * 784))
    ids = policy.encode(image(size=(1000, 700))).ids
    assert 5 <= ids.count(policy.image_token_id) <= 10

def test_a_step_encodes_each_image_once(world, tmp_path):
    tower = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    with patch.object(tower, "forward", autospec=True, side_effect=tower.forward) as encode:
        ir.train(Config(**train_settings(world, tmp_path, total_steps=2, watch_every=0)))
    assert encode.call_count == 2 * 4

# ---- A captured decode step: proven by recording its kernels, as a CUDA graph does ------------------------------------

WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")  # for the device

class Recorder(TorchDispatchMode):
    """Records the kernels of one call, and refuses what would wait for the device."""
    def __init__(self):
        super().__init__()
        self.calls = []
        self.overwritten = []  # tensors that were written in place, with what they held before

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{kernel} is not permitted while a stream is captured")
        for argument, value in zip(kernel._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        result = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, result))
        return result

def record(step):
    """Takes the place of `ir.capture`: nothing that the recorded call computes lasts, and a replay runs its kernels
    again on the same tensors, without any Python of the step."""
    recorder = Recorder()
    with patch("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True), recorder:
        step()
    for tensor, value in reversed(recorder.overwritten):
        tensor.copy_(value)

    def replay():
        for kernel, args, kwargs, result in recorder.calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)

    return replay

def check_captured(policy, role, length=37):
    """Sampling by replays gives the tokens of plain calls, to the last bit."""
    plain_groups = policy.sample(role, PROMPTS[:2], 3, length, seed=3)
    with patch.object(ir, "capture", side_effect=record) as capture:
        groups = policy.sample(role, PROMPTS[:2], 3, length, seed=3)
    assert capture.call_count == 1
    assert policy.captures  # no capture failed
    for ours, plain in zip(sum(groups, []), sum(plain_groups, [])):
        assert ours.token_ids == plain.token_ids
        assert torch.equal(ours.logprobs, plain.logprobs)

@pytest.mark.parametrize("role", [*ir.ROLES, None])
def test_a_captured_decode_step_samples_what_plain_calls_sample(policy, role):
    policy.stop_ids = set()
    check_captured(policy, role)

def test_steps_that_no_graph_can_replay_are_told_apart():
    """Each of these mistakes, made in `sample`, makes the test above fail."""
    state = {}
    def in_place():
        state["sum"].add_(state["sum"] + 1)

    def another_tensor():
        state["sum"] = state["sum"] * 2 + 1

    def number_in_python():
        state["count"] += 1
        state["sum"].add_(2 ** state["count"])

    def number_read():
        state["sum"].add_(state["sum"].item() + 1)

    for step, is_replayed in ((in_place, True), (another_tensor, False), (number_in_python, False)):
        state.update(sum=torch.zeros(1), count=-1)
        replay = record(step)
        for _ in range(3):
            replay()
        assert (state["sum"].item() == 7) == is_replayed  # 1 + 2 + 4
    with pytest.raises(RuntimeError, match="not permitted"):
        record(number_read)

@pytest.mark.parametrize("enforce_eager, error, captures", [
    (True, None, 0),
    (False, RuntimeError("cudaErrorStreamCaptureInvalidated\nmore"), 1),
])
def test_where_capturing_is_off_or_fails_sampling_goes_on(policy, capsys, enforce_eager, error, captures):
    expected = sample(policy, 3, 20)
    eager = Policy(dataclasses.replace(policy.config, enforce_eager=enforce_eager))
    eager.hf.load_state_dict(policy.hf.state_dict())
    with patch.object(ir, "capture", side_effect=error) as capture:
        for _ in range(2):
            assert tokens(sample(eager, 3, 20)).equal(tokens(expected))
    assert capture.call_count == captures  # a capture that failed is not tried again
    assert len(re.findall("warning: .*Invalidated\n", capsys.readouterr().err)) == captures

def test_plain_calls_and_a_capture_share_one_stream():
    streams = Mock(side_effect=[Mock(), Mock()])
    entered = MagicMock()
    graph = MagicMock()
    ir.side_stream.cache_clear()
    with patch.multiple("torch.cuda", is_available=Mock(), current_stream=Mock(), CUDAGraph=Mock(), Stream=streams,
                        stream=entered, graph=graph):
        ir.on_side_stream(Mock())()
        ir.capture(Mock())
    ir.side_stream.cache_clear()
    of_plain, of_capture = entered.call_args_list
    assert of_plain == of_capture
    assert of_capture.args == (graph.call_args.kwargs["stream"],)

def test_a_policy_on_the_cpu_leaves_a_gpu_alone(policy):
    expected = sample(policy, 3, 20)
    with patch("torch.cuda.is_available", return_value=True):
        cpu = Policy(policy.config)
        cpu.hf.load_state_dict(policy.hf.state_dict())
        with patch("torch.cuda.Stream", side_effect=RuntimeError), patch("torch.cuda.CUDAGraph", side_effect=OSError):
            assert tokens(sample(cpu, 3, 20)).equal(tokens(expected))

@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_sampling_waits_for_the_device_once_in_16_tokens(policy, length):
    class Count(TorchDispatchMode):
        waits = 0
        def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
            self.waits += kernel.overloadpacket.__name__ in WAITS
            return kernel(*args, **(kwargs or {}))

    policy.stop_ids = set()
    waits = {}
    for n in (1, length):
        with Count() as count:
            completions = sample(policy, 2, n)
        waits[n] = count.waits
        assert [len(c.token_ids) for c in completions] == [n, n]
    assert waits[length] - waits[1] == (length - 1) // 16

def test_rows_that_finish_at_once_stay_short(policy):
    policy.stop_ids = set(range(len(policy.tokenizer)))
    for c in sample(policy, 4, 40):
        assert len(c.token_ids) == len(c.logprobs) == 1
        assert c.finished

# ---- Other families of models ----------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
}
SIDES = {"height": 56, "width": 56}

def family_tokenizer(placeholder, **special):
    qwens = "<|vision_start|><|image_pad|><|vision_end|>"
    template = "{{ bos_token }}" + CHAT_TEMPLATE.replace(qwens, placeholder)
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<bos>"}
    words = [*names.values(), *special.values()]
    return byte_tokenizer(words, template, extra_special_tokens=special, **names)

def qwen3_vl():
    qwen2, tokenizer, images = build_backbone()
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer),
                     "rope_parameters": qwen2.config.text_config.rope_parameters},
        vision_config={**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64,
                       "deepstack_visual_indexes": [0, 1]},
        image_token_id=qwen2.config.image_token_id,
    )
    return transformers.Qwen3VLForConditionalGeneration(config), tokenizer, images

def gemma3():
    tokenizer = family_tokenizer("<img>", boi_token="<img>", image_token="<soft>", eoi_token="</img>")
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "sliding_window": 8, "sliding_window_pattern": 2},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=4,
    )
    images = transformers.Gemma3ImageProcessorPil(size=SIDES)
    processor = transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    return transformers.Gemma3ForConditionalGeneration(config), processor

def llava_next():
    tokenizer = family_tokenizer("<image>", image_token="<image>")
    points = [[56, 112], [112, 56]]
    config = transformers.LlavaNextConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        image_grid_pinpoints=points,
        image_token_index=3,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=SIDES, image_grid_pinpoints=points)
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template)
    return transformers.LlavaNextForConditionalGeneration(config), processor

def randomize(weights):
    for weight in weights:
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)

def save_family(build, folder):
    """A tiny checkpoint with random weights, in which no matrix is zero, as Gemma 3's projector is at first."""
    torch.manual_seed(0)
    model, *parts = build()
    randomize(model.parameters())
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize("build", [qwen3_vl, gemma3, llava_next])
def test_other_families_sample_score_and_train(world, tmp_path, build):
    model = save_family(build, tmp_path / "model")
    config = Config(**train_settings(world, tmp_path, model=model, total_steps=2))
    policy = Policy(config)
    weights = policy.lora_weights("solver")
    assert len(weights) == 2 * 7 * 2
    randomize(weights)
    check_scores(policy, "solver")
    check_captured(policy, "solver")
    run = ir.train(config)
    assert "grad_norm_proposer" in metrics(run)[1]

# ---- Update ----------------------------------------------------------------------------------------------------------

def batch_of(policy, role):
    """Three prompts, and five completions of each."""
    prompts = encode_prompts(policy, [Prompt(image(i), QUESTION) for i in range(3)])
    completions = policy.sample(role, prompts, 5, 30, seed=9)
    return prompts, completions

def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])

def test_an_update_makes_better_rollouts_likelier_in_its_role_and_changes_nothing_else(policy):
    """Fault 3: the released code switches adapters before the backward pass, and its Proposer never changes."""
    policy.config = dataclasses.replace(policy.config, lr=1e-3)
    learners = {role: ir.Learner(policy, role) for role in ir.ROLES}
    for role, learner in learners.items():
        prompts, completions = batch_of(policy, role)
        before = copy.deepcopy(policy.hf.state_dict())
        group = (role, prompts[0], completions[0])
        old = policy.score(*group).logprobs[0]
        learner.update(prompts, completions, [[1.0, 0.0, 0.0, 0.0, 0.0]] * 3)
        new = policy.score(*group).logprobs[0]
        assert new.mean() > old.mean()
        moved = set()
        for name, weight in policy.hf.state_dict().items():
            if not torch.equal(weight, before[name]):
                moved.add(name.split(".")[-2])  # an adapter's names end in .ROLE.weight
        assert moved == {role}

@pytest.mark.parametrize("role, kind, score_rollouts", [
    ("solver", "ema", 2),
    ("solver", "group", 1),
    ("proposer", "group", 5)])
def test_an_update_is_one_optimizer_step_over_all_rollouts(policy, monkeypatch, role, kind, score_rollouts):
    """Fault 8: the released code takes one optimizer step per rollout, under a baseline that moves in between. Small
    gradient passes must not change the sum: advantages computed from a pass of one rollout would all be 0."""
    policy.config = dataclasses.replace(
        policy.config, advantage=kind, score_rollouts=score_rollouts, grad_clip=0.05)
    learner = ir.Learner(policy, role)
    prompts, completions = batch_of(policy, role)
    rewards = torch.linspace(0, 1, 15).square().reshape(3, 5)
    losses = []
    for prompt, replies, r in zip(prompts, completions, rewards):
        weights = r - rewards.mean()
        if (role, kind) == ("solver", "group"):  # the Proposer has one sample per image, so it keeps the baseline
            weights = (r - r.mean()) / (r.std(correction=0) + 1e-3)
        scores = policy.score(role, prompt, replies)
        losses.append(ir.reinforce_loss(scores.logprobs, scores.kl, weights, learner.beta))
    expected = flat(gradients(sum(losses) / 3, policy, role))
    score = Mock(wraps=policy.score)
    monkeypatch.setattr(policy, "score", score)
    seen = []
    def clip(weights, largest):
        seen.append(flat(weight.grad for weight in weights))
        assert largest == 0.05
        return torch.tensor(0.5)

    with patch.object(torch.nn.utils, "clip_grad_norm_", clip):  # the gradient before it is clipped
        learner.update(prompts, completions, rewards.tolist())
    same(seen[0], expected, atol=1e-6, rtol=1e-3)
    for state in learner.optimizer.state.values():
        assert state["step"] == 1
    for call in score.call_args_list:
        assert len(call.args[2]) <= score_rollouts

def test_only_finite_updates_move_baseline_and_beta_and_five_others_in_a_row_end_training(policy):
    learner = ir.Learner(policy, "solver")
    learner.baseline = 0.5
    prompts, completions = batch_of(policy, "solver")
    stats = learner.update(prompts, completions, [[1.5] * 5] * 3)
    beta = ir.adapt_kl_coef(stats["beta"], stats["kl"])
    broken = [[math.nan] * 5] * 3
    for _ in range(4):
        assert learner.update(prompts, completions, broken)["skipped"]
    assert not learner.update([], [], [])
    with pytest.raises(UserError, match="not finite in 5 updates in a row"):
        learner.update(prompts, completions, broken)
    assert learner.baseline == pytest.approx(0.6)
    assert learner.beta == beta

@pytest.mark.parametrize("name, mode, ink, level", [
    ("print.jpg", "CMYK", (0, 0, 0, 127), 128),
    ("half.png", "RGBA", (0, 0, 0, 128), 127),
    ("deep.png", "I;16", 32768, 128)])
def test_load_image_reads_every_mode_as_upright_rgb_on_white(tmp_path, name, mode, ink, level):
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    turned[0x0131] = "abc"  # software
    of_another_type = turned.tobytes().replace(b"\x31\0\2\0\0\0\4", b"\x31\0\x0b\0\0\0\1")  # a number
    Image.new(mode, (16, 8), ink).save(tmp_path / name, exif=of_another_type)
    loaded = ir.load_image(tmp_path / name)
    assert loaded.size == (8, 16)
    assert loaded.getpixel((1, 1)) == pytest.approx([level] * 3, abs=8)

def test_list_images_finds_every_image_once(tmp_path):
    for name in ("a/1.png", "a/sub/2.JPG", "a/.3.png", "a/.hidden/4.png", "a/5.txt", "b/6.bmp"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "c").symlink_to(tmp_path / "b")
    found = ir.list_images([str(tmp_path / name) for name in ("b", "a", "a/sub", "c")])
    assert [path.name for path in found] == ["6.bmp", "1.png", "2.JPG"]

def shown_images(paths, count):
    return [ir.load_next_image(paths, 0, slot)[0] for slot in range(count)]

def test_the_images_are_permuted_every_epoch_and_unreadable_ones_replaced(world, tmp_path):
    folder = shutil.copytree(world / "images", tmp_path / "images")
    paths = ir.list_images((folder,))[:6]
    order = shown_images(paths, 12)
    assert sorted(order[:6]) == sorted(order[6:]) == list(paths)
    assert order[:6] != order[6:]
    broken = paths[2]
    broken.write_bytes(b"broken")
    for path, planned in zip(shown_images(paths, 12), order):
        assert path != broken
        assert planned in (path, broken)

def trained(world, folder, reward=ir.group_rewards, **more):
    return ir.train(Config(**train_settings(world, folder, **more)), reward)

def fake_sample(monkeypatch, reply):
    """Both roles say reply(prompt)."""
    def sample(role, prompts, n, *_, **__):
        groups = []
        for prompt in prompts:
            groups.append([Completion([1], torch.zeros(1), reply(prompt), True) for _ in range(n)])
        return groups
    monkeypatch.setattr(Policy, "sample", Mock(side_effect=sample))

def test_training_writes_what_the_figures_need(straight_run):
    rows = list(ir.read_jsonl(straight_run / "metrics.jsonl"))
    groups = list(ir.read_jsonl(straight_run / "rollouts.jsonl"))
    assert rows[-1]["lambda"] == pytest.approx(0.7)
    assert abs(rows[0]["kl_solver"]) < 1e-6 < rows[-1]["kl_solver"]
    keys = "entropy density step_cosine r_sol r_ans r_step group_size comparable_steps num_steps invalid majority"
    for row in rows:
        assert ("kl_proposer" in row) == (row["step"] % 2 == 0)
        sampled = sum(group["tokens"] for group in groups if group["step"] == row["step"])
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(sampled)
        asked = [group for group in groups if group["step"] == row["step"] and group["question"]]
        for key in keys.split():
            values = [value for group in asked for value in ir.numbers(group[key], 3)]
            assert row[key] == pytest.approx(fmean(values)), key

def test_a_signal_saves_and_resume_is_bit_for_bit(world, straight_run, tmp_path):
    """Fault 4: the released code loses both adapters when it resumes, and starts the warm-up of lambda again. This run
    also does without the collapse watch, which must not alter a number."""
    def interrupted_solve(policy, asked, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        solve(policy, asked, step)

    solve = ir.solve
    with patch.object(ir, "solve", interrupted_solve):
        assert ir.main(flags(train_settings(world, tmp_path, watch_every=0))) == 2
    assert (tmp_path / "run/step_000004").exists()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": "x"}\n')  # foreign rows
        file.write('{"step": 5, "torn')  # as if it had been killed while it wrote a row
    run = trained(world, tmp_path, resume=True, watch_every=0)
    assert len(metrics(run)) == 6
    ours = adapters(run / "step_000006")
    theirs = adapters(straight_run / "step_000006")
    same(ours, theirs, atol=0, rtol=0)

def test_resume_goes_on_with_the_next_images_also_to_another_length(
        world, straight_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(straight_run, tmp_path / "run")
    shutil.copytree(run / "step_000003", run / "step_000003_mine")  # no checkpoint of the program
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # it is optional
    for steps in (7, 8):
        trained(world, tmp_path, total_steps=steps, images_per_rank=5,
                keep_checkpoints=2, wandb="mine", resume=True)
    assert re.findall(r"--total_steps (\d) there, (\d) here", capsys.readouterr().out) == [("6", "7"), ("7", "8")]
    assert metrics(run)[:6] == metrics(straight_run)
    images = [Path(row["image"]) for row in ir.read_jsonl(run / "rollouts.jsonl")]
    paths = ir.list_images((world / "images",))
    assert images == shown_images(paths, 34)  # 6 steps of 4 images, then 2 of 5
    assert ir.list_checkpoints(run) == [run / "step_000008", run / "step_000007"]
    assert (run / "step_000003_mine/trainer_state.pt").exists()
    first, second = wandb.init.call_args_list
    assert first.kwargs["id"] == second.kwargs["id"]
    assert wandb.log.call_count == 2
    assert wandb.finish.call_count == 2  # or W&B calls the run crashed

def test_a_signal_while_the_model_loads_ends_at_once(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ir, "Policy", lambda config: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    assert ir.main(flags(train_settings(world, tmp_path))) == 2
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "ireasoner: interrupted\n"

def test_the_end_of_a_log_is_read_alone(tmp_path):
    rows = [{"n": n, "text": "é" * n} for n in range(100)]
    ir.append_jsonl(tmp_path / "log", rows)
    last = list(ir.read_jsonl(tmp_path / "log", tail=5000))
    assert 2 < len(last) < 50
    assert last == rows[-len(last):]

def test_a_resumed_run_tells_that_the_folder_holds_more_images(world, straight_run, tmp_path, capsys):
    shutil.copytree(straight_run, tmp_path / "run")
    images = shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(images / "0000.png", images / "more.png")
    trained(world, tmp_path, data=str(images), total_steps=7, resume=True)
    assert "there were 24 images before" in capsys.readouterr().out

@pytest.mark.parametrize("owner, name, error, advice", [
    (torch, "save", OSError("No space left"), "--resume goes on"),
    (Policy, "score", torch.OutOfMemoryError("2 GiB\nmore"), "Lower .*--score_rollouts")])
def test_a_full_disk_or_gpu_ends_training_in_one_line(world, tmp_path, capsys, owner, name, error, advice):
    arguments = [*flags(train_settings(world, tmp_path)), "--resume"]
    with patch.object(owner, name, side_effect=error):
        assert ir.main(arguments) > 0
    assert re.fullmatch(f"ireasoner: .*{advice}.*\n", capsys.readouterr().err)
    assert ir.main(arguments) == 0
    assert len(metrics(tmp_path / "run")) == 6

def test_no_model_output_stops_training(world, tmp_path, monkeypatch, capsys):
    tags = "<think> </think> <answer> </answer> <question> </question> <|image_pad|> <|im_end|> \\boxed{ } ? -5"
    pieces = [*tags.split(), "Step 1:", "Step 2:" * 30, "\n", "\0", "\ud800", "日本"]

    rng = random.Random(0)
    def garbage(prompt):
        count = rng.randint(0, 20)
        return "".join(rng.choices(pieces, k=count))

    fake_sample(monkeypatch, garbage)
    with patch.object(ir, "say"):  # no terminal prints a lone surrogate, unless `main` tells it how
        trained(world, tmp_path, images_per_rank=12, show_every=1, watch_every=1)

def test_any_text_is_printed_on_any_terminal(world, tmp_path, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    fake_sample(monkeypatch, lambda prompt: "<question>日\ud800?</question>")
    assert ir.main(flags(train_settings(world, tmp_path, total_steps=2))) == 0
    assert b"\\u65e5\\ud800?" in ascii_only.buffer.getvalue()

def test_a_step_without_a_question_says_so(world, tmp_path, monkeypatch, capsys):
    fake_sample(monkeypatch, lambda prompt: "no idea")
    trained(world, tmp_path, total_steps=1)
    out = capsys.readouterr().out
    assert "1/1 | no proposal held a question" in out
    assert "nan" not in out

# ---- A reward of one's own, the watch for collapse, tools and bad input ----------------------------------------------

@pytest.fixture(scope="session")
def good_question(world):
    """A line of a file of questions."""
    return {"image": str(world / "holdout" / "0000.png"), "question": "?", "answer": 7}

def test_training_logs_every_term_of_a_reward_of_ones_own(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ir, "parse_question", Mock(side_effect=["Why?", None, "Why?", None]))
    terms = {
        "r_sol": torch.tensor([1.0, 0.0, 0.5]),
        "r_prop": 0.8,
        "length": [1, math.nan, 3],
        "note": "a text",  # which has no mean
    }
    reward = Mock(return_value=terms)
    run = trained(world, tmp_path, reward, total_steps=1, proposer_every=1)
    assert reward.call_args.args[-1] == "Why?"
    [means] = metrics(run)
    assert means.items() >= {
        "r_sol": 0.5,
        "r_prop": 0.4,  # an image without a question pays the Proposer nothing
        "baseline_solver": 0.5,
        "baseline_proposer": 0.4,
        "length": 2,
    }.items()
    first = next(ir.read_jsonl(run / "rollouts.jsonl"))
    assert first["length"] == [1, None, 3]

@pytest.mark.parametrize("culprit, rewards", [
    ("r_sol", None),  # as of a function that forgets its return
    ("r_sol", {"r_sol": [1, 1], "r_prop": 1}),
    ("r_sol", {"r_sol": [1, math.nan, 1], "r_prop": 1}),
    ("r_prop", {"r_sol": [1, 1, 1], "r_prop": math.nan}),
    ("votes", {"r_sol": [1, 1, 1], "r_prop": 1, "votes": 3}),
    ("kl_solver", {"r_sol": [1, 1, 1], "r_prop": 1, "kl_solver": 3}),
])
def test_a_reward_that_cannot_train_is_refused_by_name(world, tmp_path, monkeypatch, culprit, rewards):
    fake_sample(monkeypatch, lambda prompt: "<question>Why?</question>")
    with pytest.raises(UserError, match=f"reward: .{culprit}"):
        trained(world, tmp_path, Mock(return_value=rewards))

@pytest.mark.parametrize("words, swapped, distinct", [
    ("7", 5 / 9, 1 / 4),   # says the same of all four pictures
    ("{:.4f}", 0, 1),      # names what it sees
])
def test_the_collapse_watch_tells_boilerplate_from_looking(world, tmp_path, monkeypatch, words, swapped, distinct):
    count = itertools.count()
    def reply(prompt):
        said = words.format(prompt.image.features["pooler_output"][0].sum())
        if prompt.text == ir.proposer_prompt():
            return f"<question>Why {said}?</question>"
        third = "!" if next(count) % 3 == 2 else ""  # of three replies to a prompt the last is another one
        return f"<answer>{said}{third}</answer>"

    fake_sample(monkeypatch, reply)
    [watched] = metrics(trained(world, tmp_path, total_steps=1))
    assert watched["pair_agreement"] == pytest.approx(1 / 3)
    assert watched["swapped_agreement"] == pytest.approx(swapped)
    assert watched["distinct_questions"] == distinct

def test_eval_scores_samples_their_majority_and_greedy_decoding(world, good_question, tmp_path, monkeypatch):
    answers = [7, ["9", "Eight"], "cat"]
    ir.append_jsonl(tmp_path / "questions.jsonl", [good_question | {"answer": answer} for answer in answers])
    said = [
        "87777",  # the rollouts of the first question
        "78778",
        "88797",
        "788",    # greedy decoding of all three
    ]
    replies = iter("".join(said))
    fake_sample(monkeypatch, lambda prompt: f"<answer>{next(replies)}</answer>")
    out = tmp_path / "result.json"
    line = f"eval {tmp_path}/questions.jsonl --model {world}/model --json {out}"
    assert ir.main(line.split()) == 0
    result = json.loads(out.read_text())
    assert result["mean_at_n"] == pytest.approx(6 / 15)
    assert result["maj_at_n"] == pytest.approx(1 / 3)
    assert result["greedy"] == pytest.approx(2 / 3)
    assert result["ci95"]["greedy"] == pytest.approx([0.208, 0.939], abs=1e-3)  # Wilson's interval

def test_ask_prints_the_steps_and_the_answer_of_an_adapter(good_question, straight_run, monkeypatch, capsys):
    fake_sample(monkeypatch, lambda prompt: "1. Look\n2. Say<answer>**Seven**</answer>")
    adapter = straight_run / "step_000006"  # it knows its model
    assert ir.main(["ask", good_question["image"], "?", "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out == "Step 1: Look\nStep 2: Say\nAnswer: **Seven**\n"
    assert Policy.sample.call_args.args[0] == "solver"
    assert Policy.sample.call_args.kwargs == {"temperature": 0.0}

def test_report_draws_the_figures_with_all_runs_in_each(straight_run, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    run = shutil.copytree(straight_run, tmp_path / "$_$")
    with patch.object(figure, "savefig", autospec=True, side_effect=figure.savefig) as save:
        assert ir.main(["report", str(straight_run), str(run), "--out", str(tmp_path / "report.png")]) == 0
    axes = {one.get_ylabel(): one for one in save.call_args.args[0].axes}
    for key in "entropy density step_cosine r_prop r_sol r_ans r_step num_steps lambda beta_solver kl_proposer".split():
        labeled = [line for line in axes[key].lines if not line.get_label().startswith("_")]
        assert len(labeled) == 2
    assert "D_j = 1" in axes["rollout i of the majority"].get_xlabel()

def test_report_smooths_long_runs_and_keeps_each_value(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    values = [float(step % 2) for step in range(1, 101)]
    ir.append_jsonl(tmp_path / "metrics.jsonl", [{"step": i + 1, "entropy": v} for i, v in enumerate(values)])
    with patch.object(figure, "savefig", autospec=True) as save:
        assert ir.main(["report", str(tmp_path)]) == 0
    smooth, raw = save.call_args.args[0].axes[1].lines
    assert raw.get_ydata().tolist() == values
    assert smooth.get_xdata()[0] == 5  # the mean of the first five
    assert smooth.get_ydata().tolist()[:2] == pytest.approx([0.6, 0.4])

def test_the_file_trains_without_its_tools(world, tmp_path, monkeypatch):
    paper, _ = Path(ir.__file__).read_text().split("# ==== The paper ends here.")
    module = type(ir)("paper")
    monkeypatch.setitem(sys.modules, "paper", module)
    exec(paper, module.__dict__)
    settings = train_settings(world, tmp_path, total_steps=1)
    assert module.train(module.Config(**settings)) == tmp_path / "run"

@pytest.mark.parametrize("flaw", [
    {"answer": None},
    {"answer": ["7", ""]},
    {"question": " "},
    {"image": "gone.png"},
])
def test_a_bad_line_of_a_question_file_is_refused_by_number(good_question, tmp_path, flaw):
    file = tmp_path / "questions.jsonl"
    ir.append_jsonl(file, [good_question, good_question | flaw])
    with pytest.raises(UserError, match="questions.jsonl line 2"):
        load_questions(file)

@pytest.fixture(scope="session")
def broken(world, straight_run, good_question, tmp_path_factory):
    """A folder of damaged models, adapters, runs and files."""
    folder = tmp_path_factory.mktemp("broken")
    model = world / "model"

    def lacking(file, original, name):
        """Copies a folder without one of its files. Returns where that file was."""
        copy = shutil.copytree(original, folder / name)
        (copy / file).unlink()
        return copy / file

    lacking("tokenizer.json", model, "no_tokenizer")
    lacking("chat_template.jinja", model, "no_template")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking("model.safetensors", model, "no_weight"), {"format": "pt"})
    settings = (model / "config.json").read_text()
    settings = settings.replace('"hidden_size"', '"final_logit_softcapping": 30, "hidden_size"')
    lacking("config.json", model, "capped").write_text(settings)

    lacking("step_000006/solver/adapter_model.safetensors", straight_run, "half")
    adapter = "step_000006/solver/adapter_model.safetensors"
    matrices = load_file(straight_run / adapter)
    next(iter(matrices.values())).fill_(math.nan)
    save_file(matrices, lacking(adapter, straight_run, "not_finite"), {"format": "pt"})
    adapter = "step_000006/solver/adapter_config.json"
    settings = (straight_run / adapter).read_text()
    lacking(adapter, straight_run, "other_rank").write_text(settings.replace('"r": 16', '"r": 8'))
    # an object where numbers and tensors should be: unpickling one could run anything
    torch.save(Path(), lacking("step_000006/trainer_state.pt", straight_run, "evil"))
    (folder / "thin").mkdir()
    Image.new("RGB", (1000, 4)).save(folder / "thin" / "a.png")
    adapter = json.loads((straight_run / "step_000006/solver/adapter_config.json").read_text())
    for name, change in (("rslora", {"use_rslora": True}), ("moved", {"base_model_name_or_path": "/gone/model"})):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(adapter | change))
    ir.append_jsonl(folder / "good.jsonl", [good_question])
    with ir.open_run(Config(**train_settings(world, folder, run_name="busy"))):  # as another run holds its folder
        yield folder

def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}

@pytest.mark.parametrize("case", [  # command line -> what its error says
    "trian -> trian: no such command",
    "ask a -> question",
    "ask thin/a.png ? -> a.png: .*too narrow",
    "eval good.jsonl --adapter thin -> thin: no usable",
    "eval good.jsonl --adapter half/step_000006/proposer -> a Proposer, which answers nothing",
    "eval good.jsonl --adapter rslora -> rslora: .*a kind of LoRA",
    "eval good.jsonl --adapter moved -> moved: its backbone is not at /gone",
    "ask a.png What is it -> unrecognized arguments: is it",
    "study good.jsonl -> good.jsonl: is a file",
    "study new --rows group:evolm -> --rows group:evolm",
    "study new --rows ema:evolmm --lambda_max 0.5 -> --lambda_max: the row ema:evolmm sets it",
    "demo --model x -> demo --model: the demo makes its own",
    "bench --steps 0 -> --steps 0: must be at least 1",
    "premise --questions 0 --model x -> --questions 0",
    "premise --replies half/new/file --model x -> --replies half/new/file: must",
    "eval good.jsonl --adapter not_finite/step_000006 -> not_finite/step_000006/solver: .*not finite",
    "eval good.jsonl --adapter other_rank/step_000006 -> other_rank/step_000006/solver: .*size mismatch",
    "eval good.jsonl --json ./good.jsonl -> --json ./good.jsonl: must be a new file",
    "report half -> pip install matplotlib",
    "--wandb p -> --wandb p: .*pip install",
    "--num_rolouts 3 -> unrecognized arguments: --num_rolouts",
    "--preset evolm -> --preset: invalid choice: 'evolm'",
    "--lr x -> --lr: .*x",
    "--lora_r 1000000 -> --lora_r 1000000 .LoRA rank.*: must be in .1, 1024",
    "--kl_coef_min 0.5 -> --kl_coef 0.001: .*--kl_coef_min",
    "--device cuda:99 -> --device cuda:99: .*sees \\d+ GPUs",
    "--data images/*.png -> --data images/\\*.png: is not a folder",
    "--data good.jsonl -> --data good.jsonl: is not a folder",
    "--data half -> --data half: holds no images",
    "--data thin -> none of the 1 image files",
    "--model ./nowhere -> --model ./nowhere: no such folder",
    "--model half/step_000006/solver -> that is an adapter: give it as --adapter",
    "--model half/step_000006 -> that is an adapter: give it as --adapter",
    "--model no_tokenizer -> no_tokenizer: not a complete",
    "--model no_template -> no_template: .*no chat template",
    "--model no_weight -> no_weight: .* lack 1 weights, such as .*1.mlp.up_proj.weight",
    "--model capped -> capped: .*its logits are not lm_head",
    "--run_name ../x -> --run_name '../x'",
    "--run_name thin --resume -> thin: holds other files and no run",
    "--run_name half -> half: holds a run already. Add --resume",
    "--run_name half --gamma 0.1 --resume -> --gamma 0.7 there, 0.1 here",
    "--run_name half --resume -> half/step_000006/solver",
    "--run_name evil --resume -> evil/step_000006: damaged",
    "--run_name busy -> busy: another run",
    "--images_per_rank 0 -> --images_per_rank 0 .*: must be in .1, 4096",
    "--output_dir good.jsonl -> good.jsonl/run: cannot be made",
])
def test_bad_input_gets_one_line_and_status_2_and_loses_nothing(world, broken, monkeypatch, capsys, case):
    monkeypatch.chdir(broken)
    for package in ("wandb", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    line, words = case.split(" -> ")
    arguments = line.split(" ")
    if line.startswith("--"):
        arguments = flags(train_settings(world, ".")) + arguments
    before = snapshot(broken)
    assert ir.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"(warning: skipping .*\n)?ireasoner: .*{words}.*\n", error)
    assert snapshot(broken) == before

# ---- README ----------------------------------------------------------------------------------------------------------

def readme_blocks(language):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)

def readme_example(marker):
    """The block of Python in README.md that contains the marker."""
    [block] = [block for block in readme_blocks("python") if marker in block]
    return block

def on_tiny_model(code, world, run):
    """The same code on the tests' model and run."""
    code = code.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(world / "model"))
    return code.replace("runs/ireasoner_seed0/step_002500", str(run / "step_000006"))

@pytest.mark.parametrize("page", ["README.md", ".github/study/README.md"])
def test_links_lead_to_files_that_are_shipped(page):
    links = re.findall(r"\]\(([^)]+)\)", (HERE / page).read_text(encoding="utf-8"))
    files = [link for link in links if not link.startswith("https://")]
    assert files
    for file in files:
        assert (HERE / page).parent.joinpath(file.split("#")[0]).exists(), file

def test_readme_walks_through_the_equations(capsys):
    exec(readme_example("ir.answer_distribution"), {})
    assert capsys.readouterr().out in readme_blocks("text")

def test_readme_reward_for_trl_pays_groups_of_any_size():
    names = {}
    exec(readme_example("make_agreement_reward"), names)
    model = Mock(get_input_embeddings=lambda: torch.nn.Embedding(300, 8))
    reward = names["make_agreement_reward"](model, byte_tokenizer([], ""))
    agreeing = "<think>Step 1: two\nStep 2: 2 + 2 = 4</think><answer>4</answer>"
    as_chat = [{"role": "assistant", "content": agreeing}]
    texts = [agreeing, agreeing, "<answer>5</answer>", as_chat, "no answer", "Step 1:\nStep 2: a<answer>5</answer>"]
    paid = reward(["a", "a", "a", "b", "b", "c"], texts, column=[1] * 6)
    in_majority = (2 / 3) ** 0.7  # r_ans; and r_step, since both steps have cosine 1
    expected = [in_majority, in_majority, 0.3 * (1 / 3) ** 0.7, 0.3 * 0.5 ** 0.7, 0.0, 0.3]
    assert paid == pytest.approx(expected, abs=1e-5)

def test_readme_reward_of_ones_own(world, tmp_path):
    settings = train_settings(world, tmp_path, total_steps=1)
    code = readme_example("short_answers").replace('data="images"', "**settings")
    exec(code.replace("<= 3", "<= 0"), {"settings": settings})  # no answer is that short
    [row] = metrics(tmp_path / "run")
    assert row["r_sol"] == 0
    assert row["short"] == row["invalid"]

def test_readme_example_merges_an_adapter_into_its_backbone(world, straight_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(on_tiny_model(readme_example("merge_and_unload"), world, straight_run), {})
    merged = transformers.AutoModelForImageTextToText.from_pretrained("merged")
    policy = Policy(Config(model=str(world / "model")))
    policy.load("solver", straight_run / "step_000006" / "solver")
    reply = Completion([9, 8, 7, 6], torch.zeros(0), "", False)
    prompt = Prompt(image(1), "Hi.")
    [ours] = plain_logits(merged, policy, prompt, [reply])
    with policy.adapter("solver"):
        [expected] = plain_logits(policy.hf, policy, prompt, [reply])
    with policy.adapter(None):
        [plain] = plain_logits(policy.hf, policy, prompt, [reply])
    assert (ours - expected).norm() < 1e-3 * (ours - plain).norm()

def test_readme_example_from_adapter_to_answer(world, straight_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image(1).save("photo.jpg")
    exec(on_tiny_model(readme_example("AutoImageProcessor"), world, straight_run), {})
    theirs = ir.parse_rollout(capsys.readouterr().out)
    assert ir.main(["ask", "photo.jpg", "How many chairs?", "--adapter", str(straight_run / "step_000006")]) == 0
    assert theirs.steps
    assert capsys.readouterr().out.startswith(f"Step 1: {theirs.steps[0]}")

# ---- Ranks and faults: real processes with gloo. A start takes seconds, so it serves several tests -------------------

def run_8gpu(ranks, settings, scene=None, restarts=3, meanwhile=None):
    """run_8gpu.sh on the CPU. With a scene, every rank calls that function of this file in place of ireasoner.py.
    `meanwhile` is called with the process while it runs."""
    folder = HERE
    if scene:
        folder = Path(settings["output_dir"])
        shutil.copy(HERE / "run_8gpu.sh", folder)
        script = f"import sys\nsys.path[0] = {str(HERE)!r}\nimport {scene.__module__} as tests\n"
        call = f"if '--dry_run' not in sys.argv:\n    sys.exit(tests.{scene.__name__}(sys.argv[1:]))\n"
        (folder / "ireasoner.py").write_text(script + call)
    environment = {"NPROC": str(ranks), "MAX_RESTARTS": str(restarts), "DEVICE": "cpu", "PYTHON": sys.executable}
    command = [folder / "run_8gpu.sh", *flags(settings)]
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | environment}
    process = subprocess.Popen(command, **options)
    if meanwhile:
        meanwhile(process)
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, error)

def before(owner, name, act):
    """From now on owner.name first calls act with its arguments."""
    function = getattr(owner, name)
    def act_first(*args):
        act(*args)
        return function(*args)
    setattr(owner, name, act_first)

def end_this_process():
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)

def killed_three_times(arguments):
    """One rank dies while the run folder is made, within step 2, and with half of the checkpoint of step 4 written."""
    def rename(old, new):
        if Path(new).name == "config.json":
            end_this_process()

    def solve(policy, asked, step, *key):
        if step == 2:
            end_this_process()

    def save(state, file):
        if state["step"] == 4:
            file.write_bytes(b"half a checkpoint")
            end_this_process()

    faults = {  # (life, rank) -> fault
        ("0", "0"): (os, "rename", rename),
        ("1", "1"): (ir, "solve", solve),
        ("2", "0"): (torch, "save", save),
    }
    fault = faults.get((os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]))
    if fault:
        before(*fault)
    return ir.main(arguments)

def rank_two_rests(propose, *args):
    """As ir.propose, but the third of the four images of a step never gets a question."""
    episodes = propose(*args)
    for episode in episodes:
        if episode.slot == 2:
            episode.question = None
    return episodes

def four_ranks(arguments):
    """Four goes on with a run. Stopped does so too, and one rank gets a SIGTERM in step 5. In nan, losses of one rank
    are NaN. At last one rank has a bug."""
    config = Config(**ir.Parser("train", ir.ALL_SETTINGS).read(arguments)[0])
    ir.propose = functools.partial(rank_two_rests, ir.propose)
    ir.train(dataclasses.replace(config, run_name="four"))

    loss = ir.reinforce_loss
    def nan_loss(*args):
        finished_steps = len(metrics(Path(config.output_dir, "nan")))
        if ir.rank() == 1 and finished_steps not in (0, 3):
            return loss(*args) * math.nan
        return loss(*args)

    with patch.object(ir, "reinforce_loss", nan_loss), pytest.raises(UserError, match="5 updates in a row"):
        ir.train(dataclasses.replace(config, run_name="nan", total_steps=20, proposer_every=100))

    def preempt(policy, asked, step, *key):
        if step == 5 and ir.rank() == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before(ir, "solve", preempt)
    stopped = dataclasses.replace(config, run_name="stopped")
    with pytest.raises(UserError, match="after step 5, which is saved"):
        ir.train(stopped)
    ir.train(stopped)

    def bug(*args):
        if ir.rank() == 3:
            raise ZeroDivisionError("a bug")

    before(ir, "solve", bug)
    ir.main(arguments)

@pytest.fixture(scope="session")
def four(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    with patch.object(ir, "propose", functools.partial(rank_two_rests, ir.propose)):
        one = trained(world, folder, run_name="one")
    for name in ("four", "stopped"):
        shutil.copytree(one, folder / name, ignore=shutil.ignore_patterns("step_000006"))
    settings = train_settings(world, folder, images_per_rank=1, save_every=1)
    return folder, run_8gpu(4, settings, four_ranks, restarts=0)

def texts(run):
    return [row["texts"] for row in ir.read_jsonl(run / "rollouts.jsonl")]

def assert_same_numbers(one, two):
    """The adapters are as close as AdamW, which magnifies rounding, lets them be."""
    assert texts(one) == texts(two)
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    ours = adapters(one / "step_000006")
    for key, theirs in adapters(two / "step_000006").items():
        assert (ours[key] - theirs).norm() <= 1e-4 * ours[key].norm()

def assert_same_bits(one, two):
    assert metrics(one) == metrics(two)
    assert texts(one) == texts(two)
    same(adapters(one / "step_000006"), adapters(two / "step_000006"), atol=0, rtol=0)

def test_four_ranks_go_on_with_a_run_of_one_though_one_of_them_never_finds_a_question(four):
    folder, process = four
    assert texts(folder / "four")[2::4] == [[]] * 6, process.stderr
    assert_same_numbers(folder / "one", folder / "four")

def test_a_signal_to_one_rank_saves_on_all_and_resume_is_bit_for_bit(four):
    """Sums over more than two ranks depend on their order, which must be the same after a start."""
    folder, process = four
    assert re.findall(r"/stopped; resumed after step (\d)", process.stdout) == ["3", "5"], process.stderr
    assert_same_bits(folder / "four", folder / "stopped")

def test_a_loss_that_is_nan_on_one_rank_makes_all_skip_and_five_in_a_row_end_training(four):
    folder, process = four
    assert [row["skipped_solver"] for row in metrics(folder / "nan")] == [0, 1, 1, 0, 1, 1, 1, 1], process.stderr
    same(adapters(folder / "nan/step_000006"), adapters(folder / "nan/step_000008"), atol=0, rtol=0)

def test_a_bug_in_one_rank_ends_all_and_keeps_its_traceback(four):
    folder, process = four
    assert process.returncode == 1
    assert re.search(r", in train\n[\s\S]*ZeroDivisionError: a bug\n", process.stderr), process.stderr

@slow
def test_ranks_give_the_numbers_of_one_process_however_often_they_are_killed(world, straight_run, tmp_path):
    settings = train_settings(world, tmp_path, images_per_rank=2, save_every=1)
    calm = run_8gpu(2, settings | {"run_name": "calm"})
    assert "2 rank(s)" in calm.stdout, calm.stderr
    killed = run_8gpu(2, settings | {"run_name": "killed"}, killed_three_times)
    assert re.findall(r"resumed after step (\d)", killed.stdout) == ["1", "3"], killed.stderr
    assert_same_numbers(straight_run, tmp_path / "calm")
    assert_same_bits(tmp_path / "calm", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".step_*"))

def full_disk(arguments):
    """No checkpoint can be written."""
    torch.save = Mock(side_effect=OSError("No space left on device"))
    return ir.main(arguments)

@slow
def test_a_full_disk_ends_all_ranks_in_one_line_and_is_not_tried_again(world, tmp_path):
    process = run_8gpu(3, train_settings(world, tmp_path, images_per_rank=1), full_disk)
    assert process.returncode != 0
    assert len(re.findall("^ireasoner: .*No space left.*--resume goes on|^ireasoner: .*", process.stderr, re.M)) == 1
    assert "No space left" in process.stderr
    assert process.stdout.count("from the start") == 1
    assert "RuntimeError" not in process.stderr

@slow
def test_what_rank_zero_refuses_all_refuse_in_one_line(world, straight_run, tmp_path):
    run = shutil.copytree(straight_run, tmp_path / "run")
    before = snapshot(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--max-restarts=2",
               HERE / "ireasoner.py", *flags(train_settings(world, tmp_path))]
    refusals = {"": "holds a run already", "--data=gone": "is not a folder", "--lr=7": "must be in"}
    for more, words in refusals.items():  # the last one before they have joined
        process = subprocess.run([*command, *more.split()], capture_output=True, text=True, timeout=120)
        [said] = re.findall("^ireasoner: .*", process.stderr, re.M)
        assert words in said
        assert process.returncode != 0
    assert snapshot(run) == before

def slow_second_step(arguments):
    def solve(policy, asked, step, *key):
        if step == 2 and not key:
            time.sleep(33)

    before(ir, "solve", solve)
    return ir.main(arguments)

@slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torchrun waits 30 seconds")
def test_a_signal_to_torchrun_in_a_step_of_33_seconds_saves_that_step(world, tmp_path):
    def terminate(process):
        run = tmp_path / "run"
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)

    settings = train_settings(world, tmp_path, images_per_rank=1, watch_every=0)
    process = run_8gpu(2, settings, slow_second_step, meanwhile=terminate)
    assert len(re.findall("^ireasoner: .*stopped by a signal after step 2, which is saved", process.stderr, re.M)) == 1
    assert ir.list_checkpoints(tmp_path / "run") == [tmp_path / "run/step_000002"]
    assert len(metrics(tmp_path / "run")) == 2

def test_the_script_warns_where_ranks_share_cores():
    environment = os.environ | {"DEVICE": "cpu", "NPROC": "3", "PYTHON": "true", "OMP_NUM_THREADS": "1"}
    command = ["taskset", "-c", "0", HERE / "run_8gpu.sh", "demo"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "3 processes share 1 cores" in process.stderr

def test_a_file_system_without_locks_gets_a_warning(world, tmp_path, capsys):
    with patch.object(fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
        trained(world, tmp_path, total_steps=1)
    assert "cannot be locked" in capsys.readouterr().out

def test_the_patch_embedding_is_the_same_as_a_product():
    model, _, _ = build_backbone()
    names = set(model.state_dict())
    proj = model.model.visual.patch_embed.proj
    patches = torch.randn(6, *proj.weight.shape[1:])
    as_convolution = proj(patches).reshape(6, -1)
    policy = Policy(Config(), (model, *build_backbone()[1:]))
    assert type(policy.hf.model.visual.patch_embed.proj) is ir.PatchProduct
    difference = (proj(patches) - as_convolution).abs().max()
    assert difference < 2e-6 * as_convolution.abs().max()
    assert names == {name.replace(".base_layer", "") for name in model.state_dict() if ".lora_" not in name}

# ---- The Hugging Face Hub's cache, and no internet -------------------------------------------------------------------

def hub_cache(model, cache):
    """A cache as an online `from_pretrained` leaves it: blobs, links to them in a snapshot, and the list of all files
    in the repository, of which chat_template.json was never fetched."""
    repository = cache / "models--some--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs", repository / "blobs", repository / "trees"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    listed = {"chat_template.json": {"size": 9, "blob_id": "f" * 40}}
    for file in model.glob("*.*"):  # no folder
        blob = repository / "blobs" / f"{ir.derive_seed(file.name):040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        listed[file.name] = {"size": file.stat().st_size, "blob_id": blob.name}
    (repository / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    return "some/model"

@slow
def test_offline_a_model_of_the_hub_trains_saves_and_answers(world, tmp_path, good_question):
    name = hub_cache(world / "model", tmp_path / "hub")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    settings = train_settings(world, tmp_path, model=name, total_steps=2)
    ir.append_jsonl(tmp_path / "q.jsonl", [good_question])
    adapter = tmp_path / "run/step_000002"
    for line in (flags(settings), ["ask", good_question["image"], "?", f"--adapter={adapter}"],
                 ["eval", tmp_path / "q.jsonl", f"--adapter={adapter}"]):
        command = [sys.executable, HERE / "ireasoner.py", *line]
        process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert process.returncode == 0, process.stderr
    assert (adapter / "solver/tokenizer.json").read_bytes() == (world / "model/tokenizer.json").read_bytes()
    assert json.loads((adapter / "solver/adapter_config.json").read_text())["base_model_name_or_path"] == name

# ---- A copy of the file ----------------------------------------------------------------------------------------------

def edited_copy(folder, *others):
    """mine.py with another prompt, beside other files of the project."""
    folder.mkdir()
    source = Path(ir.__file__).read_text()
    edited = source.replace('"Reply with the question only', '"MY EDIT. Reply with the question only')
    assert edited != source
    (folder / "mine.py").write_text(edited)
    for other in others:
        shutil.copy(HERE / other, folder)
    return folder / "mine.py"

@pytest.mark.parametrize("others, launcher", [
    ([], []),
    (["ireasoner.py", "test_ireasoner.py"], []),
    (["ireasoner.py"], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
])
def test_a_renamed_copy_trains_as_edited(world, tmp_path, others, launcher):
    copy = edited_copy(tmp_path / "code", *others)
    settings = train_settings(world, tmp_path, total_steps=1)
    probe = copy.with_name("probe.py")  # what the copy asked is not in its output: print the prompt of the running module
    probe.write_text(copy.read_text().replace("def propose(policy", "print(proposer_prompt())\ndef propose(policy"))
    command = [sys.executable, *launcher, probe, *flags(settings)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "MY EDIT" in process.stdout
    assert (tmp_path / "run/step_000001").exists()

def test_commands_of_the_tests_file_run_the_copy_that_was_started(tmp_path):
    copy = edited_copy(tmp_path / "code", "ireasoner.py", "test_ireasoner.py")
    with open(tmp_path / "code/test_ireasoner.py", "a") as file:  # a command that asks itself, and a worker as of `study`
        file.write("def asked(*_):\n    return ir.proposer_prompt()\n"
                   "def ask_both(argv):\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
                   "        print(asked(), *pool.map(asked, [0]), torch.get_num_threads(), 'threads')\n"
                   "COMMANDS['bench'] = ask_both\n")
    process = subprocess.run([sys.executable, copy, "bench"], capture_output=True, text=True, timeout=120,
                             env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert process.stdout.count("MY EDIT") == 2, process.stderr
    assert "2 threads" in process.stdout  # that tests take one is no matter of a command's
    lonely = edited_copy(tmp_path / "lonely")
    process = subprocess.run([sys.executable, lonely, "bench"], capture_output=True, text=True, timeout=120)
    assert re.fullmatch("ireasoner: bench: .*test_ireasoner.*\n", process.stderr)
    assert process.returncode == 2

# ---- Study and premise -----------------------------------------------------------------------------------------------

def test_shuffled_permutes_the_step_rewards_of_the_majority_and_changes_nothing_else():
    replies = [f"<think>Step 1: a{i}</think><answer>{answer}</answer>" for i, answer in enumerate("7787577")]
    rollouts = [ir.parse_rollout(reply) for reply in replies]
    embeddings = torch.randn(7, 1, 8, generator=torch.Generator().manual_seed(0))
    group = (rollouts, list(embeddings), 0.4, Config(), "Why?")
    plain = ir.group_rewards(*group)
    control = shuffled(*group)
    r_step = control["r_step"]
    assert r_step == shuffled(*group)["r_step"]
    assert r_step != plain["r_step"]
    assert sorted(r_step) == sorted(plain["r_step"])
    assert r_step[2] == r_step[4] == 0.0  # the two that are not in the majority
    r_sol = 0.6 * numpy.array(plain["r_ans"]) + 0.4 * numpy.array(r_step)
    assert control["r_sol"] == pytest.approx(r_sol)
    assert repr(plain | {"r_step": r_step, "r_sol": control["r_sol"]}) == repr(control)

    paid = numpy.array(noise(*group)["r_step"])
    majority = numpy.array(plain["majority"])
    assert (paid[~majority] == 0).all()
    assert (0.5 * plain["density"] <= paid[majority]).all() and (paid[majority] <= plain["density"]).all()
    assert len(set(paid[majority])) == 5

def test_a_claim_is_true_for_itself():
    true = ["red shows 3", "3 + 9 = 12", "12 is even", "9 is odd"]
    assert all(is_true(step, {"red": 3}) for step in true)
    false = ["", "7 is", "3 + x = 5", "blue shows 3", "red shows 4", "3 + 4 = 9", "9 is even", "red"]
    assert not any(is_true(step, {"red": 3}) for step in false)

def test_a_study_goes_on_after_an_interruption_and_makes_no_run_twice(world, tmp_path, capsys):
    # a dice world that is there already is used
    shutil.copytree(world, tmp_path / "runs" / world_name(0, 0.5))
    line = "--total_steps=2 --save_every=1 --images_per_rank=3 --watch_every=0".split()
    settings = {"total_steps": 2, "save_every": 1, "images_per_rank": 3, "watch_every": 0}
    rows = ["mean:evolmm", "group:shuffled"]
    first, second = [plan_run(tmp_path, row, 0.5, 0, settings) for row in rows]
    solve = ir.solve

    def interrupt(policy, asked, step):
        if step == 2:
            raise KeyboardInterrupt
        solve(policy, asked, step)

    make_run(first)
    made = first[0].stat().st_mtime_ns
    with patch.object(ir, "solve", interrupt), pytest.raises(KeyboardInterrupt):
        make_run(second)
    assert not second[0].exists()
    assert ir.main(["study", str(tmp_path), "--seeds=0", "--cancel=0.5", *line, "--rows", *rows]) == 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert first[0].stat().st_mtime_ns == made
    log = tmp_path / "runs" / f"{second[0].stem}.log"
    assert "resumed after step 1" in log.read_text()
    out = capsys.readouterr().out
    assert "| mean evolmm | 1 |" in out
    assert "| group shuffled | 1 |" in out
    assert ir.main(["study", str(tmp_path), "--seeds=0", "--cancel=0.5", "--rows=mean:evolmm"]) == 2  # without `line`
    assert "made with --" in capsys.readouterr().err

@pytest.mark.parametrize("folder", [".", "earlier"])
def test_the_study_s_page_shows_the_tables_of_its_files(tmp_path, capsys, folder):
    shutil.copytree(HERE / ".github/study" / folder, tmp_path / "study")
    assert ir.main(["study", str(tmp_path / "study"), "--table"]) == 0
    page = (HERE / ".github/study/README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert set(rows) <= set(page)

def test_the_study_s_page_shows_what_premise_says_of_its_replies():
    result = weigh_premise(list(ir.read_jsonl(HERE / ".github/study/replies-0.5b.jsonl")))
    page = (HERE / ".github/study/README.md").read_text(encoding="utf-8")
    for name, of_name in result["likeness"].items():
        pairs = [of_name[label]["paid_more"] for label in ("true over false", "sound over unsound")]
        cells = [of_name["correlation"], *pairs]
        cells = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high, _ in cells]
        assert f"| {name} | {' | '.join(cells)} |" in page

def test_the_study_s_page_shows_what_replies_with_eyes_are():
    lines = defaultdict(lambda: "|")
    for name in ("replies-0.5b", "seen-before", "seen-after"):
        rows = list(ir.read_jsonl(HERE / f".github/study/{name}.jsonl"))[:100]
        for label, numbers in weigh_premise(rows).items():
            if label != "likeness":
                value, low, high, _ = numbers
                lines[label] += f" {value:.2f} [{low:.2f}, {high:.2f}] |"
    readings = defaultdict(list)
    for row in ir.read_jsonl(HERE / ".github/study/read-blindly.jsonl"):
        readings[row["model"]].append((row["grade"] == "S", row["true_readings"], row["readings"]))
    for model in ("told", "before", "after"):
        sound, true, stated = map(sum, zip(*readings[model]))
        lines["30 replies read blindly: sound and complete"] += f" {sound} |"
        lines["their readings of dice that are true"] += f" {true} of {stated} |"
    page = (HERE / ".github/study/README.md").read_text(encoding="utf-8")
    for label, line in lines.items():
        assert f"| {label} {line}" in page

def test_study_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(HERE / ".github/study/earlier", tmp_path / "study")
    assert ir.main(["study", str(tmp_path / "study"), "--table"]) == 0
    assert (tmp_path / "study/study.png").exists()

def test_the_study_table_holds_the_numbers_computed_by_hand(tmp_path, capsys):
    sound_traces = {"evolmm": [0.60, 0.70, 0.80, 0.90], "discrete": [0.70, 0.82, 0.88]}  # seed 3 has no partner
    for reward, shares in sound_traces.items():
        for seed, sound in enumerate(shares):
            judged = {"mean_at_n": 0.5, "trace_mean_at_n": sound, "trace_greedy": sound / 2, "wrong_reason": 0.5}
            result = {"cancel": 0.5, "advantage": "ema", "reward": reward, "seed": seed, "kl": 0.01}
            result |= {"before": judged, "after": judged, "controls": {}, "direct": {"r_step": sound - 0.5}}
            (tmp_path / f"cancel0.5-{reward}-{seed}.json").write_text(json.dumps(result))
    assert ir.main(["study", str(tmp_path), "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # gains 0.10, 0.12, 0.08: standard deviation 0.02, times 4.303 / sqrt(3)
    assert ("| ema discrete | 3 | 0.500 ± 0.000 | 0.800 ± 0.092 | 0.400 ± 0.046 | 0.500 ± 0.000 | 0.010 ± 0.000 | "
            " |  |  |  |  | 0.300 ± 0.092 |  | +0.100 ± 0.050 | +0.050 ± 0.025 |") in lines

def test_covariance_of_pay_and_soundness_between_and_within_questions():
    first = {"majority": [True, True, False], "sound": [True, False, True], "pay": [0.9, 0.5, 0.0]}
    second = {"majority": [True, True, True], "sound": [False, False, False], "pay": [0.1, 0.2, 0.3]}
    # means 0.4 and 0.2; deviations of pay 0.5, 0.1, -0.3, -0.2, -0.1, of soundness 0.8 and four times -0.2
    both = (0.5 * 0.8 - 0.2 * (0.1 - 0.3 - 0.2 - 0.1)) / 5
    within = 2 * 0.2 * 0.5 / 5
    assert covariance([first, second], "pay") == pytest.approx((both - within, within))

@pytest.mark.parametrize("count, t", [(2, 12.706), (5, 2.776), (11, 2.228), (12, 2.201), (21, 2.086), (61, 2.000)])
def test_intervals_are_those_of_students_t(count, t):
    values = [1.0] * count
    values[0] = 2.0  # standard deviation 1 / sqrt(count)
    assert t_interval(values) * count == pytest.approx(t, abs=0.003)

SOUND = [  # about red plus blue plus green, which show 2, 4 and 6; as models write
    "Red shows 2, blue shows 4 and green shows 6. 2 + 4 + 6 = 12. 12 is even.",
    "Step 1: red is 2\nStep 2: 4 + 2 = 6\nStep 3: 6 + 6 = 12\nStep 4: 12 is even",
    "\\[ 2 + 4 + 6 = 12 \\]\nSince $12$ is even, the result is \\boxed{\\text{even}}",
    "Two plus two aside, red plus blue plus green equals 12.",
    "red + blue + green = 2 + 4 + 6 = 12 (even)",
    "**Red die**: 2\n- **Blue die**: 4\n* green: 6\n1. The sum of 2, 4, and 6 is 12.\n2. That is an even number.",
    "The sum of red, blue and green is 12.",
    "Calculate the sum: the red die shows 2 + the blue die shows 4 + the green die shows 6 = 12",
    "Adding 2, 4 and 6 together gives 12. 12 / 2 = 6, so it is even.",
    "The dice show 2, 4 and 6. Their total is 12. 12 divided by 2 is 6 with remainder 0.",
    "To tell whether red plus blue plus green is odd or even, add: 2 + 4 + 6 = 12. 12 % 2 = 0",
    "The sum of blue, red and green is 6 + 2 + 4 = 12.",
    "blue + red + green = 6 + 2 + 4 = 12",
    "4 + 2 + 6 = 12. Let's see whether that is odd or even, 12.\nOdd numbers cannot be divided by 2.",
]
UNSOUND = [
    "The red die shows 2, the blue die shows 4 and the green die shows 6.",
    "red plus blue plus green is even",
    "2 + 4 + 6 = 12. 12 is not an even number.",
    "2 + 4 + 6 = 12. So red plus blue plus green is odd.",
    "7 is not odd. 2 + 4 + 6 = 12",
    "2 + 4 = 8\n8 + 6 = 14\n2 + 4 + 6 = 12",
    "red plus blue is 8, and adding green gives 12",
    "Red shows 4 and blue shows 2. 2 + 4 + 6 = 12",
    "red: 3\nblue: 4\ngreen: 5\n3 + 4 + 5 = 12",
    "Red (3), blue (4), green (6). 2 + 4 + 6 = 12",
    "The sum of red, blue and green is 10.",
    "5 + 7 is equal to: 13. The sum is 12.",
    "2 + 4 + 6 = 12 <answer>even</answer> or 2 + 4 + 6 = 13",
]

@pytest.mark.parametrize("trace", SOUND + UNSOUND)
def test_the_lenient_verifier_tells_true_from_false_traces(trace):
    dice = {"red": 2, "blue": 4, "green": 6}
    assert is_plausibly_sound(f"{trace}<answer>even</answer>", dice, list(dice)) == (trace in SOUND)

def premise_row(**more):
    good = "<think>Step 1: 1 + 2 = 3</think><answer>odd</answer>"
    bad = "<think>Step 1: 1 + 2 = 5</think><answer>odd</answer>"
    return {
        "question": "Is red plus blue even or odd?",
        "dice": {"red": 1, "blue": 2, "green": 6},
        "colors": ["red", "blue"],
        "answer": "odd",
        "texts": [good, bad, bad, good, "no"],
        "greedy": bad,
        "votes": ["odd", "odd", "odd", "odd", None],
        "majority": [True, True, True, True, False],
    } | more

def test_premise_weighs_replies_as_by_hand(capsys):
    first = premise_row(pay={"cosine": [0.9, 0.6, 0.8, 0.7, 0.0]}, grades=["S", "P", "F", None, "F"])
    second = premise_row(pay={"cosine": [0.9, 0.7, 0.3, 0.7, 0.0]})  # with a tie, half a win
    result = weigh_premise([first, second])
    shares = {"invalid": (2, 10), "right, mean@N": (8, 10), "right, maj@N": (2, 2), "right, greedy": (2, 2),
              "sound": (4, 10), "unsound of right": (4, 8)}
    for name, (part, count) in shares.items():
        share = part / count
        assert result[name] == [share, *wilson_interval(share, 2), count]
    cosine = result["likeness"]["cosine"]
    assert cosine["sound over unsound"]["paid_more"] == [6.5 / 8, *wilson_interval(6.5 / 8, 2), 8]
    mean = (0.1 + 0.3) / 2  # standard deviation 0.2 / sqrt(2)
    assert cosine["sound over unsound"]["gap"] == pytest.approx([mean, mean - 1.2706, mean + 1.2706, 2])
    assert cosine["true over false"]["paid_more"][::3] == [1.0, 1]
    assert cosine["true over incomplete"]["gap"][0] == pytest.approx(0.3)
    pay = [*first["pay"]["cosine"][:4], *second["pay"]["cosine"][:4]]
    assert cosine["correlation"][0] == pytest.approx(numpy.corrcoef(pay, [1, 0, 0, 1] * 2)[0, 1])
    rho = 0.8 ** 0.7
    # The good traces have 1, 2 and 3 in common with each other, with the bad ones 1 and 2 of 1, 2, 3 and 5
    assert first["pay"]["numbers"] == pytest.approx([rho * (1 + 0.5 + 0.5) / 3] * 4 + [0])

def test_likenesses_of_traces_are_those_of_a_second_program():
    """`trace_overlap` for those without weights; for words by rarity, one by one."""
    words = ["it is odd", "it is even", "so odd", "1 is odd"]
    texts = [f"<think>Step 1: {words}</think><answer>odd</answer>" for words in words]
    rows = [premise_row(question="Is it?", texts=texts, votes=["odd"] * 4, majority=[True] * 4, pay={})]
    add_likenesses(rows)
    traces = [[text] for text in words]
    for name, pattern in PATTERNS.items():
        expected = ir.step_agreement(ir.trace_overlap(traces, [0, 1, 2, 3], pattern), [0, 1, 2, 3], 4)
        assert rows[0]["pay"][name] == pytest.approx(expected.tolist())
    assert re.findall(PATTERNS["trigrams of words"], "a bc, d e") == ["a bc, d", "bc, d e"]
    weight = {"it": math.log(2), "is": math.log(4 / 3), "odd": math.log(4 / 3)}
    weight |= dict.fromkeys(["even", "so", "1"], math.log(4))
    first = [(weight["it"] + weight["is"]) / sum(map(weight.get, ["it", "is", "odd", "even"])),
             weight["odd"] / sum(map(weight.get, ["it", "is", "odd", "so"])),
             (weight["is"] + weight["odd"]) / sum(map(weight.get, ["it", "is", "odd", "1"]))]
    for name in list(RARITY)[:3]:
        assert rows[0]["pay"][name][0] == pytest.approx(fmean(first))
    # "it" and "is" are the prompt's
    assert rows[0]["pay"]["new words, rare in 8 questions"][1] == 0

def save_text_model(folder):
    tokenizer = byte_tokenizer(SPECIAL, CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=16, num_hidden_layers=1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def test_a_text_model_replies_as_in_transformers(tmp_path):
    save_text_model(tmp_path)
    assert TextModel(Config(model=str(tmp_path), dtype="bfloat16")).hf.dtype == torch.bfloat16
    model = TextModel(Config(model=str(tmp_path)))
    texts = ["Hi.", "A longer prompt, so that the first one is padded."]
    replies = model.sample(None, [Prompt(None, text) for text in texts], 1, 12, temperature=0.0)
    for text, (reply,) in zip(texts, replies):
        chat = model.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                   return_tensors="pt", return_dict=True)
        ids = model.hf.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1]:]
        assert reply.token_ids == ids.tolist()

@pytest.mark.parametrize("described", [False, True])
def test_premise_asks_a_model_keeps_its_replies_and_goes_on(world, tmp_path, capsys, described):
    model = world / "model"
    if described:
        model = tmp_path / "model"
        save_text_model(model)
    arguments = ["premise", f"--model={model}", "--pixels=56", "--max_new_tokens_solver=32"]
    arguments += ["--described"] * described
    for name, questions, batch in (("a", 3, 2), ("b", 2, 8), ("b", 3, 8)):
        out = tmp_path / f"{name}{questions}.json"
        replies = f"--replies={tmp_path / name}"
        assert ir.main([*arguments, f"--questions={questions}", f"--batch={batch}", replies, f"--json={out}"]) == 0
        if questions == 2:  # as if a crash had torn the first line
            _, second = (tmp_path / name).read_text().splitlines()
            (tmp_path / name).write_text(second + "\n")
    assert ir.main(["premise", "--model=other", "--pixels=56", "--questions=4", f"--replies={tmp_path / 'a'}"]) == 2
    assert "a: was made with" in capsys.readouterr().err
    whole, resumed = [json.loads((tmp_path / f"{name}3.json").read_text()) for name in "ab"]
    rows = whole.pop("predictions")
    assert [row["texts"] for row in rows] == [row["texts"] for row in resumed.pop("predictions")]
    assert len(rows) == 3
    for row in rows:
        assert len(set(row["texts"])) > 1
        assert [ir.parse_rollout(text).vote for text in row["texts"]] == row["votes"]
        assert {len(pay) for pay in row["pay"].values()} == {5}
