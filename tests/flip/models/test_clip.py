"""Tests the CLIP model against a naive reference, its initial weights, and the cost formulas for it."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flip import model_costs
from flip.config.schema import MODEL_PRESETS, Augment, Compute, ImageTower, Model, TextTower
from flip.data.masking import visible_patches
from flip.models import clip, transformer
from flip.models.tiled_loss import contrastive_loss


def sized(name, pool="patches", padding="attend", radford=False, **fields):
    """The configuration of a preset. ``radford``: with the architecture of recipe clip."""
    row = MODEL_PRESETS[name]
    image = ImageTower(**row["image"], pool=pool)
    text = TextTower(**row["text"], padding=padding)
    model = Model(size=name, embed=row["embed"], image=image, text=text, **fields)
    if radford:
        return as_radford(model)
    return model


def as_radford(model):
    """Gives a model the architecture of recipe clip."""
    model.image.pool = "class"
    model.image.positions = "learned"
    model.image.norm_pre = True
    model.text.causal = True
    model.activation = "quick_gelu"
    model.norm_eps = 1e-5
    model.initialisation = "clip"
    return model


def tiny(pool="patches", attention="explicit", trained=True, padding="attend", **fields):
    """A tiny model. ``trained``: no bias is 0 and no gain is 1, so that a missing parameter changes outputs."""
    pair = clip.CLIPModel(sized("tiny", pool, padding, **fields), Augment(), attention)
    clip.init_weights(pair, 3)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in pair.named_parameters():
                if name not in pair.first_values:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pair


def inputs(b=3, count=20):
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (b, 64, 192), dtype=np.uint8))
    keep = torch.from_numpy(visible_patches(0, np.zeros(b, np.int64), np.arange(b), 64, count))
    tokens = torch.from_numpy(rng.integers(0, 1000, (b, 32), dtype=np.int32))
    return patches, keep, tokens


def visible(patches, keep):
    return patches.gather(1, keep.long()[..., None].expand(-1, -1, patches.shape[-1]))


def layer_norm(x, w, name):
    mean = x.mean(-1, keepdim=True)
    var = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def captions(b=8):
    """Token ids (b, 32) of captions with 0, 1, 4, 9, ... tokens; the last caption has all 32."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(1, 1000, (b, 32), dtype=np.int32))
    for i, row in enumerate(tokens[:-1]):
        row[i * i :] = 0
    return tokens


def reference_block(x, w, name, heads, held=None):
    """``held``: (b, T), the positions that attention may see."""
    y = layer_norm(x, w, name + ".norm1")
    rows = F.linear(y, w[name + ".attn.qkv.weight"], w[name + ".attn.qkv.bias"])
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in rows.chunk(3, dim=-1))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if held is not None:
        logits = logits.masked_fill(~held[:, None, None], -math.inf)
    weights = logits.softmax(-1)
    x = x + F.linear(
        (weights @ v).transpose(1, 2).flatten(2), w[name + ".attn.proj.weight"], w[name + ".attn.proj.bias"]
    )
    y = F.linear(layer_norm(x, w, name + ".norm2"), w[name + ".mlp.fc1.weight"], w[name + ".mlp.fc1.bias"])
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + F.linear(y, w[name + ".mlp.fc2.weight"], w[name + ".mlp.fc2.bias"])


