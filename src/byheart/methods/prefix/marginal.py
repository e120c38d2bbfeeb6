"""The retriever learns from the reader: questions turn towards passages from which answers are likely (REALM)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byheart.progress import Progress, untold
from byheart.training import Orders, Recipe, Trained, train

# Of the inner products of unit vectors, which differ by tenths where passages differ by much.
SHARPNESS = 20.0
_BATCH = 64
_LR = 1e-3
_DECAY = 0.01


def marginal_loss(relevance: Tensor, likelihood: Tensor) -> Tensor:
    """-log p(y|x) with p(y|x) = Σ_z p(z|x) p(y|z,x), a mean over questions (Guu et al. 2020, equation 1).

    Its gradient with respect to the relevance of passage z is -(p(y|z,x) / p(y|x) - 1) p(z|x) (appendix A there): a
    passage is drawn nearer where it tells more of the answer than the others do on average.

    Args:
        relevance: f(x, z) (questions, k), of which p(z|x) is the softmax over the k passages.
        likelihood: log p(y|z,x) (questions, k).
    """
    return -(relevance.log_softmax(-1) + likelihood).logsumexp(-1).mean()


class Turn(nn.Module):
    """What question vectors (n, dim) are multiplied with: the identity at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Only what is not the identity decays.
        self.change = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Turned vectors, as long as before."""
        turned = vectors + vectors @ self.change
        found: Tensor = turned * (
            vectors.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        )
        return found

    def turned(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same outside of training."""
        with torch.no_grad():
            given = torch.from_numpy(vectors).to(self.change.device)
            found: NDArray[np.float32] = self(given).cpu().numpy()
        return found


def learn_turn(
    questions: NDArray[np.float32],
    passages: NDArray[np.float32],
    likelihood: Sequence[Sequence[float]],
    epochs: int,
    seed: int,
    store: Path,
    progress: Progress = untold,
) -> tuple[Turn, Trained]:
    """Train a :class:`Turn` on what a reader said.

    Args:
        questions: vectors (n, dim).
        passages: of each question the vectors of what was found for it (n, k, dim).
        likelihood: of each question log p(answer | passage, question) of these.
        store: see :func:`byheart.training.train`.
    """
    asked, found = torch.from_numpy(questions), torch.from_numpy(passages)
    told = torch.tensor(likelihood)
    turn = Turn(asked.shape[1])
    orders = Orders([len(asked)], _BATCH, epochs, seed)

    def loss(step: int) -> Tensor:
        _, some = orders.batch(step)
        relevance = SHARPNESS * (turn(asked[some])[:, None] * found[some]).sum(-1)
        return marginal_loss(relevance, told[some])

    trained = train(turn, loss, Recipe(orders.steps, _LR, decay=_DECAY, clip=1.0), store, progress)
    return turn, trained
