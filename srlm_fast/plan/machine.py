"""GPUs by their data sheets, machines of them, and what a plan has to assume."""

from __future__ import annotations

from dataclasses import dataclass

from srlm_fast.config.tree import key
from srlm_fast.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A data sheet (NVIDIA's, SXM versions): what torch can allocate in GiB, dense bf16 TFLOP/s, and GB/s of memory, to
    the other GPUs of the node (one direction), and, as usually built, to other nodes."""

    memory_gib: float
    tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float


GPUS = {
    "A100-40": Gpu(39.4, 312, 1555, 300, 25),
    "A100-80": Gpu(79.1, 312, 2039, 300, 25),
    "H100-80": Gpu(79.1, 989, 3350, 450, 50),
    "H200": Gpu(139.8, 989, 4800, 450, 50),
}


@dataclass(frozen=True)
class Machine:
    """Nodes of `per_node` equal GPUs."""

    name: str
    gpu: Gpu
    n_gpus: int
    per_node: int = 8

    @classmethod
    def parse(cls, text: str | None) -> Machine:
        """Of "16xH100-80".

        Raises:
            UserError: for nothing, another form or an unknown GPU.
        """
        if not text:
            raise UserError("which machine? Give --gpus, such as --gpus 8xH100-80, or the key gpus")
        count, _, name = text.partition("x")
        if not count.isdecimal() or int(count) < 1 or name not in GPUS:
            raise UserError(f"--gpus {text!r}: must be a number, x and one of {', '.join(GPUS)}, such as 16xH100-80")
        return cls(name, GPUS[name], int(count))


@dataclass
class Assumptions:
    """What a plan cannot know."""

    prompt_tokens: float = key(200, "mean tokens of a prompt")
    answer_tokens: float = key(350, "mean tokens of an answer")
    judgement_tokens: float = key(150, "mean tokens of a judgement")
    judge_prompt_tokens: float = key(300, "tokens of the judge prompt without question and answer")
    reserve_gib: float = key(5, "CUDA context, NCCL, fragments of the allocator, the engine asleep")
    engine_gib: float = key(3, "activations and CUDA graphs of the engine")
    training: float = key(0.4, "share of the peak FLOP/s that training reaches", above=0, most=1)
    prefill: float = key(0.4, "share of the peak FLOP/s that reading prompts reaches", above=0, most=1)
    decode: float = key(0.5, "share of the memory bandwidth that writing reaches", above=0, most=1)
    network: float = key(0.7, "share of the bandwidth between GPUs that collectives reach", above=0, most=1)
