"""The ways a command ends early, each one line: what is wrong, where, and what to do."""


class InputError(Exception):
    """The user's file, flag, model or cluster address is wrong. The command exits with 2."""

    exit_code = 2


class RunError(Exception):
    """The run was asked for properly and failed all the same. The command exits with 1."""

    exit_code = 1


class Stopped(RunError):
    """Ctrl-C: what was begun was finished and saved. The command exits with 130."""

    exit_code = 130


class MissingExtraError(InputError):
    """A dependency that is an extra is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed: pip install 'srl-rlvr[{extra}]'")
