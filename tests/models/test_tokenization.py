"""Between texts and ids: where BOS stands, how a turn ends, and what the limits cut."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from rrhf.common.errors import UserError
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.records.record import Record
from support.models import CHATML, tiny_tokenizer

EOS, IM_START, IM_END, BOS = 0, 1, 2, 3
CHAT = [{"role": "user", "content": "Hi"}]

# A turn closed with a token that no tokenizer attribute names (as Gemma's <end_of_turn> is no EOS).
GEMMA_LIKE = (
    "<s>{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# White space before the closing token, and a text after it.
SPACED = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n<|im_end|>\n-{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# A turn that ends without any token of its own: EOS ends it.
WORDS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def text_format(tokenizer: Any = None, **settings: Any) -> TextFormat:
    return TextFormat(tokenizer or tiny_tokenizer(), TextSettings(**settings))


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_plain_query_has_bos_where_the_tokenizer_puts_one() -> None:
    without = text_format().encode_query("ab")
    with_bos = text_format(tiny_tokenizer(bos="<s>")).encode_query("ab")
    assert len(without) == 2
    assert with_bos == [BOS, *without]


def test_bos_is_not_put_where_the_tokenizer_knows_one_but_does_not_use_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<s>"
    assert BOS not in text_format(tokenizer).encode_query("ab")


def test_a_plain_query_has_all_that_the_tokenizer_puts_before_a_text() -> None:
    """GLM's tokenizers begin a text with [gMASK]<sop>, and name no BOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    mask, begin = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", mask), ("<sop>", begin)]
    )
    assert text_format(tokenizer).encode_query("hi") == tokenizer("hi").input_ids
    assert tokenizer("hi").input_ids[:2] == [mask, begin]


@pytest.mark.parametrize("template", [CHATML, GEMMA_LIKE])
def test_a_chat_has_the_bos_of_its_template_and_no_other(template: str) -> None:
    tokenizer = tiny_tokenizer(bos="<s>", template=template)
    ids = text_format(tokenizer).encode_query(CHAT)
    assert ids.count(BOS) == (template is GEMMA_LIKE)
    assert read(tokenizer, ids).endswith(
        "<|im_start|>user\nHi<|im_end|>" + "\n" * (template is CHATML) + "<|im_start|>assistant\n"
    )


def test_no_bos_inside() -> None:
    format = text_format(tiny_tokenizer(bos="<s>"))
    encoded = format.encode_record(Record(query="ab", responses=["cd", "e"]))
    assert [*encoded.query, *encoded.responses[0], *encoded.responses[1]].count(BOS) == 1


def test_system_prompt_stands_before_messages_without_one() -> None:
    tokenizer = tiny_tokenizer()
    format = text_format(tokenizer, system_prompt="Be kind.")
    assert read(tokenizer, format.encode_query(CHAT)).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    )
    own = [{"role": "system", "content": "Own."}, *CHAT]
    text = read(tokenizer, format.encode_query(own))
    assert "Own." in text
    assert "Be kind." not in text
    assert CHAT == [{"role": "user", "content": "Hi"}]  # the query itself stays as it was
    with pytest.raises(UserError, match="--system_prompt needs queries that are lists of messages"):
        format.encode_query("plain")


def test_template_arguments_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(template="{{ messages[0]['content'] }}{% if loud %}!!{% endif %}")
    assert read(tokenizer, text_format(tokenizer).encode_query(CHAT)) == "Hi"
    assert read(tokenizer, text_format(tokenizer, chat_template_kwargs='{"loud": true}').encode_query(CHAT)) == "Hi!!"


def test_bad_settings_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        TextSettings(chat_template_kwargs="[1]", max_query_length=0)
    assert "--chat_template_kwargs [1]" in str(caught.value)
    assert "--max_query_length 0" in str(caught.value)
    with pytest.raises(UserError, match="--chat_template_kwargs"):
        TextSettings(chat_template_kwargs="{loud: true}")


def test_messages_without_a_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        text_format(tiny_tokenizer(template=None)).encode_query(CHAT)


def test_what_a_template_refuses_is_the_users_to_mend() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        text_format(tiny_tokenizer(template=template)).encode_query(CHAT)


@pytest.mark.parametrize("given", ['{"tokenize": true}', '{"continue_final_message": true}', '{"tools": 3}'])
def test_template_arguments_that_cannot_be_taken(given: str) -> None:
    with pytest.raises(UserError, match="template refuses") as raised:
        text_format(chat_template_kwargs=given).encode_query([{"role": "user", "content": "a"}])
    assert f"--chat_template_kwargs {given}" in str(raised.value)


