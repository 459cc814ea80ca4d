"""The configuration files, one class each; every key is declared here and nowhere else.

    distributed_config.json    DistributedConfig    `mesh shard-model`, `mesh plan`
    distributed_config.yaml    ModelConfig          `mesh plan`
    coordinator config.yaml    CoordinatorConfig    `mesh coordinator`
    gateway config.yaml        GatewayConfig        `mesh gateway`
    shard config.yaml          ShardConfig          `mesh shard`
    network config.yaml        NetworkConfig        `mesh shard-model --network`

`load_config(path, Class)` reads one; the environment can override any key (see mesh/settings/files.py). GB and MB are 10^9 and
10^6 bytes; durations are `5s`, `24h` or a number of seconds.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from mesh.errors import ConfigError
from mesh.settings.defaults import (
    DEFAULT_HTTP_PORT,
    DEFAULT_INBOX_PREFIX,
    DEFAULT_METRICS_PORT,
    DEFAULT_NATS_URL,
    DEFAULT_ROWS,
    INBOX_ROOT,
)
from mesh.settings.files import ConfigFile, Section, load_config
from mesh.settings.units import GB, MB, parse_rate, parse_seconds

__all__ = [
    "AuthenticationConfig",
    "AuthenticationSection",
    "ConnectionConfig",
    "CoordinatorConfig",
    "DistributedConfig",
    "GatewayConfig",
    "HealthSection",
    "HttpSection",
    "LoadBalancing",
    "LoggingConfig",
    "LoggingSection",
    "MetricsConfig",
    "MetricsSection",
    "ModelConfig",
    "NatsSection",
    "NetworkConfig",
    "QuotaSection",
    "ReplicationMode",
    "ReuseScope",
    "ShardConfig",
    "TlsSection",
    "TracingSection",
    "load_config",
]

LoadBalancing = Literal["least_loaded", "round_robin", "queue_group"]
"""least_loaded: the lighter of two random replicas; round_robin: in turn; queue_group: NATS decides."""

ReplicationMode = Literal["balance", "mirror"]
"""How the shards of one range stand in for each other. balance: sessions are spread over them, and one that loses its shard has
its history computed again. mirror: a second shard computes each session's steps too, and goes on where the first one ends."""

ReuseScope = Literal["off", "tenant", "all"]
"""Which sessions may begin with the rows that earlier ones have left. off: none; tenant: those of the same caller; all: any."""

QuantizationBits = Literal[16, 8, 4]


def _duration(value: Any) -> float:
    try:
        return parse_seconds(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _rate(value: Any) -> float:
    try:
        return parse_rate(str(value))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _url_list(value: Any) -> Any:
    urls = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    if not isinstance(urls, (list, tuple)) or not urls:
        raise ValueError("should be a list of NATS URLs, such as [nats://10.0.1.100:4222]")
    for url in urls:
        if not isinstance(url, str) or url.partition("://")[0] not in ("nats", "tls", "ws", "wss") or not url.partition("://")[2]:
            raise ValueError(f"{url!r} is not a NATS URL: write it as nats://10.0.1.100:4222 or tls://...")
    return tuple(urls)


Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
"""Seconds; written `5s`, `1m30s`, `24h` or a number."""

Rate = Annotated[float, BeforeValidator(_rate), Field(gt=0)]
"""Bytes per second; written `1Gbit/s` or `100MB/s`."""

Port = Annotated[int, Field(ge=1, le=65535)]
FreePort = Annotated[int, Field(ge=0, le=65535)]
"""0: any that is free."""

Count = Annotated[int, Field(ge=1)]
Gigabytes = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NatsSection(Section):
    """Where the NATS servers are, and which user connects. One server suffices to join. At most one kind of credentials may be given.

    A password or token comes from a file of its own, from the environment (MESH_NATS_PASSWORD), or from `${NAME}`; no message shows it.
    """

    urls: Annotated[tuple[str, ...], BeforeValidator(_url_list)] = (DEFAULT_NATS_URL,)
    credentials_file: str | None = None  # .creds: a user's JWT and seed
    nkey_seed_file: str | None = None  # the seed alone
    user: str | None = None
    password: SecretStr | None = None
    password_file: str | None = None
    token: SecretStr | None = None
    token_file: str | None = None
    inbox_prefix: str = DEFAULT_INBOX_PREFIX  # the subjects of answers; a prefix for each user keeps their answers apart
    tls_ca_file: str | None = None  # the authority that signed the server's certificate; None: the system's
    tls_cert_file: str | None = None  # shown to the server, with its key
    tls_key_file: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> NatsSection:
        ways = [name for name in ("credentials_file", "nkey_seed_file", "user", "token", "token_file") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} each say who connects: keep one")
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file say the same: keep one")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together: give both or neither")
        if not re.fullmatch(rf"{INBOX_ROOT}(\.[A-Za-z0-9_-]+)*", self.inbox_prefix):
            raise ValueError(f"inbox_prefix {self.inbox_prefix!r} is no subject of answers: give _INBOX, or _INBOX_ and a name")
        return self


