"""The arguments of TRL's configurations: taken, passed over because they change no result here, or refused."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from srlm_fast.config import DpoConfig, TrainConfig
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError

COMMON: dict[str, Any] = {
    **{"output_dir": None, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    **{"num_train_epochs": 3.0, "max_steps": -1, "learning_rate": 1e-6, "lr_scheduler_type": "linear"},
    **{"warmup_steps": 0, "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0},
    **{"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim": "adamw_torch_fused"},
    **{"logging_steps": 10, "eval_strategy": "no", "eval_steps": None, "save_strategy": "steps", "save_steps": 500},
    **{"seed": 42, "data_seed": None, "max_length": 1024, "truncation_mode": "keep_start"},
    **{"bf16": None, "gradient_checkpointing": False, "torch_compile": False, "report_to": "none"},
    **{"model_init_kwargs": None, "resume_from_checkpoint": None},
    "disable_dropout": True,  # of adapters; a model has what it was built with, of a folder and transformers' none
    "tokens_per_microbatch": 8192,  # ours: most tokens of one packed forward pass
}
"""Arguments that all configurations take, with their defaults."""

PASSED_OVER = frozenset(
    """
    accelerator_config activation_offloading auto_find_batch_size average_tokens_across_devices batch_eval_metrics
    bf16_full_eval dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
    ddp_timeout debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps
    eval_do_concat_batches eval_packing eval_use_gather_object fp16_full_eval full_determinism
    gradient_checkpointing_kwargs group_by_length hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen is_encoder_decoder
    label_names length_column_name liger_kernel_config local_rank log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_strategy overwrite_output_dir packing packing_strategy
    pad_to_multiple_of pad_token padding_free padding_value per_device_eval_batch_size precompute_ref_batch_size
    precompute_ref_log_probs prediction_loss_only project ref_model_mixup_alpha ref_model_sync_steps
    remove_unused_columns restore_callback_states_from_checkpoint router_aux_loss_coef run_name save_on_each_node
    save_only_model save_total_limit shuffle_dataset skip_memory_metrics tf32 torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy trust_remote_code use_cache use_cpu use_liger_kernel
    """.split()
)
"""How others spend memory, divide batches, load data or report: there is no such choice here."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((None, False), "products are bf16 or, with bf16=False, fp32"),
    "sync_ref_model": ((False,), "the reference is fixed"),
    "reference_free": ((False,), "take CPOTrainer, whose losses have no reference"),
    "load_best_model_at_end": ((False, None), "pass Evaluation(stop_when=...) to srlm_fast.trainer.Trainer"),
    "metric_for_best_model": ((None,), "pass Evaluation(stop_when=...) to srlm_fast.trainer.Trainer"),
    "greater_is_better": ((None,), "pass Evaluation(stop_when=...) to srlm_fast.trainer.Trainer"),
    "push_to_hub": ((False,), "push the folder that save_model writes"),
    "deepspeed": ((None,), "under torchrun the model is sharded by FSDP2"),
    "fsdp": ((None, "", []), "under torchrun the model is sharded by FSDP2 without being asked"),
    "fsdp_config": ((None,), "under torchrun the model is sharded by FSDP2 without being asked"),
    "neftune_noise_alpha": ((None,), "there is no such noise"),
    "label_smoothing_factor": ((0.0,), "label_smoothing is that of the preference losses"),
    "generate_during_eval": ((False,), "generate with srlm_fast.engine"),
    "lr_scheduler_kwargs": ((None, {}), "schedules have no options"),
    "optim_args": ((None, ""), "the optimizer is AdamW"),
    "assistant_only_loss": ((False,), "give rows with prompt and completion: only the completion is learned"),
    "chat_template_path": ((None,), "set tokenizer.chat_template"),
    "max_prompt_length": ((None,), "max_length is of prompt and response together"),
    "max_completion_length": ((None,), "max_length is of prompt and response together"),
    "dataset_kwargs": ((None, {}), "prepare the rows before"),
    "eval_on_start": ((False,), "call evaluate() before train()"),
    "optim_target_modules": ((None,), "the optimizer is AdamW"),
    "eval_delay": ((0,), "evaluation starts after eval_steps"),
    "parallelism_config": ((None,), "under torchrun the model is sharded by FSDP2"),
    "eos_token": ((None,), "set tokenizer.eos_token"),
}
"""Arguments that are taken with these values only, and what to do for others."""

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


