import torch

from srl_rlvr.policies.optimizer import new_optimizer


def test_norms_and_biases_are_not_decayed() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = new_optimizer(list(layer.parameters()), (0.8, 0.95), weight_decay=0.5)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, before["bias"])
    assert torch.allclose(layer.weight, before["weight"] * 0.95)
