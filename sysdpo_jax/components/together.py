"""Language models in several roles on one base, evaluated in one forward pass: each row's factors are its own role's.

Dense products, norms and attention are computed for the rows of all roles at once; only the thin products of LoRA are
each role's. The roles' rows take turns on the leading axis, so that a mesh cuts those of every role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sysdpo_jax.components.base import LogProbs, Metrics
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.shared_prompt import Runs, prefix_of
from sysdpo_jax.typing import Features, Keys, Params

# Reading a model's weights takes as long as computing with so many tokens: FLOP/s over bytes/s, 240 on a TPU v5e and
# 295 on an H100 in bfloat16; and gathering them over fsdp, see docs/scaling.md.
READING, GATHERING = 256, 1024
# The share of a device's tokens that must be saved: with more of them, reading the weights is no part of the time.
SAVING = 0.05


@dataclass(frozen=True)
class Widths:
    """Of rows of texts: how many there are, and of one preference; their places, those of a common beginning and those
    of a completion."""

    rows: int
    runs: int
    places: int
    shared: int
    completion: int


def widths(features: Features) -> Widths:
    """Of features as `LanguageModel.fold_runs` makes them."""
    rows, places = features["tokens"].shape
    shared = features["shared"].shape[-1] if "shared" in features else 0
    return Widths(rows, features.get("runs", Runs(1)).number, places, shared, features["completion"].shape[-1])


def pays(sizes: Sequence[Widths], parts: int, gathers: bool) -> bool:
    """Whether one pass costs less than one for each role: what padding to a common length adds against what is saved.

    Args:
        sizes: Of each role's rows.
        parts: Into how many parts devices cut the rows.
        gathers: Whether the devices gather the weights.
    """
    if len({(size.rows, size.runs) for size in sizes}) > 1:
        return False
    common = _common(sizes)
    tokens = common.rows * common.places * len(sizes) / parts
    padding = sum(common.places - size.places for size in sizes) * common.rows / parts
    saved = (GATHERING if gathers else READING) * (len(sizes) - 1) - padding
    return saved >= SAVING * tokens


def log_probs_together(
    models: Sequence[LanguageModel], params: Params, features: Sequence[Features], key: Keys
) -> list[tuple[LogProbs, Metrics]]:
    """What `LanguageModel.log_prob_with_metrics` gives for each role, in one pass.

    Args:
        models: Of one decoder.
        params: Of `lora.in_turns`, the roles in this order.
        features: Of each, as many rows.
        key: Not used.

    Returns:
        Each role's.
    """
    common = _common([widths(each) for each in features])
    padded = [_padded(each, common) for each in features]
    longest = max(model.max_prompt_length + model.max_new_tokens for model in models)
    new = max(model.max_new_tokens for model in models)
    model, runs = replace(models[0], max_prompt_length=longest - new, max_new_tokens=new), common.runs
    if prefix_of({**padded[0], "runs": Runs(runs)}, longest) is None:
        runs, padded = 1, [{name: x for name, x in each.items() if name != "shared"} for each in padded]

    def turns(*arrays: Array) -> Array:
        split = [x.reshape(-1, runs, *x.shape[1:]) for x in arrays]
        stacked = jnp.stack(split, axis=1)
        return stacked.reshape(-1, *stacked.shape[3:])

    joined: dict[str, Any] = jax.tree.map(turns, *padded)
    if "shared" in joined:
        joined["runs"] = Runs(runs)
    made = model.log_prob_with_metrics(params, joined, key)

    def of_role(number: int) -> tuple[LogProbs, Metrics]:
        log_prob, metrics = jax.tree.map(lambda x: x.reshape(-1, len(models), runs)[:, number].reshape(-1), made)
        return log_prob, metrics

    return [of_role(number) for number in range(len(models))]


def _common(sizes: Sequence[Widths]) -> Widths:
    """In which all rows fit, the common beginning in places of its own."""
    shared = max(size.shared for size in sizes)
    places = shared + max(size.places - size.shared for size in sizes)
    return replace(sizes[0], places=places, shared=shared, completion=max(size.completion for size in sizes))


def _padded(features: Mapping[str, Any], common: Widths) -> dict[str, Any]:
    wide = {"tokens": common.places, "shared": common.shared, "completion": common.completion}
    made = {name: jnp.asarray(x) for name, x in features.items() if name != "runs"}
    return {name: _wider(x, wide.get(name, x.shape[-1])) if x.ndim > 1 else x for name, x in made.items()}


def _wider(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, width - x.shape[-1])))