def reference_table(grid, width):
    table = np.zeros((grid, grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                for half, position in enumerate((column, row)):
                    angle = position / 10000 ** (i / quarter)
                    table[row, column, 2 * half * quarter + i] = math.sin(angle)
                    table[row, column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return torch.from_numpy(table.reshape(grid * grid, width))


def reference_image(pair, tower, patches, keep):
    """Embeds all patches, adds positions, then drops masked patches: the order of the recipe. float64."""
    w = {name: p.double() for name, p in pair.image.named_parameters()}
    mean, std = (
        torch.tensor(v, dtype=torch.float64).repeat(patches.shape[-1] // 3) for v in (Augment().mean, Augment().std)
    )
    pixels = (patches.double() / 255 - mean) / std
    x = F.linear(pixels, w["patch.weight"], w["patch.bias"]) + reference_table(tower.size // tower.patch, tower.width)
    if keep is not None:
        x = torch.stack([row[chosen.long()] for row, chosen in zip(x, keep, strict=True)])
    x = torch.cat([w["class_token"].expand(len(x), 1, -1), x], dim=1)
    for i in range(tower.layers):
        x = reference_block(x, w, f"blocks.{i}", tower.heads)
    x = layer_norm(x, w, "norm")
    x = (x if tower.pool == "all" else x[:, 1:]).mean(1) @ w["projection.weight"].T
    return x / x.norm(dim=-1, keepdim=True)


def reference_text(pair, tower, tokens, places=None):
    """Computes all positions. If padding is masked, attention does not see it."""
    w = {name: p.double() for name, p in pair.text.named_parameters()}
    x = w["tokens.weight"][tokens.long()] + (w["positions"] if places is None else w["positions"][places.long()])
    held = None
    if tower.padding == "mask":
        held = (tokens != 0) | (torch.arange(tokens.shape[1]) == 0)
    for i in range(tower.layers):
        x = reference_block(x, w, f"blocks.{i}", tower.heads, held)
    x = layer_norm(x, w, "norm")[:, 0] @ w["projection.weight"].T
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("pool", ["patches", "all"])
@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@torch.no_grad()
def test_forward_matches_reference(pool, attention):
    pair = tiny(pool, attention)
    config = sized("tiny", pool)
    patches, keep, tokens = inputs()
    image, text, scale = pair(visible(patches, keep), keep, tokens)
    assert (image.shape, text.shape, scale.shape) == ((3, 48), (3, 48), (1,))
    assert (image.dtype, text.dtype, scale.dtype) == (torch.float32,) * 3
    assert torch.allclose(image.double(), reference_image(pair, config.image, patches, keep), atol=2e-6)
    assert torch.allclose(text.double(), reference_text(pair, config.text, tokens), atol=2e-6)
    reference = reference_image(pair, config.image, patches, None)
    assert torch.allclose(pair.encode_image(patches).double(), reference, atol=2e-6)
    assert torch.equal(text, pair.encode_text(tokens))


SHORTENED = torch.tensor([[0, 3, 4, 9, 20, 31], [0, 1, 2, 3, 4, 5]], dtype=torch.int16).repeat(4, 1)


@pytest.mark.parametrize("places", [None, SHORTENED], ids=["whole", "shortened"])
@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("padding", ["attend", "mask"])
def test_text_tower_matches_padded_reference_in_features_and_gradients(padding, attention, places):
    """Compares features and the gradients of all parameters. Only text with masked padding is packed."""
    pair = tiny(attention=attention, padding=padding)
    tower = sized("tiny", padding=padding).text
    if places is None:
        tokens = captions()
    else:
        tokens = captions().gather(1, places.long())
    towards = torch.randn(8, 48, generator=torch.Generator().manual_seed(2))
    parameters = dict(pair.text.named_parameters())
    features = F.normalize(pair.text(tokens, places), dim=-1)
    gradients = torch.autograd.grad((features * towards).sum(), list(parameters.values()))
    reference = reference_text(pair, tower, tokens, places)
    expected = torch.autograd.grad((reference * towards).sum(), list(parameters.values()))
    assert torch.allclose(features.double(), reference, atol=2e-6)
    for name, gradient, other in zip(parameters, gradients, expected, strict=True):
        assert torch.allclose(gradient, other, atol=1e-5 * float(other.abs().max()) + 1e-7), name
    rows = pair.text.token_indices(tokens)
    if padding == "mask":
        assert len(rows) == (tokens != 0).sum() + (tokens[:, 0] == 0).sum()
    else:
        assert rows is None


@torch.no_grad()
def test_text_features_are_independent_of_padding_only_if_masked():
    """With masked padding, features depend neither on the amount of padding nor on other captions of the batch."""
    short = captions()[2:3, :4]
    padded = captions()
    for padding, same in (("mask", True), ("attend", False)):
        text = tiny(padding=padding).text
        places = torch.arange(4)[None]
        assert torch.allclose(text(short, places), text(padded)[2:3], atol=2e-6) == same


def test_bucketed_lengths_add_rows_without_effect():
    pair = tiny(padding="mask")
    again = tiny(padding="mask")
    again.text.bucket_lengths = True
    tokens = captions(11)
    assert len(again.text.token_indices(tokens)) % 11 == 0
    assert len(again.text.token_indices(tokens)) > len(pair.text.token_indices(tokens))
    for model in (pair, again):
        model.text(tokens).square().sum().backward()
    assert torch.allclose(pair.text(tokens), again.text(tokens), atol=2e-6)
    for (name, p), q in zip(pair.text.named_parameters(), again.text.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * float(p.grad.abs().max())), name


def attend_by_sequence(q, k, v, offsets, key_offsets, longest, longest_key, window_size):
    """``varlen_attn`` by its definition: attention within each sequence of rows. Other rows are undefined."""
    assert torch.equal(offsets, key_offsets) and offsets.dtype == torch.int32 and longest == longest_key
    assert offsets[-1] == len(q) and offsets.diff().max() <= longest and offsets.diff().min() >= 0
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=window_size == (-1, 0))
        for a, b in itertools.pairwise(offsets.tolist())
        if a < b
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def text_gradients(pair, tokens):
    towards = torch.randn(len(tokens), 48, generator=torch.Generator().manual_seed(2)).to(tokens.device)
    features = F.normalize(pair.text(tokens), dim=-1)
    parameters = dict(pair.text.named_parameters())
    gradients = torch.autograd.grad((features * towards).sum(), list(parameters.values()))
    return {"features": features.detach(), **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.parametrize("recompute", ["no", "selective"])
@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("kind", [{"padding": "mask"}, {"radford": True}])
def test_packed_attention_matches_masked_attention(kind, bucketed, recompute, monkeypatch):
    tokens = captions(70)
    pair = tiny(attention="sdpa", **kind)
    masked = text_gradients(pair, tokens)
    pair.text.bucket_lengths = bucketed
    pair.set_recompute(recompute)
    monkeypatch.setattr(clip, "varlen_kernel", lambda *_: attend_by_sequence)
    for name, value in text_gradients(pair, tokens).items():
        assert torch.allclose(value, masked[name], atol=1e-5 * float(masked[name].abs().max())), name


@pytest.mark.gpu
@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("kind", [{"padding": "mask"}, {"radford": True}])
def test_packed_attention_matches_masked_attention_on_gpu(kind, bucketed, monkeypatch):
    """bf16 tolerance: 2 % of the features, and 2 % of all gradients together."""
    tokens = captions(70).cuda()
    pair = tiny(attention="sdpa", **kind).cuda()
    pair.text.bucket_lengths = bucketed
    with torch.autocast("cuda", torch.bfloat16):
        packed = text_gradients(pair, tokens)
        monkeypatch.setattr(clip, "varlen_kernel", lambda *_: None)
        masked = text_gradients(pair, tokens)
    apart, norm = (
        sum(float(value.square().sum()) for value in values)
        for values in ([packed[name] - masked[name] for name in masked], masked.values())
    )
    assert (packed["features"] - masked["features"]).abs().max() < 0.02 and 0 < apart < 0.02**2 * norm


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True), ({"head_width": 80}, True), ({"dtype": torch.float16}, True), ({"dtype": torch.float32}, False),
        ({"device": torch.device("cpu")}, False), ({"fused": False}, False), ({"head_width": 36}, False),
        ({"head_width": 264}, False), ({"capability": (7, 5)}, False), ({"kernel": None}, False),
        ({"deterministic": True}, False),
    ],
)  # fmt: skip
def test_varlen_kernel_is_used_only_on_supported_configurations(changes, expected, monkeypatch):
    arguments = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "fused": True, "head_width": 64}
    other = {"capability": (9, 0), "kernel": attend_by_sequence, "deterministic": False} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: other["capability"])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: other["deterministic"])
    monkeypatch.setattr(transformer, "_load_varlen", lambda: other["kernel"])
    kernel = transformer.varlen_kernel(**arguments | {name: v for name, v in changes.items() if name in arguments})
    assert (kernel is attend_by_sequence) == expected