class ConnectionConfig(ConfigFile):
    """The connection of commands that read no file: from the environment alone."""

    nats: NatsSection = NatsSection()


class PerformanceSection(Section):
    """How much memory is set aside: `batch_size` rows (sequences at once) of `max_sequence_length` tokens each."""

    batch_size: Count = DEFAULT_ROWS
    max_sequence_length: Count | None = None  # None: the model's context
    enable_kv_cache: bool = True  # false: nothing is kept between steps, every step computes the whole prefix


class DistributedConfig(ConfigFile):
    """distributed_config.json: a model to spread over equal shards. The keys after load_balancing_strategy are optional."""

    model_path: str = Field(min_length=1)  # a source or a model directory; relative to the file, then to the working directory
    total_layers: Count
    shards_count: Count  # layer ranges; replication_factor shards serve each
    max_shard_memory_mb: Count
    replication_factor: Count = 1
    load_balancing_strategy: LoadBalancing = "least_loaded"
    layers_per_shard: Count | None = None
    overlap_layers: Annotated[int, Field(ge=0)] = 0
    batch_size: Count | None = None  # None: DEFAULT_ROWS, or as many as fit
    max_sequence_length: Count | None = None
    enable_kv_cache: bool = True
    quantization_bits: QuantizationBits | None = None
    total_parameters: Count | None = None  # for an estimate before the model is there
    vocab_size: Count | None = None

    @model_validator(mode="after")
    def _agree(self) -> DistributedConfig:
        _check_split(self.total_layers, self.shards_count, self.layers_per_shard, "", "")
        return self

    @property
    def max_shard_memory_bytes(self) -> int:
        return self.max_shard_memory_mb * MB


class ModelSection(Section):
    """What is known of a model before it is imported. The keys after vocab_size are estimated if they are missing."""

    name: str = Field(min_length=1)
    format: Literal["onnx", "safetensors", "gguf"] = "onnx"
    total_parameters: Count
    total_layers: Count
    vocab_size: Count
    hidden_size: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None


class ShardingSection(Section):
    strategy: Literal["layer_wise"] = "layer_wise"
    shards_count: Count
    layers_per_shard: Count | None = None
    overlap_layers: Annotated[int, Field(ge=0)] = 0  # layers of each neighbour that a shard holds as well
    replication_factor: Count = 1


class MemorySection(Section):
    max_shard_memory_gb: Gigabytes
    enable_quantization: bool = True  # false: weights in 32 bits
    quantization_bits: QuantizationBits = 16


class ModelConfig(ConfigFile):
    """The model configuration: how to spread a model that may not be there yet."""

    model: ModelSection
    sharding: ShardingSection
    memory: MemorySection
    performance: PerformanceSection = PerformanceSection()

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        sharding = self.sharding
        _check_split(self.model.total_layers, sharding.shards_count, sharding.layers_per_shard, "sharding.", "model.")
        return self

    @property
    def bits(self) -> Literal[32, 16, 8, 4]:
        return self.memory.quantization_bits if self.memory.enable_quantization else 32

    @property
    def max_shard_memory_bytes(self) -> int:
        return round(self.memory.max_shard_memory_gb * GB)


