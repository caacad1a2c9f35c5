"""diffusers' autoencoders as codecs, by class: what they compute, who they are, tiles, and what is refused."""

import json
import shutil

import diffusers
import pytest
import torch

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import CONFIG, WEIGHTS, Vae, VaeCodec, unknown_vae, weights_hash
from dit.data.codecs.norm import LatentNorm, codec_norm
from dit.rng import Draws, Purpose
from tests.data.codecs.models import AUTOENCODERS, deep_compression, taesd, video
from tests.data.helpers import tiny_vae


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def build(path, **fields):
    return Vae(path=str(path), **fields).build()


def images(n=2, size=32):
    return Draws(0, 0, torch.arange(n), n).normal(Purpose.PRIOR, (3, size, size)).clamp(-1, 1)


# --- every class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_class_by_its_folder(tmp_path, name):
    make, factor, channels, has_posterior, own = AUTOENCODERS[name]
    theirs = make().eval().requires_grad_(False)  # with gradients torch takes other kernels
    theirs.save_pretrained(tmp_path)
    codec = build(tmp_path)
    assert type(codec.vae).__name__ == name
    assert (codec.factor, codec.channels, codec.has_posterior) == (factor, channels, has_posterior)
    with torch.no_grad():
        encoded = theirs.encode(images())
        kept = encoded[0] if not has_posterior else encoded.latent_dist.mean
        expected = torch.stack([kept, encoded.latent_dist.std], 1) if has_posterior else kept[:, None]
        assert torch.equal(codec.encode(images()), expected)
        assert torch.equal(codec.decode(kept), theirs.decode(kept).sample.clamp(-1, 1))
    identity = codec.identity()
    assert json.loads(json.dumps(identity)) == identity  # as a manifest keeps it
    assert identity == VaeCodec(make()).identity()  # before it was saved, and after
    assert identity["name"] == "vae"
    assert identity["sha256"] == weights_hash(theirs)
    if own is not None:
        scale, shift = own
        assert codec.norm == LatentNorm(mean=(shift,) * channels, std=(1 / scale,) * channels)
        assert codec_norm(identity) == codec.norm
    with torch.no_grad():
        next(codec.vae.parameters()).mul_(1.5)
    assert VaeCodec(codec.vae).identity()["sha256"] != identity["sha256"]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_other_dtypes_still_give_float32(tmp_path, name):
    AUTOENCODERS[name][0]().save_pretrained(tmp_path)
    half, whole = build(tmp_path, dtype="bfloat16"), build(tmp_path)
    assert half.identity() == whole.identity()
    moments = half.encode(images())
    assert moments.dtype == half.decode(moments[:, 0]).dtype == torch.float32
    error = (moments - whole.encode(images())).square().mean().sqrt()
    assert 0 < error < 0.05 * whole.encode(images()).square().mean().sqrt()


def test_decoding_what_is_vector_quantised_quantises():
    codec = VaeCodec(AUTOENCODERS["VQModel"][0]())
    codes = codec.vae.quantize.embedding.weight[:4].reshape(1, 2, 2, 5).movedim(-1, 1)  # (1, C, 2, 2)
    nearby = codes + 1e-4 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(codes), codec.decode(nearby))
    latents = codec.encode(images())[:, 0]
    codebook = codec.vae.quantize.embedding.weight
    distance = (latents.movedim(1, -1).reshape(-1, 1, 5) - codebook).norm(dim=-1).min(1).values
    assert distance.mean() > 0.01  # encode gives them before quantisation


def test_the_identity_of_a_kl_autoencoder_is_a_fixed_list():
    """Data sets out there carry it: a key more or less, and none of them is accepted any more."""
    identity = VaeCodec(tiny_vae()).identity()
    assert set(identity) == {"name", "config", "sha256"}
    assert identity["config"] == {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 3,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "act_fn": "silu",
        "norm_num_groups": 4,
        "scaling_factor": 0.25,
        "shift_factor": 0.5,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": False,
    }
    assert VaeCodec(tiny_vae(sample_size=512)).identity() == identity  # no part of the function
    assert VaeCodec(tiny_vae(scaling_factor=0.5)).identity() != identity
    assert VaeCodec(tiny_vae(seed=1)).identity()["sha256"] != identity["sha256"]


