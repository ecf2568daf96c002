import argparse

import numpy as np
import pytest
from helpers import crystal
from layouts import write_mptrj, write_spice

from ddpkit import InputError
from ddpkit.data import PreparedSet, write_prepared
from ddpkit.experiments import data


def run(*words):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    data.main(parser.parse_args([str(word) for word in words]))


def test_prepare_and_info_report_counts_as_the_paper_does(tmp_path, capsys):
    counts = write_spice(tmp_path / "s.hdf5", copies=3)
    run("prepare", "spice", tmp_path / "s.hdf5", "--out", tmp_path / "set", "--processes", 0)
    capsys.readouterr()
    run("info", tmp_path / "set", "--ranks", 3, "--batch-size", 12, "--verify")
    said = capsys.readouterr().out
    assert f"{counts['all']} frames read; {counts['charged']} dropped: charged" in said
    assert "2 dropped: isolated atoms" in said
    assert "all arrays match" in said
    assert "SPICE Water Clusters" in said
    assert "slowest of 3 ranks over the mean" in said


def test_filters_can_be_turned_off_and_energies_chosen(tmp_path):
    counts = write_spice(tmp_path / "s.hdf5")
    run("prepare", "spice", tmp_path / "s.hdf5", "--out", tmp_path / "all", "--processes", 0,
        "--no-drop-charged", "--no-drop-isolated", "--no-drop-unlabelled")  # fmt: skip
    assert len(PreparedSet(tmp_path / "all")) == counts["all"]
    frames = write_mptrj(tmp_path / "m.json", 4)
    run("prepare", "mptrj", tmp_path / "m.json", "--out", tmp_path / "m", "--processes", 0, "--energy", "corrected")
    assert len(PreparedSet(tmp_path / "m")) == frames
    assert "corrected" in PreparedSet(tmp_path / "m").manifest["labels"]


def test_generate_into_the_cache_and_elsewhere(tmp_path, capsys):
    run("generate", "generated_crystals", "--frames", 4, "--cache", tmp_path)
    assert "analytic" in capsys.readouterr().out
    run("generate", "generated_crystals", "--frames", 4, "--out", tmp_path / "mine")
    (kept,) = tmp_path.glob("generated_crystals*")
    for name in ("positions.npy", "manifest.json"):
        assert (kept / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()


def test_bad_input_is_one_sentence(tmp_path):
    write_prepared(tmp_path / "set", [crystal(np.random.default_rng(0)) for _ in range(4)], r_max=3.0)
    for words in (
        ("info", tmp_path / "nothing"),
        ("info", tmp_path / "set", "--batch-size", 99),
        ("info", tmp_path / "set", "--ranks", 0),
        ("info", tmp_path / "set", "--r-max", -1),
        ("prepare", "spice", tmp_path / "nothing", "--out", tmp_path / "x"),
        ("prepare", "mptrj", tmp_path / "nothing", "--out", tmp_path / "x"),
        ("prepare", "ase", tmp_path / "nothing", "--out", tmp_path / "x"),
        ("prepare", "ase", tmp_path / "set", "--out", tmp_path / "x"),
        ("generate", "--frames", 0),
    ):
        with pytest.raises(InputError) as caught:
            run(*words)
        assert "\n" not in str(caught.value)
