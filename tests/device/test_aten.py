# SPDX-License-Identifier: Apache-2.0
"""ATen operators on the NPU give what they give on the CPU, for every way of handing tensors over.

The CPU is the reference: each case is computed twice, from the same inputs. Integers must agree exactly,
floating point numbers within what different orders of summation may cost in the dtype.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

NPU = torch.device("npu")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
NUMBERS = FLOATS + INTEGERS
ALL = (*NUMBERS, torch.bool)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def filled(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A CPU tensor of small numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(1, 9, shape, generator=generator).to(dtype)


def assert_same(found: object, expected: object) -> None:
    """`found` is the NPU's twin of `expected`: same structure, shapes, dtypes and values."""
    if not isinstance(expected, torch.Tensor):
        if isinstance(expected, (tuple, list)):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
            return
        assert found == expected
        return
    assert found.device.type == "npu"
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = TOLERANCE.get(expected.dtype, 0)
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def run_on_both(function: Callable, *inputs: torch.Tensor) -> None:
    expected = function(*(tensor.clone(memory_format=torch.preserve_format) for tensor in inputs))
    assert_same(function(*(tensor.to(NPU) for tensor in inputs)), expected)


ELEMENTWISE = {
    "add": (lambda a, b: a + b, ALL),
    "add scaled": (lambda a, b: torch.add(a, b, alpha=2), NUMBERS),
    "subtract": (lambda a, b: a - b, NUMBERS),
    "multiply": (lambda a, b: a * b, ALL),
    "multiply by a number": (lambda a, b: a * 3 + 1.5, ALL),
    "divide": (lambda a, b: a / (b.abs() + 1), NUMBERS),
    "floor divide": (lambda a, b: a // 3, NUMBERS),
    "remainder": (lambda a, b: a % 3, NUMBERS),
    "power": (lambda a, b: a.abs() ** 2, NUMBERS),
    "compare": (lambda a, b: [a == b, a != b, a < b, a <= b, a > b, a >= b], ALL),
    "compare with a number": (lambda a, b: [a == 1, a > 1, a <= 0], ALL),
    "maximum and minimum": (lambda a, b: [torch.maximum(a, b), torch.minimum(a, b)], ALL),
    "clamp": (lambda a, b: a.clamp(0, 2), NUMBERS),
    "negate": (lambda a, b: -a, NUMBERS),
    "absolute": (lambda a, b: a.abs(), NUMBERS),
    "exp and log": (lambda a, b: [a.exp(), a.abs().add(1).log()], FLOATS),
    "roots": (lambda a, b: [a.abs().sqrt(), a.abs().add(1).rsqrt(), a.abs().add(1).reciprocal()], FLOATS),
    "sine and cosine": (lambda a, b: [a.sin(), a.cos()], FLOATS),
    "activations": (lambda a, b: [a.relu(), a.sigmoid(), a.tanh(), F.silu(a), F.gelu(a)], FLOATS),
    "rounding": (lambda a, b: [a.round(), a.floor(), a.ceil(), a.trunc()], FLOATS),
    "isnan and friends": (lambda a, b: [a.isnan(), a.isinf(), a.isfinite()], NUMBERS),
    "logical": (lambda a, b: [a.logical_and(b), a.logical_or(b), a.logical_not(), a.logical_xor(b)], ALL),
    "bitwise": (lambda a, b: [a & b, a | b, a ^ b, ~a], (*INTEGERS, torch.bool)),
    "shift": (lambda a, b: [a << 2, a >> 1], INTEGERS),
    "where": (lambda a, b: torch.where(a > b, a, b), ALL),
    "where with a number": (lambda a, b: torch.where(a > 0, a, 0), NUMBERS),
    "masked fill": (lambda a, b: a.masked_fill(b > 0, 1), ALL),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.25), FLOATS),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b, value=2), NUMBERS),
    "convert": (lambda a, b: [a.float(), a.int(), a.bool(), a.to(torch.bfloat16), a.long(), a.half()], ALL),
    "in place": (lambda a, b: a.add_(b).mul_(2), NUMBERS),
    "fill in place": (lambda a, b: [a.clone().zero_(), a.clone().fill_(1), a.clone().copy_(b)], ALL),
    "another dtype": (lambda a, b: a + torch.ones(4, 6, dtype=torch.float32, device=a.device), NUMBERS),
}

