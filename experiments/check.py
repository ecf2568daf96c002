"""Compare a model's kernels with its reference, and a compiled step with the eager one.

usage: ddpkit check [OVERRIDES...]

Takes the first batch of a configuration (overrides as for `ddpkit-run`) and makes two comparisons on small batches of its
frames. First the model's kernels with its reference, which computes the same literally in plain PyTorch and float64: energies,
forces, stress, and the gradient of each by every parameter. Then the compiled step with the eager one, both on the same kernels:
the loss, energies, forces and every parameter's gradient. Prints by how much they differ, and ends with exit code 0 where all
agree, 1 where something differs, 2 where the configuration or the data cannot be used. `ddpkit-run` does the same before its
first step, without the tables: the first comparison always (unless check_kernels=false), the second with compile=true.
"""

from collections.abc import Sequence

from hydra.utils import instantiate
from omegaconf import DictConfig

from ddpkit.compile.parity import Difference
from ddpkit.data import Loader, Sampler
from ddpkit.errors import ParityError
from ddpkit.experiments import run_data, setup
from ddpkit.experiments.config import read
from ddpkit.kernels import check_kernels, require_kernels
from ddpkit.loss import EnergyForcesLoss
from ddpkit.ranks import group, phase
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment
from ddpkit.ranks.lifeline import alive
from ddpkit.step import make_step


def main(overrides: Sequence[str]) -> None:
    """Prints a table for each comparison.

    Raises:
        InputError: the configuration or the data cannot be used.
        ParityError: what was compared differs by more than rounding explains.
    """
    config = read(list(overrides))
    with setup.numerics(config):
        phase.enter("rendezvous")
        here = group.init_process_group(None if config.device == "auto" else config.device)
        with alive(here, doing="ddpkit check"):
            failure = _compare(config, here)
        group.shutdown()
    if failure is not None:
        raise failure


def _compare(config: DictConfig, here: Environment) -> Exception | None:
    """Prints the tables; returns what to raise."""
    phase.enter("data")
    data = run_data.open_data(config)
    run_data.refuse_missing_labels(config, data)
    phase.enter("model")
    spec = setup.model_spec(config, data)
    model = setup.build_model(spec, config.seed).to(here.device)
    r_max = float(config.model.r_max)
    frames = data.train
    sampler = Sampler(
        frames, data.frames.atoms[frames], data.frames.edges(r_max)[frames], config.train.batch_size,
        world_size=here.world_size, rank=here.rank, seed=config.data.seed,
    )  # fmt: skip
    _, batches = next(Loader(data.frames, sampler, spec["species"], r_max, device=here.device).epoch(0))
    with agree("comparing kernels with the reference"):
        kernels = check_kernels(model, batches[0])
    if here.is_first:
        name = setup.model_name(config)
        what = f"kernels={getattr(model, 'kernels', 'its own')}, precision={config.precision}, on {here.device.type}"
        if kernels:
            print(f"{name}: its kernels ({what}) against its reference in plain PyTorch, float64")
            print(table(kernels) + "\n")
        else:
            print(f"{name}: no reference to compare its kernels with (it has no with_reference_kernels)\n")
    step = make_step(
        model, EnergyForcesLoss(**config.loss), instantiate(config.optimizer, _partial_=True)(model.parameters()),
        strategy=setup.strategy_name(config), compile=True, comm=config.comm,
        **{k: v for k, v in config.strategy.items() if k not in ("name", "_target_")},
    )  # fmt: skip
    failure: Exception | None = None
    try:
        step.prepare(batches)
    except Exception as error:  # noqa: BLE001  (raised below, when the table is printed)
        failure = error
    if here.is_first and step.differences:
        seconds = f"compiled in {step.seconds_compile:.1f} s" if failure is None else "compiled"
        print(
            f"{setup.model_name(config)}: the step of strategy {setup.strategy_name(config)}, {seconds}, against eager code"
        )
        print(table(step.differences))
    try:
        require_kernels(model, kernels)
    except ParityError as error:
        return error
    if failure is None and not step.differences:
        failure = ParityError(
            "Nothing was compared: the compiled code holds for none of the batches tried, and training would run eagerly; use "
            "compile=false, or larger frames."
        )
    return failure


def table(differences: Sequence[Difference]) -> str:
    """One line for each tensor: the largest relative difference over all batches.

    Args:
        differences: of one or more batches.
    """
    shapes = list(dict.fromkeys(d.shape for d in differences))
    worst: dict[str, Difference] = {}
    for d in differences:
        if d.name not in worst or not d.error <= worst[d.name].error:
            worst[d.name] = d
    width = max((len(name) for name in worst), default=0)
    lines = [f"batches of {'; '.join(shapes)}", f"{'tensor':<{width}}  difference  allowed"]
    lines += [f"{name:<{width}}  {d.error:10.2e}  {d.tolerance:7.0e}{_remark(d)}" for name, d in worst.items()]
    bad = sum(not d.is_fine for d in worst.values())
    return "\n".join([*lines, f"{len(worst)} tensors compared, {bad} differ" if bad else f"{len(worst)} tensors agree"])


def _remark(difference: Difference) -> str:
    if not difference.is_finite:
        return "  <- NaN or infinite in both"
    return "" if difference.is_fine else "  <- too large"
