"""The reference system: a language model that writes three captions and a diffusion model that draws them."""

from dataclasses import dataclass, replace

from experiments.common.models import small_writer
from experiments.common.words import word_tokenizer
from experiments.progressive.world import CAPTION_WORDS, CAPTIONS, SIZE, VOCABULARY, split_captions
from sysdpo_jax import CompoundSystem, Diffusion, LanguageModel, Node, PixelCodec, TextEncoder, Tool
from sysdpo_jax.diffusion import DDIM, Constant, NoiseSchedule
from sysdpo_jax.models import CLIPTextConfig, CLIPTextEncoder, UNet2DCondition, UNetConfig

LANGUAGE, IMAGE = "lm", "unet"
PROMPT_TOKENS = 5
ANSWER_TOKENS = CAPTIONS * (CAPTION_WORDS + 1)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the two models and of the sampler."""

    lm_width: int = 96
    lm_layers: int = 2
    image_widths: tuple[int, ...] = (48,)
    text_width: int = 64
    patch: int = 4
    ddim_steps: int = 12


def language_model(config: ModelConfig) -> LanguageModel:
    """A small Llama decoder that answers a request with three captions."""
    return small_writer(VOCABULARY, PROMPT_TOKENS, ANSWER_TOKENS, config.lm_width, config.lm_layers)


def diffusion(config: ModelConfig) -> Diffusion:
    """A small pixel-space U-Net that predicts z_0; as it stands its log-probability is minus the mean squared error."""
    words = word_tokenizer(VOCABULARY)
    codec = PixelCodec((SIZE, SIZE, 3), config.patch)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=config.text_width,
        intermediate_size=2 * config.text_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_WORDS,
    )
    channels = codec.latent_shape[-1]
    unet = UNetConfig(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.image_widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.image_widths),
        block_out_channels=config.image_widths,
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return Diffusion(
        UNet2DCondition(unet),
        TextEncoder(CLIPTextEncoder(text), words, CAPTION_WORDS),
        codec,
        num_steps=config.ddim_steps,
        schedule=NoiseSchedule("squaredcos_cap_v2"),
        prediction_type="sample",
        weighting=Constant(2.0),
        sampler=DDIM(clip=1.0),
    )


def build(config: ModelConfig, timesteps: tuple[int, int], weight: float) -> CompoundSystem:
    """Request -> answer -> three captions -> three images, ready for alignment.

    timesteps: range of diffusion times in which captions decide the picture. weight: of the images' log-ratio, so that
    it is weight * (mse_ref - mse_theta) summed over the three, with times spread evenly over them.
    """
    images = replace(diffusion(config), timesteps=timesteps, strata=CAPTIONS)
    return CompoundSystem(
        inputs=("request",),
        nodes=(
            Node("answer", language_model(config), parents=("request",), params=LANGUAGE),
            Node("captions", Tool(split_captions), parents=("answer",), plate=CAPTIONS),
            Node("images", images, parents=("captions",), params=IMAGE, plate=CAPTIONS, weight=weight),
        ),
    )
