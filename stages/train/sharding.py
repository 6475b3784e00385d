"""A model whose weights are sharded over processes (FSDP2: torch's `fully_shard`, which Accelerate applies)."""

from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.errors import StageError
from stages.model.processes import rank


class Sharded(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose model is not sharded: Accelerate trains whole copies on a processor without a word."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        check_sharded(model)


def layers_of(model: Any) -> list[str]:
    """The classes of the layers to shard each on its own: those that `model` calls indivisible, as far as they hold no
    word embeddings.

    Accelerate would take BERT's and RoBERTa's embeddings for one, and tear them from the output that they are tied to.
    """
    embeddings, indivisible = model.get_input_embeddings(), set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in indivisible]
    return sorted({type(layer).__name__ for layer in layers if all(part is not embeddings for part in layer.modules())})


def check_sharded(model: Any) -> None:
    """Raise StageError if any weight of `model` is whole in this process."""
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole or not isinstance(model, FSDPModule):
        raise StageError(
            f"trainer.fsdp: {len(whole)} weights of {type(model).__name__} are not sharded ({', '.join(whole[:3])}):"
            " set trainer.fsdp: false, or take the settings of conf/hardware/fsdp.yaml"
        )


def without_twins(model: Any) -> Any:
    """`model`, its output embedding's bias a parameter of that alone.

    The heads of BERT and RoBERTa hold it a second time, and a parameter cannot be of two groups of shards.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight is getattr(head, "bias", None) and module is not head:
                delattr(module, name)
    return model


def gathered(model: Any, like: Any) -> Any:
    """`like`, a whole copy of `model` from before it was sharded, with its weights; in the first process alone.

    Every process calls it.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not rank():
        # Without the names of twins, which are one parameter in `like`, so that it has all weights nevertheless.
        found = like.load_state_dict(state, strict=False)
        named = like.state_dict(keep_vars=True)
        filled = {id(named[name]) for name in state if name in named}
        assert not found.unexpected_keys and all(id(named[name]) in filled for name in found.missing_keys), found
    return like
