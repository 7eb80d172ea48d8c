"""Chat formats against known strings and transformers' apply_chat_template."""

from __future__ import annotations

import json
import shutil

import pytest

from srlm_fast.chat import chat_format
from srlm_fast.errors import UserError
from srlm_fast.tokenizer import load_tokenizer

USER = {"role": "user", "content": "How are you?"}
THREAD = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " One? "},
    {"role": "assistant", "content": "Two.\n"},
    {"role": "user", "content": "Three?"},
]
RESPONSES = ["Fine.", " spaced  out ", "\nline", "", "</s><|turn|>", "日本 \u2581 e\u0301", "  "]
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def with_template(folder, template, tmp_path):
    """The tokenizer of a folder, copied to tmp_path, with another chat template."""
    for file in folder.iterdir():
        if file.is_file() and file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    config_file.write_text(json.dumps({**config, "chat_template": template}))
    return load_tokenizer(tmp_path)


def peer_prompt(folder, messages):
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text, peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]


@pytest.mark.parametrize("folder", ["spm_folder", "bpe_folder"])
@pytest.mark.parametrize("name", ["llama2", "plain", "template"])
def test_responses_come_back_and_end_the_turn(name, folder, request, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    if name == "template" and not tokenizer.chat_template:
        tokenizer = with_template(request.getfixturevalue(folder), LLAMA2_TEMPLATE, tmp_path)
    chat = chat_format(name, tokenizer)
    for text in RESPONSES:
        ids = chat.encode_response(text)
        assert ids[-1] == chat.end_id and ids[-1] in chat.stop_ids and tokenizer.eos_id in chat.stop_ids
        assert chat.decode(ids) == chat.decode(ids[:-1]) == text
        assert chat.encode_text(text) == ids[:-1] and not set(ids[:-1]) & set(chat.stop_ids)


def test_llama2_is_metas_format(spm_folder):
    tokenizer = load_tokenizer(spm_folder)
    chat = chat_format("llama2", tokenizer)
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n One? [/INST] Two. "
    expected = [1, *tokenizer.encode(first), 2, 1, *tokenizer.encode("[INST] Three? [/INST]")]
    assert chat.encode_prompt(THREAD) == expected
    assert chat.render(THREAD) == f"<s>{first}</s><s>[INST] Three? [/INST]"
    assert chat.encode_prompt([USER]) == tokenizer.encode("[INST] How are you? [/INST]", bos=True)
    whole = tokenizer.encode("[INST] How are you? [/INST] Fine.", bos=True, eos=True)
    assert chat.encode_prompt([USER]) + chat.encode_response("Fine.") == whole
    assert chat.stop_ids == (2,)


def test_plain_is_lines(spm_folder, bpe_folder):
    tokenizer = load_tokenizer(spm_folder)
    chat = chat_format("plain", tokenizer)
    assert chat.encode_prompt([USER]) == tokenizer.encode("User: How are you?\nAssistant:", bos=True)
    assert chat.encode_response("Fine.") == tokenizer.encode("Fine.", eos=True)
    assert chat.render(THREAD) == "<s>System: Be brief.\nUser:  One? \nAssistant: Two.\n</s>User: Three?\nAssistant:"
    bpe = load_tokenizer(bpe_folder)
    whole = bpe.encode("User: How are you?\nAssistant: Fine.", bos=True, eos=True)
    assert chat_format("plain", bpe).encode_prompt([USER]) + chat_format("plain", bpe).encode_response("Fine.") == whole


@pytest.mark.parametrize("messages", [[USER], THREAD, THREAD[:2]])
def test_template_is_transformers(bpe_folder, messages):
    chat = chat_format("template", load_tokenizer(bpe_folder))
    text, ids = peer_prompt(bpe_folder, messages)
    assert chat.render(messages) == text and chat.encode_prompt(messages) == ids
    assert chat.end_id == 4 and chat.stop_ids == (4, 1) and chat.glue == ""


@pytest.mark.parametrize("messages", [[USER], THREAD])
def test_llama2s_template_is_the_llama2_format(bpe_folder, spm_folder, tmp_path, messages):
    bpe = with_template(bpe_folder, LLAMA2_TEMPLATE, tmp_path)
    own, template = chat_format("llama2", bpe), chat_format("template", bpe)
    text, ids = peer_prompt(tmp_path, messages)
    assert own.render(messages) == template.render(messages) == text
    assert own.encode_prompt(messages) == template.encode_prompt(messages) == ids
    assert own.encode_response("Fine.") == template.encode_response("Fine.")
    (tmp_path / "spm").mkdir()
    spm = with_template(spm_folder, LLAMA2_TEMPLATE, tmp_path / "spm")
    assert chat_format("template", spm).encode_prompt(messages) == chat_format("llama2", spm).encode_prompt(messages)


@pytest.mark.parametrize("name", ["llama2", "plain", "template"])
@pytest.mark.parametrize("folder", ["spm_folder", "bpe_folder"])
def test_special_tokens_in_a_message_stay_text(name, folder, request, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    if name == "template" and not tokenizer.chat_template:
        tokenizer = with_template(request.getfixturevalue(folder), LLAMA2_TEMPLATE, tmp_path)
    chat, specials = chat_format(name, tokenizer), set(tokenizer.special_tokens.values())
    evil = "".join(tokenizer.special_tokens) + "<" + "".join(tokenizer.special_tokens)
    clean_ids, evil_ids = (chat.encode_prompt([{**USER, "content": f"a{x}b"}]) for x in ("", evil))
    assert [i for i in evil_ids if i in specials] == [i for i in clean_ids if i in specials]
    assert f"a{evil}b" in tokenizer.decode(evil_ids)
    assert f"a{evil}b" in chat.render([{**USER, "content": f"a{evil}b"}])


def test_template_helpers(bpe_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    template = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {%- generation %}{{ message.content }}{% endgeneration %}<|turn|>\n"
        "    {% set ns = namespace(n=1) %}\n"
        "{%- endfor %}"
        "{{ {'b': 'é<', 'a': [1]} | tojson }} {{ {'a': 1} | tojson(indent=2) }} {{ strftime_now('%Y-%m-%d') }}"
        "{% if tools is none %} no tools{% endif %}"
    )
    chat = chat_format("template", with_template(bpe_folder, template, tmp_path))
    assert chat.render([USER, USER, USER]) == (
        'How are you?<|turn|>\nHow are you?<|turn|>\n{"b": "é<", "a": [1]} {\n  "a": 1\n} 1970-01-02 no tools'
    )


def test_template_files_and_named_templates(bpe_folder, tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    assert chat_format("template", with_template(bpe_folder, named, tmp_path)).render([USER]) == "How are you?!"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    tokenizer = load_tokenizer(tmp_path)
    assert chat_format("template", tokenizer).render([USER]) == "How are you??"
    assert chat_format("template", tokenizer).end_id == tokenizer.eos_id  # the template ends no turn
    assert "chat_template.jinja" in tokenizer.files


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[7].content.x }}", "chat_template of .*: .*undefined|no element 7"),
        ("{{ messages + 1 }}", "chat_template of "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'other' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
    ],
)
def test_bad_templates_are_refused(bpe_folder, tmp_path, template, message):
    with pytest.raises(UserError, match=message) as caught:
        chat_format("template", with_template(bpe_folder, template, tmp_path)).render([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama2", "plain"])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 0 .* role and content"),
        (["hello"], "message 0"),
        ([{**USER, "content": None}], "message 0"),
        ([USER, USER], "message 1 .* role 'user'"),
        ([{**USER, "role": "assistant"}], "message 0 .* role 'assistant'"),
        ([THREAD[0]], "must end with a user's message"),
        (THREAD[:3], "must end with a user's message"),
        ([THREAD[0], THREAD[0], USER], "message 1 .* role 'system'"),
    ],
)
def test_bad_conversations_are_refused(spm_folder, name, messages, message):
    with pytest.raises(UserError, match=message):
        chat_format(name, load_tokenizer(spm_folder)).encode_prompt(messages)


def test_formats_that_a_tokenizer_cannot_serve_are_refused(bpe_folder, spm_folder, tmp_path):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="names no eos token"):
        chat_format("plain", load_tokenizer(tmp_path))
    with pytest.raises(UserError, match="has no chat_template"):
        chat_format("template", load_tokenizer(spm_folder))
    with pytest.raises(UserError, match="unknown chat format 'chatml'; known: llama2, plain, template"):
        chat_format("chatml", load_tokenizer(spm_folder))
