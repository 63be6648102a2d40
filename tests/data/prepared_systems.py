"""Small systems whose data are prepared on disk, and files for them: texts of many lengths, and pictures."""

import json
from dataclasses import replace

import numpy as np
from PIL import Image

from sysdpo_jax import CompoundSystem, LanguageModel, Node
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.drawn import drawn
from tests.components.painters import painter
from tests.components.stubs import CHAT_TEMPLATE, SPECIAL, WORDS, word_tokenizer

# A template of words that refuses the role "tool".
TEMPLATE = CHAT_TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
)


def init(system, seed=0):
    return drawn(system.init, seed)


def tokenizer(template=TEMPLATE):
    made = word_tokenizer(chat=True)
    made.chat_template = template
    return made


def writer(**settings):
    config = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 24, 1, 2, 1, max_position_embeddings=128)
    defaults = {"tokenizer": tokenizer(), "max_prompt_length": 40, "max_new_tokens": 24}
    return LanguageModel(Decoder(config), **(defaults | settings))


def asked(question):
    """A user's prompt function, which refuses some values as such functions do."""
    if isinstance(question, list):
        return question
    if question == "the left":
        raise KeyError("no such question")
    return [{"role": "user", "content": question}]


def texts(**settings):
    """Two drafts of a question, and the answer to both of them."""
    draft = Node("drafts", writer(prompt=asked, **settings), ("question",), params="lm", plate=2)
    return CompoundSystem(("question",), (draft, Node("answer", writer(prompt=joined, **settings), ("drafts",))))


def joined(drafts):
    return [{"role": "user", "content": " on ".join(drafts)}]


def pictures(**settings):
    """Pictures by a painter whose autoencoder and text encoder are frozen."""
    return CompoundSystem(("caption",), (Node("image", painter(caption_dropout=0.5, **settings), ("caption",)),))


def illustrated():
    """A caption that a model writes, and its picture."""
    node = Node("caption", writer(prompt=asked), ("question",))
    return CompoundSystem(("question",), (node, Node("image", painter(caption_dropout=0.5), ("caption",))))


def words(rng, most):
    return " ".join(rng.choice(WORDS[:8], rng.integers(1, most + 1)))


def text_row(row):
    """One of lengths that differ by much."""
    rng = np.random.default_rng((row, 1))
    most = int(rng.choice([3, 9, 20]))

    def side():
        return {"drafts": [words(rng, min(most, 9)) for _ in range(2)], "answer": words(rng, most)}

    return {"inputs": {"question": words(rng, most)}, "chosen": side(), "rejected": side()}


def picture_row(row, folder, shape=(4, 6)):
    """One whose two pictures are files, with a caption that other rows have too."""
    rng = np.random.default_rng((row, 2))
    for side in ("chosen", "rejected"):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{row}-{side}.png")
    caption = ("a ball", "cube", "a red ball")[row % 3]
    return {"inputs": {"caption": caption}} | {s: {"image": f"{row}-{s}.png"} for s in ("chosen", "rejected")}


def written(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def text_file(folder, rows):
    return written(folder / "texts.jsonl", map(text_row, range(rows)))


def picture_file(folder, rows):
    return written(folder / "pictures.jsonl", [picture_row(row, folder) for row in range(rows)])


def weighted(system, weight):
    return replace(system, nodes=tuple(replace(node, weight=weight) for node in system.nodes))
