"""Equivariant interatomic potentials."""

from ddpkit.models.allegro import Allegro as Allegro
from ddpkit.models.as_nequip import save_nequip as save_nequip
from ddpkit.models.as_nequip import to_nequip as to_nequip
from ddpkit.models.convert import from_nequip as from_nequip
from ddpkit.models.nequip import NequIP as NequIP

__all__ = ["Allegro", "NequIP", "from_nequip", "save_nequip", "to_nequip"]
