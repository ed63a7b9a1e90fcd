"""Records of sends and receives: which of them go through against each other."""

import pytest

from ttt_megatron.simulation.recording import Message, Wait, match

GROUP = (0, 1, 2), 0
OTHER = (0, 1, 2), 1


def send(rank, peer, shape=(4,), group=GROUP, dtype="torch.float32", kind="send"):
    return Message(kind=kind, rank=rank, peer=peer, group=group, shape=shape, dtype=dtype)


def receive(rank, peer, **other):
    return send(rank, peer, **other, kind="receive")


def test_messages_that_meet_are_counted():
    records = {
        0: [send(0, 1), receive(0, 2), Wait(index=1)],
        1: [receive(1, 0), Wait(index=0), send(1, 2)],
        2: [receive(2, 1), Wait(index=0), send(2, 0)],
    }
    assert match(records) == 3


def test_what_nobody_takes_or_sends_is_told():
    with pytest.raises(RuntimeError, match=r"rank 0's send to rank 1 of \[4\]"):
        match({0: [send(0, 1)], 1: []})
    with pytest.raises(RuntimeError, match="rank 1's receive from rank 0"):
        match({0: [], 1: [receive(1, 0), Wait(index=0)]})
    with pytest.raises(RuntimeError, match="ranks wait for ever"):
        match({0: [send(0, 1)], 1: [receive(1, 0, group=OTHER)]})
    with pytest.raises(RuntimeError, match="ranks wait for ever"):
        match({0: [send(0, 5)]})


def test_another_shape_or_dtype_than_expected_is_told():
    with pytest.raises(RuntimeError, match=r"receive from rank 0 of \[4\] .*meets .* of \[5\]"):
        match({0: [send(0, 1, shape=(5,))], 1: [receive(1, 0)]})
    with pytest.raises(RuntimeError, match="float64"):
        match({0: [send(0, 1, dtype="torch.float64")], 1: [receive(1, 0)]})


def test_ranks_that_wait_for_each_other_are_told():
    groups = (GROUP, OTHER)
    circle = {
        rank: [
            receive(rank, 1 - rank, group=groups[rank]),
            Wait(index=0),
            send(rank, 1 - rank, group=groups[1 - rank]),
        ]
        for rank in range(2)
    }
    with pytest.raises(RuntimeError, match="2 ranks wait for ever"):
        match(circle)


def test_two_that_send_to_each_other_first_need_a_group_each():
    """As NCCL has it: a pair's messages in one group go through in turn."""

    def both(groups):
        return {
            rank: [
                send(rank, 1 - rank, group=groups[rank]),
                receive(rank, 1 - rank, group=groups[1 - rank]),
                Wait(index=1),
            ]
            for rank in range(2)
        }

    assert match(both([GROUP, OTHER])) == 2
    with pytest.raises(RuntimeError, match=r"rank 1's send to rank 0 .* meets rank 0's send"):
        match(both([GROUP, GROUP]))
