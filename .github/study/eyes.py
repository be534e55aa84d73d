"""Eyes for a language model: gives any Qwen2 text model of transformers a small vision tower that sees pictures of
dice, and writes a Qwen2.5-VL checkpoint that `python ireasoner.py --model OUT` trains.

    python .github/study/eyes.py LM_FOLDER OUT

The language model stays as it is, to the last bit. Three stages, stopped at any time and continued by the same command:
1. descriptions: what should the four visual tokens of a die be? A table of vectors, one for each color and one for each
   number of pips, is learned until the language model, frozen, describes dice by it. (The embeddings of " red" and "3"
   do not suffice: all visual tokens of a picture have one position in time, so nothing says which number is whose.)
2. replies: what the model itself replies to `solver_prompt` and `proposer_prompt` when it is told in words what a
   picture shows, it must find as likely when it reads the table's vectors; with descriptions in between.
3. tower: a vision tower learns to turn pictures into those vectors. No language model takes part.
One core suffices.
"""
import copy
import json
import math
import os
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
PIXELS = 28 * SIDE
TOWER = {"depth": 2, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4, "fullatt_block_indexes": [0, 1]}
LESSONS = {  # stage: steps, pictures in a step, highest learning rate
    "descriptions": (130, 8, 2e-3),
    "replies": (84, 2, 1e-3),
    "tower": (500, 48, 2e-3),
}
TOLD = 96          # pictures that the language model is told about
REPLIES = 4        # to each of them
REPLY_TOKENS = 64  # of each: what is read off the picture comes first
TOP = 16           # of its probabilities for each token that are kept


# ---- Pictures, and what is asked about them

def is_held_out(dice: dict) -> bool:
    """One in eight combinations of dice is never taught, for tests."""
    return ir.derive_seed("held out", sorted(dice.items())) % 8 == 0

def draw(rng: random.Random, held_out: bool = False) -> tuple:
    """A picture, and what it shows, colors in alphabetical order: the one order in which descriptions name them."""
    while True:
        image, dice = world.draw_dice(rng)
        if is_held_out(dice) == held_out:
            return image.resize((PIXELS, PIXELS)), dict(sorted(dice.items()))

def in_words(dice: dict) -> str:
    return ", ".join(f"the {color} die shows {pips}" for color, pips in dice.items())

DESCRIBE = "What does each of the dice show?"

def description(dice: dict) -> str:
    return ", ".join(f"{color} shows {pips}" for color, pips in dice.items()) + "."

def cells_of(image) -> list:
    """The colors in the four cells of a picture, None where a cell is empty."""
    colors = {ImageColor.getrgb(code): color for color, code in world.COLORS.items()}
    return [colors.get(image.getpixel((x, y))) for y in (9, 65) for x in (28, 84)]  # above the pips

def draw_told(number: int) -> tuple:
    """The picture of a lesson in stage 3, what it shows, and what is asked: one in six times a question."""
    rng = random.Random(ir.derive_seed("told", number))
    image, dice = draw(rng)
    question, _, _ = world.dice_question(dice, rng)
    text = ir.solver_prompt(question)
    if number % 6 == 5:
        text = ir.proposer_prompt()
    return image, dice, text


# ---- The model

