"""Does this model fit this card at this length, how fast is it, and what should be set? Answered without loading it.

The layout is the runtime's own (`offload.demand`, `offload.scheduler.layout`); times are those of
`offload.scheduler.cost`. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from offload import hardware
from offload.checkpoint import FileShape, describe
from offload.config import OffloadConfig
from offload.decisions import Card, Choice, choices
from offload.demand import CUBLAS_WORKSPACE, Held, demand_of, other_demand, priced_shape, way_of
from offload.errors import BudgetError, InputError, OffloadError
from offload.probe import known_profile
from offload.scheduler import cost
from offload.scheduler.layout import REPLICA_WINDOW, Demand, Layout, lay_out
from offload.scheduler.phases import Course, course
from offload.scheduler.profiles import PROFILES, Profile
from offload.scheduler.rungs import Fidelity, fidelity_of
from offload.units import GIB, gib

FITS, SLOW, NOT = "fits", "fits but slow", "does not fit"
SLOW_TOKEN_S = 0.1  # people read faster than ten tokens a second
# Of the constants in `cost`, against `benchmarks/`: steps within 3 %, prefills within 15 % on the calibrated card.
# With rates that were measured here launches are still those of that card: no narrower until a run says so.
BAND = {"calibrated": 0.15, "measured": 0.3, "data_sheet": 0.3}
_SUGGESTED = 3  # changes with which it would fit: more than that nobody reads
_LONGEST = 2**24  # tokens that the search for the longest context ends at


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is.

    Attributes:
        profile: Rates of the card.
        device: Device bytes that may be used, weights and the driver's share included.
        host: Host bytes for pages.
    """

    profile: Profile
    device: int
    host: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A change with which a run fits.

    Attributes:
        change: Options of the command line, as they are written; they replace those that were given.
        result: What comes of it.
    """

    change: str
    result: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run comes to.

    Attributes:
        verdict: fits, fits but slow, or does not fit.
        context: Tokens of the prompt and the answer.
        layout: Of the run; None where it does not fit.
        times: Likewise.
        phases: Where the run's tokens are as it grows; likewise.
        band: Share by which times may be off either way.
        basis: Of the rates that times come from: "data_sheet", "measured" or "calibrated".
        missing: What does not fit, as an error says it; None where it does.
        largest: Tokens of the longest context that fits.
        fidelity: How close its tokens are to those of the stock cache; None where it does not fit, or where nobody
            measured it.
        suggestions: The smallest changes with which it fits.
        notes: What else the reader should know.
        toml: The settings, to paste.
        decisions: What was chosen, what else there was, and what both cost.
    """

    verdict: str
    context: int
    layout: Layout | None
    times: cost.Times | None
    band: float
    basis: str
    missing: BudgetError | None
    largest: int
    fidelity: Fidelity | None = None
    phases: Course | None = None
    suggestions: list[Suggestion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    toml: str = ""
    decisions: list[Choice] = field(default_factory=list)


def machine_of(profile: Profile, config: OffloadConfig) -> Machine:
    """What a configuration lets a run take of a machine.

    Raises:
        BudgetError: More device memory was asked for than the card has.
    """
    memory = config.memory
    reserve = memory.reserve.resolve(total=profile.memory, auto=0)
    device = memory.gpu.resolve(total=profile.memory, auto=profile.memory - reserve)
    if device > profile.memory:
        raise BudgetError(
            "memory.gpu",
            requested=device,
            available=profile.memory,
            setting="memory.gpu",
            change=f"The {profile.name} has no more: lower memory.gpu, or leave it out.",
        )
    # Beside the KV a host holds an operating system and the weights while they are loaded.
    of_host = profile.host * 3 // 4 - memory.reserve.resolve(total=profile.host, auto=0)
    host = memory.cpu.resolve(total=profile.host, auto=of_host)
    return Machine(profile=profile, device=max(0, device), host=max(0, host))


def local_machine(config: OffloadConfig) -> Machine | None:
    """What a configuration lets a run take of this machine; None without a card.

    Raises:
        InputError: Nothing is known of the card.
        BudgetError: More device memory was asked for than it has.
    """
    card = hardware.local_card()
    if card is None:
        return None
    known = replace(known_profile(card.name), memory=card.total, host=hardware.host_memory().total)
    return machine_of(known, config)


def of_this_machine(
    config: OffloadConfig, source: str | None, dtype: str
) -> tuple[FileShape, Machine] | None:
    """A model and this machine, to plan with; None without a known card, or where the files do not say enough.

    Args:
        config: Budgets among it.
        source: As for `describe`.
        dtype: Likewise.
    """
    try:
        machine = local_machine(config)
        return None if machine is None else (describe(source, dtype=dtype), machine)
    except OffloadError:
        return None


def plan(
    config: OffloadConfig,
    shape: FileShape,
    machine: Machine,
    *,
    context: int,
    output: int = 512,
    batch: int = 1,
) -> Plan:
    """Plans one generate.

    Args:
        config: As the runtime would get it.
        shape: Of the model.
        machine: What there is.
        context: Tokens per sequence, prompt and answer together.
        output: Of these, those of the answer.
        batch: Sequences.

    Raises:
        ConfigError: The configuration cannot be used.
        InputError: The answer is as long as the context.
    """
    config.require_usable()
    if not 0 < output < context or batch < 1:
        raise InputError(
            "The answer leaves no room for a prompt"
            if output >= context
            else "There is nothing to plan",
            asked=f"{batch} sequences, {output:,} tokens of an answer",
            there=f"{context:,} tokens of context",
            change="Write at least one sequence and one token of an answer, less than --context.",
        )
    if shape.longest is not None and context > shape.longest:
        raise InputError(
            "The context is longer than the model's sliding window, which is as long as its positions",
            asked=context,
            there=shape.longest,
            change="Lower --context.",
        )
    notes = _notes(config, shape, machine, context, batch)
    largest = longest(config, shape, machine, output=output, batch=batch)
    try:
        demand = _demand(config, shape, machine, context, output, batch)
        layout = lay_out(demand, device_budget=machine.device, host_budget=machine.host)
    except BudgetError as error:
        return Plan(
            verdict=NOT,
            context=context,
            layout=None,
            times=None,
            band=0.0,
            basis=machine.profile.basis,
            missing=error,
            largest=largest,
            suggestions=_suggestions(config, shape, machine, context, output, batch, largest),
            notes=notes,
            toml="",
        )
    way = way_of(config, batch=batch, prompt=context - output, output=output)
    times = cost.times(layout, shape_of(shape), machine.profile, way)
    slow = times.token > SLOW_TOKEN_S
    return Plan(
        verdict=SLOW if slow else FITS,
        context=context,
        layout=layout,
        times=times,
        band=BAND[machine.profile.basis],
        basis=machine.profile.basis,
        missing=None,
        largest=largest,
        fidelity=_fidelity(config, layout),
        phases=course(layout, tokens=context, prompt=context - output),
        notes=notes,
        toml=_toml(config, machine),
        decisions=choices(
            config,
            demand,
            layout,
            budget=machine.device,
            card=Card(shape=shape_of(shape), profile=machine.profile, way=way),
            other=other_demand(
                config,
                shape,
                _held(shape, machine),
                batch=batch,
                tokens=context,
                prompt=context - output,
            ),
            output=output,
        ),
    )


def _fidelity(config: OffloadConfig, layout: Layout) -> Fidelity | None:
    """How close the tokens are; None where that was measured with more read exactly, or with others."""
    if config.mode != "fast" or layout.rung is None:
        return fidelity_of(None, config.retrieval.tokens)
    default, window = OffloadConfig(), config.cache.window
    less = config.replica.skipped_mass > default.replica.skipped_mass
    less = less or config.retrieval.index != default.retrieval.index  # another choice of tokens
    less = less or config.cache.sinks < default.cache.sinks
    less = less or (isinstance(window, int) and window < REPLICA_WINDOW)
    return None if less else fidelity_of(layout.rung, config.retrieval.tokens)


def _notes(
    config: OffloadConfig, shape: FileShape, machine: Machine, context: int, batch: int
) -> list[str]:
    """What the reader should know besides."""
    profile, made_for = machine.profile, shape.max_positions
    said = {
        f"the model was made for {made_for:,} tokens: expect poor text beyond": made_for is not None
        and context > made_for,
        "the weights are computed from the config; a folder with safetensors files gives the exact bytes": shape.weights_are
        == "computed",
        f"the weights are {shape.quantised}: priced as they lie in the files, and times are rougher": shape.quantised
        is not None,
        "of its experts a token meets some: a prompt meets all, and times are rougher": shape.experts_met
        < 1,
        f"times on {profile.name} are predicted from its data sheet and have not been run": profile.basis
        == "data_sheet",
        f"times on {profile.name} are predicted from rates that were measured on it: none of a model was run": profile.basis
        == "measured",
        "several sequences are not drafted: mode verified makes exact steps of them": config.mode
        == "verified"
        and batch > 1,
        "which layers get more bits is measured on the prompt with replica.ladder on: this plan lifts the first and last": config.replica.ladder,
        "steps are launched one by one with decode.capture off, which no time here knows": not config.decode.capture,
    }
    return [note for note, holds in said.items() if holds]


def shape_of(shape: FileShape) -> cost.Shape:
    """What the cost model needs of a shape."""
    return priced_shape(
        shape,
        weights=shape.weights,
        parameters=shape.parameters,
        reads=shape.read_bytes,
        depth=shape.layers,
    )


def longest(
    config: OffloadConfig, shape: FileShape, machine: Machine, *, output: int, batch: int
) -> int:
    """Tokens of the longest context that fits, 16M at most; 0 where not even a page does."""

    def fits(tokens: int) -> bool:
        try:
            _laid_out(config, shape, machine, context=tokens, output=output, batch=batch)
        except BudgetError:
            return False
        return True

    page = config.cache.page
    low, high = 0, page
    while high < _LONGEST and fits(high):
        low, high = high, min(_LONGEST, 2 * high)
    if high == _LONGEST and fits(high):
        return high
    while high - low > page:
        middle = (low + high) // 2 // page * page
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low and high - low > 1:  # buffers grow with tokens: part of a page may have room
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _demand(
    config: OffloadConfig, shape: FileShape, machine: Machine, context: int, output: int, batch: int
) -> Demand:
    prompt = max(1, context - output)
    held = _held(shape, machine)
    return demand_of(config, shape, held, batch=batch, tokens=context, prompt=prompt)


def _held(shape: FileShape, machine: Machine) -> Held:
    return Held(
        total=machine.profile.memory,
        weights=shape.weights,
        # The runtime finds what cuBLAS keeps for the first stream allocated.
        overhead=machine.profile.context + CUBLAS_WORKSPACE,
        on_card=True,
        flops_per_byte=machine.profile.gemm_flops / machine.profile.pcie,
    )


def _laid_out(
    config: OffloadConfig,
    shape: FileShape,
    machine: Machine,
    *,
    context: int,
    output: int,
    batch: int,
) -> Layout:
    demand = _demand(config, shape, machine, context, output, batch)
    return lay_out(demand, device_budget=machine.device, host_budget=machine.host)


def _suggestions(
    config: OffloadConfig,
    shape: FileShape,
    machine: Machine,
    context: int,
    output: int,
    batch: int,
    largest: int,
) -> list[Suggestion]:
    """Up to three changes, every one of which was laid out."""
    found: list[Suggestion] = []

    def fits(changed: OffloadConfig, of: Machine) -> Layout | None:
        try:
            return _laid_out(changed, shape, of, context=context, output=output, batch=batch)
        except BudgetError:
            return None

    def with_host(change: str, changed: OffloadConfig, of: Machine) -> bool:
        """Suggests a change, with as much host memory as it then needs."""
        layout = fits(changed, replace(of, host=2**60))
        if layout is None:
            return False
        if layout.host_bytes > of.host:
            change = f"{change} --cpu-memory {_up(layout.host_bytes)}".strip()
        rung = f", rung {layout.rung.name}" if layout.rung else ", every token streamed"
        found.append(Suggestion(change=change, result=f"fits{rung if layout.host_tokens else ''}"))
        return True

    if config.mode == "exact" and config.scheduler.recompute == "off":
        again = OffloadConfig.build(config, recompute="prefix")
        layout = fits(again, machine)
        if layout is not None:
            result = f"fits, the {layout.dropped_tokens:,} oldest tokens read again for every token"
            found.append(Suggestion(change="--set scheduler.recompute=prefix", result=result))
    with_host("", config, machine)  # only the host is too small
    for key, value in (
        ("replica.rung", "auto"),
        ("cache.window", "auto"),
        ("prefill.chunk", "auto"),
    ):
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name) != value:
            changed = OffloadConfig.build(config, **{section: {name: value}})
            with_host(f"--set {key}={value}", changed, machine)
    if not found:
        try:
            fitting = _demand(config, shape, machine, context, output, batch)
            lay_out(fitting, device_budget=machine.device, host_budget=2**60)
        except BudgetError as error:
            if error.requested <= machine.profile.memory:
                more = replace(machine, device=_rounded(error.requested))
                with_host(f"--gpu-memory {_up(error.requested)}", config, more)
    if largest > output:
        result = f"fits, with {largest - output:,} tokens of prompt"
        found.append(Suggestion(change=f"--context {largest}", result=result))
    if batch > 1 and longest(config, shape, machine, output=output, batch=1) >= context:
        found.append(Suggestion(change="--batch 1", result="fits"))
    free = OffloadConfig.build(config, gpu_memory="auto", cpu_memory="auto")
    for card in sorted(PROFILES.values(), key=lambda card: (card.memory, card.name)):
        if len(found) >= _SUGGESTED:
            break
        if card.memory > machine.profile.memory and fits(free, machine_of(card, free)):
            result = f"fits, with the {gib(card.memory)} of that card and {gib(card.host)} of host memory"
            drop = " without --gpu-memory and --cpu-memory"
            given = not (config.memory.gpu.is_auto and config.memory.cpu.is_auto)
            found.append(
                Suggestion(change=f"--gpu {card.name}{drop if given else ''}", result=result)
            )
    return found[:_SUGGESTED]


def _rounded(size: int) -> int:
    return -(-size * 100 // GIB) * GIB // 100


def _up(size: int) -> str:
    """Bytes as an option, not less."""
    return f"{-(-size * 100 // GIB) / 100:.2f}GiB"


def _toml(config: OffloadConfig, machine: Machine) -> str:
    """What was set, and the budgets, as a file that reads back as them."""
    values: dict[str, object] = {s.key: s.value for s in config.settings() if s.is_set}
    values |= {"mode": config.mode, "memory.gpu": machine.device, "memory.cpu": machine.host}
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        shown = (
            json.dumps(value) if isinstance(value, (bool, int, float)) else json.dumps(str(value))
        )
        size = f"  # {gib(value)}" if section == "memory" and isinstance(value, int) else ""
        sections.setdefault(section, []).append(f"{name} = {shown}{size}")
    top = sections.pop("", [])
    parts = [
        "\n".join(top),
        *(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
