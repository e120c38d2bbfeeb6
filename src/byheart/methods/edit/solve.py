"""The least-squares solves of an edit, in double precision: which change of a matrix maps keys to new values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from byheart.errors import DataError

Spread = Literal["even", "sqrt", "ends"]
# Directions that text never uses have an eigenvalue of nearly zero; this share of the mean one keeps C solvable.
RIDGE = 1e-5


def regularizer(moment: Tensor, weight: float) -> Tensor:
    """λC with λ = ``weight`` · d_k, in fp64, plus a ridge of :data:`RIDGE` times tr(C)/d_k on C's diagonal.

    For keys of ordinary text kᵀC⁻¹k is d_k on average, whatever their scale, so that ``weight`` means the same in
    every model: at 1, one fact with an ordinary key is written half.

    Args:
        moment: C (d_k, d_k).
    """
    size = len(moment)
    ridge = RIDGE * moment.diagonal().sum() / size
    return weight * size * (moment.double() + ridge * torch.eye(size, dtype=torch.float64))


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric positive definite matrix.

    Raises:
        DataError: where it is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise DataError("edit: the second moment of the keys is singular; give more text for it (edit.text)")
    return cast(Tensor, factor)


def dense(moment: Tensor, keys: Tensor, residuals: Tensor | None = None) -> Tensor:
    """Δ = R Kᵀ (C + K Kᵀ)⁻¹ (Meng et al. 2023, equation 14), with the weight already in C.

    Args:
        moment: λC (d_k, d_k), fp64.
        keys: K (facts, d_k), a key a row.
        residuals: R (facts, d_model), what to add to each key's value; None: the identity.

    Returns:
        (d_model, d_k), or (facts, d_k).
    """
    factor = cholesky(moment + keys.T @ keys)
    return torch.cholesky_solve(keys.T if residuals is None else keys.T @ residuals, factor).T


def woodbury(factor: Tensor, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """The same as :func:`dense`, as two factors, from the Cholesky factor of λC.

    With S = (λC)⁻¹K: Δ = R (I + KᵀS)⁻¹ Sᵀ. Only a (facts, facts) system is solved anew, and Δ has rank ``facts``.

    Returns:
        left (d_model, facts) and right (facts, d_k) with Δ = left @ right.
    """
    scaled = torch.cholesky_solve(keys.T, factor)  # S (d_k, facts)
    inner = keys @ scaled + torch.eye(len(keys), dtype=keys.dtype)
    return torch.linalg.solve(inner, residuals).T, scaled.T


def equality(factor: Tensor, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Δ that maps every key to its value exactly and changes text least (EMMET; Gupta et al. 2024).

    Δ = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹; keys that depend on each other (more facts than d_k, or one subject) are met in the
    least-squares sense.

    Returns:
        As :func:`woodbury`.
    """
    scaled = torch.cholesky_solve(keys.T, factor)
    return (torch.linalg.pinv(keys @ scaled, hermitian=True) @ residuals).T, scaled.T


def null_space(moment: Tensor, energy: float) -> Tensor:
    """The projector (d_k, d_k) onto the directions that text uses least (AlphaEdit; Fang et al. 2025).

    Args:
        moment: C (d_k, d_k).
        energy: share of C's trace that the directions left out must hold; the rest are free to be written to.
    """
    values, vectors = torch.linalg.eigh(moment.double())  # ascending
    free = values.clamp(min=0).cumsum(0) <= (1 - energy) * values.clamp(min=0).sum()
    basis = vectors[:, free]
    return cast(Tensor, basis @ basis.T)


def projected(
    projector: Tensor, moment: Tensor, past: Tensor, keys: Tensor, residuals: Tensor, weight: float
) -> Tensor:
    """AlphaEdit's Δ = R KᵀP (K_p K_pᵀ P + K Kᵀ P + w I)⁻¹ (Fang et al. 2025, equation 14).

    Args:
        projector: P (d_k, d_k).
        moment: C (d_k, d_k).
        past: K_p (facts, d_k), the keys of what was written before.
        weight: w, relative to tr(PC), the mean kᵀPk of ordinary text: as in :func:`regularizer`, at 1, one fact with an
            ordinary key is written half.
    """
    size = len(projector)
    both = torch.cat([past, keys])
    scale = weight * (projector * moment.double()).sum().clamp(min=RIDGE * moment.diagonal().sum() / size)
    # Written with P on both sides of the Gram matrix: the same on the range of P, and symmetric.
    inside = projector @ (both.T @ both) @ projector + scale * torch.eye(size, dtype=torch.float64)
    # Once more, so that rounding leaves nothing where text looks.
    return torch.cholesky_solve(projector @ keys.T @ residuals, cholesky(inside)).T @ projector


def before_norm(values: Tensor, residuals: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """What to add to an MLP's output so that a norm behind it gives ``residuals`` more, as nearly as it can.

    A norm fixes the length, so only the direction can be met; the output keeps its own length.

    Args:
        values: (facts, d_model), the MLP's outputs as they are.
        norm: scales each entry of a normalised vector by a gain, as RMSNorm and LayerNorm without bias do.
    """
    probe = torch.ones(values.shape[1], dtype=values.dtype)
    probe[::2] = -1  # mean 0, root mean square 1: what comes back is the gain
    gain = norm(probe) * probe
    reachable = gain.abs() > 1e-3 * gain.abs().max()
    wanted = torch.where(reachable, (norm(values) + residuals) / torch.where(reachable, gain, 1), 0)
    lengths: Tensor = values.norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)
    return wanted * lengths[:, None] - values


def share(how: Spread, place: int, layers: int) -> float:
    """Which share of what is still missing layer number ``place`` of ``layers`` writes.

    ``even``: 1 / layers left (Meng et al. 2023); ``sqrt``: 1 / √(layers left) (PMET; Li et al. 2024); ``ends``: the
    first layer half, the last one the rest, none between (BLUE).
    """
    left = layers - place
    if how == "even":
        return 1 / left
    if how == "sqrt":
        return float(left**-0.5)
    if left == 1:
        return 1.0
    return 0.5 if place == 0 else 0.0
