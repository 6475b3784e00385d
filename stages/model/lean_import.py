"""Imports transformers' models without the packages that a run in one process on a CPU does not use.

`import transformers.modeling_utils` also imports torch._dynamo (for a few decorators of code for GPUs, and one small
class), torch.distributed.tensor, FlexAttention with sympy, and scipy.optimize (for losses of object detection): two
fifths of what it takes. A program that needs one of them later imports it as usual.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.model.hardware import Hardware

log = logging.getLogger(__name__)

_DYNAMO, _CLASS = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
# transformers asks these functions of transformers.utils, as is_NAME_available, whether to import something.
LEFT_OUT = ("scipy", "torch_distributed", "torch_flex_attn")


def import_lean(
    hardware: Hardware, attention: str | None = None, trainer: bool = False, leave_out: Iterable[str] = ()
) -> None:
    """Import transformers' models, and its Trainer for a `trainer`, without what `hardware` makes no use of.

    Does nothing in several processes, on a GPU, for FlexAttention, or if transformers has been imported before. Where a
    version of transformers or torch cannot be imported like this, it is left to be imported whole.

    Args:
        attention: model.config._attn_implementation, if it is set.
        leave_out: of optional packages, as `is_NAME_available` calls them, those to leave out as well.
    """
    alone = hardware.device == "cpu" and hardware.launch is None and hardware.ray is None
    if not alone or attention not in (None, "eager", "sdpa") or {"transformers", _DYNAMO} & set(sys.modules):
        return
    try:
        with _without_dynamo(), _unavailable((*LEFT_OUT, *leave_out)):
            import transformers.masking_utils
            import transformers.modeling_layers
            import transformers.modeling_utils

            if trainer:
                import transformers.trainer  # noqa: F401
    except Exception as error:  # private parts of other versions
        log.debug("transformers is imported whole: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers" or name == _CLASS]:
            del sys.modules[name]


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Within, torch._dynamo is a stand-in whose decorators, which are meant for torch.compile, change nothing."""
    import torch

    directory = Path(torch.__file__).parent / "_dynamo"
    stand_in = ModuleType(_DYNAMO)
    stand_in.__path__ = []
    for decorator in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(stand_in, decorator, _unchanged)
    spec = importlib.util.spec_from_file_location(_CLASS, directory / f"{_CLASS.rpartition('.')[2]}.py")
    assert spec is not None and spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    sys.modules[_DYNAMO] = torch._dynamo = stand_in
    sys.modules[_CLASS] = own  # stays: the package takes it over when it is imported
    try:
        spec.loader.exec_module(own)
        yield
    finally:
        del sys.modules[_DYNAMO], torch._dynamo


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
