import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transfusion.benchmarks.floor import FloorStep
from transfusion.benchmarks.flops import layer_parameters
from transfusion.benchmarks.workloads import SIZES


@pytest.mark.parametrize(("backward", "factor"), [(False, 1), (True, 3)])
def test_the_floor_runs_the_products_of_the_layers(backward: bool, factor: int) -> None:
    size = SIZES["tiny"]
    step = FloorStep(size, 12, [], torch.float32, "cpu", backward)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == factor * 2 * 12 * size.layers * layer_parameters(size)


@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_attends(backward: bool) -> None:
    step = FloorStep(SIZES["tiny"], 12, [(2, 3, 3), (1, 6, 9)], torch.float32, "cpu", backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == 2 * SIZES["tiny"].layers


def test_no_product_writes_over_what_it_reads() -> None:
    size = SIZES["tiny"]
    step = FloorStep(size, 12, [], torch.float64, "cpu", backward=True)
    weight = step.weights[0][0]
    step.multiply(weight)
    out = step.states[16] @ weight.T
    torch.testing.assert_close(step.outputs[16], out)
    torch.testing.assert_close(step.gradients[16], out @ weight)
    torch.testing.assert_close(step.weight_gradients[16, 16], out.T @ step.states[16])
