"""Import of transformers' models without the packages that a run in one process on a CPU does not use.

`import transformers.modeling_utils` also imports torch._dynamo (for decorators of GPU functions, and one small class),
torch.distributed.tensor, FlexAttention with sympy, and scipy.optimize (for losses of object detection); the Trainer
also imports datasets and peft. They take two fifths of the time. A program can still import any of them later.
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

_DYNAMO, _INDEPENDENT_SUBMODULE = "torch._dynamo", "_trace_wrapped_higher_order_op"
# transformers calls transformers.utils.is_NAME_available for each of these to decide if it imports the package.
HIDDEN_PACKAGES = ("datasets", "scipy", "torch_distributed", "torch_flex_attn")


def import_lean(hardware: Hardware, attention: str | None = None, trainer: bool = False, adapter: bool = False) -> None:
    """Import transformers' models without the packages that a run on `hardware` does not use.

    Does nothing in several processes, on a GPU, for FlexAttention, or if transformers is already imported. If the
    installed version of transformers or torch does not support this, the usual import statements import everything.

    Args:
        attention: model.config._attn_implementation; None: transformers' default.
        trainer: if True, import the Trainer as well.
        adapter: if True, import peft as well, for a Trainer or a checkpoint loader that gets a model of peft.
    """
    is_single_cpu_process = hardware.device == "cpu" and hardware.launch is None and hardware.ray is None
    if (
        not is_single_cpu_process
        or attention not in (None, "eager", "sdpa")
        or {"transformers", _DYNAMO} & set(sys.modules)
    ):
        return
    lazy = _LazyDynamo()
    try:
        lazy.install()
        with _hide_packages(HIDDEN_PACKAGES if adapter else (*HIDDEN_PACKAGES, "peft")):
            import transformers.masking_utils
            import transformers.modeling_layers
            import transformers.modeling_utils

            if trainer:
                import transformers.trainer  # noqa: F401
    except Exception as error:  # other versions may lack the private parts used here
        log.debug("transformers is imported with all of its dependencies: %s", error)
        lazy.import_package()
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


class _LazyDynamo(ModuleType):
    """Placeholder for torch._dynamo that only has its decorators, which do nothing.

    Only torch.compile reads the marks that these decorators set. Access to any other attribute or submodule imports the
    package, which then replaces this module.
    """

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
        self.__path__: list[str] = []  # submodules are found by _SubmoduleFinder
        for decorator in ("allow_in_graph", "assume_constant_result", "disable", "graph_break"):
            setattr(self, decorator, _return_function)
        # Accelerate checks for this class to find compiled models; no model is compiled before the package is imported.
        self.eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))

    def install(self) -> None:
        import torch

        sys.modules[_DYNAMO] = torch._dynamo = self
        sys.meta_path.insert(0, _SubmoduleFinder(self, Path(torch.__file__).parent / "_dynamo"))

    def import_package(self) -> ModuleType:
        """Return the package; import it first if this placeholder is still in its place."""
        if sys.modules.get(_DYNAMO) is self:
            del sys.modules[_DYNAMO]
        import torch._dynamo  # noqa: F401

        package = sys.modules[_DYNAMO]
        if submodule := sys.modules.get(f"{_DYNAMO}.{_INDEPENDENT_SUBMODULE}"):
            setattr(package, _INDEPENDENT_SUBMODULE, submodule)
        return package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system probes for these
        return getattr(self.import_package(), name)


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Imports torch._dynamo before any of its submodules."""

    def __init__(self, placeholder: _LazyDynamo, directory: Path) -> None:
        self._placeholder, self._directory = placeholder, directory

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{_DYNAMO}.") or sys.modules.get(_DYNAMO) is not self._placeholder:
            return None
        if fullname == f"{_DYNAMO}.{_INDEPENDENT_SUBMODULE}":  # it imports nothing from the package
            return importlib.util.spec_from_file_location(fullname, self._directory / f"{_INDEPENDENT_SUBMODULE}.py")
        self._placeholder.import_package()
        return ModuleSpec(fullname, self) if fullname in sys.modules else importlib.util.find_spec(fullname)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that the import of the package has added to sys.modules."""
        self._own_spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec


def _return_function(function: Any = None, *_: Any, **__: Any) -> Any:
    """Do nothing, used as `@decorator` or as `@decorator(arguments)`."""
    return function if callable(function) else _return_function


@contextlib.contextmanager
def _hide_packages(names: Iterable[str]) -> Iterator[None]:
    """Make transformers treat its optional packages `names` as not installed inside the `with` block."""
    import transformers.utils
    from transformers.utils import import_utils

    changed = [(module, f"is_{name}_available") for module in (transformers.utils, import_utils) for name in names]
    originals = [getattr(module, function) for module, function in changed]
    for module, function in changed:
        setattr(module, function, _return_false)
    try:
        yield
    finally:
        for (module, function), original in zip(changed, originals, strict=True):
            setattr(module, function, original)


def _return_false() -> bool:
    return False