def test_the_hash_of_weights_is_what_it_was():
    """The same data sets carry this too."""
    module = torch.nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    assert weights_hash(module) == weights_hash(module.double())
    assert weights_hash(module) == "007f855f0c6065d8d18174d878477a3e261fce4604fb50259184ee17710c55b8"


def test_other_classes_give_their_whole_config():
    identity = VaeCodec(deep_compression()).identity()
    assert (identity["class"], identity["channels"]) == ("AutoencoderDC", 8)
    settings = {k: v for k, v in deep_compression().config.items() if not k.startswith("_")}
    assert identity["config"] == json.loads(json.dumps(settings))
    assert VaeCodec(deep_compression(scaling_factor=0.5)).identity() != identity


def test_the_identity_is_of_the_function_not_of_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert build(tmp_path / "copy").identity() == build(folder).identity()


def test_the_file_may_change_once_it_is_read(folder):
    codec = build(folder)
    before = codec.encode(images())
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert torch.equal(codec.encode(images()), before)


def test_a_vae_of_which_little_is_known_has_a_norm():
    assert codec_norm(unknown_vae(4, 0.5)) == LatentNorm(mean=(0.0,) * 4, std=(2.0,) * 4)


def test_a_factor_larger_than_the_first_probe():
    """DC-AE goes up to 128 pixels a latent pixel."""
    levels = {f"{side}_block_out_channels": (8,) * 8 for side in ("encoder", "decoder")}
    layers = {f"{side}_layers_per_block": (1,) * 8 for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((),) * 8 for side in ("encoder", "decoder")}
    types = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    assert VaeCodec(deep_compression(**levels, **layers, **scales, **types)).factor == 128


# --- tiles -------------------------------------------------------------------------------------------------

TILED = [n for n in AUTOENCODERS if n not in ("VQModel", "AsymmetricAutoencoderKL")]
TILE, LARGE = 32, 48  # in latent pixels


def waves(side, period):
    """(1, 3, side, side): the same in every tile but for the phase, so that whole and tiles see the same statistics."""
    y, x = torch.meshgrid(*[torch.arange(side) * (2 * torch.pi / period)] * 2, indexing="ij")
    return 0.9 * torch.stack([y.sin(), x.cos(), (x + y).sin()])[None]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def peak(codec, run):
    """The most numbers that any module inside gives at once."""
    sizes = []

    def see(module, inputs, output):
        sizes.append(output.numel() if isinstance(output, torch.Tensor) else 0)

    hooks = [m.register_forward_hook(see) for m in codec.vae.modules()]
    run()
    for hook in hooks:
        hook.remove()
    return max(sizes)


