"""Each policy against a plain eager model that runs the same algorithm by itself, action by action."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skipc.runtime import program
from skipc.runtime.rows import gathered, queried, unseen
from transformers import StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, in_double, seldom
from tests.models.zoo import ZOO

LAYERS = 4
PROMPT, NEW, LENGTH = 6, 12, 32
SITES = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn", "mlp")]


@pytest.fixture(scope="module", params=["outline", seldom("cond")])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    config = model.config
    config.num_hidden_layers = LAYERS
    model = type(model)(config).eval()
    with torch.no_grad():  # so that similarities differ from site to site, and from token to token
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= 2 + 2 * i
            layer.mlp.down_proj.weight *= 12 - 2 * i
    options = {"lowering": request.param, "compact_queries": request.param == "outline"}
    return model, in_double(model, {})[0], skipc.compile(model, fullgraph=True, **options, **STRICT)


class Eager:
    """A Llama whose layers ask a rule before each sublayer, and tell it the stream before and after those that ran.
    Attentions always write their keys and values."""

    def __init__(self, model: Any, rule: Rule):
        self.model, self.rule = model, rule

    def __call__(self, **kwargs: Any) -> Any:
        self.rule.call(kwargs["input_ids"].shape[1])
        layers = self.model.model.layers
        try:
            for i, layer in enumerate(layers):
                layer.forward = self._forward(i, layer)
            return self.model(**kwargs)
        finally:
            for layer in layers:
                del layer.forward

    def _forward(self, i: int, layer: Any) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            branch, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
            hidden = self._site(f"model.layers.{i}.self_attn", hidden, branch)
            branch = layer.mlp(layer.post_attention_layernorm(hidden))
            return self._site(f"model.layers.{i}.mlp", hidden, branch)

        return forward

    def _site(self, name: str, hidden: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        if isinstance(self.rule, TokenRule):
            return self.rule.site(name, hidden, branch)
        if not self.rule.runs(name):
            return hidden * self.rule.scale(name)
        self.rule.ran(name, hidden, hidden + branch)
        return hidden + branch


class Rule:
    """An algorithm in its plainest form. ``actions`` collects the skipped sites of each call."""

    def __init__(self) -> None:
        self.actions: list[set[str]] = []
        self.position = 0
        self.decoding = False
        self.closest = (
            math.inf
        )  # how near a similarity came to a threshold: nearer than rounding, the test says nothing

    def call(self, tokens: int) -> None:
        self.decoding = tokens == 1 and self.position > 0
        self.start()
        self.position += tokens
        self.actions.append(set())

    def start(self) -> None:
        """A call begins; ``position`` tokens came before."""

    def runs(self, name: str) -> bool:
        skipped = self.skips(name)
        if skipped:
            self.actions[-1].add(name)
        return not skipped

    def skips(self, name: str) -> bool:
        raise NotImplementedError

    def scale(self, name: str) -> float:
        return 1.0

    def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        pass

    def reaches(self, similar: torch.Tensor, threshold: float, rule: str) -> bool:
        """``similar``: one number a token."""
        value = similar.mean() if rule == "mean" else similar
        self.closest = min(self.closest, (value - threshold).abs().min().item())
        if rule == "mean":
            return bool(value >= threshold)
        above = (value >= threshold).double().mean().item()
        return above == 1 if rule == "all" else above > 0.5


def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(before.float(), after.float(), dim=-1)


def decode(model: Any, call: Any, batch: int = 2, new: int = NEW) -> torch.Tensor:
    """Logits of a prefill and of decode steps with given tokens: float [batch, 1 + new, vocabulary]."""
    tokens = torch.randint(3, 90, (batch, PROMPT + new), generator=torch.Generator().manual_seed(3))
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        if batch == 1:  # a cache that exists, so that the prompt comes with a mask; else it is made in the graph
            model(tokens[:, :1], past_key_values=cache)
            cache.reset()
        logits = [call(input_ids=tokens[:, :PROMPT], past_key_values=cache).logits[:, -1]]
        for i in range(PROMPT, PROMPT + new):
            logits.append(call(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits[:, 0])
    return torch.stack(logits, 1)


def check(
    models: Any, policy: skipc.Policy, rule: Callable[[], Rule], batch: int = 2, **session: Any
) -> list[set[str]]:
    """The policy takes the rule's actions and gives its logits, twice (the program's first call runs step by step)."""
    model, double, compiled = models
    if session.get("kv") == "none" and compiled.options.lowering == "cond":
        pytest.skip("compiled for kv='project'")
    decode(model, compiled, batch)
    truth_rule, eager_rule = rule(), rule()
    truth, eager = decode(double, Eager(double, truth_rule), batch), decode(model, Eager(model, eager_rule), batch)
    assert truth_rule.actions == eager_rule.actions, "the test's threshold is too near to a similarity"
    assert eager_rule.closest > 1e-6, "the test's threshold is too near to a similarity"
    for _ in range(2):
        with compiled.session(policy=policy, record=True, **session) as opened:
            ours = decode(model, compiled, batch)
        assert [set(step.skipped) for step in opened.route.steps] == eager_rule.actions
        assert_no_further(truth, eager, ours)
        assert opened.stats().recompiles == 0
    if not getattr(eager_rule, "adapters", None):
        with compiled.session(route=opened.route):
            assert torch.equal(decode(model, compiled, batch), ours)
    return eager_rule.actions


class FixedSet(Rule):
    def __init__(self, skip: set[str], scale: dict[str, float], phases: Sequence[str]):
        super().__init__()
        self.set, self.factors, self.phases = skip, scale, phases

    def skips(self, name: str) -> bool:
        return name in self.set and ("decode" if self.decoding else "prefill") in self.phases

    def scale(self, name: str) -> float:
        return self.factors.get(name, 1.0)


@pytest.mark.parametrize("phases", [("prefill", "decode"), ("decode",), ("prefill",)])
def test_static(models: Any, phases: Any) -> None:
    skip = {SITES[1], SITES[2], SITES[7]}
    scale = {SITES[1]: 1.25, SITES[7]: 0.8}
    check(models, skipc.Static(skip, scale, phases), lambda: FixedSet(skip, scale, phases))
    check(models, skipc.Static(skip, phases=phases), lambda: FixedSet(skip, {}, phases), batch=1)


class UnifiedRule(Rule):
    def __init__(self, speedup: float):
        super().__init__()
        keep = LAYERS // speedup
        interval = LAYERS // (keep - 1)
        self.kept = {0, LAYERS - 1}
        for i in range(1, LAYERS - 1):
            if i % interval == 0 and len(self.kept) < keep:
                self.kept.add(i)

    def skips(self, name: str) -> bool:
        return self.decoding and int(name.split(".")[2]) not in self.kept


def test_unified(models: Any) -> None:
    actions = check(models, skipc.Unified(4 / 3), lambda: UnifiedRule(4 / 3))
    assert actions[0] == set()
    assert len(actions[1]) == 2
    assert len(check(models, skipc.Unified(4 / 3), lambda: UnifiedRule(4 / 3), kv="none")[1]) == 2


@pytest.mark.parametrize(
    ("layers", "speedup", "kept"),
    [(24, 2, {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23}), (24, 3, {0, 3, 6, 9, 12, 15, 18, 23}), (30, 10, {0, 15, 29}),
     (4, 3, {0, 3}), (2, 5, {0, 1}), (1, 2, {0})],
)  # fmt: skip
def test_unified_layers(layers: int, speedup: float, kept: set[int]) -> None:
    """Worked out by hand from the released rule: interval = L // (keep - 1), at most ``keep`` layers."""
    from skipc.runtime.policies.unified import kept_layers

    assert kept_layers(layers, speedup) == kept


