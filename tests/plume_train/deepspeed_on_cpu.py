"""`plume_train` under DeepSpeed on CPU processes, without the C++ communication that it would compile for a minute."""

import deepspeed.ops

from plume_train.__main__ import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
main()
