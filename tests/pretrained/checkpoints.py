"""Small random checkpoints, written by transformers and diffusers as they are on the hub."""

from pathlib import Path

import diffusers
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.parity.convert_diffusion import randomise

SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# model_type of transformers' configuration -> what sets it apart.
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"head_dim": 8},
    "qwen3": {},
    "gemma2": {"sliding_window": 3, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 3, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
}


def write_decoder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A decoder with a tokenizer in a folder; returns transformers' model."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)
    # The formula written out: some versions leave the soft cap out of their fused attention.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, 1)
    model = model.to(dtype)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and one merge; the end of the text pads."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")])


def clip(projected: bool, width: int = 16) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
    )
    return _random((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def limited(tokenizer):
    tokenizer.model_max_length = 24
    return tokenizer


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    return transformers.T5Tokenizer(
        vocab=[*pieces, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0
    )


def _random(model: torch.nn.Module) -> torch.nn.Module:
    randomise(model, 3)
    return model.eval()


def vae(channels: int = 4, **settings) -> torch.nn.Module:
    return _random(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            layers_per_block=1,
            **settings,
        )
    )


def unet(**settings) -> torch.nn.Module:
    defaults = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    return _random(diffusers.UNet2DConditionModel(**defaults | settings))


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion_1() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return _sd(unet(), scheduler)


def stable_diffusion_2() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    return _sd(unet(use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True), scheduler)


def _sd(denoiser, scheduler) -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(False),
        tokenizer=limited(clip_tokenizer()),
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> diffusers.DiffusionPipeline:
    denoiser = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=36,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=False),
        text_encoder=clip(False),
        text_encoder_2=clip(True, 20),
        tokenizer=limited(clip_tokenizer()),
        tokenizer_2=limited(clip_tokenizer()),
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def stable_diffusion_3(t5: bool = True) -> diffusers.DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    config = transformers.T5Config(
        vocab_size=32, d_model=40, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(True),
        text_encoder_2=clip(True, 20),
        text_encoder_3=_random(transformers.T5EncoderModel(config)) if t5 else None,
        tokenizer=limited(clip_tokenizer()),
        tokenizer_2=limited(clip_tokenizer()),
        tokenizer_3=t5_tokenizer() if t5 else None,
        transformer=_random(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


PIPELINES = {
    "sd1": stable_diffusion_1,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3 without T5": lambda: stable_diffusion_3(t5=False),
}
