"""TRL's trainers by name, against the same training written out with transformers and torch."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from srlm_fast import compat
from srlm_fast.checkpoint import load_model
from srlm_fast.errors import UserError
from srlm_fast.model import Llama

transformers = pytest.importorskip("transformers")

PAIRS = [
    {"prompt": f"What colour is {thing}?", "chosen": f" It is {one}.", "rejected": f" {other}"}
    for thing, one, other in (
        ("the sky", "blue, as always", "green"),
        ("grass", "green", "blue, I think it is"),
        ("a raven", "black", "white as snow"),
        ("snow", "white", "black"),
        ("blood", "red", "a kind of blue"),
    )
]
KTO = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


@pytest.fixture
def tokenizer(bpe_folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(bpe_folder)


def hf_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def chat(row):
    """A row of texts as chat messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
    return {k: [{"role": roles[k], "content": v.strip()}] if k in roles else v for k, v in row.items()}


def logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def plain_dpo(model, tokenizer, steps: int, *, beta, lr, warmup, schedule) -> list[float]:
    """DPO on all pairs in every step, with transformers' model and schedule and torch's AdamW."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    rates = transformers.get_scheduler(schedule, optimizer, warmup, steps)
    losses = []
    for _ in range(steps):
        loss = 0.0
        for row in PAIRS:
            ratios = []
            for side in ("chosen", "rejected"):
                prompt = tokenizer(row["prompt"])["input_ids"]
                whole = tokenizer(row["prompt"] + row[side])["input_ids"]
                assert whole[: len(prompt)] == prompt
                response = [*whole[len(prompt) :], tokenizer.eos_token_id]
                with torch.no_grad():
                    against = logps(reference, prompt, response)
                ratios.append(logps(model, prompt, response) - against)
            loss = loss - F.logsigmoid(beta * (ratios[0] - ratios[1])) / len(PAIRS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_dpo_is_the_plain_loop(tokenizer, tmp_path, schedule):
    ours, theirs = hf_model(), hf_model()
    settings = {"beta": 0.3, "lr": 3e-3, "warmup": 2, "schedule": schedule}
    tokenizer.post_processor = None
    expected = plain_dpo(theirs, tokenizer, 6, **settings)
    args = compat.DPOConfig(
        str(tmp_path / "out"),
        beta=0.3,
        learning_rate=3e-3,
        warmup_steps=2,
        lr_scheduler_type=transformers.SchedulerType(schedule),
        per_device_train_batch_size=len(PAIRS),
        num_train_epochs=6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=True,
    )
    trainer = compat.DPOTrainer(ours, args=args, train_dataset=PAIRS, processing_class=tokenizer)
    output = trainer.train()
    history = trainer.state.log_history
    assert [row["loss"] for row in history] == pytest.approx(expected, abs=2e-5)
    assert output.global_step == 6 and output.training_loss == pytest.approx(sum(expected) / 6, abs=2e-5)
    assert history[0]["learning_rate"] == 0 and history[2]["learning_rate"] == pytest.approx(3e-3)
    for (name, value), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-4, rtol=0, msg=name)


def test_chat_messages_are_written_by_the_tokenizers_template(tokenizer):
    trainer = compat.DPOTrainer(hf_model(), train_dataset=[chat(row) for row in PAIRS], processing_class=tokenizer)
    for row, item in zip(map(chat, PAIRS), trainer.train_data.items, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert list(item.prompt) == prompt
        for side, response in zip(("chosen", "rejected"), item.responses):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
            assert prompt + list(response) == whole


def test_texts_are_taken_as_they_are(tokenizer):
    """bos as the tokenizer puts it, eos once, and a prompt that both texts begin with."""
    rows = [{"chosen": "The sky is blue.<|end|>", "rejected": "The sky is green."}]
    (item,) = compat.DPOTrainer(hf_model(), train_dataset=rows, processing_class=tokenizer).train_data.items
    for side, response in zip(("chosen", "rejected"), item.responses):
        text = rows[0][side].removesuffix("<|end|>")
        assert [*item.prompt, *response] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(item.prompt, skip_special_tokens=True) == "The sky is"


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "settings"),
    [
        (compat.DPOTrainer, compat.DPOConfig, PAIRS, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (compat.KTOTrainer, compat.KTOConfig, KTO, {"undesirable_weight": 0.5}),
        (compat.KTOTrainer, compat.KTOConfig, [chat(row) for row in PAIRS], {"loss_type": "apo_zero_unpaired"}),
        (compat.CPOTrainer, compat.CPOConfig, PAIRS, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        (compat.CPOTrainer, compat.CPOConfig, PAIRS, {}),
        (compat.ORPOTrainer, compat.ORPOConfig, PAIRS, {}),
        (compat.SFTTrainer, compat.SFTConfig, [{k: v for k, v in row.items() if k != "label"} for row in KTO], {}),
    ],
)
def test_every_trainer_trains_logs_and_saves(tokenizer, tmp_path, trainer, config, rows, settings):
    out = str(tmp_path / "out")
    args = config(
        out,
        learning_rate=5e-3,
        max_steps=6,
        per_device_train_batch_size=len(rows) - 1,
        gradient_accumulation_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        **settings,
    )
    model = hf_model()
    running = trainer(model, args=args, train_dataset=rows[:-1], eval_dataset=rows[-3:], processing_class=tokenizer)
    before = running.evaluate()
    running.train()
    logged = [row for row in running.state.log_history if "loss" in row]
    evaluated = [row for row in running.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6] and [row.get("step") for row in evaluated] == [None, 2, 4, 6]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert before["eval_loss"] == evaluated[0]["eval_loss"] != evaluated[-1]["eval_loss"]
    if config is not compat.SFTConfig:
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
        assert all(name in row for name in names for row in logged)
    running.save_model()
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, value in read.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert transformers.AutoTokenizer.from_pretrained(out)("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_models_and_references(tokenizer, tmp_path):
    """A folder, a bf16 model that gets its weights back, and a reference of its own, whose first loss is not ln 2."""
    args = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    half = hf_model(torch.bfloat16)
    before = half.model.embed_tokens.weight.clone()
    reference = hf_model()
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)
    options = {"train_dataset": PAIRS, "processing_class": tokenizer}
    first = compat.DPOTrainer(half, reference, compat.DPOConfig("x", **args), **options)
    first.train()
    assert not torch.equal(half.model.embed_tokens.weight, before) and half.dtype == torch.bfloat16
    assert abs(first.state.log_history[0]["loss"] - 0.6931) > 1e-3
    first.save_model(str(tmp_path / "m"))
    again = compat.DPOTrainer(str(tmp_path / "m"), args=compat.DPOConfig("x", **args), train_dataset=PAIRS)
    again.train()
    assert again.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert isinstance(again.model, Llama) and isinstance(load_model(tmp_path / "m"), Llama)


def test_several_data_sets_for_evaluation(tokenizer, tmp_path):
    args = compat.DPOConfig(str(tmp_path / "out"), max_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1)
    options = {"args": args, "train_dataset": PAIRS[:3], "processing_class": tokenizer}
    parts = {"near": PAIRS[:3], "far": PAIRS[3:]}
    running = compat.DPOTrainer(hf_model(), eval_dataset=parts, **options)
    metrics = running.evaluate()
    for part, rows in parts.items():
        alone = compat.DPOTrainer(hf_model(), eval_dataset=rows, **options).evaluate()
        assert {f"eval_{part}_{name.removeprefix('eval_')}" for name in alone} < metrics.keys()
        assert metrics[f"eval_{part}_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"], rel=1e-6)
    running.train()
    assert [row["step"] for row in running.state.log_history if "eval_far_loss" in row and "step" in row] == [1, 2]


def test_callbacks_see_and_stop(tokenizer, tmp_path):
    class Watch(transformers.TrainerCallback):
        seen = []

        def on_train_begin(self, args, state, control, **others):
            self.seen.append(("begin", args.learning_rate, state.max_steps))

        def on_log(self, args, state, control, logs, **others):
            self.seen.append(("log", state.global_step, "loss" in logs))

        def on_evaluate(self, args, state, control, metrics, model, **others):
            self.seen.append(("evaluate", state.global_step, "eval_loss" in metrics))
            control.should_training_stop = state.global_step == 3

        def on_train_end(self, args, state, control, **others):
            self.seen.append(("end", state.global_step))

    args = compat.DPOConfig(str(tmp_path / "out"), max_steps=8, eval_strategy="steps", eval_steps=3, logging_steps=2)
    options = {"args": args, "train_dataset": PAIRS, "eval_dataset": PAIRS, "processing_class": tokenizer}
    model = hf_model()
    running = compat.DPOTrainer(model, callbacks=[Watch], **options)
    assert running.train().global_step == 3
    steps = [("log", 2, True), ("log", 3, False), ("evaluate", 3, True)]
    assert Watch.seen == [("begin", 1e-6, 8), *steps, ("end", 3)]
    assert not running.model.training and not torch.equal(model.lm_head.weight, hf_model().lm_head.weight)


def test_a_model_by_its_name_on_the_hub(tokenizer, tmp_path, monkeypatch):
    """From the cache of huggingface_hub, without a network; what a script then asks of the trainer."""
    import huggingface_hub

    commit, repository = "0" * 40, tmp_path / "hub/models--somebody--tiny"
    snapshot = repository / "snapshots" / commit
    hf_model().save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    args = compat.DPOConfig(str(tmp_path / "out"), max_steps=1)
    args.model_init_kwargs = {"revision": "main", "dtype": "float32", "attn_implementation": None}
    trainer = compat.DPOTrainer("somebody/tiny", args=args, train_dataset=PAIRS)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.accelerator.print("done")
    trainer.end()
    assert trainer.is_world_process_zero()
    assert json.loads((tmp_path / "out/train_results.json").read_text())["train_loss"] == metrics["train_loss"]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["log_history"] == trainer.state.log_history
    args.model_init_kwargs = {"quantization_config": {}}
    for refused, message in (
        (lambda: compat.DPOTrainer("somebody/tiny", args=args, train_dataset=PAIRS), "quantization_config is not"),
        (lambda: compat.DPOTrainer("somebody/else", train_dataset=PAIRS), "somebody/else is no folder"),
        (lambda: trainer.train(resume_from_checkpoint="elsewhere"), "training state is in .*out-state; pass True"),
        (lambda: trainer.evaluate(PAIRS), "pass it to the trainer"),
        (trainer.push_to_hub, "push the folder that save_model writes"),
    ):
        with pytest.raises(UserError, match=message):
            refused()


def test_reports_that_nobody_gets_are_said(tokenizer):
    args = compat.DPOConfig(report_to="wandb")
    with pytest.warns(UserWarning, match="report_to=wandb is passed over; a callback gets the metrics"):
        compat.DPOTrainer(hf_model(), args=args, train_dataset=PAIRS, processing_class=tokenizer)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_equal_one(bpe_folder, tmp_path):
    """Under torchrun the model is sharded; every rank's model of transformers has the trained weights afterwards."""
    from compat_case import train

    expected = train(tmp_path / "one", bpe_folder, 4)
    case = Path(__file__).with_name("compat_case.py")
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(case)]
    done = subprocess.run([*command, tmp_path / "two", bpe_folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"two/rank-{rank}.pt", weights_only=False)
        for name, value in expected._given.state_dict().items():
            torch.testing.assert_close(found["model"][name], value, atol=1e-5, rtol=0, msg=name)
        losses = [step["loss"] for step in expected.state.log_history if "loss" in step]
        assert [step["loss"] for step in found["history"] if "loss" in step] == pytest.approx(losses, abs=1e-5)
        assert found["eval"]["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], abs=1e-5)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two/saved")
    assert torch.equal(saved.lm_head.weight, found["model"]["lm_head.weight"])


def test_resuming(tokenizer, tmp_path, monkeypatch):
    args = compat.DPOConfig(
        str(tmp_path / "out"), max_steps=4, save_steps=1, learning_rate=1e-2, per_device_train_batch_size=2
    )
    options = {"args": args, "train_dataset": PAIRS, "processing_class": tokenizer}
    expected = hf_model()
    compat.DPOTrainer(expected, **options).train()
    stopped = compat.DPOTrainer(hf_model(), **options)
    monkeypatch.setattr(stopped, "_on_step", lambda metrics: metrics["step"] == 3 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stopped.train()
    assert [path.name for path in (tmp_path / "out-state").iterdir()] == ["step-2"]
    model = hf_model()
    resumed = compat.DPOTrainer(model, **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert len([row for row in resumed.state.log_history]) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_every_argument_of_transformers_is_known():
    """Each of them at its default is taken or passed over."""
    for spec in dataclasses.fields(transformers.TrainingArguments):
        if spec.default is dataclasses.MISSING:
            continue
        compat.DPOConfig(**{spec.name: spec.default})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bta": 0.1}, "DPOConfig: unknown argument 'bta'; did you mean 'beta'"),
        ({"fp16": True}, "fp16=True is not supported: products are bf16"),
        ({"loss_type": "sigmoidal"}, "loss_type='sigmoidal': must be one of sigmoid, "),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1]}, "1 loss_weights for 2 loss types"),
        ({"ld_alpha": 0.5, "loss_type": "ipo"}, "ld_alpha goes with loss_type='sigmoid'"),
        ({"use_weighting": True, "loss_type": "ipo"}, "use_weighting goes with loss_type='sigmoid'"),
        ({"load_best_model_at_end": True}, r"Evaluation\(stop_when"),
        ({"optim": "adafactor"}, "optim='adafactor': must be one of adamw_torch"),
        ({"lr_scheduler_type": "polynomial"}, "must be one of linear, cosine"),
        ({"eval_strategy": "sometimes"}, "must be no, steps or epoch"),
        ({"eval_strategy": "steps"}, "eval_strategy=steps needs an eval_dataset"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tokenizer, given, message):
    with pytest.raises(UserError, match=message):
        args = compat.DPOConfig("x", **given)
        compat.DPOTrainer(hf_model(), args=args, train_dataset=PAIRS, processing_class=tokenizer)


