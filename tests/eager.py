"""What a stand-in for common.Run needs of it to run training phases one by one."""


class Eager:
    def graph(self, phase, *optimizers, key=None):
        """phase, then self.step of the optimisers with the gradients that it left."""

        def phase_and_step(*args):
            result = phase(*args)
            if optimizers:
                self.step(*optimizers)
            return result

        return phase_and_step
