"""Exchanges the parameters of a sharded network, in one of two processes: `RANK=0 ... python -m tests.run_exchange`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cdm.training.probe import exchanged
from cdm.training.sharding import is_sharded, shard


class Network(nn.Module):
    """A block in a list, and a layer of the root's own, as transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](x))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    whole, doubled = Network(), Network()
    doubled.load_state_dict({name: 2 * value for name, value in whole.state_dict().items()})
    network = shard(copy.deepcopy(whole), torch.device("cpu"))
    parameters = dict(network.named_parameters())
    assert all(is_sharded(value) for value in parameters.values())
    average = {name: 2 * value.detach() for name, value in parameters.items()}
    x = torch.ones(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(network(x), whole(x))
        with exchanged(average, parameters):
            torch.testing.assert_close(network(x), doubled(x))
        torch.testing.assert_close(network(x), whole(x))
    torch.distributed.destroy_process_group()
