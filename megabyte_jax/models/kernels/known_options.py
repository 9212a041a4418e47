"""Lists the options that the fast ways of a decoding step know, and for which values.

There are two (models/layers/stack.py): all layers in one kernel (decoding_step.py and decoding_phases.py), and layer by
layer with attention by a kernel (`Block._one_slot` and cached_attention.py). Both repeat what `Block.__call__` does, so
a new field of `Level` or `BlockOptions` would be ignored by them until it is listed here: a stack with anything that is
not listed takes the plain step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megabyte_jax.config import BlockOptions, Level

ANY = None  # of a field: every value


@dataclasses.dataclass(frozen=True)
class Known:
  """Holds what one way of computing a step knows.

  Attributes:
    level, options: name of a field -> the values that are computed right, or `ANY`.
  """

  level: Mapping[str, tuple | None]
  options: Mapping[str, tuple | None]

  def obstacle(self, level: Level, options: BlockOptions) -> str:
    """Returns the first field that is not known or has a value that is not, or '' if all are known."""
    for owner, cls, known in ((level, Level, self.level), (options, BlockOptions, self.options)):
      for field in dataclasses.fields(cls):
        value: Any = getattr(owner, field.name)
        if field.name not in known:
          return f"{field.name} is not among the options that it knows"
        values = known[field.name]
        if values is not ANY and value not in values:
          return f"it does not know {field.name}={value!r}"
    return ""


_LEVEL = {
  "patch_size": ANY,  # of the embedder
  "width": ANY,
  "num_layers": ANY,
  "num_heads": ANY,
  "head_dim": ANY,
  "ff_width": ANY,
  "rotary": (False, True),
  "cross_patch": ANY,  # `Stack.step` counts its slots among those of the cache
  "conv_filters": ANY,  # of the embedder
  "attention_window": ANY,  # `Stack.step` names the first entry of the cache that is seen
}
_OPTIONS = {
  "norm": ("layernorm", "rmsnorm"),
  "activation": ("relu", "gelu", "silu", "swiglu"),
  "bias": (False, True),
  "qk_norm": (False, True),
  "dropout": ANY,  # of training
  "attention_dropout": ANY,  # of training
  "init": ANY,  # of initial values
  "init_std": ANY,
  "embedding_std": ANY,
  "tied_output": ANY,  # of the embedder
  "logit_scale": ANY,
  "remat": ANY,  # of training
  "scan_layers": ANY,  # of whole spans
  "compute_dtype": ANY,  # `cached_attention.wanted` asks for bfloat16
  "attention": ("auto", "cudnn", "splash"),  # xla asks for the plain step
}

LAYER_BY_LAYER = Known(_LEVEL, _OPTIONS)
IN_ONE_KERNEL = Known(_LEVEL, {**_OPTIONS, "qk_norm": (False,)})