@torch.no_grad()
def test_encode_image_with_all_patches_visible_equals_unmasked():
    pair = tiny()
    patches, _, _ = inputs()
    everything = torch.arange(64, dtype=torch.int16).expand(3, -1)
    assert torch.equal(pair.encode_image(patches, everything), pair.encode_image(patches))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int16).expand(3, -1)
    moved = pair.encode_image(visible(patches, order), order)
    assert torch.allclose(moved, pair.encode_image(patches), atol=2e-6)


@pytest.mark.long
@torch.no_grad()
def test_image_encoder_exports_with_dynamic_batch():
    """torch.export keeps the batch size symbolic. A constant in the graph would fix it to that of the example."""
    image = tiny(attention="sdpa").image.eval()
    patches = [inputs(b)[0] for b in (2, 1, 5)]
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(image, (patches[0],), dynamic_shapes=(batch,))
    for sample in patches:
        assert torch.allclose(program.module()(sample), image(sample), atol=1e-5)


@pytest.mark.parametrize("radford", [False, True])
def test_features_stay_fp32_under_bf16_autocast(radford):
    pair = tiny(radford=radford)
    patches, keep, tokens = inputs()
    image, text, scale = pair(visible(patches, keep), keep, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        image16, text16, scale16 = pair(visible(patches, keep), keep, tokens)
    assert (image16.dtype, text16.dtype, scale16.dtype) == (torch.float32,) * 3
    for fine, coarse in ((image, image16), (text, text16)):
        assert not torch.equal(fine, coarse)
        assert ((fine * coarse).sum(-1) > 0.999).all()
        assert torch.allclose(coarse.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_scale_is_clamped_in_the_forward_pass():
    pair = tiny()
    patches, keep, tokens = inputs()
    assert pair.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, expected, gradient in ((9.0, 100.0, 0.0), (-1.0, 1.0, 0.0), (2.0, math.exp(2), math.exp(2))):
        with torch.no_grad():
            pair.logit_scale.fill_(value)
        pair.zero_grad()
        scale = pair(visible(patches, keep), keep, tokens)[2]
        scale.sum().backward()
        assert (scale.item(), pair.logit_scale.grad.item()) == pytest.approx((expected, gradient))


def test_siglip_starts_with_published_scale_and_bias():
    pair = tiny(objective="siglip", temperature=0.1, max_logit_scale=10_000)
    patches, keep, tokens = inputs()
    *_, scale, bias = pair(visible(patches, keep), keep, tokens)
    assert (scale.item(), bias.item()) == pytest.approx((10, -10))
    bias.sum().backward()
    assert pair.logit_bias.grad.item() == 1 and not tiny().loss_parameters()
    assert set(dict(pair.named_parameters())) - set(dict(tiny().named_parameters())) == {"logit_bias"}


def test_init_weights_follow_the_recipe_distributions():
    pair = tiny(trained=False)
    for name, p in pair.named_parameters():
        p = p.detach()
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith(("class_token", "positions", "tokens.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name != "logit_scale":
            bound = math.sqrt(6 / sum(p.shape))
            assert bound * 0.98 < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_init_weights_depend_on_seed_and_name_only():
    pair, again, other = (clip.CLIPModel(sized("tiny"), Augment(), "sdpa") for _ in range(3))
    clip.init_weights(pair, 2**64 - 1)
    torch.manual_seed(99)
    again.named_parameters = lambda: reversed(list(type(again).named_parameters(again)))
    clip.init_weights(again, 2**64 - 1)
    clip.init_weights(other, 0)
    weights = dict(pair.named_parameters())
    values = [p for _, p in pair.named_parameters()]
    assert all(torch.equal(weights[name], p) for name, p in again.named_parameters())
    drawn = [p for p in values if p.numel() > 1 and p.std() > 0]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn)  # no two parameters share a random stream
    assert not torch.equal(pair.image.patch.weight, other.image.patch.weight)
    # Pinned: other initial weights would change every run.
    pinned = [0.11994761, -0.00418194]
    assert pair.image.patch.weight.flatten()[:2].tolist() == pytest.approx(pinned, abs=1e-8)


@pytest.mark.parametrize("radford", [False, True])
@pytest.mark.parametrize("name, objective", [("tiny", "clip"), ("tiny", "siglip"), ("B/16", "clip")])
def test_costs_parameters_match_built_model(name, objective, radford):
    config = sized(name, objective=objective, radford=radford)
    with torch.device("meta"):
        pair = clip.CLIPModel(config, Augment(), "sdpa")
    counted = {tower: sum(p.numel() for p in getattr(pair, tower).parameters()) for tower in ("image", "text")}
    assert model_costs.parameters(config) == counted | {"total": sum(p.numel() for p in pair.parameters())}


@pytest.mark.parametrize("mask, count", [("0", 64), ("0.75", 16)])
@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("precision, device", [("fp32", "cpu"), ("bf16", "cpu"), ("bf16", "cuda")])
@pytest.mark.parametrize("radford", [False, True])
def test_activations_predict_bytes_saved_by_autograd(mask, count, attention, precision, device, radford, monkeypatch):
    if device == "cuda":
        monkeypatch.setattr(torch.nn.LayerNorm, "forward", _in_fp32)
        monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: torch.softmax(x, dim, dtype=torch.float32))
    pair = tiny(attention=attention, radford=radford)
    patches, keep, tokens = inputs(32, count)
    weights = {p.untyped_storage().data_ptr() for p in pair.parameters()}
    alive = []
    sizes = {}

    def save(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), bf16:
        outputs = pair.image(visible(patches, keep), keep), None if radford else pair.text(tokens)
    compute = Compute(device=device, precision=precision, attention=attention)
    config = sized("tiny", radford=radford)
    parts = model_costs.activations(config, compute, 32, mask)
    numbers = model_costs.parameters(config)
    towers = ("image",) if radford else ("image", "text")  # packed texts depend on their lengths
    predicted = sum(parts[f"{tower}_activations"] for tower in towers)
    if precision == "bf16":  # autocast copies weights
        predicted += 2 * sum(numbers[tower] for tower in towers)
        if radford:
            predicted -= 0
        else:
            predicted -= 2 * config.text.vocabulary * config.text.width
    assert outputs[0].requires_grad
    assert predicted == pytest.approx(sum(sizes.values()), rel=0.05)


def _in_fp32(norm, x):
    """LayerNorm in fp32, as CUDA autocast computes it."""
    with torch.autocast("cpu", enabled=False):
        return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _gradients(recompute, precision="fp32", compiled=False, kind="attend"):
    if kind == "radford":
        model = {"radford": True}
    else:
        model = {"padding": kind}
    pair = tiny(**model)
    patches, keep, _ = inputs(8)
    tokens = captions()
    pair.text.bucket_lengths = compiled
    for block in (*pair.image.blocks, *pair.text.blocks):
        block.activation_checkpointing = recompute
        if compiled:
            block.compile(dynamic=False)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        image, text, scale = pair(visible(patches, keep), keep, tokens)
    loss, _ = contrastive_loss("clip", image, text, scale)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in pair.named_parameters()}, sum(saved)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["attend", "mask", "radford"])
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputation_is_bitwise_equal_and_saves_less_memory(recompute, precision, kind):
    loss, plain, much = _gradients("no", precision, kind=kind)
    again, recomputed, little = _gradients(recompute, precision, kind=kind)
    assert torch.equal(loss, again) and plain.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())
    assert little < much * {"selective": 0.65, "block": 1 / 3}[recompute]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attend", "mask", "radford"])
def test_compiled_blocks_match_eager_blocks(kind):
    loss, eager, _ = _gradients("no", kind=kind)
    for recompute in ("no", "selective", "block"):
        compiled, gradients, _ = _gradients(recompute, compiled=True, kind=kind)
        assert torch.allclose(compiled, loss, rtol=1e-5) and gradients.keys() == eager.keys()
        for name, gradient in eager.items():
            assert torch.allclose(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9), name
