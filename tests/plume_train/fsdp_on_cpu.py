"""`plume_train` under FSDP2 on CPU processes, which accelerate would take for plain DDP."""

from typing import Any

import accelerate.state
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
main()
