"""The keys of scripts/train.py, documented beside their fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from srlm_fast.config.keys import DpoConfig, LoraConfig, ParallelConfig
from srlm_fast.config.tree import key


@dataclass
class TrainRunConfig:
    """One training run outside the self-rewarding loop."""

    run_dir: str = key("runs/train", "folder of the run; relative to the working directory", operational=True)
    save_by: str | None = key(
        None,
        "when to save and end, to be requeued: a duration after the start (2h50m), a date with a time "
        "(2026-11-24T06:00), or slurm-10m, so long before the end of the Slurm job; none: never",
        operational=True,
    )
    model: str = key("", "folder of the model in Hugging Face layout (config.json, safetensors)", path=True)
    tokenizer: str | None = key(None, "tokenizer file or folder; none: the model's", path=True)
    data: tuple[str, ...] = key((), "files of rows to train on (.jsonl, .json, gzipped or not, .parquet)", path=True)
    eval_data: tuple[str, ...] = key((), "files of held-out rows", path=True)
    eval_share: float = key(
        0.0, "share of data, one row at least, that is held out where eval_data is empty; drawn by the seed", below=1
    )
    eval_every: int = key(200, "optimizer steps between evaluations of the held-out rows", least=1)
    stop_on: str | None = key(
        None,
        "metric of the held-out rows; training ends, with the weights of the evaluation before, when it got worse: it "
        "rose (eval_loss) or fell (the others, such as eval_rewards/accuracies)",
    )
    chat_format: str = key(
        "template",
        "how messages become text; text: rows of plain texts as they are",
        choices=("template", "llama2", "plain", "text"),
    )
    max_length: int = key(1024, "most tokens of a prompt with one response", least=2)
    truncation: str = key(
        "keep_start",
        "what becomes of longer rows: responses are cut at their end, the prompt is cut at its start, or they are "
        "dropped; all are counted",
        choices=("keep_start", "keep_end", "drop"),
    )
    on_bad_row: str = key(
        "drop",
        "rows that cannot be used (empty reply, chosen equal to rejected, ...) are dropped and counted, or refused",
        choices=("drop", "stop"),
    )
    group_prompts: bool = key(
        False,
        "rows of one prompt become one item, while it fits tokens_per_microbatch: the prompt runs through the network "
        "once; training.batch_size then counts prompts",
    )
    on_nonfinite: str = key(
        "stop",
        "what follows a loss or gradient that is not finite, after its batch was written to the run folder",
        choices=("stop", "skip"),
    )
    reference_cache: str | None = key(
        None,
        "folder of reference log-probs that several runs share; none: in the run folder",
        path=True,
        operational=True,
    )
    dropout: float = key(0.0, "dropout while training, on the outputs of attention and MLP", below=1)
    seed: int = key(0, "data order and dropout derive from it")
    kernels: str = key(
        "fused",
        "the operators of srlm_fast.kernels, or the same formulas in plain torch (slower, for comparison)",
        choices=("fused", "reference"),
    )
    training: DpoConfig = field(default_factory=DpoConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
