"""DeepSpeed's ZeRO for Lightning: CPU too, atomic checkpoints, and the master weights' averages.

Vocabulary: ZeRO divides among N processes the optimiser's state and the float32 *master* weights
that it updates (stage 1), gradients too (stage 2), and the module's own weights too (stage 3).
A process's part of the masters is its *shard*: one flat tensor per group of parameters.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from percov2.training.autoencoder_stage import AutoencoderStage
from percov2.training.checkpointing import (
    AtomicCheckpointIO,
    ShardRecord,
    explain_failed_save,
    hidden_path,
    remove_leftovers,
    replace_folder,
    sync_files,
)
from percov2.training.entropy_stage import EntropyStage

AVERAGE = "average"
"""Key of the weights' average in a checkpoint, and its folder in a sharded one."""
WEIGHTS = "checkpoint"
"""Lightning's name for the folder of DeepSpeed's files in a sharded checkpoint."""


class AutocastPrecision(DeepSpeedPrecision):
    """``bf16-mixed`` as under every other strategy: float32 weights and inputs, autocast forward.

    Lightning's own would turn all weights and pictures to bfloat16, those of the frozen entropy
    model too.
    """

    def convert_input(self, data: Any) -> Any:
        """Inputs stay as they are."""
        return data


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO-1, -2 or -3 with everything that Lightning's strategy offers, and:

    - it runs on CPUs as well (gloo; set ``DS_ACCELERATOR=cpu``), for tests;
    - a checkpoint is written under a hidden name and renamed by the first process once all have
      finished;
    - `master_weights` and `publish_master_weights` let a callback work on the shards;
    - ``precision: bf16-mixed`` keeps float32 weights (`AutocastPrecision`).

    Args:
        stage: of ZeRO.
        stage3_max_live_parameters: values that a process may hold gathered at a time (stage 3);
            weights are let go after use when there would be more. None, as in the two that
            follow, is DeepSpeed's choice.
        stage3_max_reuse_distance: weights that are used again within so many values are kept.
        stage3_prefetch_bucket_size: values fetched ahead of their use.
        logging_batch_size_per_gpu: for DeepSpeed's own log; Lightning's default would build the
            training data once more to find it.
        **kwargs: of Lightning's `DeepSpeedStrategy`: ``offload_optimizer``,
            ``offload_parameters``, bucket sizes and so on.

    Raises:
        ValueError: deepspeed is not installed, the stage does not exist, or an option of stage 3
            goes with another one.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        stage3_max_live_parameters: int | None = None,
        stage3_max_reuse_distance: int | None = None,
        stage3_prefetch_bucket_size: int | None = None,
        logging_batch_size_per_gpu: int = 1,
        **kwargs: Any,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("ZeroStrategy needs deepspeed: pip install '.[deepspeed]'")
        if stage not in (1, 2, 3):
            raise ValueError(f"stage is {stage}: ZeRO has the stages 1, 2 and 3")
        gathering = {
            "stage3_max_live_parameters": stage3_max_live_parameters,
            "stage3_max_reuse_distance": stage3_max_reuse_distance,
            "stage3_prefetch_bucket_size": stage3_prefetch_bucket_size,
        }
        gathering = {name: value for name, value in gathering.items() if value is not None}
        if gathering and stage != 3:
            raise ValueError(
                f"{', '.join(gathering)} is for stage 3, stage is {stage}: leave it out"
            )
        super().__init__(
            stage=stage, logging_batch_size_per_gpu=logging_batch_size_per_gpu, **kwargs
        )
        assert isinstance(self.config, dict)
        self.config["zero_optimization"] |= gathering
        # Offloading works with any optimiser; DeepSpeed would insist on its own.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self._skeleton: L.LightningModule | None = None

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3."""
        assert isinstance(self.config, dict)
        return int(self.config["zero_optimization"]["stage"])

    # --- Set-up ------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the processes; CPUs are welcome.

        Raises:
            ValueError: on CPUs without ``DS_ACCELERATOR=cpu``, a stage that sets its weights
                itself, or an unsuitable precision.
        """
        self._check()
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            raise ValueError(
                f"ZeroStrategy on {type(self.accelerator).__name__}: set the environment variable "
                "DS_ACCELERATOR=cpu before the start (for tests; training needs CUDA)"
            )
        import deepspeed

        # Else DeepSpeed would compile its shared-memory collectives first; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def _check(self) -> None:
        module = self.lightning_module
        if isinstance(module, AutoencoderStage | EntropyStage):
            raise ValueError(
                f"{type(module).__name__} sets weights itself, which ZeRO's master copies would "
                "not see, and has few of them: train it with configs/strategy/ddp.yaml"
            )
        precision = self.precision_plugin.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision is {precision}: ZeroStrategy takes bf16-mixed or 32-true, "
                "since the entropy model's weights must stay float32"
            )
        if precision == "bf16-mixed":
            self.precision_plugin = AutocastPrecision(precision)

    def setup(self, trainer: L.Trainer) -> None:
        """Build DeepSpeed's engine, which sends and flattens contiguous weights only."""
        assert self.lightning_module is not None
        self.lightning_module.to(memory_format=torch.contiguous_format)
        if self.zero_stage == 3:
            self._skeleton = _without_weights(self.lightning_module)
        super().setup(trainer)
        if self.zero_stage < 3:
            self._save_frozen_weights_once()

    def _save_frozen_weights_once(self) -> None:
        """In a checkpoint, frozen weights are the module's, and once more for `zero_to_fp32`.

        DeepSpeed copies them to the main memory for that, on every process, and the file gets
        both. What shares its memory is written once.
        """
        engine = self.deepspeed_engine
        assert hasattr(engine, "_get_param_fragment_func"), "DeepSpeed has renamed it"
        engine._get_param_fragment_func = Tensor.detach

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        if self.precision_plugin.precision == "bf16-mixed":
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            self.config["bf16"] = {"enabled": False}  # or Lightning would enable it
        super()._format_config()

    # --- Master weights ----------------------------------------------------------------------

    def master_weights(self) -> list[Tensor]:
        """This process's shards, flat float32 tensors that may be changed in place.

        Raises:
            ValueError: they lie on an NVMe disk.
        """
        optimizer: Any = self.optimizers[0]
        if self.zero_stage < 3:
            shards = optimizer.single_partition_of_fp32_groups
        elif optimizer.swap_optimizer:
            raise ValueError(
                "WeightEMA cannot reach weights on an NVMe disk: use offload_optimizer_device cpu, "
                "or remove WeightEMA"
            )
        else:
            shards = optimizer.fp32_partitioned_groups_flat
        return [shard.data for shard in shards]

    def publish_master_weights(self) -> None:
        """Bring changed shards into the module's weights. All processes must call it."""
        optimizer: Any = self.optimizers[0]
        if self.zero_stage < 3:
            optimizer.update_lp_params()
            for group in range(len(optimizer.bit16_groups)):
                optimizer._update_model_bit16_weights(group)
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers the small weights that stay whole

    def whole_module(self) -> L.LightningModule | None:
        """The module with all its weights, to be exported by the first process.

        Under ZeRO-3 that is another one in the first process's main memory, filled tensor by
        tensor.
        All processes must call it.

        Returns:
            None on every process but the first.
        """
        import deepspeed

        live = self.lightning_module
        assert live is not None
        if self.zero_stage < 3:
            return live if self.is_global_zero else None
        assert self._skeleton is not None
        whole = self._skeleton if self.is_global_zero else None
        for name, weight in live.named_parameters():
            with deepspeed.zero.GatheredParameters([weight]):
                if whole is not None:
                    value = weight.detach().cpu().clone()
                    _put(whole, name, nn.Parameter(value, requires_grad=weight.requires_grad))
        if whole is not None:
            for name, buffer in live.named_buffers():
                _put(whole, name, buffer.cpu().clone())
        return whole

    # --- Checkpoints -------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a folder with every process's shard; it takes its name when all is on disk.

        Raises:
            ValueError: the disk is full or the folder cannot be written to.
        """
        target = Path(self.broadcast(str(filepath)))
        hidden = hidden_path(target)
        self._start_folder(hidden, target)
        average = checkpoint.pop(AVERAGE, None)
        with explain_failed_save(target):
            super().save_checkpoint(checkpoint, hidden, storage_options)
            if average is not None:
                (hidden / AVERAGE).mkdir(exist_ok=True)
                torch.save(self._shards_as_deepspeed_has_them(average), self._average_file(hidden))
            if self.is_global_zero:
                self._record().write(hidden)
            self.barrier()
            if self.local_rank == 0:
                sync_files(hidden)
            self.barrier()
            if self.is_global_zero:
                replace_folder(hidden, target)
        self.barrier()

    def _start_folder(self, hidden: Path, target: Path) -> None:
        """Make the hidden folder; a failure of the first process is every process's."""
        failure = None
        if self.is_global_zero:
            try:
                with explain_failed_save(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    remove_leftovers(target.parent)
                    hidden.mkdir()
            except ValueError as error:
                failure = str(error)
        failure = self.broadcast(failure)
        if failure is not None:
            raise ValueError(failure)

    def _average_file(self, folder: Path) -> Path:
        return folder / AVERAGE / f"zero_pp_rank_{self.global_rank}_mp_rank_00_optim_states.pt"

    def _shards_as_deepspeed_has_them(self, average: dict[str, Any]) -> dict[str, Any]:
        """The layout of DeepSpeed's optimiser files: its own tools can then merge them."""
        optimizer: Any = self.optimizers[0]
        state = {"zero_stage": self.zero_stage, "partition_count": self.world_size}
        if self.zero_stage < 3:
            state["single_partition_of_fp32_groups"] = average["weights"]
            state["param_alignment_paddings"] = optimizer.round_robin_bit16_padding
        else:
            state["fp32_flat_groups"] = average["weights"]
        return {"optimizer_state_dict": state, "step": average["step"]}

    def _record(self) -> ShardRecord:
        module = self.lightning_module
        assert module is not None
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        names = module.state_dict().keys()
        return ShardRecord(
            zero_stage=self.zero_stage,
            processes=self.world_size,
            stage=type(module).__name__,
            # Under ZeRO-3 a weight at rest is empty and keeps its shape aside.
            shapes={
                name: tuple(getattr(tensors[name], "ds_shape", tensors[name].shape))
                for name in names
            },
        )

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint, which first loses its name."""
        if self.is_global_zero:
            AtomicCheckpointIO().remove_checkpoint(filepath)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's shards; returns the rest for Lightning."""
        path = Path(self.broadcast(str(checkpoint_path)))
        state: dict[str, Any] = super().load_checkpoint(path, weights_only)
        file = self._average_file(path)
        if file.is_file():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            shards = saved["optimizer_state_dict"]
            key = "single_partition_of_fp32_groups" if self.zero_stage < 3 else "fp32_flat_groups"
            state[AVERAGE] = {"step": saved["step"], "weights": shards[key]}
        return state


def _without_weights(module: L.LightningModule) -> L.LightningModule:
    """A copy whose parameters and buffers have shapes only."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(module, memo)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer wherever the module uses it."""
    path, _, leaf = name.rpartition(".")
    old = getattr(module.get_submodule(path), leaf)
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in tables:
            for key, value in tensors.items():
                if value is old:
                    tensors[key] = tensor


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block a module's weights can be read, even if ZeRO-3 has divided them.

    All processes must enter it together.
    """
    divided = [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def master_weights(trainer: L.Trainer) -> list[Tensor]:
    """The float32 weights that the optimiser updates on this process.

    Raises:
        ValueError: they are sharded by something else than `ZeroStrategy`, or not float32.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ZeroStrategy):
        return strategy.master_weights()
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"WeightEMA cannot average the shards of {type(strategy).__name__}: use "
            "percov2.training.strategy.ZeroStrategy or DDP"
        )
    weights = {n: p for n, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"WeightEMA averages float32 weights, {name} is {weight.dtype}: use precision "
                "bf16-mixed or 32-true"
            )
    return [weight.data for weight in weights.values()]


def publish_master_weights(trainer: L.Trainer) -> None:
    """Bring changed master weights into the module; all processes must call it."""
    if isinstance(trainer.strategy, ZeroStrategy):
        trainer.strategy.publish_master_weights()
