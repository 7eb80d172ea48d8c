"""The keys of scripts/evaluate.py, documented beside their fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from srlm_fast.config.keys import EngineConfig, JudgeConfig
from srlm_fast.config.tree import key

TASKS = ("answers", "head_to_head", "alpaca_eval", "mt_bench", "mt_bench_grade", "judge")


@dataclass
class AnswersConfig:
    n: int = key(1, "answers per prompt; for task=mt_bench choices per question", least=1)
    temperature: float = key(0.7, "sampling temperature; for task=mt_bench of categories not in temperatures")
    top_p: float = key(0.9, "nucleus of the sampling", above=0, most=1)
    max_new_tokens: int = key(1024, "most tokens of an answer, or of one turn", least=1)


@dataclass
class EvaluationJudgeConfig(JudgeConfig):
    """A judge outside the loop: also of pairs of answers, and of conversations."""

    path: str | None = key(
        None, "folder of the judging model, where judge.endpoint is none; none: model judges itself", path=True
    )
    chat_format: str | None = key(
        None, "how messages become text for it; none: chat_format", choices=("template", "llama2", "plain")
    )
    pairwise_template: str | None = key(
        None, "file of a prompt with {instruction}, {a} and {b} places that asks for [[A]], [[B]] or [[tie]]", path=True
    )
    rating_template: str | None = key(
        None, "file of a prompt with {conversation} and {reference} places that asks for [[rating]]", path=True
    )
    verdict_temperature: float = key(
        0.0, "sampling temperature of pairwise verdicts and ratings; judge.temperature is that of pointwise scores"
    )


@dataclass
class EvaluateRunConfig:
    """One evaluation outside the self-rewarding loop."""

    run_dir: str = key("runs/evaluate", "folder of the evaluation; relative to the working directory", operational=True)
    save_by: str | None = key(
        None,
        "when to stop, to be requeued: a duration after the start (2h50m), a date with a time (2026-11-24T06:00), or "
        "slurm-10m, so long before the end of the Slurm job; none: never",
        operational=True,
    )
    task: str = key("answers", "what to do", choices=TASKS)
    model: str = key("", "folder of the model; for task=head_to_head also a file of its answers", path=True)
    name: str | None = key(None, "name of the model in the results; none: that of its folder or file")
    opponent: str | None = key(None, "task=head_to_head: folder or file of answers of the other model", path=True)
    opponent_name: str | None = key(None, "name of the opponent; none: that of its folder or file")
    chat_format: str = key("template", "how messages become text", choices=("template", "llama2", "plain"))
    opponent_chat_format: str | None = key(
        None, "the same for the opponent; none: chat_format", choices=("template", "llama2", "plain")
    )
    max_seq_len: int = key(4096, "longest prompt + answer in tokens; less where a model has less", least=1)
    prompts: str | None = key(None, "file of prompts to answer, or of AlpacaEval's instructions", path=True)
    questions: str | None = key(None, "tasks mt_bench, mt_bench_grade: MT-Bench's question file", path=True)
    model_answer: str | None = key(None, "task=mt_bench_grade: answers of one model in FastChat's format", path=True)
    reference_answer: str | None = key(
        None, "task=mt_bench_grade: reference answers in the same format, shown to the judge; none: none", path=True
    )
    ranked: str | None = key(
        None, "task=judge: file of ranked or scored replies, such as data/eft_eval.jsonl of a run", path=True
    )
    temperatures: dict[str, float] = key(
        {
            **{"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
            **{"stem": 0.1, "humanities": 0.1},
        },
        "task=mt_bench: sampling temperature of each category, FastChat's",
    )
    compare: str = key(
        "pairwise",
        "task=head_to_head: pairwise, a judge sees both answers in both orders; scores, the mean pointwise scores "
        "decide; truth, the exact scorer does",
        choices=("pairwise", "scores", "truth"),
    )
    truth: str | None = key(None, "exact scorer of compare=truth: world (the embedded world)", choices=("world",))
    bootstrap: int = key(1000, "bootstrap resamples behind the intervals; 0: none")
    seed: int = key(0, "every random choice derives from it")
    shard_size: int = key(64, "prompts per shard: the unit of dividing work among processes", least=1)
    kernels: str = key("fused", "the operators of srlm_fast.kernels, or plain torch", choices=("fused", "reference"))
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    judge: EvaluationJudgeConfig = field(default_factory=EvaluationJudgeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
