"""How the policy of PruneNet learns (prunenet, sections 2.2 to 2.5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from secateur.structure.base import UnitProblem
from secateur.structure.policy import Policy, log_probability, logistic
from secateur.structure.spectral import ks_distance, singular_values, wasserstein

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.structure.prunenet import PruneNet

__all__ = ["Training", "advantages", "rewards", "surrogate"]

NO_DISTANCE = 1e-5  # the published reward has 99999 where spectra agree


class Training:
    """Passes over the blocks of a model; the policy that did best at the start of a pass is the result.

    Each block is seen once a pass: draws, their rewards and one step. The published estimator draws for all
    blocks before its first step, so it draws here from the policy as it was when the pass began.
    """

    def __init__(self, method: PruneNet, generator: torch.Generator) -> None:
        self.method, self.generator = method, generator
        self._policy: Policy | None = None
        self._dense: dict[str, Tensor] = {}
        self._past: dict[str, list[float]] = {}
        self._best, self._best_reward = Policy({}), -torch.inf
        self._distances: list[list[float]] = []

    def run(self, problems: Iterable[UnitProblem], *, learn: bool) -> None:
        """One pass."""
        start, total, distances = None, 0.0, []
        for number, problem in enumerate(problems):
            state = self.method.state(problem)
            policy = self._policy_for(state)
            start = start or policy.copy()
            reward, distance = self._visit(state, problem.name, start, number if learn else None)
            total += reward
            distances.append(distance)
        if start is not None and total > self._best_reward:
            self._best, self._best_reward = start, total
        self._distances.append(distances)

    def result(self) -> dict[str, Tensor]:
        """The best policy, and the distances of all passes."""
        tensors = {name: tensor.cpu() for name, tensor in self._best.tensors.items()}
        return {**tensors, "distances": torch.tensor(self._distances)}

    def _policy_for(self, state: Tensor) -> Policy:
        if self._policy is None:
            parts, rows, columns = state.shape
            fresh = Policy.fresh(self.method.network, (parts, rows, columns), self.generator)
            leaves = {name: t.to(state.device).requires_grad_() for name, t in fresh.tensors.items()}
            self._policy = Policy(leaves)
            self._optimizer = torch.optim.AdamW(list(leaves.values()), lr=self.method.lr)
        return self._policy

    def _visit(self, state: Tensor, name: str, start: Policy, number: int | None) -> tuple[float, float]:
        """Draw, judge, and with a block number learn.

        Returns:
            Reward and KS distance of what `inference` would choose.
        """
        method, (_, rows, _) = self.method, state.shape
        assert self._policy is not None
        count = max(1, int((1 - method.ratio) * rows))
        sampled = method.inference == "sample"
        with torch.no_grad():
            before = start.logits(state)
            now = before if method.estimator == "faithful" else self._policy.logits(state)
            drawn = method.keys(now, method.samples if number is not None or sampled else 0, self.generator)
            orders = torch.cat([drawn, before[None]]).argsort(dim=1, descending=True, stable=True)
            spectra = torch.stack([singular_values(state[:, order[:count]]) for order in orders])
            dense = self._dense.setdefault(name, singular_values(state)).expand(len(orders), -1, -1)
            found, distances = rewards(method.reward, dense, spectra), ks_distance(dense, spectra).mean(1)
        if number is not None:
            with torch.enable_grad():
                self._step(state, orders[:-1], count, found[:-1], name, method.gamma**number)
        chosen = slice(0, -1) if sampled else slice(-1, None)
        return float(found[chosen].mean()), float(distances[chosen].mean())

    def _step(
        self, state: Tensor, orders: Tensor, count: int, found: Tensor, name: str, weight: float
    ) -> None:
        assert self._policy is not None
        if self.method.estimator == "plackett_luce" and self.method.baseline:
            past = self._past.setdefault(name, [])
            found, seen = advantages(found, past), float(found.mean())
            past.append(seen)
        logits = self._policy.logits(state)
        loss = weight * surrogate(self.method.estimator, logits, orders, count, found, self.generator)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def surrogate(
    estimator: str, logits: Tensor, orders: Tensor, count: int, found: Tensor, generator: torch.Generator
) -> Tensor:
    """A loss whose gradient is, up to sign, what the estimator takes for that of the expected reward.

    Args:
        estimator: `plackett_luce`: the exact probability of the draws. `faithful`: the sum over the rows that
            stay of log o with noise of its own, which no longer knows how they were drawn.
        logits: (F,).
        orders: (m, F), drawn; the first `count` stay.
        found: (m,) rewards or advantages.
    """
    if estimator == "plackett_luce":
        likely = log_probability(logits, orders, count)
    else:
        noise = logistic(tuple(orders.shape), generator).to(logits.device)
        likely = logsigmoid(logits + noise).gather(1, orders[:, :count]).sum(1)
    return -(found.to(likely.dtype) * likely).mean()


def advantages(found: Tensor, past: list[float]) -> Tensor:
    """(m,) rewards less the mean of the other draws; of one draw less the mean of earlier episodes."""
    if len(found) > 1:
        return (found - found.mean()) * len(found) / (len(found) - 1)
    return found - (sum(past) / len(past) if past else found)


def rewards(kind: str, dense: Tensor, cut: Tensor) -> Tensor:
    """(m,) rewards, mean over the matrices of a state.

    Args:
        kind: as the option `reward` of PruneNet.
        dense, cut: (m, P, n) and (m, P, n') ascending singular values before and after.
    """
    if kind == "w1":
        return -(wasserstein(dense, cut) / dense.mean(-1)).mean(1)
    distance = ks_distance(dense, cut)
    if kind == "neg_ks":
        return -distance.mean(1)
    if kind == "inv_ks":
        return (1 / distance.clamp_min(NO_DISTANCE)).mean(1)
    half_a_step = 0.5 / max(dense.shape[-1], cut.shape[-1])
    return -distance.clamp_min(half_a_step).log().mean(1)
