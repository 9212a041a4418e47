"""Counts the operations of a program's matrix products exactly, without compiling it."""

import jax
import numpy as np


def operations(function, *arguments):
  """Two for each multiplication and addition; what a loop holds counts as often as the loop runs."""
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr, times=1):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (summed, _), _ = equation.params["dimension_numbers"]
      size = np.prod([equation.invars[0].aval.shape[axis] for axis in summed], dtype=int)
      total += 2 * times * int(np.prod(equation.outvars[0].aval.shape, dtype=int) * size)
    inner_times = times * equation.params.get("length", 1)
    total += sum(_of_jaxpr(inner, inner_times) for inner in _inside(tuple(equation.params.values())))
  return total


def _inside(value):
  """The jaxprs among an equation's parameters."""
  if isinstance(value, (tuple, list)):
    return [jaxpr for one in value for jaxpr in _inside(one)]
  value = getattr(value, "jaxpr", value)
  return [value] if hasattr(value, "eqns") else []
