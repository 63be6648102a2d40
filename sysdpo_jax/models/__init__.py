"""Neural networks as Flax linen modules and their configurations; nothing of ours is imported here."""

from sysdpo_jax.models.attention import attend, choose
from sysdpo_jax.models.attention_request import AttentionRequest
from sysdpo_jax.models.autoencoder import AutoencoderKL
from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.models.decoder_config import FULL, SLIDING, DecoderConfig
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.remat import choosing
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig

__all__ = [
    "FULL",
    "SLIDING",
    "AttentionRequest",
    "AutoencoderConfig",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "Decoder",
    "DecoderConfig",
    "MMDiT",
    "MMDiTConfig",
    "UNet2DCondition",
    "UNetConfig",
    "attend",
    "choose",
    "choosing",
]
