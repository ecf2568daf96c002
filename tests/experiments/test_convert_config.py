"""Training files of nequip as configurations of runs, against what nequip itself builds from them."""

import copy
import random
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from ddpkit.data import Frame, collate
from ddpkit.data.frame import NUMBERS
from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.cli import _dispatch
from ddpkit.experiments.config import read
from ddpkit.experiments.convert_config import convert
from ddpkit.experiments.peers import peer_input
from ddpkit.experiments.run_data import open_data
from ddpkit.loss import EnergyForcesLoss
from ddpkit.models import from_nequip, to_nequip

HERE = Path(__file__).parent / "nequip"
FILES = ("nequip", "allegro")
STATISTICS = {"num_neighbors_mean": 11.0, "per_atom_energy_mean": -1.5, "per_type_forces_rms": 1.3, "forces_rms": 0.9}
OF_DATA = {"avg_num_neighbors": 11.0, "shifts": -1.5, "scales": 1.3}  # what a run computes in their place
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": "${chemical_symbols}"}


def content(name):
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


def converted(values, folder):
    path = folder / "nequip.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return convert(path)


def with_model(name, **settings):
    """The file with other settings of the model, in float64; None takes one out."""
    values = content(name)
    model = values["training_module"]["model"]
    model.pop("compile_mode", None)
    model |= {"model_dtype": "float64", **settings}
    values["training_module"]["model"] = {key: value for key, value in model.items() if value != "default"}
    return values


def built_by_nequip(values):
    """The model of a file as nequip-train builds it."""
    pytest.importorskip("allegro")
    from nequip.utils.global_state import set_global_state

    set_global_state()
    OmegaConf.register_new_resolver("training_data_stats", STATISTICS.__getitem__, replace=True)
    try:
        model = OmegaConf.to_container(OmegaConf.create(values).training_module.model, resolve=True)
    finally:
        OmegaConf.clear_resolver("training_data_stats")
    return get_method(model.pop("_target_"))(**model)


def built_by_ddpkit(settings):
    given = settings["model"]
    spec = {**OF_DATA, **given, "precision": settings["precision"]}
    return setup.build_model(spec, settings["seed"])


