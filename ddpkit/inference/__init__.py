"""Models for inference: one compiled file for Python, ASE and LAMMPS."""
