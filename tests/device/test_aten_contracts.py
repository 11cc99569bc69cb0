# SPDX-License-Identifier: Apache-2.0
"""What ATen promises beside values: whose tensor comes back, where it lies, and what is random about it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

NPU = torch.device("npu")


@pytest.fixture
def second_device():
    """Makes npu:1 the current device for one test."""
    if torch.npu.device_count() < 2:
        pytest.skip("needs two devices")
    torch.npu.set_device(1)
    yield torch.device("npu:1")
    torch.npu.set_device(0)


@pytest.fixture
def rows() -> torch.Tensor:
    """[4, 6] fp32 on the NPU, 0 to 23."""
    return torch.arange(24, dtype=torch.float32, device=NPU).view(4, 6)


OUT = {
    "sum of two": lambda a, out: torch.add(a, 1, out=out),
    "product": lambda a, out: torch.mm(a, a.t(), out=out),
    "cat": lambda a, out: torch.cat([a, a], out=out),
    "stack": lambda a, out: torch.stack([a, a], out=out),
    "index_select": lambda a, out: torch.index_select(a, 0, torch.tensor([2, 0], device=a.device), out=out),
    "softmax": lambda a, out: torch.softmax(a, -1, out=out),
    "cumulative sum": lambda a, out: torch.cumsum(a, -1, out=out),
    "reduction": lambda a, out: torch.sum(a, -1, out=out),
}


@pytest.mark.parametrize("function", OUT.values(), ids=OUT.keys())
def test_out_is_resized_and_returned(function: Callable, rows: torch.Tensor) -> None:
    out = torch.empty(0, device=NPU)
    assert function(rows, out) is out
    torch.testing.assert_close(out.cpu(), function(rows.cpu(), torch.empty(0)))


@pytest.mark.parametrize("function", OUT.values(), ids=OUT.keys())
def test_out_that_fits_keeps_its_memory(function: Callable, rows: torch.Tensor) -> None:
    expected = function(rows.cpu(), torch.empty(0))
    out = torch.empty(expected.shape, device=NPU)
    address = out.data_ptr()
    assert function(rows, out) is out
    assert out.data_ptr() == address
    torch.testing.assert_close(out.cpu(), expected)


def test_out_that_shrinks_keeps_its_memory(rows: torch.Tensor) -> None:
    out = torch.empty(0, device=NPU).resize_(100)
    address = out.data_ptr()
    out.resize_(0)
    torch.add(rows, 1, out=out)
    assert out.data_ptr() == address
    assert out.tolist() == [[float(6 * i + j + 1) for j in range(6)] for i in range(4)]


def test_two_outs_are_the_callers(rows: torch.Tensor) -> None:
    values = torch.empty(0, device=NPU)
    indices = torch.empty(0, dtype=torch.int64, device=NPU)
    found = torch.topk(rows, 2, out=(values, indices))
    assert found[0] is values
    assert found[1] is indices
    assert values.tolist() == [[5, 4], [11, 10], [17, 16], [23, 22]]
    assert indices.tolist() == [[5, 4]] * 4


def test_out_into_a_view_leaves_the_rest(rows: torch.Tensor) -> None:
    whole = torch.full((6, 8), -1.0, device=NPU)
    torch.cat([rows[2:], rows[:2]], out=whole[1:5, 1:7])
    expected = torch.full((6, 8), -1.0)
    expected[1:5, 1:7] = rows.cpu().roll(2, 0)
    assert torch.equal(whole.cpu(), expected)


def test_grown_out_seen_through_another_view() -> None:
    """A resize moves the storage, and with it every tensor that shares it."""
    whole = torch.zeros(2, device=NPU)
    other = whole[:1]
    whole.resize_(0)
    torch.arange(7, 10_000_007, 10, dtype=torch.float32, device=NPU, out=whole)
    assert other.item() == 7


def test_in_place_returns_the_caller(rows: torch.Tensor) -> None:
    address = rows.data_ptr()
    assert rows.add_(1) is rows
    assert rows.t().mul_(2).data_ptr() == address
    assert rows[0].tolist() == [2, 4, 6, 8, 10, 12]


def test_views_share_memory(rows: torch.Tensor) -> None:
    for view in (rows.t(), rows.view(24), rows[1:], rows.unsqueeze(0), rows.diagonal(), rows.unfold(0, 2, 1)):
        assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    assert rows.contiguous() is rows
    assert rows.t().contiguous().data_ptr() != rows.data_ptr()


def test_lists_are_written_in_place() -> None:
    ones = [torch.ones(3, device=NPU), torch.ones(2, 2, device=NPU)]
    torch._foreach_add_(ones, 1)
    assert [tensor.sum().item() for tensor in ones] == [6, 8]
    torch._foreach_copy_(ones, [torch.zeros(3, device=NPU), torch.ones(2, 2, device=NPU)])
    assert [tensor.sum().item() for tensor in ones] == [0, 4]


FACTORIES = {
    "empty": lambda **on: torch.empty(3, **on),
    "zeros": lambda **on: torch.zeros(3, **on),
    "ones": lambda **on: torch.ones(3, **on),
    "full": lambda **on: torch.full((3,), 2.0, **on),
    "arange": lambda **on: torch.arange(3, **on),
    "arange by step": lambda **on: torch.arange(0, 3, 1, dtype=torch.float32, **on),
    "linspace": lambda **on: torch.linspace(0, 1, 3, **on),
    "eye": lambda **on: torch.eye(3, **on),
    "tensor": lambda **on: torch.tensor([1, 2, 3], **on),
    "rand": lambda **on: torch.rand(3, **on),
    "randn": lambda **on: torch.randn(3, **on),
    "randint": lambda **on: torch.randint(0, 5, (3,), **on),
    "randperm": lambda **on: torch.randperm(3, **on),
    "tril_indices": lambda **on: torch.tril_indices(3, 3, **on),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES.keys())
def test_factories_use_the_current_device(make: Callable, second_device: torch.device) -> None:
    assert make(device="npu").device == second_device
    assert make(device="npu:0").device == torch.device("npu:0")


def test_results_stay_on_the_device_of_the_arguments(rows: torch.Tensor, second_device: torch.device) -> None:
    for result in (
        rows + 1,
        rows.softmax(-1),
        torch.ones_like(rows),
        rows.new_zeros(2),
        rows.clone(),
        rows @ rows.t(),
    ):
        assert result.device == torch.device("npu:0")


def test_likes_on_another_device(rows: torch.Tensor) -> None:
    for make in (torch.ones_like, torch.zeros_like, torch.rand_like, torch.empty_like):
        assert make(rows, device="cpu").device.type == "cpu"
        assert make(rows.cpu(), device="npu").device.type == "npu"
    assert torch.full_like(rows, 3, device="cpu").tolist() == [[3] * 6] * 4


def test_devices_are_not_mixed_by_accident(rows: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        rows + torch.ones(6)
    with pytest.raises(RuntimeError, match="same device"):
        F.embedding(torch.tensor([0]), rows)
    if torch.npu.device_count() > 1:
        with pytest.raises(RuntimeError, match="same device"):
            rows + torch.ones(6, device="npu:1")
    assert torch.equal((rows + torch.tensor(2.0)).cpu(), rows.cpu() + 2)


DRAWS = {
    "randn": lambda: torch.randn(100, device=NPU),
    "rand": lambda: torch.rand(100, device=NPU),
    "randint": lambda: torch.randint(0, 1000, (100,), device=NPU),
    "randperm": lambda: torch.randperm(100, device=NPU),
    "normal_": lambda: torch.empty(100, device=NPU).normal_(),
    "exponential_": lambda: torch.empty(100, device=NPU).exponential_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((100,), 0.5, device=NPU)),
    "multinomial": lambda: torch.multinomial(torch.ones(100, device=NPU), 50),
    "rand_like": lambda: torch.rand_like(torch.empty(100, device=NPU)),
    "dropout": lambda: F.dropout(torch.ones(100, device=NPU), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_seed_decides_the_numbers(draw: Callable) -> None:
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_npu_generator_is_apart_from_the_global_one() -> None:
    generator = torch.Generator(device="npu").manual_seed(5)
    first = torch.empty(100, device=NPU).exponential_(generator=generator)
    torch.manual_seed(1)
    torch.randn(3, device=NPU)
    again = torch.Generator(device="npu").manual_seed(5)
    assert torch.equal(torch.empty(100, device=NPU).exponential_(generator=again), first)
    assert generator.initial_seed() == 5


def test_generator_state_can_be_kept() -> None:
    generator = torch.Generator(device="npu").manual_seed(5)
    torch.rand(3, device=NPU, generator=generator)
    state = generator.get_state()
    first = torch.rand(3, device=NPU, generator=generator)
    generator.set_state(state)
    assert torch.equal(torch.rand(3, device=NPU, generator=generator), first)


def test_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(3, device=NPU, generator=torch.Generator())


def test_draws_follow_their_distribution() -> None:
    torch.manual_seed(0)
    normal = torch.randn(20_000, device=NPU)
    assert abs(normal.mean().item()) < 0.05
    assert abs(normal.std().item() - 1) < 0.05
    assert abs(torch.empty(20_000, device=NPU).exponential_(2.0).mean().item() - 0.5) < 0.05
    weights = torch.tensor([0.0, 1.0, 3.0], device=NPU)
    counts = torch.multinomial(weights, 20_000, replacement=True).bincount(minlength=3)
    assert counts[0].item() == 0
    assert abs(counts[2].item() / 20_000 - 0.75) < 0.02


def test_gradients() -> None:
    """Not needed to serve, but a tensor must not lose its gradient without a word."""
    weights = torch.arange(12, dtype=torch.float32).view(3, 4)
    gradients = []
    for device in ("cpu", "npu"):
        leaf = weights.to(device, copy=True).requires_grad_()
        (torch.softmax(leaf @ leaf.t(), -1) * torch.arange(3, device=device)).sum().backward()
        gradients.append(leaf.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_inference_mode(rows: torch.Tensor) -> None:
    with torch.inference_mode():
        grown = rows + 1
        grown[0] = 0
        grown.add_(grown.t().contiguous().t())
        assert grown.sum().item() == 2 * sum(range(7, 25))
        torch.add(rows, 1, out=grown)
    assert grown[0, 0].item() == 1


def test_print(rows: torch.Tensor) -> None:
    assert repr(rows[0, :3]) == "tensor([0., 1., 2.], device='npu:0')"
    assert f"{rows[1, 1]:.1f}" == "7.0"
