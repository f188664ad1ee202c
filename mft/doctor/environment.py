"""Environment variables that change what a run does. Their values are shown, unless they are secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mft.console.credentials import ADDRESS, SECRET
from mft.doctor.finding import Finding, Part
from mft.errors import shortened

PREFIXES = (
    *("ACCELERATE_", "FSDP_", "DS_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "MKL_"),
    *("MFT_", "MLFLOW_", "HF_", "TRANSFORMERS_", "BNB_", "TOKENIZERS_"),
)
"""How the names of such variables begin."""

IGNORED = ("ACCELERATE_", "FSDP_")
"""Those that accelerate would read: conf/dist is the only source, so a run removes them."""

PLACING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun and srun: a command that finds them is one rank of a group."""

part = Part("environment")


def findings(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Yields a line for each variable, in the order of their names."""
    for name in sorted(name for name in variables if name.startswith(PREFIXES) or name in PLACING):
        found = "set" if is_secret(name) else shortened(variables[name])[1:-1]
        if name in PLACING:
            cure = f"unset {name}, unless torchrun, accelerate launch or srun starts mft"
            yield part.note(name, f"{found}: this process counts as a rank that was placed", cure)
        elif name.startswith(IGNORED) and name != "ACCELERATE_DEBUG_MODE":
            yield part.note(name, f"{found}: a run ignores it, since conf/dist decides", f"unset {name}")
        elif name == "CUDA_VISIBLE_DEVICES" and found in ("", "-1"):
            yield part.note(name, f"'{found}': hides all GPUs", f"unset {name}")
        else:
            yield part.ok(name, found)


def is_secret(name: str) -> bool:
    """Whether the value of a variable may be a password, a key, or the address of a host."""
    words = name.lower().replace("_", ".")
    return bool(re.search(SECRET, name, re.IGNORECASE) or ADDRESS.search(words)) or name in (
        *("HF_ENDPOINT", "MLFLOW_TRACKING_USERNAME"),
    )
