"""The end of a job that goes wrong: the first rank that fails says why, once, and all others end too.

What the ranks know of each other here goes through torchrun's store and a thread of its own, so a rank learns of a
failure while its main thread waits in a collective that will never come back.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from srlm_fast.errors import UserError
from srlm_fast.parallel.world import World

POLL_S = 1.0
GRACE_S = 6.0
"""How long a rank may take to notice a failure elsewhere by itself; torchrun kills those of its node meanwhile."""
SILENT_POLLS = 300
"""Polls in a row without a sign of life after which a rank counts as gone. Polls, not seconds: a job may be frozen."""


class Watch:
    """Tells the other ranks of a failure, and ends this one when another has failed.

    Args:
        world: several ranks, after `init_process_group`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"srlm/watch/{restart}", _connect())
        self._thread_store = dist.PrefixStore(f"srlm/watch/{restart}", _connect())
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def say_once(self, text: str) -> None:
        """Prints a line that several ranks have to say, on the first of them."""
        try:
            first = self._store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # the store has gone with the node that held it
            first = True
        if first:
            print(text, file=sys.stderr, flush=True)

    def failed(self) -> dict | None:
        """What the first rank that failed said: {"rank", "code", "text"}; None as long as none has."""
        return _first_failure(self._store)

    def stop(self) -> None:
        """Look no more: this rank is done, and whether others are is their business."""
        self._ended.set()

    def fail(self, error: BaseException, code: int) -> NoReturn:
        """Ends this rank because of an error.

        The first to fail says what it was: a `UserError` in one line, another error with its traceback. What follows
        from it on other ranks (a lost connection, a stop, the same error again) is not said.
        """
        self.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        lost = _lost_contact(error)
        if lost:
            text = f"rank {self.world.rank} lost another rank, which has said nothing: {_short(error)}"
            time.sleep(POLL_S)  # it may be about to say what happened
        elif isinstance(error, UserError):
            text = f"error: {error}"
        else:
            text = "".join(traceback.format_exception(error)).rstrip()
            text = f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()} failed:\n{text}"
        mine = {"rank": self.world.rank, "code": code, "text": text}
        first = _declare(self._store, mine)
        if first == mine:
            print(text, file=sys.stderr, flush=True)
            if not lost:
                _record(text)
        elif isinstance(error, UserError):
            self.say_once(text) if text != first["text"] else None
        elif not lost and _last_line(text) != _last_line(first["text"]):
            print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if first != mine or lost:
            time.sleep(GRACE_S / 2)  # torchrun ends this rank; its report then names the one that failed
        os._exit(first["code"])

    def _look(self) -> None:
        """Ends the process some time after another rank has failed. Runs in a thread."""
        beats = {rank: (0, 0) for rank in range(1, self.world.size)} if self.world.is_main else {}
        try:
            while not self._ended.wait(POLL_S):
                self._thread_store.add(f"beat/{self.world.rank}", 1)
                for rank in self._silent(beats):
                    text = f"error: nothing was heard of rank {rank} for {SILENT_POLLS * POLL_S:g} s"
                    if _declare(self._thread_store, {"rank": rank, "code": 1, "text": text})["text"] == text:
                        print(text, file=sys.stderr, flush=True)
                found = _first_failure(self._thread_store)
                if found is not None and not self._ended.wait(GRACE_S):
                    os._exit(found["code"])
            self._thread_store.set(f"left/{self.world.rank}", "1")
        except RuntimeError:  # no store: the agent that held it, or rank 0, which may have finished, is gone
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not self._ended.wait(GRACE_S):
                print(f"error: rank {self.world.rank} lost torchrun's agent", file=sys.stderr, flush=True)
                os._exit(1)

    def _silent(self, beats: dict[int, tuple[int, int]]) -> list[int]:
        """Ranks that gave no sign for too long; brings `beats`, rank -> (beat, polls without another), up to date."""
        silent = []
        for rank, (last, polls) in list(beats.items()):
            beat = self._thread_store.add(f"beat/{rank}", 0)
            polls = polls + 1 if beat == last else 0
            beats[rank] = beat, polls
            if polls >= SILENT_POLLS:
                if self._thread_store.check([f"left/{rank}"]):
                    del beats[rank]
                else:
                    silent.append(rank)
        return silent


def _connect() -> dist.Store:
    """A client of its own of the store that the ranks met in: a wait in another does not hold it up."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


def _declare(store: dist.Store, failure: dict) -> dict:
    """Makes this the first failure unless there is one; the first one."""
    try:
        return json.loads(store.compare_set("failed", "", json.dumps(failure)))
    except RuntimeError:
        return failure


def _first_failure(store: dist.Store) -> dict | None:
    return json.loads(store.get("failed")) if store.check(["failed"]) else None


def _lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is not there."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". This is typically")[0]


def _last_line(text: str) -> str:
    return text.rsplit("\n", 1)[-1]


def _record(text: str) -> None:
    """Gives torchrun the text for its report of the failure."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        with open(file, "w", encoding="utf-8") as opened:
            json.dump({"message": {"message": _last_line(text), "extraInfo": details}}, opened)
    except OSError:
        pass  # the report is said already