REDUCTIONS = {
    "sum": (lambda a: [a.sum(), a.sum(-1), a.sum(0, keepdim=True), a.sum(dtype=torch.float32)], ALL),
    "mean": (lambda a: [a.mean(), a.mean(-1, keepdim=True)], FLOATS),
    "variance": (lambda a: [a.var(-1), a.std(-1), a.var(-1, unbiased=False)], FLOATS),
    "extrema": (lambda a: [a.max(), a.min(), a.amax(-1), a.amin(0)], NUMBERS),
    "extrema with indices": (lambda a: [*a.float().max(-1), *a.float().min(0)], FLOATS),
    "argmax": (lambda a: [a.float().argmax(), a.float().argmax(-1), a.float().argmin(0)], FLOATS),
    "all and any": (lambda a: [a.all(), a.any(), a.all(-1), a.any(0)], ALL),
    "product": (lambda a: a[:, :2].prod(-1), NUMBERS),
    "cumulative sum": (lambda a: [a.cumsum(-1), a.cumsum(0)], NUMBERS),
    "cumulative product": (lambda a: a.cumprod(-1), FLOATS),
    "norm": (lambda a: [a.norm(), torch.linalg.vector_norm(a, dim=-1)], FLOATS),
    "logsumexp": (lambda a: a.logsumexp(-1), FLOATS),
    "softmax": (lambda a: [a.softmax(-1), a.softmax(0), a.log_softmax(-1)], FLOATS),
    "softmax to float": (lambda a: a.softmax(-1, dtype=torch.float32), FLOATS),
    "count": (lambda a: [a.count_nonzero(), a.nonzero()], ALL),
    "sort": (lambda a: [a.sort(dim=-1, stable=True).values, a.sort(0, descending=True).values], NUMBERS),
    "sort indices": (
        lambda a: [a.sort(dim=-1, stable=True).indices, a.argsort(dim=-1, stable=True)],
        NUMBERS,
    ),
    "topk": (lambda a: a.topk(3, -1).values, NUMBERS),
    "unique": (lambda a: a.unique(), NUMBERS),
    "unique with counts": (lambda a: a.unique(return_inverse=True, return_counts=True), INTEGERS),
    "bincount": (lambda a: a.flatten().bincount(minlength=12), INTEGERS),
    "equal": (lambda a: [torch.equal(a, a), torch.equal(a, a.logical_not().to(a.dtype))], ALL),
    "item": (lambda a: [a[0, 0].item(), a.tolist()], ALL),
}

