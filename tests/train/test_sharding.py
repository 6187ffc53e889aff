"""Which part of a weight a rank holds."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backfire.train.ranks import Ranks
from backfire.train.sharding import local, part_of, shard, whole
from tests.helpers.ranks import joined, together

WHOLE = torch.arange(20.0).view(5, 4)  # five rows, of which two ranks have three and two


def test_parts_are_those_of_the_rank_in_the_present_process_group(tmp_path: Path) -> None:
    """Not in an earlier one, in which the process had another rank."""

    def work(ranks: Ranks) -> list[list[Tensor]]:
        found = []
        for turn in range(2):
            if turn:
                dist.destroy_process_group()
                ranks = joined(tmp_path / "again", 1 - ranks.rank, 2)
            model = nn.Linear(4, 5, bias=False)
            nn.init.zeros_(model.weight)
            shard(model, ranks)  # type: ignore[arg-type]
            copied = model.weight.detach().clone() + 0.0
            parts = [part_of(WHOLE, model.weight), part_of(WHOLE, copied)]
            assert all(torch.equal(whole(part), WHOLE) for part in parts)
            found.append([local(part) for part in parts])
        return found

    first, second = together(2, tmp_path / "group", work)
    for turn, (upper, lower) in enumerate([(first, second), (second, first)]):
        assert all(torch.equal(part, WHOLE[:3]) for part in upper[turn])
        assert all(torch.equal(part, WHOLE[3:]) for part in lower[turn])
