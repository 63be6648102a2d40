"""A checkpoint is restored on another mesh than that which saved it, bit for bit."""

from tests.distributed.test_meshes import printed


def test_checkpoints_are_restored_on_other_meshes():
    same = {"same": True, "placed": True, "changed": True}
    rows = {"fsdp to one": 256, "data to fsdp": 32, "one to mixed": 64}
    assert printed("other_placement") == {name: same | {"rows": number} for name, number in rows.items()}
