"""Text-to-image pipelines of diffusers as Diffusion and FlowMatching components, and back.

The denoiser is what is trained; the autoencoder and, unless asked otherwise, the text encoders are frozen inside the
component. A safety checker looks at finished pictures only: it is neither loaded nor written.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.components import Diffusion, FlowMatching, FrozenText, LatentCodec, SD3Text, SDXLText, TextEncoder
from sysdpo_jax.components.text import CaptionTruncation, TextConditioner
from sysdpo_jax.generation.samplers import FlowEuler
from sysdpo_jax.models.mmdit import MMDiT
from sysdpo_jax.models.unet import UNet2DCondition
from sysdpo_jax.pretrained import schedulers
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, check_settings, read_json
from sysdpo_jax.pretrained.handing_on import recalled, remember, write_files, write_like
from sysdpo_jax.pretrained.params import Shardings
from sysdpo_jax.pretrained.parts import CLIP, MMDIT, T5, UNET, VAE, Loader, Part, write_part
from sysdpo_jax.pretrained.tokenizer_files import FILES, write_tokenizer
from sysdpo_jax.typing import Params

SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
# What diffusers samples with when its caller says nothing.
DEFAULTS = {
    SD: {"num_steps": 50, "guidance_scale": 7.5},
    SDXL: {"num_steps": 50, "guidance_scale": 5.0},
    SD3: {"num_steps": 28, "guidance_scale": 7.0},
}
TEXTS: dict[str, dict[str, Part]] = {
    SD: {"text_encoder": CLIP},
    SDXL: {"text_encoder": CLIP, "text_encoder_2": CLIP},
    SD3: {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
}
SCHEDULER, EXTRACTOR = "scheduler/scheduler_config.json", "feature_extractor"
# The only encoder that a pipeline can do without.
OPTIONAL = "text_encoder_3"
Pipeline = Diffusion | FlowMatching


def load_pipeline(
    path: Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = None,
    shardings: Shardings | None = None,
    variant: str | None = None,
    train_text: bool = False,
    image_size: tuple[int, int] | None = None,
    truncation: CaptionTruncation = "error",
    **settings: Any,
) -> tuple[Pipeline, Params]:
    """The component of a pipeline's folder and its parameters, {"denoiser": ...} and the trained text encoders.

    image_size: (height, width) of the pictures, by default what the denoiser was made for. truncation: of captions, see
    `TextEncoder`. settings: fields of the component; steps and guidance are by default those of diffusers' pipeline.
    """
    index = ConfigReader(read_json(path / "model_index.json"), str(path / "model_index.json"))
    kind = index.take("_class_name")
    if kind not in DEFAULTS:
        raise CheckpointError(f"{index.where}: {kind} is not supported, only {', '.join(DEFAULTS)}")
    check_settings(FlowMatching if kind == SD3 else Diffusion, settings, {"denoiser", "text", "codec", "source"})
    name, part = _denoiser(kind)
    listed = [key for key in TEXTS[kind] if index.take(key, [None, None])[1] is not None]
    for key in TEXTS[kind]:
        if key not in listed and key != OPTIONAL:
            raise CheckpointError(f"{index.where} has no {key}: fetch the whole pipeline")
    zero_null = bool(index.take("force_zeros_for_empty_prompt", True)) if kind == SDXL else False
    index.ignore("scheduler", "vae", name, *(_tokenizer_name(key) for key in TEXTS[kind]))
    # They look at or mark finished pictures.
    index.ignore("safety_checker", "feature_extractor", "requires_safety_checker", "add_watermarker")
    index.expect("image_encoder", [None, None])
    index.finish()

    load = Loader(path, dtype, param_dtype, variant)
    denoiser, weights = load.part(name, part, _below(shardings, "denoiser"), remat=remat)
    encoders, text_params, tokenizers = {}, {}, {}
    for key in listed:
        encoders[key], text_params[key] = load.part(key, TEXTS[kind][key], _below(shardings, key))
        tokenizers[key] = _tokenizer(path / _tokenizer_name(key), encoders[key].config)
    text = _text(kind, encoders, tokenizers, truncation, zero_null, denoiser.config)
    # The autoencoder runs once, outside the step, and loses detail in half precision.
    autoencoder, frozen = Loader(path, "float32", param_dtype, variant).part("vae", VAE, _below(shardings, "vae"))
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    size = image_size or tuple(factor * n for n in _pair(denoiser.config.sample_size or 64))
    scheduler_file = path / SCHEDULER
    scheduler = schedulers.read(ConfigReader(read_json(scheduler_file), str(scheduler_file)))
    parts = (f"{key}/config.json" for key in (name, "vae", *listed))
    tokenizer_files = (f"{_tokenizer_name(key)}/{pattern}" for key in listed for pattern in FILES)
    patterns = ("model_index.json", SCHEDULER, f"{EXTRACTOR}/*.json", *parts, *tokenizer_files)
    common = {
        "source": remember(path, variant, patterns),
        "denoiser": denoiser,
        "text": text if train_text else FrozenText(text, text_params),
        "codec": LatentCodec(autoencoder, frozen, size),
    }
    params = {"denoiser": weights, **(text_params if train_text else {})}
    common = {**common, **DEFAULTS[kind], **settings}
    if isinstance(scheduler, FlowEuler) != (kind == SD3):
        raise CheckpointError(f"{scheduler_file}: a {type(scheduler).__name__} does not go with a {kind}")
    if isinstance(scheduler, FlowEuler):
        return FlowMatching(**{"sampler": scheduler, **common}), params
    planned = {
        "schedule": scheduler.schedule,
        "prediction_type": scheduler.prediction_type,
        "sampler": scheduler.sampler,
    }
    return Diffusion(**{**planned, **common}), params


def save_pipeline(folder: Path, component: Pipeline, params: Params) -> None:
    """The folders of a pipeline as diffusers' save_pretrained lays them out, frozen parts included.

    Of the files that the component was read from all is kept that it does not contradict.
    Raises `CheckpointError` for a component without an autoencoder, or whose text side is none of diffusers'.
    """
    if not isinstance(component.codec, LatentCodec):
        raise CheckpointError(
            "only a component with a LatentCodec is a pipeline of diffusers; this one works on pixels"
        )
    text = component.text.text if isinstance(component.text, FrozenText) else component.text
    text_params = component.text.params if isinstance(component.text, FrozenText) else params
    kind, source = _kind(component, text), component.source
    name, part = _denoiser(kind)
    written: dict[str, Any] = {"_class_name": kind, "image_encoder": [None, None]}

    def write(key: str, part: Part, module: Any, params: Params, ids: dict[str, int | None]) -> None:
        below = None if source is None else source.below(key)
        written[key] = write_part(folder / key, part, module, params, below, ids)

    write(name, part, component.denoiser, params["denoiser"], {})
    write("vae", VAE, component.codec.autoencoder, component.codec.params, {})
    read = recalled(source, "model_index.json")
    for key, encoder_part in TEXTS[kind].items():
        beside, suffix = _tokenizer_name(key), key.removeprefix("text_encoder")
        encoder, tokenizer = getattr(text, f"encoder{suffix}"), getattr(text, f"tokenizer{suffix}")
        written[key] = written[beside] = [None, None]
        if encoder is not None:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write(key, encoder_part, encoder, text_params[key], ids)
            (folder / beside).mkdir()
            as_read = write_tokenizer(folder / beside, tokenizer, None if source is None else source.below(beside))
            # What is written anew says PreTrainedTokenizerFast too, which every version reads from tokenizer.json.
            written[beside] = read[beside] if as_read else ["transformers", "PreTrainedTokenizerFast"]
    scheduler = schedulers.write(
        component.sampler
        if isinstance(component, FlowMatching)
        else schedulers.DiffusionScheduler(component.schedule, component.prediction_type, component.sampler),
        recalled(source, SCHEDULER),
    )
    write_like(folder, SCHEDULER, scheduler, source)
    written["scheduler"] = ["diffusers", scheduler["_class_name"]]
    extractor = () if source is None else source.below(EXTRACTOR).files
    write_files(folder, tuple((f"{EXTRACTOR}/{file}", data) for file, data in extractor))
    if not extractor:
        written[EXTRACTOR] = [None, None]
    if kind == SD:
        written |= {"safety_checker": [None, None], "requires_safety_checker": False}
    if isinstance(text, SDXLText):
        written["force_zeros_for_empty_prompt"] = text.zero_null
    write_like(folder, "model_index.json", read | written, source)


def denoiser_part(component: Pipeline) -> tuple[str, Part]:
    """The denoiser's name in a pipeline, and its kind. Raises `CheckpointError` for another one."""
    denoiser = component.denoiser
    if isinstance(denoiser, UNet2DCondition):
        return "unet", UNET
    if isinstance(denoiser, MMDiT):
        return "transformer", MMDIT
    raise CheckpointError(f"a {type(denoiser).__name__} is no denoiser of diffusers: use a run's checkpoints")


