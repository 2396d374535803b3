"""What the first process does for all of them."""

import pytest
import torch

from lightning_wgsef.network.sharding import on_first_process


@pytest.fixture
def process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_one_process_of_several(process, monkeypatch):
    """The first makes it and sends it, a failure included; the others make nothing."""
    sent = []
    real = torch.distributed.broadcast_object_list

    def broadcast(found):
        real(found)
        sent.append(list(found))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert on_first_process(lambda: [1.5]) == [1.5]

    def failing():
        raise KeyError("clock")

    with pytest.raises(ValueError, match=r"KeyError\('clock'\)"):
        on_first_process(failing)
    assert sent[0] == [[1.5], None]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for received in sent:
        monkeypatch.setattr(
            torch.distributed,
            "broadcast_object_list",
            lambda found, received=received: found.__setitem__(slice(None), received),
        )
        if received[1] is None:
            assert on_first_process(failing) == [1.5]
        else:
            with pytest.raises(ValueError, match="clock"):
                on_first_process(failing)
