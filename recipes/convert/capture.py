"""A training step as one CUDA graph: a thousand launches, one call."""

from collections.abc import Callable

import torch

__all__ = ["captured"]

Step = Callable[[torch.Tensor], torch.Tensor]


def captured(step: Step, example: torch.Tensor, warm_up: int = 3) -> Step:
    """``step`` as a graph that is replayed for any input of the example's shape.

    The step runs a few times first, so that all is compiled, tuned and allocated; what it adds to gradients
    in doing so is the caller's to clear. It must write to tensors that stay where they are. To be called
    before any process group exists, whose watchdog would disturb the capture.

    Args:
        step: from an input to a small result, both on CUDA.
        example: an input. warm_up: how often the step runs first.

    Returns:
        The captured step; its result is overwritten by the next call.
    """
    held = example.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step(held)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, stream=side
    ):  # the same: gradients are added up on the stream that made them
        result = step(held)

    def replay(given: torch.Tensor) -> torch.Tensor:
        held.copy_(given)
        graph.replay()
        return result

    return replay
