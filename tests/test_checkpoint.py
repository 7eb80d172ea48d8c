"""Checkpoints: transformers reads ours and we read its; every broken folder is refused by name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import CASES, SMALL, packed_logits

from srlm_fast.checkpoint import load_model, load_weights, read_config, save_weights, weights_id
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.model_files import write_folder

IDS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
SHARDED = 60_000


def make_model(case: str = "gqa", **changes) -> Llama:
    model = Llama(LlamaConfig(**{**SMALL, **CASES[case], **changes})).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(torch.arange(len(p)) / 100)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_weights(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_weights(make_model(), tmp_path / "sharded", max_shard_bytes=SHARDED)
    return tmp_path / "sharded"


def assert_same_weights(ours: Llama, expected: Llama, dtype=torch.float32):
    found, wanted = dict(ours.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name].to(dtype).to(found[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5 << 30, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("case", ["gqa", "tied", "llama3_rope", "wide_head"])
def test_transformers_reads_what_we_write(tmp_path, case, max_shard_bytes, dtype):
    from transformers import LlamaForCausalLM

    model = make_model(case)
    save_weights(model, tmp_path / "m", dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 3) == (max_shard_bytes == SHARDED)
    assert (tmp_path / "m/model.safetensors.index.json").exists() == (len(files) > 1)
    assert max(file.stat().st_size for file in (tmp_path / "m").iterdir()) < max_shard_bytes + 10_000

    peer, report = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype="auto", output_loading_info=True)
    assert peer.dtype == dtype and not any(
        report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    ours = load_model(tmp_path / "m")
    assert_same_weights(ours, model, dtype)
    with torch.no_grad():
        expected = peer.float()(torch.tensor([IDS])).logits[0]
        assert expected.abs().max() > 1
        torch.testing.assert_close(packed_logits(ours, [IDS])[0], expected, atol=1e-4, rtol=0)
        if dtype == torch.float32:
            torch.testing.assert_close(packed_logits(model, [IDS])[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("case", ["gqa", "tied", "llama3_rope"])
def test_we_read_what_transformers_writes(tmp_path, case, max_shard_size):
    import transformers

    model = make_model(case)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    peer.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same_weights(load_model(tmp_path), model)
    assert read_config(tmp_path).rope_scaling == model.config.rope_scaling


def test_load_model_casts_and_keeps_the_rotary_table_exact(folder):
    model, expected = load_model(folder, dtype=torch.bfloat16, dropout=0.1), make_model()
    assert not model.training and model.model.layers[0].dropout == 0.1
    assert_same_weights(model, expected, torch.bfloat16)
    assert torch.equal(model.inv_freq, expected.inv_freq)


def test_mixed_dtypes_are_kept(tmp_path):
    model = make_model(hidden_size=63, intermediate_size=33).bfloat16()
    model.model.norm.float()
    save_weights(model, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    for name, p in model.named_parameters():
        assert stored[name].dtype == p.dtype and torch.equal(stored[name], p)


def test_weights_id_is_of_the_content(tmp_path, folder, sharded):
    expected = weights_id(folder)
    assert weights_id(sharded) == expected and len(expected) == 64
    moved = shutil.copytree(folder, tmp_path / "moved")
    os.utime(moved / "model.safetensors", (1, 1))
    assert weights_id(moved) == expected

    def altered(name: str, **changes) -> str:
        model = make_model(**changes)
        with torch.no_grad():
            if name == "one bit":
                weight = model.model.layers[1].mlp.up_proj.weight.view(torch.int32)
                weight[3, 5] ^= 1
            if name == "two swapped":
                a, b = (layer.self_attn.q_proj.weight for layer in model.model.layers[:2])
                a.data, b.data = b.data, a.data
        save_weights(model, tmp_path / name, dtype=torch.bfloat16 if name == "dtype" else None)
        return weights_id(tmp_path / name)

    assert altered("nothing", bos_token_id=0) == expected
    ids = [altered("one bit"), altered("two swapped"), altered("dtype"), altered("theta", rope_theta=5e5)]
    assert len({expected, *ids}) == 5


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    save_weights(make_model("tied"), tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    expected = weights_id(tmp_path / "m")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    model = load_model(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight and weights_id(tmp_path / "m") == expected
    assert_same_weights(model, make_model("tied"))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(tmp_path / "m")


def test_rotary_tables_of_old_files_are_ignored(folder):
    file = folder / "model.safetensors"
    expected = weights_id(folder)
    tensors = {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors, file)
    assert_same_weights(load_model(folder), make_model())
    assert weights_id(folder) == expected


# ------------------------------------------------------------------------------------------------------------ refusals


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"tensor {UP} is missing \(1 in all\)"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing .*tie_word_embeddings"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[UP].clone()}), r"layers.3.mlp.* does not belong"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(97)}), "lm_head.bias does not belong"),
        (lambda t: t.update({UP: t[UP].T.contiguous()}), rf"{UP} has shape \[64, 112\], the model wants \[112, 64\]"),
        (lambda t: t.update({UP: t[UP].flatten()}), rf"{UP} has shape \[7168\]"),
        (lambda t: t.update({NORM: t[NORM][:63].clone()}), rf"{NORM} has shape \[63\], the model wants \[64\]"),
        (lambda t: t.update({UP: t[UP].to(torch.int32)}), rf"{UP} is of dtype I32"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), rf"{UP} is of dtype F8_E4M3"),
    ],
    ids=["missing", "headless", "extra layer", "extra", "transposed", "flat", "short", "integer", "float8"],
)
def test_wrong_tensors_are_refused_before_anything_is_changed(folder, change, message):
    edit_tensors(folder, change)
    model = make_model("mha", num_key_value_heads=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        load_weights(model, folder)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(UserError, match=message):
        weights_id(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_files_are_refused(folder, sharded, keep):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    for file in (folder / "model.safetensors", shard):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UserError, match=f"{file}: cannot be read as safetensors, truncated or damaged"):
            load_model(file.parent)


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/passwd", "a/../../x", "sub/x.safetensors", "..", "", "..\\x"]
)
def test_an_index_that_points_outside_its_folder_is_refused(sharded, place):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "x.safetensors")
    edit_json(sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({UP: place}))
    with pytest.raises(UserError, match=f"tensor {UP} lies in .*not a file of this folder"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({UP: "model-9.safetensors"}), rf"model-9.safetensors: file is missing.*{UP}"),
        (
            lambda i: i["weight_map"].update({"lm_head.bias": i["weight_map"][UP]}),
            "tensor lm_head.bias is missing, though",
        ),
        (lambda i: i["weight_map"].pop(UP), f"holds tensor {UP}, which .*index.json does not place there"),
        (lambda i: i["weight_map"].update({UP: i["weight_map"]["model.embed_tokens.weight"]}), f"holds tensor {UP}"),
        (lambda i: i.update(weight_map={}), "weight_map is not a table"),
        (lambda i: i.update(weight_map={"a": 1}), "weight_map is not a table"),
        (lambda i: i.pop("weight_map"), "weight_map is not a table"),
    ],
    ids=["absent file", "absent tensor", "unlisted", "elsewhere", "empty", "number", "none"],
)
def test_an_index_that_is_wrong_is_refused(sharded, change, message):
    edit_json(sharded / "model.safetensors.index.json", change)
    with pytest.raises(UserError, match=message):
        load_model(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="gpt2"), "model_type is 'gpt2'"),
        (lambda c: c.clear(), "model_type is None"),
        (lambda c: c.pop("hidden_size"), "hidden_size must be a positive integer"),
        (lambda c: c.update(num_hidden_layers="3"), "num_hidden_layers must be a positive integer"),
        (lambda c: c.update(num_key_value_heads="2"), "wrong type"),
        (lambda c: c.update(rope_scaling=[1]), "wrong type"),
    ],
)
def test_a_config_that_is_no_llama_is_refused(folder, change, message):
    edit_json(folder / "config.json", change)
    with pytest.raises(UserError, match=message) as caught:
        read_config(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_and_unreadable_paths_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere/config.json: No such file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere does not exist or is no folder"):
        load_weights(make_model(), tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors and no model.safetensors.index.json"):
        load_model(folder)
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load_model(folder)
    for content in (b"{", b"[]", b"\xff"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="config.json is not"):
            read_config(folder)


@pytest.fixture
def nobody():
    """Permissions mean nothing to root, so a test about them becomes somebody else for its time."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_files_without_permission_are_refused_by_path(folder, nobody):
    if os.getuid() != 0:
        (folder / "config.json").chmod(0)
        folder.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot read .*config.json: Permission denied"):
            read_config(folder)
        with pytest.raises(UserError, match="cannot write model folder .*/new: Permission denied"):
            save_weights(make_model(), folder.parent / "new")
    finally:
        if os.getuid() != 0:
            folder.parent.chmod(0o700)


