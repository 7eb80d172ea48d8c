"""What every phase of a run shares: configuration, ranks, run folder, tokenizer, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from srlm_fast import checkpoint, checks
from srlm_fast.chat import chat_format
from srlm_fast.claims import make_overlapping_shards, make_shards
from srlm_fast.config import GENERATORS, Config
from srlm_fast.data import Example, RankedPrompt, formats, prompts, read_rows
from srlm_fast.endpoint import EndpointJudge
from srlm_fast.engine import load_engine
from srlm_fast.engine.base import Engine
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels import library
from srlm_fast.meta_judge import MetaJudge
from srlm_fast.model import LlamaConfig
from srlm_fast.parallel import World, check_parallel
from srlm_fast.rollout import Judge
from srlm_fast.rundir import RunDir
from srlm_fast.stop import Stop
from srlm_fast.tokenizer import check_vocab, load_tokenizer


class Context:
    """A run in memory, the same on every rank.

    Raises:
        UserError: when an input is missing, unreadable or does not fit the others, before any work starts.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        library.use(config.kernels)
        self.run_dir = RunDir(config.run_dir)
        self.stopping = Stop(config.save_by)
        checks.inputs(config)
        if lacking := checks.missing(config):
            raise UserError(lacking[0])
        moments = (config.sft.moments, config.dpo.moments)
        check_parallel(world.size, config.parallel, moments, lora=config.lora.rank)
        self.llama: LlamaConfig = checkpoint.read_config(Path(config.model.path))
        checks.shape(config, self.llama)
        if not config.model.random_init:
            checkpoint.check_weights(config.model.path)
        self.tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
        check_vocab(self.tokenizer, self.llama.vocab_size)
        self.chat = chat_format(config.model.chat_format, self.tokenizer)
        self.judge = Judge(self.chat, config.judge, config.model.max_seq_len)
        # Of the candidates; the EFT targets and the measured judge are always the model's own.
        self.candidate_judge = EndpointJudge(config.judge) if config.judge.endpoint else self.judge
        self.meta_judge = MetaJudge(self.chat, config.meta_judge, config.judge, config.model.max_seq_len)
        self.tasks_template = prompts.load_template(config.prompts.shots_template)
        self.held_out = self._read_held_out()
        checks.training(config)
        checks.losses(config)
        checks.generator(config, self.llama, self.tokenizer)
        self._engine = self._make_engine()
        self._engine_weights: Path | None = None

    def _make_engine(self) -> Engine:
        """The engine, without weights, and the groups of ranks that generate together."""
        options = self.config.engine
        arguments: dict[str, Any] = {"max_batch": options.max_batch, "device": self.world.device}
        if options.name == "vllm":
            names = ("tensor_parallel", "kv_cache_gib", "dtype", "enforce_eager")
            arguments |= {name: getattr(options, name) for name in names}
            arguments["max_len"] = self.config.model.max_seq_len
        engine = load_engine(options.name, **arguments)
        self.world.form_groups(options.tensor_parallel)
        return engine

    def main(self, function: Callable[[], Any]) -> Any:
        """Run on rank 0 and give every rank its result, or the same UserError."""
        return self.world.on_main(function)

    def check_stop(self, *, together: bool = False) -> None:
        """Raise `Interrupted` when it is time to stop. Ranks that generate together stop together.

        together: all ranks call this, and all stop when one has to.
        """
        stop = bool(self.stopping)
        if together:
            stop = self.world.any(stop)
        elif self._engine_weights is not None:
            stop = self.world.any_in_group(stop)
        if stop:
            raise Interrupted("stopped; the same command goes on from here")

    def weights(self, name: str) -> Path:
        """Folder of a model: base (M0), sft, m1, m2, ..."""
        if name == "base" and not self.config.model.random_init:
            return Path(self.config.model.path)
        return self.run_dir / f"models/{name}"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a jsonl file of the run."""
        return [row for _, row in read_rows(self.run_dir / name)]

    def examples(self, name: str) -> list[Example]:
        """Prompts with responses, from a jsonl file of the run."""
        return [Example(row["id"], row["prompt"], row["response"]) for row in self.rows(name)]

    def ranked(self, name: str) -> list[RankedPrompt]:
        """Prompts with ranked replies, from a jsonl file of the run."""
        return [
            RankedPrompt(**{**row, "replies": [tuple(reply) for reply in row["replies"]]}) for row in self.rows(name)
        ]

    def generator(self, t: int) -> Path:
        """Folder of the model that writes the new prompts of iteration t."""
        name = self.config.prompts.generator
        if name not in GENERATORS:
            return Path(name)
        return self.weights(f"m{t}" if name == "current" else name)

    def _read_held_out(self) -> list[dict[str, Any]]:
        """Rows ("id", "prompt") of evaluate.prompts; none without that key."""
        path = self.config.evaluate.prompts
        if path is None:
            return []
        rows, _ = formats.load(path, kind="prompt")
        return [{"id": f"heldout-{i:05d}", "prompt": row.prompt[-1]["content"]} for i, row in enumerate(rows)]

    def engine(self, weights: Path) -> Engine:
        """The one engine of this process, with these weights loaded."""
        if self._engine_weights != weights:
            self._engine.load(weights)
            self._engine_weights = weights
        return self._engine

    def hand_over(self, model: nn.Module, weights: Path) -> None:
        """Let the engine take a trained model from memory, if it can, so that it need not read the folder."""
        if self._engine.push(model, weights):
            self._engine_weights = weights

    def sleep_engine(self) -> None:
        """Free the engine's memory before training."""
        self._engine.sleep()
        self._engine_weights = None

    def close(self) -> None:
        """End the engine, and with vllm torch.distributed too. What comes after needs no other rank."""
        self._engine.close()

    def shards(
        self, name: str, rows: Sequence[Any], work: Callable[[Sequence[Any]], Iterable[dict[str, Any]]]
    ) -> list[Path]:
        """`srlm_fast.claims.make_shards` in shards of candidates.shard_size rows."""
        return make_shards(self, name, rows, work, self.config.candidates.shard_size)

    def overlapping_shards(
        self, name: str, rows: Sequence[Any], work: Callable[[Iterator[Sequence[Any]]], Iterable[dict[str, Any]]]
    ) -> list[Path]:
        """`srlm_fast.claims.make_overlapping_shards` in shards of candidates.shard_size rows."""
        return make_overlapping_shards(self, name, rows, work, self.config.candidates.shard_size)
