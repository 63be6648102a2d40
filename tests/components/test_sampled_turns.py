"""Earlier turns of a conversation keep the tokens that a model made where the chat template leaves them as they are."""

import json

import pytest

from sysdpo_jax import LanguageModel, RecordError
from sysdpo_jax.components.prompts import prompt_ids, tokenized
from sysdpo_jax.components.sampled_text import sampled_texts
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.values import SampledText, from_json, to_json
from tests.components.tokenizer_kinds import EOS, GEMMA, SIZE, TURN, ZEPHYR, tokenizer_of

AWAITS = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
SMOLLM2 = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}" + AWAITS
CALLS = "{% for call in m.tool_calls or [] %}\n<tool_call>{{ call | tojson }}</tool_call>{% endfor %}"
QWEN25 = (
    "{% if tools %}<turn>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<end>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<turn>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<turn>{{ m.role }}\n{{ m.content or '' }}" + CALLS + "{% endif %}<end>\n{% endfor %}" + AWAITS
)
# Thoughts of turns before the user's last message go.
QWEN3 = (
    "{% set last = namespace(place=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.place = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<turn>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if loop.index0 < last.place else m.content }}<end>\n{% endfor %}" + AWAITS
)
LLAMA3 = (
    "<s>{% for m in messages %}<turn>{{ 'ipython' if m.role == 'tool' else m.role }}<turn>\n\n{{ m.content | trim }}"
    "<end>{% endfor %}{% if add_generation_prompt %}<turn>assistant<turn>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    "{{ m.content }}</s>{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)
# (tokenizer, template, the token that ends a turn, role of observations)
STYLES = {
    "SmolLM2": ("byte-level", SMOLLM2, TURN, "tool"),
    "Qwen2.5": ("byte-level, Qwen", QWEN25, TURN, "tool"),
    "Qwen3": ("byte-level, Qwen", QWEN3, TURN, "tool"),
    "Llama 3": ("byte-level, Llama 3", LLAMA3, TURN, "tool"),
    "Mistral": ("prepended, Llama 2", MISTRAL, EOS, "user"),
    "Mistral, metaspace": ("metaspace first", MISTRAL, EOS, "user"),
    "Gemma": ("replaced, Gemma", GEMMA, TURN, "user"),
    "Zephyr": ("prepended, Zephyr", ZEPHYR, EOS, "user"),
    "Zephyr, metaspace": ("metaspace first", ZEPHYR, EOS, "user"),
}
ASK = {"role": "user", "content": "red?"}


def tokenizer_in(style):
    name, template, end, role = STYLES[style]
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = template
    return tokenizer, end, role


def sampled(tokenizer, letters, end=None):
    """A text of one token a letter, which no tokenizer makes of "ab"."""
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in letters] + ([] if end is None else [end])
    [text] = sampled_texts(tokenizer, [ids], (EOS, TURN))
    assert text == "".join(letters).replace("▁", " ")
    return text


def said(text):
    return {"role": "assistant", "content": text}


def asked(tokenizer, messages):
    [made] = tokenized(tokenizer, [prompt_ids(tokenizer, messages, 0)])
    return made