@pytest.mark.parametrize("bos", [None, "<s>"])  # a BOS alone is another query
def test_a_query_without_tokens(bos: str | None) -> None:
    with pytest.raises(UserError, match="no token"):
        text_format(tiny_tokenizer(bos=bos)).encode_query("")


# --- how a response ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, end", [(CHATML, IM_END), (GEMMA_LIKE, IM_END), (SPACED, IM_END), (WORDS, EOS)])
def test_a_turn_ends_as_the_template_closes_it(template: str, end: int) -> None:
    format = text_format(tiny_tokenizer(template=template))
    assert format.end_token(CHAT) == end
    assert format.encode_response(CHAT, "ab", "stop")[-1] == end
    assert format.end_token("plain") == EOS  # plain text ends with EOS whatever the template does


def test_the_chat_end_may_be_no_special_token_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer(template="{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}")
    tokenizer.add_tokens(["<turn>"])  # an added token that is not special
    assert text_format(tokenizer).end_token(CHAT) == tokenizer.convert_tokens_to_ids("<turn>")


def test_only_a_response_that_ended_has_an_end_token() -> None:
    format = text_format()
    record = Record(query="q", responses=["ab", "ab"], finish=["stop", "length"])
    ended, cut = format.encode_record(record).responses
    assert ended == [*cut, EOS]
    assert len(cut) == 2


def test_pad_that_is_eos_does_no_harm(smollm2_tokenizer: Any) -> None:
    """EOS = PAD on both tokenizers; ids come from texts and lengths, so that the end token counts in ‖y‖."""
    for tokenizer in (tiny_tokenizer(), smollm2_tokenizer):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        format = text_format(tokenizer)
        encoded = format.encode_record(Record(query=CHAT, responses=["Yes.", "Yes."], finish=["stop", "length"]))
        assert len(encoded.responses[0]) == len(encoded.responses[1]) + 1
        assert encoded.responses[0][-1] == format.end_token(CHAT)
        assert format.decode(encoded.responses[0]) == "Yes."


def test_smollm2_chat_ends_with_im_end(smollm2_tokenizer: Any) -> None:
    format = text_format(smollm2_tokenizer)
    assert format.end_token(CHAT) == smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_tokenizer_without_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    format = text_format(tokenizer)
    assert format.encode_response("q", "ab", "length")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        format.encode_response("q", "ab", "stop")


# --- limits -----------------------------------------------------------------------------------------------------


def test_queries_are_cut_from_the_left_and_counted() -> None:
    format = text_format(max_query_length=3)
    whole = text_format().encode_query("abcdef")
    assert format.encode_query("abcdef") == whole[-3:]
    assert format.encode_query("abc") == whole[:3]
    assert format.queries_cut == 1


def test_responses_are_cut_from_the_right_and_counted() -> None:
    format = text_format()
    record = Record(query="abc", responses=["de", "defg", "def", "defgh"], finish=["stop", "stop", "stop", "length"])
    encoded = format.encode_record(record, max_length=7)
    d, e, f, g = text_format().encode_response("", "defg", "length")
    # room for 4: "de" + EOS; "defg" without the EOS the cut took; "def" + EOS just fits; "defgh" loses its last
    assert encoded.responses == [[d, e, EOS], [d, e, f, g], [d, e, f, EOS], [d, e, f, g]]
    assert format.responses_cut == 2
    assert format.queries_cut == 0


def test_a_query_that_leaves_no_room() -> None:
    encoded = text_format().encode_record(Record(query="abcdef", responses=["gh", "i"]), max_length=6)
    assert encoded.responses == [[], []]


def test_scores_travel_and_are_none_where_there_are_none() -> None:
    format = text_format()
    assert format.encode_record(Record(query="a", responses=["b", "c"])).scores == [None, None]
    scored = Record(query="a", responses=["b", "c"], scores=[0.5, None], id="x")
    assert (format.encode_record(scored).scores, format.encode_record(scored).id) == ([0.5, None], "x")


@pytest.mark.parametrize("text", ["plain", " a  b ", "ä\n☃ <b>", "Is it? , no ."])
def test_decode_gives_the_text_back(text: str, smollm2_tokenizer: Any) -> None:
    for tokenizer in (tiny_tokenizer(), smollm2_tokenizer):
        format = text_format(tokenizer)
        assert format.decode(format.encode_response("q", text, "stop")) == text


# --- special tokens inside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_a_cut_query_keeps_its_bos_within_the_limit(limit: int) -> None:
    tokenizer = tiny_tokenizer(bos="<s>")
    whole = text_format(tokenizer).encode_query("abcdef")
    cut = text_format(tokenizer, max_query_length=limit).encode_query("abcdef")
    assert cut == ([BOS, *whole[-(limit - 1) :]] if limit > 1 else whole[-1:])  # one token alone is the query's last


