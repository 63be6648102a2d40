"""Parameters of PyTorch models in our layout, for the tests that compare with them."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import PyTree


def llama_params(model: torch.nn.Module) -> PyTree:
    """The parameters of a transformers LlamaForCausalLM as the tree of sysdpo_jax.models.decoder.Decoder."""
    return llama_tree({name: p.detach().numpy() for name, p in model.named_parameters()})


def llama_tree(arrays: dict[str, np.ndarray]) -> PyTree:
    """Arrays under LlamaForCausalLM's parameter names (values or gradients) as the Decoder's tree.

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
        node[leaf] = jnp.array(value)
    return tree
