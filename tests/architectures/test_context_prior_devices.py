"""Networks with context priors compiled and in half precision, as far as a machine without an accelerator can tell."""

from typing import Any

import pytest
import torch
from prior_networks import NETWORKS, prior_network, relative, sample, unet_entry
from torch._dynamo.testing import CompileCounter

parametrize_networks = pytest.mark.parametrize("network", [unet_entry(4), NETWORKS["PCTNet"]], ids=["UNet", "PCTNet"])
# Three batches whose samples have other tasks, padded to three
BATCHES = [
    ([[0, 1, 2], [3, 0, 0]], [[True, True, True], [True, False, False]], [0, 1]),
    ([[4, 5, 0], [6, 1, 0]], [[True, True, False], [True, True, False]], [2, 2]),
    ([[6, 0, 0], [5, 4, 3]], [[True, False, False], [True, True, True]], [1, 0]),
]


@parametrize_networks
def test_compiles_into_one_graph_that_serves_every_padded_batch(network: dict[str, Any]) -> None:
    net = prior_network(network)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for batch in (sample(*asked, size=(16, 32, 16)) for asked in BATCHES):
        for found, expected in zip(compiled(batch), net(batch), strict=True):
            assert relative(found, expected) < 1e-4
        compiled(batch).logits.mean().backward()
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_prediction_follows_the_dataset_that_it_answers_for() -> None:
    net, image = prior_network(unet_entry(3)).eval(), sample(*BATCHES[0], size=(8, 8, 8)).image
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for tasks in ([0, 1], [5], [1, 0]):
        net.answer_for(tasks, 1)
        torch.testing.assert_close(compiled(image), net(image))


# No level's grid is two deep, where oneDNN's gradient of a convolution's weights in bfloat16 is unset memory (PyTorch
# 2.15, a CPU with AVX512-BF16).
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bf16", "f16"])
@parametrize_networks
def test_half_precision_answers_nearly_as_float32_and_trains(
    network: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    net, batch = prior_network(network).eval(), sample(*BATCHES[0], size=(40, 16, 32))
    expected = net(batch)
    with torch.autocast("cpu", dtype):
        answer = net(batch)
    for found, wanted in zip(answer, expected, strict=True):
        assert found.dtype == dtype and relative(found, wanted) < tolerance
    answer.logits.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())
