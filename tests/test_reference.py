"""The reference cache: keyed by content, complete or refused."""

import pytest
import torch
from training_case import make_items, make_model, make_reference

from srlm_fast.errors import UserError
from srlm_fast.packing import Item
from srlm_fast.reference import ReferenceCache, compute, response_keys


def test_round_trip_and_lookup_by_content(tmp_path):
    items = make_items(6, 2)
    cache = make_reference(items)
    cache.save(tmp_path / "reference.safetensors")
    read = ReferenceCache.read(tmp_path / "reference.safetensors")
    assert read.weights_id == "weights-0" and len(read) == 12
    shuffled = items[::-1]
    expected = cache.lookup(items).view(6, 2).flip(0).flatten()
    assert torch.equal(read.lookup(shuffled), expected)


def test_values_are_the_models():
    items = make_items(3, 2)
    one_by_one = [value for i in range(3) for _, value in compute(make_model(), items, "w", [[i]])]
    torch.testing.assert_close(make_reference(items).lookup(items), torch.tensor(one_by_one), atol=1e-5, rtol=0)


def test_other_weights_or_other_tokens_are_not_found():
    items = make_items(3, 2)
    cache = make_reference(items)
    with pytest.raises(UserError, match=r"lacks 1 of 3 items \(positions 1\)"):
        cache.lookup([items[0], Item(items[1].prompt, (items[1].responses[0], (1, 2, 3))), items[2]])
    cache.weights_id = "weights-1"
    with pytest.raises(UserError, match="weights weights-1 lacks 3 of 3"):
        cache.lookup(items)


def test_keys_tell_prompt_from_response():
    assert len({*response_keys("w", Item((1, 2), ((3,),))), *response_keys("w", Item((1,), ((2, 3),)))}) == 2


@pytest.mark.parametrize("damage", ["absent", "truncated", "foreign"])
def test_broken_files_are_refused(tmp_path, damage):
    path = tmp_path / "reference.safetensors"
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    elif damage == "truncated":
        make_reference(make_items(6, 2)).save(path)
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="reference cache"):
        ReferenceCache.read(path)


def test_model_mode_is_restored():
    model = make_model(dropout=0.5).train()
    items = make_items(2, 2)
    assert compute(model, items, "w", [[0, 1]]) == compute(model, items, "w", [[0, 1]])
    assert model.training
