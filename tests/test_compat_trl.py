"""Our trainers against TRL itself, argument for argument, where it is installed (it is no dependency of the tests)."""

import copy

import pytest
import torch
from test_compat import KTO, PAIRS, chat, hf_model

from srlm_fast import compat

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

SFT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


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
        args = getattr(source, f"{name}Config")(
            output_dir=str(tmp_path),
            learning_rate=3e-3,
            max_steps=5,
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
        data = datasets.Dataset.from_list(rows)
        trainer = getattr(source, f"{name}Trainer")(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, **reference
        )
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
