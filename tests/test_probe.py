"""What was measured of a machine is kept, used for the same machine only, and takes the place of data sheets."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import budget, cli, doctor, hardware, measure, plan, probe
from offload.config import OffloadConfig
from offload.demand import CUBLAS_WORKSPACE
from offload.errors import BudgetError, InputError
from offload.hardware import Card
from offload.measure import dma_from
from offload.probe import Fingerprint, Probe, Quantity, known_profile, measured_profile, read, write
from offload.scheduler.profiles import PROFILES, RATES, profile_of
from offload.tiers.pinned import HostRegion, PinBudget, commit_regions

GIB, MIB = 2**30, 2**20
CARD = Card(name="NVIDIA GeForce RTX 4090", total=24 * GIB, free=23 * GIB, driver="580.1")
ROOT = Path(__file__).parent.parent
FILE = probe.probe_file  # before tests are kept from it


def number(value: float, unit: probe.Unit) -> Quantity:
    return Quantity(value, unit, "measured")


def of_machine(here: Fingerprint, **changed: Any) -> Probe:
    """A probe of a machine with a card, whose numbers are made up."""
    made: dict[str, Any] = {
        "fingerprint": here, "free_bytes": 22 * GIB, "date": "2026-11-27T00:00:00+00:00", "took_s": 5.5,
        "h2d": {2**16: number(3e9, "B/s"), 2**26: number(20e9, "B/s")}, "d2h": {2**26: number(21e9, "B/s")},
        "dma_from": Quantity(2**22, "B", "computed"), "zero_copy": {512: number(10e9, "B/s")},
        "device_stream": number(900e9, "B/s"), "gemm": {"bfloat16": number(150e12, "FLOP/s"), "float32": number(70e12, "FLOP/s")},
        "attention": number(120e12, "FLOP/s"), "launch": number(5e-6, "s"), "hand_off": number(3e-5, "s"),
        "pinnable": Quantity(60 * GIB, "B", "computed"), "host_stream": number(50e9, "B/s"), "host_scan": number(30e9, "B/s"),
        "host_attend": number(9e9, "B/s"), "worker_hand_off": number(1e-4, "s"),
    }  # fmt: skip
    return Probe(**made | changed)


def use_card(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    monkeypatch.setattr(hardware, "local_card", lambda: card)
    monkeypatch.setattr(doctor, "local_card", lambda: card)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this machine's probe would be; the machine has a card."""
    use_card(monkeypatch, CARD)
    found = tmp_path / "probes" / "here.json"
    monkeypatch.setattr(probe, "probe_file", lambda: found)
    return found


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """What was measured: nothing is, but a made-up probe comes of it."""
    made: list[Probe] = []

    def measured(here: Fingerprint) -> Probe:
        made.append(of_machine(here, took_s=1.0 + len(made)))
        return made[-1]

    monkeypatch.setattr(measure, "measured", measured)
    return made


def keep(file: Path, **changed: Any) -> Probe:
    """Keeps a probe of this machine, of which something may be another's."""
    found = of_machine(probe.fingerprint(), **changed)
    write(found, file)
    return found


def test_a_probe_is_read_as_it_was_written(file: Path) -> None:
    found = keep(file)
    assert read(file) == found
    assert hardware.probe(measure=False) == found
    assert list(file.parent.iterdir()) == [file]
    without = of_machine(found.fingerprint, h2d=None, gemm=None, dma_from=None)
    write(without, file)
    assert read(file) == without


def test_memory_that_no_machine_has_is_refused(file: Path) -> None:
    found = keep(file)
    file.write_text(json.dumps(asdict(found) | {"free_bytes": 10**400}))
    with pytest.raises(InputError, match="free_bytes"):
        read(file)


