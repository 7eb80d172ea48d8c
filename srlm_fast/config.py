"""The configuration of a run: one tree of dataclasses, read from YAML and `section.key=value` overrides.

Every key is documented once, beside its field; `python scripts/iterate.py --help` prints these texts.
Defaults are the paper's values (arXiv 2401.10020) where it gives one; "choice" marks what it leaves open.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from srlm_fast.errors import UserError


def key(default: Any, doc: str, *, path: bool = False, choices: Sequence[str] = (), operational: bool = False) -> Any:
    """A configuration field: its default, its documentation, and what is allowed.

    path: a file or folder; relative ones in a YAML file are relative to that file's folder.
    operational: does not influence any result, so it may differ when a run is resumed.
    """
    metadata = {"doc": doc, "path": path, "choices": tuple(choices), "operational": operational}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


GENERATORS = ("base", "sft", "current")
"""Models of the run that may write new prompts; any other prompts.generator is a folder."""


@dataclass
class ModelConfig:
    path: str = key("", "folder of M0 in Hugging Face layout (config.json, safetensors)", path=True)
    tokenizer: str | None = key(None, "tokenizer file or folder; none: model.path", path=True)
    random_init: bool = key(False, "start from random weights: model.path then needs config.json only (smoke tests)")
    chat_format: str = key("llama2", "how messages become text (choice)", choices=("llama2", "plain", "template"))
    max_seq_len: int = key(4096, "longest prompt + response in tokens; longer ones are dropped and counted (choice)")
    dropout: float = key(0.1, "dropout while training, on the outputs of attention and MLP (place: choice)")


@dataclass
class OasstConfig:
    paths: tuple[str, ...] = key((), "OASST1 files of messages or trees (.jsonl, .jsonl.gz)", path=True)
    lang: str = key("en", "language of the prompts and replies that are read")
    ift_examples: int = key(3200, "most IFT examples; best quality label first, then file order (order: choice)")
    eft_share: float = key(0.19, "share of the usable prompts set aside for EFT before IFT takes its own (choice)")
    eft_eval_share: float = key(0.25, "share of the EFT prompts kept for evaluating the judge (541 of 2,171)")
    min_replies: int = key(2, "fewest ranked replies that a prompt needs for EFT")


@dataclass
class TrainConfig:
    loss: str = key("sft", "a loss of docs/losses.md")
    loss_options: dict[str, Any] = key({}, "options of the loss by name, docs/losses.md; those left out: its defaults")
    lr: float = key(5.5e-6, "peak learning rate")
    min_lr: float = key(1.1e-6, "learning rate at the end of the schedule")
    schedule: str = key("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    warmup_steps: int = key(0, "linear warm-up steps (choice)")
    epochs: int = key(1, "passes over the data (choice)")
    max_steps: int | None = key(None, "stop after this many optimizer steps; none: all epochs (choice)")
    batch_size: int = key(16, "examples, or pairs, of one optimizer step over all ranks (pairs: choice)")
    tokens_per_microbatch: int = key(8192, "most tokens of one packed forward pass on one rank (choice)")
    beta: float = key(0.1, "scale of the rewards of DPO and its kin")
    label_smoothing: float = key(0.0, "share of flipped labels assumed (cDPO); the paper has none")
    adam_beta1: float = key(0.9, "AdamW's beta1 (choice)")
    adam_beta2: float = key(0.95, "AdamW's beta2 (choice)")
    adam_eps: float = key(1e-8, "AdamW's epsilon (choice)")
    moments: str = key("fp32", "AdamW's moments; bf16 is rounded stochastically (choice)", choices=("fp32", "bf16"))
    weight_decay: float = key(0.1, "decoupled weight decay of matrices (choice)")
    max_grad_norm: float = key(1.0, "gradient norm above which gradients are scaled down (choice)")
    checkpoint_every: int = key(200, "optimizer steps between training checkpoints", operational=True)


@dataclass
class SftConfig(TrainConfig):
    pass


@dataclass
class DpoConfig(TrainConfig):
    loss: str = key("dpo", "a loss of docs/losses.md that compares pairs, or a sum such as dpo + 0.2 * nll")
    lr: float = key(1e-6, "peak learning rate")
    min_lr: float = key(1e-7, "learning rate at the end of the schedule")
    schedule: str = key(
        "linear",
        "shape of the decay (not named in the paper; v1 says linear)",
        choices=("cosine", "linear", "constant"),
    )


@dataclass
class EftConfig:
    attempts: int = key(4, "judgements the SFT baseline writes per reply; the first that agrees is taken (choice)")
    scope: str = key(
        "prompt", "unit of acceptance: all replies of a prompt, or each reply (choice)", choices=("prompt", "reply")
    )
    ties: str = key(
        "strict",
        "equal scores of differently ranked replies disagree, or are let pass (choice)",
        choices=("strict", "allow"),
    )
    max_share: float = key(0.4, "the most common score is thinned out to at most this share (choice)")
    max_examples: int = key(1630, "most EFT examples kept")


@dataclass
class PromptsConfig:
    count: int = key(5000, "new prompts of every iteration (choice; follow-ups draw from a pool of 20,000)")
    generator: str = key(
        "base", "who writes them: base (M0), sft, current (M_t), or a model folder (paper: a fixed Llama 2-Chat 70B)"
    )
    temperature: float = key(0.6, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling")
    max_new_tokens: int = key(512, "most tokens of one completion (choice)")
    prompts_per_request: int = key(8, "a completion is cut after this many prompts (Self-Instruct)")
    drop_cut_off: bool = key(True, "drop a completion whole that ended at max_new_tokens (Self-Instruct)")
    requests_per_round: int = key(
        64, "completions asked for at a time; accepted prompts serve as demonstrations from the next round on (choice)"
    )
    max_requests: int = key(20, "completions tried per wanted prompt, at most, before the run stops (choice)")
    ift_shots: int = key(6, "demonstrations from IFT")
    generated_shots: int = key(
        2, "demonstrations from accepted generated prompts; IFT fills in while there are too few"
    )
    shots_template: str | None = key(
        None, "file of the task-list prompt with a {tasks} place; none: the built-in one", path=True
    )
    min_words: int = key(4, "fewest words of a new prompt")
    max_words: int = key(150, "most words of a new prompt")
    blacklist: tuple[str, ...] = key(
        (
            "image",
            "images",
            "graph",
            "graphs",
            "picture",
            "pictures",
            "file",
            "files",
            "map",
            "maps",
            "draw",
            "plot",
            "go to",
        ),
        "words that a new prompt may not hold",
    )
    forbidden_starts: tuple[str, ...] = key(("Write a program",), "openings that a new prompt may not have")
    rouge_threshold: float = key(0.7, "ROUGE-L F above which a prompt is too like an IFT one or an accepted one")


@dataclass
class CandidatesConfig:
    n: int = key(4, "answers per prompt")
    temperature: float = key(0.7, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling")
    max_new_tokens: int = key(1024, "most tokens of an answer (choice)")
    shard_size: int = key(256, "prompts per shard: the unit of resuming and of dividing work among ranks")


@dataclass
class JudgeConfig:
    n: int = key(3, "judgements per answer, averaged")
    temperature: float = key(0.7, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling")
    max_new_tokens: int = key(512, "most tokens of a judgement (choice)")
    mode: str = key(
        "cot",
        "score of a judgement: cot, the number it ends in; expected, the mean of the score digit's distribution",
        choices=("cot", "expected"),
    )
    template: str | None = key(
        None, "file of a judge prompt with {instruction} and {response} places; none: the built-in one", path=True
    )
    decimals: bool = key(True, "whether 4.5 is a score; if not it counts as unparsable (choice)")
    max_score: float = key(5.0, "highest score of the scale")
    which: str = key("last", "which of several scores in one judgement counts (choice)", choices=("last", "first"))
    min_valid: int = key(1, "fewest parsable judgements that give an answer a score (choice)")


@dataclass
class PairsConfig:
    ties: str = key(
        "random", "which of several answers tied at an end is taken (choice)", choices=("random", "first", "length")
    )
    keep_truncated: bool = key(True, "whether answers cut off at the token limit may enter a pair (choice)")


@dataclass
class EvaluateConfig:
    prompts: str | None = key(
        None, "file of held-out prompts that every model answers; none: no answers are written", path=True
    )
    n: int = key(1, "answers per held-out prompt (choice)")
    truth: str | None = key(
        None,
        "exact scorer used to measure, never to train: world (the embedded world); none: human ranks only",
        choices=("world",),
    )
    best_score: float = key(5.0, "the score that counts as 5/5 in 5-best")
    bootstrap: int = key(1000, "bootstrap resamples behind the intervals")


@dataclass
class EngineConfig:
    name: str = key("native", "generation engine", choices=("native",), operational=True)
    max_batch: int = key(128, "sequences decoded at the same time")


@dataclass
class Config:
    run_dir: str = key("runs/default", "folder of the run; relative to the working directory", operational=True)
    seed: int = key(0, "every random choice derives from it")
    iterations: int = key(2, "rounds of self-rewarding DPO after M1 (paper: two, M2 and M3)", operational=True)
    kernels: str = key(
        "fused",
        "the operators of srlm_fast.kernels, or the same formulas in plain torch (slower, for comparison)",
        choices=("fused", "reference"),
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    oasst: OasstConfig = field(default_factory=OasstConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    eft: EftConfig = field(default_factory=EftConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def validate(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            UserError: naming the key, its value and the mend.
        """
        for name, spec, value in walk(self):
            choices = spec.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}")
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}={value}: must be a number and not negative")
        for name in _POSITIVE:
            value = lookup(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        for name in _SHARES:
            if not 0 < lookup(self, name) <= 1:
                raise UserError(f"{name}={lookup(self, name)}: must be above 0 and at most 1")
        for name in _BELOW_ONE:
            if lookup(self, name) >= 1:
                raise UserError(f"{name}={lookup(self, name)}: must be below 1")
        if self.candidates.n < 2:
            raise UserError(f"candidates.n={self.candidates.n}: must be at least 2, a pair has two answers")
        if self.judge.min_valid > self.judge.n:
            raise UserError(f"judge.min_valid={self.judge.min_valid}: must be at most judge.n={self.judge.n}")
        for name in ("prompts.max_new_tokens", "candidates.max_new_tokens", "judge.max_new_tokens"):
            if lookup(self, name) >= self.model.max_seq_len:
                raise UserError(
                    f"{name}={lookup(self, name)} leaves no room for a prompt in model.max_seq_len="
                    f"{self.model.max_seq_len}; lower it"
                )
        longest_pair = self.model.max_seq_len + self.candidates.max_new_tokens
        for name, budget, needed, what in (
            ("sft", self.sft.tokens_per_microbatch, self.model.max_seq_len, "example (model.max_seq_len)"),
            (
                "dpo",
                self.dpo.tokens_per_microbatch,
                longest_pair,
                "pair (model.max_seq_len + candidates.max_new_tokens)",
            ),
        ):
            if budget < needed:
                raise UserError(
                    f"{name}.tokens_per_microbatch={budget} is smaller than the longest {what} of {needed} tokens; "
                    f"raise it to {needed} or shorten these"
                )


_POSITIVE = (
    "model.max_seq_len",
    "oasst.ift_examples",
    "oasst.min_replies",
    "sft.batch_size",
    "sft.epochs",
    "sft.max_steps",
    "sft.checkpoint_every",
    "dpo.batch_size",
    "dpo.epochs",
    "dpo.max_steps",
    "dpo.checkpoint_every",
    "eft.attempts",
    "prompts.count",
    "prompts.max_new_tokens",
    "prompts.max_requests",
    "prompts.prompts_per_request",
    "prompts.requests_per_round",
    "candidates.max_new_tokens",
    "candidates.shard_size",
    "judge.n",
    "judge.max_new_tokens",
    "evaluate.n",
    "engine.max_batch",
)
_BELOW_ONE = ("model.dropout", "sft.adam_beta1", "sft.adam_beta2", "dpo.adam_beta1", "dpo.adam_beta2")
_SHARES = ("prompts.top_p", "candidates.top_p", "judge.top_p", "eft.max_share")


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, dataclass field, value) of every key."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec, value


