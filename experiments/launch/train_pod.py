"""Align a language model and a diffusion model as one system, in every process that a launcher starts.

    python -m experiments.launch.train_pod --writer llama --painter sdxl --preferences pairs.jsonl --directory runs/pod

A request is answered by a caption, the caption by an image; a line of the preferences is {"inputs": {"request": ...},
"chosen": {"caption": ..., "image": path}, "rejected": ...}. One process on one device needs nothing more. Several find
each other by what Slurm, GKE or Cloud TPU put into their environment; all must see the same `--directory`.

Given again, the command goes on from the newest checkpoint in the directory. SIGTERM saves and ends the process with
`--preempted-exit-code`; schedulers that take 0 for the end of the work want another number there.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import PyTree

import sysdpo_jax as sj
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Config:
    """writer, painter: folders or hub names of the language model and of the diffusion pipeline.

    data, fsdp, tensor: the mesh; fsdp None takes the devices that the other two leave.
    batch_size: pairs a step, of all processes together. lora_rank: 0 trains all weights, in float32.
    warmup: steps. weight: of the image's log-ratio beside the caption's. dtype: of the computation. remat: see
    `pretrained.load`; accumulate, profile: see `Trainer`. resume: False refuses a directory that holds a checkpoint.
    """

    writer: str
    painter: str
    preferences: Path
    directory: Path
    data: int = 1
    fsdp: int | None = None
    tensor: int = 1
    steps: int = 1000
    batch_size: int = 16
    beta: float = 0.1
    weight: float = 1.0
    learning_rate: float = 1e-5
    warmup: int = 100
    lora_rank: int = 16
    max_prompt_length: int = 256
    max_new_tokens: int = 77
    dtype: str = "bfloat16"
    remat: str | None = "full"
    accumulate: int = 1
    profile: tuple[int, int] | None = None
    resume: bool = True
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0
    preempted_exit_code: int = 0


# What a resumed run must have as it was: the others may change with the machine.
SAME = (
    "writer", "painter", "preferences", "steps", "batch_size", "beta", "weight", "learning_rate", "warmup", "lora_rank",
    "max_prompt_length", "max_new_tokens", "dtype", "seed",
)  # fmt: skip


def build(config: Config, mesh: Mesh) -> tuple[sj.CompoundSystem, Params, sj.ComponentOptimizer]:
    """The system, its parameters on the mesh, and the optimiser of each component."""
    full = config.lora_rank == 0
    common: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": "float32" if full else config.dtype,
        "remat": config.remat,
        "shardings": partial(place, mesh),
    }
    room: dict[str, Any] = {"max_prompt_length": config.max_prompt_length, "max_new_tokens": config.max_new_tokens}
    writer, writer_params = sj.pretrained.load(config.writer, truncation="keep_start", **room, **common)
    painter, painter_params = sj.pretrained.load(config.painter, truncation="keep_start", **common)
    system = sj.CompoundSystem(
        inputs=("request",),
        nodes=(
            sj.Node("caption", writer, parents=("request",), params="writer"),
            sj.Node("image", painter, parents=("caption",), params="painter", weight=config.weight),
        ),
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    params = {"writer": writer_params, "painter": painter_params}
    if full:
        return system, params, sj.ComponentOptimizer(optax.adamw(schedule))
    lora = sj.LoRA(config.lora_rank, 2.0 * config.lora_rank)
    keys = dict(zip(params, jax.random.split(jax.random.key(config.seed)), strict=True))
    adapted = {name: sj.add_lora(tree, lora, keys[name]) for name, tree in params.items()}
    return system, adapted, sj.ComponentOptimizer(optax.adamw(schedule), trainable=sj.LORA_TRAINABLE)


def place(mesh: Mesh, tree: Mapping[str, Any]) -> PyTree:
    """Shardings of what is loaded: trained models over the mesh, frozen encoders whole on a device of each process.

    Encoders run when a process prepares its own rows, which the others do not take part in.
    """
    if any(name == "vae" or name.startswith("text_encoder") for name in tree):
        own = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: own, tree)
    return sj.tree_shardings(mesh, tree)


def main(arguments: list[str]) -> None:
    """Train until `steps`, from the newest checkpoint if there is one."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    sj.initialize()
    mesh = sj.make_mesh(config.data, config.fsdp, config.tensor)
    system, params, component = build(config, mesh)
    optimizer = sj.make_optimizer(dict.fromkeys(system.param_keys, component))
    records = sj.load_preferences(config.preferences)
    batches = sj.preference_dataset(system, records, config.batch_size, config.seed, shard=sj.batch_shard(mesh))
    trainer = sj.Trainer(
        system,
        sj.DirectObjective(config.beta),
        optimizer,
        config.directory,
        mesh=mesh,
        accumulate=config.accumulate,
        profile=config.profile,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        config={name: str(getattr(config, name)) for name in SAME},
    )
    state = sj.create_state(system, params, optimizer, mesh)
    del params
    try:
        state = trainer.fit(state, batches, config.steps, jax.random.key(config.seed + 1), config.resume)
    except sj.Preempted:
        raise SystemExit(config.preempted_exit_code) from None
    if jax.process_index() == 0:
        print(f"{int(state.step)} steps done; checkpoints in {config.directory / 'checkpoints'}")


if __name__ == "__main__":
    main(sys.argv[1:])
