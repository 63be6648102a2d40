"""What a token step of the compiled loops reads and writes: each weight once, the cache once, copies of neither."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sysdpo_jax.decoding import decode
from sysdpo_jax.decoding.beam_search import BeamSearch
from sysdpo_jax.decoding.cached_model import CachedModel
from sysdpo_jax.decoding.sampling import sampled
from sysdpo_jax.models.decoder import Decoder, DecoderConfig, KVCache, init_cache, unstacked
from sysdpo_jax.models.lora import LoRA, add_lora

ROWS, PROMPT, NEW, BEAMS = 8, 192, 65, 3
SLOTS = PROMPT + NEW - 1
CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=416,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# Nothing is read or written where these stand.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
LINE = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)")


class Instruction(NamedTuple):
    """One of a compiled computation. updates: it writes a slice of its first large operand, in place."""

    kind: str
    result: str
    operands: list[str]
    updates: bool


def loop_of_steps(compiled: Any) -> list[Instruction]:
    """The body of the loop that extends the cache."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
            bodies[name] = []
        elif name and " = " in line:
            bodies[name].append(line.strip())
    loops = set(re.findall(r"body=%?([\w.\-]+)", compiled.as_text()))
    lines = max((bodies[loop] for loop in loops), key=lambda body: sum("Decoder.extend/" in line for line in body))
    results = {match[1]: match[2] for line in lines if (match := LINE.match(line))}
    made = []
    for line in lines:
        if (match := LINE.match(line)) and match[3] not in FREE:
            called = re.search(r"calls=%?([\w.\-]+)", line)
            inner = [row for row in bodies[called[1]] if row.startswith("ROOT")] if called else [line]
            operands = [results.get(name, "") for name in re.findall(r"%([\w.\-]+)", match[4])]
            made.append(Instruction(match[3], match[2], operands, " dynamic-update-slice(" in inner[0]))
    return made


def arrays(shape: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]


def like(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The same for every order of the axes, and with axes of one."""
    return tuple(sorted(n for n in dims if n > 1))


def copies(steps: list[Instruction], rows: int, slots: int) -> list[str]:
    """Results of the size of a kernel or of a layer's keys, but for those that are updated in place."""
    layers, c = weights()["layers"], CONFIG
    large = {like(x.shape[1:]) for x in jax.tree.leaves(layers) if x.ndim == 3}
    large.add(like((rows, c.num_key_value_heads, slots, c.head_width)))
    return [s.result for s in steps if not s.updates and any(like(dims) in large for dims in arrays(s.result))]


def moved(steps: list[Instruction]) -> int:
    """Bytes read and written; what is updated in place counts as what is written there."""

    def size(shape: str) -> int:
        return 4 * sum(math.prod(dims) for dims in arrays(shape))

    total = 0
    for step in steps:
        operands = list(map(size, step.operands))
        total += sum(operands) - max(operands) if step.updates else sum(operands) + size(step.result)
    return total


@functools.cache
def weights() -> PyTree:
    return jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def shape(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def sampling(places: int) -> list[Instruction]:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    settings = (shape(dtype=jnp.float32),) * 2
    model = CachedModel(Decoder(CONFIG), NEW, (2,), 0)
    inputs = weights(), shape(ROWS, PROMPT), shape(ROWS), keys, settings
    return loop_of_steps(sampled.lower(model, places, *inputs).compile())


def test_a_step_of_sampling_moves_the_weights_and_the_cache_once() -> None:
    """The limit of a step, weights + cache, is most of what moves; the rest are scores, logits and activations."""
    steps = sampling(ROWS)
    assert copies(steps, ROWS, SLOTS) == []
    cache = 2 * CONFIG.num_hidden_layers * ROWS * SLOTS * CONFIG.num_key_value_heads * CONFIG.head_width
    least = 4 * (cache + sum(x.size for x in jax.tree.leaves(weights())))
    assert least <= moved(steps) < 1.35 * least


def test_a_step_with_rows_that_wait_copies_nothing_either() -> None:
    assert copies(sampling(ROWS // 2), ROWS // 2, SLOTS) == []


def test_a_step_of_a_beam_search_copies_the_made_part_alone() -> None:
    """Groups of one beam stay where they are; others are put in order, but never with the prompts' part."""
    for groups, reordered in ((BEAMS, 0), (1, 2 * CONFIG.num_hidden_layers)):
        search = BeamSearch(groups)
        model = CachedModel(Decoder(CONFIG), NEW, (2,), 0)
        inputs = search.penalties(), weights(), shape(ROWS, PROMPT), shape(ROWS)
        steps = loop_of_steps(decode._beam_generate.lower(model, (BEAMS, groups), *inputs).compile())
        assert copies(steps, ROWS, PROMPT) == []
        assert (len(copies(steps, ROWS * BEAMS, NEW - 1)) > 0) == (reordered > 0)


def test_stacked_weights_would_be_copied_in_every_round() -> None:
    """The same extension on parameters that nobody took apart: what the tests above would find."""
    cache = jax.eval_shape(lambda: init_cache(CONFIG, ROWS, SLOTS))

    def loop(params: PyTree, token: jax.Array, cache: KVCache) -> KVCache:
        def step(number: jax.Array, cache: KVCache) -> KVCache:
            position = jnp.full((ROWS, 1), number)
            return Decoder(CONFIG).apply({"params": params}, token, cache, number, position, method="extend")[1]

        return jax.lax.fori_loop(0, SLOTS, step, cache)

    stacked, apart = (
        loop_of_steps(jax.jit(loop).lower(params, shape(ROWS, 1), cache).compile())
        for params in (weights(), jax.eval_shape(functools.partial(unstacked, CONFIG), weights()))
    )
    assert copies(apart, ROWS, SLOTS) == []
    assert len(copies(stacked, ROWS, SLOTS)) >= CONFIG.num_hidden_layers


def test_parameters_of_the_loop_are_rounded_once_and_exactly_as_in_every_step() -> None:
    """float32 parameters with LoRA under bfloat16 products: kernels are halved, norms stay, no result moves."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", qk_norm=True, qkv_bias=True)
    tokens = jnp.arange(6).reshape(2, 3)
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    params = add_lora(params, LoRA(2, 4.0, "all_linear"), jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    apart = unstacked(config, params)
    kinds = {path[-1].key: x.dtype for path, x in jax.tree.leaves_with_path(apart)}
    assert {name for name, dtype in kinds.items() if dtype == jnp.float32} == {"weight", "lora_scale"}
    extend = jax.jit(functools.partial(Decoder(config).apply, method="extend"))
    found = [extend({"params": tree}, tokens, init_cache(config, 2, 4), 0) for tree in (params, apart)]
    jax.tree.map(np.testing.assert_array_equal, *found)
