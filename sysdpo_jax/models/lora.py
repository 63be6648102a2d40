"""Low-rank adaptation (LoRA, arXiv 2106.09685): a dense layer's kernel W acts as W + scale A B, and only A, B learn.

The factors are leaves beside the kernel [*, in, out], where * is the layer axis of stacked layers:
lora_a [*, in, rank], lora_b [*, rank, out] (zeros at first, so that nothing changes) and lora_scale [*], the constant
alpha / rank. A tree with them is applied by the same module as the base: `layers.Dense` looks for them, adds the two
thin products and never forms the merged kernel. A reference of the same tree pays those products too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Params

LEAVES = ("lora_a", "lora_b", "lora_scale")

# What `ComponentOptimizer(trainable=...)` takes to train the factors alone.
TRAINABLE = r"lora_[ab]$"

# Sets of dense layers by name, as regular expressions on the "/"-joined path of the layer. An MMDiT's attn2 is
# attention among patches, so "cross_attention" is the U-Net's alone.
TARGETS = {
    "attention": r"(^|/)([qkvo]_proj|out_proj|to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out|SelfAttention/[qkvo])$",
    "cross_attention": r"(^|/)attentions_\d+/transformer_blocks/attn2/(to_[qkv]|to_out_0)$",
    "mlp": r"(^|/)((gate|up|down)_proj|fc[12]|ff(_context)?/(net_0/proj|net_2)|wi_[01]|wo)$",
    "all_linear": r"^(?!(.*/)?lm_head$)",
}


# Entries of a text-to-image component, beside its denoiser, that a target names from the start or leaves alone.
APART = ("text/", "codec/")


class LoRAError(ValueError):
    """An adapter cannot be made as asked: the message names the setting or pattern and the remedy."""


@dataclass(frozen=True)
class LoRA:
    """Which layers get low-rank factors (arXiv 2106.09685, section 4.1).

    Args:
        rank: Of the factors.
        alpha: The product is scaled by alpha / rank.
        targets: A name in TARGETS ("all_linear" is all dense layers but the language model's head) or a regex found in
            the "/"-joined path of a dense layer, or a tuple of several. In a text-to-image component they are the
            denoiser's, but for a regex that begins with "^text/", which is of text encoders: load them with
            train_text=True.

    Raises:
        LoRAError: If rank or alpha is not positive, or targets are empty or no regular expression.
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = "attention"

    def __post_init__(self) -> None:
        hold_tuples(self)
        if self.rank < 1 or self.alpha <= 0:
            raise LoRAError(f"LoRA: rank {self.rank} and alpha {self.alpha} must be positive")
        if not self.patterns:
            raise LoRAError(f"LoRA: no targets: give a regex or a name among {', '.join(TARGETS)}")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise LoRAError(f"LoRA target {pattern!r} is no regular expression ({error}): fix it") from None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The targets, always as a tuple."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets


def low_rank(module: nn.Module, x: Float[Array, "*leading width"], dtype: Any) -> Float[Array, "*leading features"]:
    """scale x A B with the factors in the module's own scope: products in the precision of x, the result in dtype.

    Factors of several roles, as `in_turns` joins them, are each those of the rows whose turn it is.
    """
    factors: list[Array] = [module.get_variable("params", name) for name in LEAVES]
    a, b, scale = factors[0].astype(x.dtype), factors[1].astype(x.dtype), jax.lax.stop_gradient(factors[2])
    if a.ndim == 2:
        thin = (x.reshape(-1, x.shape[-1]) @ a) * scale.astype(x.dtype)
        made = jnp.matmul(thin, b, preferred_element_type=dtype)
    else:
        turns = x.reshape(len(x) // len(a), len(a), -1, x.shape[-1])
        thin = jnp.einsum("ngiw,gwr->ngir", turns, a) * scale[:, None, None].astype(x.dtype)
        made = jnp.einsum("ngir,grf->ngif", thin, b, preferred_element_type=dtype)
    return made.reshape(*x.shape[:-1], -1)


def in_turns(base: Params, roles: Sequence[Params]) -> Params:
    """The tree for rows of which each one's role follows that of the row before it, in this order and round again.

    Args:
        base: The weights, which may have factors that play no part.
        roles: Trees whose factors are read; ranks and layers may differ.

    Returns:
        The weights with the factors of all roles, on an axis before those of one, and zeros where a role has none.
    """
    flat = flatten_dict(strip_lora(base), keep_empty_nodes=True, sep="/")
    flats = [flatten_dict(role, sep="/") for role in roles]
    layers = sorted({path.removesuffix("/lora_a") for own in flats for path in own if path.endswith("/lora_a")})
    for layer in layers:
        carried = [tuple(own[f"{layer}/{name}"] for name in LEAVES) for own in flats if f"{layer}/lora_a" in own]
        rank, like = max(a.shape[-1] for a, _, _ in carried), carried[0]

        def padded(own: Mapping[str, Any], layer: str = layer, rank: int = rank, like: Any = like) -> Any:
            a, b, scale = (own.get(f"{layer}/{name}", jnp.zeros_like(x)) for name, x in zip(LEAVES, like, strict=True))
            lead, more = [(0, 0)] * (a.ndim - 2), rank - a.shape[-1]
            return jnp.pad(a, [*lead, (0, 0), (0, more)]), jnp.pad(b, [*lead, (0, more), (0, 0)]), scale

        for name, axis, leaves in zip(LEAVES, (-3, -3, -1), zip(*map(padded, flats), strict=True), strict=True):
            flat[f"{layer}/{name}"] = jnp.stack(leaves, axis=axis)
    return unflatten_dict(flat, sep="/")


def add_lora(params: Params, lora: LoRA, key: PRNGKeyArray, param_dtype: Any = "float32") -> Params:
    """Put factors beside the kernels of one component.

    A ~ U(-1/sqrt(in), 1/sqrt(in)), Kaiming's with a = sqrt(5) (arXiv 1502.01852), as PEFT starts it, and B = 0.

    Args:
        params: The component's tree.
        lora: Which layers; only dense ones can be targets.
        key: Of A.
        param_dtype: Of the factors.

    Returns:
        The tree with factors; the other leaves are the same arrays.

    Raises:
        LoRAError: For a pattern that finds no layer, naming some that there are, and for a layer that has factors
            already.
    """
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    factors = flatten_dict(lora_factors(params, lora, key, param_dtype), sep="/")
    for path in factors:
        if path in flat:
            module = path.rpartition("/")[0]
            raise LoRAError(f"{module} carries LoRA already: merge_lora or strip_lora first, or target other layers")
    return unflatten_dict({**flat, **factors}, sep="/")


def lora_factors(params: Params, lora: LoRA, key: PRNGKeyArray, param_dtype: Any = "float32") -> Params:
    """The factors alone that `add_lora` would put beside the kernels: the tree of a role, whose `Node` has a `base`.

    Args:
        params: The tree of the base; factors of its own play no part.
        lora: As for `add_lora`.
        key: As for `add_lora`.
        param_dtype: As for `add_lora`.

    Returns:
        A tree of factors.

    Raises:
        LoRAError: For a pattern that finds no layer, naming some that there are.
    """
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    matched, factors = _targets(flat, lora), {}
    for path, layer_key in zip(matched, jax.random.split(key, len(matched)), strict=True):
        *stack, width, features = flat[f"{path}/kernel"].shape
        a = jax.random.uniform(layer_key, (*stack, width, lora.rank), jnp.float32, -1.0, 1.0) / width**0.5
        factors[f"{path}/lora_a"] = a.astype(param_dtype)
        factors[f"{path}/lora_b"] = jnp.zeros((*stack, lora.rank, features), param_dtype)
        factors[f"{path}/lora_scale"] = jnp.full(stack, lora.alpha / lora.rank, jnp.float32)
    return unflatten_dict(factors, sep="/")


def on_base(base: Params, own: Params) -> Params:
    """The whole tree of a role: the weights of its base, without factors that the base has, and what is its own.

    Args:
        base: The tree that holds the weights.
        own: The role's: factors and, in place of the base's, whatever else it holds.

    Returns:
        The tree; its leaves are the same arrays.

    Raises:
        LoRAError: For a factor of a layer that the base does not have.
    """
    flat = flatten_dict(strip_lora(base), keep_empty_nodes=True, sep="/")
    added = flatten_dict(own, sep="/")
    for path in added:
        module = path.rpartition("/")[0]
        if is_lora(path) and f"{module}/kernel" not in flat:
            raise LoRAError(f"{path} is of a layer that the base does not have: make the factors of it by lora_factors")
    return unflatten_dict({**flat, **added}, sep="/")


def is_lora(path: str) -> bool:
    """Whether the "/"-joined path of a leaf is that of a factor or its scale."""
    return path.rpartition("/")[2] in LEAVES


def strip_lora(params: Params) -> Params:
    """The base: the tree without factors, its leaves the same arrays."""
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if not is_lora(path)}, sep="/")