SHAPES_AND_INDICES = {
    "slice": (lambda a: [a[1], a[1:3], a[:, ::2], a[..., -1], a[None], a.t(), a.T[2:]], ALL),
    "index with a tensor": (lambda a: a[torch.tensor([2, 0, 2], device=a.device)], ALL),
    "index with host indices": (lambda a: [a[torch.tensor([2, 0])], a[[1, 3]]], ALL),
    "index with two tensors": (
        lambda a: a[torch.tensor([[1], [2]], device=a.device), torch.tensor([0, 3], device=a.device)],
        ALL,
    ),
    "index with a mask": (lambda a: [a[a > 0], a.masked_select(a > 0), a[(a > 0)[:, 0]]], ALL),
    "index one dimension of two": (lambda a: a[:, torch.tensor([1, 1, 0], device=a.device)], ALL),
    "select and gather": (
        lambda a: [
            a.index_select(1, torch.tensor([3, 0], device=a.device)),
            a.gather(1, torch.tensor([[0], [1], [2], [0]], device=a.device)),
            a.take_along_dim(torch.tensor([[0], [1], [2], [0]], device=a.device), 1),
        ],
        ALL,
    ),
    "join": (lambda a: [torch.cat([a, a[:2]]), torch.cat([a, a], -1), torch.stack([a, a], 1)], ALL),
    "split": (lambda a: [*a.split(2), *a.chunk(3, -1), *a.unbind(0), *a.split([1, 5], -1)], ALL),
    "repeat": (lambda a: [a.repeat(2, 1), a.repeat_interleave(2, 0), a[:1].expand(3, 6)], ALL),
    "repeat by counts": (
        lambda a: a.repeat_interleave(torch.tensor([0, 1, 2, 1], device=a.device), dim=0),
        ALL,
    ),
    "reshape": (lambda a: [a.reshape(-1), a.t().reshape(3, 8), a.view(2, 12), a.flatten()], ALL),
    "permute": (lambda a: [a.permute(1, 0).contiguous(), a.view(2, 2, 6).transpose(0, 2).contiguous()], ALL),
    "squeeze": (lambda a: [a[:1].squeeze(0), a.unsqueeze(1).squeeze(), a[:, :1].squeeze(-1)], ALL),
    "flip and roll": (lambda a: [a.flip(0), a.roll(1, 0), a.roll(2)], ALL),
    "triangles": (lambda a: [a.tril(), a.triu(1)], ALL),
    "pad": (lambda a: F.pad(a, (1, 2), value=1), ALL),
    "diagonal": (lambda a: [a.diagonal(), a[0].diag()], NUMBERS),
    "meshgrid": (lambda a: torch.meshgrid(a[0], a[1], indexing="ij"), ALL),
    "view as another dtype": (
        lambda a: a.view(torch.uint8) if a.element_size() == 1 else a.view(torch.int8),
        ALL,
    ),
    "searchsorted": (lambda a: torch.searchsorted(a.flatten().sort().values, a[0].contiguous()), NUMBERS),
    "clone": (lambda a: [a.clone(), a.t().clone(), a.clone(memory_format=torch.contiguous_format)], ALL),
    "likes": (
        lambda a: [
            torch.zeros_like(a),
            torch.ones_like(a),
            torch.full_like(a, 1),
            a.new_zeros(2),
            a.new_ones(2, 3),
            a.new_full((2,), 1),
            a.new_tensor([1, 0]),
        ],
        ALL,
    ),
}

WRITES = {
    "assign a slice": lambda a: a.__setitem__((slice(None), slice(1, 3)), 1),
    "assign a tensor": lambda a: a.__setitem__(1, a[0].clone()),
    "assign at indices": lambda a: a.__setitem__(torch.tensor([0, 2], device=a.device), a[:2].clone()),
    "assign at host indices": lambda a: a.__setitem__([0, 2], a[:2].clone()),
    "assign at a mask": lambda a: a.__setitem__(a > 0, 1),
    "index_put_": lambda a: a.index_put_((torch.tensor([1, 3], device=a.device),), a[0].clone()),
    "index_put_ accumulating": lambda a: a.index_put_(
        (torch.tensor([1, 1], device=a.device),), a[:2].clone(), accumulate=True
    ),
    "index_copy_": lambda a: a.index_copy_(0, torch.tensor([3, 1], device=a.device), a[:2].clone()),
    "index_add_": lambda a: a.index_add_(0, torch.tensor([3, 1], device=a.device), a[:2].clone()),
    "index_fill_": lambda a: a.index_fill_(1, torch.tensor([3, 1], device=a.device), 1),
    "scatter_": lambda a: a.scatter_(1, torch.tensor([[0, 2]] * 4, device=a.device), a[:, :2].clone()),
    "scatter_ a number": lambda a: a.scatter_(1, torch.tensor([[0, 2]] * 4, device=a.device), 1),
    "scatter_add_": lambda a: a.scatter_add_(
        1, torch.tensor([[0, 0]] * 4, device=a.device), a[:, :2].clone()
    ),
    "masked_fill_": lambda a: a.masked_fill_(a > 0, 1),
    "masked_scatter_": lambda a: a.masked_scatter_(a > 0, a.flatten().clone()),
    "copy_ into a slice": lambda a: a[:, ::2].copy_(a[:, 1::2].clone()),
    "copy_ a transposed": lambda a: a[:, :4].copy_(a[:, :4].t().clone()),
    "copy_ broadcast": lambda a: a.copy_(a[0].clone()),
    "fill_ a column": lambda a: a[:, 2].fill_(1),
    "zero_ a row": lambda a: a[1].zero_(),
}

