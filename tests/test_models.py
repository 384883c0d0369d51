"""TransformerClassifier: what it computes, and that padding takes no part in it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyattn
from pyattn import models
from pyattn.models import TransformerClassifier

VOCAB, WIDTH, HIDDEN, CLASSES, HEADS, LAYERS, MAX_LEN = 23, 12, 20, 5, 3, 2, 17
LENGTHS = [11, 1, 7, 4]
REPADDED = 1e-6  # the bound that the model's documentation gives


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TransformerClassifier(
        VOCAB, WIDTH, HIDDEN, CLASSES, num_heads=HEADS, num_layers=LAYERS, max_len=MAX_LEN, dropout=0.0
    )
    for parameter in model.parameters():  # logits of order one, unlike those of the small initial embeddings
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens_of(lengths, width):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, VOCAB, (length,), generator=generator)
    return tokens


def in_torch(model, tokens):
    """The same model made of torch.nn's encoder layers."""
    x = model.embedding(tokens) + model.position.weight[: tokens.shape[1]]
    padding = tokens == 0
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        parts = {
            "self_attn.in_proj_": block.qkv,
            "self_attn.out_proj.": block.projection,
            "linear1.": block.mlp[0],
            "linear2.": block.mlp[2],
            "norm1.": block.attention_norm,
            "norm2.": block.mlp_norm,
        }
        weights = {name + key: value for name, part in parts.items() for key, value in part.state_dict().items()}
        layer.load_state_dict(weights)
        x = layer(x, src_key_padding_mask=padding)
    x = model.norm(x).masked_fill(padding[..., None], 0.0)
    return model.classifier(x.sum(dim=1) / (~padding).sum(dim=1, keepdim=True))


def test_logits_are_those_of_torch_layers(model):
    model.double()
    torch.set_default_dtype(torch.float64)
    try:
        expected = in_torch(model, tokens_of(LENGTHS, 11))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model(tokens_of(LENGTHS, 11)), expected)


def test_every_block_attends_by_pyattn(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        models, "attention", lambda *args, **kwargs: calls.append(1) or pyattn.attention(*args, **kwargs)
    )
    model(tokens_of(LENGTHS, 11))
    assert len(calls) == LAYERS


@pytest.mark.parametrize("width", [12, MAX_LEN])
def test_padding_a_batch_wider_changes_no_prediction(model, width):
    narrow = model(tokens_of(LENGTHS, 11))
    torch.testing.assert_close(
        model(tokens_of(LENGTHS, width)), narrow, rtol=0, atol=REPADDED * narrow.abs().max().item()
    )


def test_the_rest_of_the_batch_changes_no_prediction(model):
    tokens = tokens_of(LENGTHS, 11)
    together = model(tokens)
    alone = torch.cat([model(row[None, :length]) for row, length in zip(tokens, LENGTHS, strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=REPADDED * together.abs().max().item())


def test_an_empty_text_gets_the_bias_of_the_head(model):
    tokens = tokens_of([3, 0], 3)
    assert torch.equal(model(tokens)[1], model.classifier.bias)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [model.classifier.bias.tolist()] * 2


def test_gradients_reach_every_parameter_and_never_the_padding(model):
    model(tokens_of(LENGTHS, 11)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not model.embedding.weight.grad[0].any()


def test_dropout_acts_in_training_only_and_follows_the_seed():
    torch.manual_seed(0)
    model = TransformerClassifier(VOCAB, WIDTH, HIDDEN, CLASSES, num_heads=HEADS, dropout=0.5)
    tokens = tokens_of(LENGTHS, 11)

    def run(seed):
        torch.manual_seed(seed)
        return model(tokens)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_learns_what_only_order_tells():
    """Which of two words comes first: a bag of words is at chance, so attention and positions have to learn."""
    torch.manual_seed(0)
    model = TransformerClassifier(5, 16, 16, 2, num_heads=2, num_layers=1, max_len=6, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def batch(size):
        tokens = torch.full((size, 6), 1)
        places = torch.rand(size, 6).argsort(dim=1)[:, :2]
        tokens.scatter_(1, places, torch.tensor([[2, 3]]).expand(size, 2))
        return tokens, (places[:, 0] < places[:, 1]).long()

    for _ in range(150):
        tokens, first = batch(64)
        loss = F.cross_entropy(model(tokens), first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, first = batch(500)
    assert (model(tokens).argmax(dim=1) == first).float().mean() > 0.95


def test_bad_input_is_named(model):
    with pytest.raises(pyattn.ShapeError, match=r"tokens: expected at most max_len = 17 per text, got shape \(2, 18\)"):
        model(torch.ones(2, 18, dtype=torch.int64))
    with pytest.raises(pyattn.ShapeError, match=r"tokens: expected shape \(batch, seq\), got \(4,\)"):
        model(torch.ones(4, dtype=torch.int64))
    with pytest.raises(pyattn.DtypeError, match="tokens: .*got torch.float32"):
        model(torch.ones(2, 4))
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads = 5, got 12"):
        TransformerClassifier(VOCAB, 12, num_heads=5)
