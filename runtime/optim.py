"""The state of a training: full, unsharded and on the CPU, so that any number of ranks can read it."""

from schedules.rules import averaged


def training_state(model, optimizer) -> tuple[dict, dict]:
    """State dicts of a plain, DDP or FSDP2 model and its optimizer; of Schedule-Free the weights are the averages, and
    the optimizer's holds the iterate. Every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    if hasattr(optimizer, "eval"):  # Schedule-Free, whose step torch's way of loading cannot take; it is never sharded
        # What goes on is not what is evaluated.
        iterate = {k: v.detach().clone() for k, v in model.state_dict().items()}
        with averaged(optimizer):
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        return weights, optimizer.state_dict() | {"iterate": iterate}

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def restore_training_state(model, optimizer, checkpoint: dict) -> None:
    """Loads what ``training_state`` gave, under the checkpoint's keys model and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    if hasattr(optimizer, "eval"):
        model.load_state_dict(checkpoint["optimizer"]["iterate"])
        optimizer.load_state_dict({k: v for k, v in checkpoint["optimizer"].items() if k != "iterate"})
        return
    set_state_dict(
        model,
        optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
