"""Reads exported folders with the transformers that is in front of the path; run by test_readers.py.

Takes a JSON file of folders and texts, prints as JSON the version, and for each folder the texts' token ids, the chat's
where there is a template, and the logits of the first text.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def read(folder, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    chat = None
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": texts[0]}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(torch.tensor([ids[0]])).logits[0]
    return {"ids": ids, "chat": chat, "logits": logits.tolist()}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([transformers.__version__, [read(folder, asked["texts"]) for folder in asked["folders"]]]))
