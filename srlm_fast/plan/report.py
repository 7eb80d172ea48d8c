"""A plan as Markdown: tables of memory and time, what to change, what was assumed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from srlm_fast import checkpoint
from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.model import LlamaConfig
from srlm_fast.plan.memory import GIB, Plan
from srlm_fast.plan.time import iteration_seconds, step_seconds, step_total


def read_shape(config: Config, name: str | None = None) -> LlamaConfig:
    """The shape of the model: a published one by its name, or that of model.path.

    Raises:
        UserError: when there is neither, or it cannot be read.
    """
    if name:
        return LlamaConfig.named(name)
    if not config.model.path:
        raise UserError("model.path is empty: name a folder with config.json, or a size by --model")
    return checkpoint.read_config(Path(config.model.path))


def report(plan: Plan) -> str:
    """Markdown: one table of memory, the levers where it does not fit, times, assumptions."""
    machine, parallel = plan.machine, plan.config.parallel
    lines = [
        f"{plan.n_parameters:,} parameters on {machine.n_gpus} x {machine.name} ({machine.gpu.memory_gib} GiB usable "
        f"each): {plan.replicate} x {plan.shard} (replicate x shard), {str(plan.dtype).removeprefix('torch.')}, "
        f"checkpointing {parallel.checkpointing}, {_adapters(plan)}reduce {parallel.reduce}, moments "
        f"{plan.config.dpo.moments}; "
        + ", ".join("{} {} x {:,} tokens".format(name, *reversed(plan.microbatch(name))) for name in ("sft", "dpo"))
        + " a step and GPU at most.",
        "",
        *_memory_table(plan),
        "",
        *_verdict(plan),
    ]
    heading = "Times:"
    if plan.room < 0 <= plan.levers()[1].room:
        heading, plan = "Times with these changes:", plan.levers()[1]
    return "\n".join([*lines, "", heading, "", *_time_table(plan), *_faster(plan), "", *_assumed(plan)])


def _adapters(plan: Plan) -> str:
    if not plan.n_adapters:
        return ""
    return f"adapters of rank {plan.config.lora.rank} with {plan.n_trained:,} parameters, "


def _memory_table(plan: Plan) -> list[str]:
    memory = plan.memory()
    names = list(dict.fromkeys(part for parts in memory.values() for part, value in parts.items() if value))
    rows = [f"| GiB per GPU | {' | '.join(memory)} |", "|---" * (len(memory) + 1) + "|"]
    for name in names:
        cells = (f"{parts[name] / GIB:.1f}" if parts.get(name) else "" for parts in memory.values())
        rows.append(f"| {name} | {' | '.join(cells)} |")
    totals = {phase: sum(parts.values()) / GIB for phase, parts in memory.items()}
    rows.append(f"| **sum** | {' | '.join(f'**{total:.1f}**' for total in totals.values())} |")
    left = (plan.machine.gpu.memory_gib - total for total in totals.values())
    rows.append(f"| left | {' | '.join(f'{value:.1f}' if value >= 0 else f'{value:.1f} **no**' for value in left)} |")
    return rows


def _verdict(plan: Plan) -> list[str]:
    if plan.room >= 0:
        return ["It fits."]
    taken, fitting = plan.levers()
    missing = f"{-fitting.room / GIB:.1f} GiB are missing: take more GPUs, or larger ones."
    if not taken:
        return [f"It does not fit, and no key makes it: {missing}"]
    changes = {name: value for change in taken for name, value in change.items()}
    shown = ", ".join(f"`{name}={_yaml(value)}`" for name, value in changes.items())
    if fitting.room < 0:
        return [f"It does not fit. With {shown} still {missing}"]
    return [f"It does not fit. With {shown} it does, with {fitting.room / GIB:.1f} GiB left in the fullest phase."]


def _faster(plan: Plan) -> list[str]:
    """A hint where GPUs wait for the network."""
    seconds, per_node = step_seconds(plan, "dpo"), plan.machine.per_node
    if seconds["transfers"] < 2 * seconds["products"]:
        return []
    lines = [
        f"Transfers take {seconds['transfers'] / seconds['products']:.1f} times as long as products: a batch of "
        f"{plan.config.dpo.batch_size} pairs is small for {plan.machine.n_gpus} GPUs. A larger `dpo.batch_size` costs "
        "no more of them."
    ]
    if plan.shard > per_node and plan.machine.n_gpus % per_node == 0:
        changes = {"parallel.shard": per_node, "parallel.replicate": plan.machine.n_gpus // per_node}
        other = plan.with_keys(changes)
        if other.room >= 0 and step_total(step_seconds(other, "dpo")) < step_total(seconds):
            lines.append(
                f"With {', '.join(f'`{name}={value}`' for name, value in changes.items())} it fits too, and a step "
                f"takes {step_total(step_seconds(other, 'dpo')):.2f} s."
            )
    return ["", " ".join(lines)]


def _yaml(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _time_table(plan: Plan) -> list[str]:
    rows = ["| seconds | products | transfers | optimizer | a step |", "|---|---|---|---|---|"]
    for section in ("sft", "dpo"):
        parts = step_seconds(plan, section)
        cells = " | ".join(f"{value:.2f}" for value in (*parts.values(), step_total(parts)))
        rows.append(f"| step of {section} | {cells} |")
    phases = iteration_seconds(plan)
    rows += ["", f"| minutes | {' | '.join(phases)} | an iteration |", "|---" * (len(phases) + 2) + "|"]
    cells = " | ".join(f"{value / 60:.1f}" for value in (*phases.values(), sum(phases.values())))
    return [*rows, f"| {plan.config.prompts.count:,} prompts | {cells} |"]


def _assumed(plan: Plan) -> list[str]:
    values = ", ".join(f"{name}={value:g}" for name, value in asdict(plan.assumptions).items())
    return [f"Assumed: {values}. Memory is for items as long as the configuration allows, times for these lengths."]
