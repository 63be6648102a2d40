"""Systems of every mixture of components, with parameters and runs, for the tests of objectives."""

import jax

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    Diffusion,
    FlowMatching,
    Gaussian,
    LanguageModel,
    Node,
    PairBatch,
    PixelCodec,
    TextEncoder,
    Tool,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, Affine, Embedding, word_tokenizer

KEY = jax.random.key(0)
DECODER = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 32, 2, 2, 2, max_position_embeddings=16)


def two_words(text):
    return ([*text.split(), "a", "a"])[:2]


def length(text):
    return min(len(text.split()), 3)


def floats(value):
    return [float(value)]


def images(kind):
    return kind(
        denoiser=Affine(),
        text=TextEncoder(Embedding(), word_tokenizer(), 8),
        codec=PixelCodec((2, 2, 3)),
        num_steps=2,
    )


LANGUAGE = Node("text", LanguageModel(Decoder(DECODER), word_tokenizer(), 4, 6), ("x",))
CAPTIONS = Node("captions", Tool(two_words), ("text",), plate=2)
LENGTH = Node("length", Tool(length), ("text",))
NODES = {
    "language model": (LANGUAGE,),
    "diffusion": (Node("image", images(Diffusion), ("x",)),),
    "flow": (Node("image", images(FlowMatching), ("x",)),),
    "language model, diffusion": (LANGUAGE, CAPTIONS, Node("image", images(Diffusion), ("captions",), plate=2)),
    "language model, flow": (LANGUAGE, CAPTIONS, Node("image", images(FlowMatching), ("captions",), plate=2)),
    "two language models in one": (
        Node("draft", LANGUAGE.component, ("x",), params="lm"),
        Node("short", Tool(two_words), ("draft",), plate=2),
        Node("final", LANGUAGE.component, ("short",), params="lm", plate=2),
    ),
    "language model, categorical, gaussian": (
        LANGUAGE,
        LENGTH,
        Node("choice", Categorical(3, (4,)), ("length",)),
        Node("number", Tool(floats), ("choice",)),
        Node("value", Gaussian(2, 1), ("number",), weight=3.0),
    ),
    "two kinds of picture": (
        LANGUAGE,
        Node("one", images(Diffusion), ("text",)),
        Node("other", images(FlowMatching), ("text",)),
    ),
}


def system_of(name):
    return CompoundSystem(("x",), NODES[name])


def pairs(system, params):
    """Two runs of the system for each of four inputs."""
    inputs = [{"x": x} for x in ("a ball", "red", "the cube", "small")]
    return PairBatch(*(system.prepare(system.sample(params, inputs, jax.random.key(seed))) for seed in (1, 2)))


def start(name):
    """System, a policy, another reference and a batch of runs."""
    system = system_of(name)
    params, reference = (system.init(jax.random.key(seed)) for seed in (3, 4))
    return system, params, reference, pairs(system, params)
