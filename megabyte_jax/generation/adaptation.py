"""Adapts a model's probabilities to the file being coded, by what its bytes so far have in common with the next ones.

A file repeats names and phrases that no training text holds. So each probability of the model becomes

  q(x) ~ p(x)^a  exp(b[last byte, x] + c[last two bytes, x] + sum_k w_k log(1 + n_k(x) / (_DOUBT p(x))))

where n_k(x) counts how often x followed the last k bytes earlier in the file. The temperature a, the biases b and c and
the weights w are learned on the way, one step of gradient descent on the coded bytes at a time, as in the mixing of
PAQ (Mahoney, 2005). All of it is NumPy's arithmetic in a fixed order: the decoder repeats it to the last bit.

Shapes: R rows coded side by side, which share all that is learned; V vocabulary, K orders, S symbols of a context.
"""

from __future__ import annotations

import numpy as np

VOCABULARY = 256  # at most: longer ones are of tokens, which repeat less
_ORDERS = (3, 4, 5, 6, 8)  # k: bytes before
_SYMBOLS = 4  # that a context remembers; the least counted one makes room for another
_DOUBT = 4.0  # how many times a symbol must have followed to be worth about as much as the model's own word
_MOST = 255.0  # of one count
_FORGET = 0.9  # other counts times this when a symbol is new in its context
_RATE_WEIGHTS, _RATE_TEMPERATURE, _RATE_BIAS = 0.005, 0.002, 0.05
_LARGEST = 20  # bits of the number of contexts of an order that are told apart
_SMALLEST = 10
_LEAST = np.float32(1e-30)  # of a probability


class Adaptation:
  """Holds what is known of a file so far; `mix` and `learn` are called in turn, for one byte of each row."""

  def __init__(self, vocab_size: int, length: int):
    """Starts with an empty memory, large enough for a file of `length` bytes."""
    orders = len(_ORDERS)
    self._bits = min(max(length.bit_length(), _SMALLEST), _LARGEST)
    self._symbols = np.zeros((orders << self._bits, _SYMBOLS), np.uint8)
    self._counts = np.zeros((orders << self._bits, _SYMBOLS), np.float32)
    self._weights = np.full((orders, 8), 0.15, np.float32)  # by what is known of the context: `_confidence`
    self._temperature = np.float32(1.0)
    self._bias = np.zeros((vocab_size, vocab_size), np.float32)
    self._bias_of_two = np.zeros((vocab_size * vocab_size, vocab_size), np.float32)
    self._history = np.zeros((0, max(_ORDERS)), np.int64)

  def start(self, rows: int) -> None:
    """Begins other windows, of which nothing has been read."""
    self._history = np.zeros((rows, max(_ORDERS)), np.int64)

  def mix(self, p_RV: np.ndarray) -> np.ndarray:
    """Returns the adapted probabilities, float32 [R, V], of the next byte of the first R rows."""
    R, V = p_RV.shape
    history = self._history[:R]
    self._last, self._at = history[:, 0], self._places(history)
    self._last_two = self._last * V + history[:, 1]
    self._log_p = np.log(np.maximum(p_RV, _LEAST))
    self._seen = self._symbols[self._at].astype(np.int64)  # [R, K, S]
    self._seen_counts = self._counts[self._at]
    self._known = _confidence(self._seen_counts)
    p_of_seen = np.take_along_axis(p_RV, self._seen.reshape(R, -1), 1).reshape(self._seen.shape)
    self._features = np.log1p(self._seen_counts / (_DOUBT * p_of_seen + np.float32(1e-6)))
    scores = self._temperature * self._log_p + self._bias[self._last] + self._bias_of_two[self._last_two]
    weights = self._weights[np.arange(len(_ORDERS)), self._known]
    np.add.at(scores, (np.arange(R)[:, None, None], self._seen), weights[..., None] * self._features)
    q_RV = np.exp(scores - scores.max(axis=1, keepdims=True))
    self._q = q_RV / q_RV.sum(axis=1, keepdims=True)
    return self._q

  def learn(self, bytes_R: np.ndarray) -> None:
    """Takes note of the bytes that followed."""
    R, x_R = len(bytes_R), bytes_R.astype(np.int64)
    hit = self._seen == x_R[:, None, None]
    q_of_seen = np.take_along_axis(self._q, self._seen.reshape(R, -1), 1).reshape(self._seen.shape)
    slope = (self._features * (hit - q_of_seen)).sum(axis=-1)  # of the log-likelihood, by each weight
    orders = np.broadcast_to(np.arange(len(_ORDERS)), slope.shape)
    np.add.at(self._weights, (orders, self._known), np.float32(_RATE_WEIGHTS / R**0.5) * slope.astype(np.float32))
    expected = (self._q * self._log_p).sum(axis=1)
    self._temperature += np.float32(_RATE_TEMPERATURE) * np.mean(self._log_p[np.arange(R), x_R] - expected)
    error = -np.float32(_RATE_BIAS) * self._q
    error[np.arange(R), x_R] += np.float32(_RATE_BIAS)
    np.add.at(self._bias, self._last, error)
    np.add.at(self._bias_of_two, self._last_two, error)
    self._count(x_R, hit)
    history = self._history[:R]
    history[:, 1:] = history[:, :-1].copy()
    history[:, 0] = x_R

  def _places(self, history: np.ndarray) -> np.ndarray:
    """The place in the tables of each row's context of each order, [R, K]; different ones may share a place."""
    sums = np.cumsum((history + 1) * _MULTIPLIERS, axis=1)[:, [k - 1 for k in _ORDERS]]  # modulo 2^64
    mixed = (sums ^ (sums >> 29)) * 0x2545F4914F6CDD1D
    return ((mixed >> 32) & ((1 << self._bits) - 1)) + (np.arange(len(_ORDERS)) << self._bits)

  def _count(self, x_R: np.ndarray, hit: np.ndarray) -> None:
    """Counts the bytes in their contexts; where rows share a context, the last row's bytes stay."""
    known = hit & (self._seen_counts > 0)
    is_known = known.any(axis=-1)
    place = np.where(is_known, known.argmax(axis=-1), self._seen_counts.argmin(axis=-1))[..., None]
    before = np.take_along_axis(self._seen_counts, place, -1)
    counts = self._seen_counts * np.where(is_known, np.float32(1), np.float32(_FORGET))[..., None]
    np.put_along_axis(counts, place, np.where(is_known[..., None], np.minimum(before + 1, np.float32(_MOST)), 1), -1)
    symbols = self._seen.copy()
    np.put_along_axis(symbols, place, np.broadcast_to(x_R[:, None, None], place.shape), -1)
    self._counts[self._at], self._symbols[self._at] = counts, symbols


_MULTIPLIERS = np.array([pow(0x9E3779B1, i + 1, 1 << 62) | 1 for i in range(max(_ORDERS))], np.int64)


def _confidence(counts_RKS: np.ndarray) -> np.ndarray:
  """Returns what is known of each context, 0 to 7: how often it was seen, and whether more than one byte followed."""
  total = counts_RKS.sum(axis=-1)
  often = np.where(total > 0, 1 + np.log2(np.maximum(total, 1)).astype(np.int64), 0)
  return np.minimum(often, 3) * 2 + ((counts_RKS > 0).sum(axis=-1) > 1)
