"""Components: the generators a system is made of."""

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.components.chat_prompt import ChatPrompt
from sysdpo_jax.components.codec import Codec, LatentCodec, PixelCodec, bucket_sizes
from sysdpo_jax.components.control import Switch
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.remote import RemoteModel
from sysdpo_jax.components.tables import Categorical, Gaussian
from sysdpo_jax.components.text import FrozenText, SD3Text, SDXLText, TextConditioner, TextEncoder
from sysdpo_jax.components.text_to_image import Diffusion, FlowMatching
from sysdpo_jax.components.tool import Tool
from sysdpo_jax.components.tool_calls import Functions, ToolCall, tool_calls

__all__ = [
    "Categorical",
    "ChatPrompt",
    "Codec",
    "Component",
    "Diffusion",
    "FlowMatching",
    "FrozenText",
    "Functions",
    "Gaussian",
    "LanguageModel",
    "LatentCodec",
    "PixelCodec",
    "RecordError",
    "RemoteModel",
    "SD3Text",
    "SDXLText",
    "Switch",
    "TextConditioner",
    "TextEncoder",
    "Tool",
    "ToolCall",
    "bucket_sizes",
    "tool_calls",
]
