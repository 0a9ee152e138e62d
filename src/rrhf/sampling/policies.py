"""Sampling policies: greedy, top-k and top-p draws, beam search and diverse beam search."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from rrhf.models.kernels.choice import kernels_for
from rrhf.sampling.decoding import Response
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.stepping import Advance

PART = 256  # tokens whose probabilities are summed in fp32, and those sums in fp64
NEVER = -1.0e9  # the sum of log-probabilities of a beam that cannot go on

StopCheck = Callable[[list[int]], bool]
EndTokens = Sequence[Collection[int]]  # of every query, the tokens that end its responses
Device = torch.device


def uniforms(seed: int, key: str, slot: int, count: int) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) that depend on the seed, the record and the response alone."""
    digest = hashlib.blake2b(f"{seed}/{slot}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def draw(logits: Tensor, uniform: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Draw one token a row by inverting the distribution function at ``uniform``.

    Args:
        logits: Tensor of shape (R, V), fp32, already divided by the temperature.
        uniform: Tensor of shape (R,), fp64, in [0, 1).
        top_k: keep the k likeliest tokens, all where ``None``.
        top_p: then keep the smallest set of likeliest tokens with at least this probability.

    Returns:
        Token ids, Tensor of shape (R,).
    """
    if top_k is None and top_p >= 1.0:
        return _draw_from_all(logits, uniform)
    kernels, vocabulary = kernels_for(logits.device), logits.shape[-1]
    kept = min(top_k or kernels.nucleus(vocabulary), vocabulary)
    values, tokens = _sorted(logits) if kept == vocabulary else kernels.top(logits, kept)
    weights = _double(torch.exp(values - values[:, :1]))
    if top_k is None and kept < vocabulary:
        total = kernels.exp_(logits - values[:, :1]).sum(dim=-1, dtype=torch.float64)
        if bool((weights.sum(-1) < top_p * total).any()):
            values, tokens = _sorted(logits)
            weights = _double(torch.exp(values - values[:, :1]))
    else:
        total = weights.sum(dim=-1)
    uniform = uniform.to(weights.device)
    mass = weights.cumsum(dim=-1)
    weights = weights.masked_fill(mass - weights >= top_p * total[:, None], 0.0)
    mass = weights.cumsum(dim=-1)
    index = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    last = (weights > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1  # also where logits are no numbers
    return tokens.gather(1, torch.minimum(index, last).to(tokens.device))[:, 0]


def _sorted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits from the highest down, of equals the lower token first, and their tokens."""
    values, tokens = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values, tokens


def _double(x: Tensor) -> Tensor:
    """x in fp64, on the CPU where its device has none."""
    return x.to(kernels_for(x.device).fp64_device(x.device)).double()


def _draw_from_all(logits: Tensor, uniform: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    weights = kernels_for(logits.device).exp_(logits - logits.amax(dim=-1, keepdim=True))
    padding = -vocabulary % PART
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    parts = weights.view(rows, -1, PART)
    mass = _double(parts.sum(dim=-1)).cumsum(dim=-1)
    target = uniform.to(mass.device)[:, None] * mass[:, -1:]
    part = torch.searchsorted(mass, target, right=True).clamp(max=mass.shape[1] - 1)
    before = torch.where(part > 0, mass.gather(1, (part - 1).clamp(min=0)), 0.0)
    inside = _double(parts[torch.arange(rows, device=logits.device), part[:, 0].to(logits.device)])
    index = torch.searchsorted(inside.cumsum(dim=-1), target - before, right=True)
    last = PART - 1 - inside.flip(-1).gt(0).to(torch.uint8).argmax(dim=-1, keepdim=True)  # never a token of no weight
    return (part[:, 0] * PART + torch.minimum(index, last)[:, 0]).to(logits.device)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of each row and where they stand, highest first, of equals the first."""
    values, places = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def _padded(end_tokens: EndTokens, device: Device) -> Tensor:
    """Each query's end tokens, [queries, most of them], and −1, which is no token."""
    most = max((len(set(ends)) for ends in end_tokens), default=0)
    rows = [sorted(set(ends)) for ends in end_tokens]
    padded = [row + [-1] * (max(most, 1) - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), -1)


class Draws:
    """Independent draws (top-p, top-k, or the likeliest token with ``greedy``), ``width`` a query.

    Each response has its own stream of uniforms, so it does not depend on what is decoded beside it.
    """

    independent = True

    def __init__(
        self, settings: SamplingSettings, keys: Sequence[str], ends: EndTokens, stops: StopCheck | None, device: Device
    ) -> None:
        self.settings, self.stops, self.width, self.device = settings, stops, settings.width, device
        self.ends = _padded(ends, device)
        count, steps = len(keys) * self.width, settings.max_new_tokens
        self.tokens = torch.zeros(count, steps, dtype=torch.long, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.open = torch.ones(count, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)
        # Of those that stopped, which did by an end token: all of them, where there are no stop strings.
        self.by_end = self.stopped if stops is None else torch.zeros_like(self.stopped)
        self.texts: list[list[int]] = [[] for _ in range(count)]  # for stop strings, which the host looks for
        self.step = 0
        self.greedy = settings.policy == "greedy"
        self.top_k = settings.tokens_kept
        if not self.greedy:
            streams = [uniforms(settings.seed, key, slot, steps) for key in keys for slot in range(self.width)]
            self.uniforms = torch.from_numpy(np.stack(streams)).to(kernels_for(device).fp64_device(device))

    def advance(self, logits: Tensor, slots: Tensor) -> Advance:
        """Draw a token a slot. Responses that have ended are looked for, and dropped, now and then
        (``Kernels.steps_between_checks``); until then their slots go on, and what they draw is no part of them."""
        rows = torch.arange(len(slots), device=self.device)
        if self.step == 0:  # a query's slots share its one row of logits
            slots = torch.arange(len(self.tokens), device=self.device)
            rows = slots // self.width
        kernels = kernels_for(logits.device)
        size = kernels.sampling_rows(logits.shape[-1])
        choices = torch.cat(
            [self._choose(logits[r], s) for r, s in zip(rows.split(size), slots.split(size), strict=True)]
        )
        self._record(slots, choices)
        self.step += 1
        if self.step == self.settings.max_new_tokens:
            return Advance(slots[:0], slots[:0], choices[:0])
        if self.stops is None and self.step % kernels.steps_between_checks():
            return Advance(slots, slots, choices)
        live = self.open[slots].nonzero()[:, 0]
        return Advance(slots[live], slots[live], choices[live])

    def _record(self, slots: Tensor, choices: Tensor) -> None:
        """Append the tokens to the responses that are open, and close those that end with them."""
        was_open = self.open[slots]
        ended = (choices[:, None] == self.ends[slots // self.width]).any(dim=1)
        self.tokens[slots, self.step] = choices
        still = was_open & ~ended
        self.lengths[slots] += still
        if self.stops is not None:
            self.by_end[slots] |= was_open & ended
            hit = [False] * len(slots)
            for i, (slot, token, is_open) in enumerate(torch.stack([slots, choices, still.long()], dim=1).tolist()):
                self.texts[slot].append(token)
                hit[i] = bool(is_open) and self.stops(self.texts[slot])
            still = still & ~torch.tensor(hit, device=self.device)
        self.open[slots] = still
        self.stopped[slots] |= was_open & ~still

    def _choose(self, logits: Tensor, slots: Tensor) -> Tensor:
        logits = logits.float()
        if self.greedy:
            return kernels_for(logits.device).top(logits, 1)[1][:, 0]
        if self.settings.temperature != 1.0:
            logits = logits / self.settings.temperature
        uniform = self.uniforms[slots.to(self.uniforms.device), self.step]
        return draw(logits, uniform, self.top_k, self.settings.top_p or 1.0)

    def results(self) -> list[list[Response]]:
        rows = (self.tokens, self.lengths, self.stopped, self.by_end)
        responses = [
            Response(tokens[:length], "stop" if stopped else "length", tokens[length] if by_end else None)
            for tokens, length, stopped, by_end in zip(*(row.tolist() for row in rows), strict=True)
        ]
        return [responses[i : i + self.width] for i in range(0, len(responses), self.width)]


class Beams:
    """Beam search in groups (Vijayakumar et al. 2018, arXiv 1610.02424); one group is plain beam search.

    At each step the groups advance in order. A group's scores are log-probabilities summed over the beam, each
    lowered by ``diversity_penalty`` times how often earlier groups of the same query chose that token at this step; a
    group that has finished chooses none. Finished beams are kept by score / length ** length_penalty, the best of
    each group, and a group ends when no running beam can beat its worst finished one, by the rule of transformers'
    beam search.
    """

    def __init__(
        self, settings: SamplingSettings, keys: Sequence[str], ends: EndTokens, stops: StopCheck | None, device: Device
    ) -> None:
        self.settings, self.stops, self.width, self.device = settings, stops, settings.width, device
        self.groups, self.size = settings.groups, settings.num_beams // settings.groups
        self.end_sets = [set(tokens) for tokens in ends]
        self.ends = _padded(ends, device)
        most = max((len(ends) for ends in self.end_sets), default=0)
        self.keep = max(2, 1 + most) * self.size  # candidates a group: enough to go on if all the best ones end
        shape, steps = (len(keys), self.groups, self.size), settings.max_new_tokens
        self.running = torch.full(shape, NEVER, dtype=torch.float32, device=device)
        self.running[:, :, 0] = 0.0  # the first step must not draw the same token for all beams
        self.sequences = torch.zeros(*shape, steps, dtype=torch.long, device=device)
        # No number: by a negative length penalty a finished beam's score can be below any.
        self.finished = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self.finished_sequences = torch.zeros(*shape, steps, dtype=torch.long, device=device)
        self.finished_lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.improvable = torch.ones(shape[:2], dtype=torch.bool, device=device)
        self.step = 0

    def advance(self, logits: Tensor, slots: Tensor) -> Advance:
        live = slots[:: self.width] // self.width if self.step else torch.arange(len(self.running), device=self.device)
        values, tokens = self._candidates(logits)
        if self.step == 0:
            values, tokens = values.repeat_interleave(self.width, 0), tokens.repeat_interleave(self.width, 0)
        shape = (len(live), self.groups, self.size, -1)
        values, tokens = values.to(self.running.dtype).view(shape), tokens.view(shape)
        chosen = torch.empty(len(live), 0, dtype=torch.long, device=self.device)
        parents = torch.empty(len(live), self.groups, self.size, dtype=torch.long, device=self.device)
        for group in range(self.groups):
            parents[:, group] = self._advance_group(group, live, values[:, group], tokens[:, group], chosen)
            picked = self.sequences[live, group, :, self.step]
            chosen = torch.cat([chosen, picked.masked_fill(~self.improvable_before[:, None], -1)], dim=1)
        self.step += 1
        self._close(live)
        if self.step == self.settings.max_new_tokens:
            return Advance(slots[:0], slots[:0], slots[:0])
        if self.step % kernels_for(logits.device).steps_between_checks() == 0:
            # Until then a query whose groups have all ended goes on, and takes nothing more in.
            going = self.improvable[live].any(dim=1).nonzero()[:, 0]
            live, parents = live[going], parents[going]
        offsets = torch.arange(self.groups, device=self.device)[:, None] * self.size
        base = live[:, None] * self.width
        every = torch.arange(self.width, device=self.device)
        next_tokens = self.sequences[live, :, :, self.step - 1].view(-1)
        return Advance((base + every).flatten(), (base + (parents + offsets).flatten(1)).flatten(), next_tokens)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The best log-probabilities and tokens a row: those kept and as many as penalties could push out."""
        kernels = kernels_for(logits.device)
        count = min(self.keep + self.width - self.size, logits.shape[-1])
        values, tokens = [], []
        for part in logits.split(kernels.sampling_rows(logits.shape[-1])):
            scores = part.double() if part.dtype == torch.float64 else part.float()
            if self.settings.temperature != 1.0:
                scores = scores / self.settings.temperature
            best, indices = kernels.top(scores, count)
            highest = best[:, :1]
            rest = kernels.exp_(scores - highest).sum(dim=-1, keepdim=True).log()
            indices, order = indices.sort(dim=-1)  # by token: of equals the first is the lowest
            values.append(best.gather(1, order) - highest - rest)
            tokens.append(indices)
        if values[0].dtype == torch.float64 and self.running.dtype != torch.float64:
            self.running, self.finished = self.running.double(), self.finished.double()
        return torch.cat(values), torch.cat(tokens)

    def _advance_group(self, group: int, live: Tensor, values: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Advance one group of all live queries; returns each beam's parent within the group, [n, size]."""
        if chosen.shape[1] and self.settings.diversity_penalty:
            times = (tokens[..., None] == chosen[:, None, None, :]).sum(dim=-1)
            values = values - self.settings.diversity_penalty * times
        totals = (values + self.running[live, group][:, :, None]).flatten(1)
        best, candidates = _best(totals, self.keep)
        parent = candidates // values.shape[-1]
        token = tokens.flatten(1).gather(1, candidates)
        sequences = self.sequences[live, group].gather(1, parent[:, :, None].expand(-1, -1, self.sequences.shape[-1]))
        sequences[:, :, self.step] = token
        ended = (token[:, :, None] == self.ends[live][:, None, :]).any(dim=-1)
        if self.stops is not None:
            hit = [[self.stops(row) for row in rows] for rows in sequences[:, :, : self.step + 1].tolist()]
            ended |= torch.tensor(hit, device=self.device)
        # What goes on is also what later groups avoid, at the last step too, where then all candidates end.
        running, following = _best(best + ended * NEVER, self.size)
        if self.step + 1 == self.settings.max_new_tokens:
            ended = torch.ones_like(ended)
        self.improvable_before = self.improvable[live, group]
        self._finish(group, live, best, sequences, ended)
        self.running[live, group] = running
        wide = following[:, :, None].expand(-1, -1, sequences.shape[-1])
        self.sequences[live, group] = sequences.gather(1, wide)
        return parent.gather(1, following)

    def _finish(self, group: int, live: Tensor, totals: Tensor, sequences: Tensor, ended: Tensor) -> None:
        """Keep the best finished beams of a group; only its best ``size`` candidates may enter."""
        ended = ended.clone()
        ended[:, self.size :] = False
        allowed = self.improvable[live, group]
        if self.settings.early_stopping:
            allowed = allowed & ~self.is_finished[live, group].all(dim=-1)
        scores = totals / (self.step + 1) ** self.settings.length_penalty
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # where it overflows it is still above an empty place
        scores = scores.masked_fill(~(ended & allowed[:, None]), -math.inf)
        merged = torch.cat([self.finished[live, group], scores], dim=1)
        best, kept = _best(merged, self.size)
        lengths = torch.full_like(ended, self.step + 1, dtype=torch.long)
        self.finished[live, group] = best
        is_finished = torch.cat([self.is_finished[live, group], ended], dim=1)
        self.is_finished[live, group] = is_finished.gather(1, kept)
        lengths = torch.cat([self.finished_lengths[live, group], lengths], dim=1)
        self.finished_lengths[live, group] = lengths.gather(1, kept)
        merged_sequences = torch.cat([self.finished_sequences[live, group], sequences], dim=1)
        wide = kept[:, :, None].expand(-1, -1, sequences.shape[-1])
        self.finished_sequences[live, group] = merged_sequences.gather(1, wide)

    def _close(self, live: Tensor) -> None:
        """A group ends when its best running beam, at its present length, cannot beat its worst finished one."""
        attainable = self.running[live, :, 0] / self.step**self.settings.length_penalty
        full = self.is_finished[live].all(dim=-1)
        improvable = self.improvable[live] & (~full | (attainable > self.finished[live].amin(dim=-1)))
        if self.settings.early_stopping:
            improvable &= ~full
        self.improvable[live] = improvable

    def results(self) -> list[list[Response]]:
        """The best ``num_responses`` finished beams of all groups, best first; of equals the earlier group's."""
        results = []
        flat = self.finished.flatten(1)
        order = torch.argsort(flat, dim=1, descending=True, stable=True)[:, : self.settings.responses]
        for query, beams in enumerate(order.tolist()):
            responses = []
            for beam in beams:
                group, member = divmod(beam, self.size)
                length = int(self.finished_lengths[query, group, member])
                tokens = self.finished_sequences[query, group, member, :length].tolist()
                finish, end = "length", None
                if tokens and tokens[-1] in self.end_sets[query]:
                    *tokens, end = tokens
                    finish = "stop"
                elif self.stops is not None and self.stops(tokens):
                    finish = "stop"
                responses.append(Response(tokens, finish, end))
            results.append(responses)
        return results
