"""Every key of a run, documented once, beside its field. Defaults are the paper's values (arXiv 2401.10020) where it
gives one; "choice" marks what it leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from srlm_fast.config.methods import GuardsConfig, MetaJudgeConfig, PairsConfig, TemporalConfig
from srlm_fast.config.tree import key

GENERATORS = ("base", "sft", "current")
"""Models of the run that may write new prompts; any other prompts.generator is a folder."""


@dataclass
class ModelConfig:
    path: str = key("", "folder of M0 in Hugging Face layout (config.json, safetensors)", path=True)
    tokenizer: str | None = key(None, "tokenizer file or folder; none: model.path", path=True)
    random_init: bool = key(False, "start from random weights: model.path then needs config.json only (smoke tests)")
    chat_format: str = key("llama2", "how messages become text (choice)", choices=("llama2", "plain", "template"))
    max_seq_len: int = key(
        4096, "longest prompt + response in tokens; longer ones are dropped and counted (choice)", least=1
    )
    dropout: float = key(0.1, "dropout while training, on the outputs of attention and MLP (place: choice)", below=1)


@dataclass
class OasstConfig:
    paths: tuple[str, ...] = key((), "OASST1 files of messages or trees (.jsonl, .jsonl.gz)", path=True)
    lang: str = key("en", "language of the prompts and replies that are read")
    ift_examples: int = key(
        3200, "most IFT examples; best quality label first, then file order (order: choice)", least=1
    )
    eft_share: float = key(0.19, "share of the usable prompts set aside for EFT before IFT takes its own (choice)")
    eft_eval_share: float = key(0.25, "share of the EFT prompts kept for evaluating the judge (541 of 2,171)")
    min_replies: int = key(2, "fewest ranked replies that a prompt needs for EFT", least=1)


@dataclass
class TrainConfig:
    loss: str = key("sft", "a loss of docs/losses.md")
    loss_options: dict[str, Any] = key({}, "options of the loss by name, docs/losses.md; those left out: its defaults")
    lr: float = key(5.5e-6, "peak learning rate")
    min_lr: float = key(1.1e-6, "learning rate at the end of the schedule")
    schedule: str = key("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    warmup_steps: int = key(0, "linear warm-up steps (choice)")
    epochs: int = key(1, "passes over the data (choice)", least=1)
    max_steps: int | None = key(None, "stop after this many optimizer steps; none: all epochs (choice)", least=1)
    batch_size: int = key(16, "examples, or pairs, of one optimizer step over all ranks (pairs: choice)", least=1)
    tokens_per_microbatch: int = key(8192, "most tokens of one packed forward pass on one rank (choice)")
    beta: float = key(0.1, "scale of the rewards of DPO and its kin")
    label_smoothing: float = key(0.0, "share of flipped labels assumed (cDPO); the paper has none")
    adam_beta1: float = key(0.9, "AdamW's beta1 (choice)", below=1)
    adam_beta2: float = key(0.95, "AdamW's beta2 (choice)", below=1)
    adam_eps: float = key(1e-8, "AdamW's epsilon (choice)")
    moments: str = key(
        "fp32",
        "AdamW's moments; bf16: rounded stochastically; 8bit: torchao's, a code per value and a scale per 256 (choice)",
        choices=("fp32", "bf16", "8bit"),
    )
    weight_decay: float = key(0.1, "decoupled weight decay of matrices (choice)")
    max_grad_norm: float = key(1.0, "gradient norm above which gradients are scaled down (choice)")
    checkpoint_every: int = key(200, "optimizer steps between training checkpoints", operational=True, least=1)
    keep_last: int = key(1, "training checkpoints that are kept, the newest ones", operational=True, least=1)
    checkpoint_in_background: bool = key(
        True,
        "whether training goes on while a checkpoint is written, from a copy of weights and moments in host memory",
        operational=True,
    )


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
    enabled: bool = key(True, "whether M1 learns from EFT beside IFT (the paper has an ablation without)")
    attempts: int = key(
        4, "judgements the SFT baseline writes per reply; the first that agrees is taken (choice)", least=1
    )
    scope: str = key(
        "prompt", "unit of acceptance: all replies of a prompt, or each reply (choice)", choices=("prompt", "reply")
    )
    ties: str = key(
        "strict",
        "equal scores of differently ranked replies disagree, or are let pass (choice)",
        choices=("strict", "allow"),
    )
    max_share: float = key(0.4, "the most common score is thinned out to at most this share (choice)", above=0, most=1)
    max_examples: int = key(1630, "most EFT examples kept")


@dataclass
class PromptsConfig:
    count: int = key(5000, "new prompts of every iteration (choice; follow-ups draw from a pool of 20,000)", least=1)
    generator: str = key(
        "base", "who writes them: base (M0), sft, current (M_t), or a model folder (paper: a fixed Llama 2-Chat 70B)"
    )
    temperature: float = key(0.6, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling", above=0, most=1)
    max_new_tokens: int = key(512, "most tokens of one completion (choice)", least=1)
    prompts_per_request: int = key(8, "a completion is cut after this many prompts (Self-Instruct)", least=1)
    drop_cut_off: bool = key(True, "drop a completion whole that ended at max_new_tokens (Self-Instruct)")
    requests_per_round: int = key(
        64,
        "completions asked for at a time; accepted prompts serve as demonstrations from the next round on (choice)",
        least=1,
    )
    max_requests: int = key(20, "completions tried per wanted prompt, at most, before the run stops (choice)", least=1)
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
    n: int = key(4, "answers per prompt; a pair has two", least=2)
    temperature: float = key(0.7, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling", above=0, most=1)
    max_new_tokens: int = key(1024, "most tokens of an answer (choice)", least=1)
    shard_size: int = key(256, "prompts per shard: the unit of dividing work among ranks", least=1)
    schedule: str = key(
        "streamed",
        "when answers are judged: streamed, each as soon as it is there; sequential, when all of the shard are",
        choices=("streamed", "sequential"),
        operational=True,
    )


@dataclass
class JudgeConfig:
    n: int = key(3, "judgements per answer, averaged", least=1)
    temperature: float = key(0.7, "sampling temperature")
    top_p: float = key(0.9, "nucleus of the sampling", above=0, most=1)
    max_new_tokens: int = key(512, "most tokens of a judgement (choice)", least=1)
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
    endpoint: str | None = key(
        None,
        "base URL of an OpenAI-compatible server whose model judges the candidates; none: the model judges itself",
        operational=True,
    )
    endpoint_model: str | None = key(None, "name of the judging model on that server")
    endpoint_key: str = key("OPENAI_API_KEY", "environment variable that holds the server's key", operational=True)
    endpoint_concurrency: int = key(16, "requests to the server at a time, per process", operational=True, least=1)
    endpoint_retries: int = key(
        8, "tries after a failed one; the pause doubles up to 8 s, or is what the server says", operational=True
    )
    endpoint_timeout: float = key(300.0, "seconds that one request may take", operational=True, above=0)


@dataclass
class ReferenceConfig:
    model: str = key(
        "current",
        "the reference of every iteration: current, M_t, which starts it (choice); or base (M0), sft or m1 throughout",
        choices=("current", "base", "sft", "m1"),
    )
    source: str = key(
        "forward",
        "reference log-probs: forward, one pass of the reference; rollout, what the engine found when it sampled (no "
        "pass, but its rounding; compared with a pass on a sample); file, all of them must be in reference.cache",
        choices=("forward", "rollout", "file"),
    )
    cache: str | None = key(
        None, "folder of a cache that several runs share; none: each run has its own", path=True, operational=True
    )
    sample: int = key(32, "pairs on which rollout is compared with a forward pass; 0: none", operational=True)


@dataclass
class EvaluateConfig:
    prompts: str | None = key(
        None, "file of held-out prompts that every model answers; none: no answers are written", path=True
    )
    n: int = key(1, "answers per held-out prompt (choice)", least=1)
    truth: str | None = key(
        None,
        "exact scorer used to measure, never to train: world (the embedded world); none: human ranks only",
        choices=("world",),
    )
    best_score: float = key(5.0, "the score that counts as 5/5 in 5-best")
    bootstrap: int = key(1000, "bootstrap resamples behind the intervals")


@dataclass
class EngineConfig:
    name: str = key(
        "native",
        "generation engine: native (ours, for small models, a whole replica per process) or vllm",
        choices=("native", "vllm"),
    )
    max_batch: int = key(128, "sequences decoded at the same time", least=1)
    tensor_parallel: int = key(
        1, "vllm: consecutive processes of a node that share a replica of the model", operational=True, least=1
    )
    kv_cache_gib: float = key(
        8.0, "vllm: GiB for the keys and values of running sequences, in every process", operational=True, above=0
    )
    dtype: str = key(
        "auto",
        "vllm: dtype of weights and cache; auto: bfloat16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    enforce_eager: bool = key(
        False,
        "vllm: neither CUDA graphs nor torch.compile; starts sooner and generates more slowly",
        operational=True,
    )


@dataclass
class ParallelConfig:
    backend: str = key(
        "fsdp2",
        "what divides model, gradients and moments among the processes; deepspeed: its ZeRO, an extra package, "
        "without the keys shard, replicate, reshard, reduce and compile and with fp32 moments",
        choices=("fsdp2", "deepspeed"),
        operational=True,
    )
    zero_stage: int = key(
        3,
        "deepspeed: what is divided; 1, moments and fp32 weights; 2, gradients too; 3, the weights too",
        operational=True,
        least=1,
        most=3,
    )
    shard: int | None = key(
        None,
        "processes that share one copy of weights, gradients and moments; none: all that replicate leaves",
        operational=True,
        least=1,
    )
    replicate: int = key(
        1,
        "copies of these; the gradients of the copies are summed (HSDP: shard within a node, copies across nodes)",
        operational=True,
        least=1,
    )
    dtype: str = key(
        "auto",
        "dtype of products and activations; weights, gradients and sums over processes are fp32 in any case. auto: "
        "bfloat16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    checkpointing: str = key(
        "none",
        "what of a block is computed again in the backward pass: none, all is kept; selective, attention, its values "
        "and the product behind it are kept, the MLP and what is element-wise is not; full, only its input is kept",
        choices=("none", "selective", "full"),
        operational=True,
    )
    compile: bool = key(
        False, "torch.compile for every block; the first steps take long, and dropout draws other random numbers"
    )
    reshard: str = key(
        "always",
        "when the gathered weights of a block are freed: always, after its forward and after its backward; node, after "
        "its forward down to what the processes of a node hold together; never, after its backward only",
        choices=("always", "node", "never"),
        operational=True,
    )
    reduce: str = key(
        "step",
        "when gradients are summed over the processes: step, once, until when each holds those of the whole model "
        "(4 bytes a parameter); microbatch, after each, so that each holds its shard only",
        choices=("step", "microbatch"),
        operational=True,
    )


@dataclass
class LoraConfig:
    rank: int = key(0, "columns and rows of the matrices beside each weight; 0: all weights are trained (paper)")
    alpha: float = key(16.0, "their product counts alpha / rank times", above=0)
    dropout: float = key(0.0, "dropout on what they see", below=1)
    targets: tuple[str, ...] = key(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "the weights that have such matrices, by the last part of their names",
    )


@dataclass
class Config:
    run_dir: str = key("runs/default", "folder of the run; relative to the working directory", operational=True)
    gpus: str | None = key(
        None,
        "the machine that the run is meant for, such as 16xH100-80; read by scripts/plan.py and --dry-run alone",
        operational=True,
    )
    seed: int = key(0, "every random choice derives from it")
    save_by: str | None = key(
        None,
        "when to save and end, to be requeued: a duration after the start (2h50m), a date with a time "
        "(2026-11-24T06:00), or slurm-10m, so long before the end of the Slurm job; none: never",
        operational=True,
    )
    iterations: int = key(2, "rounds of self-rewarding DPO after M1 (paper: two, M2 and M3)", operational=True)
    learn_from: str = key(
        "pairs",
        "what M_(t+1) is made of: pairs, DPO from M_t; positives, SFT of M0 on the seed data and the answers of M_1 to "
        "M_t that scored judge.max_score (the paper's ablation)",
        choices=("pairs", "positives"),
    )
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
    meta_judge: MetaJudgeConfig = field(default_factory=MetaJudgeConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