def test_trainers_refuse_by_name(tokenizer):
    options = {"train_dataset": PAIRS, "processing_class": tokenizer}
    cases = {
        "peft_config: a peft.LoraConfig, got object": {"peft_config": object()},
        "compute_metrics is not supported: the metrics are": {"compute_metrics": len},
        "unknown argument 'eval_data'": {"eval_data": PAIRS},
        "train_dataset is needed": {"train_dataset": None},
        r"several data sets \(train\)": {"train_dataset": {"train": PAIRS}},
        "args is a DPOConfig of srlm_fast.compat or of trl, got dict": {"args": {}},
        r"rows\[1\]: a row of no known layout": {"train_dataset": [PAIRS[0], {"prompt": "a", "chosen": "b"}]},
    }
    for message, given in cases.items():
        with pytest.raises(UserError, match=message):
            compat.DPOTrainer(hf_model(), **{**options, **given})
    for model, message in ((3, "got int"), (Path("no/such"), "is no folder"), (torch.nn.Linear(2, 2), "got Linear")):
        with pytest.raises(UserError, match=message):
            compat.DPOTrainer(model, **options)
    with pytest.raises(UserError, match=r"rows\[0\]: SFTTrainer learns completions"):
        compat.SFTTrainer(hf_model(), **{**options, "train_dataset": [{"words": "a"}]})
    with pytest.raises(UserError, match="pass the tokenizer"):
        compat.DPOTrainer(hf_model(), train_dataset=PAIRS)


