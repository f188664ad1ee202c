"""Where adapters may sit in a model, and which of them the settings select.

In transformers 5 the routed experts of a layer are one three-dimensional parameter, and most routers hold a
bare weight: neither is a linear layer, so peft reaches them as parameters (`target_parameters`), not as
modules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.introspect import base_of, full_shape, is_tied
from mft.model.peft_private import turns_into_experts

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types whose kernels read the weight of IN_KERNEL, so an adapter would not be computed."""

IN_KERNEL = ("out_proj", "dt_proj")
"""The former peft itself refuses."""


@dataclass(frozen=True)
class Site:
    """A place for an adapter."""

    path: str
    """Of the module; of the parameter for experts."""

    kind: str
    """linear | embedding | head | router | experts"""

    parameter: str = ""
    """Path of the weight that peft has to be given, "" where it wraps the module."""

    packed: bool = False
    """Whether the weight is quantised."""

    @property
    def name(self) -> str:
        """The last part of the path, as people name it."""
        return last(self.path)


def adapter_sites(model: nn.Module) -> list[Site]:
    """Returns the sites of a model that has no adapter yet, in its order."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base: Any = base_of(model)
    head = base.get_output_embeddings()
    kinds = roles({path: shape for path, _, shape in weights(base)})
    layer_types = nn.Linear | nn.Embedding | Conv1D
    # peft renames by the last part of a name alone, so one question for each suffices (see peft_private).
    leaves = {last(name) for name, module in base.named_modules() if isinstance(module, layer_types)}
    taken = {leaf for leaf in leaves if turns_into_experts(base, leaf)}
    sites: list[Site] = []
    for name, module in base.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        sites += [Site(path, "experts", path) for path in own if kinds.get(path) == "experts"]
        leaf, weight = last(name), f"{name}.weight"
        if weight in own and kinds.get(weight) == "router":
            # peft can wrap a linear layer, but not a subclass such as llama 4's, which returns two tensors.
            plain = type(module).__module__.partition(".")[0] in ("torch", "bitsandbytes")
            wrapped = isinstance(module, nn.Linear) and plain and leaf not in taken
            sites.append(Site(name, "router", "" if wrapped else weight))
        elif isinstance(module, layer_types):
            kind = "head" if module is head else "embedding" if isinstance(module, nn.Embedding) else "linear"
            sites.append(Site(name, kind, weight if leaf in taken else "", packed(module.weight)))
    return sites


def last(path: str) -> str:
    """Returns the last part of a path: the name of a module in its parent."""
    return path.rpartition(".")[2]


def packed(weight: torch.Tensor) -> bool:
    """Whether a weight is quantised, or will be when it is loaded."""
    return not weight.is_floating_point() or hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Yields path, parameter and full shape of every weight, as the modules hold them; a tied one once."""
    from torch import nn

    seen: set[int] = set()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # under fsdp the packed weights of all ranks but the first do not know their shape yet
            of_linear = isinstance(module, nn.Linear) and own == "weight"
            shape = (module.out_features, module.in_features) if of_linear else full_shape(parameter)
            yield f"{name}.{own}" if name else own, parameter, shape


