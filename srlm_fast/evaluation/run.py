"""What all tasks of an evaluation share: processes, run folder, models, the one engine, and who writes judgements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from srlm_fast import checkpoint
from srlm_fast.chat import ChatFormat, chat_format
from srlm_fast.claims import make_shards, shard_files
from srlm_fast.config.evaluate import EvaluateRunConfig
from srlm_fast.data import as_messages, read_rows
from srlm_fast.endpoint import EndpointJudge, EndpointWriter
from srlm_fast.engine import load_engine
from srlm_fast.engine.base import Engine, Request
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.parallel import World
from srlm_fast.rollout import Judge, Scorer
from srlm_fast.rundir import RunDir
from srlm_fast.stop import Stop
from srlm_fast.tokenizer import check_vocab, load_tokenizer


@dataclass(frozen=True)
class Speaker:
    """A model that can be talked to."""

    path: Path  # its folder
    chat: ChatFormat
    max_seq_len: int  # tokens of prompt and answer together


class Writer(Protocol):
    """Who writes judgements of any kind: a model of the engine, or one behind a server.

    Attributes:
        speaker: the model of the engine; None for a server.
    """

    speaker: Speaker | None

    def write_each(self, prompts: Iterable[tuple[Any, str, int]]) -> Iterator[tuple[Any, str | None]]:
        """(key, text) of (key, prompt, seed), as they finish; None for a prompt that is too long."""


def name_of(path: str | Path) -> str:
    """What the results call a model where nothing else is said: its folder's or file's name."""
    return Path(os.path.abspath(path)).name


class Evaluation:
    """An evaluation in memory, the same on every rank; the judge and both models are read when they are needed."""

    def __init__(self, config: EvaluateRunConfig, world: World, run_dir: RunDir, stopping: Stop) -> None:
        self.config, self.world, self.run_dir, self.stopping = config, world, run_dir, stopping
        self._engine: Engine | None = None
        self._loaded: Path | None = None
        world.form_groups(config.engine.tensor_parallel)

    def main(self, function: Callable[[], Any]) -> Any:
        """Run on rank 0 and give every rank its result, or the same UserError."""
        return self.world.on_main(function)

    def check_stop(self) -> None:
        """Raise `Interrupted` when it is time to stop; ranks that generate together stop together."""
        if self.world.any_in_group(bool(self.stopping)):
            raise Interrupted("stopped; the same command goes on from here")

    def shards(
        self,
        name: str,
        rows: Sequence[Any],
        work: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
        speaker: Speaker | None = None,
    ) -> list[dict[str, Any]]:
        """What `srlm_fast.claims.make_shards` makes of the rows, in their order, on every rank.

        speaker: whom `work` has the engine speak for; it is loaded by all ranks, if there is anything to do.
        """
        files = shard_files(self, name, len(rows), self.config.shard_size)
        if speaker is not None and not self.main(lambda: all(file.exists() for file in files)):
            self.engine(speaker)
        make_shards(self, name, rows, work, self.config.shard_size)
        return [row for file in files for _, row in read_rows(file)]

    def speaker(self, path: str | Path, chat: str, name: str) -> Speaker:
        """The model in a folder.

        Args:
            path: the folder.
            chat: its chat format.
            name: the key that named it, for messages.

        Raises:
            UserError: when it is no model folder, or its tokenizer does not fit.
        """
        if not Path(path).is_dir():
            raise UserError(f"{name}: {path} is no folder of a model")
        llama = checkpoint.read_config(path)
        tokenizer = load_tokenizer(path)
        check_vocab(tokenizer, llama.vocab_size)
        limit = min(self.config.max_seq_len, llama.max_position_embeddings)
        return Speaker(Path(path), chat_format(chat, tokenizer), limit)

    def model(self) -> Speaker:
        """The model of the key `model`."""
        return self.speaker(self.config.model, self.config.chat_format, "model")

    def engine(self, speaker: Speaker) -> Engine:
        """The one engine of this process, with the weights of this model; ranks that generate together call this."""
        if self._engine is None:
            options = self.config.engine
            arguments: dict[str, Any] = {"max_batch": options.max_batch, "device": self.world.device}
            if options.name == "vllm":
                names = ("tensor_parallel", "kv_cache_gib", "dtype", "enforce_eager")
                arguments |= {name: getattr(options, name) for name in names}
                arguments["max_len"] = self.config.max_seq_len
            self._engine = load_engine(options.name, **arguments)
        if self._loaded != speaker.path:
            self._engine.load(speaker.path)
            self._loaded = speaker.path
        return self._engine

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()

    # ------------------------------------------------------------------------------------------------------- the judge

    @property
    def judge_name(self) -> str:
        """What the results call the judge."""
        judge = self.config.judge
        return str(judge.endpoint_model) if judge.endpoint else name_of(judge.path or self.config.model)

    def judging_model(self) -> Speaker | None:
        """The model of judge.path, or the evaluated one; None with judge.endpoint."""
        judge, name = self.config.judge, "judge.path" if self.config.judge.path else "model"
        if judge.endpoint:
            if self.world.group_size > 1:  # each rank of a group would ask
                raise UserError(
                    "judge.endpoint with engine.tensor_parallel > 1: answer first (task=answers), then have the files "
                    "of answers judged without it"
                )
            return None
        if not judge.path and (not self.config.model or Path(self.config.model).is_file()):
            raise UserError("there is no model to judge: name one, judge.path=FOLDER, or a server, judge.endpoint=URL")
        return self.speaker(judge.path or self.config.model, judge.chat_format or self.config.chat_format, name)

    def scorer(self) -> tuple[Scorer, Speaker | None]:
        """Who scores single answers, and the model of the engine that does it."""
        speaker = self.judging_model()
        if speaker is None:
            return EndpointJudge(self.config.judge), None
        return Judge(speaker.chat, self.config.judge, speaker.max_seq_len), speaker

    def writer(self) -> Writer:
        """Who writes verdicts and ratings."""
        speaker, options = self.judging_model(), self.config.judge
        if speaker is None:
            return EndpointWriter(options, temperature=options.verdict_temperature)
        return _EngineWriter(self, speaker)


class Idle:
    """The engine beside a judge that needs none."""

    def stream(self) -> Iterator[Any]:
        return iter(())


class _EngineWriter:
    """The judging model, loaded when it is first asked."""

    def __init__(self, run: Evaluation, speaker: Speaker) -> None:
        self.run, self.speaker, self.options = run, speaker, run.config.judge

    def write_each(self, prompts: Iterable[tuple[Any, str, int]]) -> Iterator[tuple[Any, str | None]]:
        engine, chat = self.run.engine(self.speaker), self.speaker.chat
        for key, prompt, seed in prompts:
            ids = chat.encode_prompt(as_messages(prompt))
            if len(ids) + self.options.max_new_tokens > self.speaker.max_seq_len:
                yield key, None
                continue
            request = Request(
                prompt_ids=ids,
                temperature=self.options.verdict_temperature,
                top_p=self.options.top_p,
                max_new_tokens=self.options.max_new_tokens,
                seed=seed,
                stop_ids=chat.stop_ids,
                metadata=key,
            )
            engine.submit([request])
        for completion in engine.stream():
            yield completion.request.metadata, chat.decode(completion.token_ids)
