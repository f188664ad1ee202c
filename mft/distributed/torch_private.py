"""What process groups and FSDP2 use of torch beside its public interface, as it was in 2.13.0.

tests/distributed/test_private_apis.py fails, and says which, where one of these is gone.
"""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace


def set_timeout(timeout: timedelta) -> None:
    """Makes collectives end after `timeout`, in all process groups of this process and those made later.

    Those that run already keep theirs. torch gives a new group its own default, not that of the first group,
    and DeepSpeed and the device mesh make their groups without saying which.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def gathers_cast_whole_numbers() -> bool:
    """Whether FSDP2 also gathers weights of whole numbers in the computing dtype, as before torch 2.13.

    Packed 4-bit weights would then be converted by value, to other weights.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    weight = SimpleNamespace(sharded_param=torch.empty(0, dtype=torch.uint8))
    FSDPParam.init_dtype_attrs(weight, MixedPrecisionPolicy(torch.bfloat16))  # type: ignore[arg-type]
    return getattr(weight, "param_dtype", None) is not None