class HttpSection(Section):
    """An HTTP listener. health_check_interval: how long a health check may take that generates a token to see whether the mesh answers."""

    listen_host: str = Field(default="127.0.0.1", min_length=1)  # not on loopback, tokens are asked for: see authentication
    listen_port: FreePort = DEFAULT_HTTP_PORT
    max_connections: Count = 1000
    health_check_interval: Duration = 5.0
    max_body_bytes: Count = 4 * 1024 * 1024
    max_prompt_chars: Count = 1_000_000
    request_timeout: Duration = 600.0  # for a whole generation
    drain_timeout: Duration = 10.0  # how long requests may continue when the process is told to end
    cors_origins: list[str] = Field(default_factory=list)  # web pages of these origins may send requests
    retry_count: Annotated[int, Field(ge=0)] = 3  # how often a request is sent to the mesh again after a loss


class TlsSection(Section):
    """HTTPS. With `ca_file`, client certificates must be signed by that authority; clients must show one if it is required."""

    enabled: bool = True
    cert_file: str = Field(min_length=1)
    key_file: str = Field(min_length=1)
    ca_file: str | None = None
    require_client_certificate: bool = False

    @model_validator(mode="after")
    def _agree(self) -> TlsSection:
        if self.require_client_certificate and self.ca_file is None:
            raise ValueError("require_client_certificate needs ca_file: the authority that signs them")
        return self


class QuotaSection(Section):
    """What a subject may use. None: no limit."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_sessions: Count | None = None
    requests_per_batch: Count | None = None


class AuthenticationSection(QuotaSection):
    """Who may send requests: holders of a JSON Web Token, or of an API key. The secret of HS256 comes from the environment
    (`${JWT_SECRET}`) or a file. RS256 and EdDSA tokens are checked with `public_key_file` and issued (`mesh token issue`) with
    `private_key_file`. The limits of this section are for tokens and keys without limits, of subjects that are not in `subjects`."""

    enabled: bool | None = None  # None: if other machines can reach the listener
    method: Literal["jwt"] = "jwt"
    algorithm: Literal["HS256", "RS256", "EdDSA"] = "HS256"
    secret_key: SecretStr | None = None
    secret_key_file: str | None = None
    public_key_file: str | None = None
    private_key_file: str | None = None
    token_expiry: Duration = 86400.0  # of tokens issued here
    api_keys_file: str | None = Field(default=None, min_length=1)  # the hashes of API keys: `mesh token key` adds one
    subjects: dict[str, QuotaSection] = Field(default_factory=dict)  # by the name of the subject

    @model_validator(mode="after")
    def _agree(self) -> AuthenticationSection:
        if self.secret_key is not None and self.secret_key_file is not None:
            raise ValueError("secret_key and secret_key_file say the same: keep one")
        secret = self.secret_key is not None or self.secret_key_file is not None
        if self.algorithm == "HS256" and (self.public_key_file or self.private_key_file):
            raise ValueError("HS256 has a secret and no key pair: set algorithm to RS256 or EdDSA, or leave the key files out")
        if self.algorithm != "HS256" and secret:
            raise ValueError(f"{self.algorithm} has a key pair and no secret: give public_key_file, or set algorithm to HS256")
        return self


class CoordinatorSection(HttpSection):
    serve_http: bool = True  # false: serve only over NATS; gateways may serve HTTP


class DistributedSection(Section):
    shards_count: Count
    replication_factor: Count = 1
    failover_timeout: Duration = 30.0
    step_timeout: Duration = 15.0  # the longest that a step may take
    step_slowdown: Annotated[float, Field(gt=1, le=100)] = 2.5  # how many times as long a step may take because of prompts
    load_balancing_strategy: LoadBalancing = "least_loaded"
    prefix_reuse: ReuseScope = "tenant"  # whose sessions may begin with what earlier ones have left at the shards


class PoolSection(Section):
    max_pool_size_gb: Gigabytes = 1.0
    enable_compression: bool = False


class LoggingSection(Section):
    """The log of a process. Two processes must not share a file."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"  # auto: text on a terminal, else JSON
    file: str | None = None  # None: standard error
    max_bytes: Annotated[int, Field(ge=0)] = 100_000_000  # a longer file is renamed FILE.1; 0: another program rotates it
    backups: Count = 5  # renamed files that are kept
    content: bool = False  # whether the texts of prompts and answers are logged


