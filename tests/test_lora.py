"""Adapters: against PEFT on a model of transformers, in files, merged, recomputed, sharded, in a run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lora_case
import peft
import pytest
import torch
from lora_case import LORA, SHAPE, make_base, train
from safetensors.torch import load_file
from training_case import make_items, options
from transformers import LlamaForCausalLM

from srlm_fast import checkpoint
from srlm_fast.adapters import load_adapters, merge_folders, read_adapters, save_adapters
from srlm_fast.config import LoraConfig
from srlm_fast.engine.kv_cache import PromptAttention
from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.lora import TARGETS, add_adapters, is_adapter, merge
from srlm_fast.trainer import Trainer, reference_cache
from srlm_fast.trainer.machine import model_cost

IDS = torch.randint(67, (20,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "base"
    checkpoint.save_weights(make_base(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(base) -> dict:
    """After five steps in one process."""
    return train(base, "plain")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, (LlamaForCausalLM, peft.PeftModel)):
            return model(input_ids=IDS[None]).logits[0]
        return model.eval()(IDS, torch.arange(len(IDS)), PromptAttention([len(IDS)]))


def of_transformers(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=["fused", "reference"])
def kernels(request):
    with library.using(request.param):
        yield


def test_fresh_adapters_change_no_bit(base, kernels):
    expected = logits(checkpoint.load_model(base))
    model = add_adapters(checkpoint.load_model(base), LoraConfig(rank=3), seed=1)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B.weight.fill_(0.1)
    assert (logits(model) - expected).abs().max() > 1e-2
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * SHAPE.num_hidden_layers and all(map(is_adapter, names))


def dpo_by_peft(folder: Path, ours, items, config) -> tuple[list[float], dict]:
    """The same training by PEFT on transformers' model, with torch's AdamW and the loss written out."""
    hf = of_transformers(folder)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf, settings)
    parameters = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if is_adapter(name):
                parameters[name].copy_(p)

    def logp(item, response) -> torch.Tensor:
        ids = torch.tensor([[*item.prompt, *response]])
        found = model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
        return found.gather(1, torch.tensor(response)[:, None]).sum()

    with torch.no_grad(), model.disable_adapter():
        reference = [[logp(item, response) for response in item.responses] for item in items]
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    losses = []
    for _ in range(5):
        margins = [
            logp(item, item.responses[0]) - logp(item, item.responses[1]) - r[0] + r[1]
            for item, r in zip(items, reference, strict=True)
        ]
        loss = -torch.nn.functional.logsigmoid(config.beta * torch.stack(margins)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in parameters.items()}


def test_five_dpo_steps_are_those_of_peft(base, kernels):
    items = make_items(8, 2)
    config = options("dpo", max_steps=5, epochs=5, batch_size=8, lr=1e-2, schedule="constant", max_grad_norm=0.5)
    losses: list[float] = []
    model = add_adapters(checkpoint.load_model(base), LoraConfig(**LORA), seed=1)
    expected_losses, expected = dpo_by_peft(base, model, items, config)
    reference = reference_cache(model, config, items)
    Trainer(model, items, config, reference=reference, on_step=lambda m: losses.append(m["loss"])).fit()
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=0, msg=name)


def test_adapters_load_in_peft_and_back(base, trained, tmp_path):
    model = trained["model"]
    save_adapters(model, tmp_path / "ours", base=base)
    theirs = peft.PeftModel.from_pretrained(of_transformers(base), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=0)
    assert (logits(model) - logits(checkpoint.load_model(base))).abs().max() > 0.1
    again = load_adapters(checkpoint.load_model(base), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad == is_adapter(name) for name, p in again.named_parameters())


@pytest.mark.parametrize(("rank_stable", "alpha"), [(False, 3.0), (True, 3 * 2**0.5)])
def test_adapters_of_peft_load(base, tmp_path, rank_stable, alpha):
    settings = {"r": 2, "lora_alpha": 3, "use_rslora": rank_stable, "init_lora_weights": False}
    theirs = peft.get_peft_model(
        of_transformers(base), peft.LoraConfig(**settings, target_modules=["v_proj", "q_proj"])
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(checkpoint.load_model(base), tmp_path / "theirs")
    assert ours.lora == LoraConfig(rank=2, alpha=alpha, targets=("q_proj", "v_proj"))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)


def test_merged_models_compute_the_same_everywhere(base, trained, tmp_path):
    """Merged in memory or by way of files: the same bits, and the logits of the model with adapters."""
    save_adapters(trained["model"], tmp_path / "adapter", base=base)
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged", max_shard_bytes=9000)
    found = checkpoint.load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(found), logits(trained["model"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(of_transformers(tmp_path / "merged")), logits(found), atol=1e-4, rtol=0)
    in_memory = merge(load_adapters(checkpoint.load_model(base), tmp_path / "adapter"))
    assert not any(is_adapter(name) for name, _ in in_memory.named_parameters())
    checkpoint.save_weights(in_memory, tmp_path / "in_memory")  # as any trained model, which vLLM is tested to load
    assert checkpoint.weights_id(tmp_path / "in_memory") == checkpoint.weights_id(tmp_path / "merged")
    assert checkpoint.weights_id(tmp_path / "merged") != checkpoint.weights_id(base)
    with torch.no_grad():
        expected = checkpoint.load_model(base, dtype=torch.float64).model.layers[1].self_attn.k_proj.weight
        pair = [trained["weights"][f"model.layers.1.self_attn.k_proj.lora_{side}.weight"].double() for side in "BA"]
        expected += 2.0 * pair[0] @ pair[1]
    merged = found.model.layers[1].self_attn.k_proj.weight
    torch.testing.assert_close(merged.detach().double(), expected, atol=1e-6, rtol=0)
    merge_folders(base, tmp_path / "adapter", tmp_path / "bf16", dtype=torch.bfloat16)
    (file,) = (tmp_path / "bf16").glob("*.safetensors")
    assert torch.equal(load_file(file)["model.layers.1.self_attn.k_proj.weight"], merged.detach().bfloat16())


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("dropout", ["", "dropout "])
def test_recomputation_changes_nothing(base, policy, dropout):
    expected, found = (train(base, f"{dropout}{name}") for name in ("plain", policy))
    assert found["losses"] == expected["losses"]
    assert all(torch.equal(found["weights"][name], value) for name, value in expected["weights"].items())


def test_selective_recomputation_keeps_the_same_products():
    """q, k and the MLP run again, with their adapters; v, o and attention do not, whatever has an adapter."""
    from srlm_fast.parallel.recomputation import _kept_products

    assert _kept_products(make_base().model.layers[0]) == {2, 3}
    with_two = add_adapters(make_base(), LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    assert _kept_products(with_two.model.layers[0]) == {3, 5}


def test_bf16_holds_the_frozen_weights_in_bf16(base, trained):
    """One process that computes in bf16: the base lies in bf16, adapters, their gradients and moments in fp32."""
    script = str(Path(lora_case.__file__))
    code = f"import sys; sys.argv = [{script!r}]; sys.path.insert(0, {str(Path(script).parent)!r})\n" + (
        "import torch, lora_case as c; from pathlib import Path\n"
        f"found = c.train(Path({str(base)!r}), 'bf16, full')\n"
        "dtypes = {(p.dtype, p.requires_grad) for p in found['model'].parameters()}\n"
        "assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}, dtypes\n"
        "print(found['losses'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == pytest.approx(trained["losses"], abs=0.03) and losses != trained["losses"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_the_same_adapters(base, trained, tmp_path):
    """Sharded, recomputed, compiled; merged by two ranks; a run that was stopped and resumed equals an undisturbed one
    to the bit, and its checkpoint has no frozen weight."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cases = ["dropout plain", "dropout selective", "bf16", "compiled, full", "never", "plain"]
    command = [*launcher, lora_case.__file__, str(base), str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    for case in ("compiled, full", "never", "plain"):
        assert found[case]["losses"] == pytest.approx(trained["losses"], abs=1e-5)
        for name, value in trained["weights"].items():
            torch.testing.assert_close(found[case]["weights"][name], value, atol=1e-5, rtol=0, msg=name)
    assert found["bf16"]["losses"] == pytest.approx(trained["losses"], abs=0.03)
    for one, other in (("dropout selective", "dropout plain"), ("resumed", "plain")):
        for name, value in found[other]["weights"].items():
            assert torch.equal(found[one]["weights"][name], value), (one, name)
    merged = checkpoint.load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained["model"]), atol=1e-3, rtol=0)
    (state,) = (tmp_path / "state").glob("step-*")
    names = torch.distributed.checkpoint.FileSystemReader(state).read_metadata().state_dict_metadata
    kept = [name for name in names if name.startswith("model.")]
    assert len(kept) == len(trained["weights"]) and all(map(is_adapter, kept))