def build(folder: Path) -> tuple:
    """A Qwen2.5-VL with the weights of a language model and a new tower, in float32, its tokenizer and processor."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = lm.config.to_dict()
    text = {name: sizes[name] for name in world.SIZE_NAMES}
    for name in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        text[name] = sizes[name]
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
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    model.eval().requires_grad_(False)
    model.model.visual.requires_grad_(True)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]

    # The system prompt that the language model is used to, then turns with pictures
    turn = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    system = turn[:turn.index("<|im_start|>user")]
    tokenizer.chat_template = "{{ " + json.dumps(system) + " }}" + world.CHAT_TEMPLATE
    images = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28})
    return model, tokenizer, images, lm.dtype

def chat_ids(tokenizer, text: str, seen: bool) -> list[int]:
    """The token ids of a user turn, with a picture in front if it is seen."""
    content = [{"type": "image"}] * seen + [{"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    chat = chat.replace("<|image_pad|>", SIDE * SIDE * "<|image_pad|>")
    return tokenizer(chat, add_special_tokens=False)["input_ids"]

def go_on(model, cache, ids, positions, mask=None):
    """Hidden states (rows, T, d) of tokens that stand behind those in a cache, at `positions` (rows, T)."""
    out = model.model(input_ids=ids, position_ids=positions.expand(3, -1, -1), attention_mask=mask, cache=cache,
                      use_cache=True)
    return out.last_hidden_state


# ---- What the language model says when it is told

@torch.no_grad()
def sample(model, prompts: list[list[int]], n: int, limit: int) -> tuple:
    """n replies to each prompt from the plain softmax, and for each token the model's most likely ones: ids
    (B, n, limit), their ids and probabilities (B, n, limit, TOP). Behind the end of a reply all are 0. A reply that has
    ended leaves the batch."""
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])  # (B, P)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = transformers.DynamicCache()
    hidden = go_on(model, cache, ids, positions, mask)[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = mask.repeat_interleave(n, 0)
    last = positions[:, -1:].repeat_interleave(n, 0)
    rows = torch.arange(len(hidden))  # those that have not ended
    replies = torch.zeros(len(rows), limit, dtype=torch.int32)
    top_ids = torch.zeros(len(rows), limit, TOP, dtype=torch.int32)
    top_p = torch.zeros(len(rows), limit, TOP)
    stops = torch.tensor(model.generation_config.eos_token_id)
    for t in range(limit):
        p = model.lm_head(hidden).softmax(-1)  # (rows, V)
        tokens = torch.multinomial(p, 1)
        top = p.topk(TOP)
        replies[rows, t] = tokens[:, 0].int()
        top_ids[rows, t] = top.indices.int()
        top_p[rows, t] = top.values
        alive = (~torch.isin(tokens[:, 0], stops)).nonzero()[:, 0]
        if len(alive) == 0:
            break
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows = rows[alive]
            tokens = tokens[alive]
            mask = mask[alive]
            last = last[alive]
        mask = F.pad(mask, (0, 1), value=1)
        last = last + 1
        hidden = go_on(model, cache, tokens, last, mask)[:, -1]
    shape = (len(prompts), n, limit)
    return replies.view(shape), top_ids.view(*shape, TOP), top_p.view(*shape, TOP)

def tell(model, tokenizer, folder: Path, batch: int = 48) -> list[tuple]:
    """The replies of the language model to `TOLD` pictures that it is told about, one file for each batch."""
    lessons = []
    for start in range(0, TOLD, batch):
        file = folder / f"told{start:05d}.pt"
        if not file.exists():
            prompts = []
            for number in range(start, start + batch):
                _, dice, text = draw_told(number)
                told = f"The image shows three dice: {in_words(dice)}.\n{text}"
                prompts.append(chat_ids(tokenizer, told, seen=False))
            torch.manual_seed(start)
            save(sample(model, prompts, REPLIES, REPLY_TOKENS), file)
            ir.say(f"told: {start + batch} of {TOLD} pictures, {REPLIES} replies each")
        lessons += zip(*torch.load(file))
    return lessons


# ---- Lessons: each runs backward, and returns what is to be shown

class Table(torch.nn.Module):
    """What the visual tokens of a picture should be: the sum of a vector for the color and one for the number of pips,
    both different for each of a die's four tokens."""

    def __init__(self, model, tokenizer):
        """Starts with the embeddings of words."""
        super().__init__()
        embeddings = model.get_input_embeddings().weight

        def vectors(words, shares):
            ids = [tokenizer(word)["input_ids"][0] for word in words]
            return torch.nn.Parameter(torch.tensor(shares)[:, None] * embeddings[ids][:, None])  # (words, 4, d)

        self.colors = vectors([f" {color}" for color in world.COLORS], [1.0, 1.0, 1.0, 0.0])
        self.pips = vectors(map(str, world.PIPS), [0.0, 1.0, 1.0, 1.0])
        self.empty = vectors([","], [1.0, 1.0, 1.0, 1.0])
        self.noise = 0.05 * embeddings.std()

    def forward(self, image, dice: dict):
        """The visual tokens of a picture, (16, d), from left to right and from top to bottom."""
        cells = []
        names = list(world.COLORS)
        for color in cells_of(image):
            if color:
                cells.append(self.colors[names.index(color)] + self.pips[dice[color] - 1])
            else:
                cells.append(self.empty[0])
        cells = torch.stack(cells).unflatten(0, (2, 2)).unflatten(2, (2, 2))  # (2, 2, 2, 2, d): y, x, y and x inside
        return cells.transpose(1, 2).reshape(SIDE * SIDE, -1)

    def noisy(self, image, dice: dict):
        """What the tower will not learn to the last digit should not be needed to the last digit."""
        tokens = self(image, dice)
        return tokens + self.noise * torch.randn_like(tokens)

