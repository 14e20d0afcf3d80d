"""GPTQ (arXiv 2210.17323): rounding that spreads each column's error over the columns that are still to be rounded.

With inputs X (T, K), the error of a rounded weight Q at the output is tr((W - Q) H (W - Q)ᵀ), H = XᵀX. Columns are rounded
one by one, those with the largest diagonal of H first; what is left over of column k moves the columns after it by

    W[:, j] -= (W[:, k] - Q[:, k]) · U[k, j] / U[k, k]          U: the upper Cholesky factor of H⁻¹

which is the step that makes up for it best. Group scales are fixed beforehand, from the weight as it comes, so the format is
that of plain rounding. H is damped with 1 % of its mean diagonal, and ten times more where it is singular still. Columns go
in blocks of 128, whose errors reach the rest as one matrix product.

FLOPs: N·K² and K³ of the factors. Bound: the products.
"""

import torch
from torch import Tensor

from sana_kernels.quant.formats import GROUP, Int4, int4_round, int4_scale, pack_int4

BLOCK, DAMPING, ATTEMPTS = 128, 0.01, 6


def gptq(weight: Tensor, inputs: Tensor, group: int = GROUP, scale_dtype: torch.dtype = torch.bfloat16) -> Int4:
    """weight (N, K) floating, inputs (T, K) as they will meet it → int4 rows with the scales of `quantize_int4`.

    Deterministic. Raises ValueError where the inputs are not finite.
    """
    N, K = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -K % group))
    scale = int4_scale(padded.unflatten(1, (-1, group)), scale_dtype)  # (N, Kp / group)
    hessian = inputs.float().t() @ inputs.float()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])

    columns = weight.float().t()[order].contiguous()  # (K, N): a column lies together
    scales = scale.t()[order // group]  # (K, N)
    steps = torch.zeros(padded.shape[1], N, device=weight.device)
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        block, errors = columns[start:end], torch.empty(end - start, N, device=weight.device)
        for i in range(end - start):
            k = start + i
            rounded = int4_round(block[i], scales[k])
            steps[order[k]] = rounded
            errors[i] = (block[i] - rounded * scales[k]) / factor[k, k]
            block[i + 1 :] -= factor[k, k + 1 : end, None] * errors[i]
        columns[end:] -= factor[start:end, end:].t() @ errors
    return Int4(pack_int4(steps.t().contiguous().to(torch.int8)), scale)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor (K, K) of the inverse of a damped hessian (K, K)."""
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()):
        raise ValueError("the inputs of a layer hold NaN or infinite values")
    damping = DAMPING * diagonal.mean().clamp_min(1e-30)
    for _ in range(ATTEMPTS):
        damped = hessian + damping * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the inputs of a layer have no usable covariance")
