"""Reads an exported folder and an adapter of it with vLLM; run by test_readers.py.

Takes a JSON file with the folder, the adapter, and prompts and completions as token ids, and writes the completions'
log-probabilities beside it: those of the model, and those of the model with the adapter.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(file):
    asked = json.loads(file.read_text())
    model = LLM(
        asked["folder"], dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True, max_lora_rank=8
    )
    made = {"tokenizer": model.get_tokenizer()(asked["text"])["input_ids"]}
    for name, adapter in (("model", None), ("adapter", LoRARequest("adapter", 1, asked["adapter"]))):
        rows = [{"prompt_token_ids": prompt + answer} for prompt, answer in asked["rows"]]
        settings = SamplingParams(max_tokens=1, prompt_logprobs=1)
        # One by one: with an adapter vLLM 0.32 cannot compute prompts' log-probabilities of rows in one batch.
        outputs = [model.generate([row], settings, lora_request=adapter)[0] for row in rows]
        made[name] = [
            sum(output.prompt_logprobs[len(prompt) + place][token].logprob for place, token in enumerate(answer))
            for output, (prompt, answer) in zip(outputs, asked["rows"], strict=True)
        ]
    file.with_suffix(".out").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
