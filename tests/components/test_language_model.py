"""The LanguageModel component against transformers' Llama, and what its records may hold."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sysdpo_jax import LanguageModel, RecordError
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, byte_tokenizer, word_tokenizer
from tests.parity.convert import llama_params

KEY = jax.random.key(0)
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROMPTS = ["a red", "the small cube on the left", "ball"]
ANSWERS = ["ball", "a large green ball on the left", ""]
# The component is static, as in a system; eager dispatch of the decoder would be most of the tests' time.
log_prob = jax.jit(LanguageModel.log_prob, static_argnums=0)
log_prob_with_metrics = jax.jit(LanguageModel.log_prob_with_metrics, static_argnums=0)
BOS, EOS, UNK = (SPECIAL.index(token) for token in ("<bos>", "<eos>", "<unk>"))
ASKED = [{"role": "user", "content": "a red"}]


def component(tokenizer=None, **settings):
    defaults = {"max_prompt_length": 8, "max_new_tokens": 8}
    tokenizer = tokenizer or word_tokenizer()
    sizes = SIZES | {"vocab_size": max(SIZES["vocab_size"], len(tokenizer))}
    return LanguageModel(Decoder(DecoderConfig(**sizes)), tokenizer, **(defaults | settings))


@pytest.fixture(scope="module")
def torch_model():
    torch.manual_seed(0)
    # Weights five times the default: with small ones every token is about as likely, and few mistakes would show.
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def params(torch_model):
    return llama_params(torch_model)


def torch_log_prob(model, prompt, completion):
    """log p(completion | prompt) of one unpadded row of ids, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(completion)[:, None]).sum())


def ids(text):
    return [(*SPECIAL, *WORDS).index(word) for word in text.split()]