NETWORKS = {
    "matrix product": lambda a: [a @ a.t(), torch.mm(a, a.t()), a @ a[0], a[0] @ a[0]],
    "batched product": lambda a: [
        torch.bmm(a.view(2, 2, 6), a.view(2, 6, 2)),
        a.view(2, 2, 6) @ a.view(2, 2, 6).transpose(1, 2),
    ],
    "addmm": lambda a: torch.addmm(a[:, :4], a, a.t(), beta=0.5, alpha=2),
    "baddbmm": lambda a: torch.baddbmm(a.view(2, 2, 6)[:, :, :2], a.view(2, 2, 6), a.view(2, 6, 2)),
    "einsum": lambda a: torch.einsum("ij,kj->ik", a, a),
    "linear": lambda a: [F.linear(a, a), F.linear(a, a, a[:, 0]), F.linear(a.view(2, 2, 6), a, a[:, 0])],
    "embedding": lambda a: F.embedding(torch.tensor([[0, 3], [1, 1]], device=a.device), a),
    "layer norm": lambda a: [F.layer_norm(a, (6,)), F.layer_norm(a, (6,), a[0], a[1])],
    "rms norm": lambda a: F.rms_norm(a, (6,), a[0]),
    "group norm": lambda a: F.group_norm(a, 2),
    "one hot": lambda a: F.one_hot(torch.tensor([0, 2], device=a.device), 4),
    "attention": lambda a: F.scaled_dot_product_attention(*[a.view(1, 2, 2, 6)] * 3),
    "causal attention": lambda a: F.scaled_dot_product_attention(*[a.view(1, 2, 2, 6)] * 3, is_causal=True),
    "masked attention": lambda a: F.scaled_dot_product_attention(
        *[a.view(1, 2, 2, 6)] * 3, attn_mask=torch.tensor([[True, False], [True, True]], device=a.device)
    ),
    "convolution": lambda a: [
        F.conv1d(a.view(1, 4, 6), a[:, :4].reshape(4, 4, 1), padding=1),
        F.conv2d(a.view(1, 1, 4, 6), a[:2, :2].reshape(1, 1, 2, 2)),
    ],
    "loss": lambda a: F.cross_entropy(a, torch.tensor([0, 1, 2, 3], device=a.device)),
    "dropout off": lambda a: F.dropout(a, 0.5, training=False),
}


def table(cases: dict[str, tuple[Callable, tuple[torch.dtype, ...]]]) -> list:
    return [
        pytest.param(function, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
        for name, (function, dtypes) in cases.items()
        for dtype in dtypes
    ]


@pytest.mark.parametrize(("function", "dtype"), table(ELEMENTWISE))
def test_elementwise(function: Callable, dtype: torch.dtype) -> None:
    a, b = filled(4, 6, dtype=dtype), filled(4, 6, dtype=dtype, seed=1)
    run_on_both(function, a, b)
    strided = filled(4, 12, dtype=dtype)[:, ::2]
    run_on_both(function, strided, filled(6, 4, dtype=dtype, seed=1).t())


@pytest.mark.parametrize(("function", "dtype"), table(REDUCTIONS))
def test_reductions(function: Callable, dtype: torch.dtype) -> None:
    run_on_both(function, filled(4, 6, dtype=dtype))
    run_on_both(function, filled(6, 4, dtype=dtype).t())


@pytest.mark.parametrize(("function", "dtype"), table(SHAPES_AND_INDICES))
def test_shapes_and_indices(function: Callable, dtype: torch.dtype) -> None:
    run_on_both(function, filled(4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes(write: Callable, dtype: torch.dtype) -> None:
    """What an operator writes is seen through every view of the memory, and nothing else changes."""

    def written(whole: torch.Tensor) -> torch.Tensor:
        write(whole[1:5, 1:7])
        return whole

    run_on_both(written, filled(6, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(function: Callable, dtype: torch.dtype) -> None:
    run_on_both(function, filled(4, 6, dtype=dtype))
