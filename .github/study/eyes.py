"""Eyes for a language model: gives any Qwen2.5 text model of transformers a small vision tower that sees pictures of
dice, and writes a Qwen2.5-VL checkpoint that `python ireasoner.py --model OUT` trains.

    python .github/study/eyes.py LM_FOLDER OUT [TABLE]

The language model stays as it is, to the last bit and in its dtype. Three stages, stopped at any time and continued by
the same command:
1. descriptions: what should the four visual tokens of a die be? A table of vectors is learned until the language model,
   frozen, describes dice by it. (The embeddings of " red" and "3" do not suffice: where tokens lie in a picture is
   told by positions in height and width, which a language model never learned to read.)
2. replies: what the model itself replies to `solver_prompt` and `proposer_prompt` when it is told in words what a
   picture shows, it must find as likely when it reads the table's vectors; with descriptions in between.
3. tower: a vision tower learns to turn pictures into those vectors. No language model takes part.
With the TABLE that an earlier run learned, OUT.part/replies.pt, the first two stages are left out. Give it a new OUT.
"""
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import transformers
from PIL import ImageColor

import ireasoner as ir
import test_ireasoner as world

SIDE = 4  # of a picture, in visual tokens of 28 pixels: a die is 2 x 2 of them
TOWER = {"depth": 2, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4, "fullatt_block_indexes": [0, 1]}
LESSONS = {  # stage: steps, highest learning rate
    "descriptions": (90, 2e-3),
    "replies": (300, 1e-3),
    "tower": (500, 2e-3),
}
TOLD = 408         # pictures that the language model is told about
REPLIES = 2        # to each of them
REPLY_TOKENS = 48  # of each: what is read off the picture comes first

# ---- Pictures, and what is asked about them

def draw(rng, held_out=False):
    """A picture, and what it shows, colors in alphabetical order: the one order in which descriptions name them. One in
    eight combinations of dice is held out: never taught."""
    while True:
        image, dice = world.draw_dice(rng)
        dice = dict(sorted(dice.items()))
        if (ir.derive_seed("held out", list(dice.items())) % 8 == 0) == held_out:
            return image.resize((28 * SIDE, 28 * SIDE)), dice

DESCRIBE = "What does each of the dice show?"

def description(dice):
    return ", ".join(f"{color} shows {pips}" for color, pips in dice.items()) + "."

def draw_told(number):
    """The picture of a lesson in stage 2, what it shows, and what is asked: one in six times a question."""
    rng = random.Random(ir.derive_seed("told", number))
    image, dice = draw(rng)
    question, _, _ = world.dice_question(dice, rng)
    text = ir.proposer_prompt() if number % 6 == 5 else ir.solver_prompt(question)
    return image, dice, text

# ---- The model

def build(folder):
    """A Qwen2.5-VL with the weights of a language model and a new tower; its tokenizer and processor."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = lm.config.to_dict()
    names = (*world.SIZE_NAMES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
             "eos_token_id")
    text = {name: sizes[name] for name in names}
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    section = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]  # of time, height and width, as in Qwen2.5-VL
    theta = sizes["rope_parameters"]["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": section}
    token = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=lm.dtype)
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]

    # The system prompt that the language model is used to, then turns with pictures
    turn = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    system = turn[:turn.index("<|im_start|>user")]
    tokenizer.chat_template = "{{ " + json.dumps(system) + " }}" + world.CHAT_TEMPLATE
    images = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28})
    return model, tokenizer, images

class Table(torch.nn.Module):
    """What the visual tokens of a picture should be: the sum of a vector for the color, one for the number of pips and
    one for both, different for each of a die's four tokens."""

    def __init__(self, policy):
        """Starts with the embeddings of words."""
        super().__init__()
        embeddings = policy.hf.get_input_embeddings().weight

        def vectors(words, shares):
            ids = [policy.tokenizer(word)["input_ids"][0] for word in words]
            return torch.nn.Parameter(torch.tensor(shares)[:, None] * embeddings[ids][:, None])  # (words, 4, d)

        self.colors = vectors([f" {color}" for color in world.COLORS], [1.0, 1.0, 1.0, 0.0])
        self.pips = vectors(map(str, world.PIPS), [0.0, 1.0, 1.0, 1.0])
        self.both = torch.nn.Parameter(torch.zeros(6, 6, 4, embeddings.shape[1]))
        self.empty = vectors([","], [1.0, 1.0, 1.0, 1.0])
        self.noise = 0.05 * embeddings.std()

    def forward(self, image, dice):
        """The visual tokens of a picture, (16, d), from left to right and from top to bottom."""
        names = {ImageColor.getrgb(code): color for color, code in world.COLORS.items()}
        cells = []
        for y in (9, 65):
            for x in (28, 84):  # a pixel above the pips, of the background where the cell is empty
                color = names.get(image.getpixel((x, y)))
                cells.append(self.die(color, dice[color]) if color else self.empty[0])
        cells = torch.stack(cells).unflatten(0, (2, 2)).unflatten(2, (2, 2))  # (2, 2, 2, 2, d): y, x, y and x inside
        return cells.transpose(1, 2).reshape(SIDE * SIDE, -1)

    def die(self, color, pips):
        c = list(world.COLORS).index(color)
        return self.colors[c] + self.pips[pips - 1] + self.both[c, pips - 1]  # (4, d)

