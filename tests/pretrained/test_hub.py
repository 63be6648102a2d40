"""Names on the hub: what is asked for and what is not, with a hub that serves local folders."""

import shutil
from fnmatch import fnmatch

import pytest
import torch

from sysdpo_jax import pretrained
from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.pretrained.sources import locate
from tests.pretrained.checkpoints import stable_diffusion_xl, vae, write_decoder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that publishes a folder; downloads copy what their patterns match. Returns the folder of downloads."""
    cache = tmp_path / "cache"

    def publish(folder, revision="v1"):
        wanted = revision

        def snapshot_download(repository, revision, allow_patterns):
            assert (repository, revision) == ("someone/model", wanted)
            for file in folder.rglob("*"):
                name = file.relative_to(folder).as_posix()
                if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                    (cache / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, cache / name)
            return str(cache)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return cache

    return publish


def test_of_a_decoder_the_safetensors_alone_are_downloaded(tmp_path, hub):
    write_decoder(tmp_path / "remote", "llama")
    for other in ("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "onnx/model.onnx"):
        (tmp_path / "remote" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "remote" / other).write_bytes(b"x")
    cache = hub(tmp_path / "remote")
    component, _ = pretrained.load("someone/model", revision="v1")
    assert component.decoder.config.num_hidden_layers == 4
    assert [file.name for file in cache.rglob("*") if file.suffix in (".bin", ".safetensors", ".onnx")] == [
        "model.safetensors"
    ]


@pytest.mark.slow
def test_of_a_pipeline_the_parts_that_are_read_are_downloaded_in_the_variant_that_there_is(tmp_path, hub):
    """The autoencoder has no fp16 file; the safety checker is left alone."""
    remote = tmp_path / "remote"
    pipe = stable_diffusion_xl()
    pipe.save_pretrained(remote)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, part).to(torch.float16)
        shutil.rmtree(remote / part)
        model.save_pretrained(remote / part, variant="fp16")
    (remote / "safety_checker").mkdir()
    (remote / "safety_checker" / "model.safetensors").write_bytes(b"x")
    cache = hub(remote)
    pretrained.load("someone/model", revision="v1", variant="fp16")
    assert sorted(file.relative_to(cache).as_posix() for file in cache.rglob("*.safetensors")) == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_repository_without_safetensors_is_refused_with_the_remedy(tmp_path, hub):
    write_decoder(tmp_path / "remote", "llama")
    (tmp_path / "remote" / "model.safetensors").rename(tmp_path / "remote" / "pytorch_model.bin")
    hub(tmp_path / "remote")
    with pytest.raises(CheckpointError, match=r"no safetensors weights .* pickle files are never read"):
        pretrained.load("someone/model", revision="v1")


def test_of_a_part_from_the_hub_its_own_weights_alone_are_downloaded(tmp_path, hub):
    """A repository of the part itself, and a whole pipeline that has it."""
    vae().save_pretrained(tmp_path / "part")
    stable_diffusion_xl().save_pretrained(tmp_path / "pipeline")
    vae(scaling_factor=0.5).save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "part" / "sdxl.vae.safetensors").write_bytes(b"x")
    cache = hub(tmp_path / "part", revision=None)
    assert locate("someone/model", part="vae") == cache
    assert [file.name for file in cache.rglob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    shutil.rmtree(cache)
    cache = hub(tmp_path / "pipeline", revision=None)
    component, _ = pretrained.load(tmp_path / "pipeline", parts={"vae": "someone/model", "scheduler": "someone/model"})
    assert component.codec.autoencoder.config.scaling_factor == 0.5
    assert [file.relative_to(cache).as_posix() for file in cache.rglob("*.safetensors")] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_what_is_replaced_or_left_out_is_not_downloaded(tmp_path, hub):
    stable_diffusion_xl().save_pretrained(tmp_path / "remote")
    vae().save_pretrained(tmp_path / "vae")
    cache = hub(tmp_path / "remote")
    pretrained.load("someone/model", revision="v1", parts={"vae": tmp_path / "vae"})
    assert {file.parent.name for file in cache.rglob("*.safetensors")} == {"unet", "text_encoder", "text_encoder_2"}


def test_a_repository_of_a_variant_alone_is_refused_with_the_remedy(tmp_path, hub):
    write_decoder(tmp_path / "remote", "llama")
    (tmp_path / "remote" / "model.safetensors").rename(tmp_path / "remote" / "model.fp16.safetensors")
    hub(tmp_path / "remote")
    with pytest.raises(CheckpointError, match="pass variant='fp16'"):
        pretrained.load("someone/model", revision="v1")
    pretrained.load("someone/model", revision="v1", variant="fp16")


def test_a_name_that_is_nowhere_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is no local path, and the hub does not give it"):
        pretrained.load("someone/no-such-model")