def _denoiser(kind: str) -> tuple[str, Part]:
    return ("transformer", MMDIT) if kind == SD3 else ("unet", UNET)


def _kind(component: Pipeline, text: TextConditioner) -> str:
    if isinstance(component, FlowMatching) and isinstance(text, SD3Text):
        return SD3
    if isinstance(component, Diffusion) and isinstance(text, SDXLText):
        return SDXL
    if isinstance(component, Diffusion) and isinstance(text, TextEncoder):
        return SD
    raise CheckpointError(f"no pipeline of diffusers is a {type(component).__name__} with a {type(text).__name__}")


def _text(
    kind: str,
    encoders: dict[str, Any],
    tokenizers: dict[str, Any],
    truncation: CaptionTruncation,
    zero_null: bool,
    config: Any,
) -> TextConditioner:
    """The conditioner; config: the denoiser's."""
    first, tokenizer = encoders["text_encoder"], tokenizers["text_encoder"]
    if kind == SD:
        return TextEncoder(first, tokenizer, first.config.max_position_embeddings, truncation)
    second, tokenizer_2 = encoders["text_encoder_2"], tokenizers["text_encoder_2"]
    length = first.config.max_position_embeddings
    if kind == SDXL:
        return SDXLText(first, second, tokenizer, tokenizer_2, length, truncation, zero_null)
    third, tokenizer_3 = encoders.get("text_encoder_3"), tokenizers.get("text_encoder_3")
    width = config.joint_attention_dim
    return SD3Text(first, second, third, tokenizer, tokenizer_2, tokenizer_3, width, length, truncation=truncation)


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a text encoder. encoder: its configuration."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer ({error}): fetch the whole pipeline") from None
    # Without its vocabulary a tokenizer loads all the same, with a few tokens; T5 has room for more than there are.
    if not 0.5 * encoder.vocab_size < len(tokenizer) <= encoder.vocab_size:
        raise CheckpointError(
            f"{folder} has {len(tokenizer)} tokens but its text encoder {encoder.vocab_size}: fetch the whole tokenizer"
        )
    return tokenizer


def _tokenizer_name(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _below(shardings: Shardings | None, name: str) -> Shardings | None:
    """Shardings of one subtree, asked for under its own name so that rules on paths see it."""
    return None if shardings is None else lambda tree: shardings({name: tree})[name]


def _pair(size: Any) -> tuple[int, int]:
    height, width = np.broadcast_to(size, 2).tolist()
    return height, width
