"""Builds the models of comparable packages with the widths, depths and heads of a config of ours.

MEGABYTE-pytorch (0.3.6 was looked at), mblm (0.4.2), and the MegaByte of SpaceByte's repository (commit 3211113).
PyTorch is imported where it is needed, so that a process without a peer neither needs it nor gives memory to it.
"""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import sys
from typing import Any

from megabyte_jax import MegabyteConfig
from megabyte_jax.errors import require

PACKAGES = {"MEGABYTE-pytorch": ("torch", "MEGABYTE_pytorch"), "mblm": ("torch", "mblm")}
_PAD = 256  # outside of the bytes: the default, 0, would leave byte 0 out of the loss


def installed(package: str) -> bool:
  """Tells whether a package of PACKAGES can be imported."""
  return all(importlib.util.find_spec(name) for name in PACKAGES[package])


def megabyte_pytorch(config: MegabyteConfig) -> Any:
  """Builds MEGABYTE-pytorch's model, a torch module, for a config of two levels."""
  from MEGABYTE_pytorch import MEGABYTE  # noqa: PLC0415
  from MEGABYTE_pytorch.megabyte import Transformer  # noqa: PLC0415

  coarse, fine = config.levels
  made = MEGABYTE(
    num_tokens=_PAD + 1,
    pad_id=_PAD,
    dim=(coarse.width, fine.width),
    depth=(coarse.num_layers, fine.num_layers),
    max_seq_len=(config.context // coarse.patch_size, coarse.patch_size),
    dim_head=fine.heads[1],
    heads=fine.heads[0],
    flash_attn=True,
  )
  if coarse.heads != fine.heads:  # it has one number of heads for both; the coarse stage is built anew
    made.transformers[0] = Transformer(
      dim=coarse.width,
      layers=coarse.num_layers,
      dim_head=coarse.heads[1],
      heads=coarse.heads[0],
      flash_attn=True,
    )
  return made


def spacebyte(config: MegabyteConfig, clone: str) -> Any:
  """Builds the MegaByte of github.com/kjslag/spacebyte, a torch module, for a config of two levels.

  Its vocabulary has a further symbol, `_PAD`, that begins each sequence.

  Args:
    clone: a checkout of the repository, which is not a package.

  Raises:
    ConfigError: there is none.
  """
  require((pathlib.Path(clone) / "megabyte.py").exists(), f"{clone or '.'}: no checkout of github.com/kjslag/spacebyte")
  sys.path.insert(0, clone)
  from megabyte import MegaByte, MegaByteConfig  # noqa: PLC0415

  coarse, fine = config.levels
  return MegaByte(
    MegaByteConfig(
      vocab_size=_PAD + 1,
      BOS=_PAD,
      d_model=coarse.width,
      n_layers=coarse.num_layers,
      context_size=config.context,
      patch_size=coarse.patch_size,
      d_local=fine.width,
      n_local_layers=fine.num_layers,
      d_key=fine.heads[1],
      tie_embedding=False,
      rope=True,
    )
  )


def mblm(config: MegabyteConfig) -> Any:
  """Builds mblm's model, a torch module whose call gives the loss; with rotary positions, as its authors train it."""
  from mblm import MBLM, MBLMModelConfig, TransformerBlock  # noqa: PLC0415

  sizes = (config.context, *(level.patch_size for level in config.levels))
  blocks = [
    TransformerBlock(
      attn_head_dims=level.heads[1],
      attn_num_heads=level.heads[0],
      attn_use_rot_embs=True,
      use_flash_attn=True,
      pos_emb_type="fixed",
      ff_multiplier=config.hidden(level) // level.width,
    )
    for level in config.levels
  ]
  return MBLM(
    MBLMModelConfig(
      num_tokens=_PAD + 1,
      pad_token_id=_PAD,
      hidden_dims=[level.width for level in config.levels],
      num_layers=[level.num_layers for level in config.levels],
      seq_lens=[above // own for above, own in itertools.pairwise(sizes)],
      train_checkpoint_chunks=None,
      block=blocks,
    )
  )


def open_attention(made: Any) -> None:
  """Allows the fused attention kernels, which MEGABYTE-pytorch's attention (mblm's too) bars on all but one GPU."""
  from torch.nn.attention import SDPBackend  # noqa: PLC0415

  for module in made.modules():
    if hasattr(module, "attn_cfg"):
      module.attn_cfg = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
