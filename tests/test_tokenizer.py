"""Tokenizers against sentencepiece, transformers and the text itself."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from srlm_fast.errors import UserError
from srlm_fast.tokenizer import check_vocab, load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    " leading and trailing ",
    "two  and   three spaces\n\n\ttab\r\n",
    "\u2581a\u2581\u2581 b \u2581",
    "<s>[INST] <unk></s><0x0A><|end|><|turn|>",
    "日本語 и русский, 👩‍👩‍👧 e\u0301 ﬁ ① \u3000\u00a0|",
    "nul \x00, bell \x07, bom \ufeff, last \U0010ffff",
    "\ue000\ue001\ue002\ue003 private use",
]


def random_texts(n: int, seed: int) -> list[str]:
    """Texts of characters from every plane, blanks and U+2581 in front."""
    rng = random.Random(seed)
    blocks = [(0x00, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x2000, 0x2600), (0x4E00, 0x9FFF), (0xE000, 0xFFFF)]
    blocks += [(0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]

    def character() -> str:
        if rng.random() < 0.4:
            return rng.choice(" \n\u2581<>sa")
        return chr(rng.randint(*rng.choice(blocks)))

    return ["".join(character() for _ in range(rng.randint(1, 24))) for _ in range(n)]


@pytest.fixture(params=["spm_folder", "bpe_folder"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def test_any_text_comes_back(tokenizer):
    assert tokenizer.exact
    for text in HARD_TEXTS + random_texts(2000, seed=0):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not set(ids) & set(tokenizer.special_tokens.values())


def test_bos_and_eos_only_when_asked(tokenizer):
    ids = tokenizer.encode("Good day.")
    assert tokenizer.encode("Good day.", bos=True, eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "Good day."
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("Good day.")
    assert tokenizer.decode([tokenizer.vocab_size + 5, *ids, 10**6, -1]) == "Good day."


def test_lone_surrogates_do_not_break_a_run(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb 😀"


def test_sentencepiece_ids_are_llama_2s(spm_folder, shared_data):
    from transformers import LlamaTokenizer

    tokenizer, peer = load_tokenizer(spm_folder), LlamaTokenizer.from_pretrained(spm_folder)
    lines = [line for line in shared_data("spm/botchan.txt").read_text().splitlines() if line == line.strip() != ""]
    for line in lines[:300] + ["日本 x 12345"]:
        assert tokenizer.encode(line) == peer.encode(line, add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_id("<unk>")) == (1, 2, 0)
    assert tokenizer.token_id("<0x41>") == 3 + 0x41 and tokenizer.token_id("no such piece") is None
    assert tokenizer.vocab_size == 600 and tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_an_exported_sentencepiece_model_is_llamas_to_transformers(spm_folder, shared_data, tmp_path):
    """AutoTokenizer on what `files` puts into a model folder: the same ids, bos first, and the text back."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(spm_folder)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    peer, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    lines = [line for line in shared_data("spm/botchan.txt").read_text().splitlines() if line == line.strip() != ""]
    for line in lines[:300] + ["日本 x 12345"]:
        ids = tokenizer.encode(line, bos=True)
        assert peer(line)["input_ids"] == ids == again.encode(line, bos=True)
        assert peer.decode(ids, skip_special_tokens=True) == line
    assert (peer.bos_token_id, peer.eos_token_id, peer.unk_token_id) == (1, 2, 0)
    assert again.files["tokenizer_config.json"] == tmp_path / "tokenizer_config.json"


def test_a_normalising_model_round_trips_to_its_normal_form(shared_data):
    tokenizer = load_tokenizer(shared_data("spm/test_model.model"))
    assert not tokenizer.exact and (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1000, 1, 2)
    assert tokenizer.decode(tokenizer.encode("  I saw  a ① girl  ")) == "I saw a 1 girl"
    assert tokenizer.decode(tokenizer.encode("a 日 b")) == "a  b"  # no byte pieces: an unknown character is lost
    lines = shared_data("spm/botchan.txt").read_text("utf-8-sig").splitlines()
    known = [line for line in lines if all(c == " " or tokenizer.token_id(c) is not None for c in line)]
    assert len(known) > 3000
    for line in known:
        assert tokenizer.decode(tokenizer.encode(line)) == " ".join(line.split())