class Reader:
    """The language model, which reads visual tokens, a text and replies to it."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        ids = chat_ids(tokenizer, "", seen=True)
        self.start = ids.index(model.config.image_token_id)
        with torch.no_grad():  # what stands before the picture is the same in all lessons
            self.cache = transformers.DynamicCache()
            go_on(model, self.cache, torch.tensor([ids[:self.start]]), torch.arange(self.start)[None])

    def kl(self, visual, text: str, replies, top_ids, top_p):
        """The KL from the wanted probabilities (B N, R, TOP) of each token of N replies (B N, R) to those of the model
        that sees B pictures (B, 16, d), in nats per token. A prompt is read once for its replies."""
        model = self.model
        ids = torch.tensor([chat_ids(self.tokenizer, text, seen=True)] * len(visual))  # (B, P)
        is_image = ids == model.config.image_token_id
        grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * len(visual))
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid)
        embeddings = model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], visual)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(visual))
        prompt = model.model.language_model(inputs_embeds=embeddings[:, self.start:], cache=cache, use_cache=True,
                                            position_ids=positions[:, :, self.start:]).last_hidden_state
        n = len(replies) // len(visual)
        cache.batch_repeat_interleave(n)
        later = positions.max() + 1 + torch.arange(replies.shape[1] - 1)
        hidden = go_on(model, cache, replies[:, :-1], later.expand(len(replies), -1))
        hidden = torch.cat([prompt[:, -1:].repeat_interleave(n, 0), hidden], dim=1)  # (B N, R, d)
        real = top_p.sum(-1) > 0  # (B N, R)
        logp = model.lm_head(hidden[real]).log_softmax(-1).gather(-1, top_ids[real])  # (M, TOP)
        wanted = top_p[real]
        return (wanted * (wanted.clamp_min(1e-9).log() - logp)).sum(-1).mean()

def describe(reader: Reader, table: Table, rng: random.Random, count: int):
    """The loss of descriptions, in nats per token."""
    pictures = [draw(rng) for _ in range(count)]
    visual = torch.stack([table.noisy(image, dice) for image, dice in pictures])
    ids = [reader.tokenizer(description(dice) + "<|im_end|>")["input_ids"] for _, dice in pictures]
    replies = torch.tensor(ids)  # all are of one length: each color is one token
    return reader.kl(visual, DESCRIBE, replies, replies[..., None], torch.ones(*replies.shape, 1))

def recall(reader: Reader, table: Table, number: int, told: tuple):
    """The loss of the replies to a picture that the model was told about."""
    image, dice, text = draw_told(number)
    length = int((told[2].sum(-1) > 0).sum(-1).max())  # of the longest
    replies, top_ids, top_p = [part[:, :length] for part in told]
    return reader.kl(table.noisy(image, dice)[None], text, replies.long(), top_ids.long(), top_p)

def picture_tokens(model, processor, images: list):
    """What the vision tower makes of pictures, (B, 16, d)."""
    inputs = processor(images=images, return_tensors="pt")
    return torch.stack(tuple(model.model.get_image_features(**inputs, return_dict=True).pooler_output))

# ---- The three stages

def save(content, file: Path):
    """Whole or not at all."""
    aside = file.with_suffix(".part")
    torch.save(content, aside)
    aside.rename(file)

def learn(folder: Path, stage: str, learner, lesson):
    """Runs a stage, or what is left of it. `lesson(step, count)` runs backward and returns named numbers to show."""
    steps, count, highest = LESSONS[stage]
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
        for name, value in lesson(step, count).items():
            shown.setdefault(name, []).append(value)
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            means = ", ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in shown.items())
            ir.say(f"{stage}: step {step + 1} of {steps}, {means}")
            shown = {}
            save({"step": step + 1, "learner": learner.state_dict(), "optimizer": optimizer.state_dict()}, file)

def open_eyes(folder: Path, out: Path):
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    model, tokenizer, processor, dtype = build(folder)
    tower = model.model.visual
    table = Table(model, tokenizer)
    reader = Reader(model, tokenizer)

    def descriptions(step, count):
        loss = describe(reader, table, random.Random(ir.derive_seed("descriptions", step)), count)
        loss.backward()
        return {"nats": loss.item()}

    def replies(step, count):
        """Four descriptions to each prompt with replies, and they weigh more: else the model forgets which is whose."""
        said = describe(reader, table, random.Random(ir.derive_seed("more descriptions", step)), 4 * count)
        (2 * said).backward()
        kl = 0.0
        for number in range(step * count, (step + 1) * count):
            loss = recall(reader, table, number % TOLD, told[number % TOLD]) / count
            loss.backward()
            kl += loss.item()
        return {"descriptions, nats": said.item(), "replies, KL": kl}

    def pictures(step, count):
        rng = random.Random(ir.derive_seed("tower", step))
        drawn = [draw(rng) for _ in range(count)]
        with torch.no_grad():
            wanted = torch.stack([table(image, dice) for image, dice in drawn])
        loss = F.mse_loss(picture_tokens(model, processor, [image for image, _ in drawn]), wanted) / wanted.var()
        loss.backward()
        return {"error": loss.item()}

    learn(part, "descriptions", table, descriptions)
    told = tell(model, tokenizer, part)
    learn(part, "replies", table, replies)
    learn(part, "tower", tower, pictures)
    world.save_backbone(model.to(dtype), tokenizer, processor, out)
    check(folder, out)

def check(folder: Path, out: Path):
    """Whether the language model in the checkpoint is the original, to the last bit."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    new = model.model.language_model.state_dict()
    new["lm_head"] = model.lm_head.weight
    old = lm.model.state_dict()
    old["lm_head"] = lm.lm_head.weight
    for name in old.keys() | new.keys():
        if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8)):
            raise SystemExit(f"{name} has changed")
    ir.say(f"written: {out}. The language model's {len(old)} tensors are the original's to the last bit")

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    open_eyes(Path(sys.argv[1]), Path(sys.argv[2]))
