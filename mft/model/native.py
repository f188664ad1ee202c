"""The name by which READMEs of saved ALiBi models import the native classes of `mft.model.legacy.native`."""

from mft.model.legacy.native import AlibiConfig, AlibiForCausalLM

__all__ = ["AlibiConfig", "AlibiForCausalLM"]
