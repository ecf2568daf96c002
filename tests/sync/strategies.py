"""Strategies of a user's own, some of them wrong."""

import os
import time

import ddpkit
from ddpkit.sync.overlap import OverlapSync


class Plain(ddpkit.GradientSync):
    """The example of the documentation."""

    def reduce(self):
        for parameter in self.parameters.values():
            self.all_reduce(parameter.grad)


class Aborts(ddpkit.FlatSync):
    """Ends its process where a gradient is lacking, as a library below Python may."""

    def reduce(self):
        if any(parameter.grad is None for parameter in self.parameters.values()):
            print("the library ends here", flush=True)
            os.abort()
        super().reduce()


class Sleeps(ddpkit.GradientSync):
    """Never comes back."""

    def reduce(self):
        time.sleep(600)


class Unloadable:
    """Cannot be handed to a rank."""

    def __call__(self, *modules, **options):
        raise NotImplementedError

    def __reduce__(self):
        return exec, ("raise ValueError('cannot be rebuilt')",)


class Forgetful(ddpkit.GradientSync):
    """Leaves one parameter out."""

    def reduce(self):
        for parameter in list(self.parameters.values())[1:]:
            self.all_reduce(parameter.grad)


class Summing(ddpkit.GradientSync):
    """Sums where it should average."""

    def reduce(self):
        for parameter in self.parameters.values():
            self.comm.all_reduce(parameter.grad).wait()


class ManyBuckets(OverlapSync):
    """`overlap` whose buckets hold a parameter or two of a model in a test."""

    def __init__(self, module, *others, **options):
        super().__init__(module, *others, bucket_mb=1e-4, first_bucket_mb=1e-5, **options)


class ModelAlone(ddpkit.GradientSync):
    """Has no place for further modules."""

    def __init__(self, module, **options):
        super().__init__(module, **options)


class DropsOthers(ddpkit.GradientSync):
    """Takes further modules and forgets them."""

    def __init__(self, module, *others, **options):
        assert others
        super().__init__(module, **options)


class LikeGpu(ddpkit.FlatSync):
    """Looks at the flags as on a GPU: later, if all optimizers skip by themselves."""

    def _lay_out(self):
        super()._lay_out()
        self._on_device = True