def structures(species, r_max):
    rng = np.random.default_rng(5)
    frames = []
    for atoms, box in ((9, None), (6, 3.7), (1, None), (7, 5.0)):
        positions = np.zeros((0, 3))
        while len(positions) < atoms:
            point = rng.random(3) * (box or 4.5)
            if all(np.linalg.norm(positions - point, axis=1) > 0.8):
                positions = np.vstack((positions, point))
        cell = None if box is None else np.eye(3) * box + rng.normal(size=(3, 3)) * 0.2
        numbers = np.array([NUMBERS[rng.choice(species)] for _ in range(atoms)])
        pbc = np.array([box is not None] * 3)
        frames.append(Frame(numbers, positions, 0.0, np.zeros((atoms, 3)), cell=cell, pbc=pbc, stress=None))
    return [collate([frame], species, r_max, labels=False) for frame in frames]


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def assert_same_model(values, folder):
    settings, _ = converted(values, folder)
    theirs, ours = built_by_nequip(values).eval(), built_by_ddpkit(settings).eval()
    imported = from_nequip(theirs)
    assert shapes(ours) == shapes(imported)
    assert {name: shape for name, shape in shapes(to_nequip(ours)).items() if 0 not in shape} == {
        name: shape for name, shape in shapes(theirs).items() if 0 not in shape
    }
    for name, value in imported.named_buffers():  # what the settings alone decide
        torch.testing.assert_close(ours.get_buffer(name), value, rtol=1e-12, atol=1e-12)
    for name in ("shifts", "scales"):
        torch.testing.assert_close(getattr(ours, name), getattr(imported, name))
    weights = {name: value for name, value in imported.named_parameters() if name not in ("shifts", "scales")}
    ours.load_state_dict(weights, strict=False)
    for batch in structures(settings["model"]["species"], settings["model"]["r_max"]):
        one, other = ours(batch), theirs(peer_input(batch))
        torch.testing.assert_close(one["energy"], other["total_energy"].squeeze(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one["forces"], other["forces"], rtol=1e-10, atol=1e-10)


MODELS = {
    "nequip": ("nequip", {}),
    "nequip's defaults": (
        "nequip",
        dict.fromkeys(("parity", "num_bessels", "polynomial_cutoff_p", "radial_mlp_depth"), "default")
        | {
            "pair_potential": "default",
            "per_type_energy_shifts": None,
            "per_type_energy_scales": None,
            "num_features": 4,
        },
    ),
    "nequip otherwise": (
        "nequip",
        {
            "num_features": [8, 4, 6],
            "l_max": 2,
            "num_layers": 3,
            "parity": False,
            "type_embed_num_features": 5,
            "readout_mlp_hidden_layers_depth": 2,
            "readout_mlp_hidden_layers_width": 7,
            "readout_mlp_nonlinearity": "mish",
            "convnet_sc": False,
            "bessel_trainable": True,
            "polynomial_cutoff_p": 5,
            "pair_potential": {**ZBL, "polynomial_cutoff_p": 4},
            "per_type_energy_shifts": {"O": 3.0, "C": 1.0, "H": 2.0},
            "per_type_energy_shifts_trainable": True,
            "avg_num_neighbors": {"H": 9.0, "C": 12.0, "O": 10.0},
            "per_edge_type_cutoff": {"O": 2.5, "C": {"H": 3.0, "O": 3.5}},
        },
    ),
    "a preset": (
        "nequip",
        {"_target_": "nequip.model.PresetNequIPGNNModel", "preset": "s"}
        | dict.fromkeys(
            ("num_layers", "l_max", "num_features", "parity", "radial_mlp_depth", "radial_mlp_width"), "default"
        ),
    ),
    "allegro": ("allegro", {}),
    "allegro's defaults": (
        "allegro",
        dict.fromkeys(
            (
                "radial_chemical_embed_dim",
                "scalar_embed_mlp_hidden_layers_depth",
                "scalar_embed_mlp_hidden_layers_width",
                "num_layers",
                "num_tensor_features",
                "allegro_mlp_hidden_layers_width",
                "allegro_mlp_nonlinearity",
                "parity",
                "tp_path_channel_coupling",
                "readout_mlp_hidden_layers_width",
                "per_edge_type_cutoff",
                "per_type_energy_shifts",
            ),
            "default",
        )
        | {"l_max": 1, "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed"}},
    ),
    "allegro otherwise": (
        "allegro",
        {
            "forward_normalize": False,
            "allegro_mlp_nonlinearity": None,
            "allegro_mlp_hidden_layers_depth": 2,
            "readout_mlp_hidden_layers_depth": 0,
            "scalar_embed_mlp_nonlinearity": "gelu",
            "num_layers": 3,
            "parity": True,
            "pair_potential": ZBL,
            "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
        },
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_model_is_the_one_that_nequip_builds(case, tmp_path):
    name, settings = MODELS[case]
    assert_same_model(with_model(name, **settings), tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_random_models_are_those_that_nequip_builds(seed, tmp_path):
    draw = random.Random(seed)
    either = {
        "l_max": draw.choice([0, 1, 2]),
        "num_layers": draw.choice([1, 2, 3]),
        "parity": draw.random() < 0.5,
        "readout_mlp_hidden_layers_depth": draw.choice([0, 1, 2]),
        "readout_mlp_hidden_layers_width": draw.choice([4, 5]),
        "readout_mlp_nonlinearity": draw.choice(["silu", "gelu", None]),
        "per_type_energy_scales": draw.choice([None, 0.7, {"C": 1.0, "H": 2.0, "O": 0.5}]),
        "pair_potential": draw.choice([None, ZBL]),
    }
    nequip = {
        "num_features": draw.choice([3, 8]),
        "radial_mlp_depth": draw.choice([0, 1, 2]),
        "num_bessels": draw.choice([4, 8]),
    }
    allegro = {
        "num_scalar_features": draw.choice([6, 8]),
        "num_tensor_features": draw.choice([2, 3]),
        "allegro_mlp_hidden_layers_depth": draw.choice([0, 1, 2]),
        "scalar_embed_mlp_hidden_layers_depth": draw.choice([0, 1, 2]),
        "tp_path_channel_coupling": draw.random() < 0.5,
        "radial_chemical_embed_dim": draw.choice([4, "default"]),
    }
    name, own = draw.choice([("nequip", nequip), ("allegro", allegro)])
    assert_same_model(with_model(name, **either, **own), tmp_path)


def test_the_settings_of_the_tutorials_layout():
    settings, remarks = convert(HERE / "nequip.yaml")
    assert settings["seed"] == 456
    assert settings["compile"] is True
    assert (settings["precision"], settings["tf32"], settings["device"]) == ("mixed", False, "cpu")
    assert settings["data"] == {"seed": 456, "shifts": "fitted", "path": "frames.xyz", "split": [0.8, 0.1, 0.1]}
    assert settings["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 0.01, "fused": True}
    assert settings["scheduler"] == {
        "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "per": "epoch",
        "factor": 0.6,
        "patience": 5,
        "threshold": 0.2,
        "min_lr": 1e-6,
    }
    train = settings["train"]
    assert (train["max_epochs"], train["max_seconds"], train["batch_size"]) == (1000, 3 * 86400, 5)
    assert (train["ema_decay"], train["log_every"], train["early_stop"]) == (0.99, 20, {"patience": 20})
    told = "\n".join(remarks)
    for key in ("batch_size", "num_workers", "logger[0].project", "min_delta", "dirpath", "val_metrics", "run=[test]"):
        assert f"{key}" in told
    assert "chemical_symbols" not in told
    assert "by `ddpkit eval RUN_FOLDER`, " in told  # frames that were trained on would be among all of DATA


def test_the_settings_of_a_run_on_several_ranks():
    settings, remarks = convert(HERE / "allegro.yaml")
    train = settings["train"]
    assert (train["batch_size"], train["accumulate"], train["clip_norm"]) == (2 * 3 * 8, 3, 10.0)
    assert (train["ema_decay"], train["early_stop"]["patience"]) == (0.0, 1_000_000)
    assert settings["loss"] == {"per_atom": False, "energy": 0.25, "forces": 0.5, "stress": 0.25}
    assert settings["scheduler"]["T_max"] == 50
    assert (settings["tf32"], settings["strategy"], settings["device"]) == (True, "custom", "cuda")
    data = settings["data"]
    assert (data["energy_key"], data["forces_key"], data["stress_key"]) == ("dft_energy", "dft_forces", "dft_virial")
    assert data["allow_missing"] is True
    assert any("mpirun -n 8" in remark for remark in remarks)
    assert any("val_file_path" in remark for remark in remarks)


def test_what_stands_for_something_else_is_told(tmp_path):
    values = content("nequip")
    values |= {"spare": 3, "hydra": {"run": {"dir": "x"}}, "ckpt_path": "last.ckpt"}
    values["data"]["test_file_path"] = "hot.xyz"
    module, trainer = values["training_module"], values["trainer"]
    module["model"]["pair_potential"]["units"] = "real"
    module["model"]["convnet_resnet"] = True
    module["model"] = {
        "_target_": "nequip.model.modify",
        "modifiers": [{"modifier": "enable_OpenEquivariance"}, {"modifier": "enable_CuEquivarianceContracter"}],
        "model": module["model"],
    }
    linear = {"_target_": "torch.optim.lr_scheduler.LinearLR"}
    module["lr_scheduler"]["scheduler"] = {
        "_target_": "torch.optim.lr_scheduler.SequentialLR",
        "schedulers": [linear],
    }
    module["optimizer"] = {"_target_": "schedulefree.RAdamScheduleFree", "lr": 0.01}
    trainer |= {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    trainer["callbacks"].append({"_target_": "nequip.train.callbacks.SoftAdapt", "beta": 1.1})
    settings, remarks = converted(values, tmp_path)
    for begins in (
        "spare=3 is used nowhere",
        "hydra (run) has no",
        "ckpt_path=last.ckpt has no",
        "data.test_file_path=hot.xyz is not read by ddpkit-run, which trains: evaluate by `ddpkit eval RUN_FOLDER FILE`",
        "training_module.model.model.pair_potential.units=real has no counterpart in ddpkit, which computes in eV",
        "training_module.model.model.convnet_resnet=true has no counterpart in ddpkit: the converted model is another",
        "training_module.model.modifiers[1].modifier=enable_CuEquivarianceContracter has no",
        "training_module.lr_scheduler.scheduler._target_=torch.optim.lr_scheduler.SequentialLR has no",
        "training_module.optimizer._target_=schedulefree.RAdamScheduleFree has no",
        "trainer.precision=bf16-mixed has no",
        "trainer.gradient_clip_algorithm=value has no",
        "trainer.callbacks[3].beta=1.1 has no",
    ):
        assert sum(remark.startswith(begins) for remark in remarks) == 1, begins
    assert settings["model"]["kernels"] == "openequivariance"
    assert (settings["train"]["plateau"], settings["train"]["clip_norm"]) == ({"factor": 1.0}, None)
    assert not settings.keys() & {"optimizer", "scheduler"}


def every_mapping(values, path=()):
    if isinstance(values, dict):
        yield path
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from every_mapping(value, (*path, key))


@pytest.mark.parametrize("name", FILES)
def test_no_key_is_dropped_silently(name, tmp_path):
    for path in every_mapping(content(name)):
        values = content(name)
        target = values
        for key in path:
            target = target[key]
        target["unheard_of"] = 7
        try:
            settings, remarks = converted(values, tmp_path)
        except InputError as refusal:
            remarks, settings = [str(refusal)], {}
        is_kept = "unheard_of" in str(settings.get("optimizer")) + str(
            settings.get("scheduler")
        )  # torch will refuse it
        if path[-1:] in [("schedule",), ("chemical_species_to_atom_type_map",)]:
            continue
        assert is_kept or any("unheard_of" in remark or str(path[-1]) in remark for remark in remarks), path


LOSSES = {
    "weights": {"_target_": "nequip.train.EnergyForceLoss", "coeffs": {"total_energy": 3.0, "forces": 1.0}},
    "defaults": {"_target_": "nequip.train.EnergyForceStressLoss"},
    "whole energies": {
        "_target_": "nequip.train.EnergyForceStressLoss",
        "per_atom_energy": False,
        "coeffs": {"total_energy": 1.0, "forces": 50.0, "stress": 0.5},
    },
    "terms": {
        "_target_": "nequip.train.MetricsManager",
        "metrics": [
            {
                "field": {"_target_": "nequip.data.PerAtomModifier", "field": "total_energy"},
                "coeff": 1,
                "metric": {"_target_": "nequip.train.MeanSquaredError"},
            },
            {"field": "forces", "coeff": 5, "metric": {"_target_": "nequip.train.MeanSquaredError"}},
        ],
    },
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_nequips(case, tmp_path):
    pytest.importorskip("nequip")
    torch.set_default_dtype(torch.float64)  # as nequip does; tests/conftest.py puts it back
    values = content("allegro")
    values["training_module"]["loss"] = LOSSES[case]
    settings, _ = converted(values, tmp_path)
    batch = collate(
        [
            Frame(np.array([1, 6, 8]), np.eye(3) * 1.2, 0.3, np.full((3, 3), 0.1), cell=np.eye(3) * 5, pbc=np.ones(3, bool),
                  stress=np.full((3, 3), 0.01)),
            Frame(np.array([1, 6]), np.eye(3)[:2] * 1.2, -0.7, np.zeros((2, 3)), cell=np.eye(3) * 4, pbc=np.ones(3, bool),
                  stress=np.full((3, 3), -0.02)),
        ],
        ("H", "C", "O"),
        4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    out = {"energy": torch.randn(2, dtype=torch.float64), "forces": torch.randn(5, 3, dtype=torch.float64)}
    out["stress"] = torch.randn(2, 3, 3, dtype=torch.float64)
    ours = EnergyForcesLoss(**settings["loss"])(out, batch)["loss"]

    def fields(energy, forces, stress):
        atoms = torch.tensor([3, 2])
        return {
            "total_energy": energy[:, None],
            "forces": forces,
            "stress": stress,
            "num_atoms": atoms,
            "batch": batch.frame,
        }

    theirs = instantiate(LOSSES[case])(
        fields(out["energy"], out["forces"], out["stress"]), fields(batch.energy, batch.forces, batch.stress)
    )
    value = next(value for key, value in theirs.items() if key.endswith("weighted_sum"))
    assert float(ours) == pytest.approx(float(value), rel=1e-12)


@pytest.fixture
def frames_file(tmp_path):
    rng = np.random.default_rng(0)
    frames = []
    for n in range(30):
        atoms = Atoms("C2H4O" if n % 2 else "CH4", positions=rng.random((7 if n % 2 else 5, 3)) * 3)
        atoms.info["energy"] = float(rng.normal() - 10)
        atoms.arrays["forces"] = rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.xyz", frames, format="extxyz")
    return tmp_path / "frames.xyz"


def test_a_run_composes_the_converted_file(frames_file, tmp_path, capsys):
    out = tmp_path / "odd name=1.yaml"
    _dispatch(["convert-config", str(HERE / "nequip.yaml"), "--out", str(out)])
    printed = capsys.readouterr()
    assert f"experiment={out}" in printed.out
    assert printed.err.count("\n") == out.read_text().count("#   ")
    config = read([f"experiment={out}", f"data.path={frames_file}", f"data.cache={tmp_path}", "train.batch_size=2"])
    assert config.model._target_ == "ddpkit.models.NequIP"
    assert (config.train.batch_size, config.train.max_epochs, config.loss.forces) == (2, 1000, 0.75)
    assert "weight_decay" not in config.optimizer
    data = open_data(config)
    spec = setup.model_spec(config, data)
    assert spec["species"] == ["C", "H", "O"]
    assert len(spec["shifts"]) == 3
    model = setup.build_model(spec, config.seed)
    optimizer = setup.build_optimizer(config, model)
    assert optimizer.defaults["weight_decay"] == 0
    assert setup.build_schedule(config, optimizer, 5) is not None
    assert [len(data.train), len(data.validation), len(data.test)] == [24, 3, 3]


def test_numbers_of_the_configuration_are_the_models(frames_file, tmp_path):
    given = ["+model.species=[O,Cu,H,C]", "+model.shifts=[1.0,2.0,3.0,4.0]", "+model.avg_num_neighbors=9.0"]
    common = ["model=nequip_tiny", "data=files", f"data.path={frames_file}", f"data.cache={tmp_path}"]
    config = read([*common, *given])
    data = open_data(config)
    spec = setup.model_spec(config, data)
    assert (spec["species"], spec["shifts"], spec["avg_num_neighbors"]) == (
        ["O", "Cu", "H", "C"],
        [1.0, 2.0, 3.0, 4.0],
        9.0,
    )
    measured = setup.model_spec(read(common), data)
    scales = dict(zip(spec["species"], spec["scales"], strict=True))
    assert {name: scales[name] for name in measured["species"]} == pytest.approx(
        dict(zip(measured["species"], measured["scales"], strict=True))
    )
    with pytest.raises(InputError, match=r"model.species lacks H, O, which .* has: add them"):
        setup.model_spec(read([*common, "+model.species=[C]"]), data)


def test_an_experiment_that_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"experiment=nowhere.yaml cannot be read \(No such file or directory\)"):
        read(["experiment=nowhere.yaml"])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="holds no settings"):
        read([f"experiment={tmp_path / 'list.yaml'}"])
    (tmp_path / "odd.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="is no YAML"):
        read([f"experiment={tmp_path / 'odd.yaml'}"])
    (tmp_path / "wrong.yaml").write_text("train: {max_epoch: 3}")
    with pytest.raises(InputError, match="max_epoch is no configuration key"):
        read([f"experiment={tmp_path / 'wrong.yaml'}"])


def changed(*path, value=None):
    def change(values):
        values = copy.deepcopy(values)
        target = values
        for key in path[:-1]:
            target = target[key]
        if value is None:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        return values

    return change


MODEL = ("training_module", "model")
BAD = {
    "no training module": (changed("training_module"), r"no training file of nequip \(it has no training_module\)"),
    "no model": (changed(*MODEL), r"it has no training_module\.model"),
    "nequip 0.6": (changed("model_builders", value=["x"]), "of nequip 0.6 or older"),
    "defaults": (changed("defaults", value=["x"]), "put together by Hydra"),
    "another model": (changed(*MODEL, "_target_", value="mace.Model"), "_target_=mace.Model has no counterpart"),
    "weights": (changed(*MODEL, "_target_", value="nequip.model.ModelFromCheckpoint"), "from_nequip"),
    "an older model": (
        changed(*MODEL, "parity_setting", value="o3_full"),
        "parity_setting is no argument of NequIPGNN",
    ),
    "another loss": (changed("training_module", "loss", "_target_", value="my.Loss"), "none of nequip's losses"),
    "another module": (changed("training_module", "_target_", value="my.Module"), "none of nequip's training modules"),
    "other data": (changed("data", "_target_", value="my.Data"), "none of nequip's data modules"),
    "a resolver": (changed("data", "seed", value="${what:1}"), "a value that cannot be resolved"),
    "a key": (changed("data", "seed", value="${what}"), "a value that cannot be resolved"),
    "a word": (changed("trainer", "max_epochs", value="many"), "trainer.max_epochs is many, which is no number"),
    "a time": (changed("trainer", "max_time", value="3 days"), "trainer.max_time=3 days is no time"),
    "a list": (changed("trainer", value=[1]), r"trainer is \[1\], where nequip has a mapping"),
    "types": (changed(*MODEL, "type_names", value=["C3", "C4"]), "has the type C3"),
    "shifts": (changed(*MODEL, "per_type_energy_shifts", value={"C": 1.0}), "per_type_energy_shifts is neither"),
    "no cutoff": (changed(*MODEL, "r_max"), "r_max is missing"),
    "a dtype": (changed(*MODEL, "model_dtype", value="float16"), "model_dtype=float16 is unknown"),
    "no file of frames": (changed("data", "split_dataset"), "name the file of frames"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_in_one_sentence(case, tmp_path):
    change, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence) as refusal:
        converted(change(content("nequip")), tmp_path)
    assert "\n" not in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        convert(tmp_path / "nothing.yaml")
    for text in ("a: [1", "- 1", "words", ""):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(InputError, match=r"cannot be read as YAML|no training file") as refusal:
            convert(tmp_path / "odd.yaml")
        assert "\n" not in str(refusal.value)
    (tmp_path / "odd.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(InputError):
        convert(tmp_path / "odd.yaml")


def test_the_file_is_not_written_over(tmp_path):
    path = tmp_path / "nequip.yaml"
    path.write_text((HERE / "nequip.yaml").read_text())
    with pytest.raises(InputError, match="is the file that is converted"):
        _dispatch(["convert-config", str(path), "--out", str(path)])
    with pytest.raises(InputError, match="cannot be written"):
        _dispatch(["convert-config", str(path), "--out", str(path / "below.yaml")])
