"""Models with what the settings and commands say of them: which may run, and why not. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.model import Program, Role
from supervisor_synapse.core.settings import Enable, ModelSettings, Settings, TierRule

# One quantization of a repo is brought up: the best known balance of size and quality first.
_PREFERRED_QUANTIZATIONS = (
    "Q4_K_M", "Q5_K_M", "Q4_K_S", "Q5_K_S", "IQ4_NL", "IQ4_XS", "Q4_K_L", "Q4_0", "Q4_1", "MXFP4",
    "MXFP4_MOE", "Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "F16", "BF16", "Q2_K", "F32",
)  # fmt: skip
_DEFAULT_PARALLEL = 4
_SMALLEST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model with what the settings say of it."""

    model: Model
    said: ModelSettings
    rule: TierRule
    is_commanded: bool = False  # enabled or disabled by command

    @property
    def order(self) -> tuple[int, int, str]:
        return (self.rule.priority, self.model.size_bytes, self.model.name)

    @property
    def alias(self) -> str:
        return self.said.alias or self.model.name

    @property
    def parallel(self) -> int:
        return self.said.parallel or _DEFAULT_PARALLEL

    @property
    def all_layers(self) -> int:
        """The output layer counts as one."""
        return self.model.header.layers + 1

    @property
    def contexts(self) -> tuple[int, ...]:
        """Context sizes to try, largest first."""
        if self.said.context is not None:
            return (self.said.context,)
        trained = self.model.header.context_length or self.rule.max_context
        largest = max(min(trained, self.rule.max_context), 1)
        return halved(largest, max(min(trained, self.rule.min_context), 1))


def halved(largest: int, floor: int) -> tuple[int, ...]:
    """`largest`, its half and so on, whole blocks of cells, down to `floor`."""
    contexts = [largest]
    while contexts[-1] // 2 >= max(floor, _SMALLEST_CONTEXT):
        half = contexts[-1] // 2 // _SMALLEST_CONTEXT * _SMALLEST_CONTEXT
        contexts.append(max(half, floor))
    if contexts[-1] > floor:
        contexts.append(floor)
    return tuple(contexts)


def repo_file(model: Model | Program) -> str:
    """What `[model:GLOB]` matches beside the program name."""
    return f"{model.repo}/{model.file}" if model.repo else model.file


def candidate_of(model: Model, settings: Settings, intent: Mapping[str, bool]) -> Candidate:
    """A command wins over synapse.conf."""
    said = settings.for_model(model.name, repo_file(model))
    commanded = intent.get(model.name)
    if commanded is not None:
        said = replace(said, enabled=commanded)
    tier = said.tier
    rule = settings.rule(tier) if tier else settings.tier_of(model.header.parameters)
    return Candidate(model, said, rule, commanded is not None)


def family_of(model: Model) -> str:
    """Quantizations of one model: the same repo, architecture, and number of parameters."""
    if model.repo is None:
        return model.key
    return f"{model.repo}\0{model.header.architecture}\0{model.header.parameters}"


def is_by_fit(candidate: Candidate, settings: Settings) -> bool:
    """Whether memory alone decides if it is enabled."""
    return candidate.said.enabled is None and settings.enable is Enable.FIT


def may_run(candidate: Candidate, enable: Enable) -> bool:
    if candidate.said.enabled is not None:
        return candidate.said.enabled
    return enable is not Enable.NONE and candidate.model.role is not Role.DRAFT


def why_not(candidate: Candidate, settings: Settings) -> str:
    if candidate.is_commanded:
        return "disabled by command"
    if candidate.said.enabled is False:
        return "enabled = false in synapse.conf"
    if candidate.model.role is Role.DRAFT:
        return "a draft model is served beside its main model, not alone"
    return f"enable = {settings.enable.value} in synapse.conf"


def rank_of(quantization: str) -> int:
    """Which one of a repo is brought up first."""
    if quantization in _PREFERRED_QUANTIZATIONS:
        return _PREFERRED_QUANTIZATIONS.index(quantization)
    return len(_PREFERRED_QUANTIZATIONS)
