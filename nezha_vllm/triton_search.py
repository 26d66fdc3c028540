"""The beam search as a fixed sequence of Triton launches: no host synchronisation, so it can be one CUDA graph.

For N requests of up to K beams each level is: matrix products, scores with validity, exact selection, next states (the
last level has no next states). Item scores are two launches more, see `triton_items`. `Plan` holds what is fixed for a
head and a catalogue, `Workspace` the buffers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nezha_vllm.draft_head import DraftHead
from nezha_vllm.kernels.linear import beam_products, context_states, few_request_products, request_products
from nezha_vllm.kernels.score import score_children
from nezha_vllm.kernels.select import select_beams
from nezha_vllm.search_memory import FANS, BeamRows, Geometry, Workspace, tiles_of
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.triton_items import ItemKernels

if TYPE_CHECKING:
    from nezha_vllm.item_scores import ItemScores

PIECE = 1 << 22  # prefixes looked up in one go
MAX_ROWS = 32_768  # beams in one launch: 64 requests at K = 512, at H = 2048 and T = 512 a workspace of 350 MB
MAX_SCORE_BYTES = 1 << 30  # of one launch's log-probabilities: fewer beams where levels have many codes
# Prefix tables may hold this many lower bounds or twice as many as there are keys: 8 MB for small catalogues.
MIN_TABLE = 1 << 21
IN_ONE_GO = 16_384  # values that one program keeps in registers while it searches for a threshold
ALL, ONLY, ALL_BUT = 0, 1, 2  # kinds of rules
FEW = 4  # requests up to which what depends on them alone is computed without matrix units
FEW_TILE, TILE = 8, 32  # rows of weights a program then multiplies, and otherwise
LIBRARY_ROWS = 2048  # beams from which cuBLAS is ahead of our kernel: 454 against 540 µs at 32,768


@dataclass(frozen=True)
class _Level:
    size: int
    suffix: int
    first_weight: int
    bias: int
    table: Tensor | None


class Plan:
    """Weights, code drives and prefix tables, laid out for the kernels; made once a head and catalogue.

    ``weights`` is [Σ (T_l + H), H]: W_1, W_hh,1, W_2, W_hh,2, …, W_L.
    """

    def __init__(self, head: DraftHead, keys_M: Tensor, item_scores: ItemScores | None = None) -> None:
        assert len(keys_M) < 2**31, "positions among the keys are int32"
        self.codec = SemanticIdCodec(head.codebook_sizes)
        self.keys, self.num_keys = keys_M, len(keys_M)
        self.hidden_size = head.logit_heads[0].in_features
        assert self.hidden_size % 64 == 0, f"hidden size {self.hidden_size} is no multiple of 64"
        rows: list[Tensor] = []
        for level, logit_head in enumerate(head.logit_heads):
            rows.append(logit_head.weight)
            if level + 1 < head.num_levels:
                rows.append(head.cells[level].weight_hh)
        self.weights = torch.cat(rows).contiguous()
        self.code_drives = [
            (drive.float() + cell.bias_hh.float()).to(self.weights.dtype)
            for drive, cell in zip(head.code_drives(), head.cells, strict=True)
        ]
        self.over_catalogue = head.over_catalogue
        self.precision = "ieee" if self.weights.dtype == torch.float32 else "tf32"
        self.items = None if item_scores is None else ItemKernels(item_scores)  # the same over every catalogue
        self._lay_out()
        self.alone = torch.tensor([self.entry()], device=self.weights.device)

    def _lay_out(self) -> None:
        codec, hidden_size = self.codec, self.hidden_size
        self.levels: list[_Level] = []
        parts: list[tuple[int, int, int, int, int]] = []
        weight_row = column = 0

        for level, (size, suffix) in enumerate(zip(codec.codebook_sizes, codec.suffix_sizes, strict=True)):
            self.levels.append(_Level(size, suffix, weight_row, column, self._table(codec.capacity // suffix, suffix)))
            parts.append((weight_row, size, *((0, 1) if level == 0 else (level + 1, -1)), column))
            weight_row, column = weight_row + size, column + size
            if level + 1 < codec.num_levels:
                if level == 0:
                    self.root_drives = column
                    parts.append((weight_row, hidden_size, 0, -1, column))
                    column += hidden_size
                weight_row += hidden_size
        self.root_columns = column
        self.few_tiles, self.tiles = (
            torch.tensor(tiles_of(parts, height), dtype=torch.int32, device=self.weights.device)
            for height in (FEW_TILE, TILE)
        )

    @property
    def most_rows(self) -> int:
        """Beams that a launch may have."""
        return min(MAX_ROWS, MAX_SCORE_BYTES // (4 * max(self.codec.codebook_sizes)))

    def _table(self, num_prefixes: int, suffix: int) -> Tensor | None:
        if num_prefixes + 1 > max(MIN_TABLE, 2 * self.num_keys):
            return None
        return _lower_bounds(self.keys, num_prefixes, suffix)

    @property
    def table_bytes(self) -> int:
        return sum(level.table.nbytes for level in self.levels if level.table is not None)

    def over(self, keys_M: Tensor) -> Plan:
        """The same for another catalogue of the same levels; where this one has tables, that one has them, too."""
        other = copy.copy(self)
        other.keys, other.num_keys = keys_M, len(keys_M)
        other.levels = [
            replace(
                level, table=None if level.table is None else _lower_bounds(keys_M, len(level.table) - 1, level.suffix)
            )
            for level in self.levels
        ]
        other.alone = torch.tensor([other.entry()], device=keys_M.device)
        return other

    def entry(self, ranks: Tensor | None = None) -> list[int]:
        """The catalogue as a line of ``catalogues`` in `search`: addresses of arrays that the caller keeps alive.

        Args:
            ranks: int32, arrays [M + 1] one behind the other, see `SegmentRanks`; None if there are no segments.
        """
        tables = [0 if level.table is None else level.table.data_ptr() for level in self.levels]
        return [self.keys.data_ptr(), self.num_keys, 0 if ranks is None else ranks.data_ptr(), *tables]

    def search(
        self,
        work: Workspace,
        hidden_NSH: Tensor,
        options_8N: Tensor,
        out: Tensor,
        width: int,
        positions: Tensor | None = None,
        catalogues: Tensor | None = None,
    ) -> None:
        """Launch the search of N requests; ``out`` int32 [N, 2 + K · (1 + L)] gets what `pack_answer` describes.

        Args:
            hidden_NSH: contiguous, of the weights' dtype.
            options_8N: int32, contiguous, a row an option: the beam width of each request, at most ``width``; 1 for
                stepwise validity, 0 for final; 1 for a request, 0 for a row that is to be left out; its rule, 0 for
                none, 1 for only the semantic IDs at positions[begin:end], 2 for all but those; begin; end; -1, or
                with rule 2 where the ranks of its combination of segments begin, which then stands for all; which of
                the ``catalogues`` it is searched in.
            width: K, a `width_bucket`.
            positions: int32, positions among the keys, ascending within each rule; None if there are no rules.
            catalogues: int64, a line a catalogue, as `entry` makes it; None for this plan's own without segments.
        """
        assert options_8N.is_contiguous(), "kernels count on rows of N numbers"
        positions = options_8N if positions is None else positions
        catalogues = self.alone if catalogues is None else catalogues
        num_requests = len(hidden_NSH)
        rows = num_requests * width
        parents = replace(work.beams[0], counts=options_8N[2])
        self._request_products(work, hidden_NSH)
        for index in range(len(self.levels)):
            children = work.beams[1 + index % 2]
            if index > 0:
                self._beam_products(work, index, rows, width, parents)
            self._select(work, index, num_requests, width, parents, children, options_8N, positions, catalogues, out)
            if index + 1 < len(self.levels):
                self._states(work, index, rows, width, children)
            parents = children
        if self.items is not None:
            self.items(hidden_NSH, parents, out, width)

    def _request_products(self, work: Workspace, hidden_NSH: Tensor) -> None:
        num_requests, num_states, hidden_size = hidden_NSH.shape
        few = num_requests <= FEW
        tiles = self.few_tiles if few else self.tiles
        arguments = (hidden_NSH, self.weights, tiles, work.by_request, num_requests, work.by_request.stride(0))
        if few:
            few_request_products[(len(tiles),)](
                *arguments,
                S=num_states,
                H=hidden_size,
                BLOCK_C=FEW_TILE,
                BLOCK_H=triton.next_power_of_2(hidden_size),
                num_warps=8,
            )
            return
        block = 16 if num_requests <= 16 else 32 if num_requests <= 32 else 64
        request_products[(len(tiles), triton.cdiv(num_requests, block))](
            *arguments,
            S=num_states,
            H=hidden_size,
            BLOCK_N=block,
            BLOCK_C=TILE,
            BLOCK_H=32 if self.weights.dtype == torch.float32 else 128 if hidden_size % 128 == 0 else 64,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=4,
        )

    def _beam_products(self, work: Workspace, index: int, rows: int, width: int, beams: BeamRows) -> None:
        level, last = self.levels[index], index + 1 == len(self.levels)
        states, row_size = work.states[:rows], self.geometry(index, width).row_size
        weights = self.weights[level.first_weight :][: level.size + (0 if last else self.hidden_size)]
        if rows >= LIBRARY_ROWS and self.weights.dtype != torch.float32:
            logits = work.logits.view(-1)[: rows * row_size].view(rows, row_size)[:, : level.size]
            torch.mm(states, weights[: level.size].t(), out_dtype=torch.float32, out=logits)
            if not last:
                torch.mm(states, weights[level.size :].t(), out=work.drives[:rows])
            return
        block_m, block_c, block_h, warps, stages = self._blocks(rows, len(weights))
        columns = [level.size] if last else [level.size, self.hidden_size]
        programs = triton.cdiv(rows, block_m) * sum(triton.cdiv(count, block_c) for count in columns)
        beam_products[(programs,)](
            TensorDescriptor.from_tensor(states, [block_m, block_h]),
            TensorDescriptor.from_tensor(weights, [block_c, block_h]),
            work.logits,
            work.drives,
            beams.counts,
            rows,
            level.size,
            row_size,
            K=width,
            H=self.hidden_size,
            WITH_DRIVES=not last,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            BLOCK_H=block_h,
            GROUP=8,
            PRECISION=self.precision,
            num_warps=warps,
            num_stages=stages,
        )

    def _blocks(self, rows: int, columns: int) -> tuple[int, int, int, int, int]:
        """Rows, columns and depth of a block of the matrix product, warps, stages: tuned on an H100."""
        deep = 128 if self.hidden_size % 128 == 0 else 64
        if self.weights.dtype == torch.float32:
            return (16, 32, 32, 4, 3) if rows <= 64 else (64, 64, 32, 4, 3)
        if rows <= 32:
            return max(16, rows), 32, deep, 4, 4
        if rows * columns <= 512 * 1024:
            return 64, 64, deep, 4, 4
        if rows * columns <= 512 * 4096:
            return 64, 128, 64, 4, 4
        return 128, 128, 64, 8, 3

    def geometry(self, index: int, width: int) -> Geometry:
        parents = 1
        for level in self.levels[:index]:
            parents = min(width, parents * level.size)
        size = self.levels[index].size
        # selection looks at parents · size / fan² groups and then twice at width · fan others
        ideal = (parents * size / width) ** (1 / 3)
        fan = min(FANS, key=lambda fan: abs(math.log(fan / ideal)))
        return Geometry(parents, fan, triton.cdiv(size, fan * fan))

    def _select(
        self,
        work: Workspace,
        index: int,
        num_requests: int,
        width: int,
        parents: BeamRows,
        children: BeamRows,
        options_8N: Tensor,
        positions: Tensor,
        catalogues: Tensor,
        out: Tensor,
    ) -> None:
        level, root = self.levels[index], index == 0
        shape = self.geometry(index, width)
        fan, groups = shape.fan, shape.groups
        block = max(fan * fan, triton.next_power_of_2(level.size))
        logits = work.by_request[:, level.bias :] if root else work.logits
        score_children[(num_requests if root else num_requests * width,)](
            logits,
            work.by_request[:, level.bias :],
            parents.scores,
            parents.prefixes,
            parents.lows,
            parents.highs,
            options_8N,
            positions,
            parents.counts,
            catalogues,
            work.logits,
            work.maxima,
            work.group_maxima,
            num_requests,
            work.by_request.stride(0) if root else shape.row_size,
            work.by_request.stride(0),
            level.size,
            level.suffix,
            groups,
            catalogues.shape[1],
            index,
            K=width,
            ROOT=root,
            IN_TABLE=level.table is not None,
            OVER_CATALOGUE=self.over_catalogue,
            BLOCK=block,
            FAN=fan,
            num_warps=min(8, max(1, block // 256)),
        )
        most_groups = shape.most_parents * groups
        most_chunks = min(width, most_groups) * fan
        sizes = [most_groups, most_chunks, min(width, most_chunks) * fan]
        most = max(32, triton.next_power_of_2(max(sizes)))
        block = min(most, IN_ONE_GO)
        select_beams[(num_requests,)](
            work.logits,
            work.maxima,
            work.group_maxima,
            work.chosen,
            work.values,
            parents.counts,
            parents.scores,
            parents.prefixes,
            parents.lows,
            parents.highs,
            parents.history,
            children.counts,
            children.scores,
            children.prefixes,
            children.lows,
            children.highs,
            children.history,
            work.parents,
            work.codes,
            options_8N,
            positions,
            catalogues,
            out,
            num_requests,
            level.size,
            level.suffix,
            groups,
            work.chosen.shape[1],
            out.stride(0),
            catalogues.shape[1],
            K=width,
            L=len(self.levels),
            LEVEL=index,
            IN_TABLE=level.table is not None,
            FAN=fan,
            BLOCK=block,
            ONE=block == most,
            ITEM_SCORES=self.items is not None,
            num_warps=min(16, max(4, block // 256)),
        )

    def _states(self, work: Workspace, index: int, rows: int, width: int, beams: BeamRows) -> None:
        if index == 0:
            drives, request_stride, parent_stride = work.by_request[:, self.root_drives :], work.by_request.stride(0), 0
        else:
            drives, request_stride, parent_stride = work.drives, width * self.hidden_size, self.hidden_size
        context_states[(rows,)](
            self.code_drives[index],
            drives,
            work.codes,
            work.parents,
            beams.counts,
            work.states,
            request_stride,
            parent_stride,
            K=width,
            H=self.hidden_size,
            BLOCK_H=min(2048, triton.next_power_of_2(self.hidden_size)),
            num_warps=4,
        )


def _lower_bounds(keys_M: Tensor, num_prefixes: int, suffix: int) -> Tensor:
    """Position of the first key of each prefix and of the end, int32 [num_prefixes + 1].

    In pieces: while a later catalogue is read, a step of requests waits for one of them at most.
    """
    bounds = torch.empty(num_prefixes + 1, dtype=torch.int32, device=keys_M.device)
    for start in range(0, num_prefixes, PIECE):
        end = min(start + PIECE, num_prefixes)
        lows = torch.arange(start, end, device=keys_M.device) * suffix
        torch.searchsorted(keys_M, lows, out_int32=True, out=bounds[start:end])
    bounds[-1] = len(keys_M)
    return bounds
