"""The original FlexLB's environment documents, read as one more source of settings.

Its deployments hold their settings as JSON in a few variables. `ROWS` says for each key what it sets
here, or why it sets nothing; whatever sets nothing is named in a warning, never dropped. Every other
source of settings wins over these documents.

A field of its FLEXLB_CONFIG is also a variable there (`LOAD_BALANCE_STRATEGY`), which wins over the
document. Names like that may belong to anything, so they are looked at only beside a document.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from dispatcher.errors import SettingsError
from dispatcher.protocol.node import Role


@dataclass(frozen=True, kw_only=True)
class Document:
    """One JSON document: the variables that may hold it, newest first, and whose warnings it makes."""

    variables: tuple[str, ...]
    owner: str


BEHAVIOUR = Document(variables=("FLEXLB_CONFIG", "WHALE_MASTER_CONFIG"), owner="dispatcher")
CONSISTENCY = Document(
    variables=("FLEXLB_SYNC_CONSISTENCY_CONFIG", "WHALE_SYNC_LB_CONSISTENCY_CONFIG"), owner="dispatcher"
)
SERVICES = Document(variables=("MODEL_SERVICE_CONFIG",), owner="agent")
TRAFFIC = Document(variables=("TRAFFIC_POLICY_CONFIG",), owner="dispatcher")
STRATEGIES = Document(variables=("STRATEGY_CONFIGS",), owner="dispatcher")
DOCUMENTS = (BEHAVIOUR, CONSISTENCY, SERVICES, TRAFFIC, STRATEGIES)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that a document names."""

    role: Role
    url: str
    host: str


POLICIES = {
    "COST_BASED_PREFILL": "cost_based_prefill",
    "SHORTEST_TTFT": "shortest_ttft",
    "RANDOM": "random",
    "ROUND_ROBIN": "round_robin",
    "ROUND_ROBIN_LOWEST_CONCURRENCY": "round_robin_lowest_concurrency",
    # The original gives both the same meaning.
    "LOWEST_CONCURRENCY": "round_robin_lowest_concurrency",
}
"""The original's names of policies, and ours."""


def our_policy(value: object) -> object:
    """Our name of a policy where `value` is one of the original's; any other value as it is."""
    return POLICIES.get(value.upper(), value) if isinstance(value, str) else value


def _policy(value: object) -> str:
    policy = POLICIES.get(value.upper()) if isinstance(value, str) else None
    if policy is None:
        raise ValueError(f"one of {', '.join(POLICIES)}")
    return policy


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    raise ValueError("true or false")


def _number(value: object) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError("a number")


def _seconds(value: object) -> float:
    try:
        return _number(value) / 1000
    except ValueError:
        raise ValueError("a number of milliseconds") from None


def _pool(value: object) -> str:
    if isinstance(value, str) and value.lower() in {"ratio", "fixed"}:
        return value.lower()
    raise ValueError("RATIO or FIXED")


def _engines(role: Role) -> Callable[[object], tuple[Engine, ...]]:
    """Read an endpoint `{type, address, protocol, path}` or `{address, discovery: {type, hosts}}`."""

    def read(value: object) -> tuple[Engine, ...]:
        if not isinstance(value, Mapping):
            raise ValueError("an object with type and address")
        shift = -1 if value.get("protocol") == "grpc" else 0  # the engine's gRPC port is its HTTP port + 1
        return tuple(_engine(role, address, shift) for address in _addresses(value))

    return read


def _addresses(endpoint: Mapping[str, object]) -> list[str]:
    discovery = endpoint.get("discovery")
    if isinstance(discovery, Mapping):
        kind, found = discovery.get("type"), discovery.get("hosts")
        if kind != "static-env":
            raise ValueError("discovery of type static-env (others need a registry that is not used here)")
    else:
        kind, found = endpoint.get("type"), endpoint.get("address")
        if kind not in ("SpecifiedIpPortList", "SpecifiedIpPort"):
            raise ValueError("type SpecifiedIpPortList (others need a registry that is not used here)")
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except ValueError:
            raise ValueError('an address list like ["host:port"]') from None
    if isinstance(found, str):
        found = [one.strip() for one in found.split(",") if one.strip()]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError('an address list like ["host:port"]')
    return found


