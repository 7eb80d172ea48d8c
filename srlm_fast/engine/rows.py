"""The state of every row of the running batch, as tensors: a step touches all rows without a Python loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srlm_fast.engine.base import Request


class Rows:
    """State and output of `n` rows; a row that is not in use has length 0 and token 0.

    Shapes: int64 [n] last_tokens, lengths (tokens in the cache), steps (tokens generated), room (tokens it may
    generate), keys; fp32 [n] temperature, top_p; int64 [n, s] stop_ids and [n, e] extra_ids, padded with -1 and 0;
    int64 [n, c] tokens, fp32 [n, c] logprobs and [n, c, e] extra_logprobs. s, e and c grow with the requests.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.last_tokens, self.lengths, self.steps, self.room, self.keys = (zeros(n) for _ in range(5))
        self.temperature, self.top_p = zeros(n, dtype=torch.float32), zeros(n, dtype=torch.float32)
        self.stop_ids, self.extra_ids, self.tokens = zeros(n, 0), zeros(n, 0), zeros(n, 0)
        self.logprobs, self.extra_logprobs = zeros(n, 0, dtype=torch.float32), zeros(n, 0, 0, dtype=torch.float32)

    def start(
        self, rows: Tensor, *, requests: Sequence[Request], lengths: list[int], room: list[int], keys: Tensor
    ) -> None:
        """Puts new samples into `rows` (int64 [m]), their prompts already in the cache."""
        n_stop = max(len(r.stop_ids) for r in requests)
        n_extra = max(len(r.logprob_token_ids) for r in requests)
        self._grow(max(room), n_stop, n_extra)
        n_stop, n_extra = self.stop_ids.shape[1], self.extra_ids.shape[1]

        def on_device(values: list) -> Tensor:
            return torch.tensor(values, device=self.keys.device)

        self.steps[rows] = 0
        self.lengths[rows], self.room[rows], self.keys[rows] = on_device(lengths), on_device(room), keys
        self.temperature[rows] = on_device([float(r.temperature) for r in requests])
        self.top_p[rows] = on_device([float(r.top_p) for r in requests])
        self.stop_ids[rows] = on_device([[*r.stop_ids] + [-1] * (n_stop - len(r.stop_ids)) for r in requests]).long()
        if n_extra:
            padded = [[*r.logprob_token_ids] + [0] * (n_extra - len(r.logprob_token_ids)) for r in requests]
            self.extra_ids[rows] = on_device(padded)

    def append(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Adds a token to each of `rows`.

        Args:
            rows, tokens: int64 [m].
            logprobs: fp32 [m, V].

        Returns:
            bool [m], the rows that end here: stop token, no room, or a log-probability that is no number.
        """
        steps, logprob = self.steps[rows], logprobs.gather(1, tokens[:, None]).squeeze(1)
        self.tokens[rows, steps], self.logprobs[rows, steps] = tokens, logprob
        if self.extra_ids.shape[1]:
            self.extra_logprobs[rows, steps] = logprobs.gather(1, self.extra_ids[rows])
        self.last_tokens[rows], self.steps[rows] = tokens, steps + 1
        stopped = (tokens[:, None] == self.stop_ids[rows]).any(1)
        return stopped | (steps + 1 >= self.room[rows]) | ~logprob.isfinite()

    def output(self, row: int, n_extra: int) -> tuple[list[int], list[float], list[list[float]]]:
        """Tokens, log-probabilities and extra log-probabilities of a row."""
        steps = int(self.steps[row])
        extra = self.extra_logprobs[row, :steps, :n_extra].tolist() if n_extra else []
        return self.tokens[row, :steps].tolist(), self.logprobs[row, :steps].tolist(), extra

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies rows `source` to rows `target` (int64 [m] each)."""
        for state in vars(self).values():
            state[target] = state[source]

    def clear(self, first: int, end: int) -> None:
        """Marks rows first..end-1 as not in use."""
        self.last_tokens[first:end] = 0
        self.lengths[first:end] = 0

    def _grow(self, n_tokens: int, n_stop: int, n_extra: int) -> None:
        """Widens the tensors whose width depends on the requests; what they hold stays."""
        n, c = self.tokens.shape
        c, s, e = max(n_tokens, c), max(n_stop, self.stop_ids.shape[1]), max(n_extra, self.extra_ids.shape[1])
        widths = {
            "stop_ids": ((n, s), -1),
            "extra_ids": ((n, e), 0),
            "tokens": ((n, c), 0),
            "logprobs": ((n, c), 0),
            "extra_logprobs": ((n, c if e else 0, e), 0),
        }
        for name, (shape, fill) in widths.items():
            old = getattr(self, name)
            if old.shape != shape:
                new = old.new_full(shape, fill)
                new[tuple(slice(width) for width in old.shape)] = old
                setattr(self, name, new)