def merge_lora(params: Params) -> Params:
    """The plain tree that computes the same, each kernel merged with its factors: a second copy of those kernels."""
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for path in flat:
        if path.endswith("/lora_a"):
            module = path.removesuffix("/lora_a")
            leaves = {name: flat[f"{module}/{name}"] for name in ("kernel", *LEAVES)}
            merged[f"{module}/kernel"] = merged_kernel(leaves)
    return unflatten_dict(merged, sep="/")


def merged_kernel(leaves: Mapping[str, Any]) -> Float[Array, "*stack width features"]:
    """W + scale A B of one layer's leaves (kernel, lora_a, lora_b, lora_scale), in float32, in the kernel's dtype."""
    kernel, a, b, scale = (jnp.asarray(leaves[name]) for name in ("kernel", *LEAVES))
    # Accelerators round the operands of a float32 product unless asked not to.
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) + scale.astype(jnp.float32)[..., None, None] * product).astype(kernel.dtype)


def _targets(flat: Mapping[str, Any], lora: LoRA) -> list[str]:
    """The sorted paths of the dense layers that the patterns find."""
    dense = [path.removesuffix("/kernel") for path, leaf in flat.items() if _is_dense(path, leaf)]
    apart = APART if any(path.startswith("denoiser/") for path in flat) else ()
    matched: set[str] = set()
    for pattern in lora.patterns:
        regex = TARGETS.get(pattern, pattern)
        left = tuple(entry for entry in apart if not pattern.startswith(f"^{entry}"))
        found = [path for path in dense if re.search(regex, path) and not path.startswith(left)]
        if not found:
            modules = {path.rpartition("/")[0] for path in flat}
            others = sorted(path for path in modules if path and re.search(regex, path))
            carried = f", only what cannot carry factors ({', '.join(others[:3])})" if others else ""
            examples = {path.rpartition("/")[2]: path for path in reversed(dense)}
            raise LoRAError(
                f"LoRA target {pattern!r} finds no dense layer{carried}. Dense layers here are, for example, "
                f"{', '.join(sorted(examples.values())[:8]) or 'none at all'}; the named sets are {', '.join(TARGETS)}"
            )
        matched |= set(found)
    return sorted(matched)


def _is_dense(path: str, leaf: Any) -> bool:
    # A convolution's kernel has four axes; a kernel at the root is a component's own, read by no Dense.
    return path.endswith("/kernel") and leaf.ndim in (2, 3)
