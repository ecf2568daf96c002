"""A message-passing network in the style of PyTorch Geometric, written in plain torch, with unequal graphs on the ranks.

    mpirun -n 2 python docs/examples/03_graph_network.py

A `torch_geometric` model is synchronised in just the same way: any `torch.nn.Module` is. To compile it, give the step
`batch.to_dict()`, and a module around the model that calls it with `torch_geometric.data.Data.from_dict(fields)`.
"""

import torch
from torch import nn

import ddpkit

here = ddpkit.init_process_group()


class Convolution(nn.Module):
    """Sums messages over the edges into each node."""

    def __init__(self, width):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.update = nn.Linear(2 * width, width)

    def forward(self, x, edge_index):
        source, target = edge_index
        messages = self.message(torch.cat([x[source], x[target]], -1))
        gathered = torch.zeros_like(x).index_add(0, target, messages)
        return x + torch.nn.functional.silu(self.update(torch.cat([x, gathered], -1)))


class Network(nn.Module):
    """Counts, for each graph, the edges between nodes of different kinds."""

    def __init__(self, kinds=4, width=32, layers=2):
        super().__init__()
        self.embed = nn.Embedding(kinds, width)
        self.layers = nn.ModuleList(Convolution(width) for _ in range(layers))
        self.read = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, kind, edge_index, graph, graphs):
        x = self.embed(kind)
        for layer in self.layers:
            x = layer(x, edge_index)
        return torch.zeros(graphs, device=x.device).index_add(0, graph, self.read(x).squeeze(-1))


def batch(graphs, generator):
    """Random graphs, one after another."""
    kinds, edges, owners, first = [], [], [], 0
    for number in range(graphs):
        nodes = int(torch.randint(5, 20, (), generator=generator))
        kinds.append(torch.randint(4, (nodes,), generator=generator))
        edges.append(torch.randint(nodes, (2, 3 * nodes), generator=generator) + first)
        owners.append(torch.full((nodes,), number))
        first += nodes
    kind, edge_index, graph = torch.cat(kinds), torch.cat(edges, 1), torch.cat(owners)
    differ = (kind[edge_index[0]] != kind[edge_index[1]]).float()
    target = torch.zeros(graphs).index_add(0, graph[edge_index[1]], differ)
    return kind, edge_index, graph, target


generator = torch.Generator().manual_seed(here.rank)
model = Network().to(here.device)
sync = ddpkit.make_sync("overlap", model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(200):
    graphs = 4 + 8 * here.rank  # unequal on purpose
    everyone = sum(4 + 8 * rank for rank in range(here.world_size))
    kind, edge_index, graph, target = (t.to(here.device) for t in batch(graphs, generator))
    squares = (sync.module(kind, edge_index, graph, graphs) - target) ** 2
    loss = ddpkit.global_mean(squares.sum(), everyone)  # so that the mean over ranks is the mean over all graphs
    loss.backward()
    sync.synchronize()
    optimizer.step()
    optimizer.zero_grad()
    if here.is_first and step % 50 == 0:
        print(f"step {step}: mean square error {float(squares.detach().mean()):.2f}")

print(f"rank {here.rank} of {here.world_size}: last {float(squares.detach().mean()):.2f}, {sync.stats}")
