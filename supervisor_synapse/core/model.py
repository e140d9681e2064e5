"""The frozen values that travel between the parts.

Sizes are bytes, times are seconds. A *model* is one loadable unit (one file, or all the
shards of one); a *program* is what supervisord runs for it; an *incarnation* is one run of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class FileKind(Enum):
    """What a GGUF file is, by its header. Only `MODEL` is ever served."""

    MODEL = "model"
    PROJECTOR = "projector"
    ADAPTER = "adapter"
    VOCABULARY = "vocabulary"
    IMATRIX = "imatrix"


class Role(Enum):
    """What a model is for."""

    TEXT = "text"
    VISION = "vision"
    EMBEDDING = "embedding"
    RERANKER = "reranker"
    DRAFT = "draft"


class Tier(Enum):
    """The routing tiers of the engine, FAST first. Configured in lower case, shown in upper."""

    FAST = "fast"
    BALANCED = "balanced"
    POWERFUL = "powerful"

    @property
    def label(self) -> str:
        return self.value.upper()


class Phase(Enum):
    """Where a model is in its life."""

    DISABLED = "disabled"
    PENDING = "pending"
    DEFERRED = "deferred"
    LOADING = "loading"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    STOPPING = "stopping"
    VERIFYING = "verifying"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    FAILED = "failed"


# Nothing of a model runs, and nothing is under way.
AT_REST = frozenset({Phase.STOPPED, Phase.DISABLED, Phase.FAILED})

# A model in one of these is on its way to another; look again soon.
UNDER_WAY = frozenset(
    {Phase.PENDING, Phase.LOADING, Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING}
)


class ProcessState(IntEnum):
    """supervisord's own states of a process (supervisor.states.ProcessStates)."""

    STOPPED = 0
    STARTING = 10
    RUNNING = 20
    BACKOFF = 30
    STOPPING = 40
    EXITED = 100
    FATAL = 200
    UNKNOWN = 1000


class Health(Enum):
    """What one probe of a server found. No evidence is `UNKNOWN`, and changes nothing."""

    UNKNOWN = "unknown"
    REFUSED = "refused"
    LOADING = "loading"
    READY = "ready"
    SILENT = "silent"  # no answer within the timeout
    BROKEN = "broken"  # an answer that no healthy server gives


class FailureClass(Enum):
    """Why a model failed; decides what happens next."""

    OUT_OF_MEMORY = "out-of-memory"
    BAD_ARGUMENT = "bad-argument"
    MODEL_MISSING = "model-missing"
    MODEL_CORRUPT = "model-corrupt"
    PORT_IN_USE = "port-in-use"
    NOT_OFFLOADED = "not-offloaded"
    CRASHED = "crashed"
    UNRESPONSIVE = "unresponsive"
    WEDGED = "wedged"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Names the bytes of a file as far as `stat` can: same identity, same header."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of one GGUF header; one shard's where the model is split.

    Per-layer tuples hold one value for each block, or a single one that holds for all.
    A count that the header does not state is 0; text that it does not state is None.
    """

    kind: FileKind
    architecture: str
    name: str | None = None
    quantization: str = "unknown"  # the file type's name ("Q4_K_M"), else the commonest tensor type
    parameters: int = 0  # elements over all tensors of this file
    layers: int = 0
    context_length: int = 0  # trained
    embedding_length: int = 0
    feed_forward_length: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    heads_kv: tuple[int, ...] = ()
    key_length: int = 0  # per head
    value_length: int = 0
    key_length_mla: int = 0
    value_length_mla: int = 0
    kv_lora_rank: int = 0
    sliding_window: int = 0
    sliding_window_pattern: tuple[int, ...] = ()  # a period, or 1 (windowed) / 0 (full) per layer
    window_key_length: int = 0  # per head, in layers with a window; 0: as in the others
    window_value_length: int = 0
    shared_kv_layers: int = 0  # the last so many use the caches of those before
    attention_interval: int = 0  # each so many layers one with attention, the others recurrent
    recurrent_layers: tuple[int, ...] = ()  # 1 (recurrent) or 0 per layer
    predicting_layers: int = 0  # of `layers`, the last ones: they predict further tokens (MTP)
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward_length: int = 0
    shared_experts: int = 0  # in use for every token
    ungated: bool = False  # the feed forward has no gate beside its projection
    recurrent_state: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    # conv_kernel, inner_size, state_size, time_step_rank, group_count of `{arch}.ssm.*`
    short_convolution: int = 0  # length of LFM2's cache
    wkv_head_size: int = 0  # of RWKV
    token_shifts: int = 0  # of RWKV, per layer
    kda_head_size: int = 0  # of Kimi's linear attention
    pooling: int | None = None  # 0 none, 1 mean, 2 cls, 3 last, 4 rank
    causal_attention: bool | None = None
    classifier: bool = False  # a classification head among the tensors or labels in the header
    vocabulary_size: int = 0  # tokens
    chat_template_sha256: str | None = None
    has_vision: bool = False  # projector: has an image encoder
    has_audio: bool = False
    projection_dim: int = 0  # projector: width of the text model that it feeds
    image: tuple[int, int, int] = (0, 0, 0)
    # projector: patches of one image, width and feed forward of the encoder that sees them
    tags: tuple[str, ...] = ()  # general.tags, at most 32 of at most 64 characters
    split_index: int = 0  # from 0
    split_count: int = 0  # 0 or 1: not split
    tensors: int = 0
    header_bytes: int = 0  # up to the first tensor's data
    tensor_bytes: int = 0  # all tensor data of this file
    block_bytes: tuple[int, ...] = ()  # tensor data of `blk.i.*`, by i
    expert_bytes: tuple[int, ...] = ()  # of that, the experts'
    embedding_bytes: int = 0  # token_embd
    input_bytes: int = 0  # that, and what else turns tokens into the first layer's input
    has_output: bool = False  # an output.weight of its own (else token_embd serves as output)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found while looking, in a line that names what and how to mend it.

    `subject` and `reason` are printable and safe to show.
    """

    subject: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        mend = f"; to mend it: {self.remedy}" if self.remedy else ""
        return f"{self.subject}: {self.reason}{mend}"


