"""Counts the operations of a program's matrix products, and their scores, exactly, without compiling it."""

import jax
import numpy as np


def operations(function, *arguments):
  """Two for each multiplication and addition; what a loop holds counts as often as the loop runs."""
  return sum(2 * times * summed * result.size for times, summed, result in _products(function, *arguments))


def scores(function, *arguments, head_dim):
  """The float32 results of products over heads of this width, which nothing else may have."""
  products = _products(function, *arguments)
  return sum(times * one.size for times, summed, one in products if summed == head_dim and one.dtype == np.float32)


def _products(function, *arguments):
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr, times=1):
  """(how often it runs, how many products are summed, the result) of each."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (summed, _), _ = equation.params["dimension_numbers"]
      size = int(np.prod([equation.invars[0].aval.shape[axis] for axis in summed], dtype=int))
      yield times, size, equation.outvars[0].aval
    for inner in _inside(tuple(equation.params.values())):
      yield from _of_jaxpr(inner, times * equation.params.get("length", 1))


def _inside(value):
  """The jaxprs among an equation's parameters."""
  if isinstance(value, (tuple, list)):
    return [jaxpr for one in value for jaxpr in _inside(one)]
  value = getattr(value, "jaxpr", value)
  return [value] if hasattr(value, "eqns") else []
