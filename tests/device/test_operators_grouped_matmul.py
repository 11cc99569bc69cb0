# SPDX-License-Identifier: Apache-2.0
"""npu_grouped_matmul against one product per group."""

from typing import Any

import pytest
import torch
import torch_npu
from device.operator_support import HALVES, assert_near, emulator_only, random

DTYPES = [*HALVES, torch.float32]
COUNTS = [2, 0, 3, 1]


def grouped(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    usual: dict[str, Any] = {
        "group_list": torch.tensor(COUNTS, device="npu"),
        "group_list_type": 1,
        "group_type": 0,
        "split_item": 2,
    }
    (result,) = torch_npu.npu_grouped_matmul([x], [weight], **usual | options)
    return result


def products(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    group_of_row = [0, 0, 2, 2, 2, 3]
    return torch.stack(
        [x[r].float() @ weight[g].float() + bias[g].float() for r, g in enumerate(group_of_row)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it lies", "transposed view"])
def test_every_group_has_its_own_matrix(transposed: bool, with_bias: bool, dtype: torch.dtype) -> None:
    x = random(6, 32, dtype=dtype)
    weight = random(4, 48, 32, dtype=dtype, seed=1).transpose(1, 2)
    weight = (weight if transposed else weight.contiguous()) / 8
    bias_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    bias = random(4, 48, dtype=bias_dtype, seed=2) if with_bias else torch.zeros(4, 48)
    on_npu = weight.to("npu") if not transposed else weight.transpose(1, 2).to("npu").transpose(1, 2)
    result = grouped(x.to("npu"), on_npu, **({"bias": [bias.to("npu")]} if with_bias else {}))
    assert result.dtype == dtype
    assert_near(result, products(x, weight, bias))


def test_groups_may_be_given_by_their_ends() -> None:
    x, weight = random(6, 16, dtype=torch.bfloat16), random(4, 16, 16, dtype=torch.bfloat16, seed=1)
    by_count = grouped(x.to("npu"), weight.to("npu"))
    by_end = grouped(
        x.to("npu"), weight.to("npu"), group_list=torch.tensor([2, 2, 5, 6], device="npu"), group_list_type=0
    )
    assert torch.equal(by_count.cpu(), by_end.cpu())


@emulator_only
def test_rows_beyond_the_groups_are_undefined() -> None:
    x, weight = torch.ones(8, 16, device="npu"), torch.ones(4, 16, 16, device="npu")
    result = grouped(x, weight).cpu()
    assert (result[:6] == 16).all()
    assert result[6:].isnan().all()


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="npu")


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        pytest.param((6, 16), (4, 8, 16), {}, "its rows have to be the columns of x", id="sizes do not meet"),
        pytest.param(
            (6, 16), (4, 16, 16), {"group_type": None}, "group_type has to be given", id="no group_type"
        ),
        pytest.param(
            (6, 16), (4, 16, 16), {"group_list": None}, "group_list has to be given", id="no groups"
        ),
        pytest.param((6, 16), (3, 16, 16), {}, "a number for each matrix", id="more groups than matrices"),
        pytest.param(
            (6, 16), (4, 16, 16), {"split_item": 0}, "split_item 0 is not emulated", id="a list of results"
        ),
        pytest.param((6, 16), (4, 16, 16), {"act_type": 1}, "act_type is not emulated", id="an activation"),
        pytest.param((6, 16), (4, 16, 65536), {}, "the last size may be 65535", id="too wide"),
    ],
)
def test_refused(x: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"npu_grouped_matmul: .*{message}"):
        grouped(floats(*x), floats(*weight), **options)


def test_refuses_rows_that_are_a_transposed_view() -> None:
    with pytest.raises(RuntimeError, match=r"x is float16.*it has to be contiguous"):
        grouped(floats(16, 6).t(), floats(4, 16, 16))


def test_refuses_weights_of_another_type() -> None:
    with pytest.raises(RuntimeError, match=r"weight is bfloat16.*it has to be float16 as x is"):
        grouped(floats(6, 16), floats(4, 16, 16, dtype=torch.bfloat16))


def test_refuses_a_bfloat16_bias() -> None:
    x, weight = (floats(*shape, dtype=torch.bfloat16) for shape in ((6, 16), (4, 16, 16)))
    with pytest.raises(RuntimeError, match=r"bias is bfloat16.*it has to be float32"):
        grouped(x, weight, bias=[floats(4, 16, dtype=torch.bfloat16)])


def test_refuses_groups_in_int32() -> None:
    with pytest.raises(RuntimeError, match=r"group_list is int32.*it has to be int64"):
        grouped(floats(6, 16), floats(4, 16, 16), group_list=torch.tensor(COUNTS, device="npu").int())


@emulator_only
def test_refuses_more_rows_than_there_are() -> None:
    with pytest.raises(RuntimeError, match=r"groups of \[2, 0, 3, 1\] rows; x has 5"):
        grouped(floats(5, 16), floats(4, 16, 16))