def test_cost_counts_no_gradients_of_frozen_weights():
    model, config = make_base(), SHAPE
    full, thin = model_cost(model), model_cost(add_adapters(model, LoraConfig(rank=3, targets=("o_proj",))))
    assert thin.per_target == full.per_target * 4 / 6 and thin.per_attended == full.per_attended
    added = 3 * (config.num_attention_heads * config.head_dim + config.hidden_size)
    assert thin.per_token == pytest.approx(full.per_token * 4 / 6 + 6 * config.num_hidden_layers * added)


def test_refusals(base, trained, tmp_path):
    for targets, says in ((("q_proj", "lm_head"), "lora.targets: 'lm_head' has no adapters"), ((), "empty")):
        with pytest.raises(UserError, match=says):
            add_adapters(make_base(), LoraConfig(rank=2, targets=targets))
    with pytest.raises(UserError, match="merge them first"):
        checkpoint.save_weights(trained["model"], tmp_path / "model")
    with pytest.raises(UserError, match="has no adapters to save"):
        save_adapters(make_base(), tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter_config.json"):
        read_adapters(tmp_path)
    save_adapters(trained["model"], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for changes, says in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ".*proj"}, "is a pattern"),
        ({"r": None}, "r or lora_alpha"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules=\['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"a_new_method": {"on": 1}}, "a_new_method="),
        ({"target_modules": ["q_proj"]}, "does not belong to this model"),
        ({"r": 2}, "has another shape"),
    ):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=says):
            merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    checkpoint.save_weights(type(make_base())(replace(SHAPE, num_hidden_layers=3)), tmp_path / "deeper")
    with pytest.raises(UserError, match=r"adapter tensor model.layers.2.* is missing \(14 in all\)"):
        merge_folders(tmp_path / "deeper", tmp_path / "adapter", tmp_path / "merged")
