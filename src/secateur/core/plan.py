"""`plan.json`: which units of which blocks stay, numbered as in the model that was planned for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.core.errors import InputError

__all__ = ["Plan"]


class Plan(BaseModel):
    """A plan on disk.

    Attributes:
        model: fingerprint of the checkpoint that it is for.
        method, options: what made it, and how what goes is made up for.
        sparsity: fraction of the parameters in blocks that was asked for.
        budget: as it was asked for, if it was.
        calibration_sha256: of the windows that were observed.
        counts: of the result: parameters, bytes, and units by kind before and after.
        blocks: for each block, by kind, the units that stay, sorted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["secateur-plan"] = "secateur-plan"
    version: Literal[1] = 1
    model: str
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsity: float = Field(ge=0, le=1)
    budget: str | None = None
    calibration_sha256: str = ""
    counts: dict[str, Any] = Field(default_factory=dict)
    blocks: list[dict[str, list[int]]]

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises `InputError` for a file that holds none."""
        remedy = "give the plan.json of a structured run"
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"plan {path} cannot be read ({error.strerror})", "plan.json", remedy) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InputError(
                f"{path} is no plan ({where}: {first['msg'].lower()})",
                "plan.json of a structured run",
                remedy,
            ) from error

    def dumps(self) -> str:
        """JSON with one line a block."""
        rows = ",\n".join(
            "  {" + ", ".join(f'"{kind}": {units}' for kind, units in block.items()) + "}"
            for block in self.blocks
        )
        head = self.model_copy(update={"blocks": []}).model_dump_json(indent=1)
        return head.replace('"blocks": []', f'"blocks": [\n{rows}\n ]') + "\n"
