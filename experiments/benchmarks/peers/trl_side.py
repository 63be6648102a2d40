"""TRL's DPOTrainer, with its defaults but for what the work says; with Liger where it is told so.

Nothing is recomputed, and no weights are kept in float32 beside those of bfloat16: this is the fastest that it offers.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl

from experiments.benchmarks.peers.side import Measured, answer
from experiments.benchmarks.peers.torch_side import device_of, llama, measured, synchronize
from experiments.benchmarks.peers.work import CLIP, LEARNING_RATE, TextDPO, vocabulary
from experiments.common.words import word_tokenizer


def lora(rank: int) -> Any:
    """The factors that ours are, of the projections of attention."""
    # Imported here: full training does not need it.
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


def measure(work: TextDPO, folder: Path, told: Mapping[str, Any]) -> Measured:
    """An epoch of its training. A step is timed from the end of the one before to its own, data included.

    told: "liger", and "ours", what our side answered. The trainer's first step warms it up and is not counted.
    """
    began, device = time.perf_counter(), device_of(work.device)
    weights = folder / "weights" if work.same_weights else None
    model, words = llama(work, weights), word_tokenizer(vocabulary(work.decoder))
    # LoRA's reference is the model without its factors.
    extra: dict[str, Any] = {"peft_config": lora(work.lora_rank)} if work.lora_rank else {}
    if not work.lora_rank:
        extra["ref_model"] = llama(work, weights)
        extra["ref_model"].load_state_dict(model.state_dict())
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        settings = trl.DPOConfig(
            output_dir=output,
            per_device_train_batch_size=work.pairs,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP,
            max_length=sum(work.room),
            bf16=work.precision == "bfloat16",
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=work.device == "cpu",
            use_liger_kernel=told["liger"],
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
        )
        trainer = trl.DPOTrainer(
            model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(work.rows()),
            processing_class=words,
            callbacks=[Clock()],
            **extra,
        )
        checks = first_step(trainer, told["ours"]["about"]["rows"])
        collate: Any = trainer.data_collator
        counts: list[tuple[int, int]] = []

        def counted(examples: Any) -> Any:
            made = collate(examples)
            counts.append((int(made["attention_mask"].sum()), made["attention_mask"].numel()))
            return made

        trainer.data_collator = counted
        # What the check held is not the training's.
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    tokens, places = (sum(column) for column in zip(*counts, strict=True))
    about = {"padding": 1 - tokens / places}
    also = {"liger-kernel": told["liger"], "peft": work.lora_rank}
    packages = ("transformers", "trl", *(name for name, used in also.items() if used))
    seconds = np.diff(ends).tolist()
    return measured(device, seconds, ends[0] - began, trainer.model, checks | {"tokens": tokens}, packages, about)


def first_step(trainer: Any, rows: list[int]) -> dict[str, float]:
    """Loss and gradient norm of the rows that our first step takes, before anything was trained."""
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    squares = [p.grad.float().square().sum() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)
    return {"loss": float(loss.detach()), "gradient": float(torch.stack(squares).sum().sqrt())}


if __name__ == "__main__":
    answer(measure)
