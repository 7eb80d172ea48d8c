"""How the seed model of the small world came about: its tokenizer and its pretraining, from nothing but a seed."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from srlm_fast.chat import PlainFormat
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item, pack, split_batch
from srlm_fast.tokenizer import Tokenizer
from srlm_fast.world_corpus import documents

SEED_CONFIG = LlamaConfig(
    vocab_size=760,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)

STAGE_STEPS = (4200, 1400, 400)
STAGE_RATES = (1.0, 0.35, 0.2)
MIXED_STAGE = 2
"""From this stage on micro-batches come in random order; before it every 1000 documents run from long to short."""


def train_tokenizer(path: Path, seed: int = 0) -> None:
    """A sentencepiece BPE with the rules of Llama 2: identity normalisation, byte fallback, split digits."""
    import sentencepiece

    texts = [f"{context} {text}" for context, text in itertools.islice(documents(random.Random(seed)), 20000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=model,
        vocab_size=SEED_CONFIG.vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _batches(tokenizer: Tokenizer, tokens: int, seed: int, stage: int) -> Iterator[list[Item]]:
    """Endless micro-batches of about `tokens` tokens; the context of a document is its prompt."""
    chat, texts = PlainFormat(tokenizer), documents(random.Random(f"{seed}/{stage}" if stage else seed), stage)
    order = random.Random(f"{seed}/{stage}/order")
    while True:
        items = []
        for context, text in itertools.islice(texts, 1000):
            prompt = (tokenizer.bos_id, *tokenizer.encode(context)) if context else (tokenizer.bos_id,)
            items.append(Item(prompt, (tuple(chat.encode_response(text)),)))
        batches = [indices for (indices,) in split_batch([item.n_tokens for item in items], tokens, 1)[:-1]]
        if stage >= MIXED_STAGE:
            order.shuffle(batches)
        for indices in batches:
            yield [items[i] for i in indices]


def pretrain(
    tokenizer: Tokenizer,
    *,
    steps: Sequence[int] = STAGE_STEPS,
    tokens: int = 3072,
    seed: int = 0,
    on_step: Callable[[int, float, Llama], None] = lambda step, loss, model: None,
    model: Llama | None = None,
) -> Llama:
    """Trains the seed model: 18M tokens, about 25 minutes on two cores.

    Three stages, see `world_corpus.STAGES`: the second with more judging and a third of the rates, the third, of a
    minute or two, with careless texts.

    Args:
        model: with the weights of the first two stages, of which it then does only the last. The weights of
            configs/tiny came about so, with one thread, from those that it held up to commit 06e34fc.
    """
    first = len(steps) - 1
    if model is None:
        model, first = Llama(SEED_CONFIG), 0
        model.init_weights(torch.Generator().manual_seed(seed))
    for stage in range(first, len(steps)):
        if stage == len(steps) - 1:
            _round(model)
        train_stage(model, _batches(tokenizer, tokens, seed, stage), steps[stage], STAGE_RATES[stage], on_step)
    return model.eval()


@torch.no_grad()
def _round(model: Llama) -> None:
    """Rounds the weights to bfloat16, as in a saved file, so that the last stage can go on from one."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def train_stage(
    model: Llama,
    batches: Iterator[list[Item]],
    steps: int,
    scale: float,
    on_step: Callable[[int, float, Llama], None],
) -> None:
    """Muon on the matrices, AdamW on the rest; short warm-up, constant rates, linear end over 40 % of the steps."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02 * scale, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=4e-3 * scale, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    for step, items in zip(range(steps), batches, strict=False):
        factor = min(1.0, (step + 1) / 50, max(0.01, (1 - step / steps) / 0.4))
        batch = pack(items)
        logps = model(batch.input_ids, batch.positions, batch.attend, rows=batch.rows, targets=batch.targets)
        loss = -logps.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        on_step(step + 1, float(loss.detach()), model)