def lookup(config: Any, name: str) -> Any:
    """Value of a dotted key."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides; validated.

    Raises:
        UserError: for an unreadable file, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    import yaml

    config = Config()
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the configuration {path}: {error}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold a mapping of keys, got {type(tree).__name__}")
        _apply(config, tree, "", str(path), Path(path).resolve().parent)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        tree: Any = value
        for part in reversed(name.split(".")):
            tree = {part: tree}
        _apply(config, tree, "", "command line", Path.cwd())
    config.validate()
    return config


def _apply(section: Any, tree: dict[str, Any], prefix: str, source: str, folder: Path) -> None:
    known = {spec.name: spec for spec in fields(section)}
    hints = get_type_hints(type(section))
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if name not in known:
            raise UserError(f"{source}: unknown key {dotted!r}{_nearest(dotted)}")
        if is_dataclass(getattr(section, name)):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {dotted} is a section of keys, got {value!r}")
            _apply(getattr(section, name), value, f"{dotted}.", source, folder)
            continue
        if get_origin(hints[name]) is dict:
            _merge(getattr(section, name), value, dotted, source)
            continue
        value = _coerce(value, hints[name], dotted, source)
        if known[name].metadata.get("path") and value:
            value = tuple(str(folder / p) for p in value) if isinstance(value, tuple) else str(folder / value)
        setattr(section, name, value)


def _merge(mapping: dict[str, Any], changes: Any, dotted: str, source: str) -> None:
    """Set the names of a mapping, and take out those that are none."""
    if not isinstance(changes, dict):
        raise UserError(f"{source}: {dotted} is a mapping of names to values, got {changes!r}")
    for name, value in changes.items():
        if value is None or value == "none":
            mapping.pop(str(name), None)
        elif isinstance(value, (bool, int, float, str)):
            mapping[str(name)] = value
        else:
            raise UserError(f"{source}: {dotted}.{name}={value!r}: must be a number, a word, true, false or none")


def _nearest(dotted: str) -> str:
    names = [name for name, _, _ in walk(Config())]
    if dotted in names:
        section, _, name = dotted.partition(".")
        return f"; write it inside its section, {section}: {{{name}: ...}}"
    close = get_close_matches(dotted, names, n=1, cutoff=0.5)
    if not close:
        close = [name for name in names if name.rsplit(".", 1)[-1] == dotted.rsplit(".", 1)[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the keys"


def _coerce(value: Any, hint: Any, dotted: str, source: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        if get_origin(option) is tuple:
            if isinstance(value, str):
                value = [value]
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                return tuple(value)
        elif option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        elif option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        elif option is bool and isinstance(value, bool):
            return value
        elif option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    wanted = " or ".join("none" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{source}: {dotted}={value!r}: must be {wanted}")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as is written to config.yaml (tuples become lists)."""
    return json.loads(json.dumps(asdict(config)))


def results_keys(config: Config) -> dict[str, Any]:
    """The keys that influence results: what must not change when a run is resumed.

    Paths are left out: the run records the content of the files instead, so a run may be moved.
    """
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, spec, value in walk(config)
        if not spec.metadata["operational"] and not spec.metadata["path"]
    }


def input_paths(config: Config) -> dict[str, list[Path]]:
    """The files and folders that the configuration names, by key; empty ones are left out."""
    named = {}
    for name, spec, value in walk(config):
        if spec.metadata["path"] and value:
            named[name] = [Path(p) for p in (value if isinstance(value, tuple) else (value,))]
    if config.prompts.generator not in GENERATORS:
        named["prompts.generator"] = [Path(config.prompts.generator)]
    return named


def describe() -> str:
    """Every key with its default and documentation, one a line."""
    lines = []
    for name, spec, value in walk(Config()):
        lines.append(f"  {name} = {json.dumps(value)}\n      {spec.metadata['doc']}")
        if spec.metadata["choices"]:
            lines[-1] += f" [{' | '.join(spec.metadata['choices'])}]"
    return "\n".join(lines)
