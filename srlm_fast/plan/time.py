"""Seconds of a training step and of an iteration: FLOPs and bytes over the data sheet's figures.

Lengths, and the shares of these figures that are reached, stand in `Assumptions`; nobody has measured them for the
machine at hand.
"""

from __future__ import annotations

import math

from srlm_fast.config import lookup
from srlm_fast.plan.memory import Parts, Plan

RECOMPUTED = {"none": 0.0, "selective": 0.6, "full": 1.0}
"""Share of a block's forward FLOPs that are done again: queries, keys and the wide products of the MLP; all of them."""
OPTIMIZER_BYTES = {"fp32": 28, "bf16": 20, "8bit": 16}
"""Read and written per parameter by AdamW: gradient read; parameter and two moments read and written."""


def step_seconds(plan: Plan, section: str) -> Parts:
    """Seconds of one optimizer step by the keys of `section`: products, transfers, optimizer.

    Without the products of attention itself: 1 % of the others at the lengths that are assumed.
    """
    gpu, known, options, shape = plan.machine.gpu, plan.assumptions, lookup(plan.config, section), plan.shape
    n_gpus, parallel, local = plan.machine.n_gpus, plan.config.parallel, plan.local_parameters(trained=True)
    gradients, again = 0 if plan.n_adapters else 1, RECOMPUTED[parallel.checkpointing]
    responses = 2 if section == "dpo" else 1
    tokens = options.batch_size * (known.prompt_tokens + responses * known.answer_tokens)
    blocks = 2 * tokens * shape.num_hidden_layers * plan.n_block
    head = 2 * options.batch_size * responses * known.answer_tokens * shape.hidden_size * shape.vocab_size
    adapters = 2 * tokens * shape.num_hidden_layers * plan.n_adapters
    flops = (2 + gradients + again) * blocks + (3 + again) * adapters + (2 + gradients) * head
    peak = gpu.tflops * 1e12 / (1 if plan.itemsize == 2 else 16)  # fp32 without TF32
    n_microbatches = max(1, math.ceil(tokens / n_gpus / options.tokens_per_microbatch))
    reductions = n_microbatches if parallel.reduce == "microbatch" else 1
    gathers = n_microbatches * (1 if parallel.reshard == "never" else 2)
    moved = gathers * plan.itemsize * plan.n_parameters + 4 * reductions * plan.n_trained
    moved *= (plan.shard - 1) / plan.shard
    transfers = moved / _bandwidth(plan, plan.shard)
    if plan.replicate > 1:
        copies = _bandwidth(plan, n_gpus, one_of_each_node=True)
        transfers += 2 * 4 * local * (plan.replicate - 1) / plan.replicate / copies
    return {
        "products": flops / (min(n_gpus, options.batch_size) * peak * known.training),  # an item is not divided
        "transfers": transfers,
        "optimizer": OPTIMIZER_BYTES[options.moments] * local / (gpu.memory_gbs * 1e9 * known.decode),
    }


def step_total(seconds: Parts) -> float:
    """Seconds of a step whose products and transfers overlap."""
    return max(seconds["products"], seconds["transfers"]) + seconds["optimizer"]


def _bandwidth(plan: Plan, n_ranks: int, *, one_of_each_node: bool = False) -> float:
    """Bytes per second that a GPU gets of a collective among consecutive ranks, or among one rank of each node.

    Rings through several nodes use all network adapters of a node at a time, one adapter a GPU.
    """
    gpu, per_node = plan.machine.gpu, plan.machine.per_node
    outside = gpu.network_gbs * (1 if one_of_each_node else per_node)
    link = gpu.link_gbs if n_ranks <= per_node else min(gpu.link_gbs, outside)
    return link * 1e9 * plan.assumptions.network


def generation_seconds(plan: Plan, n_texts: float, tokens: float, prompt_tokens: float, n_prompts: float) -> float:
    """Seconds in which all replicas of the engine read `n_prompts` prompts and write `tokens` for each of `n_texts`.

    A step of a replica reads its weights and all cached keys and values once; the batch is what fits into the cache.
    """
    gpu, known, engine = plan.machine.gpu, plan.assumptions, plan.config.engine
    degree = engine.tensor_parallel if engine.name == "vllm" else 1
    replicas = plan.machine.n_gpus // degree
    context = prompt_tokens + tokens / 2
    held = plan.generating()["keys and values"] / (plan.cache_per_token * context)
    batch = max(1.0, min(engine.max_batch, held, n_texts / replicas))
    read = (plan.engine_weights + batch * context * plan.cache_per_token) / (gpu.memory_gbs * 1e9 * known.decode)
    products = 2 * plan.n_parameters * batch / degree / (gpu.tflops * 1e12 * known.prefill)
    written = n_texts / replicas / batch * tokens * max(read, products)
    flops = 2 * plan.n_parameters * n_prompts * prompt_tokens
    return written + flops / (plan.machine.n_gpus * gpu.tflops * 1e12 * known.prefill)


def reference_seconds(plan: Plan) -> float:
    """Seconds of a forward pass over the pairs of all prompts, in full micro-batches."""
    gpu, known, n_gpus = plan.machine.gpu, plan.assumptions, plan.machine.n_gpus
    tokens = plan.config.prompts.count * (known.prompt_tokens + 2 * known.answer_tokens)
    products = 2 * plan.n_parameters * tokens / (n_gpus * gpu.tflops * 1e12 * known.training)
    passes = math.ceil(tokens / n_gpus / plan.config.dpo.tokens_per_microbatch)
    gathered = passes * plan.n_parameters * plan.itemsize * (plan.shard - 1) / plan.shard
    return max(products, gathered / _bandwidth(plan, plan.shard))


def iteration_seconds(plan: Plan) -> dict[str, float]:
    """Seconds of the phases of an iteration in which every prompt gives a pair."""
    known, config = plan.assumptions, plan.config
    prompts, answers = config.prompts.count, config.prompts.count * config.candidates.n
    judged = known.judge_prompt_tokens + known.prompt_tokens + known.answer_tokens
    steps = math.ceil(prompts / config.dpo.batch_size) * config.dpo.epochs
    phases = {
        "answers": generation_seconds(plan, answers, known.answer_tokens, known.prompt_tokens, prompts),
        "judgements": generation_seconds(plan, answers * config.judge.n, known.judgement_tokens, judged, answers),
        "reference log-probs": reference_seconds(plan),
        "training": min(steps, config.dpo.max_steps or steps) * step_total(step_seconds(plan, "dpo")),
    }
    if config.reference.source != "forward":
        del phases["reference log-probs"]
    return phases
