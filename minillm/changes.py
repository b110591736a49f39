"""Whether a model still is what was packed from it: its weights, and the modules between them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from minillm.config import ModelConfig
from minillm.model import Block, MiniLLM


def weights_of(model: MiniLLM) -> tuple:
    """A description that differs as soon as a weight does: compare it with one from before by ==.

    Each parameter's place, dtype, device, shape and count of changes in place; and its sum, because changes through
    `.data` are not counted, and new weights may lie where old ones were. That is one walk over the weights, the cost of
    one decode step, and on a GPU one wait. What keeps count, place and sum, such as numbers that change places through
    `.data`, is not seen.
    """
    parameters = list(model.parameters())
    places = tuple(
        (x.data_ptr(), 0 if x.is_inference() else x._version, x.dtype, x.device, x.shape) for x in parameters
    )
    return repr(model.config), places, _sums(parameters)


@torch.no_grad()
def _sums(parameters: list[nn.Parameter]) -> bytes:
    sums: dict[torch.device, list[Tensor]] = {}
    for x in parameters:
        sums.setdefault(x.device, []).append(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double())
    return b"".join(torch.stack(group).cpu().numpy().tobytes() for group in sums.values())  # bytes: NaN equals NaN


class Plain:
    """The modules of a plain `MiniLLM` with this config: what a packed `Decoder` can stand for.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        with torch.device("meta"):
            self._modules = _modules_of(MiniLLM(config))

    def why_not(self, model: MiniLLM) -> str | None:
        """What makes the model's own forward another one than that of a plain model, None where nothing does.

        Hooks, adapters and other modules in the place of its own, a forward that was replaced, parameters of more than
        one dtype or device, and those that are no plain tensors.
        """
        if type(model) is not MiniLLM:
            return f"model is a {type(model).__name__}, and not MiniLLM itself"
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return "there is a hook on all modules"
        modules = _modules_of(model)
        if modules.keys() != self._modules.keys():
            return f"model has other modules than its config says: {min(modules.keys() ^ self._modules.keys())}"
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return f"{name or 'model'} has a hook, or another forward"
            if modules[name] != self._modules[name]:
                return f"{name or 'model'} is a {type(module).__name__} of another make than its config says"
        first = model.embed_tokens.weight
        for name, x in model.named_parameters():
            if (x.dtype, x.device) != (first.dtype, first.device) or type(x) not in (nn.Parameter, Tensor):
                return f"{name} is a {type(x).__name__} of {x.dtype} on {x.device}, not like the embedding"
        return None


def _modules_of(model: MiniLLM) -> dict[str, tuple]:
    """For each module its type, what it says of itself (sizes, bias, eps …) and its parameters' names and shapes."""
    return {
        name: (
            type(module),
            module.extra_repr(),
            [(key, None if x is None else x.shape) for key, x in module._parameters.items()],
            list(module._buffers),
        )
        for name, module in model.named_modules()
    }


def check_layers(model: MiniLLM) -> None:
    """Raises ValueError where a cache, which goes by the layers' numbers, would not be filled in their order."""
    numbers = [cast("Block", layer).layer_idx for layer in model.layers]
    if numbers != list(range(model.config.num_hidden_layers)):
        raise ValueError(
            f"model.layers have the numbers {numbers}, and its config has num_hidden_layers "
            f"{model.config.num_hidden_layers}: make a MiniLLM with as many layers and copy the weights into it"
        )
