"""Models with weights sharded over processes (FSDP2: torch's `fully_shard`, applied by Accelerate)."""

from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.errors import StageError
from stages.model.processes import get_rank


class ShardingCheck(TrainerCallback):  # type: ignore[misc]
    """Ends a training if its model is not sharded: on a CPU, Accelerate silently trains whole copies."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        check_sharded(model)


def find_layers_to_shard(model: Any) -> list[str]:
    """Return the class names of the layers that form a shard group each.

    These are the indivisible layers of `model` without its word embeddings. Accelerate would also choose the embedding
    layers of BERT and RoBERTa, and separate them from the output layer that shares their weights.
    """
    embeddings, indivisible = model.get_input_embeddings(), set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in indivisible]
    return sorted({type(layer).__name__ for layer in layers if all(part is not embeddings for part in layer.modules())})


def check_sharded(model: Any) -> None:
    """Raise StageError if any weight of `model` is not sharded."""
    unsharded = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if unsharded or not isinstance(model, FSDPModule):
        raise StageError(
            f"trainer.fsdp: {len(unsharded)} weights of {type(model).__name__} are not sharded"
            f" ({', '.join(unsharded[:3])}): set trainer.fsdp: false, or use the settings of conf/hardware/fsdp.yaml"
        )


def remove_duplicate_bias(model: Any) -> Any:
    """Remove other references to the bias of the output embedding, in place; return `model`.

    The heads of BERT and RoBERTa register it twice, but a parameter cannot be in two shard groups.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight is getattr(head, "bias", None) and module is not head:
                delattr(module, name)
    return model


def gather_weights(model: Any, like: Any) -> Any:
    """Copy the weights of a sharded model into an unsharded copy of it. Every process must call this function.

    Args:
        model: the sharded model.
        like: in process 0, a copy of `model` from before it was sharded; unused in the others.

    Returns:
        `like`, with the weights of `model` in process 0.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not get_rank():
        # `state` lacks the names that remove_duplicate_bias removed; in `like`, they refer to loaded parameters.
        found = like.load_state_dict(state, strict=False)
        parameters = like.state_dict(keep_vars=True)
        filled = {id(parameters[name]) for name in state if name in parameters}
        assert not found.unexpected_keys and all(id(parameters[name]) in filled for name in found.missing_keys), found
    return like
