"""`plume_train` under FSDP2 on CPU processes, which accelerate would take for plain DDP.

Runs are parted by "then". One whose output folder ends with "-resumed" goes on from checkpoint 2 of "-whole".
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from plume_train.__main__ import main
from plume_train.trainer import PlumeTrainer

_init = accelerate.state.AcceleratorState.__init__
_step = PlumeTrainer.training_step


def init(self, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if self.__dict__.get("fsdp_plugin") is None:
        self.__dict__["fsdp_plugin"] = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
    self.distributed_type = DistributedType.FSDP


def step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
    assert all(isinstance(weight, DTensor) for weight in model.parameters()), "weights are not shared out"
    return _step(self, model, *args, **kwargs)


accelerate.state.AcceleratorState.__init__ = init
PlumeTrainer.training_step = step
program, *words = sys.argv
while words:
    end = words.index("then") if "then" in words else len(words)
    sys.argv, words = [program, *words[:end]], words[end + 1 :]
    out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    if out.name.endswith("-resumed"):
        if dist.get_rank() == 0:
            whole = out.with_name(out.name.replace("-resumed", "-whole"))
            shutil.copytree(whole / "checkpoint-2", out / "checkpoint-2")
            shutil.copy(whole / "run.json", out)
        dist.barrier()
    main()
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