class SkipDecodeRule(Rule):
    def __init__(self, most: int, least: int, length: int, warmup: int):
        super().__init__()
        self.most, self.least, self.length, self.warmup = most, least, length, warmup

    def start(self) -> None:
        t = min(self.position, self.length)
        depth = max(self.least, math.ceil(self.most - (self.most - self.least) * t / self.length))
        self.active = {*range(self.warmup), *range(LAYERS - (depth - self.warmup), LAYERS)}

    def skips(self, name: str) -> bool:
        return self.decoding and int(name.split(".")[2]) not in self.active


@pytest.mark.parametrize("kv", ["project", "none"])
def test_skip_decode(models: Any, kv: Any) -> None:
    actions = check(models, skipc.SkipDecode(4, 2, 16), lambda: SkipDecodeRule(4, 2, 16, 1), kv=kv)
    assert [len(a) for a in actions] == sorted(len(a) for a in actions), "depth never rises"
    assert len(actions[1]) < len(actions[-1])


class FFNSkipRule(Rule):
    def __init__(self, threshold: float, start: int, end: int, warmup: int, stride: int | None, rule: str):
        super().__init__()
        self.threshold, self.rule, self.stride, self.warmup = threshold, rule, stride, warmup
        self.middle = [f"model.layers.{i}.mlp" for i in range(start, LAYERS - end)]

    def start(self) -> None:
        self.left = 0
        self.active = self.decoding and self.position >= self.warmup

    def skips(self, name: str) -> bool:
        if not self.active or name not in self.middle or not self.left:
            return False
        self.left -= 1
        return True

    def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        if self.active and name in self.middle and self.reaches(cosines(before, after), self.threshold, self.rule):
            self.left = LAYERS if self.stride is None else self.stride


