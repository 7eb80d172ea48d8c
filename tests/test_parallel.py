"""Ranks and what they share; checkpointing, compilation and sharding against the model as it is."""

import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from sharded_case import UNEVEN, make_model, train

from srlm_fast.checkpoint import save_weights
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.parallel import World, compute_dtype, mesh_shape, parallelize

CLAIM = """
from srlm_fast.parallel import World
worlds = [World(), World()]
for world in worlds:
    taken = []
    for number in world.claims():
        if number >= 20:
            break
        taken.append(number)
    assert sorted(sum(world.gather(taken), [])) == list(range(20)), taken
world.exit(0)
"""

GROUPS = """
from srlm_fast.parallel import World
world = World()
world.form_groups(2)
assert (world.group, world.n_groups, world.leads_group) == (world.rank // 2, 2, world.rank % 2 == 0)
assert world.broadcast_in_group(world.rank) == world.rank // 2 * 2
assert [world.any_in_group(world.rank == rank) for rank in range(4)] == [rank // 2 == world.group for rank in range(4)]
taken = []
for number in world.claims():
    if number >= 20:
        break
    taken.append(number)
everyone = world.gather(taken)
assert everyone[0] == everyone[1] and everyone[2] == everyone[3], everyone
assert sorted(everyone[0] + everyone[2]) == list(range(20)), everyone
world.exit(0)
"""


def test_claims_start_anew_with_every_call():
    world = World()
    assert list(islice(world.claims(), 3)) == [0, 1, 2]
    assert list(islice(world.claims(), 2)) == [0, 1]


@pytest.mark.distributed
@pytest.mark.parametrize(("script", "n_ranks"), [(CLAIM, 2), (GROUPS, 4)], ids=["ranks", "groups"])
def test_every_number_is_claimed_once(tmp_path, script, n_ranks):
    file = tmp_path / "claim.py"
    file.write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    done = subprocess.run([*launcher, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models to be loaded by tests/sharded_case.py."""
    folder = tmp_path_factory.mktemp("models")

    def save(name: str, dtype: torch.dtype, max_shard_bytes: int, **changes) -> None:
        model = Llama(replace(UNEVEN, **changes))
        model.init_weights(torch.Generator().manual_seed(1))
        save_weights(model, folder / name, dtype=dtype, max_shard_bytes=max_shard_bytes)

    save("untied", torch.float32, 9000)
    save("tied", torch.float32, 5 << 30, tie_word_embeddings=True)
    save("bf16", torch.bfloat16, 9000)
    save("wide", torch.bfloat16, 30 << 20, vocab_size=8000, hidden_size=1024, intermediate_size=2816)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict:
    return train("plain", None)


def run(n_ranks: int, folder: Path, out: Path, *cases: str) -> dict:
    """What tests/sharded_case.py finds; n_ranks=1 is without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    script = str(Path(__file__).with_name("sharded_case.py"))
    command = [sys.executable, *launcher, script, str(folder), str(out), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "result.pt", weights_only=True)


def assert_same(found: dict, wanted: dict, tolerance: float) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=tolerance, rtol=0, msg=name)


def test_training_moves_the_weights_far_beyond_the_tolerance(expected):
    start = dict(make_model().named_parameters())
    assert all((expected["weights"][name] - start[name]).abs().max() > 1e-3 for name in start)


@pytest.mark.parametrize("dropout", ["", "dropout "])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_changes_nothing(policy, dropout):
    assert_same(train(f"{dropout}{policy}", None), train(f"{dropout}plain", None), 0.0)


def test_recomputation_keeps_less():
    """Bytes that autograd keeps of one block, by policy, for 64 tokens."""

    def kept(policy: str) -> int:
        model, sizes = parallelize(make_model(), World(), ParallelConfig(checkpointing=policy)), {}
        weights = {p.data_ptr() for p in model.parameters()}
        block, x = model.model.layers[0], torch.randn(64, UNEVEN.hidden_size, requires_grad=True)
        cos = sin = torch.ones(64, UNEVEN.head_dim // 2)

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = block(x, torch.randn_like(x), cos, sin, lambda layer, q, k, v: q * 2)
        assert len(outputs) == 2
        return sum(sizes.values())

    everything, block_input = kept("none"), 64 * UNEVEN.hidden_size * 4
    assert kept("full") <= 2 * block_input < 0.2 * everything


@pytest.mark.distributed
def test_one_process_computes_in_bf16_too(folder, tmp_path, expected):
    found = run(1, folder, tmp_path, "plain", "bf16, full")
    assert_same(found["plain"], expected, 0.0)
    assert found["bf16, full"]["losses"] == pytest.approx(expected["losses"], abs=0.01)
    assert all(weight.dtype == torch.float32 for weight in found["bf16, full"]["weights"].values())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_load_and_train_the_same(folder, tmp_path, expected):
    cases = ["plain", "full", "selective", "microbatch", "never", "compiled, selective", "bf16"]
    dropped = ["dropout plain", "dropout full", "dropout selective"]
    found = run(2, folder, tmp_path, *cases, *dropped)
    for case in cases[:-1]:
        assert_same(found[case], expected, 1e-5)
    assert found["bf16"]["losses"] == pytest.approx(expected["losses"], abs=0.01)
    assert found["bf16"]["losses"] != found["plain"]["losses"]
    for case in dropped[1:]:
        assert_same(found[case], found[dropped[0]], 0.0)
    assert found[dropped[0]]["losses"] != found["plain"]["losses"]


@pytest.mark.slow
@pytest.mark.distributed
def test_four_ranks_load_and_train_the_same(folder, tmp_path, expected):
    found = run(4, folder, tmp_path, "plain", "node", "hsdp", "hsdp, microbatch", "hsdp, moments")
    for case in found.keys() - {"hsdp, moments"}:
        assert_same(found[case], expected, 1e-5)


def test_the_mesh_is_made_of_all_processes():
    assert mesh_shape(8, ParallelConfig()) == (1, 8)
    assert mesh_shape(8, ParallelConfig(replicate=2)) == (2, 4)
    assert mesh_shape(8, ParallelConfig(replicate=4, shard=2)) == (4, 2)
    for wrong in ({"shard": 3}, {"replicate": 3}, {"replicate": 16}, {"replicate": 2, "shard": 8}):
        with pytest.raises(UserError, match=r"parallel.replicate=.* does not fit 8 processes.*--nproc-per-node"):
            mesh_shape(8, ParallelConfig(**wrong))


def test_computation_is_in_bf16_on_gpus_and_in_fp32_on_cpus():
    for device, name, dtype in (
        ("cpu", "auto", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cuda", "float32", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
    ):
        assert compute_dtype(torch.device(device), ParallelConfig(dtype=name)) == dtype