class LoggingConfig(ConfigFile):
    """The log of commands that read no file: from the environment alone."""

    logging: LoggingSection = LoggingSection()


class MetricsSection(Section):
    """Where the process answers GET /metrics, without a token. A port that is not given may be another free one, which the log names."""

    enabled: bool = True
    listen_host: str = Field(default="127.0.0.1", min_length=1)
    port: FreePort = DEFAULT_METRICS_PORT


class TracingSection(Section):
    """Which traces leave the mesh, and where to. Without an endpoint, here or in OTEL_EXPORTER_OTLP_ENDPOINT, none leaves it; `mesh trace`
    shows the last ones in any case. Not `enabled`: nothing is recorded, and no trace can be shown."""

    enabled: bool = True  # OTEL_SDK_DISABLED=true says the opposite
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05  # where the caller has not decided; OTEL_TRACES_SAMPLER says it too
    slow_request: Duration = 60.0  # one that takes longer is kept in any case, as is one that failed or lost a shard
    slow_first_token: Duration = 10.0
    content: bool = False  # the texts of prompts and answers
    otlp_endpoint: str | None = Field(default=None, min_length=1)
    otlp_protocol: Literal["http/protobuf", "grpc"] | None = None


class ServedModelSection(Section):
    """The model that a coordinator serves: that of the directory `path`, else the pushed model `name`, else the only pushed one.

    The other keys must agree with the model if they are given: a coordinator does not start with another model than was meant.
    """

    name: str | None = Field(default=None, min_length=1)
    path: str | None = Field(default=None, min_length=1)  # a model directory; only its manifest and tokenizer are read
    format: Literal["onnx", "safetensors", "gguf"] | None = None
    total_layers: Count | None = None
    vocab_size: Count | None = None
    require_signature: str | None = Field(default=None, min_length=1)  # PEM file with the public keys of which one must have signed it


class CoordinatorConfig(ConfigFile):
    coordinator: CoordinatorSection = CoordinatorSection()
    nats: NatsSection = NatsSection()
    model: ServedModelSection = ServedModelSection()
    distributed: DistributedSection
    memory: PoolSection = PoolSection()
    tls: TlsSection | None = None
    authentication: AuthenticationSection = AuthenticationSection()
    logging: LoggingSection = LoggingSection()
    metrics: MetricsSection = MetricsSection()
    tracing: TracingSection = TracingSection()

    @model_validator(mode="after")
    def _agree(self) -> CoordinatorConfig:
        _check_longer(
            self.distributed.failover_timeout,
            "distributed.failover_timeout",
            self.coordinator.health_check_interval,
            "coordinator.health_check_interval",
        )
        return self


class GatewaySection(HttpSection):
    model: str | None = Field(default=None, min_length=1)  # model of requests that name none; None: the only one


class GatewayConfig(ConfigFile):
    """HTTP in a process of its own."""

    gateway: GatewaySection = GatewaySection()
    nats: NatsSection = NatsSection()
    tls: TlsSection | None = None
    authentication: AuthenticationSection = AuthenticationSection()
    logging: LoggingSection = LoggingSection()
    metrics: MetricsSection = MetricsSection()
    tracing: TracingSection = TracingSection()


class AuthenticationConfig(ConfigFile):
    """Tokens of commands that read no file: from the environment alone."""

    authentication: AuthenticationSection = AuthenticationSection()


class MetricsConfig(ConfigFile):
    """Metrics of commands that read no file: from the environment alone."""

    metrics: MetricsSection = MetricsSection()


class ShardSection(Section):
    elsewhere: ClassVar[dict[str, str]] = {
        "coordinator_address": "shards meet their coordinators over NATS: remove it and set nats.urls, such as [nats://10.0.1.100:4222]"
    }

    shard_id: Count
    listen_host: str = Field(default="127.0.0.1", min_length=1)
    listen_port: FreePort = DEFAULT_HTTP_PORT
    replication_mode: ReplicationMode = "balance"


