"""Parameters of diffusers' U-Net and autoencoder and transformers' CLIP in our layout, for the parity tests."""

import re
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree


def torch_tree(arrays: dict[str, np.ndarray]) -> PyTree:
    """Arrays under PyTorch's parameter names (values or gradients) as our tree.

    Lists become indexed names, linear weights [out, in] kernels [in, out], convolutions [out, in, h, w] kernels
    [h, w, in, out]; a transformer's 1x1 projections are dense; its blocks are stacked.
    """
    tree: dict[str, Any] = {}
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, array in arrays.items():
        path = re.sub(r"^(text_model\.)?(encoder\.(?=layers)|embeddings\.)?", "", name)
        *parents, leaf = re.sub(r"(?<!transformer_blocks)\.(\d+)", r"_\1", path).split(".")
        if parents[-1].endswith("_embedding") and array.ndim == 2:
            leaf = "embedding"
        elif array.ndim == 2:
            leaf, array = "kernel", array.T
        elif array.ndim == 4:
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
            if parents[-1] in ("proj_in", "proj_out"):
                array = array[0, 0]
        if "transformer_blocks" in parents:
            # named_parameters() has the blocks in their order.
            place = parents.index("transformer_blocks") + 1
            stack = stacks.setdefault((*parents[:place], *parents[place + 1 :], leaf), [])
            assert len(stack) == int(parents.pop(place))
            array = np.stack([*stack, array])
            stack.append(array[-1])
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.device_put(np.array(array))
    return tree


def torch_params(model: torch.nn.Module) -> PyTree:
    """`torch_tree` of the model's parameters."""
    return torch_tree({name: p.detach().numpy() for name, p in model.named_parameters()})


def torch_gradients(model: torch.nn.Module) -> PyTree:
    """`torch_tree` of the gradients that `backward` left."""
    return torch_tree({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: biases start at 0 and norms at 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
