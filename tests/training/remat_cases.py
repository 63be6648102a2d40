"""Systems of one model each, deep and narrow, so that roundings show in the log-probabilities; drawn, not trained."""

import jax
import numpy as np
import optax

from experiments.scaling.systems import EncodedText, image_features, text_features, writer
from sysdpo_jax import (
    LORA_PARAMS,
    ComponentOptimizer,
    CompoundSystem,
    Diffusion,
    FlowMatching,
    LoRA,
    Node,
    PairBatch,
    PixelCodec,
    add_lora,
    create_state,
    make_optimizer,
)
from sysdpo_jax.batch import share
from sysdpo_jax.models import DecoderConfig, MMDiT, MMDiTConfig, UNet2DCondition, UNetConfig
from tests.components.drawn import drawn

KEY = jax.random.key(0)
VOCAB = 256


def decoder(layers=2, length=16, width=32, **options):
    config = DecoderConfig(VOCAB, width, 3 * width, layers, 4, 2, max_position_embeddings=length, **options)
    return writer(config, length // 4, length - length // 4)


def unet(**options):
    config = UNetConfig(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )
    return Diffusion(UNet2DCondition(config), EncodedText(((8, 16),)), PixelCodec((8, 8, 4)))


def mmdit(**options):
    config = MMDiTConfig(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **options,
    )
    return FlowMatching(MMDiT(config), EncodedText(((8, 16), (16,))), PixelCodec((8, 8, 4)))


def system(component):
    return CompoundSystem(("x",), (Node("value", component, ("x",)),))


def pairs(component, rows=1, shared=True):
    """shared: whether prompts, which are equal on both sides, go through the model once."""
    sides = [{"value": _side(component, rows, seed)} for seed in (0, 1)]
    return PairBatch(*(share(system(component), sides) if shared else sides))


def _side(component, rows, seed):
    rng = np.random.default_rng(seed)
    if hasattr(component, "decoder"):
        like = text_features(component, rows)
        room = like["tokens"].shape[-1]
        tokens = rng.integers(2, VOCAB, (rows, room), np.int32)
        prompt = component.max_prompt_length
        tokens[:, :prompt] = np.random.default_rng(2).integers(2, VOCAB, (rows, prompt))
        known = {
            "tokens": tokens,
            "prompt_lengths": np.full(rows, component.max_prompt_length, np.int32),
            "lengths": np.full(rows, room, np.int32),
            "completion": np.ones((rows, component.max_new_tokens), bool),
        }
        return known | {name: np.zeros(rows, np.float32) for name in ("truncated", "retokenized")}
    made = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), image_features(component, rows))
    made["text"]["truncated"] = np.zeros(rows, np.float32)
    return made


def start(component, lora=False, mesh=None):
    """The optimiser and the first state of the component's system, whole or, with lora, its factors trained."""
    made = system(component)
    params = drawn(made.init)
    trained = {"trainable": LORA_PARAMS} if lora else {}
    if lora:
        params = {"value": add_lora(params["value"], LoRA(4, 8.0, "all_linear"), KEY)}
    optimizer = make_optimizer({"value": ComponentOptimizer(optax.sgd(1e-3), **trained)})
    return optimizer, create_state(made, params, optimizer, mesh)