# ------------------------------------------------------------------------------------------------------ atomic writing


def test_a_full_disk_leaves_nothing_behind(tmp_path, folder):
    expected = weights_id(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make_model("mha")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        for target in (tmp_path / "new", folder):
            with pytest.raises(UserError, match=f"cannot write model folder {target}: File too large"):
                save_weights(model, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert weights_id(folder) == expected


def test_writing_holds_two_tensors_at_most(tmp_path):
    specs = [(f"t{i}", (1000,), torch.float32) for i in range(9)]
    alive: list[weakref.ref] = []

    def tensors():
        for i, _ in enumerate(specs):
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = torch.full((1000,), float(i))
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    write_folder(tmp_path / "m", make_model().config, specs, tensors(), max_shard_bytes=8000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert [list(load_file(file)) for file in files] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["t6", "t7"], ["t8"]]
    assert all((tensor == int(name[1:])).all() for file in files for name, tensor in load_file(file).items())


def test_files_that_read_back_wrong_are_refused(tmp_path, folder, monkeypatch):
    """A disk that keeps another byte than it was given."""
    expected, sync = weights_id(folder), os.fsync

    def broken_sync(descriptor):
        sync(descriptor)
        if "model-00002-of" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.pwrite(descriptor, b"?", 5000)

    monkeypatch.setattr("srlm_fast.model_files.os.fsync", broken_sync)
    with pytest.raises(UserError, match="model-00002-of-.*safetensors: reads back other bytes than were written"):
        save_weights(make_model(), folder, max_shard_bytes=SHARDED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and weights_id(folder) == expected


def test_digests_are_those_of_sha256sum(sharded):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=sharded, check=True, capture_output=True)
    listed = {line.split("  ")[1] for line in (sharded / "SHA256SUMS").read_text().splitlines()}
    assert listed == {file.name for file in sharded.iterdir()} - {"SHA256SUMS"}


def test_an_exception_on_the_way_leaves_nothing_behind(tmp_path, folder):
    expected = weights_id(folder)
    with pytest.raises(UserError, match="cannot write model folder .*No such file.*absent"):
        save_weights(make_model("mha"), folder, extra_files=[tmp_path / "absent"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"] and weights_id(folder) == expected


def test_a_model_is_replaced_as_a_whole(tmp_path, folder, sharded, spm_folder):
    from srlm_fast.tokenizer import load_tokenizer

    target = tmp_path / "target"
    target.mkdir()
    save_weights(make_model(), target, max_shard_bytes=SHARDED)
    files = load_tokenizer(spm_folder / "tokenizer.model").files
    (tmp_path / ".target.tmp").mkdir()
    (tmp_path / ".target.tmp/half").write_text("left by a killed process")
    save_weights(make_model("tied"), target, extra_files=files)
    assert sorted(entry.name for entry in target.iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(target).vocab_size == 600
    assert_same_weights(load_model(target), make_model("tied"))
    assert not list(tmp_path.glob(".*"))


def test_a_replacement_killed_between_its_renames_is_not_lost(tmp_path, folder):
    expected = weights_id(folder)
    folder.rename(tmp_path / ".model.old")
    with pytest.raises(UserError):
        save_weights(make_model("mha"), folder, extra_files=[tmp_path / "absent"])
    assert weights_id(folder) == expected


def test_what_is_no_model_is_not_replaced(tmp_path, folder):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (folder / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    for name in ("notes", "file", "model", "link"):
        with pytest.raises(UserError, match=f"cannot write model folder .*{name}: it (holds other|exists and)"):
            save_weights(make_model(), tmp_path / name)
    assert (tmp_path / "notes/thesis.tex").exists() and (folder / "config.json").exists()


# ------------------------------------------------------------------------------------------------------------- sharded


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["gqa", "tied"])
def test_two_ranks_load_and_save_the_same_bytes(tmp_path, case):
    model = make_model(case, vocab_size=97)
    save_weights(model, tmp_path / "in", max_shard_bytes=SHARDED)
    save_weights(model, tmp_path / "expected/same", max_shard_bytes=40_000)
    save_weights(model, tmp_path / "expected/bf16", dtype=torch.bfloat16)
    (tmp_path / "out").mkdir()
    script = Path(__file__).with_name("checkpoint_case.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("same", "bf16"):
        expected = {file.name: file.read_bytes() for file in (tmp_path / "expected" / name).iterdir()}
        assert {file.name: file.read_bytes() for file in (tmp_path / "out" / name).iterdir()} == expected
    refusals = [(tmp_path / f"out/refused-{rank}").read_text() for rank in (0, 1)]
    assert refusals[0] == refusals[1] and "cannot write model folder" in refusals[0]
    refusals = [(tmp_path / f"out/full-{rank}").read_text() for rank in (0, 1)]
    assert refusals[0] == refusals[1] == f"cannot write model folder {tmp_path / 'out/same'}: File too large"
    assert not list((tmp_path / "out").glob(".*"))
