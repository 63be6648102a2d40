"""Parameters of diffusers' SD3Transformer2DModel and transformers' T5EncoderModel in our layout, by the naming rule."""

import re
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree

EMBEDDINGS = ("shared", "relative_attention_bias")


def torch_tree(arrays: dict[str, np.ndarray]) -> PyTree:
    """Arrays under PyTorch's names (values or gradients) as our tree: list members by index, kernels transposed."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        if parents[-1] in EMBEDDINGS:
            leaf = "embedding"
        elif array.ndim == 2:
            leaf, array = "kernel", array.T
        elif array.ndim == 4:
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.device_put(np.array(array))
    return tree


def torch_params(model: torch.nn.Module) -> PyTree:
    """`torch_tree` of the model's parameters and of its buffers, such as the table of positions."""
    return torch_tree({name: x.detach().numpy() for name, x in (*model.named_parameters(), *model.named_buffers())})


def torch_gradients(model: torch.nn.Module) -> PyTree:
    """`torch_tree` of the gradients that `backward` left, zeros for buffers."""
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return torch_tree(gradients | {name: np.zeros(x.shape, np.float32) for name, x in model.named_buffers()})