class Arguments:
    """A configuration; its arguments are its attributes.

    Raises:
        UserError: for an argument that is unknown, or a value that this trainer cannot have, with what to do.
    """

    name = "Arguments"
    own: dict[str, Any] = {}
    """Arguments that this configuration has beside the common ones, or other defaults of those."""

    def __init__(self, output_dir: str | None = None, **given: Any) -> None:
        given["output_dir"] = output_dir
        known = {**COMMON, **self.own}
        vars(self).update(dict.fromkeys(PASSED_OVER) | {name: allowed[0] for name, (allowed, _) in ONLY.items()})
        for name, value in given.items():
            if name not in known:
                self._refuse_or_pass(name, value, known)
        vars(self).update(known | given)
        self.report_to = "none" if self.report_to in (None, [], ["none"]) else self.report_to
        self.lr_scheduler_type = _word(self.lr_scheduler_type)
        for name, allowed in (("optim", _OPTIMIZERS), ("lr_scheduler_type", _SCHEDULES)):
            if _word(getattr(self, name)) not in allowed:
                raise UserError(f"{self.name}: {name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("eval_strategy", "save_strategy"):
            setattr(self, name, _word(getattr(self, name)))
            if getattr(self, name) not in ("no", "steps", "epoch"):
                raise UserError(f"{self.name}: {name}={getattr(self, name)!r}: must be no, steps or epoch")

    @classmethod
    def of(cls, args: Any, trainer: str) -> Arguments:
        """What a trainer was given, as it is now: None, a configuration of this class, or one of TRL's of its name.

        One of TRL's has bf16=True and gradient_checkpointing=True whether or not somebody asked for them, so these are
        then taken as not given.

        Raises:
            UserError: for something else, and as the constructor.
        """
        if args is None or isinstance(args, cls):
            return cls(**vars(args or cls()))
        theirs = [kind for kind in type(args).__mro__ if kind.__name__ == cls.name and is_dataclass(kind)]
        if not theirs:
            raise UserError(f"{trainer}: args is a {cls.name} of srlm_fast.compat or of trl, got {type(args).__name__}")
        given = {spec.name: getattr(args, spec.name) for spec in fields(theirs[0])}
        return cls(**given | {"bf16": None if given["bf16"] else False, "gradient_checkpointing": False})

    def _refuse_or_pass(self, name: str, value: Any, known: dict[str, Any]) -> None:
        if name in PASSED_OVER:
            return
        if name in ONLY:
            allowed, instead = ONLY[name]
            if value in allowed:
                return
            raise UserError(f"{self.name}: {name}={value!r} is not supported: {instead}")
        near = get_close_matches(name, [*known, *PASSED_OVER, *ONLY], n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
        raise UserError(f"{self.name}: unknown argument {name!r}{hint}")

    def loss(self) -> dict[str, Any]:
        """The loss with its options, as keys of a `TrainConfig`."""
        raise NotImplementedError

    def train_config(self, n_items: int, world_size: int, longest: int) -> TrainConfig:
        """The configuration of our trainer for a data set; an item has at most `longest` tokens."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size
        steps_per_epoch = math.ceil(n_items / batch)
        steps = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
        return DpoConfig(
            **self.loss(),
            lr=self.learning_rate,
            batch_size=batch,
            epochs=math.ceil(steps / steps_per_epoch),
            max_steps=steps,
            tokens_per_microbatch=max(self.tokens_per_microbatch, longest),
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            checkpoint_every=int(self.save_steps) if self.save_strategy == "steps" else steps_per_epoch,
        )

    def parallel(self) -> ParallelConfig:
        """Precision, recomputation and compilation. As in TRL, bf16=None is bf16 on a GPU; it is fp32 on a CPU."""
        return ParallelConfig(
            dtype={None: "auto", True: "bfloat16", False: "float32"}[self.bf16],
            checkpointing="full" if self.gradient_checkpointing else "none",
            compile=self.torch_compile,
        )

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of a step, from 0, as transformers' schedulers of this name have it."""
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total_steps
        warmup = math.ceil(warmup or self.warmup_ratio * total_steps)
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        if step < warmup:
            return self.learning_rate * step / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        if self.lr_scheduler_type == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (1 - done if self.lr_scheduler_type == "linear" else 1)


def _word(value: Any) -> str:
    """An enumeration of transformers, or its text."""
    return str(getattr(value, "value", value))


class DPOConfig(Arguments):
    """As TRL's DPOConfig."""

    name = "DPOConfig"
    own = {
        **{"loss_type": "sigmoid", "loss_weights": None, "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None},
        **{"discopop_tau": 0.05, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5},
        **{"use_weighting": False},
    }

    def loss(self) -> dict[str, Any]:
        types = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(types) if self.loss_weights is None else list(self.loss_weights)
        names = [_lookup(self, "loss_type", kind, _DPO_LOSSES) for kind in types]
        if len(weights) != len(names):
            raise UserError(f"{self.name}: {len(weights)} loss_weights for {len(names)} loss types; give one for each")
        options: dict[str, Any] = {}
        if self.ld_alpha is not None:
            if names != ["dpo"]:
                raise UserError(f"{self.name}: ld_alpha goes with loss_type='sigmoid' alone; leave one of them out")
            names, options["alpha"] = ["ld_dpo"], self.ld_alpha
        if self.use_weighting:
            if names != ["dpo"]:
                raise UserError(f"{self.name}: use_weighting goes with loss_type='sigmoid' alone; leave one out")
            names, options["sampled_alignment"] = ["wpo"], True
        if "discopop" in names:
            options["tau"] = self.discopop_tau
        divergence = _word(self.f_divergence_type)
        if divergence != "reverse_kl":
            options["divergence"] = divergence
            if divergence == "alpha_divergence":
                options["divergence_alpha"] = self.f_alpha_divergence_coef
        terms = [f"{weight} * {name}" for weight, name in zip(weights, names) if weight]
        return {
            "loss": " + ".join(terms) if len(names) > 1 or weights != [1.0] else names[0],
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "loss_options": options,
        }


_DPO_LOSSES = {
    **{"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "sft": "nll"},
    **{
        name: name
        for name in (
            *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop"),
        )
    },
}


def _lookup(arguments: Arguments, key: str, value: Any, known: dict[str, str]) -> str:
    if value not in known:
        raise UserError(f"{arguments.name}: {key}={value!r}: must be one of {', '.join(known)}")
    return known[value]


class KTOConfig(Arguments):
    """As TRL's KTOConfig."""

    name = "KTOConfig"
    own = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}

    def loss(self) -> dict[str, Any]:
        known = {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"}
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        name = _lookup(self, "loss_type", self.loss_type, known)
        return {"loss": name, "beta": self.beta, "loss_options": weights}


class SFTConfig(Arguments):
    """As TRL's SFTConfig."""

    name = "SFTConfig"
    own = {
        **{"learning_rate": 2e-5, "loss_type": "nll", "completion_only_loss": None, "dataset_text_field": "text"},
        "disable_dropout": False,
    }

    def loss(self) -> dict[str, Any]:
        return {"loss": _lookup(self, "loss_type", self.loss_type, {"nll": "sft"})}


class CPOConfig(Arguments):
    """As TRL's CPOConfig, SimPO among it."""

    name = "CPOConfig"
    own = {
        **{"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5},
        "alpha": 0.0,
    }

    def loss(self) -> dict[str, Any]:
        name = _lookup(self, "loss_type", self.loss_type, {"sigmoid": "cpo", "simpo": "simpo"})
        if self.alpha:
            raise UserError(f"{self.name}: alpha={self.alpha} is AlphaPO's, which is not there; leave it at 0")
        options = {"alpha": 0.0} if name == "cpo" else {"gamma": self.simpo_gamma}
        expression = f"{name} + {self.cpo_alpha} * nll" if self.cpo_alpha else name
        smoothing = {"label_smoothing": self.label_smoothing}
        return {"loss": expression, "beta": self.beta, "loss_options": options, **smoothing}


class ORPOConfig(Arguments):
    """As TRL's ORPOConfig."""

    name = "ORPOConfig"
    own = {"beta": 0.1}

    def loss(self) -> dict[str, Any]:
        return {"loss": "orpo", "beta": self.beta}
