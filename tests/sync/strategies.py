"""Strategies of a user's own, some of them wrong."""

import ddpkit


class Plain(ddpkit.GradientSync):
    """The example of the documentation."""

    def reduce(self):
        for parameter in self.parameters.values():
            self.all_reduce(parameter.grad)


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
