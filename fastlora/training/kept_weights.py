"""Expanded weights kept over the micro-batches of a step, as many as the memory has room for.

On CUDA the first two steps keep none, and the second shows what a step takes. From then on there is a limit: what is
left of the device's memory, with the largest micro-batch reckoned in. Where memory runs out all the same, the step is
made again without, and so are all that follow. Which weights are kept changes no result.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.expanded import expand_once

_MARGIN = 0.1  # of the device's memory, for what its allocator cannot use and other processes may take


class KeptWeights:
    """Runs the micro-batches of one optimizer step after another; `limit` is in bytes, None for no limit.

    Args:
        most_tokens: of a micro-batch at most. alone: whether no other process waits for this one.
        say: prints a line.
    """

    def __init__(self, device: torch.device, most_tokens: int, alone: bool, say: Callable[[str], None]) -> None:
        self._most_tokens, self._alone, self._say, self._steps = most_tokens, alone, say, 0
        self._cuda = device if device.type == "cuda" else None
        self.limit: int | None = None if self._cuda is None else 0

    def compute(self, gradients: Callable[[], Tensor], forget: Callable[[], None], tokens: int) -> Tensor:
        """What `gradients` returns, which adds to the gradients of the run's parameters.

        Args:
            forget: sets the gradients back to none. tokens: of the step's largest micro-batch.
        """
        before, states = 0, _random_states(self._cuda)
        if self._cuda and self._steps == 1:  # now the optimizer's moments are there
            torch.cuda.reset_peak_memory_stats(self._cuda)
            before = torch.cuda.memory_allocated(self._cuda)
        found = None
        try:
            with expand_once(self.limit):
                found = gradients()
        except torch.OutOfMemoryError:
            if self.limit == 0 or not self._alone:
                raise
        if found is None:  # only here, for the error held what its frames held
            self.limit = 0
            forget()
            _set_random_states(self._cuda, states)
            self._say("keep_expanded: memory ran out; no weights are kept from here on")
            with expand_once(self.limit):
                found = gradients()
        if self._cuda and self._steps == 1:
            self.limit = self._room(before, tokens)
            kept = f"up to {self.limit / 1e9:.1f} GB of expanded weights are kept from micro-batch to micro-batch"
            self._say(f"keep_expanded: {kept}")
        self._steps += 1
        return found

    def _room(self, before: int, tokens: int) -> int:
        step = torch.cuda.max_memory_allocated(self._cuda) - before
        free, total = torch.cuda.mem_get_info(self._cuda)
        unused = free + torch.cuda.memory_reserved(self._cuda) - torch.cuda.memory_allocated(self._cuda)
        return max(0, int(unused - step * max(1.0, self._most_tokens / tokens) - _MARGIN * total))


def _random_states(cuda: torch.device | None) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(cuda)] if cuda else [])]


def _set_random_states(cuda: torch.device | None, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if cuda:
        torch.cuda.set_rng_state(states[1], cuda)
