"""The errors of this package, split by what mends them. Imports nothing.

An error says "cannot X: why; how to mend it". A failed probe is a value, not an error.
"""


class SynapseError(Exception):
    """Base of all; `str()` is one line fit for a person."""


class ConfigError(SynapseError):
    """The operator must change something (settings, templates, permissions, engine).

    `problems` holds one line each; all are found before it is raised.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CatalogError(SynapseError):
    """One file cannot be a model; it is skipped and reported, nothing else suffers."""


class TransientError(SynapseError):
    """The world did not answer this time; the next tick tries again."""


class ShuttingDown(SynapseError):
    """supervisord is stopping; whoever sees it stops too."""


class ApplyError(SynapseError):
    """A change could not be carried out as a whole."""


class RollbackFailed(SynapseError):
    """A change failed, and so did undoing it; a person is needed."""
