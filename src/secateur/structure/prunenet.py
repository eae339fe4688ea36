"""PruneNet: a policy learns from weights alone which rows carry the spectrum of a matrix."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.errors import InputError, RecipeError
from secateur.core.method import Paper
from secateur.core.progress import Progress, track
from secateur.structure.base import StructureMethod, UnitProblem, register
from secateur.structure.policy import Network, Policy, gumbel, logistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["PruneNet"]

FILE = "policy.safetensors"
Features = Literal["gate", "gate_up_down"]


@register
class PruneNet(StructureMethod):
    """A policy whose reward is how little the singular values move when the rows it drops are gone
    (prunenet, sections 2.1 to 2.5). It sees no text, serves every ratio, and models of the same width.

    Where defaults are not the paper's: `estimator=plackett_luce` is an unbiased policy gradient, which the
    published loss is not; `reward=neg_log_ks` does not explode; `inference=topk` gives one model and not
    another for each seed; `network=linear` is what the two layers of the paper (`factored`) come to. It
    cannot tell a row from its negative, so it finds a mean direction and no norms; `mlp` finds both and
    moves spectra less, which need not help a model: rows of equal geometry are alike to this reward.
    """

    id: ClassVar[str] = "prunenet"
    paper: ClassVar[Paper | None] = Paper(
        "You Only Prune Once: Designing Calibration-Free Model Compression With Policy Learning",
        2025,
        "2501.15296",
    )
    removes: ClassVar[str] = "feed-forward channels"

    targets: Literal["ffn"] = Field("ffn", description="feed-forward channels")
    network: Network = Field(
        "linear", description="linear; factored: the same in two layers as published; mlp: a hidden layer"
    )
    features: Features = Field("gate", description="rows of the first matrix, or of all three")
    reward: Literal["neg_log_ks", "inv_ks", "neg_ks", "w1"] = Field(
        "neg_log_ks", description="of the distance of the spectra; inv_ks as published"
    )
    estimator: Literal["plackett_luce", "faithful"] = Field(
        "plackett_luce", description="exact probability of the draw, or the published heuristic"
    )
    baseline: bool = Field(True, description="subtract the mean reward of other draws (plackett_luce)")
    samples: int = Field(4, ge=1, description="draws a block and episode; 1 as published")
    episodes: int = Field(20, ge=1, description="passes over all blocks")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    gamma: float = Field(
        0.99, gt=0, le=1, description="weight of the reward of a block against the one before"
    )
    ratio: float = Field(
        0.3, gt=0, lt=1, description="fraction of the rows that goes while the policy learns"
    )
    inference: Literal["topk", "sample"] = Field("topk", description="highest scores, or a draw as published")
    policy: str | None = Field(None, description=f"{FILE} of an earlier run, instead of learning")

    def check(self, problems: Collection[UnitProblem]) -> None:
        if self.policy is not None:
            known = self._given(Path(self.policy))
            for problem in problems:
                known.require_fit(self.policy, _parts(problem))
        counts = sorted({problem.units.count for problem in problems})
        if self.policy is None and self.network == "factored" and len(counts) > 1:
            seen = f"network factored on blocks of {counts[0]} to {counts[-1]} channels"
            raise RecipeError(seen, "blocks of one width", "use -O network=linear")

    def prepare(
        self, problems: Collection[UnitProblem], generator: torch.Generator, progress: Progress
    ) -> dict[str, Tensor]:
        """The parameters of the policy, and `distances`, (passes, states): the mean KS distance each pass
        found at the choice that `inference` makes."""
        from secateur.structure.policy_training import Training

        if self.policy is not None:
            return dict(self._given(Path(self.policy)).tensors)
        training = Training(self, generator)
        for episode in track(progress, "learning a policy", range(self.episodes + 1), self.episodes + 1):
            training.run(problems, learn=episode < self.episodes)
        return training.result()

    def score(self, problem: UnitProblem) -> Tensor:
        import torch

        policy = Policy.of(problem.prepared, problem.weight.device)
        with torch.no_grad():
            logits = policy.logits(self.state(problem, policy)).cpu()
            return logits if self.inference == "topk" else self.keys(logits, 1, problem.generator)[0]

    def files(self, prepared: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The policy that was learned, for other ratios and models."""
        from safetensors.torch import save

        options = json.dumps(self.model_dump(mode="json", exclude=set(StructureMethod.model_fields)))
        return {} if self.policy else {FILE: save(dict(prepared), {"options": options})}

    def state(self, problem: UnitProblem, policy: Policy | None = None) -> Tensor:
        """(P, F, d) float32 of the first matrix, or of all; each scaled to entries of mean square 1."""
        import torch

        parts = _parts(problem)
        alone = self.features == "gate" if policy is None else policy.reads(1, parts[0].shape[1])
        matrices = torch.stack(parts[:1] if alone else parts)
        scale = matrices.square().mean((1, 2), keepdim=True).sqrt()
        return matrices / scale.clamp_min(torch.finfo(torch.float32).tiny)

    def keys(self, logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """(draws, F) numbers whose order, from the highest, is a random order of the rows."""
        shape = (draws, len(logits))
        if self.estimator == "faithful":
            import torch

            logits = torch.nn.functional.logsigmoid(logits + logistic(shape, generator).to(logits.device))
        return logits + gumbel(shape, generator).to(logits.device)

    def _given(self, path: Path) -> Policy:
        policy = Policy.load(path)
        if "network" in self.model_fields_set and self.network != policy.network:
            raise InputError(f"{path} is {policy.network}", self.network, "leave network out")
        return policy


def _parts(problem: UnitProblem) -> list[Tensor]:
    """(F, d) of every matrix that writes the channels, and of the transpose of the one that reads them."""
    shape = (problem.units.count, -1, problem.weight.shape[0])
    made = [part for producer in problem.producers for part in producer.view(shape).unbind(1)]
    return [*made, problem.weight.T]