def quantiles(models: Any, sites: Sequence[str], *at: float) -> list[float]:
    """Thresholds that some tokens reach and others do not: between similarities of the model's own run."""
    seen: list[float] = []

    class Collect(Rule):
        def skips(self, name: str) -> bool:
            return False

        def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
            if name in sites and self.decoding:
                seen.extend(cosines(before, after).flatten().tolist())

    decode(models[0], Eager(models[0], Collect()))
    values = sorted(seen)
    return [(values[int(q * (len(values) - 1))] + values[int(q * (len(values) - 1)) + 1]) / 2 for q in at]


@pytest.mark.parametrize("rule", ["all", "majority", "mean"])
@pytest.mark.parametrize("stride", [None, 1])
def test_ffn_skip(models: Any, rule: Any, stride: int | None) -> None:
    mlps = [s for s in SITES if s.endswith("mlp")]
    kinds = set()
    for threshold in quantiles(models, mlps, 0.3, 0.6):
        policy = skipc.FFNSkip(threshold, 0, 1, warmup=8, stride=stride, rule=rule)
        actions = check(models, policy, lambda t=threshold: FFNSkipRule(t, 0, 1, 8, stride, rule))
        assert not any(actions[:3]), "prompt and warm-up run in full"
        kinds |= {len(a) for a in actions}
        check(models, policy, lambda t=threshold: FFNSkipRule(t, 0, 1, 8, stride, rule), batch=1)
    assert len(kinds) > 1, "some tokens skip and others do not"


class EarlyExitRule(Rule):
    def __init__(self, threshold: float, minimum: int, decay: float, temperature: float, horizon: int, rule: str):
        super().__init__()
        self.settings = threshold, minimum, decay, temperature, horizon, rule
        self.decoded = -1

    def start(self) -> None:
        self.exited = False
        self.decoded += self.decoding

    def skips(self, name: str) -> bool:
        return self.exited

    def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        threshold, minimum, decay, temperature, horizon, rule = self.settings
        layer = int(name.split(".")[2])
        if name.endswith("attn"):
            self.entered = before
        elif layer + 1 >= minimum and layer + 1 < LAYERS:
            if self.decoding:
                threshold = decay * threshold + (1 - decay) * math.exp(-temperature * self.decoded / horizon)
            self.exited = self.reaches(cosines(self.entered, after), threshold, rule)


@pytest.mark.parametrize("rule", ["mean", "all", "majority"])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_early_exit(models: Any, rule: Any, decay: float) -> None:
    depths = set()
    for threshold in (0.3, 0.52, 0.7):
        policy = skipc.EarlyExit(threshold, minimum=1, decay=decay, horizon=6, rule=rule)
        actions = check(models, policy, lambda t=threshold: EarlyExitRule(t, 1, decay, 4.0, 6, rule))
        depths |= {len(a) for a in actions}
    assert len(depths) > 1