class ShardModelSection(Section):
    """The half-open layer range [layers_start, layers_end) of the model directory at `shard_path`."""

    shard_path: str = Field(min_length=1)
    layers_start: Annotated[int, Field(ge=0)]
    layers_end: Count
    overlap_layers: Annotated[int, Field(ge=0)] = 0
    pull_rate: Rate | None = None  # at most so fast blocks are fetched from the mesh; None: as fast as the network allows
    require_signature: str | None = Field(default=None, min_length=1)  # PEM file with the public keys of which one must have signed it


class ResourcesSection(Section):
    max_memory_gb: Gigabytes
    worker_threads: Count | None = None  # None: every core
    enable_gpu: bool = False

    @property
    def max_memory_bytes(self) -> int:
        return round(self.max_memory_gb * GB)


class HealthSection(Section):
    check_interval: Duration = 10.0
    timeout: Duration = 30.0
    port: FreePort | None = None  # health and statistics are answered there too


class ShardConfig(ConfigFile):
    shard: ShardSection
    nats: NatsSection = NatsSection()
    model: ShardModelSection
    resources: ResourcesSection
    performance: PerformanceSection = PerformanceSection()
    health: HealthSection = HealthSection()
    tls: TlsSection | None = None
    authentication: AuthenticationSection = AuthenticationSection()
    logging: LoggingSection = LoggingSection()
    metrics: MetricsSection = MetricsSection()
    tracing: TracingSection = TracingSection()

    @model_validator(mode="after")
    def _agree(self) -> ShardConfig:
        start, end = self.model.layers_start, self.model.layers_end
        if end <= start:
            raise ValueError(
                f"model.layers_start {start} and model.layers_end {end} hold no layer: the end is not included, give a larger one"
            )
        _check_longer(self.health.timeout, "health.timeout", self.health.check_interval, "health.check_interval")
        return self


class PortsSection(Section):
    coordinator_port: Port = DEFAULT_HTTP_PORT
    shard_base_port: Port = 8081
    health_check_port: Port = 9090
    metrics_port: Port = DEFAULT_METRICS_PORT


class CommunicationSection(Section):
    protocol: Literal["nats"] = "nats"  # frames travel over NATS; HTTP is only at the edge
    compression: Literal["none", "gzip"] = "none"
    timeout_seconds: Duration = 30.0
    retry_count: Annotated[int, Field(ge=0)] = 3


class BalancingSection(Section):
    strategy: LoadBalancing = "least_loaded"
    health_check_interval: Duration = 5.0
    failover_timeout: Duration = 30.0


class NetworkConfig(ConfigFile):
    """Ports and times of a whole mesh. `mesh shard-model --network` writes them into the files of the processes, which is where they have
    an effect."""

    network: PortsSection = PortsSection()
    communication: CommunicationSection = CommunicationSection()
    load_balancing: BalancingSection = BalancingSection()

    @model_validator(mode="after")
    def _agree(self) -> NetworkConfig:
        ports: dict[int, str] = {}
        for key in ("coordinator_port", "health_check_port", "metrics_port"):
            port = getattr(self.network, key)
            if port in ports:
                raise ValueError(f"network.{ports[port]} and network.{key} are both {port}: give each its own")
            ports[port] = key
        balancing = self.load_balancing
        _check_longer(
            balancing.failover_timeout,
            "load_balancing.failover_timeout",
            balancing.health_check_interval,
            "load_balancing.health_check_interval",
        )
        return self


def _check_split(layers: int, shards: int, per_shard: int | None, sharding: str, model: str) -> None:
    if shards > layers:
        raise ValueError(f"{sharding}shards_count {shards} is more than {model}total_layers {layers}: a shard has at least one layer")
    if per_shard is not None and per_shard * shards != layers:
        better = f"; {layers // shards} layers_per_shard would be right" if layers % shards == 0 else "; leave layers_per_shard out"
        raise ValueError(
            f"{sharding}layers_per_shard {per_shard} x {sharding}shards_count {shards} = {per_shard * shards} "
            f"is not {model}total_layers {layers}{better}"
        )


def _check_longer(longer: float, longer_key: str, shorter: float, shorter_key: str) -> None:
    if longer <= shorter:
        raise ValueError(f"{longer_key} ({longer:g} s) must be longer than {shorter_key} ({shorter:g} s)")
