"""DeepSpeed's ZeRO-1, 2 and 3 as a `Sharding`; the package is imported when parallel.backend=deepspeed asks for it.

Stage 1 divides the optimizer's state among the processes, 2 the gradients too, 3 the parameters too. In stage 3 a
process keeps flat fp32 shards, which are gathered in the dtype of computation, as with FSDP2. In stages 1 and 2 it has
the whole model in the dtype of computation, beside its part of the fp32 weights.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.parallel.fsdp2 import compute_dtype
from srlm_fast.parallel.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 2 * 10**8
"""Elements of gradients that are reduced together, at most."""


def check_zero(n_ranks: int, options: ParallelConfig, moments: Sequence[str] = (), *, lora: int = 0) -> None:
    """Refuses what this backend does not do.

    Raises:
        UserError: for keys of FSDP2 or the compiler, recomputation by operator in stage 3, moments that are not fp32,
            adapters, one process, or a package that is not installed.
    """
    default = ParallelConfig()
    names = ("shard", "replicate", "reshard", "reduce", "compile")
    foreign = [name for name in names if getattr(options, name) != getattr(default, name)]
    if foreign:
        shown = ", ".join(f"parallel.{name}={getattr(options, name)}" for name in foreign)
        raise UserError(f"{shown}: not with parallel.backend=deepspeed; leave it out or use parallel.backend=fsdp2")
    if options.zero_stage == 3 and options.checkpointing == "selective":
        raise UserError(
            "parallel.checkpointing=selective: not with parallel.backend=deepspeed and parallel.zero_stage=3, "
            "whose gathering differs when a block runs again; use parallel.checkpointing=full or parallel.backend=fsdp2"
        )
    if lora:
        raise UserError(f"lora.rank={lora}: not with parallel.backend=deepspeed; use parallel.backend=fsdp2")
    for kind in moments:
        if kind != "fp32":
            raise UserError(f"moments={kind}: parallel.backend=deepspeed has fp32 moments only; use fsdp2")
    if n_ranks == 1:
        raise UserError(
            "parallel.backend=deepspeed divides a model among processes, here is one; start several with torchrun or "
            "use parallel.backend=fsdp2"
        )
    if find_spec("deepspeed") is None:
        raise UserError(
            "parallel.backend=deepspeed needs the package deepspeed; install it into the environment that has torch: "
            "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        )


def zero(model: Llama, world: World, options: ParallelConfig) -> nn.Module:
    """Divides a model, on any device, by ZeRO: it gets a `Zero` as its `sharding`. Raises UserError as `check_zero`."""
    check_zero(world.size, options, lora=getattr(getattr(model, "lora", None), "rank", 0))
    model.sharding = Zero(model, world, options)
    return model


@functools.cache
def _package() -> Any:
    """DeepSpeed, on the kind of device that this process computes on, upon the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # It calls two functions of torch by the names they had before 2.13, some thousand times a step.
    warnings.filterwarnings("ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)
    import deepspeed

    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # the kernels'
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # CPU: it would compile collectives of its own
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Zero:
    """The `Sharding` of a model divided by ZeRO.

    A model that is not trained (yet, or any more) has no optimizer: stage 3 then has an engine that only gathers,
    stages 1 and 2 have none. In bf16 these two hold the fp32 weights on the host until training begins.
    """

    def __init__(self, model: Llama, world: World, options: ParallelConfig) -> None:
        self.model, self.world, self.options, self.stage = model, world, options, options.zero_stage
        self.dtype = compute_dtype(world.device, options)
        self.deepspeed = _package()
        self.optimizer: Optimizer | None = None
        self._groups: list[list[str]] = []
        self._fp32: dict[str, Tensor] = {}  # stages 1 and 2 in bf16, before training
        self._engine: Any = None
        if self.stage == 3:
            self._partition()
            self._start(None)
        elif self.dtype != torch.float32:
            model.register_forward_pre_hook(lambda *_: self._cast())

    # -------------------------------------------------------------------------------------------------------- engines

    def _config(self) -> dict[str, Any]:
        overlap = self.world.device.type == "cuda"
        return {
            "train_micro_batch_size_per_gpu": 1,  # said again by the trainer, batch by batch
            "gradient_accumulation_steps": 1,
            "steps_per_print": None,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self.stage < 3 and self.dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,  # the kernels' AdamW
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": overlap,
                "contiguous_gradients": True,
                "reduce_bucket_size": min(_BUCKET, sum(math.prod(s) for s in self.shapes().values())),
                "memory_efficient_linear": False,  # it replaces torch's for the whole process
                "stage3_param_persistence_threshold": self.model.config.hidden_size,  # norms stay whole
            },
        }

    def _partition(self) -> None:
        """Makes each parameter a shard, one after the other; what comes from the meta device is not filled."""
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(old) not in made:
                    new = nn.Parameter(torch.empty_like(old, device=self.world.device)) if old.is_meta else old
                    if self.dtype != torch.float32:
                        new.comm_dtype = self.dtype  # DeepSpeed gathers it so; its shard stays fp32
                    holder = nn.ParameterList([new])
                    self.deepspeed.zero.Init(module=holder, config_dict_or_path=self._config(), dtype=torch.float32)
                    made[id(old)] = new
                setattr(module, name, made[id(old)])
        self.deepspeed.zero.register_external_parameter(self.model, self.model.lm_head.weight)

    def _start(self, optimizer: Optimizer | None) -> None:
        """An engine around the model, with an optimizer or, in stage 3, to gather only."""
        self._stop()
        self._engine, *_ = self.deepspeed.initialize(model=self.model, optimizer=optimizer, config=self._config())
        if self.stage == 3:
            _keep_no_model(self._engine.optimizer)

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine.module_forward_pre_hook.remove()
            self._engine.module_forward_post_hook.remove()
            for parameter in self.model.parameters():
                for name in ("_hp_mapping", "_z3_optimizer", "_zero_optimizer"):  # they hold what is to be freed
                    parameter.__dict__.pop(name, None)
        self._engine = None

    def _cast(self) -> None:
        """Stages 1 and 2: the model in the dtype of computation; its fp32 weights wait on the host."""
        for name, parameter in self.model.named_parameters():
            if parameter.dtype == torch.float32:
                self._fp32[name] = parameter.detach().to("cpu", copy=True)
                parameter.data = parameter.data.to(self.dtype)

    def _uncast(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self._fp32:
                parameter.data = self._fp32.pop(name).to(self.world.device)

    # -------------------------------------------------------------------------------------------------------- tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters()}

    def parts(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        if self.stage < 3:
            assert self.optimizer is None, "weights are loaded before training"
            self._uncast()
            yield parameter.data, tuple(slice(0, size) for size in parameter.shape)
            return
        flat, start, stop = self._range(parameter)
        if parameter.ds_shape.numel() == parameter.ds_shape[0]:  # one dimension
            yield flat, (slice(start, stop),)
            return
        width = parameter.ds_shape[1]
        while start < stop:  # the rest of a row, whole rows, the beginning of a row
            row, column = divmod(start, width)
            n_rows = 1 if column or stop - start < width else (stop - start) // width
            n_columns = min(width - column, stop - start) if n_rows == 1 else width
            part, flat = flat.split((n_rows * n_columns, flat.numel() - n_rows * n_columns))
            yield part.view(n_rows, n_columns), (slice(row, row + n_rows), slice(column, column + n_columns))
            start += n_rows * n_columns

    def _range(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        """Stage 3: the part of the flat parameter that lies here, without the padding, and where it begins and ends."""
        shard = parameter.ds_tensor.data
        start = min(self.world.rank * shard.numel(), parameter.ds_numel)
        stop = min(start + shard.numel(), parameter.ds_numel)
        return shard[: stop - start], start, stop

    def whole(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        if self.stage == 3:
            shard = parameter.ds_tensor.data.to(dtype)  # before it is gathered: half the bytes on the way
            gathered = shard.new_empty(self.world.size * shard.numel())
            dist.all_gather(list(gathered.split(shard.numel())), shard)
            return gathered[: parameter.ds_numel].view(parameter.ds_shape)
        if self.optimizer is not None and self.dtype != torch.float32:
            return self.deepspeed.utils.safe_get_full_fp32_param(parameter).to(dtype)
        for name, other in self.model.named_parameters():
            if other is parameter and name in self._fp32:
                return self._fp32[name].to(parameter.device, dtype)
        return parameter.detach().to(dtype)

    def reshard(self) -> None:
        if self.stage == 3:
            self._engine.empty_partition_cache()

    # ------------------------------------------------------------------------------------------------------- training

    def begin(self, optimizer: Optimizer) -> None:
        own = "fp32" if type(optimizer) is torch.optim.AdamW else type(optimizer).__name__
        check_zero(self.world.size, self.options, [getattr(optimizer, "moments", own)])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        if self.stage < 3 and self.dtype != torch.float32:
            self._cast()
        self._start(optimizer)
        self.optimizer = optimizer
        for name, parameter in self.model.named_parameters():
            if name in self._fp32:
                fp32 = self._fp32.pop(name).to(self.world.device)
                self.deepspeed.utils.safe_set_full_fp32_param(parameter, fp32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self._engine if torch.is_grad_enabled() and self.optimizer is not None else self.model
        return run(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed takes the mean over the ranks

    def clip(self, most: float) -> float:
        zero_optimizer = self._engine.optimizer
        zero_optimizer.clip_grad = most if math.isfinite(most) else 0.0
        return float(_norm(zero_optimizer))

    def step(self) -> None:
        self._engine.step()

    def discard(self) -> None:
        _forget_gradient(self._engine.optimizer)

    def end(self) -> None:
        self.optimizer = None
        self._stop()
        if self.stage == 3:
            self._start(None)

    # ---------------------------------------------------------------------------------------------------------- state

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (self.world.size,))
        parameters = dict(self.model.named_parameters())
        found: dict[str, Any] = {
            "model": {name: self._rows(self.whole(p, torch.float32), mesh) for name, p in parameters.items()}
        }
        if optimizer:
            read = self.deepspeed.utils.safe_get_full_optimizer_state
            step = self._moments()
            states = {
                name: {"step": step.clone()} | {key: self._rows(read(p, key), mesh) for key in _MOMENTS}
                for name, p in parameters.items()
            }
            groups = [{**group, "params": names} for group, names in zip(self.optimizer.param_groups, self._groups)]
            found["optimizer"] = {"state": states, "param_groups": groups}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            self._write(parameter, state["model"][name])
            for key in _MOMENTS if "optimizer" in state else ():
                self._write(parameter, state["optimizer"]["state"][name][key], key)
        if "optimizer" in state:
            (step,) = {float(moments["step"]) for moments in state["optimizer"]["state"].values()}
            for moments in self.optimizer.state.values():
                moments["step"].fill_(step)

    def _rows(self, whole: Tensor, mesh: DeviceMesh) -> DTensor:
        """This rank's rows of a tensor, on the host, divided as FSDP2 divides it."""
        n_rows = math.ceil(whole.shape[0] / self.world.size)
        mine = whole[self.world.rank * n_rows :][:n_rows].to("cpu", copy=True)
        return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())

    def _write(self, parameter: nn.Parameter, rows: DTensor, key: str | None = None) -> None:
        """Puts a parameter, or one of its moments, in its place; collective."""
        utils, whole = self.deepspeed.utils, rows.full_tensor().to(self.world.device)
        if self.stage < 3 and key:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        elif self.stage < 3:
            utils.safe_set_full_fp32_param(parameter, whole)
            parameter.data.copy_(whole)
        else:
            shard, start, stop = self._range(parameter)
            mine = F.pad(whole.flatten()[start:stop], (0, parameter.ds_tensor.numel() - (stop - start)))
            if key:
                utils.safe_set_local_optimizer_state(parameter, mine, key)
            else:
                utils.safe_set_local_fp32_param(parameter, mine)
                shard.copy_(mine[: stop - start])  # the optimizer's fp32 weights are a copy of it

    def _moments(self) -> Tensor:
        """The optimizer's count of steps; where there was none yet, its state is made."""
        zero_optimizer = self._engine.optimizer
        flat = _fp32_partitions(zero_optimizer)
        for partition in flat:
            if not self.optimizer.state[partition]:
                moments = {key: torch.zeros_like(partition) for key in _MOMENTS}
                self.optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if self.stage < 3:
            zero_optimizer._hp_optimizer_states_linked = False  # it links in the first group's step, before others'
            zero_optimizer._lazy_init_hp_params_optimizer_state()
        return self.optimizer.state[flat[0]]["step"]


def _keep_no_model(optimizer: Any) -> None:
    """Stage 3: takes a model out of two places from which it would never go, a list and the cache of a method."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = getattr(optimizer, "parameter_offload", optimizer).param_coordinator
    name = "_PartitionedParameterCoordinator__params_to_release"
    cached = inspect.getclosurevars(getattr(type(coordinator), name)).nonlocals.get("func")
    if hasattr(cached, "cache_clear"):  # one cache for all models: each gets its own
        setattr(
            coordinator, name, functools.lru_cache(maxsize=None)(functools.partial(cached.__wrapped__, coordinator))
        )


def _fp32_partitions(optimizer: Any) -> list[Tensor]:
    """This rank's flat fp32 weights, which the optimizer inside updates."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _norm(optimizer: Any) -> float | Tensor:
    """Norm of the whole gradient, between the last backward pass of a step and the step."""
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    if hasattr(optimizer, "scaled_global_norm"):
        return optimizer.scaled_global_norm()
    if hasattr(optimizer, "get_grads_for_norm"):
        return get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0])
    return combine_grad_norm_groups(optimizer._get_norm_groups())


def _forget_gradient(optimizer: Any) -> None:
    """What DeepSpeed does itself when a gradient has overflowed."""
    if hasattr(optimizer, "clear_hp_grads"):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    elif hasattr(optimizer, "_overflow_clean_up"):
        optimizer._pre_step()
        optimizer._overflow_clean_up(1.0)
    else:
        optimizer.micro_step_id = -1
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