def test_log_prob_equals_transformers(torch_model, params):
    """Each row alone and unpadded on their side. 1e-4: float32 sums over at most 8 tokens."""
    node = component()
    features = node.prepare(ANSWERS, {"x": PROMPTS})
    ours, metrics = log_prob_with_metrics(node, params, features, KEY)
    expected = [torch_log_prob(torch_model, ids(p), [*ids(a), EOS]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_array_equal(metrics["tokens"], [2, 8, 1])


def test_a_completion_that_fills_its_room_has_no_end(torch_model, params):
    """`sample` stops there as well, so its probability is that of its tokens alone."""
    node = component(max_new_tokens=7)
    ours = log_prob(node, params, node.prepare([ANSWERS[1]], {"x": ["a red"]}), KEY)
    np.testing.assert_allclose(ours, [torch_log_prob(torch_model, ids("a red"), ids(ANSWERS[1]))], atol=1e-4)


def test_log_prob_does_not_change_with_padding_place_or_neighbours(params):
    node, roomy = component(), component(max_prompt_length=16, max_new_tokens=12)
    together = log_prob(node, params, node.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    turned = log_prob(node, params, node.prepare(ANSWERS[::-1], {"x": PROMPTS[::-1]}), KEY)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5)
    padded = log_prob(roomy, params, roomy.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    np.testing.assert_allclose(padded, together, atol=1e-5)
    for row in range(3):
        alone = log_prob(node, params, node.prepare([ANSWERS[row]], {"x": [PROMPTS[row]]}), KEY)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_padding_may_be_the_end_of_sequence(params):
    """The end counts as a token of the completion, the padding after it does not."""
    same = word_tokenizer()
    same.pad_token = same.eos_token
    node, other = component(same), component()
    features = node.prepare(ANSWERS, {"x": PROMPTS})
    assert features["tokens"][0, -1] == EOS
    expected = log_prob(other, params, other.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    np.testing.assert_allclose(log_prob(node, params, features, KEY), expected, atol=1e-5)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_prepare_adds_each_special_token_once(bos, eos):
    """Whatever the tokenizer adds by default, and whether or not the texts hold it already or are nothing else."""
    node = component(word_tokenizer(bos, eos))
    prompts = ["a red", "<bos> a red", "<bos>", "<eos>"]
    features = node.prepare(["ball", *["ball <eos>"] * 3], {"x": prompts})
    added = [BOS] * bos
    for row, start in enumerate([[*added, *ids("a red")], [BOS, *ids("a red")], [BOS], [*added, EOS]]):
        expected = [*start, *ids("ball"), EOS]
        np.testing.assert_array_equal(features["tokens"][row], expected + [0] * (16 - len(expected)))
        assert features["prompt_lengths"][row] == len(start)
        assert features["lengths"][row] == len(expected)


def test_special_tokens_that_a_prompt_writes_itself_are_kept():
    """Only the tokenizer's own doubling is undone: an example with an end inside or at the end stays as written."""
    node = component(word_tokenizer(bos=True, eos=True))
    features = node.prepare(["a", "a"], {"x": ["red <eos> ball <eos>", "<bos> <bos> red"]})
    starts = [[1, *ids("red"), EOS, *ids("ball"), EOS], [1, 1, *ids("red")]]
    for row, start in enumerate(starts):
        assert features["tokens"][row, : features["prompt_lengths"][row]].tolist() == start


def test_the_text_of_a_chat_template_is_tokenized_like_its_messages():
    """apply_chat_template(tokenize=False) writes the start into the text; the tokenizer must not add another."""
    tokenizer = word_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = "<bos> " + tokenizer.chat_template
    node = component(tokenizer, max_prompt_length=16)
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    features = node.prepare(["ball", "ball"], {"x": [text, ASKED]})
    np.testing.assert_array_equal(features["tokens"][0], features["tokens"][1])
    assert features["tokens"][0, :2].tolist() == [1, *ids("the")]


def test_no_token_spans_the_boundary_of_prompt_and_completion():
    tokenizer = byte_tokenizer("a b", "ab c")
    node = component(tokenizer)
    a, b, c = tokenizer("b")["input_ids"][0] - 1, tokenizer("b")["input_ids"][0], tokenizer("c")["input_ids"][0]
    assert tokenizer("abc")["input_ids"] == [257]
    features = node.prepare(["bc", "c", ""], {"x": ["a", "ab", "abc"]})
    end = tokenizer.eos_token_id
    for row, expected in enumerate([[a, b, c, end], [256, c, end], [257, end]]):
        assert features["tokens"][row, : len(expected)].tolist() == expected
        assert features["lengths"][row] == len(expected)
    np.testing.assert_array_equal(features["prompt_lengths"], [1, 1, 1])


def chat(subject, place):
    return [{"role": "user", "content": f"{subject} on {place}"}]


def test_prompts_of_several_parents_and_chat_templates():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
    )
    features = component(tokenizer, prompt=chat).prepare(["cube"], {"x": ["a ball"], "y": ["left"]})
    np.testing.assert_array_equal(features["tokens"][0, :7], [*ids("a ball on left the cube"), EOS])
    with pytest.raises(RecordError, match="reads exactly one parent, got x, y: pass LanguageModel"):
        component().prepare(["cube"], {"x": ["a"], "y": ["a"]})


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_chat_records_hold_the_turn_alone(torch_model, params):
    """The header is prompt, the turn with its end completion, and what the template writes after the end is dropped."""
    node = component(word_tokenizer(chat=True), max_prompt_length=12)
    prompt = [*ids("the"), UNK, *ids("on a red"), EOS, *ids("large the"), UNK, *ids("on")]
    features = node.prepare([answer("small ball"), "small ball"], {"x": [ASKED, ASKED]})
    for row in range(2):
        whole = [*prompt, *ids("small ball"), EOS]
        assert features["tokens"][row, : features["lengths"][row]].tolist() == whole
    np.testing.assert_array_equal(features["prompt_lengths"], [len(prompt)] * 2)
    ours, metrics = log_prob_with_metrics(node, params, features, KEY)
    # 1e-4: a float32 sum over 3 tokens.
    np.testing.assert_allclose(ours, [torch_log_prob(torch_model, prompt, [*ids("small ball"), EOS])] * 2, atol=1e-4)
    np.testing.assert_array_equal(metrics["tokens"], [3, 3])


def test_other_stop_tokens_end_a_turn_and_a_sample(params):
    """A template whose turns end with another token than the tokenizer's end; that token also stops `sample`."""
    tokenizer, stop = word_tokenizer(chat=True), ids("left")[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "left")
    features = component(tokenizer, max_prompt_length=12).prepare([answer("ball")], {"x": [ASKED]})
    assert features["tokens"][0, 10:14].tolist() == [*ids("ball left large"), EOS]
    node = component(tokenizer, max_prompt_length=12, stop_tokens=(stop,))
    prompts = [ASKED] * 3 + [tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)]
    features = node.prepare([answer("ball"), "ball left", "ball", "ball"], {"x": prompts})
    for row, end in enumerate([stop, stop, stop, EOS]):
        assert features["tokens"][row, 10 : features["lengths"][row]].tolist() == [*ids("ball"), end]
    drawn = node.sample(params, {"x": ["a red"] * 64}, KEY)
    stopped = [text.split() for text in drawn if "left" in text.split()]
    assert stopped
    assert all(words.index("left") == len(words) - 1 for words in stopped)


TURN = "{{ m.role }} on {{ m.content }} "


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}" + TURN + "left {% endfor %}", "left"),
        ("{% for m in messages %}" + TURN + "<eos> left large {% endfor %}", "<eos>"),
        ("{% for m in messages %}" + TURN + "{% endfor %}", "<eos>"),
        ("{{ messages[-1].content }} {% for m in messages %}" + TURN + "left {% endfor %}", "left"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
            + (TURN + "left {% endfor %}"),
            "<eos>",
        ),
    ],
    ids=["after the turn", "the first of two", "none", "prompt rewritten", "turn refused"],
)
def test_a_string_after_messages_is_closed_as_the_template_closes_a_turn(template, end):
    """The end-of-sequence token closes it where the template does not say; ends inside the text are not its end."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}assistant on {% endif %}"
    node = component(tokenizer, stop_tokens=tuple(ids("left")))
    features = node.prepare(["ball", "left ball"], {"x": [[{"role": "user", "content": "red"}]] * 2})
    for row, text in enumerate(["ball", "left ball"]):
        made = features["tokens"][row, features["prompt_lengths"][row] : features["lengths"][row]]
        assert made.tolist() == ids(f"{text} {end}")


@pytest.mark.parametrize(("keep", "prompt"), [("keep_start", "the small cube"), ("keep_end", "on the left")])
def test_texts_without_room_are_cut_as_asked_and_counted(keep, prompt, torch_model, params):
    node = component(max_prompt_length=3, max_new_tokens=4, truncation=keep)
    texts = ["a red", "the small cube on the left"]
    answers = ["a large green ball on the left", "ball"]
    features = node.prepare([*answers, "a large green ball"], {"x": [*texts, "a red"]})
    rows = [(ids("a red"), ids("a large green ball")), (ids(prompt), [*ids("ball"), EOS])]
    for row, (start, rest) in enumerate(rows):
        assert features["tokens"][row, : features["lengths"][row]].tolist() == start + rest
    np.testing.assert_array_equal(features["truncated"], [1, 1, 0])
    ours, metrics = log_prob_with_metrics(node, params, features, KEY)
    np.testing.assert_allclose(ours[:2], [torch_log_prob(torch_model, *row) for row in rows], atol=1e-4)
    np.testing.assert_array_equal(metrics["truncated"], [1, 1, 0])
    np.testing.assert_array_equal(metrics["tokens"], [4, 2, 4])
    cut, whole = (node.sample(params, {"x": [text] * 8}, KEY) for text in (texts[1], prompt))
    assert cut == whole


@pytest.mark.parametrize(("room", "kept"), [(1, ""), (3, "the left"), (6, "small cube on the left")])
def test_a_prompt_cut_at_its_start_keeps_the_beginning_of_sequence(room, kept):
    node = component(word_tokenizer(bos=True), max_prompt_length=room, truncation="keep_end")
    features = node.prepare(["ball"], {"x": ["the small cube on the left"]})
    assert features["tokens"][0, : room + 2].tolist() == [BOS, *ids(kept), *ids("ball"), EOS]
    np.testing.assert_array_equal(features["truncated"], [1])


def test_a_long_prompt_of_messages_is_cut_after_its_completion_was_found():
    node = component(word_tokenizer(chat=True), max_prompt_length=4, truncation="keep_end")
    features = node.prepare([answer("ball")], {"x": [ASKED]})
    assert features["tokens"][0, :6].tolist() == [*ids("large the"), UNK, *ids("on ball"), EOS]
    np.testing.assert_array_equal(features["truncated"], [1])


def test_samples_are_prepared_as_they_were_drawn(torch_model, params):
    """The share in 1000 draws of each text of two words is exp(log_prob) of it, within 5 standard errors.

    Shorter texts are left out: padding and starts are dropped from a text, so it stands for more than one draw.
    """
    node = component(max_new_tokens=2)
    draws = node.sample(params, {"x": ["a red"] * 1000}, KEY)
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    p = np.exp(log_prob(node, params, node.prepare(texts, {"x": ["a red"] * 100}), KEY))
    share = np.array([draws.count(text) for text in texts]) / 1000
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 1000) + 1e-6).all()
    assert p.max() > 4 * np.median(p)


def test_samples_of_a_chat_are_prepared_as_they_were_drawn(params):
    """The turns end with a stop token, <bos> here, that the texts have lost: share and exp(log_prob) as above.

    No draw ends otherwise, because the head gives the other special tokens exp(-20) at most. Texts of up to two words
    are then all that can be drawn, and their probabilities add up to 1: 1e-4, in float32.
    """
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<bos>")
    node = component(tokenizer, max_prompt_length=12, max_new_tokens=2, stop_tokens=(BOS,))
    # The first of the channels is large and positive after every token, so its row of the head is a bias.
    table, head = np.array(params["embed_tokens"]["embedding"]), np.array(params["lm_head"]["kernel"])
    table[:, 0], head[0] = 2, 0
    head[0, [SPECIAL.index("<pad>"), EOS, UNK]] = -9
    biased = params | {"embed_tokens": {"embedding": table}, "lm_head": {"kernel": head}}
    draws = node.sample(biased, {"x": [ASKED] * 1000}, KEY)
    texts = ["", *WORDS, *(f"{first} {second}" for first in WORDS for second in WORDS)]
    p = np.exp(log_prob(node, biased, node.prepare(texts, {"x": [ASKED] * len(texts)}), KEY))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-4)
    counts = np.array([draws.count(text) for text in texts])
    assert counts.sum() == 1000
    assert (np.abs(counts / 1000 - p) < 5 * np.sqrt(p * (1 - p) / 1000) + 1e-6).all()
    assert p[1 : 1 + len(WORDS)].sum() > 0.1
    assert p.max() > 4 * np.median(p)


def test_what_is_sampled_can_always_be_prepared():
    """Random bytes are no text: most of the texts would come back as more tokens than were drawn."""
    node = component(byte_tokenizer(), max_new_tokens=6)
    texts = node.sample(node.init(KEY), {"x": ["a red"] * 64}, KEY)
    features = node.prepare(texts, {"x": ["a red"] * 64})
    for row, text in enumerate(texts):
        made = features["tokens"][row, features["prompt_lengths"][row] : features["lengths"][row]]
        assert made.tolist() == list(text.tokens)
    assert not features["retokenized"].any()
    assert len(set(texts)) > 32
    again = [len(ids) for ids in node.tokenizer([str(text) for text in texts])["input_ids"]]
    assert max(again) > 6


@pytest.mark.parametrize("prompts", [["a red", "<bos> ball"], [ASKED, ASKED]], ids=["text", "chat"])
def test_a_batch_is_tokenized_in_a_few_calls(prompts, monkeypatch):
    """Prompts with and without special tokens, then what stands before a word, and completions; or chats without them.

    These words are no tokens together with their prompts, so that they are tokenized apart.
    """
    tokenizer = word_tokenizer(bos=True, chat=True)
    node, calls = component(tokenizer, max_prompt_length=12, stop_tokens=(UNK,)), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *a, **k: calls.append(a[0]) or call(self, *a, **k))
    node.prepare(["ball", "a ball"] * 32, {"x": prompts * 32})
    assert [len(texts) for texts in calls] == ([2, 2, 1, 2] if prompts != [ASKED] * 2 else [1, 2])


def test_of_several_bad_rows_the_first_is_named():
    """Though what is wrong with the others is found before."""
    with pytest.raises(RecordError, match="completion in row 1 has 10 tokens"):
        component().prepare(["a", "a " * 9, "a", 3], {"x": ["a", "a", 3, "a"]})


def test_equal_components_are_equal_and_hash_alike():
    assert component() == component()
    assert hash(component()) == hash(component())
    assert component() != dataclasses.replace(component(), max_new_tokens=3)


@pytest.mark.parametrize(
    ("value", "prompt", "message"),
    [
        ("a a a a a a a a a", "a", r"completion in row 1 has 10 tokens, outside 1\.\.8: raise max_new_tokens"),
        ("a", "a a a a a a a a a", r"prompt in row 1 has 9 tokens, outside 1\.\.8: raise max_prompt_length"),
        ("a", "", r"prompt in row 1 has 0 tokens"),
        (["a"], "a", "completion in row 1 must be a string or a message, not a list of str"),
        ([], "a", "completion in row 1 must be a string or a message, not a list of nothing"),
        (3, "a", "completion in row 1 must be a string or a message, not int"),
        ("a", 3, "prompt in row 1 must be a string or messages, not int"),
        ("a", [{"content": "a"}], "prompt in row 1 must be a string or messages, not a list of dict"),
        ("a", ASKED, "row 1 holds messages but the tokenizer has no chat template: set tokenizer.chat_template"),
        (answer("a"), "a", "row 1 is a message but its prompt is str: give both as messages, or the completion as a s"),
        (answer("a") * 2, ASKED, "row 1 has 2 messages, but a model makes one: put the earlier ones into the prompt"),
    ],
)
def test_bad_records_are_refused(value, prompt, message):
    node = component(word_tokenizer(chat="row 1 has 2" in message))
    roomy = dataclasses.replace(node, max_prompt_length=12) if prompt == ASKED else node
    with pytest.raises(RecordError, match=message):
        roomy.prepare(["a", value], {"x": ["a", prompt]})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }} {{ messages[-1].content }}", "does not leave the prompt in row 0 as it is .* as a s"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages in row 0: roles must alternate"),
    ],
)
def test_chat_templates_that_cannot_be_used_are_refused(template, message):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RecordError, match=message):
        component(tokenizer).prepare([answer("ball")], {"x": [ASKED]})


def test_a_completion_that_merges_with_its_prompt_is_counted():
    """The prompt keeps the tokens that the model is asked with, whatever the two are in one text."""
    tokenizer = byte_tokenizer("a b")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    node = component(tokenizer)
    asked = [{"role": "user", "content": "a"}]
    a, b, c = tokenizer("bc")["input_ids"][0] - 1, *tokenizer("bc")["input_ids"]
    for values, prompt in ((["b", "c"], "a"), ([answer("b"), answer("c")], asked), (["b", "c"], asked)):
        features = node.prepare(values, {"x": [prompt] * 2})
        assert features["tokens"][:, :3].tolist() == [[a, b, tokenizer.eos_token_id], [a, c, tokenizer.eos_token_id]]
        np.testing.assert_array_equal(features["retokenized"], [1, 0])


def test_lengths_that_do_not_go_with_the_decoder_are_refused():
    with pytest.raises(ValueError, match="max_prompt_length 30 and max_new_tokens 8 exceed the decoder's 32 positions"):
        component(max_prompt_length=30)


def test_tokens_that_the_decoder_has_not_are_refused_where_they_are_used(params):
    """Tokenizers often hold more tokens than the model, such as a padding token; unused they do no harm."""
    larger = word_tokenizer()
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.add_tokens(["violet"])
    small = dataclasses.replace(component(), tokenizer=larger)
    features = small.prepare(["ball"], {"x": ["a red"]})
    expected = log_prob(component(), params, component().prepare(["ball"], {"x": ["a red"]}), KEY)
    np.testing.assert_allclose(log_prob(small, params, features, KEY), expected, atol=1e-5)
    assert len(small.sample(params, {"x": ["a red"]}, KEY)) == 1
    remedy = r"the token 'violet' \(id 15\), but the decoder knows ids below 14: leave it out, or give the tokenizer"
    with pytest.raises(RecordError, match=f"the prompt in row 1 holds {remedy}"):
        small.prepare(["ball"] * 2, {"x": ["a red", "a violet"]})
    with pytest.raises(RecordError, match=f"the prompt in row 1 holds {remedy}"):
        small.sample(params, {"x": ["a red", "a violet"]}, KEY)
    with pytest.raises(RecordError, match=f"the completion in row 0 holds {remedy}"):
        small.prepare(["violet ball"], {"x": ["a red"]})
    with pytest.raises(ValueError, match=r"the ends \[15\] .* outside the decoder's 14 tokens: give the tokenizer and"):
        dataclasses.replace(small, stop_tokens=(5, 15))
    larger.eos_token = "violet"
    with pytest.raises(ValueError, match=r"the ends \[15\] of tokenizer\.eos_token_id"):
        dataclasses.replace(small)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token; set tokenizer\.eos_token"):
        component(tokenizer)


def test_an_unknown_truncation_is_refused():
    node = component()
    # Set afterwards: the tests' type checks would stop the constructor before its own check.
    object.__setattr__(node, "truncation", "middle")
    with pytest.raises(ValueError, match="truncation 'middle' is none of error, keep_start, keep_end"):
        node.__post_init__()
