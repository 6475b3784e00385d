"""The errors that are written for users: what is wrong, where, and how to mend it."""


class StageError(ValueError):
    """Bad input or surroundings, in words that a user can act on."""


class ConfigError(StageError):
    """All that is wrong with a config, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems[0] if len(problems) == 1 else "\n  ".join(["the configuration is wrong:", *problems]))
        self.problems = problems
