"""Memory and time of a run on GPUs, before anything is started.

    plan = Plan(config, shape, Machine.parse("16xH100-80"))
    print(report(plan))

| module | what is there |
| --- | --- |
| `machine` | data sheets of GPUs, machines, what has to be assumed |
| `memory` | `Plan`: bytes of a GPU by phase and part, and which keys to change until they fit |
| `time` | seconds of a step and of an iteration |
| `report` | both as Markdown |
"""

from srlm_fast.plan.machine import GPUS, Assumptions, Machine
from srlm_fast.plan.memory import Plan
from srlm_fast.plan.report import read_shape, report
from srlm_fast.plan.time import iteration_seconds, step_seconds

__all__ = ["GPUS", "Assumptions", "Machine", "Plan", "iteration_seconds", "read_shape", "report", "step_seconds"]
