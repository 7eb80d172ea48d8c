"""Trainers with TRL's arguments, data sets, methods and metric names around our own."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from srlm_fast.adapters import save_adapters
from srlm_fast.checkpoint import save_weights
from srlm_fast.compat.arguments import Arguments, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig
from srlm_fast.compat.callbacks import Callbacks, Stopped
from srlm_fast.compat.models import as_llama, as_tokenizer, local_folder, lora_options, write_back
from srlm_fast.compat.rows import Reader
from srlm_fast.config import TrainConfig
from srlm_fast.dataset import Data
from srlm_fast.errors import UserError
from srlm_fast.lora import LoraLinear, add_adapters
from srlm_fast.losses import Objective
from srlm_fast.packing import Item
from srlm_fast.parallel import World, compute_dtype, parallelize
from srlm_fast.reference import ReferenceCache
from srlm_fast.rundir import write_json
from srlm_fast.trainer import Evaluation, Trainer, reference_cache, training_objective

_REFUSED = {
    "data_collator": "batches are packed, there is nothing to collate",
    "compute_metrics": "the metrics are TRL's; measure others with Evaluation(measure=...) of srlm_fast.trainer",
    "optimizers": "the optimizer is AdamW, its schedule that of the arguments",
    "quantization_config": "weights are fp32 while they are trained",
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
        model: a LlamaForCausalLM of transformers or one that PEFT has wrapped (both are trained in place), a model
            folder, its name on the Hugging Face Hub, or a `Llama`.
        args: the configuration, ours or TRL's own.
        train_dataset, eval_dataset: a `datasets.Dataset` or whatever `dataset.read_items` reads; for evaluation a dict
            of such, too, whose names then stand before their metrics.
        processing_class: the tokenizer, of transformers or ours, or its folder.
        peft_config: a `peft.LoraConfig`; adapters beside the frozen model are trained, and saved in PEFT's layout.
        callbacks: those of transformers; `Callbacks` says what they see.

    Raises:
        UserError: for what is not supported, by its name, and for rows that cannot be used.
    """

    config_class: type[Arguments] = Arguments

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        **others: Any,
    ) -> None:
        name = type(self).__name__
        for key, value in others.items():
            if key not in _REFUSED:
                raise UserError(f"{name}: unknown argument {key!r}; leave it out")
            if value not in (None, [], (None, None)):
                raise UserError(f"{name}: {key} is not supported: {_REFUSED[key]}")
        self.args = self.config_class.of(args, name)
        if train_dataset is None:
            raise UserError(f"{name}: train_dataset is needed")
        self.world = World()
        self._given = local_folder(model, self.args.model_init_kwargs)
        self.processing_class = processing_class or tokenizer
        self.tokenizer, bos = as_tokenizer(self.processing_class, self._given)
        self.objective = self._objective()
        self._reader = Reader(self.tokenizer, bos, self.objective, self.args.max_length, self.args.truncation_mode)
        self.train_data, self.eval_data = self._read(train_dataset), {}
        if eval_dataset is not None:
            parts = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
            self.eval_data = {part: self._read(rows) for part, rows in parts.items()}
        elif self.args.eval_strategy != "no":
            raise UserError(f"{self.args.name}: eval_strategy={self.args.eval_strategy} needs an eval_dataset")
        self._reference_model: Any = None
        self.model = self._parallel(self._given, peft_config)
        self.state = SimpleNamespace(global_step=0, epoch=0.0, log_history=[], is_world_process_zero=self.world.is_main)
        self.accelerator = SimpleNamespace(print=self._print, is_main_process=self.world.is_main)
        self._callbacks = Callbacks(callbacks or (), self)
        self._cache: ReferenceCache | None = None
        self._trainer: Trainer | None = None
        if self.world.is_main and self.args.report_to != "none":
            warnings.warn(f"report_to={self.args.report_to} is passed over; a callback gets the metrics", stacklevel=3)

    def _parallel(self, model: Any, peft_config: Any = None) -> nn.Module:
        """A model on the ranks; where it has adapters its frozen weights have the dtype of the computation."""
        options, adapters = self.args.parallel(), lora_options(model, peft_config)
        frozen = adapters.rank or hasattr(model, "peft_config")
        llama = as_llama(model, compute_dtype(self.world.device, options) if frozen else torch.float32)
        add_adapters(llama, adapters, seed=self.args.seed)
        for layer in llama.modules():
            if isinstance(layer, LoraLinear) and self.args.disable_dropout:
                layer.dropout = 0.0
        return parallelize(llama.to(self.world.device), self.world, options)

    def _objective(self) -> Objective:
        return training_objective(self.args.train_config(1, 1, 1))

    def _read(self, rows: Any) -> Data:
        return self._reader.read(rows)

    # -------------------------------------------------------------------------------------------------------- training

    def _items(self) -> list[Sequence[Item]]:
        """Those to train on, and those of every data set for evaluation."""
        return [data.items for data in (self.train_data, *self.eval_data.values())]

    def _longest(self) -> int:
        """Tokens of the largest item, one of a prompt with the responses of another (KTO's KL) included."""
        items = [item for part in self._items() for item in part]
        if self.objective.baseline != "kl":
            return max(item.n_tokens for item in items)
        replies = max(item.n_tokens - len(item.prompt) for item in items)
        return max(len(item.prompt) for item in items) + replies

    def _reference(self, config: TrainConfig) -> ReferenceCache | None:
        """The log-probabilities of all items under the reference model: the one given, or the model as it is now.

        Fresh adapters change nothing, so with a peft_config that is the model without them.
        """
        if self._cache is None and self.objective.needs_reference:
            model = self.model
            if self._reference_model is not None:
                model = self._parallel(self._reference_model)
            self._cache = reference_cache(model, config, *self._items(), world=self.world)
        return self._cache

    def _build(self, checkpoint_dir: Path | None = None) -> Trainer:
        items = self.train_data.items
        config = self.args.train_config(len(items), self.world.size, self._longest())
        evaluation = None
        if self.eval_data and self.args.eval_strategy != "no":
            steps = self.args.eval_steps or self.args.logging_steps
            every = steps if self.args.eval_strategy == "steps" else -(-len(items) // config.batch_size)
            evaluation = Evaluation(every=int(every), measure=lambda step: self._measure(), report=self._log_evaluation)
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

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train to the end; with resume_from_checkpoint=True from the newest training state of this output_dir.

        Raises:
            UserError: when the loss stops being finite, or for a training state elsewhere.
        """
        folder = self._state_folder(resume_from_checkpoint)
        self._trainer = self._build(folder)
        self.state.max_steps = self._trainer.total_steps
        self._pending: list[dict[str, float]] = []
        losses: list[float] = []
        self._losses, metrics = losses, {}
        self._callbacks.control.should_training_stop = False
        try:
            self._callbacks.call("on_train_begin")
            metrics = self._trainer.fit()
        except Stopped:
            self.model.eval()
        write_back(self.model, self._given)
        self._callbacks.call("on_train_end")
        loss = sum(losses) / max(1, len(losses))
        return TrainOutput(self.state.global_step, loss, {"train_loss": loss, **metrics})

    def _state_folder(self, resume: bool | str | None) -> Path | None:
        """Where training states are kept, empty unless training is resumed; None for save_strategy=no."""
        folder = self._output.with_name(f"{self._output.name}-state")
        if isinstance(resume, str) and Path(resume).resolve() != folder.resolve():
            raise UserError(f"resume_from_checkpoint={resume}: training state is in {folder}; pass True")
        if self.args.save_strategy == "no":
            return None
        if self.world.is_main:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        return folder

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
        self._callbacks.call("on_step_end")

    def _log_evaluation(self, metrics: dict[str, float]) -> None:
        self._log({**metrics, "epoch": self.state.epoch})
        self._callbacks.call("on_evaluate", metrics=metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.log_history.append(metrics)
        self._print({name: round(value, 6) for name, value in metrics.items()}, flush=True)
        self._callbacks.call("on_log", logs=metrics)

    def _measure(self) -> dict[str, float]:
        """The metrics of every data set for evaluation."""
        measured = {}
        for part, data in self.eval_data.items():
            found = self._trainer.evaluate(data.items, self._cache)
            measured |= {f"{part}_{name}" if part else name: value for name, value in found.items()}
        return measured

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """The metrics of the eval_dataset under the model as it is, with `eval_` before their names.

        Raises:
            UserError: without an eval_dataset, or for another one than the trainer's.
        """
        if eval_dataset is not None or not self.eval_data:
            raise UserError(
                f"{type(self).__name__}: evaluate() is of the trainer's eval_dataset; pass it to the trainer"
            )
        self._trainer = self._trainer or self._build()
        metrics = {f"eval_{name}": value for name, value in self._measure().items()}
        self._log_evaluation(metrics)
        return metrics

    # ---------------------------------------------------------------------------------------------------------- output

    @property
    def _output(self) -> Path:
        return Path(self.args.output_dir or "trainer_output")

    def _print(self, *text: Any, **options: Any) -> None:
        if self.world.is_main:
            print(*text, **options)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model, in fp32, and its tokenizer as a model folder; of a model with adapters these alone, which
        PEFT loads. All ranks call it."""
        output, theirs = Path(output_dir or self._output), hasattr(self.processing_class, "save_pretrained")
        files = {} if theirs else self.tokenizer.files
        if getattr(self.model, "lora", None) is None:
            save_weights(self.model, output, dtype=torch.float32, extra_files=files)
        else:
            base = self._given if isinstance(self._given, (str, Path)) else getattr(self._given, "name_or_path", "")
            save_adapters(self.model, output, base=base, world=self.world)
            for name, file in files.items() if self.world.is_main else ():
                (output / name).write_bytes(file if isinstance(file, bytes) else Path(file).read_bytes())
        if theirs and self.world.is_main:
            self.processing_class.save_pretrained(output)

    def save_state(self) -> None:
        """Write `state.log_history` to trainer_state.json of the output_dir."""
        state = {"global_step": self.state.global_step, "epoch": self.state.epoch}
        self._write("trainer_state.json", {**state, "log_history": self.state.log_history})

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Print metrics."""
        self._print(f"{split}: {dict(metrics)}", flush=True)

    def save_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Write metrics to SPLIT_results.json of the output_dir."""
        self._write(f"{split}_results.json", dict(metrics))

    def _write(self, name: str, content: Any) -> None:
        if self.world.is_main:
            self._output.mkdir(parents=True, exist_ok=True)
            write_json(self._output / name, content)

    def is_world_process_zero(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.world.is_main

    def push_to_hub(self, *others: Any, **more: Any) -> None:
        """Not done here.

        Raises:
            UserError: always.
        """
        raise UserError("push_to_hub is not supported: push the folder that save_model writes")

    def end(self) -> None:
        """Wait for all ranks; there are no trackers to finish."""
        self.world.barrier()


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
    """As TRL's SFTTrainer: of prompt and completion the completion is learned, of messages or a text everything."""

    config_class = SFTConfig

    def _read(self, rows: Any) -> Data:
        return self._reader.read_demonstrations(rows, self.args.dataset_text_field, self.args.completion_only_loss)
