"""What a configuration is refused for before any work starts, as far as no process group and no engine is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from srlm_fast import checkpoint
from srlm_fast.config import GENERATORS, Config
from srlm_fast.errors import UserError
from srlm_fast.lora import check_options
from srlm_fast.model import LlamaConfig
from srlm_fast.opening import existing_inputs
from srlm_fast.tokenizer import Tokenizer, check_vocab
from srlm_fast.trainer import check_moments, training_objective


def inputs(config: Config) -> None:
    """Raises UserError where a path that is given does not exist or holds no model that is known, or a key has no
    meaning without another."""
    if config.prompts.generator not in GENERATORS and not Path(config.prompts.generator).is_dir():
        raise UserError(
            f"prompts.generator={config.prompts.generator!r} is none of {', '.join(GENERATORS)} and no model folder"
        )
    existing_inputs(config)
    if config.judge.endpoint_model and not config.judge.endpoint:
        raise UserError("judge.endpoint_model is set without judge.endpoint; give the server's address too")
    if config.engine.name == "native" and config.engine.tensor_parallel > 1:
        raise UserError(
            f"engine.tensor_parallel={config.engine.tensor_parallel}: the native engine has the whole model in every "
            "process; use engine.name=vllm"
        )
    if config.model.path:
        checkpoint.read_config(Path(config.model.path))


def missing(config: Config) -> list[str]:
    """What a run needs and the configuration does not give, a line for each."""
    lines = []
    if not config.model.path:
        lines.append("model.path is empty: name the folder of M0")
    elif not config.model.random_init and not any(Path(config.model.path).glob("*.safetensors")):
        lines.append(
            f"model.path: no safetensors in {config.model.path}; scripts/convert.py makes them of other formats, "
            "model.random_init=true starts from random weights"
        )
    if not config.oasst.paths:
        lines.append("oasst.paths is empty: name at least one OASST1 file")
    return lines


def shape(config: Config, llama: LlamaConfig) -> None:
    """Raises UserError where sequences may get longer than the model's positions reach."""
    if config.model.max_seq_len > llama.max_position_embeddings:
        raise UserError(
            f"model.max_seq_len={config.model.max_seq_len} is above the model's max_position_embeddings="
            f"{llama.max_position_embeddings}; lower it"
        )


def training(config: Config) -> None:
    """Raises UserError for adapters or moments that cannot be had."""
    check_options(config.lora)
    check_moments(config.sft)
    check_moments(config.dpo)


def losses(config: Config) -> None:
    """Raises UserError for a loss that its phase has no data for."""
    sft, dpo = training_objective(config.sft), training_objective(config.dpo)
    if sft.paired:
        raise UserError(f"sft.loss={config.sft.loss} compares pairs, SFT has single responses; use sft")
    if sft.needs_labels:
        raise UserError(f"sft.loss={config.sft.loss} needs labels, SFT has none; use sft")
    if not dpo.paired:
        raise UserError(f"dpo.loss={config.dpo.loss} does not compare pairs; use dpo")
    if dpo.needs_labels and config.pairs.labels is None:
        raise UserError(f"dpo.loss={config.dpo.loss} reads labels: choose how they are made by pairs.labels")
    if config.pairs.labels is not None and not dpo.needs_labels:
        raise UserError(
            f"pairs.labels={config.pairs.labels}, but dpo.loss={config.dpo.loss} reads no labels; use cream or sppo, "
            "or leave pairs.labels out"
        )
    if dpo.needs_heads and config.reference.source == "rollout":
        raise UserError(
            f"dpo.loss={config.dpo.loss} compares the heads of responses, whose log-probs the engine does not keep; "
            "use reference.source=forward"
        )


def generator(config: Config, llama: LlamaConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError where another model that writes the prompts does not fit that of the run."""
    if config.prompts.generator in GENERATORS:
        return
    other = checkpoint.read_config(Path(config.prompts.generator))
    if tokenizer is not None:
        check_vocab(tokenizer, other.vocab_size)
    if other.max_position_embeddings < config.model.max_seq_len:
        raise UserError(
            f"prompts.generator={config.prompts.generator} has max_position_embeddings="
            f"{other.max_position_embeddings}, below model.max_seq_len={config.model.max_seq_len}; lower that"
        )
    no_ids = {"bos_token_id": None, "eos_token_id": None}
    if config.engine.name == "vllm" and replace(other, **no_ids) != replace(llama, **no_ids):
        raise UserError(
            f"prompts.generator={config.prompts.generator} has another shape than model.path, and vllm serves one "
            "shape per process; write the prompts in a run with engine.name=native"
        )
    checkpoint.check_weights(config.prompts.generator)
