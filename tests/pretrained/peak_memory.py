"""Run by test_language.py: writes a checkpoint of 1 GB, loads it in a child process and prints its peak memory."""

import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
LAYERS, WORDS = 15, 9000


def main(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    # The one who writes must not be the one who is measured: peaks never fall.
    writer = context.Process(target=write, args=(folder,))
    writer.start()
    writer.join()
    with context.Pool(1) as pool:
        print(json.dumps(pool.apply(measure, (folder,))))


def write(folder: Path) -> None:
    import numpy as np

    from sysdpo_jax.pretrained.tensors import write_safetensors
    from tests.components.stubs import word_tokenizer

    rng = np.random.default_rng(0)
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (WORDS, width), "model.norm.weight": (width,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{name}mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{name}{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
    made = ((name, rng.standard_normal(shape, np.float32)) for name, shape in shapes.items())
    write_safetensors(folder, "model", made, shard_bytes=3 * 10**8)
    config = {"model_type": "llama", "vocab_size": WORDS, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config | SHAPE | {"tie_word_embeddings": True}))
    word_tokenizer().save_pretrained(folder)


def measure(folder: Path) -> dict[str, int]:
    import jax

    from sysdpo_jax import pretrained
    from sysdpo_jax.models.config import Precision
    from sysdpo_jax.models.layers import Dense

    # Everything that is imported on the way, and a first array, before the ruler is laid.
    jax.block_until_ready(Dense(Precision(), 2).init(jax.random.key(0), jax.numpy.zeros((1, 2))))
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, params = pretrained.load(folder, param_dtype="bfloat16")
    jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    return {
        "file": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "result": sum(leaf.nbytes for leaf in leaves),
        # As it lies in the file.
        "largest": max(2 * leaf.nbytes for leaf in leaves),
        "peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    os.environ["PYTHONPATH"] = sys.path[0]
    main(Path(sys.argv[1]))
