"""The benchmark of `make gpu`, tried without a GPU: every part of it, its processes, and what its report says."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.precision import amp_dtype
from tests.benchmarks import card, gpu, gpu_report, gpu_steps
from tests.benchmarks.apart import Apart, FailedError
from tests.benchmarks.gpu_steps import COMPILED, CONFIGURED, SAME_TERMS, STOCK, TINY, Stand, Variant, variants
from tests.benchmarks.step import LIKE_STOCK, OurLoop, host_images, seconds_a_step, step_tflop

ALL = {variant.name: variant for variant in variants()}
FEW = [CONFIGURED, STOCK, "cudnn_benchmark on", "cudnn_benchmark off"]  # of the last two there is one


@pytest.mark.slow
def test_a_dry_run_has_figures_for_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, without = tmp_path / "out" / "gpu.md", [name for name in ALL if name not in FEW]
    gpu.main("cpu", 1000, output, True, [32], [40, 36, 44], without, 1)
    found, text = json.loads(output.with_suffix(".json").read_text()), output.read_text()
    assert [name for name, part in found.items() if isinstance(part, dict) and "error" in part] == []
    measured = found["steps"]["32"]["variants"]
    assert list(measured) == [name for name in ALL if name in FEW]
    assert all(len(of["seconds"]) == 2 and of["finite"] and not of["waits"] for of in measured.values())
    kernels = measured[CONFIGURED]["kernels"].values()
    assert len(kernels) == card.COSTLY and sorted(kernels, reverse=True) == list(kernels) and 0.3 < sum(kernels) <= 1
    assert 0.5 < found["steps"]["32"]["tflop"]["same terms"] / found["steps"]["32"]["tflop"]["ours"] < 0.95
    assert (found["training"]["size"], found["training"]["patches"]) == (32, 3)
    windows = found["validation"], found["inference"]
    assert all(of["windows"] == 8 and of["windows_per_second"] > 0 and 0 <= of["idle_share"] < 1 for of in windows)
    assert found["agreement"]["float32 with TF32"]["mean"] == 0 < found["agreement"]["bfloat16"]["mean"] < 100
    assert gpu_report.DRY in text and gpu_report.markdown(found) == text
    assert capsys.readouterr().out.strip().endswith(gpu_report.summary(found))


@pytest.mark.parametrize("name", [name for name in ALL if name not in (*FEW, COMPILED)])
def test_each_variant_makes_its_own_step(name: str) -> None:
    with gpu_steps._switched(ALL[name]):
        loop = gpu_steps._loop(ALL[name], "cpu", small=True)
        seconds_a_step(loop, host_images(32, "cpu"), "cpu")
    losses = loop.trainer.state.output
    assert all(value.isfinite() for value in losses.values()) and ("scale_loss" in losses) == (name != SAME_TERMS)
    types = {"16 and": torch.float16, "TF32": torch.float32}
    wanted = next((dtype for part, dtype in types.items() if part in name), amp_dtype("cpu", True))
    assert loop.trainer.dtype == wanted and loop.trainer.scalers["optimizer_g"].is_enabled() == ("16 and" in name)


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu.main("cuda", 9, tmp_path / "gpu.md", False, [96], [512, 512, 300], [], 1)
    assert capsys.readouterr().out == f"{gpu.NO_GPU}\n" and not list(tmp_path.iterdir())


# The step


def test_the_work_of_a_step_is_counted_from_its_layers() -> None:
    assert step_tflop(96, **LIKE_STOCK) == pytest.approx(12.71, rel=1e-3)


def test_our_loop_has_what_a_training_has_in_a_step(caplog: pytest.LogCaptureFixture) -> None:
    loop = OurLoop("cpu", **TINY)
    optimizers, network = loop.trainer.optimizers, loop.trainer.bare["autoencoder"]
    assert all(optimizer.defaults["fused"] for optimizer in optimizers.values())
    assert loop.trainer.averages["autoencoder"].decay == 0.999
    loop.step(host_images(32, "cpu"))
    before = [parameter.clone() for parameter in network.parameters()]
    loop.step(torch.full((1, 1, 32, 32, 32), torch.nan))
    assert all(map(torch.equal, before, network.parameters()))
    loop.step(host_images(32, "cpu"))
    assert "step 2 is passed over, as it is not finite" in caplog.text


# Processes apart


def fail(text: str) -> None:
    raise torch.OutOfMemoryError(text)


def leave(status: int) -> None:
    os._exit(status)


def test_a_call_that_fails_says_why_and_the_process_goes_on(tmp_path: Path) -> None:
    with Apart("cpu", tmp_path / "log") as process:
        with pytest.raises(FailedError, match=r"^OutOfMemoryError: CUDA out of memory\.$"):
            process.call(fail, "CUDA out of memory.")
        assert process.call(os.getpid) == process.process.pid != os.getpid()
        assert "Traceback" in (tmp_path / "log").read_text()
        with pytest.raises(FailedError, match=r"^its process is gone \(exit status 7\)$"):
            process.call(leave, 7)
    assert not process.process.is_alive()


def test_a_call_that_takes_too_long_ends_its_process(tmp_path: Path) -> None:
    process = Apart("cpu", tmp_path / "log")
    with pytest.raises(FailedError, match=r"^took longer than the 0 s left$"):
        process.call(time.sleep, 60, seconds=0.1)
    assert process.process.exitcode != 0
    with pytest.raises(FailedError, match="its process is gone"):
        process.call(os.getpid)


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    bad = Variant("bad", {"autoencoder_train#recon_loss": "l3"})
    missing = Variant("missing", attributes={"no_such_function": None})
    good = Variant("good")
    late = Variant("late")
    said: list[str] = []
    with Stand("cpu", True, [bad, missing, good], tmp_path / "log", said.append) as stand:
        found = stand.measure(32, time.monotonic() + 300, rounds=0)
        stand.chosen = [late]
        found |= stand.measure(32, time.monotonic(), rounds=1)
    assert found["bad"] == {"error": "recon_loss 'l3' is unknown; use l1 or l2"}
    assert "no_such_function" in found["missing"]["error"] and len(found["good"]["seconds"]) == 1
    assert found["late"] == {"error": "left out: no time was left (--minutes)"}
    assert said[0] == "32^3 bad: recon_loss 'l3' is unknown; use l1 or l2" and len(said) == 4


# What is asked of the GPU


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362), ("NVIDIA RTX A6000", 155), ("Tesla V100-SXM2-32GB", 125), ("NVIDIA L40", None),
        ("NVIDIA RTX 6000 Ada Generation", None), ("CPU", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_known_cards(name: str, peak: int | None) -> None:
    assert card.dense_peak(name) == peak


def test_busy_is_what_any_kernel_covers() -> None:
    assert card.busy_share([(0, 4), (2, 6), (3, 4), (8, 10)]) == 0.8
    assert card.busy_share([(5, 10)]) == 1.0 and card.busy_share([]) == 0.0


@pytest.mark.filterwarnings("ignore")
def test_waits_are_counted_by_line_and_peaks_above_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    for name, value in {"synchronize": None, "memory_allocated": 100, "max_memory_allocated": 350}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: modes.append("reset"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        modes.append("called")
        warnings.warn("another", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x)", stacklevel=1)

    ((line, count),) = card.waits(call, "cuda").items()
    assert (line.split(":")[0], count) == ("test_benchmarks.py", 2) and modes == ["warn", "called", "default"]
    assert card.peak(call, "cuda") == 250 and modes[3:] == ["reset", "called"]


# The report


def variant(seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {"seconds": seconds, "peak": 3 * 2**30, "waits": {}, "finite": True, "warm_up": 9.0} | changes


def test_the_report_has_the_right_figures() -> None:
    steps = {
        CONFIGURED: variant([0.1, 0.05, 0.04], idle=0.04, kernels={"wgrad": 0.3}),
        STOCK: variant([0.2, 0.2]), "compile": {"error": "out of memory"},
        SAME_TERMS: variant([0.08], finite=False, waits={"guard.py:81": 1.0, "a.py:2": 0.5}),
    }  # fmt: skip
    windows = {"windows": 180, "windows_per_second": 20.04, "idle_share": 0.032, "seconds": 12.34}
    mode = {"mean": 0.0123, "most": 1.26, "seconds": 0.5}
    found: dict[str, Any] = {
        "dry": False, "card": {"device": "NVIDIA H200", "cuDNN": "91900"}, "peak": 989, "rates": {"bfloat16": 788.1},
        "volume": "512 x 512 x 300", "validation": windows, "inference": {"error": "took longer than the 3 s left"},
        "steps": {"96": {"tflop": {"ours": 13.8, "same terms": 12.7}, "variants": steps}},
        "training": {"size": 96, "patches": 31, "patches_per_second": 18.0, "data_wait_share": 0.021},
        "agreement": {"cpu_seconds": 4.0, "float32 without TF32": mode},
    }  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu_report.markdown(found).splitlines()]
    rows = {tuple(row[:1]): row[1:] for row in cells if row}
    assert rows[(CONFIGURED,)] == ["50.0", "0.38", "276.0", "28%", "3.00 GiB", "0"]
    assert rows[(STOCK,)] == ["200.0", "1.00", "63.5", "6%", "3.00 GiB", "0"]
    assert rows[(f"{SAME_TERMS} (weights are not finite)",)][-1] == "1.5 (a.py:2, guard.py:81)"
    assert rows[("compile",)] == ["out of memory", *["-"] * 5]
    assert rows[("step at 96^3, as configured",)] == [
        "50.0 ms, 276.0 TFLOP/s (28% of the peak), 3.00 GiB, 0 waits of the host, GPU idle 4% of the time, "
        "0.38 of the stock loop's time"
    ]
    assert rows[("`wgrad`",)] == ["30.0%"]
    assert rows[("a whole training",)] == ["18.00 patches/s, 2% of the time waiting for data, 90% of the step alone"]
    assert rows[("validation of 512 x 512 x 300 voxels",)] == [
        "20.0 windows/s (180 windows), GPU idle 3% of that time, 12.3 s with all before and after"
    ]
    assert rows[("inference of 512 x 512 x 300 voxels",)] == ["took longer than the 3 s left"]
    assert rows[("mean difference from the CPU",)] == ["0.012 HU in float32 without TF32"]
    assert rows[("float32 without TF32",)] == ["0.012 HU", "1.3 HU", "8 x"]
    text = gpu_report.markdown(found | {"peak": None})
    assert "Machine: device NVIDIA H200, cuDNN 91900, dense bfloat16 peak unknown (data sheet)" in text
    assert gpu_report.DRY not in text and "(- of the peak)" in text
    assert len(gpu_report.markdown({"dry": True, "card": {"device": "CPU"}, "peak": None}).splitlines()) == 8
