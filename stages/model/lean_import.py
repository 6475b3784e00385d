"""Imports transformers' models without the packages that a run in one process on a CPU does not use.

`import transformers.modeling_utils` also imports torch._dynamo (for marks on functions for GPUs, and one small class),
torch.distributed.tensor, FlexAttention with sympy, and scipy.optimize (for losses of object detection), and the Trainer
datasets and peft: two fifths of the time. A program that needs one of them later imports it as usual.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from stages.model.hardware import Hardware

log = logging.getLogger(__name__)

_DYNAMO, _CLASS = "torch._dynamo", "_trace_wrapped_higher_order_op"
# transformers asks these functions of transformers.utils, as is_NAME_available, whether to import something.
LEFT_OUT = ("datasets", "scipy", "torch_distributed", "torch_flex_attn")


def import_lean(hardware: Hardware, attention: str | None = None, trainer: bool = False, adapter: bool = False) -> None:
    """Import transformers' models, and its Trainer for a `trainer`, without what `hardware` makes no use of.

    Does nothing in several processes, on a GPU, for FlexAttention, or if transformers has been imported before. Where a
    version of transformers or torch cannot be imported like this, it is left to be imported whole.

    Args:
        attention: model.config._attn_implementation, if it is set.
        adapter: whether the Trainer or transformers' own loading meets a model of peft, which is left out otherwise.
    """
    alone = hardware.device == "cpu" and hardware.launch is None and hardware.ray is None
    if not alone or attention not in (None, "eager", "sdpa") or {"transformers", _DYNAMO} & set(sys.modules):
        return
    lazy = _LazyDynamo()
    try:
        lazy.install()
        with _unavailable(LEFT_OUT if adapter else (*LEFT_OUT, "peft")):
            import transformers.masking_utils
            import transformers.modeling_layers
            import transformers.modeling_utils

            if trainer:
                import transformers.trainer  # noqa: F401
    except Exception as error:  # private parts of other versions
        log.debug("transformers is imported whole: %s", error)
        lazy.give_way()
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


class _LazyDynamo(ModuleType):
    """Stands in for torch._dynamo until something asks for more than its marks on functions and code.

    Only torch.compile reads these. Anything else, an attribute or a submodule, is that of the package, which is
    then imported and takes the place of this module.
    """

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
        self.__path__: list[str] = []  # submodules are found by _SubmoduleFinder
        for mark in ("allow_in_graph", "assume_constant_result", "disable", "graph_break"):
            setattr(self, mark, _unchanged)
        # By which Accelerate asks whether a model is compiled: none is before the package is imported.
        self.eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))

    def install(self) -> None:
        import torch

        sys.modules[_DYNAMO] = torch._dynamo = self
        sys.meta_path.insert(0, _SubmoduleFinder(self, Path(torch.__file__).parent / "_dynamo"))

    def give_way(self) -> ModuleType:
        """The package, which is imported if it has not been."""
        if sys.modules.get(_DYNAMO) is self:
            del sys.modules[_DYNAMO]
        import torch._dynamo  # noqa: F401

        package = sys.modules[_DYNAMO]
        if own := sys.modules.get(f"{_DYNAMO}.{_CLASS}"):
            setattr(package, _CLASS, own)
        return package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what the import system looks for
        return getattr(self.give_way(), name)


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Has the package imported before one of its submodules is."""

    def __init__(self, stand_in: _LazyDynamo, directory: Path) -> None:
        self._stand_in, self._directory = stand_in, directory

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{_DYNAMO}.") or sys.modules.get(_DYNAMO) is not self._stand_in:
            return None
        if fullname == f"{_DYNAMO}.{_CLASS}":  # which needs nothing of the package
            return importlib.util.spec_from_file_location(fullname, self._directory / f"{_CLASS}.py")
        self._stand_in.give_way()
        return ModuleSpec(fullname, self) if fullname in sys.modules else importlib.util.find_spec(fullname)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, which the package has imported meanwhile."""
        self._own_spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _unchanged


@contextlib.contextmanager
def _unavailable(names: Iterable[str]) -> Iterator[None]:
    """Within, transformers is told that it does not have the optional packages `names`."""
    import transformers.utils
    from transformers.utils import import_utils

    changed = [(module, f"is_{name}_available") for module in (transformers.utils, import_utils) for name in names]
    originals = [getattr(module, function) for module, function in changed]
    for module, function in changed:
        setattr(module, function, _no)
    try:
        yield
    finally:
        for (module, function), original in zip(changed, originals, strict=True):
            setattr(module, function, original)


def _no() -> bool:
    return False
