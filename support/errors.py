"""What a command says when it can't do what was asked."""


class BadInput(ValueError):
    """One line: the setting, its value, what is wrong, and a remedy. Settings stand in backticks, by field:

        `train_kb` 0: not possible; give a number of at least 0.001

    The command line makes flags of them (settings.status_of) and exits with status 2.
    """


class Diverged(BadInput):
    """A loss grew without bound: the learning rate, or the noise, was too large."""
