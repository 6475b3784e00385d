"""Hash chain over the trained weights after each step, by which a part of a training can be verified.

`python -m tools.verify --segments` trains some of the steps again, from kept checkpoints, and compares their links.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE_CHAIN = "state_chain.txt"
_DIGITS = 16  # hexadecimal digits of a link


class StateChain(TrainerCallback):  # type: ignore[misc]
    """Adds a link to `links` after each optimizer step: a hash of the previous link and the trained weights."""

    def __init__(self) -> None:
        self.links: list[str] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        previous = self.links[-1] if self.links else ""
        link = hashlib.sha256(previous.encode() + checksum_weights(model)).hexdigest()[:_DIGITS]
        self.links.append(link)


def checksum_weights(model: torch.nn.Module) -> bytes:
    """Return the checksums of the trained weights, 8 bytes each; of a sharded model, those of this process's shards.

    A checksum is the XOR of the bit patterns of a weight's elements. It reveals a changed element, but is not
    cryptographic. (SHA-256 takes 14 times as long on a CPU, and weights on a GPU would have to be copied first.)
    """
    weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    on_device = [weight.cpu() if weight.device.type == "mps" else weight for weight in local]  # Metal has no kernel
    sums = [torch.hash_tensor(weight) for weight in on_device if weight.numel()]  # a process may have an empty shard
    return bytes(torch.stack(sums).cpu().view(torch.uint8).tolist()) if sums else b""


def write_state_chain(directory: Path, links: list[str]) -> None:
    """Write the links to `directory`, one line of 16 hexadecimal digits per step."""
    (directory / STATE_CHAIN).write_text("".join(f"{link}\n" for link in links), encoding="utf-8")


def read_state_chain(directory: Path) -> list[str]:
    """Read the links from `directory`."""
    return (directory / STATE_CHAIN).read_text(encoding="utf-8").split()
