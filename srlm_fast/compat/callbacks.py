"""Callbacks of transformers' trainers, called by ours."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class Stopped(Exception):
    """A callback has set `control.should_training_stop`."""


class Callbacks:
    """The events that there are here: on_train_begin, on_step_end, on_log, on_evaluate, on_train_end.

    A callback gets (args, state, control, model=, processing_class=, and logs= or metrics=). Of what it may set in
    `control`, should_training_stop is heeded.

    Args:
        callbacks: `TrainerCallback`s or their classes.
        trainer: its args, state, model and processing_class are passed on.
    """

    def __init__(self, callbacks: Sequence[Any], trainer: Any) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self._trainer = trainer
        self.control = SimpleNamespace(should_training_stop=False)

    def call(self, event: str, **others: Any) -> None:
        """Call all of them, on every rank.

        Raises:
            Stopped: when training is to stop, on all ranks alike.
        """
        trainer = self._trainer
        for callback in self.callbacks:
            getattr(callback, event)(
                trainer.args,
                trainer.state,
                self.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
                **others,
            )
        stop = bool(self.callbacks) and trainer.world.any(self.control.should_training_stop)
        if stop and event != "on_train_end":
            raise Stopped
