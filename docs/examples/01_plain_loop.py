"""A plain PyTorch loop. Start it alone or with any launcher:

python docs/examples/01_plain_loop.py
mpirun -n 2 python docs/examples/01_plain_loop.py overlap
"""

import sys

import torch

import ddpkit

here = ddpkit.init_process_group()
torch.manual_seed(here.rank)  # make_sync gives all ranks the weights of rank 0
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)).to(here.device)
sync = ddpkit.make_sync(sys.argv[1] if len(sys.argv) > 1 else "custom", model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

for _ in range(100):
    # Two micro-batches on this rank; what is sent is the sum of their gradients.
    for last in (False, True):
        x = torch.randn(32, 8, device=here.device)
        if last:
            ((sync.module(x) - x.sum(-1, keepdim=True)) ** 2).mean().backward()
        else:
            with sync.no_sync():
                ((sync.module(x) - x.sum(-1, keepdim=True)) ** 2).mean().backward()
    sync.synchronize()  # from here on every .grad is the mean over ranks
    optimizer.step()
    optimizer.zero_grad()

x = torch.randn(1000, 8, device=here.device)
error = (model(x) - x.sum(-1, keepdim=True)).abs().mean()
print(f"rank {here.rank} of {here.world_size}: mean error {float(error.detach()):.4f}, last sync {sync.stats}")