def test_a_cut_chat_keeps_the_bos_of_its_template_and_gets_none_that_it_does_not_have() -> None:
    for template, has_bos in ((GEMMA_LIKE, True), (CHATML, False)):
        tokenizer = tiny_tokenizer(bos="<s>", template=template)
        whole = text_format(tokenizer).encode_query(CHAT)
        cut = text_format(tokenizer, max_query_length=8).encode_query(CHAT)
        assert cut == ([BOS, *whole[-7:]] if has_bos else whole[-8:])


CHANNELS = ["<|channel|>", "<|message|>"]


def with_channels() -> Any:
    """Like GPT-OSS: special tokens that are neither ends nor padding, and that mean something inside a response."""
    tokenizer = tiny_tokenizer(bos="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": CHANNELS})
    return tokenizer


def test_markers_inside_a_response_stay_and_come_back() -> None:
    tokenizer = with_channels()
    format = text_format(tokenizer)
    text = "<|channel|>analysis<|message|>Let me see.<|im_start|>assistant<|channel|>final<|message|>42"
    ids = format.encode_response(CHAT, text, "stop")
    markers = tokenizer.convert_tokens_to_ids(CHANNELS)
    assert [i for i in ids if i in markers] == markers * 2 and ids[-1] == IM_END
    assert format.decode(ids) == text  # its end token aside
    assert format.encode_response(CHAT, format.decode(ids), "stop") == ids
    assert not format.loses_markers(ids)


def test_ends_padding_and_bos_are_no_part_of_a_text() -> None:
    format = text_format(tiny_tokenizer(bos="<s>"))
    a, b = format.encode_response("q", "ab", "length")
    assert format.decode([BOS, a, IM_END, b, EOS, EOS]) == "ab"
    assert format.decode([a, IM_START, b, IM_END]) == "a<|im_start|>b"


def test_the_markers_of_a_split_that_text_cannot_keep_still_stay() -> None:
    """Three bytes of a half and a whole character are no text that comes back; the marker beside them does."""
    tokenizer = with_channels()
    format = text_format(tokenizer)
    marker = tokenizer.convert_tokens_to_ids(CHANNELS[0])
    half = format.encode_response("q", "é", "length")[:1]
    assert format.decode([*half, marker]) == "\ufffd<|channel|>"


def test_markers_that_their_text_does_not_bring_back_are_left_out_and_told() -> None:
    """A token that takes the space before it: between other tokens its own text is not what it was read from."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", special=True, single_word=True)]})
    format = text_format(tokenizer)
    a, b = format.encode_response("q", "ab", "length")
    marker = tokenizer.convert_tokens_to_ids("<x>")
    assert format.decode([a, marker, b]) == "ab" and format.loses_markers([a, marker, b])
    assert not format.loses_markers([a, b])


def test_a_sentencepiece_word_gets_its_space_back_and_one_without_a_space_does_not_stay_so() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁the", "▁end", "end", "▁"]
    plain = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    format = text_format(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>"))
    assert format.decode([2, 3]) == "the end" and format.encode_response("q", "the end", "stop") == [2, 3, 1]
    assert format.decode([4, 2]) == "end the" and format.encode_response("q", "end the", "length") == [3, 2]


def test_plain_texts_are_those_of_the_tokenizer(smollm2_tokenizer: Any) -> None:
    ids = [1, *smollm2_tokenizer("Is it ? , no .\n ok").input_ids, 0, 2]
    plain = smollm2_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text_format(smollm2_tokenizer).decode(ids) == plain == "Is it ? , no .\n ok"


def test_drawn_tokens_are_those_that_are_trained_on_where_they_are_of_the_text() -> None:
    form = text_format()
    plain = form.encode_record(Record("q", ["abc", "abc", "x"], finish=["length"] * 3))
    split = [form.encode_response("q", letter, "length")[0] for letter in "abc"]
    other = [*split[:2], *split[:1]]  # of another text, as ids of another vocabulary are
    record = Record(
        "q", ["abc", "abc", "x"], finish=["length"] * 3, extra={"drawn_tokens": [[*split, EOS], other, None]}
    )
    assert form.encode_record(record).responses == [[*split, EOS], plain.responses[1], plain.responses[2]]
    assert form.encode_record(record, max_length=3).responses[0] == split[:2]  # and cut as all are
    strange = Record("q", ["abc"], finish=["length"], extra={"drawn_tokens": {"of": "the user"}})
    assert form.encode_record(strange).responses == plain.responses[:1]