@dataclass(frozen=True, slots=True)
class Device:
    """Memory that a model can live in, as last read."""

    name: str  # the engine's name (CUDA0, Vulkan0, RPC0 …), or CPU for the host
    total_bytes: int
    free_bytes: int
    description: str = ""

    @property
    def is_host(self) -> bool:
        return self.name == "CPU"


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """The memory of one device now, in bytes.

    `free_bytes` is None where its reader failed: then nothing is known, least of all that memory is
    free, and `problem` says why. `held_bytes`: by program name, where the driver tells.
    """

    name: str  # the engine's name, or CPU
    total_bytes: int
    free_bytes: int | None
    held_bytes: tuple[tuple[str, int], ...] = ()
    problem: str = ""


class Source(Enum):
    """Where a figure for memory comes from; the first is the best."""

    LEARNED = "learned"  # an earlier load of the same file, arguments, engine and device
    DRY_RUN = "dry-run"  # the engine's own word, without loading
    CALIBRATED = "calibrated"  # the formula, with the model's scratch from a load or a dry run
    HEADER = "header"  # the formula alone


@dataclass(frozen=True, slots=True)
class Part:
    """What one model takes on one device, in bytes; `device` is the engine's name, or CPU."""

    device: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0  # scratch, and the buffer for what comes out
    overhead_bytes: int = 0  # what the process takes beside its buffers

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.recurrent_bytes
            + self.compute_bytes
            + self.overhead_bytes
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model will take, device by device (each once), and where the figures come from."""

    parts: tuple[Part, ...] = ()
    source: Source = Source.HEADER

    @property
    def total_bytes(self) -> int:
        return sum(part.total_bytes for part in self.parts)

    @property
    def kv_bytes(self) -> int:
        return sum(part.kv_bytes for part in self.parts)

    def on(self, device: str) -> int:
        """Bytes on one device."""
        return sum(part.total_bytes for part in self.parts if part.device == device)


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama-server that can be run: where it is and which flags its help lists."""

    path: str
    version: str
    flags: frozenset[str]


