"""Load and save a sharded model, for test_checkpoint.py:

torchrun --nproc-per-node 2 tests/checkpoint_case.py FOLDER OUT
"""

import resource
import sys
from pathlib import Path

import torch

from srlm_fast import checkpoint
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.parallel import World, shard


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = World()
    with torch.device("meta"):
        model = Llama(checkpoint.read_config(folder))
    model = shard(model, world).to_empty(device="cpu")
    # A forward leaves the root's parameters gathered; what is loaded then must not be lost with them.
    ids = torch.arange(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.reset_buffers()
        assert not model(ids, ids, lambda layer, q, k, v: q).any()
    checkpoint.load_weights(model, folder)
    whole = dict(checkpoint.load_model(folder).named_parameters())
    n_local = n_whole = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), whole.pop(name)), name
        n_local, n_whole = n_local + parameter.to_local().numel(), n_whole + parameter.numel()
    assert not whole and n_local < 0.6 * n_whole

    checkpoint.save_weights(model, out / "same", max_shard_bytes=40_000)
    checkpoint.save_weights(model, out / "bf16", dtype=torch.bfloat16)
    (out / "file").touch()
    try:
        checkpoint.save_weights(model, out / "file" / "m")
    except UserError as error:
        (out / f"refused-{world.rank}").write_text(str(error))
    if world.rank == 1:  # which has the second of the files
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    try:
        checkpoint.save_weights(model, out / "same", max_shard_bytes=40_000)
    except UserError as error:
        (out / f"full-{world.rank}").write_text(str(error))
    world.exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
