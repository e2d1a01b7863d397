"""Who sees whom among flat tokens: sequences one after another, or candidates beside a shared prefix. Heavy: torch.

Shape legend: T tokens of all sequences, H query heads, G key/value heads, R = H/G, d head_dim, P prefix tokens,
N candidates, S suffix tokens of a candidate (the most, where they differ), L tokens whose final states are wanted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.linear import has_packed, product

_LOG2_E = math.log2(math.e)
_MANY = 1 << 17  # scores of a head
_SCORES = 1 << 19  # of those, at a time: two megabytes
_PREFIX_STEP = 32
_ALIGNED = 16  # numbers: where CUDA's kernel wants rows of a mask to begin
_TAME = 100.0  # 2 to it, to its negative and sums of thousands of such are plain floats

# keys and values of one sequence: per layer k_GPd and v_GPd
KeyValues = list[tuple[Tensor, Tensor]]


class Attention(Protocol):
    """Who sees whom among T tokens.

    wanted_L: the tokens whose final states are wanted, None for all; the others go as far as the last layer's keys and
    values.
    """

    wanted_L: Tensor | None

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """What each token takes from those it sees, [T, H, d]; in the last layer q and answer are of the wanted L."""
        ...


class PackedCausal:
    """Attention inside each of several sequences that lie one after another; keeps keys and values by sequence.

    states: False where only the kept keys and values are wanted, as of a prefix. device: of the tokens, CPU by default.
    """

    def __init__(self, lengths: Sequence[int], *, states: bool = True, device: torch.device | None = None) -> None:
        self._lengths = list(lengths)
        self.wanted_L: Tensor | None = None if states else torch.empty(0, dtype=torch.long, device=device)
        self.kept: list[KeyValues] = [[] for _ in lengths]

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        k_parts, v_parts = (torch.split(x.transpose(0, 1), self._lengths, dim=1) for x in (k_TGd, v_TGd))
        for kept, k, v in zip(self.kept, k_parts, v_parts, strict=True):
            kept.append((k.contiguous(), v.contiguous()))
        if not len(q_THd):
            return q_THd
        out = []
        for q, k, v in zip(torch.split(q_THd.transpose(0, 1), self._lengths, dim=1), k_parts, v_parts, strict=True):
            o = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            out.append(o[0].transpose(0, 1))
        return torch.cat(out)


class SharedPrefix:
    """Attention of candidates that see one prefix and themselves, never each other.

    Tokens of one request's candidates lie one after another, requests one after another. Cost is linear in N. What a
    token takes from the prefix and what it takes from its own candidate are computed apart by the fused kernel and
    joined by their log sums of exponentials (arXiv 2205.14135, section 3.1), so no [T, P] weights are ever in memory.
    """

    def __init__(
        self,
        prefixes: Sequence[KeyValues],
        suffix_lengths: Sequence[Sequence[int]],
        *,
        last_only: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """prefixes: per request. suffix_lengths: per request, tokens of each candidate (ragged is fine).

        last_only: the state of each candidate's last token is all that is wanted. device: of the tokens.
        """
        device = device or torch.device("cpu")
        self._prefixes, self._own = prefixes, [_Own.of(lengths, device) for lengths in suffix_lengths]
        self._tokens, self._candidates = [sum(n) for n in suffix_lengths], [len(n) for n in suffix_lengths]
        flat_N = torch.tensor([n for lengths in suffix_lengths for n in lengths], device=device)
        self.wanted_L = flat_N.cumsum(0) - 1 if last_only else None

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        of_last = len(q_THd) != len(k_TGd)
        queries = torch.split(q_THd, self._candidates if of_last else self._tokens)
        parts = zip(queries, *(torch.split(x, self._tokens) for x in (k_TGd, v_TGd)), strict=True)
        out = []
        for kv, own, (q, k, v) in zip(self._prefixes, self._own, parts, strict=True):
            prefix = _to_prefix(q, *kv[layer])
            out.append(_joined(prefix, own.of_last(q, k, v) if of_last else own.of_all(q, k, v)))
        return torch.cat(out) if len(out) > 1 else out[0]


class FilledUp:
    """SharedPrefix of one request in tensors whose sizes and places never change, filled up with what nobody sees.

    So the same forward can be played back for other requests: whoever holds the tensors changes what is in them.
    """

    def __init__(self, prefix: KeyValues, prefix_bias_P: Tensor, own_bias_NS: Tensor, last_N: Tensor) -> None:
        """The biases: 0 where there is a token, -inf where there is none; of each candidate the first is there.

        last_N: place of each candidate's last token among the N x S.
        """
        self._prefix, self._prefix_bias_P = prefix, prefix_bias_P
        n, s = own_bias_NS.shape
        self._own = _Own(n, s, own_bias_NS.device, own_bias_NS)
        self.wanted_L: Tensor | None = last_N

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        k_GPd, v_GPd = self._prefix[layer]
        mask = self._prefix_bias_P.to(q_THd.dtype)[None, None, None]
        prefix = _by_kernel(q_THd, k_GPd, v_GPd, mask)
        of = self._own.of_last if len(q_THd) != len(k_TGd) else self._own.of_all
        return _joined(prefix, of(q_THd, k_TGd, v_TGd))


class WithPrefixes:
    """Prefixes and the candidates that see them in one pass: the prefixes' tokens come first, then the candidates'.

    Of the last layer each candidate's last token is wanted, and the prefixes' keys and values, which `prefixes` keeps.
    """

    def __init__(self, prefixes: PackedCausal, prefix_tokens: int, candidates: SharedPrefix) -> None:
        """candidates: `last_only`, over lists of `prefixes.kept` and of others that are known."""
        assert candidates.wanted_L is not None
        self._prefixes, self._candidates, self._tokens = prefixes, candidates, prefix_tokens
        self.wanted_L: Tensor | None = candidates.wanted_L + prefix_tokens

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        p, of_last = self._tokens, len(q_THd) != len(k_TGd)
        head = self._prefixes(layer, q_THd[: 0 if of_last else p], k_TGd[:p], v_TGd[:p])
        tail = self._candidates(layer, q_THd if of_last else q_THd[p:], k_TGd[p:], v_TGd[p:])
        return tail if of_last else torch.cat([head, tail])


def _joined(prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax of two: what is taken from either, [T, H, d], and the log sums of exponentials, [T, H]."""
    (o_prefix, lse_prefix), (o_own, lse_own) = prefix, own
    return torch.lerp(o_prefix, o_own, torch.sigmoid(lse_own - lse_prefix)[..., None].to(o_own.dtype))