def test_json_ids_are_transformers(bpe_folder, shared_data):
    from transformers import PreTrainedTokenizerFast

    tokenizer, peer = load_tokenizer(bpe_folder), PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    for line in shared_data("spm/botchan.txt").read_text().splitlines()[:300]:
        ids = peer.encode(line, add_special_tokens=False)
        assert tokenizer.encode(line) == ids and tokenizer.decode(ids) == peer.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (peer.bos_token_id, peer.eos_token_id) == (0, 1)
    assert tokenizer.vocab_size == len(peer) == 600 and not tokenizer.adds_space
    assert tokenizer.token_id("<|turn|>") == 4 and tokenizer.token_id("no such piece") is None


def test_parts_are_texts_and_ids(spm_folder, bpe_folder):
    from transformers import PreTrainedTokenizerFast

    spm, bpe = load_tokenizer(spm_folder), load_tokenizer(bpe_folder)
    assert spm.encode_parts([1, "a", " b", 2, 2, "<s>"]) == [1, *spm.encode("a b"), 2, 2, *spm.encode("<s>")]
    peer = PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    expected = peer.encode("<|head|>user<|/head|>\n\n Hi <|turn|>", add_special_tokens=False)
    assert bpe.encode_parts([2, "user", 3, "\n\n", " Hi ", 4]) == expected
    assert bpe.encode_parts([4, "<|turn|>", 4]) == [4, *bpe.encode("<|turn|>"), 4]


def test_a_metaspace_json_is_transformers_too(spm_folder, tmp_path):
    """Llama 2's tokenizer.json: the space goes before the first text only, also after special tokens."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    LlamaTokenizer.from_pretrained(spm_folder).save_pretrained(tmp_path)
    tokenizer, peer = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.adds_space and tokenizer.name.endswith("tokenizer.json")
    assert tokenizer.encode("Good day.") == load_tokenizer(spm_folder).encode("Good day.")
    assert tokenizer.decode(tokenizer.encode("two  spaces\n")) == "two  spaces\n" and not tokenizer.exact
    expected = peer.encode("<s>[INST] Hi [/INST] Ho </s><s>", add_special_tokens=False)
    assert tokenizer.encode_parts([1, "[INST] Hi [/INST] Ho ", 2, 1]) == expected


def test_tokens_added_beyond_the_model(spm_folder, tmp_path):
    shutil.copy(spm_folder / "tokenizer.model", tmp_path)
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"600": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (601, 600, 1)
    assert tokenizer.decode([600, *tokenizer.encode("<|im_end|>")]) == "<|im_end|>"
    assert set(tokenizer.files) == {"tokenizer.model", "tokenizer_config.json"}
    check_vocab(tokenizer, 601)
    with pytest.raises(UserError, match="ids up to 600 .* only 600 rows"):
        check_vocab(tokenizer, 600)


def test_files_are_found_by_folder_file_and_kind(spm_folder, bpe_folder, shared_data, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(bpe_folder / "tokenizer.json", both)
    (both / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format, as beside Llama 3
    assert load_tokenizer(both).name == str(both / "tokenizer.json")
    shutil.copy(spm_folder / "tokenizer.model", both)
    assert load_tokenizer(both).name == str(both / "tokenizer.model")
    other = load_tokenizer(shared_data("spm/test_model.model"))
    assert list(other.files) == ["tokenizer.model", "tokenizer_config.json"]
    assert other.files["tokenizer.model"] == shared_data("spm/test_model.model")
    assert load_tokenizer(other.name).vocab_size == load_tokenizer(shared_data("spm")).vocab_size


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.model or tokenizer.json in"),
        ({"tokenizer.model": "not a model"}, "cannot read .*tokenizer.model as a sentencepiece model"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tokenizer.model is in tiktoken's format"),
        ({"tokenizer.json": "{}"}, "cannot read .*tokenizer.json as a tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[1]"}, "cannot read .*tokenizer_config.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "cannot read .*tokenizer_config.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_path_and_missing_tokens_are_refused(bpe_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert bare.bos_id is None and bare.eos_id is None
    with pytest.raises(UserError, match="names no eos token"):
        bare.encode("a", eos=True)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nope|>"}')
    with pytest.raises(UserError, match="eos_token '<|nope|>' is not a token"):
        load_tokenizer(tmp_path)
