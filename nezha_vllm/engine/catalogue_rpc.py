"""How API processes reach the catalogues of the workers: a method that vLLM's ``collective_rpc`` finds by name."""

from __future__ import annotations

from typing import Any


class CatalogueRpc:
    def nezha_catalogue(self, action: str, *arguments: Any) -> list[Any]:
        """See ``Versions.call``. Runs between two steps."""
        runner = self.model_runner  # type: ignore[attr-defined]
        stage = getattr(runner, "draft_stage", None) or runner.model_state.draft_stage
        return stage.versions.call(action, *arguments)