def whole(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("style", STYLES)
def test_turns_keep_their_tokens_and_all_else_has_those_of_the_whole_text(style):
    tokenizer, end, role = tokenizer_in(style)
    first, second = sampled(tokenizer, "ab", end), sampled(tokenizer, "abd", end)
    messages = [ASK, said(first), {"role": role, "content": "sky"}, said(second), {"role": role, "content": "a b"}]
    # As a runs file holds it.
    messages = from_json(json.loads(json.dumps(to_json(messages))))
    seen = [asked(tokenizer, messages[:length]) for length in (1, 3, 5)]
    assert not any(prompt.retokenized for prompt in seen)
    ids = [prompt.ids for prompt in seen]
    assert ids[0] == whole(tokenizer, messages[:1])
    for turn, (before, own, after) in enumerate(zip(ids, (first, second), ids[1:], strict=False)):
        given = [*before, *own.tokens]
        assert after[: len(given)] == given
        # An observation, and the opening of the next turn, as transformers tokenizes the conversation.
        text = whole(tokenizer, messages[: 3 + 2 * turn])
        canonical = tokenizer("ab" if turn == 0 else "abd", add_special_tokens=False)["input_ids"]
        assert len(canonical) < len(own.tokens)
        rest = after[len(given) :]
        assert rest
        assert rest == text[-len(rest) :]
        assert text[-len(rest) - 1] == end
        assert own.tokens not in [tuple(text[i : i + len(own.tokens)]) for i in range(len(text))]


@pytest.mark.parametrize("style", ["SmolLM2", "Qwen2.5", "Llama 3"])
def test_the_tokens_read_as_the_template_writes(style):
    tokenizer, end, _ = tokenizer_in(style)
    messages = [ASK, said(sampled(tokenizer, "ab", end)), {"role": "tool", "content": "sky"}]
    made = asked(tokenizer, messages)
    assert tokenizer.decode(made.ids) == made.text
    assert made.ids != made.plain == whole(tokenizer, messages)


@pytest.mark.parametrize("style", STYLES)
def test_a_turn_that_was_cut_is_closed_by_the_template(style):
    tokenizer, end, role = tokenizer_in(style)
    cut = sampled(tokenizer, "ab")
    assert cut.end == "cut"
    before, after = (
        asked(tokenizer, messages) for messages in ([ASK], [ASK, said(cut), {"role": role, "content": "a"}])
    )
    given = [*before.ids, *cut.tokens]
    assert after.ids[: len(given) + 1] == [*given, end]
    assert not after.retokenized
    closed = asked(tokenizer, [ASK, said(sampled(tokenizer, "ab", end)), {"role": role, "content": "a"}])
    assert after.ids == closed.ids


def test_a_word_that_stopped_a_turn_is_within_it():
    """The template closes the turn behind it, and behind an added token that is not special, which no text holds."""
    tokenizer, _, _ = tokenizer_in("SmolLM2")
    stop, call = (tokenizer.convert_tokens_to_ids(token) for token in ("d", "</tool_call>"))
    for last in (stop, call):
        own = [*map(tokenizer.convert_tokens_to_ids, "ab"), last]
        [text] = sampled_texts(tokenizer, [own], (EOS, TURN, stop, call))
        assert (text.end, text) == ("stop", "abd" if last == stop else "ab")
        before, after = asked(tokenizer, [ASK]), asked(tokenizer, [ASK, said(text), ASK])
        assert after.ids[: len(before.ids) + 4] == [*before.ids, *own, TURN]
        assert not after.retokenized


def test_another_end_than_the_template_writes_stays_in_its_place():
    tokenizer, _, _ = tokenizer_in("SmolLM2")
    after, closed = (asked(tokenizer, [ASK, said(sampled(tokenizer, "ab", end)), ASK]) for end in (EOS, TURN))
    place = len(asked(tokenizer, [ASK]).ids) + len("ab")
    assert closed.ids[place] == TURN
    assert after.ids == [*closed.ids[:place], EOS, *closed.ids[place + 1 :]]
    assert not after.retokenized


def test_a_template_without_ends_goes_on_behind_the_models():
    tokenizer, _, _ = tokenizer_in("SmolLM2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    text = sampled(tokenizer, "ab", EOS)
    before, after = asked(tokenizer, [ASK]), asked(tokenizer, [ASK, said(text), ASK])
    assert tokenizer.decode(after.ids) == tokenizer.decode([*before.ids, *text.tokens]) + "\nuser: red?\nassistant: "


def test_stripped_thoughts_are_tokenized_anew_and_turns_behind_them_are_kept():
    tokenizer, end, _ = tokenizer_in("Qwen3")
    thought, answer = sampled(tokenizer, [*"ab", *"</think>", *"ab"], end), sampled(tokenizer, "ab", end)
    loop = [ASK, said(thought), {"role": "tool", "content": "sky"}]
    assert not asked(tokenizer, loop).retokenized
    before = asked(tokenizer, [*loop, ASK])
    assert (before.ids, before.retokenized) == (whole(tokenizer, [*loop, ASK]), True)
    after = asked(tokenizer, [*loop, ASK, said(answer), {"role": "tool", "content": "sky"}])
    given = [*before.ids, *answer.tokens]
    assert after.ids[: len(given)] == given
    assert after.retokenized


def with_a_line_break(tokenizer, end):
    ids = [*map(tokenizer.convert_tokens_to_ids, ("a", "b", "Ċ")), end]
    [text] = sampled_texts(tokenizer, [ids], (EOS, TURN))
    assert text == "ab\n"
    return said(text)


def with_calls(tokenizer, end):
    return said(sampled(tokenizer, "ab", end)) | {"tool_calls": [{"name": "f", "arguments": {}}]}


def edited(tokenizer, end):
    made = sampled(tokenizer, "ab", end)
    return said(SampledText("ba", made.tokens, made.end, made.tokenizer))


def of_another_model(tokenizer, end):
    made = sampled(tokenizer, "ab", end)
    return said(SampledText("ab", made.tokens, made.end, "0" * 32))


CHANGED = {
    "trimmed": ("Llama 3", with_a_line_break),
    "calls beside the text": ("Qwen2.5", with_calls),
    "edited": ("SmolLM2", edited),
    "of another model": ("SmolLM2", of_another_model),
}


@pytest.mark.parametrize(("style", "turn"), CHANGED.values(), ids=CHANGED)
def test_what_is_not_as_it_was_made_is_tokenized_with_the_whole_and_counted(style, turn):
    tokenizer, end, role = tokenizer_in(style)
    messages = [ASK, turn(tokenizer, end), {"role": role, "content": "sky"}]
    made = asked(tokenizer, messages)
    assert (made.ids, made.retokenized) == (whole(tokenizer, messages), True)
    # A later turn that is as it was keeps its tokens behind them.
    later = sampled(tokenizer, "ab", end)
    after = asked(tokenizer, [*messages, said(later), {"role": role, "content": "sky"}])
    given = [*made.ids, *later.tokens]
    assert after.ids[: len(given)] == given
    assert after.retokenized
    config = DecoderConfig(SIZE, 4, 4, 1, 1, 1, max_position_embeddings=400)
    features = LanguageModel(Decoder(config), tokenizer, 300, 8).prepare([later, "ab"], {"x": [messages, [ASK]]})
    assert features["retokenized"].tolist() == [1, 0]


def test_texts_that_nobody_sampled_are_not_counted():
    tokenizer, _, _ = tokenizer_in("SmolLM2")
    messages = [ASK, said("ab"), ASK]
    made = asked(tokenizer, messages)
    assert (made.ids, made.retokenized) == (whole(tokenizer, messages), False)


def test_a_string_completion_follows_turns_that_keep_their_tokens():
    """It is tokenized as it follows the text, whatever tokens the text has."""
    tokenizer, end, _ = tokenizer_in("SmolLM2")
    messages = [ASK, said(sampled(tokenizer, "ab", end)), ASK]
    config = DecoderConfig(SIZE, 4, 4, 1, 1, 1, max_position_embeddings=400)
    features = LanguageModel(Decoder(config), tokenizer, 300, 8).prepare(["red"], {"x": [messages]})
    start, stop = features["prompt_lengths"][0], features["lengths"][0]
    assert features["tokens"][0, :start].tolist() == asked(tokenizer, messages).ids
    assert features["tokens"][0, start:stop].tolist() == [*tokenizer("red", add_special_tokens=False)["input_ids"], end]
    assert not features["retokenized"].any()


@pytest.mark.parametrize(
    ("template", "message"),
    {
        "raises": (
            MISTRAL,
            r"refuses messages of the role 'tool' in row 0 \(Only user and assistant roles!\): give them",
        ),
        "leaves it out": (
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}: {{ m.content }}</s>{% endif %}{% endfor %}",
            "row 0 holds messages of the role 'tool', which the tokenizer's chat template does not know: give them the "
            "role 'user'",
        ),
        "takes it for the assistant's": (
            "{% for m in messages %}{% if m.role == 'user' %}Q{% else %}A{% endif %} {{ m.content }}</s>{% endfor %}",
            "does not know: give them the role 'user'",
        ),
    }.values(),
)
def test_a_template_that_knows_no_tools_is_refused_with_the_remedy(template, message):
    tokenizer = tokenizer_of("byte-level")
    tokenizer.chat_template = template
    messages = [ASK, said("ab"), {"role": "tool", "content": "sky"}]
    with pytest.raises(RecordError, match=message):
        asked(tokenizer, messages)
    asked(tokenizer, [*messages[:2], {"role": "user", "content": "sky"}])