# ---- Lessons: each runs backward, and returns what is to be shown

class Lessons:
    """Stages 1 and 2: the frozen language model reads the table."""

    def __init__(self, policy, folder):
        self.policy = policy
        self.folder = folder
        self.table = Table(policy)
        self.ids, inputs = policy.preprocess(draw(random.Random(0))[0])
        self.grid = inputs["image_grid_thw"]

    def seen(self, image, dice):
        """A picture by the table, with noise: what the tower will not learn to the last digit is not needed so."""
        tokens = self.table(image, dice)
        tokens = tokens + self.table.noise * torch.randn_like(tokens)
        return ir.EncodedImage(self.ids, {"pooler_output": (tokens.to(self.policy.hf.dtype),)}, self.grid)

    def told(self, dice):
        """The same in words, in the place of the picture."""
        shown = ", ".join(f"the {color} die shows {pips}" for color, pips in dice.items())
        head, _ = self.policy.template
        head = head.split("<|vision_start|>")[0] + f"The image shows three dice: {shown}.\n"
        nothing = torch.zeros(0, self.table.empty.shape[-1], dtype=self.policy.hf.dtype)
        return ir.EncodedImage(self.policy.tokenizer(head)["input_ids"], {"pooler_output": (nothing,)}, self.grid[:0])

    def log_probabilities(self, prompts, replies):
        """(M, V) at all tokens of n replies, lists of token ids, to each of the prompts."""
        rows = [torch.tensor(ids) for ids in replies]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with self.policy.adapter(None):
            prefill = self.policy.prefill(prompts)
            prefill = prefill.repeat(len(rows) // len(prompts), ids.shape[1] - 1, transformers.DynamicLayer)
            hidden = torch.cat([prefill.hidden[:, None], self.policy.extend(prefill, ids[:, :-1])], dim=1)
            hidden = torch.cat([h[:len(row)] for h, row in zip(hidden, rows)])
            return self.policy.lm_head(hidden).float().log_softmax(-1)

    def describe(self, rng, count):
        """The loss of descriptions, in nats per token. Runs backward."""
        pictures = [draw(rng) for _ in range(count)]
        prompts = [ir.Prompt(self.seen(image, dice), DESCRIBE) for image, dice in pictures]
        replies = [self.policy.tokenizer(description(dice) + "<|im_end|>")["input_ids"] for _, dice in pictures]
        loss = F.nll_loss(self.log_probabilities(prompts, replies), torch.tensor(sum(replies, [])))
        loss.backward()
        return loss.item()

    def recall(self, numbers):
        """The KL from the model that is told to the model that sees, at each token of its replies when told, in nats
        per token. Runs backward."""
        told = []
        seen = []
        replies = []
        for number in numbers:
            image, dice, text = draw_told(number % TOLD)
            told.append(ir.Prompt(self.told(dice), text))
            seen.append(ir.Prompt(self.seen(image, dice), text))
            replies += self.replies[number % TOLD]
        with torch.no_grad():
            wanted = self.log_probabilities(told, replies)
        kl = F.kl_div(self.log_probabilities(seen, replies), wanted, log_target=True, reduction="batchmean")
        kl.backward()
        return kl.item()

    def descriptions(self, step):
        return {"nats": self.describe(random.Random(ir.derive_seed("descriptions", step)), 8)}

    def descriptions_and_replies(self, step):
        nats = self.describe(random.Random(ir.derive_seed("more descriptions", step)), 5)
        return {"descriptions, nats": nats, "replies, KL": self.recall([2 * step, 2 * step + 1])}

    def tell(self, batch=24):
        """What the language model replies to pictures that it is told about, one file for each batch."""
        self.replies = []
        for start in range(0, TOLD, batch):
            file = self.folder / f"told{start:05d}.pt"
            if not file.exists():
                prompts = []
                for number in range(start, start + batch):
                    _, dice, text = draw_told(number)
                    prompts.append(ir.Prompt(self.told(dice), text))
                samples = self.policy.sample(None, prompts, REPLIES, REPLY_TOKENS, seed=start)
                save([[completion.token_ids for completion in of_prompt] for of_prompt in samples], file)
                ir.say(f"told: {start + batch} of {TOLD} pictures, {REPLIES} replies each")
            self.replies += torch.load(file)

def learn_tower(model, processor, table, step):
    """Stage 3. Returns the mean square error of 48 pictures, as a share of the variance."""
    rng = random.Random(ir.derive_seed("tower", step))
    drawn = [draw(rng) for _ in range(48)]
    with torch.no_grad():
        wanted = torch.stack([table(image, dice) for image, dice in drawn])
    inputs = processor(images=[image for image, _ in drawn], return_tensors="pt")
    out = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    loss = F.mse_loss(torch.stack(tuple(out)), wanted) / wanted.var()
    loss.backward()
    return {"error": loss.item()}

# ---- The three stages

def save(content, file):
    """Whole or not at all."""
    aside = file.with_suffix(".part")
    torch.save(content, aside)
    aside.rename(file)

def learn(folder, stage, learner, lesson):
    """Runs a stage, or what is left of it. `lesson(step)` runs backward and returns named numbers to show."""
    steps, highest = LESSONS[stage]
    optimizer = torch.optim.AdamW(learner.parameters(), lr=highest, betas=(0.9, 0.98), weight_decay=0.0)
    file = folder / f"{stage}.pt"
    start = 0
    if file.exists():
        state = torch.load(file)
        start = state["step"]
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
    shown = {}
    for step in range(start, steps):
        warm_up = min(1.0, (step + 1) / 10)
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = highest * warm_up * decay
        torch.manual_seed(ir.derive_seed(stage, step))
        optimizer.zero_grad()
        for name, value in lesson(step).items():
            shown.setdefault(name, []).append(value)
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            means = ", ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in shown.items())
            ir.say(f"{stage}: step {step + 1} of {steps}, {means}")
            shown = {}
            save({"step": step + 1, "learner": learner.state_dict(), "optimizer": optimizer.state_dict()}, file)

def open_eyes(folder, out, learned=None):
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    model, tokenizer, processor = build(folder)
    policy = ir.Policy(ir.Config(model=str(folder), device="cpu", lora_r=1), (model, tokenizer, processor))
    lessons = Lessons(policy, part)
    table = lessons.table
    if learned:
        table.load_state_dict(torch.load(learned)["learner"])
    else:
        learn(part, "descriptions", table, lessons.descriptions)
        lessons.tell()
        learn(part, "replies", table, lessons.descriptions_and_replies)
    del model, policy, lessons

    model, tokenizer, processor = build(folder)  # without the adapters of a policy
    tower = model.model.visual.float().requires_grad_(True)
    learn(part, "tower", tower, lambda step: learn_tower(model, processor, table, step))
    tower.to(model.lm_head.weight.dtype)
    world.save_backbone(model, tokenizer, processor, out)
    check(folder, out)

def check(folder, out):
    """Whether the language model in the checkpoint is the original, to the last bit, and what its eyes see."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    new = model.model.language_model.state_dict()
    new["lm_head"] = model.lm_head.weight
    old = lm.model.state_dict()
    old["lm_head"] = lm.lm_head.weight
    for name in old.keys() | new.keys():
        if not torch.equal(old[name].float(), new[name].float()):
            raise SystemExit(f"{name} has changed")
    ir.say(f"written: {out}. The language model's {len(old)} tensors are the original's to the last bit")
    del lm, model

    policy = ir.Policy(ir.Config(model=str(out), device="cpu"))
    rng = random.Random(0)
    pictures = [draw(rng, held_out=True) for _ in range(64)]
    prompts = [ir.Prompt(image, DESCRIBE) for image, _ in pictures]
    seen = [completion.text for (completion,) in policy.sample(None, prompts, 1, 24, temperature=0.0)]
    right = 0
    dice_right = 0
    for text, (_, dice) in zip(seen, pictures):
        right += text == description(dice)
        dice_right += sum(f"{color} shows {pips}" in text for color, pips in dice.items())
    ir.say(f"described rightly: {right} of 64 pictures that were never taught, {dice_right} of 192 dice")

if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    open_eyes(*map(Path, sys.argv[1:]))
