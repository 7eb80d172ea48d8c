"""Ranks and what they share; sharded training is tested in test_trainer.py."""

import subprocess
import sys
from itertools import islice

import pytest

from srlm_fast.parallel import World

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


def test_claims_start_anew_with_every_call():
    world = World()
    assert list(islice(world.claims(), 3)) == [0, 1, 2]
    assert list(islice(world.claims(), 2)) == [0, 1]


@pytest.mark.distributed
def test_every_number_is_claimed_once(tmp_path):
    script = tmp_path / "claim.py"
    script.write_text(CLAIM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