class AdaSkipRule(Rule):
    """Section 3 of the paper; per row of the batch, all of which must agree."""

    def __init__(self, similar: dict[str, float], scale: dict[str, float], count: int, window: int):
        super().__init__()
        self.similar, self.factors, self.window = similar, scale, window
        self.set = set(sorted(similar, key=lambda n: -similar[n])[:count])
        self.seen: dict[str, list[torch.Tensor]] = {n: [] for n in similar if n.endswith("mlp")}
        self.decoded = -1

    def start(self) -> None:
        self.decoded += self.decoding
        self.now = self.set
        if self.decoding and self.decoded < self.window:
            self.now = set()
        elif self.decoding:
            bound = min(self.similar[n] for n in self.set)
            means = {n: torch.stack(s).mean(0) for n, s in self.seen.items()}
            for mean in means.values():
                self.closest = min(self.closest, (mean - bound).abs().min().item())
            self.now = self.set | {n for n, mean in means.items() if bool((mean > bound).all())}

    def skips(self, name: str) -> bool:
        return name in self.now

    def scale(self, name: str) -> float:
        return self.factors[name]

    def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        if name in self.seen and self.decoding and self.decoded < self.window:
            self.seen[name].append(cosines(before, after).mean(1))


def test_adaskip_as_in_the_paper(models: Any) -> None:
    base = dict(zip(SITES, quantiles(models, SITES, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), strict=True))
    scale = {n: 1 + 0.02 * i for i, n in enumerate(SITES)}
    policy = skipc.AdaSkip(base, scale, count=3, window=5)
    actions = check(models, policy, lambda: AdaSkipRule(base, scale, 3, 5))
    assert len(actions[0]) == 3
    assert not any(actions[1:6]), "the window runs in full"
    with pytest.raises(skipc.PlanError, match="holes"), models[2].session(policy=policy, kv="none"):
        decode(models[0], models[2])


def test_adaskip_adds_similar_mlps(models: Any) -> None:
    (low,) = quantiles(models, [s for s in SITES if s.endswith("mlp")], 0.1)
    similar = {n: low if n == SITES[0] else low / 2 for n in SITES}
    actions = check(
        models, skipc.AdaSkip(similar, count=1, window=4), lambda: AdaSkipRule(similar, dict.fromkeys(SITES, 1.0), 1, 4)
    )
    assert actions[0] == {SITES[0]}
    assert actions[5] > {SITES[0]}, "MLPs were added behind the window"


@pytest.mark.parametrize("kv", ["project", "none"])
def test_adaskip_as_released(models: Any, kv: Any) -> None:
    """The set stays skipped in the window, and nothing is ever added."""
    base = {n: i / 10 for i, n in enumerate(SITES)}
    skip = set(SITES[-2:])
    policy = skipc.AdaSkip(base, count=2, window=3, rule="released")
    check(models, policy, lambda: FixedSet(skip, {}, ("prefill", "decode")), kv=kv)
    accelerated = skipc.AdaSkip(base, acceleration=4 / 3, window=3, rule="released")
    check(models, accelerated, lambda: FixedSet(skip, {}, ("prefill", "decode")), kv=kv)


