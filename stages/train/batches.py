"""How the sequences of an optimizer step are shared out."""

from stages.model.hardware import Hardware


def batches(batch_size: int, hardware: Hardware, processes: int) -> tuple[int, int]:
    """Sequences at once in each of `processes`, and the times that gradients are added up in an optimizer step.

    Raises:
        ValueError: if batch_size cannot be divided like this.
    """
    at_once = hardware.per_device_batch_size
    whole = processes * (at_once or 1)
    if batch_size % whole:
        names = [f"{processes} processes (hardware.{'ray' if hardware.ray else 'launch'})"] if processes > 1 else []
        names += [f"{at_once} sequences at once (hardware.per_device_batch_size)"] if at_once else []
        fit = [whole * (batch_size // whole + extra) for extra in (0, 1)]
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of {whole}: {' of '.join(names)};"
            f" {' and '.join(str(size) for size in fit if size)} would be"
        )
    share = batch_size // processes
    return at_once or share, share // (at_once or share)
