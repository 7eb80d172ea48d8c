"""Packed, prefix-shared batches against each sequence alone, and the division of a step into micro-batches."""

import math
import random

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.kernels.attention import Segments, varlen_attention
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Cost, Item, _level, epoch_order, pack, split_batch
from srlm_fast.reference import sequence_logps

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def make_model() -> Llama:
    model = Llama(CONFIG).double()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    return model


def alone(model: Llama, item: Item) -> torch.Tensor:
    """Summed log-probs of each response by one unpacked forward pass per response, logits and all."""
    sums = []
    for response in item.responses:
        ids = torch.tensor(item.prompt + response)
        segments = Segments.causal([len(ids)])
        logits = model(ids, torch.arange(len(ids)), lambda _, q, k, v, s=segments: varlen_attention(q, k, v, s))
        logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        sums.append(logps[len(item.prompt) - 1 :].sum())
    return torch.stack(sums)


def random_items(n: int, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50) for _ in range(rng.randint(low, high)))

    return [Item(ids(1, 20), tuple(ids(1, 12) for _ in range(rng.choice((1, 2, 2, 4))))) for _ in range(n)]


def test_shared_prefix_equals_separate_sequences():
    model, items = make_model(), random_items(9)
    items.append(Item((3,), ((4,), (5,))))
    packed = sequence_logps(model, pack(items))
    expected = torch.cat([alone(model, item) for item in items])
    torch.testing.assert_close(packed, expected, atol=1e-10, rtol=0)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(packed, list(model.parameters()), upstream)
    reference = torch.autograd.grad(expected, list(model.parameters()), upstream)
    for (name, _), a, b in zip(model.named_parameters(), ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=name)


def test_prompt_runs_once_and_last_tokens_are_no_inputs():
    batch = pack([Item((1, 2, 3), ((4, 5), (6, 7, 8)))])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.rows.tolist() == [2, 3, 2, 4, 5]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8]
    assert batch.lengths.tolist() == [2, 3]


@pytest.mark.parametrize("bad", [Item((), ((1,),)), Item((1,), ()), Item((1,), ((1,), ()))])
def test_empty_parts_are_refused(bad):
    with pytest.raises(UserError, match="at least one token"):
        pack([bad])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_split_covers_every_item_once_within_budget(world_size, n):
    rng = random.Random(n)
    sizes = [rng.randint(1, 100) for _ in range(n)]
    plan = split_batch(sizes, 100, world_size)
    assert all(len(per_rank) == world_size for per_rank in plan)
    flat = [i for per_rank in plan for indices in per_rank for i in indices]
    assert sorted(flat) == list(range(n))
    assert all(sum(sizes[i] for i in indices) <= 100 for per_rank in plan for indices in per_rank)
    if n >= len(plan) * world_size:
        assert all(indices for per_rank in plan for indices in per_rank), (
            "a rank idles although there are items for all"
        )


def test_ranks_get_the_same_work():
    """Log-normal pairs, long attention: how long ranks wait for the slowest, with FLOPs and with tokens as cost."""
    rng = random.Random(0)

    def ids(median: float) -> tuple[int, ...]:
        return (0,) * max(1, min(4096, int(rng.lognormvariate(math.log(median), 0.9))))

    items = [Item(ids(300), (ids(300), ids(300))) for _ in range(64)]
    sizes, cost = [item.n_tokens for item in items], Cost(per_token=1.0, per_attended=0.002)
    costs = [cost.of(item) for item in items]

    def idle(plan: list[list[list[int]]]) -> float:
        slowest = sum(max(sum(costs[i] for i in indices) for indices in per_rank) for per_rank in plan)
        return slowest * len(plan[0]) / sum(costs) - 1

    for world_size in (2, 8):
        by_cost, by_tokens = split_batch(sizes, 13000, world_size, costs), split_batch(sizes, 13000, world_size)
        assert len(by_cost) == len(by_tokens)
        assert all(sum(sizes[i] for i in indices) <= 13000 for per_rank in by_cost for indices in per_rank)
        assert idle(by_cost) < 0.03 and idle(by_cost) < idle(by_tokens)


def test_cost_of_an_item_by_hand():
    item = Item((1, 2, 3), ((4, 5), (6, 7, 8)))
    assert Cost(per_token=1.0).of(item) == 6
    assert Cost(per_token=0.0, per_attended=1.0).of(item) == (1 + 2 + 3) + 4 + (4 + 5)
    assert Cost(per_token=0.0, per_target=1.0).of(item) == 5


def test_a_tight_budget_is_kept_where_an_even_division_exceeds_it():
    sizes = [2, 5, 2, 1, 4, 3, 7, 4, 3]
    assert _level(sizes, sizes, 8, 4) is None
    plan = split_batch(sizes, 8, 2)
    assert all(sum(sizes[i] for i in indices) <= 8 for per_rank in plan for indices in per_rank)
    assert sorted(i for per_rank in plan for indices in per_rank for i in indices) == list(range(9))


def test_item_above_the_budget_is_refused_before_work():
    with pytest.raises(UserError, match="101 tokens does not fit tokens_per_microbatch=100"):
        split_batch([3, 101], 100, 1)


def test_epoch_orders_are_permutations_that_depend_on_seed_and_epoch():
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert epoch_order(20, 1, 0) == epoch_order(20, 1, 0)
