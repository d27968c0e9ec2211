"""Does this model fit this card at this length, how fast is it, and what should be set? Answered without loading it.

The layout is the runtime's own (`offload.demand`, `offload.scheduler.layout`); times are those of
`offload.scheduler.cost`. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.checkpoint import ITEMSIZES, FileShape
from offload.config import OffloadConfig
from offload.demand import Held, demand_of
from offload.errors import BudgetError, ConfigError, InputError
from offload.scheduler import cost
from offload.scheduler.layout import Demand, Layout, lay_out
from offload.scheduler.profiles import PROFILES, Profile
from offload.units import GIB, gib

FITS, SLOW, NOT = "fits", "fits but slow", "does not fit"
SLOW_TOKEN_S = 0.1  # people read faster than ten tokens a second
# Of the constants in `cost`, against `benchmarks/`: steps within 3 %, prefills within 15 % on the calibrated card.
BAND = {"calibrated": 0.15, "data_sheet": 0.3}
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
        setting: What to change.
        value: To what, as it is written.
        result: What comes of it.
    """

    setting: str
    value: str
    result: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run comes to.

    Attributes:
        verdict: fits, fits but slow, or does not fit.
        context: Tokens of the prompt and the answer.
        layout: Of the run; None where it does not fit.
        times: Likewise.
        band: Share by which times may be off either way.
        missing: What does not fit, as an error says it; None where it does.
        largest: Tokens of the longest context that fits.
        suggestions: The smallest changes with which it fits.
        notes: What else the reader should know.
        toml: The settings, to paste.
    """

    verdict: str
    context: int
    layout: Layout | None
    times: cost.Times | None
    band: float
    missing: BudgetError | None
    largest: int
    suggestions: list[Suggestion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    toml: str = ""


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
    if output >= context:
        raise InputError(
            "The answer leaves no room for a prompt",
            asked=f"{output:,} tokens of an answer",
            there=f"{context:,} tokens of context",
            change="Lower --output, or raise --context.",
        )
    notes = []
    if shape.max_positions is not None and context > shape.max_positions:
        notes.append(
            f"the model was made for {shape.max_positions:,} tokens: expect poor text beyond"
        )
    if shape.weights_are == "computed":
        notes.append(
            "the weights are computed from the config; give the folder for the exact bytes"
        )
    if machine.profile.basis != "calibrated":
        notes.append(
            f"times on {machine.profile.name} are predicted from its data sheet and have not been run"
        )
    largest = longest(config, shape, machine, output=output, batch=batch)
    try:
        layout = _laid_out(config, shape, machine, context=context, output=output, batch=batch)
    except BudgetError as error:
        return Plan(
            verdict=NOT,
            context=context,
            layout=None,
            times=None,
            band=0.0,
            missing=error,
            largest=largest,
            suggestions=_suggestions(config, shape, machine, context, output, batch, largest),
            notes=notes,
            toml="",
        )
    times = cost.times(
        layout,
        work_of(shape),
        machine.profile,
        mode=config.mode,
        batch=batch,
        prompt=context - output,
    )
    slow = times.token > SLOW_TOKEN_S
    return Plan(
        verdict=SLOW if slow else FITS,
        context=context,
        layout=layout,
        times=times,
        band=BAND[machine.profile.basis],
        missing=None,
        largest=largest,
        notes=notes,
        toml=_toml(config, machine),
    )


def work_of(shape: FileShape) -> cost.Work:
    """What the cost model needs of a shape."""
    return cost.Work(
        parameters=shape.parameters,
        itemsize=ITEMSIZES[shape.dtype],
        heads=shape.heads,
        layers=shape.layers,
        token_bytes=shape.token_bytes,
    )


def longest(
    config: OffloadConfig, shape: FileShape, machine: Machine, *, output: int, batch: int
) -> int:
    """Tokens of the longest context that fits, in whole pages; 0 where none does."""

    def fits(tokens: int) -> bool:
        try:
            _laid_out(config, shape, machine, context=tokens, output=output, batch=batch)
        except BudgetError:
            return False
        return True

    page = config.cache.page
    low, high = 0, page
    while high <= _LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > page:
        middle = (low + high) // 2 // page * page
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _demand(
    config: OffloadConfig, shape: FileShape, machine: Machine, context: int, output: int, batch: int
) -> Demand:
    held = Held(
        total=machine.profile.memory,
        weights=shape.weights,
        overhead=machine.profile.context,
        on_card=True,
    )
    prompt = max(1, context - output)
    return demand_of(config, shape, held, batch=batch, tokens=context, prompt=prompt)


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
    """Up to three changes, one thing each, every one of which was laid out."""
    found = []

    def lacks(device: int, host: int, of: Machine = machine) -> BudgetError | None:
        demand = _demand(config, shape, of, context, output, batch)
        try:
            lay_out(demand, device_budget=device, host_budget=host)
        except BudgetError as error:
            return error
        return None

    for key, value in (
        ("replica.rung", "auto"),
        ("cache.window", "auto"),
        ("prefill.chunk", "auto"),
    ):
        section, _, name = key.partition(".")
        try:
            changed = OffloadConfig.build(config, **{section: {name: value}})
            demand = _demand(changed, shape, machine, context, output, batch)
            layout = lay_out(demand, device_budget=machine.device, host_budget=2**60)
        except (BudgetError, ConfigError):
            continue
        if getattr(getattr(config, section), name) == value:
            continue  # as it is
        result = (
            f"fits, rung {layout.rung.name}" if layout.rung else "fits, every token is streamed"
        )
        if layout.host_bytes > machine.host:
            result += f", with memory.cpu at {_up(layout.host_bytes)}"
        found.append(Suggestion(setting=key, value=f'"{value}"', result=result))
    of_device, of_host = lacks(machine.device, 2**60), lacks(2**60, machine.host)
    room = machine.profile.memory - machine.profile.context
    if of_device is not None and of_device.requested <= room:
        size, rest = of_device.requested, lacks(of_device.requested, machine.host)
        result = "fits" if rest is None else f"fits the card; {rest.setting} is too small besides"
        found.append(Suggestion(setting="memory.gpu", value=_up(size), result=result))
    if of_host is not None and of_device is None:
        found.append(Suggestion(setting="memory.cpu", value=_up(of_host.requested), result="fits"))
    if largest > output:
        result = f"fits with {largest - output:,} tokens of prompt"
        found.append(Suggestion(setting="--context", value=f"{largest:,}", result=result))
    if batch > 1 and longest(config, shape, machine, output=output, batch=1) >= context:
        found.append(Suggestion(setting="--batch", value="1", result="fits"))
    if of_device is not None:
        for card in sorted(PROFILES.values(), key=lambda card: (card.memory, card.name)):
            of = Machine(profile=card, device=card.memory - GIB, host=max(machine.host, card.host))
            if card.memory > machine.device and lacks(of.device, of.host, of) is None:
                result = f"fits its {gib(card.memory)}, with {gib(of.host)} of host memory for KV"
                found.append(Suggestion(setting="--gpu", value=card.name, result=result))
                break
    return found[:3]


def _up(size: int) -> str:
    """Bytes as a setting, not less."""
    return f"{-(-size * 100 // GIB) / 100:.2f}GiB"


def _toml(config: OffloadConfig, machine: Machine) -> str:
    lines = [f'mode = "{config.mode}"', "", "[memory]"]
    lines.append(f'gpu = "{machine.device / 2**30:.2f}GiB"')
    lines.append(f'cpu = "{machine.host / 2**30:.2f}GiB"')
    set_keys = [
        s for s in config.settings() if s.is_set and not s.key.startswith(("memory.", "mode"))
    ]
    section = "memory"
    for setting in set_keys:
        table, _, name = setting.key.partition(".")
        if table != section:
            section = table
            lines += ["", f"[{table}]"]
        value = setting.value
        shown = str(value).lower() if isinstance(value, (bool, int, float)) else f'"{value}"'
        lines.append(f"{name} = {shown}")
    return "\n".join(lines) + "\n"
