"""Trainers with TRL's arguments, data sets, methods and metric names around our own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from srlm_fast.chat import ChatFormat, chat_format
from srlm_fast.checkpoint import save_weights
from srlm_fast.compat.arguments import Arguments, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig
from srlm_fast.compat.models import as_llama, as_tokenizer, write_back
from srlm_fast.config import TrainConfig
from srlm_fast.dataset import Data, TextFormat, read_items
from srlm_fast.errors import UserError
from srlm_fast.losses import Objective
from srlm_fast.packing import Item
from srlm_fast.parallel import World, parallelize
from srlm_fast.reference import ReferenceCache
from srlm_fast.trainer import Evaluation, Trainer, reference_cache, training_objective

_NO_LIMIT = 1 << 40
_REFUSED = {
    "data_collator": "batches are packed, there is nothing to collate",
    "compute_metrics": "the metrics are TRL's; measure others with Evaluation(measure=...) of srlm_fast.trainer",
    "callbacks": "use Trainer(on_step=..., should_stop=..., evaluation=...) of srlm_fast.trainer",
    "optimizers": "the optimizer is AdamW, its schedule that of the arguments",
    "quantization_config": "weights are fp32 while they are trained",
    "peft_config": "train adapters by scripts/train.py lora.rank=..., or by srlm_fast.lora.add_adapters",
    "preprocess_logits_for_metrics": "logits are never formed whole",
    "compute_loss_func": "register the loss: docs/losses.md",
    "formatting_func": "prepare the rows before",
    "model_init": "pass the model",
}
"""Arguments of TRL's trainers that have to stay empty, and what to do instead."""