def roles(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns what each weight belongs to, by path: experts, router, or "" for all else.

    Told apart by shape, as every family has its own names: experts have three dimensions [E, ...]; a router
    lies beside them with one row an expert, or a single one (qwen2_moe's gate of the shared expert).
    """
    kinds = dict.fromkeys(shapes, "")
    blocks: dict[str, tuple[int, str]] = {}  # path of the module around the experts → how many, and theirs
    for path, shape in shapes.items():
        if len(shape) == 3 and "conv" not in path:
            kinds[path] = "experts"
            blocks[owner(path).rpartition(".")[0]] = shape[0], owner(path)
    for path, shape in shapes.items():
        found = next((found for block, found in blocks.items() if path.startswith(f"{block}.")), None)
        if found is None or path.startswith(f"{found[1]}."):
            continue
        beside = len(shape) == 2 and path.endswith(".weight") and shape[0] in (1, found[0])
        # a matrix of a shared expert may have as many rows
        if beside and "expert" not in last(path.rpartition(".")[0].rpartition(".")[0]):
            kinds[path] = "router"
    return kinds


def owner(path: str) -> str:
    """Returns the module that has a weight or that an adapter's weight belongs to, without peft's wrappers."""
    module, adapter, _ = path.partition(".lora_")
    return (module if adapter else path.rpartition(".")[0]).replace(".base_layer", "")


def active_shares(shapes: dict[str, tuple[int, ...]], config: Any) -> dict[str, float]:
    """Returns the share of each weight that works on one token: less than 1 for routed experts and for their
    adapters, which peft keeps as one matrix with the rows of all experts.

    config: of the model's text part, with the number of experts that a token goes to.
    """
    role, per_token = roles(shapes), getattr(config, "num_experts_per_tok", None)
    experts = {owner(path): shape[0] for path, shape in shapes.items() if role[path] == "experts"}

    def share(path: str) -> float:
        of = experts.get(owner(path))
        return min(1.0, per_token / of) if of and per_token and role[path] != "router" else 1.0

    return {path: share(path) for path in shapes}


def select(model: nn.Module, targets: str | list[str], experts: bool, router: bool) -> list[Site]:
    """Returns the sites that the settings mean: a list of names, "all-linear" (all linear layers but head and
    router) or a regular expression over full paths, plus experts and routers if enabled.

    Raises UserError for what matches nothing, with the nearest names, and for sites that peft cannot adapt.
    """
    sites = adapter_sites(model)
    kind: str = base_of(model).config.model_type
    in_kernel = {site for site in sites if site.name in IN_KERNEL and kind in MAMBA}
    frozen = {site for site in sites if site.parameter and site.packed}
    if targets == "all-linear":
        if names := sorted({site.name for site in frozen if site.kind == "linear"}):
            log.warning(
                "%s stay frozen: peft takes these names for the routed experts and can adapt them beside "
                "full weights only, not quantised ones",
                ", ".join(names),
            )
        selected = [s for s in sites if s.kind == "linear" and s not in in_kernel and s not in frozen]
    else:
        selected = _named(sites, targets)
    for role, wanted in (("experts", experts), ("router", router)):
        of_role = [site for site in sites if site.kind == role]
        if wanted and not of_role:
            raise UserError(f"peft.{role}=true: this model is not a mixture of experts; remove it")
        selected += of_role if wanted else []
    for site in selected:
        if site in in_kernel:
            raise UserError(
                f"peft.targets: {site.path} cannot have an adapter: kernels of {kind} read it; leave it out"
            )
        if site in frozen:
            raise UserError(
                f"peft.targets: {site.path} is quantised, and peft takes the name {site.name} for the routed "
                "experts; leave it out, choose peft=lora, or keep it unquantised with peft.skip_modules"
            )
    # In the model's order, each once: a name and peft.router may select the same site.
    chosen = set(selected)
    return [site for site in sites if site in chosen]


def _named(sites: list[Site], targets: str | list[str]) -> list[Site]:
    def matches(path: str, target: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(target, path) is not None
        return path == target or path.endswith(f".{target}")

    patterns = [targets] if isinstance(targets, str) else targets
    for pattern in patterns:
        if not any(matches(site.path, pattern) for site in sites):
            names = [site.name for site in sites]
            kind = "regular expression" if isinstance(targets, str) else "name"
            note = f' (a single name needs brackets: peft.targets="[{targets}]")' if targets in names else ""
            raise no_such_module(f"peft.targets: the {kind}", pattern, names, note)
    return [site for site in sites if any(matches(site.path, pattern) for pattern in patterns)]


def no_such_module(key: str, name: str, names: Iterable[str], note: str = "") -> UserError:
    """Returns the error for a name that no module has; names: those of the model's, repeated or not."""
    names = dict.fromkeys(names)
    others = f"this model has {', '.join(names)}{nearest(name, names)}{note}"
    return UserError(f"{key} {name!r} matches no module; {others}")


def for_peft(model: nn.Module, sites: list[Site]) -> tuple[list[str], list[str]]:
    """Returns `target_modules` and `target_parameters` of a LoraConfig that adapts exactly these sites.

    A name replaces all paths that end in it if all of them are selected, so that the adapter's config stays
    legible.
    """
    base = base_of(model)
    modules = {site.path for site in sites if not site.parameter}
    parameters = {site.parameter for site in sites if site.parameter}
    return _shortened(modules, base.named_modules(), 1), _shortened(parameters, base.named_parameters(), 2)


def _shortened(paths: set[str], named: Iterable[tuple[str, object]], length: int) -> list[str]:
    """Returns `paths`, each cut to its last `length` parts where no other path of `named` ends in them."""

    def suffix(path: str) -> str:
        return ".".join(path.split(".")[-length:])

    others = {suffix(path) for path, _ in named if path not in paths}
    return sorted({path if suffix(path) in others else suffix(path) for path in paths})


def full_modules(model: nn.Module, names: list[str], sites: list[Site]) -> tuple[list[str], bool]:
    """Returns the paths of the modules that are trained in full, and whether embedding and head are among
    them as one.

    Raises UserError for a name that matches nothing, for a quantised module, and for one that has an adapter.
    """
    base: Any = base_of(model)
    paths = [path for path, module in base.named_modules() if path and any(True for _ in module.parameters())]
    selected: list[str] = []
    for name in names:
        of_name = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not of_name:
            own = [last(path) for path in paths if not last(path).isdigit()]
            raise no_such_module("peft.modules_to_save: the name", name, own)
        selected += [path for path in of_name if path not in selected]
    for path in selected:
        if any(map(packed, base.get_submodule(path).parameters())):
            raise UserError(
                f"peft.modules_to_save: {path} is quantised; leave it out, or name it in peft.skip_modules"
            )
        if site := next((s.path for s in sites if f"{s.path}.".startswith(f"{path}.")), ""):
            raise UserError(f"peft.modules_to_save: {path} is trained in full, but {site} is in peft.targets")
    # Of a tied pair peft trains one and ties the other (ensure_weight_tying), so both have to be named.
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    embeddings = [path for path, module in base.named_modules() if module in both]
    tied = is_tied(base) and any(path in selected for path in embeddings)
    return ([path for path in selected if path not in embeddings] + embeddings if tied else selected), tied
