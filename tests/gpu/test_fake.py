"""The training steps and a validation on fake CUDA tensors: nobody waits, all is where and what it should be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu import counted, planted

# Of a step, as counted with PyTorch 2.13: operators, traffic in GB beside and of convolutions, matrix products and
# attention, TFLOP, and peak in GiB. See docs/performance.md; after a change that was meant, write what was counted.
STEPS = {
    ("vae", "64^3"): (3323, 25.1, 3.7, 4.08, 1.26),
    ("vae", "96^3"): (3372, 80.6, 11.7, 13.8, 2.55),
    ("diffusion", "64 x 64 x 32"): (2560, 44.4, 6.6, 7.30, 7.49),
    ("controlnet", "64 x 64 x 32"): (2647, 28.8, 7.8, 3.61, 4.75),
}
TRAININGS = ("vae", "diffusion", "controlnet", "contrast")
SMALLER_THAN_GIB = 2.6  # of the autoencoder's step at 96^3


@pytest.fixture(scope="module")
def counts() -> counted.Counts:
    try:
        return counted.counts([*TRAININGS, "validation", "faults", "known"])
    except counted.Unavailable as why:
        pytest.skip(str(why))


def line_of(fault: Any) -> str:
    return f"tests/gpu/planted.py:{fault.__code__.co_firstlineno}"


def test_a_step_and_its_handlers_never_wait_for_the_device(counts: counted.Counts) -> None:
    waits = {(name, step): found["waits"] for name in TRAININGS for step, found in counts[name].items()}
    assert len(waits) == 9 and waits == dict.fromkeys(waits, [])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_neither_does_one_in_another_type(counts: counted.Counts, dtype: str) -> None:
    assert counts["faults"][dtype]["waits"] == []
    assert list(counts["faults"][dtype]["flop"]) == [dtype]


def test_a_validation_waits_for_a_window_only_when_no_other_is_left(counts: counted.Counts) -> None:
    waits = [wait for wait in counts["validation"]["volume"]["waits"] if " at scripts/networks/" in wait]
    assert len(waits) == 1 and waits[0].startswith("Event.synchronize at scripts/networks/pipeline.py")


def test_what_an_operator_gets_is_on_one_device(counts: counted.Counts) -> None:
    assert [step for name in (*TRAININGS, "validation") for step in counts[name].values() if step["mixed"]] == []


def test_all_that_counts_is_computed_in_bfloat16(counts: counted.Counts) -> None:
    for name, step in STEPS:
        flop = counts[name][step]["flop"]
        wide = flop.get("float32", 0) / sum(flop.values())  # the discriminator
        assert set(flop) == {"bfloat16", "float32"} and 0 < wide < 0.01 if name == "vae" else set(flop) == {"bfloat16"}


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_what_a_step_costs(counts: counted.Counts, name: str, step: str) -> None:
    found = counted.figures(counts[name][step])
    assert found == pytest.approx(dict(zip(found, STEPS[name, step], strict=True)), rel=0.05)


def test_the_autoencoder_s_peak(counts: counted.Counts) -> None:
    assert counted.figures(counts["vae"]["96^3"])["peak GiB"] <= SMALLER_THAN_GIB


# The counting itself


@pytest.mark.parametrize("name", planted.WAITS)
def test_whoever_waits_is_found_and_named(counts: counted.Counts, name: str) -> None:
    (wait,) = counts["faults"][f"WAITS {name}"]["waits"]
    assert wait.endswith(f" at {line_of(planted.WAITS[name])}")


def test_a_handler_that_waits_is_found_and_named(counts: counted.Counts) -> None:
    waits = counts["faults"]["in a handler"]["waits"]
    assert waits == [f"_local_scalar_dense at {line_of(planted.WAITS['item'])}"]


@pytest.mark.parametrize("name", planted.FREE)
def test_whoever_does_not_wait_is_left_alone(counts: counted.Counts, name: str) -> None:
    found = counts["faults"][f"FREE {name}"]
    assert (found["waits"], found["mixed"], found["wide"], found.get("error")) == ([], [], {}, None)


@pytest.mark.parametrize("name", planted.MIXED)
def test_a_tensor_on_another_device_is_found(counts: counted.Counts, name: str) -> None:
    assert counts["faults"][f"MIXED {name}"]["mixed"] == [f"{name} at {line_of(planted.MIXED[name])}"]


def test_a_convolution_in_another_type_is_found(counts: counted.Counts) -> None:
    (line,) = counts["faults"]["WIDE convolution"]["wide"]
    assert line == line_of(planted.WIDE["convolution"])


def test_numbers_that_one_can_tell(counts: counted.Counts) -> None:
    found, mib = counts["known"]["known"], 2**20
    assert found["operators"] == 4
    assert found["bytes"] == {"add": 16 * mib, "mul_": 16 * mib, "fill_": 4 * mib, "convolution": 4000 + 108 + 1024}
    assert found["products"] == 4000 + 108 + 1024
    assert found["flop"] == {"bfloat16": 2 * 8**3 * 2 * 3**3}
    assert (found["peak"], found["held"]) == (16 * mib, 0)
