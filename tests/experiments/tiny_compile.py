"""Compile a tiny system for four TPU chips and print the account. libtpu is loaded here, in a process of its own."""

import dataclasses
import json
import sys
from functools import partial

import jax

from experiments import compile_tpu
from experiments.scaling.systems import DECODERS, SYSTEMS, UNETS, drafted_and_answered, written_and_painted

DECODER = dataclasses.replace(
    DECODERS["llama-3-8b"],
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
UNET = dataclasses.replace(
    UNETS["sdxl"],
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers_per_block=1,
    attention_head_dim=(1, 1),
    cross_attention_dim=64,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    SYSTEMS["tiny"] = (64, partial(written_and_painted, DECODER, UNET))
    SYSTEMS["tiny-x2"] = (0, partial(drafted_and_answered, DECODER))
    config = compile_tpu.Config(system=sys.argv[1], topology="v5e:2x2", sequence=64, mode=sys.argv[2], attention="xla")
    print(json.dumps(compile_tpu.run(config)))
