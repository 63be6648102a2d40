"""The DPO loss of a one-node system and its gradient, for each family of decoders, against torch autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sysdpo_jax import CompoundSystem, DirectObjective, LanguageModel, Node, PairBatch
from sysdpo_jax.batch import share
from sysdpo_jax.models.decoder import Decoder
from tests.components.stubs import IdTokenizer
from tests.parity.convert import llama_params, llama_tree, torch_decoder
from tests.parity.test_decoder import QUICK, random_tokens
from tests.parity.test_decoder_families import VARIANTS

PROMPTS = np.array([3, 5, 2, 4])
LENGTHS = {"chosen": np.array([12, 9, 4, 10]), "rejected": np.array([7, 12, 10, 5])}
TOKENS = {side: random_tokens((4, 12), seed=seed) for seed, side in enumerate(LENGTHS)}
# A prompt is the same on both sides.
TOKENS["rejected"] = np.where(np.arange(12) < PROMPTS[:, None], TOKENS["chosen"], TOKENS["rejected"])
# Small enough that the sigmoid, of margins of tens of nats, stays in its bend.
BETA = 0.02


def torch_log_prob(model: PreTrainedModel, side: str) -> torch.Tensor:
    """[4]: the sum of the log-probabilities of each completion's tokens, one row at a time and without padding."""
    rows = []
    for tokens, prompt, length in zip(torch.from_numpy(TOKENS[side]), PROMPTS, LENGTHS[side], strict=True):
        scores = model(tokens[None, :length]).logits[0].log_softmax(-1)
        rows.append(scores[prompt - 1 : length - 1].gather(-1, tokens[prompt:length, None]).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2 window", "qwen3 window", "gemma2", "gemma3"])
def test_loss_and_gradient(name: str, shared: bool) -> None:
    """With prompts once for each side, and once for both.

    1e-3 of each array's largest entry: float32 sums over rows, tokens and layers, ordered differently."""
    policy, reference = (torch_decoder(VARIANTS[name], seed=seed) for seed in (6, 7))
    ratios = {}
    for side in LENGTHS:
        with torch.no_grad():
            base = torch_log_prob(reference, side)
        ratios[side] = torch_log_prob(policy, side) - base
    margins = BETA * (ratios["chosen"] - ratios["rejected"])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    expected = llama_tree({n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None})
    assert margins.abs().max() < 5

    tokenizer = IdTokenizer()
    component = LanguageModel(Decoder(VARIANTS[name]), tokenizer, max_prompt_length=6, max_new_tokens=9)
    system = CompoundSystem(("request",), (Node("answer", component, ("request",)),))
    whole = {"prompt_lengths": PROMPTS} | dict.fromkeys(("truncated", "retokenized"), np.zeros(4, np.float32))
    texts = [whole | {"tokens": TOKENS[side], "lengths": LENGTHS[side]} for side in LENGTHS]
    sides = [{"answer": component.resize(text, {"prompt": 5, "completion": 9})} for text in texts]
    batch = jax.tree.map(jnp.asarray, PairBatch(*(share(system, sides) if shared else sides)))
    trees = {"answer": llama_params(policy)}, {"answer": llama_params(reference)}
    value, gradients = jax.jit(
        jax.value_and_grad(lambda p, r: DirectObjective(BETA)(system, p, r, batch, jax.random.key(0))[0]),
        compiler_options=QUICK,
    )(*trees)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    assert jax.tree.map(jnp.shape, gradients["answer"]) == jax.tree.map(jnp.shape, expected)
    found = dict(jax.tree.leaves_with_path(gradients["answer"]))
    for path, wanted in jax.tree.leaves_with_path(expected):
        where = jax.tree_util.keystr(path)
        assert np.abs(wanted).max() > 0, where
        np.testing.assert_allclose(found[path], wanted, rtol=0, atol=1e-3 * np.abs(wanted).max(), err_msg=where)