@pytest.mark.parametrize("name", TILED)
def test_tiles(name):
    make, factor, channels = AUTOENCODERS[name][:3]
    whole, tiled = VaeCodec(make()), VaeCodec(make(), tile=TILE * factor)
    assert whole.identity() == tiled.identity()
    for side in (TILE, TILE // 2):  # up to the tile: exactly the same
        small = images(2, side * factor)
        assert torch.equal(tiled.encode(small), whole.encode(small))
        latents = whole.encode(small)[:, 0]
        assert torch.equal(tiled.decode(latents), whole.decode(latents))
    large = waves(LARGE * factor, 7.3 * factor)
    assert tiled.encode(large).shape == whole.encode(large).shape
    assert correlation(tiled.encode(large)[:, 0], whole.encode(large)[:, 0]) > 0.99
    latents = 3 * waves(LARGE, 7.3).repeat(1, 3, 1, 1)[:, :channels]
    assert correlation(tiled.decode(latents), whole.decode(latents)) > 0.99
    part = (TILE / LARGE) ** 2 + 0.01
    assert peak(tiled, lambda: tiled.encode(large)) < part * peak(whole, lambda: whole.encode(large))
    assert peak(tiled, lambda: tiled.decode(latents)) < part * peak(whole, lambda: whole.decode(latents))


def test_tiles_of_an_image_that_is_not_square():
    whole, tiled = VaeCodec(taesd()), VaeCodec(taesd(), tile=TILE * 8)
    wide = waves(LARGE * 8, 60)[..., : 20 * 8, :]
    assert tiled.encode(wide).shape == whole.encode(wide).shape
    assert correlation(tiled.encode(wide), whole.encode(wide)) > 0.99
    assert peak(tiled, lambda: tiled.encode(wide)) < peak(whole, lambda: whole.encode(wide))


def test_tiles_that_cannot_be():
    for tile in (8, 20):
        with pytest.raises(
            ConfigError, match=rf"tile = {tile}: expected a multiple of 8 pixels .* from 16 on"
        ):
            VaeCodec(tiny_vae(), tile=tile)
    for name in set(AUTOENCODERS) - set(TILED):
        with pytest.raises(ConfigError, match=f"{name} cannot work in tiles .*set tile to null"):
            VaeCodec(AUTOENCODERS[name][0](), tile=TILE)
    with pytest.raises(ConfigError, match="AutoencoderTiny cannot work in tiles"):
        VaeCodec(taesd(latent_channels=16), tile=256)  # diffusers' tiling knows 4 channels alone


def test_tiles_by_configuration(folder):
    assert build(folder, tile=16).tile == 16


# --- what is refused ---------------------------------------------------------------------------------------


def test_autoencoders_of_videos_are_refused(tmp_path):
    video().save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"AutoencoderKLTemporalDecoder is an autoencoder of videos \(.*5 dim"
    ):
        build(tmp_path)


class Odd(torch.nn.Module):
    """What a model may do that no codec may."""

    def __init__(self, encode, decode=None):
        super().__init__()
        self.encode, self.decode = encode, decode


def latents_of(x):
    return diffusers.models.autoencoders.vae.EncoderOutput(latent=x)


def images_of(x):
    return diffusers.models.autoencoders.vae.DecoderOutput(sample=x)


REFUSED = {
    "one channel": (tiny_vae(in_channels=1), r"does not take an image of 3 channels .*1 channels"),
    "another size back": (Odd(latents_of, lambda z: images_of(z[..., 1:])), "and the same image"),
    "a vector of latents": (Odd(lambda x: latents_of(x.mean((2, 3))), images_of), r"latents of \(1, 3\)"),
    "noise": (Odd(latents_of, lambda z: images_of(z + torch.randn_like(z))), "another image each time"),
    "no known output": (Odd(lambda x: {"tokens": x}, images_of), "does not take an image.*'latent'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_no_codec(kind):
    model, words = REFUSED[kind]
    with pytest.raises(DataError, match=words):
        VaeCodec(model)


@pytest.mark.parametrize("name", ["UNet2DModel", "DDIMScheduler", "nothing", "utils", None])
def test_folders_of_other_things(folder, name):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, "_class_name": name}))
    with pytest.raises(DataError, match=rf"config.json: _class_name is '?{name}'?; expected an autoencoder"):
        build(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(DataError, match=r"config.json: not JSON"):
        build(folder)


def test_weights_of_another_model_are_refused(folder):
    """diffusers alone would fill what is missing with random numbers."""
    for changes, words in [
        ({"layers_per_block": 2}, r"missing keys: .*mixes two models"),
        (
            {"block_out_channels": (8, 16)},
            r"cannot load an AutoencoderKL .*size mismatch for encoder.down_blocks.1",
        ),
        ({"use_quant_conv": False}, r"unexpected keys: .*quant_conv.*mixes two models"),
    ]:
        tiny_vae(**changes).save_config(folder)
        with pytest.raises(DataError, match=words):
            build(folder)


def test_damaged_weights_are_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(DataError, match="cannot load an AutoencoderKL"):
        build(folder)


def test_pickled_weights_are_never_read(folder):
    torch.save(tiny_vae().state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(DataError, match=rf"{WEIGHTS} is missing; diffusion_pytorch_model.bin is a pickle"):
        build(folder)
