"""Parameters of PyTorch models in our layout, for the tests that compare with them."""

import re
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.pretrained.decoders import FAMILIES

# Models this small lose more to waiting threads than they gain.
torch.set_num_threads(1)


def torch_decoder(config: DecoderConfig, seed: int = 0) -> PreTrainedModel:
    """A random transformers model of that family and shape: attention far from uniform, norms and biases moved."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    values = FAMILIES[config.model_type].write(config) | {"initializer_range": 0.25} | tokens
    torch.manual_seed(seed)
    reference = CONFIG_MAPPING[config.model_type].from_dict(values)
    # The formula written out: some versions leave the soft cap out of their fused attention.
    model = AutoModelForCausalLM.from_config(reference, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def llama_params(model: torch.nn.Module) -> PyTree:
    """The parameters of a transformers decoder (LlamaForCausalLM or its kin) as the tree of models.decoder.Decoder."""
    return llama_tree({name: p.detach().numpy() for name, p in model.named_parameters()})


def llama_tree(arrays: dict[str, np.ndarray]) -> PyTree:
    """Arrays under a decoder's PyTorch parameter names (values or gradients) as the Decoder's tree.

    Linear weights [out, in] become kernels [in, out]; the layers' arrays are stacked on a leading axis.
    """
    stacks: dict[str, dict[int, np.ndarray]] = {}
    flat: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        path, value = name.removeprefix("model."), array
        if path == "embed_tokens.weight":
            path = "embed_tokens.embedding"
        elif value.ndim == 2:
            path, value = path.replace(".weight", ".kernel"), value.T
        if layer := re.fullmatch(r"layers\.(\d+)\.(.*)", path):
            stacks.setdefault(f"layers.{layer[2]}", {})[int(layer[1])] = value
        else:
            flat[path] = value
    flat |= {path: np.stack([layers[i] for i in sorted(layers)]) for path, layers in stacks.items()}
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.device_put(np.array(value))
    return tree
