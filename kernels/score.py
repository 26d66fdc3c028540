"""Candidates of a level: log-softmax of every beam's logits, minus infinity where the catalogue has nothing."""

import triton
import triton.language as tl

from .validity import catalogue_of, has_child, rule_of


@triton.jit(do_not_specialize=["num_requests", "words", "level"], do_not_specialize_on_alignment=["counts"])
def score_children(
    logits, bias, scores, prefixes, lows, highs, asked, positions, counts, catalogues,
    log_probs, maxima, group_maxima,
    num_requests, logit_stride, bias_stride, size, suffix, groups, words, level,
    K: tl.constexpr, ROOT: tl.constexpr, IN_TABLE: tl.constexpr, OVER_CATALOGUE: tl.constexpr,
    BLOCK: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """One program a beam, [N · K] of them; those beyond a request's beams do nothing. With ROOT, one a request.

    logits float32 [N · K, logit_stride], or [N, …] with ROOT; bias float32 [N, bias_stride] is added, except with ROOT.
    log_probs float32 [N · K, groups · FAN²], which may be ``logits`` itself: log p of each code, minus infinity for
    those that may not be taken. maxima float32 [N · K, groups · FAN] and group_maxima [N · K, groups]: the best score,
    beam and code together, of each FAN and each FAN² codes. OVER_CATALOGUE: in a stepwise request p is over the codes
    that lead to a key, whether its rule allows that key or not; else over all codes of the level.
    """
    if ROOT:
        request = tl.program_id(0)
        row = request * K
        source = request
    else:
        row = tl.program_id(0)
        request = row // K
        source = row
    if row % K < tl.load(counts + request):
        codes = tl.arange(0, BLOCK)
        exists = codes < size
        logit = tl.load(logits + source.to(tl.int64) * logit_stride + codes, mask=exists, other=float("-inf"))
        if not ROOT:
            logit += tl.load(bias + request.to(tl.int64) * bias_stride + codes, mask=exists, other=0.0)
        valid = exists
        if tl.load(asked + num_requests + request) != 0:
            # in front of the sums, which the loads' latency hides behind unless they wait for it
            prefix = tl.load(prefixes + row)
            keys, num_keys, ranks, table = catalogue_of(asked, num_requests, request, catalogues, words, level)
            if ROOT:  # no code yet: every key is below it
                low, high = num_keys * 0, num_keys
            else:
                low, high = tl.load(lows + row), tl.load(highs + row)
            inside = tl.minimum(codes, size - 1)
            rule, begin, end, ranks_at = rule_of(asked, num_requests, request)
            known, valid = has_child(
                keys, table, prefix, low, high, inside, size, suffix, rule, positions, begin, end, ranks, ranks_at,
                IN_TABLE,
            )  # fmt: skip
            if OVER_CATALOGUE:
                logit = tl.where(known & exists, logit, float("-inf"))
        shifted = logit - tl.max(logit, 0)
        log_p = shifted - tl.log(tl.sum(tl.exp(shifted), 0))
        # + 0.0 makes a zero positive; whatever is no number is no candidate
        log_p = tl.where(valid & (log_p == log_p), log_p + 0.0, float("-inf"))
        first = row.to(tl.int64) * groups
        tl.store(log_probs + first * (FAN * FAN) + codes, log_p, mask=codes < groups * (FAN * FAN))
        best = tl.max(tl.reshape(log_p, [BLOCK // FAN, FAN]), 1) + tl.load(scores + row)
        chunk = tl.arange(0, BLOCK // FAN)
        tl.store(maxima + first * FAN + chunk, best, mask=chunk < groups * FAN)
        best = tl.max(tl.reshape(best, [BLOCK // (FAN * FAN), FAN]), 1)
        group = tl.arange(0, BLOCK // (FAN * FAN))
        tl.store(group_maxima + first + group, best, mask=group < groups)
