"""What a benchmark says of itself, and spikingjelly's functions that it times in place of its nodes."""

import neuron_speed
import pytest
import torch
import versions
from spikingjelly.activation_based import neuron


def test_a_measurement_says_of_what_it_is(monkeypatch):
    monkeypatch.setattr(versions, "commit_of", lambda root: "1234567")
    monkeypatch.setattr(versions, "TIMED", ("torch", "no-such-package"))
    found = versions.about()
    assert found["commit"] == "1234567"
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["versions"]["no-such-package"] is None
    assert "commit 1234567; " in versions.line()
    assert versions.line().endswith("no-such-package -")


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(
    ("function", "node"),
    [(neuron_speed.fused_ilif, neuron.ILIFNode), (neuron_speed.fused_lif, neuron.LIFNode)],
)
def test_the_fused_functions_are_their_nodes_in_float32(function, node, T):
    x = (torch.randn(T, 64, generator=torch.Generator().manual_seed(0)) * 2).bfloat16().requires_grad_()
    spikes = function(x)
    assert spikes.dtype == torch.bfloat16
    wide = x.detach().float().requires_grad_()
    expected = node(step_mode="m")(wide)
    assert torch.equal(spikes.float(), expected)
    gradients = [torch.autograd.grad(y.sum(), i)[0] for y, i in ((spikes, x), (expected, wide))]
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=0.02, atol=0.01)
