"""How lmms-eval finds the model: the entry point ``lmms_eval.models`` of this package.

A function in a module of its own, because lmms-eval loads entry points while its own modules are half imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model ``sparsity_forcing``, as in ``--model sparsity_forcing``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="sparsity_forcing", chat_class_path="sparsity_forcing.evaluation.lmms_model.SparsityForcing"
    )