class LaggedRule(Rule):
    def __init__(self, enter: float, leave: float, warmup: int, refresh: int, weight: float):
        super().__init__()
        self.settings = enter, leave, warmup, refresh, weight
        self.mean: dict[str, torch.Tensor] = {}
        self.off: dict[str, int] = {}
        self.steps = 0

    def start(self) -> None:
        _, _, warmup, refresh, _ = self.settings
        ready = self.decoding and self.steps >= warmup
        self.now = {n for n, since in self.off.items() if since < refresh} if ready else set()
        self.steps += self.decoding

    def skips(self, name: str) -> bool:
        if name in self.now:
            self.off[name] += 1
        return name in self.now

    def ran(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        enter, leave, _, _, weight = self.settings
        if not (self.decoding and name.endswith("mlp")):
            return
        new = cosines(before, after).mean(1)
        self.mean[name] = self.mean[name] + weight * (new - self.mean[name]) if name in self.mean else new
        bound = leave if name in self.off else enter
        self.closest = min(self.closest, (self.mean[name] - bound).abs().min().item())
        if bool((self.mean[name] >= bound).all()):
            self.off[name] = 0
        else:
            self.off.pop(name, None)


def test_lagged(models: Any) -> None:
    leave, enter = quantiles(models, [s for s in SITES if s.endswith("mlp")], 0.25, 0.4)
    policy = skipc.Lagged(enter, leave, warmup=2, refresh=3, weight=0.5)
    actions = check(models, policy, lambda: LaggedRule(enter, leave, 2, 3, 0.5))
    assert len({len(a) for a in actions[3:]}) > 1, "skipped sites run again after a while"


class TokenRule(Rule):
    """Each token by itself: sites compute all of them, and the stream of those that skip stays."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def skips(self, name: str) -> bool:
        return False

    def site(self, name: str, hidden: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        runs = self.tokens(name, hidden)
        if runs is None:
            runs = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if not runs.any():
            self.actions[-1].add(name)
        self.shares.append(runs.double().mean().item())
        after = torch.where(runs[..., None], hidden + branch, hidden + self.instead(name, hidden))
        self.after(name, hidden, after, runs)
        return after

    def tokens(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError

    def instead(self, name: str, hidden: torch.Tensor) -> torch.Tensor | float:
        return 0.0

    def after(self, name: str, before: torch.Tensor, after: torch.Tensor, runs: torch.Tensor) -> None:
        pass


class GatherRule(TokenRule):
    def __init__(self, closes: dict[str, list[str]], threshold: float):
        super().__init__()
        self.closes, self.threshold = closes, threshold

    def start(self) -> None:
        self.closed: dict[str, torch.Tensor] = {}

    def tokens(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        return ~self.closed[name] if name in self.closed else None

    def after(self, name: str, before: torch.Tensor, after: torch.Tensor, runs: torch.Tensor) -> None:
        if name not in self.closes:
            return
        similar = cosines(before, after)
        self.closest = min(self.closest, (similar - self.threshold).abs().min().item())
        for other in self.closes[name]:
            closed = self.closed.get(other, torch.zeros_like(runs))
            self.closed[other] = closed | (runs & (similar >= self.threshold))


class Gathering(skipc.Policy):
    """Prefill and decode alike: each token closes what is behind."""

    only_grows = True

    def __init__(self, closes: dict[str, list[str]], threshold: float):
        self.closes, self.threshold = closes, threshold

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        threshold = dict.fromkeys(self.closes, self.threshold)
        return skipc.GateTable.of(call.names, threshold=threshold, closes=self.closes, rule="gather")


def only_outline(models: Any) -> None:
    if models[2].options.lowering != "outline":
        with pytest.raises(skipc.PlanError, match="outline"):
            check(models, Gathering({SITES[1]: [SITES[3]]}, 0.9), lambda: GatherRule({SITES[1]: [SITES[3]]}, 0.9))
        pytest.skip("tokens decide for themselves under 'outline' only")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sites", [SITES[1::2], SITES], ids=["mlps", "all"])
def test_gather(models: Any, batch: int, sites: list[str], monkeypatch: Any) -> None:
    """Row compaction of MLPs, and of the queries of a prompt of one row; elsewhere attentions blend."""
    only_outline(models)
    closes = {name: sites[i + 1 :] for i, name in enumerate(sites)}
    shares: set[float] = set()
    compacted: list[bool] = []
    monkeypatch.setattr(program, "gathered", lambda *a: compacted.append((made := gathered(*a)) is not None) or made)
    attended: list[int] = []
    monkeypatch.setattr(program, "queried", lambda *a: attended.append(int(a[3].sum())) or queried(*a))
    blind: list[int] = []
    monkeypatch.setattr(program, "unseen", lambda *a: blind.append(int((~a[1].any(1)).sum())) or unseen(*a))
    for threshold in quantiles(models, sites, 0.2, 0.5, 0.8):
        rules: list[GatherRule] = []

        def rule(threshold: float = threshold, rules: list[GatherRule] = rules) -> Rule:
            rules.append(GatherRule(closes, threshold))
            return rules[-1]

        check(models, Gathering(closes, threshold), rule, batch)
        shares |= set(rules[-1].shares)
    assert len(shares) > 2, "some tokens run where others do not"
    assert sum(compacted) > len(compacted) / 2, "MLPs compute the chosen tokens alone"
    assert bool(attended) == (batch == 1 and sites is SITES), "attentions attend from the chosen tokens alone"
    assert any(blind) == (batch > 1 and sites is SITES), "decode steps read no keys for rows that skip an attention"


class RoutedRule(TokenRule):
    def __init__(self, weights: dict[str, torch.Tensor], threshold: float, capacity: float | None, adapters: set[str]):
        super().__init__()
        self.weights, self.threshold, self.capacity, self.adapters = weights, threshold, capacity, adapters

    def tokens(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        layer = name.rpartition(".")[0]
        if layer not in self.weights:
            return None
        if name.endswith("attn"):
            scores = torch.sigmoid(hidden.double() @ self.weights[layer].double())
            self.runs = scores > self.threshold
            if self.capacity is not None and not self.decoding:
                count = max(1, int(self.capacity * scores.shape[1]))
                self.runs = scores >= scores.sort(dim=1, descending=True).values[:, count - 1 : count]
        return self.runs

    def instead(self, name: str, hidden: torch.Tensor) -> torch.Tensor | float:
        return hidden * 0.25 if name in self.adapters else 0.0


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize(("batch", "adapted"), [(1, True), (3, True), (3, False)])
def test_routers(models: Any, capacity: float | None, batch: int, adapted: bool) -> None:
    only_outline(models)
    generator = torch.Generator().manual_seed(5)
    weights = {f"model.layers.{i}": torch.randn(64, generator=generator) for i in (1, 2)}
    routers: dict[str, Any] = {}
    for layer, weight in weights.items():
        routers[f"{layer}.self_attn"] = lambda x, w=weight: torch.sigmoid(x @ w)
        routers[f"{layer}.mlp"] = f"{layer}.self_attn"
    adapters = {"model.layers.1.mlp": lambda x: x * 0.25} if adapted else {}
    policy = skipc.Routed(routers, 0.5, capacity, adapters)
    rules: list[RoutedRule] = []

    def rule() -> Rule:
        rules.append(RoutedRule(weights, 0.5, capacity, set(adapters)))
        return rules[-1]

    check(models, policy, rule, batch)
    assert {0.0, 1.0} <= set(rules[-1].shares)


class PredictionRule(TokenRule):
    def __init__(self, model: Any, criterion: str, threshold: float, patience: int, rule: str):
        super().__init__()
        self.model, self.criterion, self.threshold, self.patience, self.rule = (
            model,
            criterion,
            threshold,
            patience,
            rule,
        )

    def start(self) -> None:
        self.left: torch.Tensor | None = None
        self.predictions: list[torch.Tensor] = []

    def tokens(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        if ".layers.0." in name:
            return None
        if name.endswith("attn"):
            logits = self.model.lm_head(self.model.model.norm(hidden))[..., :2].float()
            if self.criterion == "confidence":
                confident = logits.softmax(-1).amax(-1)
                self.closest = min(self.closest, (confident - self.threshold).abs().min().item())
                left = confident >= self.threshold
            else:
                self.predictions.append(logits.argmax(-1))
                last = self.predictions[-self.patience - 1 :]
                settled = len(last) > self.patience
                left = torch.stack([p == last[0] for p in last]).all(0) & settled
            self.left = left if self.left is None else self.left | left
        assert self.left is not None
        return ~(self.left if self.rule == "gather" else self.left.all().expand(self.left.shape))


@pytest.mark.parametrize("rule", ["gather", "all"])
@pytest.mark.parametrize(("criterion", "patience"), [("confidence", 1), ("patience", 1), ("patience", 2)])
def test_exit_by_prediction(models: Any, criterion: Any, patience: int, rule: Any) -> None:
    only_outline(models)
    model = models[0]

    def head(stream: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model.model.norm(stream))[..., :2]  # type: ignore[no-any-return]

    policy = skipc.PredictionExit(head, criterion, 0.54, patience, rule=rule)
    rules: list[PredictionRule] = []

    def made() -> Rule:
        rules.append(PredictionRule(models[1] if not rules else model, criterion, 0.54, patience, rule))
        return rules[-1]

    check(models, policy, made, batch=2)
    assert 0.0 in rules[-1].shares
    assert rule == "all" or any(0 < share < 1 for share in rules[-1].shares)
