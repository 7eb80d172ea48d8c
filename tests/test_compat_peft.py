"""Adapters under TRL's names: against TRL itself with PEFT, saved and loaded by PEFT, and what is refused."""

import peft
import pytest
import torch
import transformers
import trl
from test_compat import KTO, PAIRS, hf_model
from test_compat_trl import SFT, trainer_of

from srlm_fast import compat
from srlm_fast.adapters import options_of
from srlm_fast.config import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.lora import TARGETS, adapter_parameters


@pytest.fixture
def tokenizer(bpe_folder):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    tokenizer.pad_token = "<|end|>"
    return tokenizer


def ids_of(tokenizer):
    return tokenizer(PAIRS[0]["prompt"], return_tensors="pt")["input_ids"]


def wrapped(model):
    """A model of transformers with adapters that are no longer fresh."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("DPO", PAIRS, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        (
            "DPO",
            PAIRS,
            {"r": 3, "lora_alpha": 8, "lora_dropout": 0.5, "use_rslora": True, "target_modules": ["o_proj", "up_proj"]},
        ),
        ("DPO", PAIRS, None),
        ("KTO", KTO, {"lora_alpha": 64, "target_modules": "all-linear"}),
        ("SFT", SFT, {"r": 2}),
    ],
)
def test_losses_are_those_of_trl_with_peft(tokenizer, tmp_path, name, rows, options):
    """From the same adapters, and (options None) those of a model that PEFT has wrapped, whose reference has them."""
    config = None if options is None else peft.LoraConfig(**options)
    models = [wrapped(hf_model()) if options is None else hf_model() for _ in range(2)]
    keys = {"settings": {"learning_rate": 1e-2, "max_steps": 6}, "peft_config": config}
    ours = trainer_of(compat, name, models[0], rows, tokenizer, tmp_path, **keys)
    theirs = trainer_of(trl, name, models[1], rows, tokenizer, tmp_path, **keys)
    fresh = dict(theirs.model.named_parameters())
    trained = dict(adapter_parameters(ours.model))
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(fresh[f"base_model.model.{key.removesuffix('.weight')}.default.weight"])
    assert len(trained) == sum(p.requires_grad for p in theirs.model.parameters())
    for trainer in (ours, theirs):
        trainer.train()
    histories = [[row for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    for step, expected in zip(*histories, strict=True):
        for metric in {"loss", "grad_norm", "rewards/margins", "logps/chosen"} & expected.keys():
            # TRL's KL of KTO is of a batch in another order.
            tolerance = 1e-2 if name == "KTO" else 2e-4
            assert step[metric] == pytest.approx(float(expected[metric]), abs=tolerance), (step["step"], metric)
    assert abs(histories[0][-1]["loss"] - histories[0][0]["loss"]) > 0.01
    ours.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(hf_model(), str(tmp_path / "saved"))
    ids = ids_of(tokenizer)
    with torch.no_grad():
        found, expected = again(ids).logits, theirs.model(ids).logits
        assert (expected - hf_model()(ids).logits).abs().max() > 1e-2
    if name != "KTO":
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    if options is None:
        torch.testing.assert_close(models[0](ids).logits, found, atol=1e-5, rtol=0)  # was trained in place
    else:
        torch.testing.assert_close(models[0](ids).logits, hf_model()(ids).logits, atol=0, rtol=0)


def test_a_model_folder_with_adapters(tokenizer, tmp_path):
    """Its adapters are loaded by transformers alone: the folder's name is beside them."""
    hf_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = compat.DPOConfig(str(tmp_path / "out"), max_steps=4, learning_rate=1e-2)
    config = peft.LoraConfig(target_modules="all-linear")
    options = {"args": args, "train_dataset": PAIRS, "peft_config": config}
    trainer = compat.DPOTrainer(str(tmp_path / "base"), **options)
    trainer.train()
    trainer.save_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_of(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"))
    expected = peft.PeftModel.from_pretrained(hf_model(), str(tmp_path / "out"))(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert (expected - hf_model()(ids).logits).abs().max() > 1e-3


def test_what_the_options_of_peft_mean():
    by_default = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    assert options_of(peft.LoraConfig().to_dict(), "x") == LoraConfig(rank=8, alpha=8.0, targets=tuple(by_default))
    everything = peft.LoraConfig(target_modules="all-linear", lora_dropout=0.05, r=16, lora_alpha=32)
    assert options_of(everything.to_dict(), "x") == LoraConfig(rank=16, alpha=32.0, dropout=0.05, targets=TARGETS)
    model = peft.get_peft_model(hf_model(), peft.LoraConfig(r=4, use_rslora=True))
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    stable = options_of(peft.LoraConfig(r=4, use_rslora=True).to_dict(), "x")
    assert stable.alpha / stable.rank == scaling == 4.0


def test_dropout_of_adapters_is_on_where_trl_has_it(tokenizer):
    rows = {compat.DPOTrainer: PAIRS, compat.SFTTrainer: SFT}
    for trainer, args, expected in (
        (compat.DPOTrainer, None, 0.0),
        (compat.DPOTrainer, compat.DPOConfig(disable_dropout=False), 0.1),
        (compat.SFTTrainer, None, 0.1),
    ):
        config, options = peft.LoraConfig(lora_dropout=0.1), {"args": args, "processing_class": tokenizer}
        model = trainer(hf_model(), train_dataset=rows[trainer], peft_config=config, **options).model
        assert model.model.layers[0].self_attn.q_proj.dropout == expected and model.lora.dropout == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "peft_config: use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"target_modules=\['embed_tokens'\] is not supported"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "target_modules names single blocks"),
        ({"target_modules": ".*_proj"}, "target_modules='.*_proj' is a pattern; list the names"),
    ],
)
def test_options_of_peft_that_are_not_there_are_refused_by_name(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        compat.DPOTrainer(
            hf_model(), train_dataset=PAIRS, processing_class=tokenizer, peft_config=peft.LoraConfig(**options)
        )


def test_other_kinds_are_refused(tokenizer):
    options = {"train_dataset": PAIRS, "processing_class": tokenizer}
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UserError, match="peft_type="):
        compat.DPOTrainer(hf_model(), **options, peft_config=prompts)
    with pytest.raises(UserError, match="the model has adapters already"):
        compat.DPOTrainer(wrapped(hf_model()), **options, peft_config=peft.LoraConfig())