def _to_prefix(q_THd: Tensor, k_GPd: Tensor, v_GPd: Tensor) -> tuple[Tensor, Tensor]:
    """What each token takes from the whole prefix [T, H, d], and the log sum of exponentials of its scores [T, H]."""
    if len(q_THd) * k_GPd.shape[1] >= _MANY and k_GPd.dtype == torch.float32 and has_packed(k_GPd.device):
        return _by_products(q_THd, k_GPd, v_GPd)
    return _by_kernel(q_THd, k_GPd, v_GPd)


def _by_kernel(q_THd: Tensor, k_GPd: Tensor, v_GPd: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    o_HTd, lse_HT = (x[0] for x in _attend(q_THd.transpose(0, 1)[None], k_GPd[None], v_GPd[None], mask))
    return o_HTd.transpose(0, 1), lse_HT.transpose(0, 1)


class _Own:
    """What tokens take from their own candidate, the tokens of all candidates of a request at once.

    Candidates of different lengths are laid out padded to the longest; where all are equally long, as soft tokens are,
    nothing is copied.
    """

    def __init__(self, n: int, s: int, device: torch.device, bias_NS: Tensor | None = None) -> None:
        """Of N x S tokens, laid out already. bias_NS: -inf where there is none."""
        self._n, self._s, self._bias_NS = n, s, bias_NS
        # A padded place comes after every real one of its candidate, so causality alone hides it from real tokens.
        self._later_SS = torch.full((s, s), -torch.inf, device=device).triu_(1)
        self._row_A: Tensor | None = None  # A = N x S places
        self._real_T: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> _Own:
        """Of tokens that lie one after another."""
        own = cls(len(lengths), max(lengths), device)
        if min(lengths) < own._s:
            lengths_N1 = torch.tensor(lengths, device=device)[:, None]
            start_N1 = lengths_N1.cumsum(0) - lengths_N1
            step_S = torch.arange(own._s, device=device)
            real_NS = step_S < lengths_N1
            own._row_A = torch.where(real_NS, start_N1 + step_S, 0).flatten()
            own._real_T = real_NS.flatten().nonzero()[:, 0]
            own._bias_NS = torch.zeros(real_NS.shape, device=device).masked_fill_(~real_NS, -torch.inf)
        return own

    def of_all(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, from the tokens up to itself: [T, H, d] and log sums of exponentials [T, H]."""
        mask_SS = self._later_SS.to(q_THd.dtype)[None, None]
        o_NHSd, lse_NHS = _attend(self._heads(q_THd), self._heads(k_TGd), self._heads(v_TGd), mask_SS)
        o_THd, lse_TH = (x.transpose(1, 2).flatten(0, 1) for x in (o_NHSd, lse_NHS))
        if self._real_T is None:
            return o_THd, lse_TH
        return o_THd.index_select(0, self._real_T), lse_TH.index_select(0, self._real_T)

    def of_last(self, q_NHd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Of each candidate's last token, from all its tokens: [N, H, d] and [N, H]."""
        (n, h, d), g = q_NHd.shape, k_TGd.shape[1]
        mask = None if self._bias_NS is None else self._bias_NS.to(q_NHd.dtype)[:, None, None]
        o_NGRd, lse_NGR = _attend(q_NHd.reshape(n, g, -1, d), self._heads(k_TGd), self._heads(v_TGd), mask)
        return o_NGRd.reshape(n, h, d), lse_NGR.reshape(n, h)

    def _laid_out(self, x_THd: Tensor) -> Tensor:
        return x_THd if self._row_A is None else x_THd.index_select(0, self._row_A)

    def _heads(self, x_THd: Tensor) -> Tensor:
        """[N, H, S, d]."""
        return self._laid_out(x_THd).view(self._n, self._s, *x_THd.shape[1:]).transpose(1, 2)


def _attend(q_BHTd: Tensor, k_BGPd: Tensor, v_BGPd: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The fused kernel behind scaled_dot_product_attention, which also gives the log sums of exponentials [B, H, T]."""
    if q_BHTd.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTd, k_BGPd, v_BGPd, 0.0, False, attn_mask=mask
        )
        return found[0], found[1]
    (b, h, t, d), (g, p) = q_BHTd.shape, k_BGPd.shape[1:3]
    q_BGXd = q_BHTd.reshape(b, g, -1, d)  # X = R x T: this kernel wants as many heads of keys, and so none is copied
    if mask is not None:
        if mask.shape[2] > 1:
            mask = mask.repeat(1, 1, h // g, 1)
        mask = F.pad(mask, (0, -p % _ALIGNED))[..., :p].expand(b, g, q_BGXd.shape[2], p)
    o_BGXd, lse_BGX = torch.ops.aten._scaled_dot_product_efficient_attention(q_BGXd, k_BGPd, v_BGPd, mask, True)[:2]
    return o_BGXd.reshape(b, h, t, d), lse_BGX[..., : q_BGXd.shape[2]].reshape(b, h, t)


def _by_products(q_THd: Tensor, k_GPd: Tensor, v_GPd: Tensor) -> tuple[Tensor, Tensor]:
    """`_to_prefix` of many tokens: as fast as plain products are, where the fused kernel is a quarter of that.

    Scores are made a part at a time and stay in the processor's cache. They are logarithms to the base of 2, because
    powers of 2 are the cheaper ones.
    """
    (t, h, d), (g, p, _) = q_THd.shape, k_GPd.shape
    more = -p % _PREFIX_STEP  # a product is made ready when it first meets a size: few sizes
    k_GPd = F.pad(k_GPd * (_LOG2_E / math.sqrt(d)), (0, 0, 0, more))
    v_GdP = F.pad(v_GPd.transpose(1, 2), (0, more)).contiguous()
    o_THd, lse_TH = torch.empty_like(q_THd), q_THd.new_empty(t, h)
    # Where no score can leave the range of floats, the largest of a row need not be taken off first.
    tame = float(torch.maximum(q_THd.amax(), -q_THd.amin()) * k_GPd.abs().sum(-1).amax()) < _TAME
    rows = 1 << (max(_SCORES // (p + more), 64).bit_length() - 1)
    for head, start in itertools.product(range(h), range(0, t, rows)):
        part, kv = slice(start, start + rows), head * g // h
        weight_TP = product(q_THd[part, head], k_GPd[kv])
        if more:
            weight_TP[:, p:] = -torch.inf
        top_T1 = 0 if tame else weight_TP.amax(1, keepdim=True)
        total_T1 = (weight_TP if tame else weight_TP.sub_(top_T1)).exp2_().sum(1, keepdim=True)
        torch.div(product(weight_TP, v_GdP[kv]), total_T1, out=o_THd[part, head])
        lse_TH[part, head] = total_T1.log2_().add_(top_T1).squeeze(1)
    return o_THd, lse_TH.div_(_LOG2_E)
