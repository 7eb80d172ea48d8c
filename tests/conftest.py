"""Fixtures of all tests."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before srlm_fast.kernels is imported: Triton's kernels then run on the CPU

from collections.abc import Callable
from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("oasst1/x.jsonl") -> Path of a real data file; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real data ../shared/data/{name} is absent")
        return path

    return find


@pytest.fixture(scope="session")
def spm_folder(shared_data, tmp_path_factory) -> Path:
    """Folder with a tokenizer.model like Llama 2's: BPE, identity normaliser, byte fallback, 600 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        input=str(shared_data("spm/botchan.txt")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def bpe_folder(shared_data, tmp_path_factory) -> Path:
    """Folder with a byte-level BPE tokenizer.json like Llama 3's and a chat template in its style."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(shared_data("spm/botchan.txt"))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.enable_truncation(16)  # as files in the wild have it; it must not cut our texts
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "<|head|>{{ message.role }}<|/head|>\n\n{{ message.content | trim }}<|turn|>"
        "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    )
    eos = {"__type": "AddedToken", "content": "<|end|>"}
    config = {"bos_token": "<|begin|>", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["cpp", "torch", "triton"])
def implementation(request):
    """Runs a test of an operator with its C++, its plain-torch and its Triton version (interpreted)."""
    from kernel_case import running

    with running(request.param):
        yield request.param
