"""A network that is sharded and gathered in bfloat16, in one of two processes: `RANK=0 ... python -m tests.run_bf16`.

Two forwards wait for one backward, as the student's do; autocast in one process is the standard.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cdm.training.sharding import is_sharded, shard, whole_of


class Network(nn.Module):
    """A block in a list, and a layer of the root's own, as transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](x))


def update(network: nn.Module) -> Tensor:
    """The sum of two forwards, with its gradients in the network."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (network(torch.ones(2, 4)).float() ** 2).mean() + network(torch.full((2, 4), 0.3)).float().mean()
    loss.backward()
    return loss.detach()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    whole = Network()
    network = shard(copy.deepcopy(whole), torch.device("cpu"), torch.bfloat16)
    seen: dict[str, set[torch.dtype]] = {"weights": set(), "inputs": set()}

    def look(layer: nn.Linear, inputs: tuple[Tensor]) -> None:
        seen["weights"].add(layer.weight.dtype)
        seen["inputs"].add(inputs[0].dtype)

    network.blocks[0].register_forward_pre_hook(look)
    torch.testing.assert_close(update(network), update(whole), rtol=1e-2, atol=1e-2)
    assert seen == {"weights": {torch.bfloat16}, "inputs": {torch.float32}}, seen
    for mine, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        assert is_sharded(mine)
        assert mine.grad is not None
        assert mine.dtype == mine.grad.dtype == torch.float32
        assert torch.equal(whole_of(mine.detach()), theirs.detach()), "what is held is not rounded"
        torch.testing.assert_close(whole_of(mine.grad), theirs.grad, rtol=2e-2, atol=2e-2)
    torch.distributed.destroy_process_group()