def http_url(host: str, port: int) -> str:
    """Where a server on an address answers."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve a model: what is started, and what that takes.

    The ladder of a model begins with what was configured; each further rung takes less memory.
    """

    label: str  # "as configured", "context 4096", "12 of 29 layers on CUDA0" …
    key: str  # of the model whose files are served: its own, or another on the lower rungs
    context: int
    device: str  # where most of it lies, for people: "CUDA0", "CUDA0,CUDA1", "CPU"
    arguments: tuple[str, ...]  # for llama-server, without the files
    estimate: Estimate
    model_path: str
    projector_path: str | None = None
    shards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """What supervisord shall run for one model, and what everyone else must know of it."""

    name: str
    key: str  # the model's stable identity, by which the registry knows it
    repo: str | None
    file: str
    tier: Tier
    role: Role
    priority: int
    enabled: bool
    reason: str  # why it is enabled or not, with the numbers
    host: str
    port: int
    alias: str
    context: int
    parallel: int
    device: str
    estimate: Estimate
    size_bytes: int
    quantization: str
    parameters: int
    model_path: str
    projector_path: str | None
    shards: tuple[str, ...]
    arguments: tuple[str, ...]  # for llama-server, without the files
    fallback: str | None = None
    pinned: bool = False
    ladder: tuple[Variant, ...] = ()  # () where there is nothing to choose
    rung: int = 0  # of the ladder: the one that is deployed

    @property
    def estimate_bytes(self) -> int:
        return self.estimate.total_bytes

    @property
    def estimate_source(self) -> str:
        return self.estimate.source.value

    @property
    def url(self) -> str:
        return http_url(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One run of a program: supervisord's pid for it and when that was started."""

    pid: int
    started_at: int  # supervisord's wall clock, whole seconds; only ever compared for equality


@dataclass(frozen=True, slots=True)
class Failure:
    """The last thing that went wrong with a model, with its evidence."""

    failure_class: FailureClass
    message: str
    at: float  # wall clock, seconds since the epoch


class Breaker(Enum):
    """Whether a model that failed often is left alone for a while (see core/restarts.py)."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"  # one trial


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server last told of its work; None where it does not tell."""

    queued: int | None = None  # requests that wait for a slot
    prompt_tokens: int | None = None  # read since its start
    generated_tokens: int | None = None  # written since its start
    probe_seconds: float | None = None  # until the last probe was answered
    is_asleep: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One model as every surface shows it; a line of `models`."""

    name: str
    repo: str | None
    file: str
    tier: Tier
    role: Role
    enabled: bool
    phase: Phase
    reason: str
    state: ProcessState
    pid: int
    port: int
    url: str
    alias: str
    context: int
    parallel: int
    device: str
    estimated_bytes: int
    estimate_source: str
    measured_bytes: int | None
    slots_busy: int | None
    slots_total: int
    restarts: int
    ready_seconds: float | None  # from its start to ready, of the incarnation that runs
    generation: int
    trial: bool
    last_failure: Failure | None
    next_retry_seconds: float | None
    started_at: int | None = None  # the run that is up: wall clock, whole seconds
    breaker: Breaker = Breaker.CLOSED
    failures: tuple[tuple[str, int], ...] = ()  # by class, how often since the listener began
    usage: Usage = Usage()

    @property
    def explanation(self) -> str:
        """Why it is as it is, with the evidence where it failed or waits to be tried again."""
        if self.phase in (Phase.BACKOFF, Phase.FAILED) and self.last_failure is not None:
            return f"{self.reason}: {self.last_failure.message}"
        return self.reason


@dataclass(frozen=True, slots=True)
class Holding:
    """What one model has of a device, in bytes."""

    model: str
    held_bytes: int | None  # measured; None where no reader tells
    committed_bytes: int  # set aside for it: what it holds and what it may still take


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device as every surface shows it, in bytes; None where its reader does not tell."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int | None  # as the driver says
    reserve_bytes: int  # kept free
    room_bytes: int | None  # what may still be given to models
    others_bytes: int | None  # taken by what is not ours
    models: tuple[Holding, ...] = ()
    problem: str = ""  # why nothing is known


@dataclass(frozen=True, slots=True)
class ListenerRow:
    """The listener about itself."""

    pid: int
    version: str
    started_at: float  # wall clock
    turn_seconds: float  # the last look at everything, from beginning to end
    lag_seconds: float  # how much later than planned it began


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the listener knew at one time."""

    at: float  # wall clock, seconds since the epoch
    models: tuple[Row, ...]
    devices: tuple[DeviceRow, ...] = ()
    listener: ListenerRow | None = None
