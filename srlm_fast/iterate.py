"""The driver: M0 -> SFT baseline -> M1 -> M2 -> M3 ..., the only file that knows the order of the phases.

    prepare            IFT examples; ranked prompts for EFT, divided into train and eval
    sft/train          SFT baseline: M0 on IFT
    eft/judge          the baseline judges the ranked replies
    eft/select         judgements that agree with the humans become EFT examples
    m1/train           M1: M0 on IFT + EFT
    mT/prompts         new prompts
    mT/candidates      M_T answers them and judges its own answers
    ...                what a follow-up method adds (`_additions`)
    mT/pairs           best answers against worst
    mT/reference       log-probs of the pairs under the reference
    m(T+1)/train       DPO from M_T
    NAME/evaluate      held-out answers and judge metrics of every model

The paper's ablations: without eft.enabled there is no eft/, and M1 learns from IFT alone; with learn_from=positives
mT/positives and SFT from M0 take the place of mT/pairs, mT/reference and DPO.

A phase is a function from files to files; the run folder says which are done, and resuming skips those. All ranks run
this file in step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from srlm_fast import data_card, guards
from srlm_fast.config import Config
from srlm_fast.context import Context
from srlm_fast.errors import UserError
from srlm_fast.opening import open_run
from srlm_fast.parallel import World
from srlm_fast.phases import PhaseResult, data, evaluation, generation, meta_judging, pairing, training
from srlm_fast.rundir import RunDir

Phase = Callable[[Context], PhaseResult]


def phases(config: Config) -> list[tuple[str, Phase]]:
    """(name, function) of every phase, in order."""

    def model(name: str, train: Phase) -> list[tuple[str, Phase]]:
        return [(f"{name}/train", train), (f"{name}/evaluate", partial(evaluation.evaluate, name=name))]

    order: list[tuple[str, Phase]] = [
        ("prepare", data.prepare),
        *model("sft", partial(training.sft, name="sft", sources=("data/ift.jsonl",))),
    ]
    seed_data = ["data/ift.jsonl"]
    if config.eft.enabled:
        order += [("eft/judge", generation.judge_eft), ("eft/select", generation.select_eft)]
        seed_data.append("eft/train.jsonl")
    order += model("m1", partial(training.sft, name="m1", sources=tuple(seed_data)))
    for t in range(1, config.iterations + 1):
        order += [
            (f"m{t}/prompts", partial(generation.new_prompts, t=t)),
            (f"m{t}/candidates", partial(generation.candidates, t=t)),
        ]
        if config.learn_from == "positives":
            sources = (*seed_data, *(f"m{i}/positives.jsonl" for i in range(1, t + 1)))
            order += [
                (f"m{t}/positives", partial(pairing.positives, t=t)),
                *model(f"m{t + 1}", partial(training.sft, name=f"m{t + 1}", sources=sources)),
            ]
            continue
        order += [
            *_additions(config, t),
            (f"m{t}/pairs", partial(pairing.make_pairs, t=t)),
            (f"m{t}/reference", partial(training.reference, t=t)),
            *model(f"m{t + 1}", partial(training.dpo, t=t)),
        ]
    return order


def _additions(config: Config, t: int) -> list[tuple[str, Phase]]:
    """What the follow-up methods that are on do between candidates and pairs (docs/methods.md)."""

    def answers(kind: str) -> list[tuple[str, Phase]]:
        return [
            (f"m{t}/{kind}", partial(pairing.other_answers, t=t, kind=kind)),
            (f"m{t}/{kind}_judged", partial(pairing.judge_others, t=t, kind=kind)),
        ]

    added: list[tuple[str, Phase]] = []
    if config.meta_judge.enabled and t <= config.meta_judge.iterations:
        added.append((f"m{t}/comparisons", partial(meta_judging.compare, t=t)))
    if config.pairs.labels == "previous":
        added.append((f"m{t}/previous", partial(pairing.judge_previous, t=t)))
    if config.temporal.anchor is not None:
        added += answers("past")
    if config.temporal.future:
        added += [
            (f"m{t}/draft_pairs", partial(pairing.make_pairs, t=t, draft=True)),
            (f"m{t}/draft_reference", partial(training.reference, t=t, draft=True)),
            (f"m{t}f/train", partial(training.dpo, t=t, draft=True)),
            *answers("future"),
        ]
    return added


def iterate(config: Config, world: World) -> Context:
    """Run every phase that is not done yet.

    Raises:
        UserError: for bad input, before any work starts.
        Interrupted: on a signal or before save_by, when what is finished has been written.
    """
    run = Context(config, world)
    run.main(lambda: open_run(run.run_dir, config))
    with run.stopping.listening(), run.run_dir.at_work(world.is_main):
        for name, phase in phases(config):
            _run_phase(run, name, phase)
        run.close()
    return run


def _run_phase(run: Context, name: str, phase: Phase) -> None:
    """One phase, unless it is done; recorded when all ranks have finished."""
    if run.main(lambda: run.run_dir.phase(name)) is not None:
        run.main(lambda: _stop_if_guarded(run, name))
        return
    run.check_stop(together=True)
    run.main(lambda: run.run_dir.discard_changed(name))
    started = time.perf_counter()
    outputs, counts = phase(run)
    run.world.barrier()
    seconds = time.perf_counter() - started

    def finish() -> None:
        run.run_dir.finish(name, outputs, seconds, counts)
        data_card.write(run.run_dir)
        crossed = guards.check(name, run.run_dir.counts, run.config.guards)
        found = {"guards": {finding.guard: finding.value for finding in crossed}} if crossed else {}
        run.run_dir.log({"phase": name, "seconds": round(seconds, 3), **counts, **found})
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in counts.items()
        )
        print(f"[{seconds:6.1f} s] {name}: {shown}", flush=True)
        for finding in crossed:
            print(f"           warning: {finding.text}", flush=True)
        _stop_if_guarded(run, name)

    run.main(finish)


def _stop_if_guarded(run: Context, name: str) -> None:
    """Raise UserError where guards.action=stop and a bound is crossed by a phase that is done."""
    if run.config.guards.action != "stop":
        return
    if crossed := guards.check(name, run.run_dir.counts, run.config.guards):
        raise UserError(
            f"stopped behind {name}, which is done and kept: {'. '.join(finding.text for finding in crossed)}. Look at "
            f"the run; then raise the bound (guards.{crossed[0].guard}=...), or give guards.action=warn, to go on"
        )


def status(config: Config) -> str:
    """Where a run is: every phase with its seconds, and how far the one in progress has come. Changes nothing."""
    run_dir = RunDir(config.run_dir)
    lines, pending = [], 0
    for name, _ in phases(config):
        record = run_dir.phase(name)
        if record is not None:
            lines.append(f"  done     {name:<16} {record['seconds']:9.1f} s")
            continue
        pending += 1
        state, part = ("next", _partial(run_dir, name)) if pending == 1 else ("pending", "")
        lines.append(f"  {state:<8} {name:<16} {part}".rstrip())
    return "\n".join([f"{run_dir.path}: {len(lines) - pending} of {len(lines)} phases done", *lines])


def _partial(run_dir: RunDir, name: str) -> str:
    """What an unfinished phase has on disk already."""
    model, _, kind = name.partition("/")
    if kind == "train":
        steps = [path.name for path in (run_dir / f"checkpoints/{model}").glob("step-*")]
        return f"checkpoint {max(steps, key=lambda s: int(s[5:]))}" if steps else ""
    folders = (f"{model}/answers", f"{model}/judgements") if kind == "evaluate" else (name,)
    unit = "round" if kind == "prompts" else "shard"
    n_files = sum(len(list((run_dir / folder).glob(f"{unit}-*.jsonl"))) for folder in folders)
    return f"{n_files} {unit}s" if n_files else ""
