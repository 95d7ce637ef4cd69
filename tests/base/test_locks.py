"""Processes that share work do each piece once, in order, and take over the pieces of one that died."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwc.base.work_sharing import claimed

PARENT = {2: 0, 3: 1, 4: 3, 5: 4}


def share(folder: Path, pieces=range(8), fail=None) -> list[int]:
    """Do a share of the work and mark each piece with a file. flock separates threads as it does processes."""
    mine = []
    pieces = claimed(
        pieces,
        lambda piece: (folder / f"{piece}.done").exists(),
        lambda piece: folder / f"{piece}.lock",
        lambda piece: piece not in PARENT or (folder / f"{PARENT[piece]}.done").exists(),
    )
    for piece in pieces:
        if piece == fail:
            raise RuntimeError("killed")
        assert piece not in PARENT or (folder / f"{PARENT[piece]}.done").exists()
        (folder / f"{piece}.done").touch(exist_ok=False)  # fails if another thread did it
        mine.append(piece)
    assert len(list(folder.glob("*.done"))) == 8  # everything is done when the loop ends
    return mine


def test_each_piece_is_done_once_after_what_it_waits_for(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(share, [tmp_path] * 3))
    assert sorted(piece for some in shares for piece in some) == list(range(8))


def test_a_piece_whose_holder_ended_is_taken_by_another(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        share(tmp_path, fail=3)
    assert sorted(share(tmp_path)) == [3, 4, 5, 6, 7]