def _engine(role: Role, address: str, shift: int) -> Engine:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) + shift < 65536:
        raise ValueError(f"addresses host:port, and one is {address!r}")
    return Engine(role=role, url=f"http://{host}:{int(port) + shift}", host=host.strip("[]"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One key of a document. `key` may be a pattern; `role_endpoints[].group` is a key of list members.

    Attributes:
        settings: what it sets here, as `<table>.<setting>`; nothing when empty.
        why: said in a warning: why it sets nothing, or what is different about what it sets.
        skip: values that ask for nothing, so that nothing is said of them.
    """

    document: Document
    key: str
    settings: tuple[str, ...] = ()
    convert: Callable[[object], object] = lambda value: value
    why: str = ""
    skip: tuple[object, ...] = ()


def _behaviour(*keys: str, why: str, skip: tuple[object, ...] = ()) -> tuple[Row, ...]:
    return tuple(Row(document=BEHAVIOUR, key=key, why=why, skip=skip) for key in keys)


_BATCHES = (
    "up to batch_size requests for one node wait for each other now; engines batch by themselves (continuous "
    "batching), and where it was measured the window only cost time: better leave it out"
)
_NO_BATCHES = "a batch is handed over by number or time alone; see batch_wait_ms and batch_size"
_BOUNDED = "nodes hold little work and the rest waits in Kafka; see lookahead_max_s and window_requests"
_THREADS = "there are no thread pools to size"
_LEARNED = "the cost of a prefill is learned from each node; see policy and pressure_s"
_ENDPOINTS = ("prefill", "decode", "vit", "pd_fusion")
_ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "vit": Role.VIT, "pd_fusion": Role.FUSED}

ROWS: tuple[Row, ...] = (
    Row(
        document=BEHAVIOUR,
        key="loadBalanceStrategy",
        settings=("dispatcher.policy",),
        convert=_policy,
    ),
    Row(
        document=BEHAVIOUR,
        key="scoreTieThresholdPct",
        settings=("dispatcher.near_tie", "dispatcher.cost_tie_share"),
        convert=_number,
    ),
    *(
        Row(document=BEHAVIOUR, key=key, settings=(f"dispatcher.{setting}",), convert=convert)
        for key, setting, convert in (
            ("scoreTieThresholdMs", "cost_tie_ms", _number),
            ("costHotspotMultiplier", "cost_hotspot", _number),
            ("costImbalanceMultiplier", "cost_imbalance", _number),
            ("prefillQueueSizeThreshold", "cost_queue_limit", _number),
            ("hysteresisBiasPercent", "cost_hysteresis_percent", _number),
            ("costSloFilterEnabled", "cost_slo_filter", _truth),
            ("costSloMs", "cost_slo_ms", _number),
            ("costSloRiskMarginMs", "cost_slo_margin_ms", _number),
            ("shortestTtftCandidatePoolMode", "ttft_pool", _pool),
            ("shortestTtftCandidatePoolRatio", "ttft_pool_ratio", _number),
            ("shortestTtftCandidatePoolMinSize", "ttft_pool_least", _number),
            ("shortestTtftCandidatePoolSize", "ttft_pool_size", _number),
        )
    ),
    *(
        Row(
            document=BEHAVIOUR,
            key=key,
            settings=("dispatcher.batch_wait_ms",),
            convert=_number,
            why=_BATCHES,
            skip=(0, "0"),
        )
        for key in ("prefillBatchWaitTimeMs", "flexlbBatchFixedWaitMs")
    ),
    *(
        Row(document=BEHAVIOUR, key=key, settings=("dispatcher.batch_size",), convert=_number)
        for key in ("batchSize", "flexlbBatchSizeMax")
    ),
    Row(
        document=BEHAVIOUR,
        key="workerTimeoutMs",
        settings=("dispatcher.heartbeat_ttl_s", "agent.heartbeat_ttl_s"),
        convert=_seconds,
    ),
    Row(
        document=BEHAVIOUR,
        key="prefillGenerateTimeoutMs",
        settings=("agent.first_token_timeout_s",),
        convert=_seconds,
    ),
    *_behaviour("deploy", why="each agent says its own role; see the agent's setting role"),
    *_behaviour("flexlbBatch*", why=_NO_BATCHES),
    *_behaviour("kvCache", why="caches are followed from the engines' own events; see kv_events_endpoint"),
    *_behaviour(
        "staticCacheBlockSize",
        why="requests carry prefix hashes of the pool's routing block, and engines match by their own; to "
        "change the routing block, set block_size for dispatchers, agents and producers alike",
    ),
    *_behaviour(
        "prefillLbTimeoutMs",
        why="a request waits for a node until its deadline; see default_deadline_s",
    ),
    *_behaviour(
        "enableGrpcPrefillMaster",
        "enableGrpcEngineStatus",
        "enableGrpcCacheStatus",
        why="agents speak to engines by HTTP and to dispatchers by Redis and Kafka; there is no gRPC",
    ),
    *_behaviour(
        "decodeLoadBalanceStrategy",
        "vitLoadBalanceStrategy",
        "weightedCacheDecayFactor",
        "decodeHotspotMultiplier",
        "decodeImbalanceMultiplier",
        "maxNewTokensCap",
        why="one policy chooses among all nodes; see policy",
    ),
    *_behaviour("costSloBuckets", why="the bound is one for every length; see cost_slo_ms", skip=("",)),
    *_behaviour("cost*", "prefillPredictorType", why=_LEARNED),
    *_behaviour("scoreTieRandomEnabled", why="near ties are always broken by prefix, then by chance"),
    *_behaviour("defaultScheduleMode", "enableQueueing", why="every request is queued, in Kafka"),
    *_behaviour("maxQueueSize", why=f"a full queue refuses nobody: {_BOUNDED}"),
    *_behaviour("maxRetryCount", why="a request is tried until its deadline, with a cap for engine crashes"),
    *_behaviour(
        "maxPrefillQueueSize",
        "decodeAvailableMemoryThreshold",
        "decodeFullSpeedThreshold",
        "decodeStopThreshold",
        "resourceCheckIntervalMs",
        why=_BOUNDED,
    ),
    *_behaviour(
        "decodeConcurrencyLimit",
        why="each agent says how much it runs at once; see max_running",
        skip=(0, "0"),
    ),
    *_behaviour("flexlbInflightTtlMs", why="claims have a lease that agents prolong; see claim_lease_s"),
    *_behaviour(
        "autoTpm*",
        why="priorities are fields of requests and order the queue; running work is not evicted for them",
    ),
    *_behaviour(
        "cacheHit*", why="hits are measured per request, in the metrics; there is no separate window"
    ),
    *_behaviour("trafficPolicy", why="there are no groups; use a pool or a model name for each"),
    *_behaviour(
        "scheduleWorkerSize", "netty*", "grpc*", "http*", "*Executor*", "serviceDiscovery*", why=_THREADS
    ),
    Row(
        document=CONSISTENCY,
        key="needConsistency",
        settings=("dispatcher.election",),
        convert=_truth,
    ),
    Row(
        document=CONSISTENCY,
        key="masterElectType",
        why="the leader is elected by a lock in Redis; ZooKeeper is not used",
    ),
    Row(
        document=CONSISTENCY,
        key="zookeeperConfig",
        why="the leader is elected by a lock in Redis; see redis and leader_ttl_s",
    ),
    *(
        Row(
            document=SERVICES,
            key=f"{where}{kind}_endpoint",
            settings=("agent.engine_url",),
            convert=_engines(_ROLES[kind]),
        )
        for where in ("", "role_endpoints[].")
        for kind in _ENDPOINTS
    ),
    Row(document=SERVICES, key="role_endpoints[].group", why="there are no groups", skip=("", "default")),
    Row(document=SERVICES, key="service_id", why="the engine tells which models it serves; see models"),
    Row(document=SERVICES, key="load_balance", why="dispatchers choose the node; see policy"),
    Row(document=SERVICES, key="use_local", why="engines are named by engine_url, local or not"),
    Row(
        document=SERVICES, key="master_endpoint", why="agents and clients find dispatchers by Kafka and Redis"
    ),
    Row(document=TRAFFIC, key="*", why="there are no groups; use a pool or a model name for each"),
    Row(document=STRATEGIES, key="*", why="the original validates it and uses it nowhere"),
)


_REPORTED = "agents report by themselves, at once when something changes; see report_interval_s"
_SILENCE = "a node's silence is counted by its reports; see heartbeat_ttl_s"
VARIABLES: tuple[tuple[str, str], ...] = (
    ("SYNC_STATUS_INTERVAL", _REPORTED),
    ("SYNC_REQUEST_TIMEOUT_MS", _REPORTED),
    ("VIT_SYNC_REQUEST_TIMEOUT_MS", _REPORTED),
    ("CACHE_STATUS_DIFF_SIZE", _REPORTED),
    ("WORKER_CLEAN_INTERVAL_MS", _SILENCE),
    ("WORKER_TIMEOUT_US", _SILENCE),
    ("VIT_WORKER_TIMEOUT_US", _SILENCE),
    ("VIT_RETAIN_ALIVE_ON_TIMEOUT", _SILENCE),
    ("PREFILL_TIME_FORMULA", _LEARNED),
    ("FLEXLB_GRPC_EXECUTOR_*", _THREADS),
    ("FLEXLB_MONITOR_MODE", "every metric is exposed: their number does not grow with the fleet"),
    ("HIPPO_ROLE", "dispatchers that share a pool elect a leader; see pool"),
    ("TRAFFIC_POLICY_CONFIG_FILE", "there are no groups; use a pool or a model name for each"),
    ("DOMAIN_ADDRESS:*", "engines are named by engine_url; name resolution is the system's"),
)
"""Variables of the original that are no documents, by pattern, and why each sets nothing here."""


@dataclass(kw_only=True)
class Legacy:
    """What the documents set for one process: value and where it stands, by setting; and what to say."""

    values: dict[str, tuple[object, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def own_hosts() -> frozenset[str]:
    """Names and addresses of this machine."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    return frozenset({"localhost", "127.0.0.1", "::1", name, name.partition(".")[0], *found})


def read_legacy(
    environ: Mapping[str, str], table: str, *, hosts: Callable[[], Collection[str]] = own_hosts
) -> Legacy:
    """Read every document for the process `table` ('dispatcher', 'agent' or 'frontend').

    Args:
        hosts: this machine's names, asked only when several engines are named.
    Raises:
        SettingsError: a document is no JSON object, or a value can't be what it should be.
    """
    legacy = Legacy()
    engines: dict[str, list[Engine]] = {}
    problems = []
    overriding = _overriding(environ)
    if table == BEHAVIOUR.owner:
        legacy.warnings += _unused_variables(environ)
    for document in DOCUMENTS:
        variable, content = _load(document, environ, table, legacy.warnings)
        entries = [(key, value, f"{variable}: {key}") for key, value in _flatten(content)]
        if document is BEHAVIOUR:
            entries = [entry for entry in entries if entry[0] not in overriding]
            entries += [(key, environ[name], name) for key, name in overriding.items()]
        for key, value, source in entries:
            row = _row_of(document, key)
            if row is None:
                if table == document.owner:
                    legacy.warnings.append(f"{source}: not used: {_unknown(document, key)}")
                continue
            if row.why and table == document.owner and value not in row.skip:
                legacy.warnings.append(f"{source}: {'' if row.settings else 'not used: '}{row.why}")
            if not row.settings:
                continue
            try:
                converted = row.convert(value)
            except ValueError as error:
                problems.append(f"{source}: expected {error}, seen {json.dumps(value)[:80]}")
                continue
            if isinstance(converted, tuple):
                engines.setdefault(variable, []).extend(converted)
                continue
            for setting in row.settings:
                owner, _, name = setting.partition(".")
                if owner == table:
                    legacy.values[name] = (converted, source)
    if problems:
        raise SettingsError("\n".join(problems))
    for variable, found in engines.items():
        _adopt(legacy, found, variable, table, hosts)
    return legacy


def _row_of(document: Document, key: str) -> Row | None:
    return next((row for row in ROWS if row.document is document and fnmatchcase(key, row.key)), None)


def _is_of_original(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name, "").strip() for document in DOCUMENTS for name in document.variables)


def _overriding(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that are fields of the behaviour document, by the field's key."""
    if not _is_of_original(environ):
        return {}
    found = {}
    for name in environ:
        first, *others = name.lower().split("_")
        key = first + "".join(map(str.capitalize, others))
        row = _row_of(BEHAVIOUR, key) if name.isupper() else None
        # Thread pools have names like HTTP_PROXY.
        if row is not None and row.why != _THREADS:
            found[key] = name
    return found


def _unused_variables(environ: Mapping[str, str]) -> list[str]:
    if not _is_of_original(environ):
        return []
    return [
        f"{name}: not used: {why}"
        for name in environ
        for pattern, why in VARIABLES
        if fnmatchcase(name, pattern)
    ]


def _load(
    document: Document, environ: Mapping[str, str], table: str, warnings: list[str]
) -> tuple[str, Mapping[str, object]]:
    held = [variable for variable in document.variables if environ.get(variable, "").strip()]
    if not held:
        return "", {}
    variable, *others = held
    if table == document.owner:
        warnings += [f"{other}: not used: {variable} is set too and newer" for other in others]
    content = _object(variable, environ[variable])
    if document is BEHAVIOUR and "zone_process_setting" in content:
        inner = _unwrap(content)
        if inner is None:
            raise SettingsError(
                f"{variable}: expected zone_process_setting.process_info.envs to hold FLEXLB_CONFIG, "
                "seen a deployment without it; set FLEXLB_CONFIG itself"
            )
        variable = f"{variable} (its FLEXLB_CONFIG)"
        content = _object(variable, inner)
    return variable, content


def _object(variable: str, text: str) -> Mapping[str, object]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SettingsError(
            f"{variable}: expected a JSON object, seen {text[:60]!r} ({error}); mend it or unset it"
        ) from None
    if not isinstance(content, dict):
        raise SettingsError(f"{variable}: expected a JSON object, seen {text[:60]!r}; mend it or unset it")
    return content


def _unwrap(content: Mapping[str, object]) -> str | None:
    """The FLEXLB_CONFIG inside a deployment template's list of [name, value]."""
    inside: object = content
    for key in ("zone_process_setting", "process_info", "envs"):
        inside = inside.get(key) if isinstance(inside, Mapping) else None
    pairs = inside if isinstance(inside, list) else []
    for pair in pairs:
        if isinstance(pair, list) and len(pair) == 2 and pair[0] == "FLEXLB_CONFIG":
            return str(pair[1])
    return None


def _flatten(content: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                yield from ((f"{key}[].{inner}", found) for inner, found in one.items())
        else:
            yield key, value


def _unknown(document: Document, key: str) -> str:
    known = [row.key for row in ROWS if row.document is document and row.key != "*"]
    near = get_close_matches(key, known, n=1)
    return "no such key is known" + (f"; did you mean {near[0]!r}?" if near else "")


def _adopt(
    legacy: Legacy, engines: list[Engine], variable: str, table: str, hosts: Callable[[], Collection[str]]
) -> None:
    """Give the agent of this machine its engine; tell everyone else what to run."""
    urls = ", ".join(dict.fromkeys(engine.url for engine in engines)) or "none"
    if table != SERVICES.owner:
        if table == BEHAVIOUR.owner:
            legacy.warnings.append(
                f"{variable}: a dispatcher speaks to no engine: run 'flexlb agent' beside each of {urls}"
            )
        return
    ours = list(dict.fromkeys(engines))
    if len(ours) > 1:
        here = hosts()
        ours = [engine for engine in ours if engine.host in here]
    if len(ours) != 1:
        legacy.warnings.append(
            f"{variable}: not used: expected one engine of this machine, seen {len(ours)} among {urls}; run "
            "one agent for each engine, with --engine-url and --node"
        )
        return
    engine, source = ours[0], f"{variable}: {ours[0].role.value}"
    legacy.values["engine_url"] = (engine.url, source)
    if {Role.PREFILL, Role.DECODE} <= {one.role for one in engines} or engine.role is Role.VIT:
        legacy.values["role"] = (engine.role.value, source)
