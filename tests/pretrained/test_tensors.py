"""Parameter trees from safetensors and back, by the naming rule: layouts, precision, shards and errors."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.names import Naming, tensor_name
from sysdpo_jax.pretrained.params import load_params, stored_tensors
from sysdpo_jax.pretrained.tensors import Safetensors, write_safetensors

NAMING = Naming(
    rename=((r"^(?!head)", "model."),),
    stacked="layers",
    pointwise=r"proj_in\.weight$",
    aliases=((r"\.query\.", ".q."),),
    ignored=r"inv_freq$",
    copies=(("head.weight", "model.embed.weight"),),
)
# Our path -> (our shape, name and shape as PyTorch stores it); {} is the layer.
LEAVES = {
    "embed/embedding": ((7, 3), "model.embed.weight", (7, 3)),
    "layers/q/kernel": ((2, 3, 5), "model.layers.{}.q.weight", (5, 3)),
    "layers/norm/weight": ((2, 3), "model.layers.{}.norm.weight", (3,)),
    "conv_1/kernel": ((3, 2, 4, 6), "model.conv.1.weight", (6, 4, 3, 2)),
    "conv_1/bias": ((6,), "model.conv.1.bias", (6,)),
    "proj_in/kernel": ((4, 6), "model.proj_in.weight", (6, 4, 1, 1)),
}


def abstract(leaves=LEAVES):
    tree = {}
    for path, (shape, _, _) in leaves.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def stored(dtype=torch.float32):
    generator, made = torch.Generator().manual_seed(0), {}
    for shape, name, theirs in LEAVES.values():
        for layer in range(shape[0]) if "{}" in name else (0,):
            made[name.format(layer)] = torch.randn(theirs, generator=generator).to(dtype)
    return made


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def leaf(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree, np.float32)


def check_values(params, tensors):
    """Each leaf against PyTorch's own transpositions of the stored tensors, exactly."""
    for path, (_, name, _) in LEAVES.items():
        parts = [tensors[name.format(layer)] for layer in range(2)] if "{}" in name else [tensors[name]]
        parts = [part.float() for part in parts]
        if path.endswith("kernel"):
            parts = [part.permute(2, 3, 1, 0) if path.startswith("conv") else part.flatten(1).T for part in parts]
        expected = torch.stack(parts) if "{}" in name else parts[0]
        np.testing.assert_array_equal(leaf(params, path), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_round_trip_is_exact_in_every_precision(dtype, tmp_path):
    tensors = stored(dtype)
    params = load_params(abstract(), Safetensors(write(tmp_path / "in", tensors), "model"), NAMING)
    check_values(params, tensors)
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", "model", stored_tensors(params, NAMING))
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ((torch.bfloat16, torch.float32), "float32"),
        ((torch.float32, torch.bfloat16), "float32"),
        ((torch.bfloat16, torch.float16), "float32"),
        ((torch.float16, torch.float16), "float16"),
    ],
)
def test_of_layers_in_several_precisions_the_widest_is_kept(layers, kept, tmp_path):
    """No value is rounded, whichever layer is the first; parameters beside it keep their own precision."""
    tensors = stored(torch.bfloat16)
    for layer, dtype in enumerate(layers):
        name = f"model.layers.{layer}.q.weight"
        tensors[name] = (tensors[name].float() + 2.0**-10).to(dtype)
    params = load_params(abstract(), Safetensors(write(tmp_path, tensors), "model"), NAMING)
    assert params["layers"]["q"]["kernel"].dtype == kept
    assert params["embed"]["embedding"].dtype == "bfloat16"
    check_values(params, tensors)
    chosen = load_params(abstract(), Safetensors(tmp_path, "model"), NAMING, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(chosen)} == {jnp.dtype(ml_dtypes.bfloat16)}
    check_values(chosen, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_chosen_precision_is_that_of_a_cast(tmp_path):
    tensors = stored()
    params = load_params(abstract(), Safetensors(write(tmp_path, tensors), "model"), NAMING, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(ml_dtypes.bfloat16)}
    check_values(params, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_shards_are_written_read_and_indexed(tmp_path):
    tensors = stored()
    params = load_params(abstract(), Safetensors(write(tmp_path / "in", tensors), "model"), NAMING)
    out = tmp_path / "out"
    out.mkdir()
    write_safetensors(out, "model", stored_tensors(params, NAMING), shard_bytes=200)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert {file.name for file in files} == set(index["weight_map"].values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], tensors[name])
    check_values(load_params(abstract(), Safetensors(out, "model"), NAMING), tensors)


def test_old_names_buffers_and_tied_copies_are_understood(tmp_path):
    tensors = stored()
    old = {name.replace(".q.", ".query."): tensor for name, tensor in tensors.items()}
    old |= {"model.inv_freq": torch.ones(3, dtype=torch.int64), "head.weight": tensors["model.embed.weight"].clone()}
    check_values(load_params(abstract(), Safetensors(write(tmp_path / "a", old), "model"), NAMING), tensors)
    del old["model.embed.weight"]
    check_values(load_params(abstract(), Safetensors(write(tmp_path / "b", old), "model"), NAMING), tensors)
    differing = tensors | {"head.weight": tensors["model.embed.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"head\.weight: the configuration ties it to model\.embed\.weight"):
        load_params(abstract(), Safetensors(write(tmp_path / "c", differing), "model"), NAMING)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    tensors = stored()
    del tensors["model.layers.1.q.weight"], tensors["model.conv.1.bias"]
    tensors |= {"model.more": torch.ones(2), "model.embed.weight": torch.ones(8, 3)}
    with pytest.raises(CheckpointError) as caught:
        load_params(abstract(), Safetensors(write(tmp_path, tensors), "model"), NAMING)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 4 tensors do not fit the configuration beside it:"
    assert lines[1:] == [
        "  missing: model.conv.1.bias [6]",
        "  missing: model.layers.1.q.weight [5, 3]",
        "  unexpected: model.more",
        "  misshapen: model.embed.weight: the configuration says [7, 3], the file [8, 3]",
    ]


def test_pickles_are_refused_with_the_remedy(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin but no model\.safetensors: pickle files"):
        Safetensors(tmp_path, "model")


def test_damaged_missing_and_quantised_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors \(it holds nothing\)"):
        Safetensors(tmp_path, "model")
    good = write(tmp_path / "cut", stored()) / "model.safetensors"
    good.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Safetensors(good.parent, "model")
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="listed by its index but missing"):
        Safetensors(tmp_path, "model")
    quantised = stored() | {"model.conv.1.bias": torch.ones(6, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"tensor 'model\.conv\.1\.bias' is stored as I8, which is not supported"):
        load_params(abstract(), Safetensors(write(tmp_path / "int8", quantised), "model"), NAMING)


def test_names_follow_the_rule():
    name = tensor_name("down_blocks_0/attentions_1/to_out_0/kernel", Naming())
    assert name == "down_blocks.0.attentions.1.to_out.0.weight"
    assert tensor_name("layers/mlp/bias", Naming(stacked="layers")) == "layers.{layer}.mlp.bias"
    assert tensor_name("conv1/norm_out/weight", Naming()) == "conv1.norm_out.weight"


def test_each_device_is_given_its_block(tmp_path):
    """In a process of its own with 8 devices: every leaf cut over them, and only its blocks are asked of the file."""
    write(tmp_path, {"wide.weight": torch.arange(64.0).reshape(16, 4), "tall": torch.arange(8.0)})
    script = Path(__file__).with_name("sharded_load.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