def test_a_folder_that_may_not_be_read_is_one_without_a_probe(
    file: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[Probe]
) -> None:
    keep(file)

    def refused(self: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    def unread(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(Path, "read_text", unread)
    assert known_profile(CARD.name) == profile_of(CARD.name)


def test_it_is_measured_once(file: Path, measurements: list[Probe]) -> None:
    first = hardware.probe()
    assert hardware.probe() == first
    assert measurements == [first]
    assert probe.renewed() != first
    assert hardware.probe() == measurements[1]
    assert len(measurements) == 2


def test_without_measuring_there_has_to_be_one(file: Path, measurements: list[Probe]) -> None:
    with pytest.raises(InputError, match="has not been measured") as caught:
        hardware.probe(measure=False)
    assert caught.value.asked == str(file)
    assert "offload doctor --probe" in str(caught.value)
    assert measurements == []


@pytest.mark.parametrize(
    ("name", "other"),
    [("card", "NVIDIA H100 80GB HBM3"), ("card", None), ("driver", "581.2"), ("torch", "2.0"), ("cpu", "Z80"), ("cores", 3)],
)  # fmt: skip
def test_another_machine_is_measured_anew_or_refused(
    name: str, other: Any, file: Path, measurements: list[Probe], caplog: pytest.LogCaptureFixture
) -> None:
    keep(file)
    changed: dict[str, Any] = {name: other}
    keep(file, fingerprint=replace(probe.fingerprint(), **changed))
    with pytest.raises(InputError, match=f"differs: {name} {other or 'none'}, here ") as caught:
        hardware.probe(measure=False)
    assert caught.value.asked == str(file)
    assert "offload doctor --probe" in str(caught.value)
    assert measurements == []
    with caplog.at_level(logging.WARNING, "offload.probe"):
        assert hardware.probe() == measurements[0] == read(file)
    assert name in caplog.text


def test_at_least_as_much_device_memory_has_to_be_free(
    file: Path, measurements: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, is_used in ((CARD.free, True), (CARD.free - 1, True), (CARD.free + 1, False)):
        found = keep(file, free_bytes=free)
        if is_used:
            assert hardware.probe(measure=False) == found
        else:
            with pytest.raises(InputError, match="of device memory free, here"):
                hardware.probe(measure=False)
    # What this process's own model takes is not taken by others.
    found = keep(file, free_bytes=CARD.free + 1)
    monkeypatch.setattr(hardware, "held_here", lambda: 1)
    assert hardware.probe(measure=False) == found
    use_card(monkeypatch, None)
    keep(file, free_bytes=None)
    assert hardware.probe(measure=False).free_bytes is None
    assert measurements == []


def at(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts something at a place of a file; `...` takes it away."""

    def change(data: dict[str, Any]) -> None:
        *above, last = place.split("/")
        for name in above:
            data = data[name]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("host_stream/value", -1.0),
        at("host_stream/value", 0.0),
        at("host_stream/value", math.nan),
        at("h2d/65536/value", math.inf),
        at("gemm/bfloat16/value", -math.inf),
        at("launch/value", -1e-6),
        at("pinnable/value", -1),
        at("host_stream/value", "fast"),
        at("host_stream/value", "1e9"),
        at("host_stream/unit", "FLOP/s"),
        at("host_stream/source", "guessed"),
        at("host_stream", None),
        at("host_stream", ...),
        at("h2d/-1", {"value": 1.0, "unit": "B/s", "source": "measured"}),
        at("fingerprint/cores", None),
        at("fingerprint/moon", "full"),
        at("host_stream/exactness", 1),
        at("wind", 3),
        at("took_s", math.nan),
        at("took_s", -1.0),
        at("free_bytes", -1),
        at("free_bytes", 1.5),
    ],
)
def test_entries_that_no_machine_has_are_refused(
    change: Callable[[dict[str, Any]], None], file: Path, measurements: list[Probe]
) -> None:
    data = asdict(keep(file))
    data["h2d"] = {str(size): rate for size, rate in data["h2d"].items()}
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="does not hold what was measured") as caught:
        hardware.probe(measure=False)
    assert "offload doctor --probe" in str(caught.value)
    assert hardware.probe() == measurements[0] == read(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_a_file_that_is_something_else_is_measured_over(
    text: str, file: Path, measurements: list[Probe], caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="does not hold what was measured"):
        hardware.probe(measure=False)
    with caplog.at_level(logging.WARNING, "offload.probe"):
        assert hardware.probe() == measurements[0] == read(file)
    assert str(file) in caplog.text


def test_a_bad_entry_is_named(file: Path) -> None:
    data = asdict(keep(file))
    data["device_stream"]["value"] = -5.0
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"device_stream.*-5\.0 B/s"):
        read(file)


def test_nothing_can_be_pinned_is_a_number_too(file: Path) -> None:
    nothing = Quantity(0, "B", "measured")
    assert keep(file, pinnable=nothing).pinnable == read(file).pinnable == nothing


def test_what_cannot_be_kept_is_a_warning(
    file: Path, measurements: list[Probe], caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "offload.probe"):
        assert hardware.probe() == measurements[0]
    assert "OFFLOAD_CACHE_DIR" in caplog.text


def test_every_machine_has_a_file_of_its_own_in_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE_DIR", str(tmp_path))
    names = []
    for node in ("one", "other.example", "a/b", ""):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        names.append(FILE())
    assert len(set(names)) == 4
    assert {name.parent for name in names} == {tmp_path / "probes"}


def test_measured_rates_take_the_place_of_the_data_sheet(file: Path) -> None:
    sheet = PROFILES["rtx4090"]
    assert known_profile(CARD.name) is sheet  # nothing was measured
    keep(file)
    found = known_profile(CARD.name)
    assert [getattr(found, rate) for rate in RATES] == [900e9, 150e12, 120e12, 20e9, 50e9]
    assert {found.source_of(rate) for rate in RATES} == {"measured"} == {found.basis}
    same = {rate: getattr(sheet, rate) for rate in RATES}
    assert replace(found, **same, basis=sheet.basis, measured=frozenset()) == sheet
    assert known_profile("NVIDIA GeForce RTX 3090") is PROFILES["rtx3090"]  # another card of it


def test_a_part_of_the_rates_does_not_make_a_profile_measured() -> None:
    here = probe.fingerprint()
    found = measured_profile(PROFILES["rtx4090"], of_machine(here, gemm=None, h2d=None))
    assert found.basis == "data_sheet"
    assert found.gemm_flops == PROFILES["rtx4090"].gemm_flops
    assert found.pcie == PROFILES["rtx4090"].pcie
    assert [found.source_of(rate) for rate in RATES] == ["measured", "data_sheet", "measured", "data_sheet", "measured"]  # fmt: skip
    halves = of_machine(here, gemm={"float16": number(8e12, "FLOP/s")})
    assert measured_profile(PROFILES["rtx4090"], halves).gemm_flops == 8e12


def test_a_calibrated_card_keeps_its_rates_but_not_those_around_it() -> None:
    h100 = PROFILES["h100"]
    found = measured_profile(h100, of_machine(probe.fingerprint()))
    assert found == replace(
        h100, pcie=20e9, host_bytes_per_s=50e9, measured=frozenset({"pcie", "host_bytes_per_s"})
    )
    assert found.basis == "calibrated"


def test_a_probe_of_another_machine_is_left_out_of_a_profile_with_a_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(file)
    use_card(monkeypatch, replace(CARD, driver="581.2"))
    with caplog.at_level(logging.WARNING, "offload.probe"):
        assert known_profile(CARD.name) is PROFILES["rtx4090"]
    assert "driver 580.1, here 581.2" in caplog.text
    assert "data sheet" in caplog.text


def test_a_card_without_a_data_sheet_is_known_once_it_was_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(CARD, name="NVIDIA GeForce RTX 2080 Ti", total=11 * GIB)
    use_card(monkeypatch, other)
    with pytest.raises(InputError, match="no profile of this card"):
        known_profile(other.name)
    keep(file, attention=None)
    with pytest.raises(InputError, match="no profile of this card"):
        known_profile(other.name)
    keep(file)
    found = known_profile(other.name)
    assert (found.name, found.memory, found.basis) == (other.name, 11 * GIB, "measured")
    assert [getattr(found, rate) for rate in RATES] == [900e9, 150e12, 120e12, 20e9, 50e9]


def test_a_plan_and_a_run_take_the_same_rates(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(file)
    machine = plan.local_machine(OffloadConfig())
    assert machine is not None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD.name)
    run = budget._profile_of(torch.device("cuda"))
    assert run is not None
    assert {rate: getattr(run, rate) for rate in RATES} == {rate: getattr(machine.profile, rate) for rate in RATES}  # fmt: skip
    assert run.pcie == 20e9
    assert budget._profile_of(torch.device("cpu")) is None


def test_a_plan_with_a_probe_says_so_and_loads_nothing_heavy(file: Path, tmp_path: Path) -> None:
    found = keep(file)
    model = tmp_path / "config.json"
    model.write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
            }
        )
    )  # fmt: skip
    code = f"""
import sys
from pathlib import Path
from offload import cli, hardware, probe
hardware.local_card = lambda: hardware.Card(name={CARD.name!r}, total={CARD.total}, free={CARD.free}, driver={CARD.driver!r})
probe.probe_file = lambda: Path({str(file)!r})
cli.main(["plan", "--model", {str(model)!r}, "--context", "128K", "--json"])
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert not {"torch", "transformers", "numba", "faiss"} & set(done.stderr.split())
    planned = json.loads(done.stdout)["plans"][0]
    assert planned["basis"] == planned["sources"]["times"] == "measured"
    assert found.h2d is not None
    assert planned["rates"]["pcie"] == {"value": found.h2d[2**26].value, "source": "measured"}
    assert any("rates that were measured on it" in note for note in planned["notes"])


def test_the_copy_engine_is_as_fast_as_a_kernel_from_where_the_rates_meet() -> None:
    rates = {2**10: number(1e9, "B/s"), 2**12: number(4e9, "B/s"), 2**14: number(16e9, "B/s")}
    assert dma_from(rates, 4e9) == Quantity(2**12, "B", "computed")
    assert dma_from(rates, 2e9) == Quantity(2**11, "B", "computed")
    assert dma_from(rates, 0.5e9) == Quantity(2**10, "B", "computed")
    assert dma_from(rates, 17e9) is None


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured on little, since only whether it works is asked."""
    for name, value in {
        "HOST_BYTES": 64 * MIB, "_ROWS": 16, "_TIMES": 1, "_DEVICE_STREAM": MIB, "_PRODUCT": (16, 32, 48),
        "_PROMPT": (16, 64), "_BLOCKS": (2**12, 2**14), "_REPEATS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(measure, name, value)


@pytest.mark.usefixtures("quickly")
def test_a_machine_without_a_card_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use_card(monkeypatch, None)
    here = probe.fingerprint()
    found = measure.measured(here)
    assert found.fingerprint == here
    assert here.card is None
    names = {entry.name for entry in found.entries()}
    assert names == {"pinnable", "host_stream", "host_scan", "host_attend", "worker_hand_off"}
    for rate in (found.host_stream, found.host_scan, found.host_attend):
        assert rate.source == "measured"
        assert 1e7 < rate.value < 1e13
    assert found.worker_hand_off.value < 1
    assert found.pinnable.source == "computed"


def test_what_may_be_locked_is_what_can_be_pinned_without_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    cpu, region, budget_ = torch.device("cpu"), None, None
    for limit, want in ((8 * MIB, 8 * MIB), (2**40, GIB), (resource.RLIM_INFINITY, GIB)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        found = measure._pinnable(cpu, region, budget_, GIB)  # type: ignore[arg-type]
        assert found == Quantity(want, "B", "computed")


def test_a_card_that_torch_cannot_use_leaves_its_numbers_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "offload.measure"):
        assert measure._device_of(CARD.name) == torch.device("cpu")
    assert CARD.name in caplog.text


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    little = hardware.HostMemory(total=GIB, available=100 * MIB, limited_by="cgroup")
    monkeypatch.setattr(hardware, "host_memory", lambda: little)
    use_card(monkeypatch, None)
    with pytest.raises(BudgetError, match="Measuring this machine needs"):
        measure.measured(probe.fingerprint())


class _Event:
    """Stands for an event of a card."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: object) -> float:
        return 2.0  # ms


@pytest.mark.usefixtures("quickly")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a card")
def test_what_is_measured_of_a_card_counts_what_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("synchronize", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    cpu = torch.device("cpu")
    region = HostRegion(64 * MIB, 64 * MIB, cpu, PinBudget())
    commit_regions([(region, 64 * MIB)])
    measure._filled(region)
    found = of_machine(probe.fingerprint(), **measure._of_card(cpu, region))
    region.close()
    values = {(e.name, e.of): e.quantity.value for e in found.entries()}
    copied = 4 * 2**14  # of each size; every run takes 2 ms
    assert values["h2d", 2**12] == values["d2h", 2**14] == copied / 2e-3
    for row in (128, 256, 512, 1024):
        assert values["zero_copy", row] == pytest.approx(8 * 16 * row / 2e-3)  # heads, rows
    assert values["device_stream", None] == 2 * MIB / 2e-3
    assert values["gemm", "float32"] == pytest.approx(2 * 16 * 32 * 48 / 2e-3)
    assert values["attention", None] == pytest.approx(4 * 32 * 128 * 16 * 64 / 2e-3)
    assert found.free_bytes is not None


@pytest.mark.gpu
def test_a_card_is_as_fast_as_cards_are(caplog: pytest.LogCaptureFixture) -> None:
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    found = measure.measured(probe.fingerprint())
    assert found.took_s < 90  # with what is compiled
    # cuBLAS keeps what it works with.
    assert torch.cuda.memory_allocated() <= allocated + CUBLAS_WORKSPACE
    assert torch.cuda.max_memory_reserved() - reserved < measure.DEVICE_BYTES
    assert [record for record in caplog.records if record.name.startswith("offload")] == []
    assert found.h2d is not None
    assert found.d2h is not None
    assert found.zero_copy is not None
    assert found.gemm is not None
    assert found.device_stream is not None
    assert found.attention is not None
    assert found.launch is not None
    assert found.hand_off is not None
    rates = [rate.value for _, rate in sorted(found.h2d.items())]
    assert rates[0] < rates[-1]
    for copies in (found.h2d, found.d2h):
        assert 2e9 < copies[2**26].value < 300e9
    rows = [rate.value for _, rate in sorted(found.zero_copy.items())]
    assert 0.3e9 < rows[0] < rows[-1] < 1.1 * rates[-1]
    assert found.dma_from is None or 2**16 <= found.dma_from.value <= 2**26
    assert 1e11 < found.device_stream.value < 2e13
    assert 1e12 < found.gemm["float32"].value < found.gemm["float16"].value < 5e15
    assert 1e12 < found.attention.value < 5e15
    assert 5e-7 < found.launch.value < 1e-4
    assert 5e-6 < found.hand_off.value < 1e-3
    assert 1e9 < found.host_stream.value < 2e12
    again = measure.measured(probe.fingerprint())
    assert again.took_s < 20
    assert again.device_stream is not None
    assert again.device_stream.value == pytest.approx(found.device_stream.value, rel=0.2)


@pytest.mark.gpu
def test_measured_rates_are_near_those_of_a_card_that_is_calibrated() -> None:
    known = profile_of(torch.cuda.get_device_name())
    if known.basis != "calibrated":
        pytest.skip("this card is not calibrated")
    found = measured_profile(replace(known, basis="data_sheet"), measure.measured(probe.fingerprint()))  # fmt: skip
    assert found.basis == "measured"
    for rate in RATES:
        assert 0.5 < getattr(found, rate) / getattr(known, rate) < 2, rate
    assert found.bytes_per_s == pytest.approx(known.bytes_per_s, rel=0.15)


@pytest.mark.gpu
def test_a_process_with_a_model_on_the_card_may_use_a_probe_made_without_it() -> None:
    found = measure.measured(probe.fingerprint())
    model = torch.zeros(2 * GIB, dtype=torch.uint8, device="cuda")
    assert found.differences(probe.fingerprint(), hardware.free_for_us()) == []
    del model


def test_the_doctor_measures_shows_and_keeps(
    file: Path,
    measurements: list[Probe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("offload.doctor.local_card", lambda: None)
    assert cli.main(["doctor", "--no-probe"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "has not been measured" in shown.err
    assert cli.main(["doctor", "--probe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (copies,) = [line for line in lines if "to the card, blocks of 64.0 MiB" in line]
    assert copies.split()[-3:] == ["18.6", "GiB/s", "measured"]
    (products,) = [line for line in lines if "matrix products, bfloat16" in line]
    assert products.split()[-3:] == ["150.0", "TFLOP/s", "measured"]
    assert lines[-1].startswith("ready")
    assert cli.main(["doctor", "--probe"]) == 0  # asked for, it is measured again
    assert len(measurements) == 2
    capsys.readouterr()
    assert cli.main(["doctor", "--no-probe", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["probe"]
    assert printed["took_s"] == measurements[1].took_s
    assert printed["host_stream"] == {"value": 50e9, "unit": "B/s", "source": "measured"}
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probe"] is None