def test_precision_and_memory_have_their_names():
    for given, dtype in (({}, "auto"), ({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32")):
        assert compat.DPOConfig(**given).parallel().dtype == dtype
    options = compat.DPOConfig(gradient_checkpointing=True, torch_compile=True).parallel()
    assert options.checkpointing == "full" and options.compile
    assert compat.DPOConfig().parallel().checkpointing == "none"


def test_losses_have_their_names():
    def loss(config):
        return config.loss()["loss"], config.loss().get("loss_options")

    assert loss(compat.DPOConfig()) == ("dpo", {})
    assert loss(compat.DPOConfig(loss_type=["sigmoid", "sft"])) == ("1.0 * dpo + 1.0 * nll", {})
    assert loss(compat.DPOConfig(loss_type=["ipo", "sft"], loss_weights=[0.5, 0])) == ("0.5 * ipo", {})
    assert loss(compat.DPOConfig(ld_alpha=0.2)) == ("ld_dpo", {"alpha": 0.2})
    assert loss(compat.DPOConfig(loss_type="discopop", discopop_tau=0.1)) == ("discopop", {"tau": 0.1})
    divergence = {"divergence": "alpha_divergence", "divergence_alpha": 0.3}
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    assert loss(compat.DPOConfig(**alpha)) == ("dpo", divergence)
    assert loss(compat.CPOConfig(loss_type="simpo", simpo_gamma=1.5, cpo_alpha=0)) == ("simpo", {"gamma": 1.5})
    assert loss(compat.CPOConfig(cpo_alpha=0.5)) == ("cpo + 0.5 * nll", {"alpha": 0.0})