class TrainOutput(NamedTuple):
    """What `train` returns."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class _Trainer:
    """What all of them share.

    Args:
        model: a LlamaForCausalLM of transformers (trained in place), a model folder, or a `Llama`.
        args: the configuration.
        train_dataset, eval_dataset: a `datasets.Dataset` or whatever `dataset.read_items` reads.
        processing_class: the tokenizer, of transformers or ours, or its folder.

    Raises:
        UserError: for what is not supported, by its name, and for rows that cannot be used.
    """

    config_class: type[Arguments] = Arguments

    def __init__(
        self,
        model: Any,
        args: Arguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        name = type(self).__name__
        for key, value in others.items():
            if key not in _REFUSED:
                raise UserError(f"{name}: unknown argument {key!r}; leave it out")
            if value not in (None, [], (None, None)):
                raise UserError(f"{name}: {key} is not supported: {_REFUSED[key]}")
        if not isinstance(args, (self.config_class, type(None))):
            raise UserError(
                f"{name}: args is a {self.config_class.name} of srlm_fast.compat, got {type(args).__name__}"
            )
        if train_dataset is None:
            raise UserError(f"{name}: train_dataset is needed")
        self.args = args or self.config_class()
        self.world = World()
        self.processing_class = processing_class or tokenizer
        self.tokenizer, self._bos = as_tokenizer(self.processing_class, model)
        self._given = model
        self.objective = self._objective()
        self.train_data, self.eval_data = self._read(train_dataset), None
        if eval_dataset is not None:
            self.eval_data = self._read(eval_dataset)
        elif self.args.eval_strategy != "no":
            raise UserError(f"{self.args.name}: eval_strategy={self.args.eval_strategy} needs an eval_dataset")
        self._reference_model: Any = None
        self.model = self._parallel(model)
        self.state = SimpleNamespace(global_step=0, epoch=0.0, log_history=[])
        self._cache: ReferenceCache | None = None
        self._trainer: Trainer | None = None

    def _parallel(self, model: Any) -> nn.Module:
        return parallelize(as_llama(model).to(self.world.device), self.world, self.args.parallel())

    def _objective(self) -> Objective:
        return training_objective(self.args.train_config(1, 1, 1))

    # ------------------------------------------------------------------------------------------------------------ data

    def _read(self, rows: Any) -> Data:
        """The items of a data set, tokenised as TRL does it."""
        if isinstance(rows, (str, Path)) or (isinstance(rows, (list, tuple)) and isinstance(rows[0], (str, Path))):
            source, first = rows, None
        else:
            if isinstance(rows, dict):
                raise UserError(
                    f"several data sets ({', '.join(map(str, rows))}) where one is needed; name one of them"
                )
            source = list(self._prepared(rows))
            first = source[0] if source else None
        length = self.args.max_length or _NO_LIMIT
        return read_items(
            source,
            self._chat(first),
            self.objective,
            max_length=length,
            max_tokens=_NO_LIMIT,
            truncation=self.args.truncation_mode,
        )

    def _chat(self, row: dict[str, Any] | None) -> ChatFormat:
        """Chat messages are written by the tokenizer's template, texts are taken as they are."""
        if row is not None and not _conversational(row):
            return TextFormat(self.tokenizer, bos=self._bos)
        return chat_format("template", self.tokenizer)

    def _prepared(self, rows: Any) -> Iterator[dict[str, Any]]:
        """Rows as ours: texts have a prompt of their own, and no eos at the end."""
        eos = self.tokenizer.named_tokens.get("eos_token", "")
        for row in rows:
            row = dict(row)
            if not _conversational(row):
                if "chosen" in row and "prompt" not in row:
                    row.update(_split(row["chosen"], row["rejected"]))
                for name in ("chosen", "rejected", "completion"):
                    if eos and isinstance(row.get(name), str):
                        row[name] = row[name].removesuffix(eos)
            yield row

    # -------------------------------------------------------------------------------------------------------- training

    def _longest(self) -> int:
        """Tokens of the largest item, one of a prompt with the responses of another (KTO's KL) included."""
        items = [*self.train_data.items, *(self.eval_data.items if self.eval_data else ())]
        if self.objective.baseline != "kl":
            return max(item.n_tokens for item in items)
        replies = max(item.n_tokens - len(item.prompt) for item in items)
        return max(len(item.prompt) for item in items) + replies

    def _reference(self, config: TrainConfig) -> ReferenceCache | None:
        """The log-probabilities of all items under the reference model: the one given, or the model as it is now."""
        if self._cache is None and self.objective.needs_reference:
            model = self.model
            if self._reference_model is not None:
                model = self._parallel(self._reference_model)
            held_out = [self.eval_data.items] if self.eval_data else []
            self._cache = reference_cache(model, config, self.train_data.items, *held_out, world=self.world)
        return self._cache

    def _build(self, checkpoint_dir: Path | None = None) -> Trainer:
        items: Sequence[Item] = self.train_data.items
        config = self.args.train_config(len(items), self.world.size, self._longest())
        evaluation = None
        if self.eval_data and self.args.eval_strategy != "no":
            steps = self.args.eval_steps or self.args.logging_steps
            every = steps if self.args.eval_strategy == "steps" else -(-len(items) // config.batch_size)
            evaluation = Evaluation(self.eval_data.items, int(every), report=self._log_evaluation)
        return Trainer(
            self.model,
            items,
            config,
            reference=self._reference(config),
            world=self.world,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            checkpoint_dir=checkpoint_dir,
            on_step=self._on_step,
            evaluation=evaluation,
            rate=self.args.rate,
        )

    def train(self, resume_from_checkpoint: bool | None = None) -> TrainOutput:
        """Train to the end; with resume_from_checkpoint=True from the newest training state of this output_dir.

        Raises:
            UserError: when the loss stops being finite.
        """
        folder = None
        if self.args.save_strategy != "no":
            output = Path(self.args.output_dir or "trainer_output")
            folder = output.with_name(f"{output.name}-state")
            if self.world.is_main:
                if not resume_from_checkpoint:
                    shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            self.world.barrier()
        self._trainer = self._build(folder)
        self._pending: list[dict[str, float]] = []
        losses: list[float] = []
        self._losses = losses
        metrics = self._trainer.fit()
        write_back(self.model, self._given)
        loss = sum(losses) / max(1, len(losses))
        return TrainOutput(self.state.global_step, loss, {"train_loss": loss, **metrics})

    def _on_step(self, metrics: dict[str, float]) -> None:
        step = int(metrics["step"])
        self.state.global_step = step
        self.state.epoch = step / self._trainer.steps_per_epoch
        self._losses.append(metrics["loss"])
        self._pending.append(metrics)
        every = self.args.logging_steps
        every = max(1, int(every if every >= 1 else every * self._trainer.total_steps))
        if step % every == 0 or step == self._trainer.total_steps:
            names = [name for name in self._pending[-1] if name not in ("step", "lr", "items")]
            logged = {n: sum(m.get(n, 0.0) for m in self._pending) / len(self._pending) for n in names}
            self._log({**logged, "learning_rate": metrics["lr"], "epoch": self.state.epoch, "step": step})
            self._pending = []

    def _log_evaluation(self, metrics: dict[str, float]) -> None:
        self._log({**metrics, "epoch": self.state.epoch})

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.log_history.append(metrics)
        if self.world.is_main:
            print({name: round(value, 6) for name, value in metrics.items()}, flush=True)

    def evaluate(self) -> dict[str, float]:
        """The metrics of the eval_dataset under the model as it is, with `eval_` before their names.

        Raises:
            UserError: without an eval_dataset.
        """
        if not self.eval_data:
            raise UserError(f"{type(self).__name__}: evaluate() needs an eval_dataset")
        trainer = self._trainer or self._build()
        metrics = {f"eval_{n}": v for n, v in trainer.evaluate(self.eval_data.items, self._cache).items()}
        self._log_evaluation(metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model, in fp32, and its tokenizer as a model folder. All ranks call it."""
        output = Path(output_dir or self.args.output_dir or "trainer_output")
        theirs = hasattr(self.processing_class, "save_pretrained")
        save_weights(self.model, output, dtype=torch.float32, extra_files={} if theirs else self.tokenizer.files)
        if theirs and self.world.is_main:
            self.processing_class.save_pretrained(output)


class DPOTrainer(_Trainer):
    """As TRL's DPOTrainer. ref_model: the reference, the model before training if None."""

    config_class = DPOConfig

    def __init__(self, model: Any, ref_model: Any = None, args: Arguments | None = None, **given: Any) -> None:
        super().__init__(model, args, **given)
        self._reference_model = ref_model


class KTOTrainer(DPOTrainer):
    """As TRL's KTOTrainer; rows with prompt, completion and label, or pairs."""

    config_class = KTOConfig


class CPOTrainer(_Trainer):
    """As TRL's CPOTrainer."""

    config_class = CPOConfig


class ORPOTrainer(_Trainer):
    """As TRL's ORPOTrainer."""

    config_class = ORPOConfig


class SFTTrainer(_Trainer):
    """As TRL's SFTTrainer, for rows with prompt and completion: the completion is learned."""

    config_class = SFTConfig

    def _prepared(self, rows: Any) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(super()._prepared(rows)):
            if "prompt" not in row or "completion" not in row:
                raise UserError(
                    f"rows[{index}]: SFTTrainer learns completions of prompts, the row has {sorted(row)}; "
                    "give it prompt and completion"
                )
            yield row


def _conversational(row: dict[str, Any]) -> bool:
    """Whether a row is of chat messages, not of texts."""
    names = ("prompt", "chosen", "rejected", "completion", "messages")
    return any(isinstance(row.get(name), list) for name in names)


def _split(chosen: str, rejected: str) -> dict[str, str]:
    """The common beginning of two texts as prompt, its last space left to the replies, as TRL does it."""
    n = len(commonprefix([chosen, rejected]))
    n -= n > 0 and chosen[n - 1] == " "
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
