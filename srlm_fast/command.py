"""What the commands of scripts/ have in common: read, work on every rank, say once what was wrong, end all ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from srlm_fast.errors import Interrupted, UserError

if TYPE_CHECKING:
    from srlm_fast.parallel import World

BAD_INPUT, FAILED = 2, 1
"""Exit codes of a process."""
T = TypeVar("T")


def run(read: Callable[[], T], work: Callable[[T, World], None]) -> int:
    """Runs work(read(), world) on every rank; does not come back where there are several.

    A rank that fails says why: bad input (`UserError`) in one line, which several ranks that find the same do not
    repeat, anything else with its traceback. The others then end within seconds, even those that wait in a collective.

    Args:
        read: what is wrong with the arguments, without torch.
        work: the rest.

    Returns:
        The exit code: 0 done, `BAD_INPUT`, or one of `srlm_fast.stop` after saving; with one process an unexpected
        error is raised.
    """
    config, unreadable = None, None
    try:
        config = read()
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        unreadable = error
    from srlm_fast.parallel import World
    from srlm_fast.parallel.watch import Watch
    from srlm_fast.rundir import RunDir

    world = World()
    watch = Watch(world) if world.size > 1 else None
    code = 0
    try:
        if unreadable is not None:
            raise unreadable
        work(config, world)
    except Interrupted as stopped:
        code = stopped.code
        if watch is None:
            print(stopped, file=sys.stderr)
        elif watch.failed():
            if world.is_main:
                RunDir(config.run_dir).set_state("failed")  # the run itself took it for a stop
            watch.fail(stopped, code)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks when the first has left
            watch.say_once(str(stopped))
    except UserError as error:
        code = BAD_INPUT
        if watch is not None:
            watch.fail(error, code)
        print(f"error: {error}", file=sys.stderr)
    except BaseException as error:
        if watch is None:
            raise
        watch.fail(error, FAILED)
    if watch is not None:
        watch.stop()
    world.exit(code)
    return code
