"""`scripts/iterate.py --dry-run`: everything of a run that can be checked before it, without GPUs, weights or data.

| module | what is there |
| --- | --- |
| `walk` | what each phase reads, writes and how much it runs |
| `ranks` | the model on the meta device, sharded among ranks that do not exist; a step on fake tensors |

What is there is checked as a run would: keys, paths, the model's shape and the headers of its weights, tokenizer,
templates, data, losses, mesh, memory and the engine's sizes. What is not there is listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from srlm_fast import checkpoint, checks, meta_judge
from srlm_fast.chat import ChatFormat, chat_format
from srlm_fast.config import Config
from srlm_fast.data import prompts
from srlm_fast.dry_run.ranks import check_shards, fake_step
from srlm_fast.dry_run.walk import Seeds, Step, walk
from srlm_fast.errors import UserError
from srlm_fast.judge import load_template
from srlm_fast.kernels import library
from srlm_fast.plan import Machine, Plan
from srlm_fast.plan.memory import GIB
from srlm_fast.rollout import Judge, Reply
from srlm_fast.tokenizer import Tokenizer, check_vocab, load_tokenizer

__all__ = ["Seeds", "Step", "dry_run", "walk"]


def dry_run(config: Config, gpus: str | None = None) -> Iterator[str]:
    """The lines of a dry run, as they are found.

    Args:
        config: all keys.
        gpus: the machine, as scripts/plan.py has it; None: the key gpus.

    Raises:
        UserError: for the first thing that would keep a run from its end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start --dry-run without torchrun: one process stands for all ranks")
    machine = Machine.parse(gpus or config.gpus)
    library.use(config.kernels)
    checks.inputs(config)
    if not config.model.path:
        raise UserError("model.path is empty: name a folder with config.json")
    shape = checkpoint.read_config(Path(config.model.path))
    checks.shape(config, shape)
    checks.training(config)
    checks.losses(config)
    lacking = checks.missing(config)
    if any(Path(config.model.path).glob("*.safetensors")):
        checkpoint.check_weights(config.model.path)
    tokenizer = _tokenizer(config)
    checks.generator(config, shape, tokenizer)
    prompts.load_template(config.prompts.shots_template)
    load_template(config.judge.template)
    meta_judge.load_template(config.meta_judge.template)
    if tokenizer is None:
        lacking.append(f"no tokenizer in {config.model.path}: name it by model.tokenizer")
    else:
        check_vocab(tokenizer, shape.vocab_size)
        _check_lengths(config, chat_format(config.model.chat_format, tokenizer))
    if config.engine.name == "vllm" and find_spec("vllm") is None:
        lacking.append("engine.name=vllm: vLLM is not installed here")
    plan = Plan(config, shape, machine)
    yield f"{config.run_dir}: {plan.n_parameters:,} parameters, {plan.replicate} x {plan.shard} (replicate x shard)"
    _check_memory(plan)
    yield f"memory: fits, {plan.room / GIB:.1f} GiB left on each of {plan.machine.n_gpus} x {plan.machine.name}"
    yield from check_shards(plan)
    for section in ("sft", "dpo"):
        yield fake_step(plan, section)
    seeds = Seeds.read(config)
    for step in walk(config, plan, seeds):
        yield ""
        yield from step.lines()
    yield ""
    yield from (f"missing: {line}" for line in lacking)
    yield "Nothing speaks against this run" + (", once it has what is missing." if lacking else ".")


def _tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer; None where none is named and the model's folder has none."""
    folder = Path(config.model.path)
    found = [*folder.glob("*.model"), *folder.glob("tokenizer.json")]
    return load_tokenizer(config.model.tokenizer or folder) if config.model.tokenizer or found else None


def _check_lengths(config: Config, chat: ChatFormat) -> None:
    """Raises UserError where a judge prompt leaves no room for question and answer."""
    judge = Judge(chat, config.judge, config.model.max_seq_len)
    if judge.request(Reply("", "", ""), 0, None) is None:
        raise UserError(
            f"judge.template and judge.max_new_tokens={config.judge.max_new_tokens} leave no room for a question and "
            f"an answer in model.max_seq_len={config.model.max_seq_len}; lower the second or raise the third"
        )


def _check_memory(plan: Plan) -> None:
    """Raises UserError where a phase does not fit, or the engine's cache holds no sequence."""
    if plan.room < 0:
        raise UserError(
            f"{plan.machine.n_gpus} x {plan.machine.name} are too small by {-plan.room / GIB:.1f} GiB each; "
            "scripts/plan.py with the same arguments tells which keys to change"
        )
    tokens = plan.generating()["keys and values"] / plan.cache_per_token
    if tokens < plan.config.model.max_seq_len:
        raise UserError(
            f"engine.kv_cache_gib={plan.config.engine.kv_cache_gib} holds {tokens:,.0f} tokens, and a sequence may "
            f"have model.max_seq_len={plan.config.model.max_seq_len}; raise the first"
        )
