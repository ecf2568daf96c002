"""Exported models in LAMMPS: a plugin, compiled here, and LAMMPS started with what it needs."""
