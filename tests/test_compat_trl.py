"""Our trainers against TRL itself, argument for argument, and in TRL's own scripts."""

import copy
import json
from importlib import import_module

import datasets
import pytest
import torch
import transformers
import trl
from test_compat import KTO, PAIRS, chat, hf_model

from srlm_fast import compat
from srlm_fast.errors import UserError

SFT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
TEXTS = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]
MESSAGES = [{"messages": chat(row)["prompt"] + chat(row)["completion"]} for row in SFT]


def trainer_of(source, name, model, rows, tokenizer, folder, *, settings, **options):
    """A trainer of `compat` or of `trl` with all rows in every step, so that their order does not matter."""
    args = getattr(source, f"{name}Config")(
        output_dir=str(folder),
        warmup_steps=1,
        per_device_train_batch_size=len(rows),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        **settings,
    )
    options |= {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    return getattr(source, f"{name}Trainer")(model=model, args=args, **options)


@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        ("DPO", PAIRS, {}),
        ("DPO", [chat(row) for row in PAIRS], {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2]}),
        ("DPO", PAIRS, {"loss_type": ["robust"], "label_smoothing": 0.1, "lr_scheduler_type": "cosine"}),
        ("DPO", PAIRS, {"max_length": 24}),
        ("DPO", PAIRS, {"use_weighting": True}),
        ("KTO", KTO, {}),
        ("SFT", SFT, {}),
        ("SFT", SFT, {"completion_only_loss": False, "max_length": 9}),
        ("SFT", TEXTS, {"max_length": 12}),
        ("SFT", MESSAGES, {}),
    ],
)
def test_losses_are_those_of_trl(bpe_folder, tmp_path, name, rows, settings):
    """All rows in every step, so that their order does not matter."""
    history = []
    for source in (compat, trl):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(bpe_folder)
        tokenizer.pad_token = "<|end|>"
        model = hf_model()
        reference = {"ref_model": copy.deepcopy(model)} if name != "SFT" else {}
        steps = {"learning_rate": 3e-3, "max_steps": 5, **settings}
        trainer = trainer_of(source, name, model, rows, tokenizer, tmp_path, settings=steps, **reference)
        trainer.train()
        history.append([row for row in trainer.state.log_history if "loss" in row])
    ours, theirs = history
    names = (
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/margins",
        "rewards/chosen",
        "logps/chosen",
        "logps/rejected",
    )
    for step, expected in zip(ours, theirs, strict=True):
        for metric in (metric for metric in names if metric in expected):
            # TRL's KL of KTO is of a batch in another order.
            tolerance = {"abs": 1e-2 if name == "KTO" else 2e-4}
            assert step[metric] == pytest.approx(float(expected[metric]), **tolerance), metric
    assert torch.isfinite(torch.tensor([step["loss"] for step in ours])).all()


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("dpo", PAIRS, ["--beta", "0.2", "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]),
        ("dpo", PAIRS, ["--loss_type", "ipo", "--save_strategy", "no"]),
        ("kto", KTO, ["--use_peft", "--lora_dropout", "0.0"]),
        ("sft", MESSAGES, []),
    ],
)
def test_a_script_of_trl_with_our_trainer(bpe_folder, tmp_path, monkeypatch, name, rows, options):
    """The script as it is, its configuration TRL's own; only the trainer is ours."""
    model, data = tmp_path / "model", tmp_path / "data"
    hf_model().save_pretrained(model)
    transformers.PreTrainedTokenizerFast.from_pretrained(bpe_folder).save_pretrained(model)
    data.mkdir()
    for split, part in (("train", rows[:-1]), ("test", rows[-2:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    script = import_module(f"trl.scripts.{name}")
    trainer = f"{name.upper()}Trainer"
    trained = []

    class Ours(getattr(compat, trainer)):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            trained.append(self)

    monkeypatch.setattr(trl, trainer, Ours)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    command += ["--max_steps", "4", "--learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", "2"]
    command += ["--logging_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", *options]
    script.main(*script.make_parser().parse_args_and_config(command))
    history = trained[0].state.log_history
    assert [row["step"] for row in history] == [2, 2, 4, 4] and "eval_loss" in history[1]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(9)[None]
    assert (saved(ids).logits - hf_model()(ids).logits).abs().max() > 1e-3
    assert ((tmp_path / "out/adapter_config.json").exists()) == ("--use_peft" in options)


@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "CPO", "ORPO"])
def test_configurations_of_trl_are_taken(name, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module = trl if hasattr(trl, f"{name}Config") else import_module(f"trl.experimental.{name.lower()}")
    theirs, ours = getattr(module, f"{name}Config"), getattr(compat, f"{name}Config")
    taken = vars(ours.of(theirs("x", use_cpu=True), f"{name}Trainer"))
    for key, value in vars(ours("x")).items():
        if hasattr(theirs, key) and key in {**compat.arguments.COMMON, **ours.own}:
            assert taken[key] == value or [value] == taken[key], key  # loss_type
    config = ours.of(theirs("x", use_cpu=True, bf16=False, learning_rate=3e-4, lr_scheduler_type="cosine"), "Trainer")
    assert (config.bf16, config.learning_rate, config.lr_scheduler_type) == (False, 3e-4, "cosine")
    assert config.train_config(10, 1, 8).lr == 3e-4
    with pytest.raises(UserError, match="push_to_hub=True is not supported"):
        ours.of(theirs("x", use_cpu=True, push_to_hub=True), "Trainer")
